//! B14: a read without data marks nothing, a transfer of 0 bytes makes no call, and overlaps in a
//! file do not overflow. A mapping past the end of a file has an error of its own.
#![cfg(all(
    unix,
    feature = "backend-mmap",
    feature = "backend-bitmap",
    feature = "rawfd"
))]
#![expect(
    unsafe_code,
    reason = "installs a signal handler, and borrows a mapping"
)]

use std::fs::File;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

/// Creates 0x2000 bytes at 0, with one bit per 0x100 bytes.
fn memory() -> GuestMemoryMmap<AtomicBitmap> {
    let bitmap = AtomicBitmap::new(0x2000, NonZeroUsize::new(0x100).unwrap());
    let mapping = MmapRegionBuilder::new_with_bitmap(0x2000, bitmap)
        .build()
        .unwrap();
    GuestMemoryMmap::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()])
        .unwrap()
}

fn marks(memory: &GuestMemoryMmap<AtomicBitmap>) -> Vec<u64> {
    memory.iter().next().unwrap().bitmap().get_and_reset()
}

fn would_block<T: std::fmt::Debug>(result: Result<T, GuestMemoryError>) {
    match result {
        Err(GuestMemoryError::IOError(error)) => {
            assert_eq!(error.raw_os_error(), Some(libc::EAGAIN))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn b14_read_that_would_block_marks_nothing() {
    let (mut left, right) = UnixStream::pair().unwrap();
    right.set_nonblocking(true).unwrap();
    let memory = memory();
    would_block(memory.read_volatile_from(GuestAddress(0), &mut &right, 0x2000));
    would_block(memory.read_exact_volatile_from(GuestAddress(0), &mut &right, 0x2000));
    assert_eq!(marks(&memory), [0]);
    // The kernel may write more bytes than it counts.
    left.write_all(&[1; 0x101]).unwrap();
    assert_eq!(
        memory
            .read_volatile_from(GuestAddress(0x100), &mut &right, 0x1000)
            .unwrap(),
        0x101
    );
    assert_eq!(marks(&memory), [0x1fffe]);
    // The end of the stream writes nothing.
    drop(left);
    assert_eq!(
        memory
            .read_volatile_from(GuestAddress(0), &mut &right, 0x2000)
            .unwrap(),
        0
    );
    assert_eq!(marks(&memory), [0]);
}

#[test]
fn b14_transfer_of_no_bytes_makes_no_call() {
    let memory = memory();
    let region = memory.iter().next().unwrap();
    let slice = memory.get_slice(GuestAddress(0x100), 0x100).unwrap();
    let (at, offset) = (GuestAddress(0x100), MemoryRegionAddress(0x100));
    // Each end of a pipe is open for one direction, and returns EBADF for the other one.
    let (reader, writer) = std::io::pipe().unwrap();
    let (mut reader, mut writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
    for (count, is_refused) in [(0, false), (1, true)] {
        let reads = [
            memory.read_volatile_from(at, &mut writer, count),
            region.read_volatile_from(offset, &mut writer, count),
            Ok(slice
                .read_volatile_from(0, &mut writer, count)
                .unwrap_or(99)),
            memory.write_volatile_to(at, &mut reader, count),
            region.write_volatile_to(offset, &mut reader, count),
            Ok(slice.write_volatile_to(0, &mut reader, count).unwrap_or(99)),
        ];
        for (number, result) in reads.into_iter().enumerate() {
            let moved = result.unwrap_or(99);
            assert_eq!(moved, if is_refused { 99 } else { 0 }, "{number}: {count}");
        }
    }
    // A read(2) of 0 bytes would take the packet.
    let (wire, tap) = UnixDatagram::pair().unwrap();
    wire.send(b"packet").unwrap();
    let mut tap = OwnedFd::from(tap);
    assert_eq!(slice.read_volatile_from(0, &mut tap, 0).unwrap(), 0);
    assert_eq!(slice.read_volatile_from(0, &mut tap, 9).unwrap(), 6);
    let tap = UnixDatagram::from(tap);
    tap.set_nonblocking(true).unwrap();
    let mut wire = OwnedFd::from(wire);
    assert_eq!(slice.write_volatile_to(0, &mut wire, 0).unwrap(), 0);
    assert!(tap.recv(&mut [0]).is_err());
}

#[test]
fn b14_read_with_other_error_marks_whole_range() {
    let memory = memory();
    let directory = File::open("/").unwrap();
    let result = memory.read_volatile_from(GuestAddress(0x180), &mut &directory, 0x100);
    assert!(
        matches!(result, Err(GuestMemoryError::IOError(e)) if e.raw_os_error() == Some(libc::EISDIR))
    );
    assert_eq!(marks(&memory), [0b110]);
}

#[test]
#[cfg(target_os = "linux")]
fn b14_interrupted_read_marks_nothing() {
    use std::io::ErrorKind;
    use std::sync::atomic::{AtomicBool, Ordering};

    use test_support::ThreadId;
    use vm_memory::{ReadVolatile, VolatileMemoryError};

    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all fields of `sigaction` are numbers or optional pointers, for which zeroes are
    // valid. They mean no flags, so no SA_RESTART, and no blocked signals.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `action` is initialised, and its handler does nothing, which is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) };
    assert_eq!(result, 0);

    let (mut left, right) = UnixStream::pair().unwrap();
    let memory = memory();
    let reader = ThreadId::current();
    // SAFETY: pthread_self(3) has no arguments and no preconditions.
    let handle = unsafe { libc::pthread_self() } as usize;
    let interrupt = || {
        reader.wait_until_asleep();
        // SAFETY: each scope below joins the caller before the reader can end, so its id is valid.
        unsafe { libc::pthread_kill(handle as libc::pthread_t, libc::SIGUSR1) };
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The reader may also sleep before the read has begun.
            while !done.load(Ordering::Relaxed) {
                interrupt();
            }
        });
        let mut slice = memory.get_slice(GuestAddress(0), 0x2000).unwrap();
        let result = (&right).read_volatile(&mut slice);
        done.store(true, Ordering::Relaxed);
        assert!(
            matches!(&result, Err(VolatileMemoryError::IOError(e)) if e.kind() == ErrorKind::Interrupted),
            "{result:?}"
        );
        assert_eq!(marks(&memory), [0]);
    });

    // `Bytes` repeats the interrupted read.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (0..10).for_each(|_| interrupt());
            left.write_all(&[5; 8]).unwrap();
        });
        memory
            .read_exact_volatile_from(GuestAddress(0x200), &mut &right, 8)
            .unwrap();
    });
    assert_eq!(
        memory.read_obj::<[u8; 8]>(GuestAddress(0x200)).unwrap(),
        [5; 8]
    );
    assert_eq!(marks(&memory), [0b100]);
}

