//! A `VolatileSlice` without a bitmap has the layout of a `struct iovec`, except with the feature
//! `xen`.
#![cfg(all(feature = "backend-mmap", unix, not(feature = "xen")))]
#![expect(unsafe_code, reason = "calls readv(2)")]

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;

use vm_memory::{Bytes, VolatileSlice};

#[test]
fn readv_into_array_of_volatile_slices_fills_each() {
    let path = std::env::temp_dir().join(format!("slices_are_iovecs.{}", std::process::id()));
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(b"abcdefg").unwrap();
    file.rewind().unwrap();

    let mut memory = [b'.'; 16];
    let whole = VolatileSlice::from(memory.as_mut_slice());
    let slices = [(1, 3), (6, 0), (10, 4)].map(|(at, len)| whole.subslice(at, len).unwrap());
    let count = slices.len().try_into().unwrap();
    // SAFETY: `VolatileSlice<()>` has the layout of `struct iovec`: constant assertions next to the
    // type check this. `slices` has `count` of them, whose bytes are borrowed during the call.
    let moved = unsafe { libc::readv(file.as_raw_fd(), slices.as_ptr().cast(), count) };
    assert_eq!(moved, 7);
    let mut seen = [0; 16];
    whole.read_slice(&mut seen, 0).unwrap();
    assert_eq!(&seen, b".abc......defg..");
}