/// Creates a region that claims a range of a file, and borrows another mapping.
fn placed(file: &Arc<File>, start: u64, size: usize, host: &MmapRegion) -> MmapRegion {
    let builder =
        MmapRegionBuilder::new(size).with_file_offset(FileOffset::from_arc(file.clone(), start));
    // SAFETY: clause 1 does not hold if `size` is larger than `host`. But no byte of the region is
    // accessed.
    unsafe { builder.with_raw_mmap_pointer(host.as_ptr()) }
        .build()
        .unwrap()
}

#[test]
fn b14_fds_overlap_near_largest_offset_does_not_overflow() {
    let host = MmapRegion::new(0x1000).unwrap();
    let file = Arc::new(File::open("/dev/zero").unwrap());
    let top = u64::MAX - 0xfff;
    for (a, a_len, b, b_len, overlap) in [
        (top, 0x2000, top, 0x2000, true),
        (top, 0x1000, top - 0x1000, 0x1000, false),
        (top, 0x1000, top - 0x1000, 0x1001, true),
        (top, usize::MAX, 0, 0x1000, false),
        (top, usize::MAX, 0, usize::MAX, true),
        (top - 0x1000, usize::MAX, top, usize::MAX, true),
        (0, 0x1000, 0x1000, usize::MAX, false),
        (0, 0x1001, 0x1000, usize::MAX, true),
    ] {
        let (left, right) = (
            placed(&file, a, a_len, &host),
            placed(&file, b, b_len, &host),
        );
        assert_eq!(
            left.fds_overlap(&right),
            overlap,
            "{a:#x}+{a_len:#x}, {b:#x}+{b_len:#x}"
        );
        assert_eq!(right.fds_overlap(&left), overlap);
        assert!(!left.fds_overlap(&host));
    }
}

#[test]
fn b14_mapping_past_end_of_file_returns_past_eof() {
    let file = test_support::temp_file_of_len(0x1000);
    let refused = MmapRegion::<()>::from_file(FileOffset::new(file, 0), 0x10_0000).unwrap_err();
    assert!(
        matches!(refused, MmapRegionError::MappingPastEof),
        "{refused}"
    );
}
