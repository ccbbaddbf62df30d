//! B1: what a stream delivers lies without a gap from the address asked for, and progress is never lost.
#![cfg(all(unix, feature = "backend-mmap", feature = "rawfd"))]
#![expect(unsafe_code, reason = "calls memfd_create(2) and mmap(2)")]

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, MmapRegion, ReadVolatile,
    VolatileMemory, VolatileMemoryError, VolatileSlice, WriteVolatile,
};

/// Two regions without a hole between them.
fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
        .unwrap()
}

/// Moves up to `step` bytes at a time and is interrupted before each; behind the last of `left` bytes, `end` is the answer.
struct Slow {
    left: usize,
    step: usize,
    moved: Vec<u8>,
    interrupted: bool,
    end: Option<i32>,
}

fn slow(left: usize, step: usize, end: Option<i32>) -> Slow {
    Slow {
        left,
        step,
        moved: vec![],
        interrupted: false,
        end,
    }
}

impl Slow {
    fn count(&mut self, room: usize) -> Result<usize, VolatileMemoryError> {
        self.interrupted = !self.interrupted;
        if self.interrupted {
            return Err(VolatileMemoryError::IOError(ErrorKind::Interrupted.into()));
        }
        match self.end {
            Some(number) if self.left == 0 => Err(VolatileMemoryError::IOError(
                std::io::Error::from_raw_os_error(number),
            )),
            _ => {
                let count = self.step.min(room).min(self.left);
                self.left -= count;
                Ok(count)
            }
        }
    }
}

impl ReadVolatile for Slow {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let count = self.count(buf.len())?;
        let bytes: Vec<u8> = (0..count)
            .map(|i| (self.moved.len() + i) as u8 | 0x80)
            .collect();
        buf.copy_from(&bytes);
        self.moved.extend(bytes);
        Ok(count)
    }
}

impl WriteVolatile for Slow {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut bytes = vec![0; self.count(buf.len())?];
        buf.copy_to(&mut bytes);
        self.moved.extend(&bytes);
        Ok(bytes.len())
    }
}

fn raw_error<T: std::fmt::Debug>(result: Result<T, GuestMemoryError>) -> Option<i32> {
    match result {
        Err(GuestMemoryError::IOError(error)) => error.raw_os_error(),
        other => panic!("{other:?}"),
    }
}

/// What lies from `addr` on, and that the bytes behind it are untouched.
fn holds(memory: &GuestMemoryMmap, addr: u64, bytes: &[u8]) {
    let mut all = vec![0; 0x2000];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    let (start, end) = (addr as usize, addr as usize + bytes.len());
    assert!(
        all[..start].iter().chain(&all[end..]).all(|&b| b == 0),
        "bytes outside were written"
    );
    assert_eq!(&all[start..end], bytes);
}

#[test]
fn b1_a_read_stops_at_the_first_short_read_and_leaves_no_hole() {
    // 16 bytes before the boundary, 10 at a time: the second read would begin in the middle of nowhere.
    let (mut source, target) = (slow(100, 10, None), memory());
    assert_eq!(
        target
            .read_volatile_from(GuestAddress(0xff0), &mut source, 0x100)
            .unwrap(),
        10
    );
    holds(&target, 0xff0, &source.moved);
    assert_eq!(source.left, 90);

    // The first piece is filled, the second is not: both are counted, and they touch.
    let (mut source, target) = (slow(100, 10, None), memory());
    assert_eq!(
        target
            .read_volatile_from(GuestAddress(0xff6), &mut source, 0x100)
            .unwrap(),
        20
    );
    holds(&target, 0xff6, &source.moved);
}

#[test]
fn b1_a_write_moves_each_piece_whole_and_counts_what_was_taken() {
    let source = memory();
    source.write_slice(&[7; 10], GuestAddress(0xff0)).unwrap();
    let mut target = slow(100, 10, None);
    assert_eq!(
        source
            .write_volatile_to(GuestAddress(0xff0), &mut target, 0x100)
            .unwrap(),
        100
    );
    assert_eq!(
        (&target.moved[..10], &target.moved[10..]),
        ([7; 10].as_slice(), [0; 90].as_slice())
    );
}

#[test]
fn b1_exact_forms_loop_until_done() {
    for step in [1, 3, 10, 4096] {
        let (mut source, target) = (slow(200, step, None), memory());
        target
            .read_exact_volatile_from(GuestAddress(0xfc0), &mut source, 200)
            .unwrap();
        holds(&target, 0xfc0, &source.moved);
        assert_eq!(source.moved.len(), 200);
        let mut back = slow(200, step, None);
        target
            .write_all_volatile_to(GuestAddress(0xfc0), &mut back, 200)
            .unwrap();
        assert_eq!(back.moved, source.moved);
    }
}

#[test]
fn b1_exact_forms_end_with_the_stream_and_count_what_was_done() {
    let (mut source, target) = (slow(100, 7, None), memory());
    let error = target
        .read_exact_volatile_from(GuestAddress(0xfc0), &mut source, 200)
        .unwrap_err();
    assert!(
        matches!(
            error,
            GuestMemoryError::PartialBuffer {
                expected: 200,
                completed: 100
            }
        ),
        "{error}"
    );
    holds(&target, 0xfc0, &source.moved);
    let error = target
        .write_all_volatile_to(GuestAddress(0xfc0), &mut slow(100, 7, None), 200)
        .unwrap_err();
    assert!(
        matches!(
            error,
            GuestMemoryError::PartialBuffer {
                expected: 200,
                completed: 100
            }
        ),
        "{error}"
    );
    // Guest memory ends first.
    let error = target
        .read_exact_volatile_from(GuestAddress(0x1ff0), &mut slow(100, 7, None), 32)
        .unwrap_err();
    assert!(
        matches!(
            error,
            GuestMemoryError::PartialBuffer {
                expected: 32,
                completed: 16
            }
        ),
        "{error}"
    );
}

#[test]
fn b1_exact_forms_end_with_an_error_and_count_what_was_done() {
    let (mut source, target) = (slow(100, 7, Some(libc::EIO)), memory());
    let error = target
        .read_exact_volatile_from(GuestAddress(0xfc0), &mut source, 200)
        .unwrap_err();
    assert!(
        matches!(
            error,
            GuestMemoryError::PartialBuffer {
                expected: 200,
                completed: 100
            }
        ),
        "{error}"
    );
    holds(&target, 0xfc0, &source.moved);
    // The next call meets the error itself.
    let next = target.read_exact_volatile_from(GuestAddress(0xfc0 + 100), &mut source, 100);
    assert_eq!(raw_error(next), Some(libc::EIO));
    let mut sink = slow(100, 7, Some(libc::ENOSPC));
    let error = target
        .write_all_volatile_to(GuestAddress(0xfc0), &mut sink, 200)
        .unwrap_err();
    assert!(
        matches!(
            error,
            GuestMemoryError::PartialBuffer {
                expected: 200,
                completed: 100
            }
        ),
        "{error}"
    );
    assert_eq!(
        raw_error(target.write_all_volatile_to(GuestAddress(0), &mut sink, 1)),
        Some(libc::ENOSPC)
    );
}

#[test]
fn b1_the_count_before_an_error_is_returned_first() {
    // The first slice is filled; the second meets EAGAIN.
    let (mut source, target) = (slow(16, 16, Some(libc::EAGAIN)), memory());
    assert_eq!(
        target
            .read_volatile_from(GuestAddress(0xff0), &mut source, 0x40)
            .unwrap(),
        16
    );
    holds(&target, 0xff0, &source.moved);
    let next = target.read_volatile_from(GuestAddress(0x1000), &mut source, 0x30);
    assert_eq!(raw_error(next), Some(libc::EAGAIN));
    let mut sink = slow(16, 16, Some(libc::EAGAIN));
    assert_eq!(
        target
            .write_volatile_to(GuestAddress(0xff0), &mut sink, 0x40)
            .unwrap(),
        16
    );
    assert_eq!(
        raw_error(target.write_volatile_to(GuestAddress(0x1000), &mut sink, 1)),
        Some(libc::EAGAIN)
    );
}

/// The same with descriptors: a socket that does not block and has less than was asked for.
#[test]
fn b1_sockets_that_would_block_lose_nothing() {
    let (mut left, right) = UnixStream::pair().unwrap();
    right.set_nonblocking(true).unwrap();
    let target = memory();
    left.write_all(&[9; 16]).unwrap();
    assert_eq!(
        target
            .read_volatile_from(GuestAddress(0xff0), &mut &right, 0x40)
            .unwrap(),
        16
    );
    holds(&target, 0xff0, &[9; 16]);
    let again = target.read_volatile_from(GuestAddress(0x1000), &mut &right, 0x40);
    assert_eq!(raw_error(again), Some(libc::EAGAIN));
    left.write_all(&[9; 5]).unwrap();
    let partial = target
        .read_exact_volatile_from(GuestAddress(0x1000), &mut &right, 8)
        .unwrap_err();
    assert!(
        matches!(
            partial,
            GuestMemoryError::PartialBuffer {
                expected: 8,
                completed: 5
            }
        ),
        "{partial}"
    );

    // One that blocks is waited for, as often as it takes.
    let (mut left, right) = UnixStream::pair().unwrap();
    let writer = std::thread::spawn(move || {
        for i in 0..40u8 {
            left.write_all(&[i | 0x80; 5]).unwrap();
        }
        let mut rest = vec![];
        left.read_to_end(&mut rest).unwrap();
    });
    let target = memory();
    target
        .read_exact_volatile_from(GuestAddress(0xf80), &mut &right, 200)
        .unwrap();
    let expected: Vec<u8> = (0..40u8).flat_map(|i| [i | 0x80; 5]).collect();
    holds(&target, 0xf80, &expected);
    drop(right);
    writer.join().unwrap();
}

/// One read(2) or write(2) moves no more than 2147479552 bytes. The memory is one small file, mapped over and over.
#[test]
#[cfg(target_os = "linux")]
fn b1_a_transfer_may_be_larger_than_one_system_call_moves() {
    const WINDOW: usize = 32 << 20;
    const TOTAL: usize = (2 << 30) + (1 << 20);
    const LIMIT: usize = 2_147_479_552;
    let memfd = |len: usize| {
        use std::os::fd::FromRawFd;
        // SAFETY: a valid name.
        let fd = unsafe { libc::memfd_create(c"b1".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the descriptor was just made, and belongs to nobody else.
        let file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.set_len(len as u64).unwrap();
        file
    };
    // A file without data, except around the limit and at the end.
    let (source, window) = (memfd(TOTAL), memfd(WINDOW));
    source
        .write_all_at(b"around the limit", LIMIT as u64 - 8)
        .unwrap();
    source.write_all_at(b"end", TOTAL as u64 - 3).unwrap();

    let outer = MmapRegion::<()>::build(
        None,
        TOTAL,
        libc::PROT_NONE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    )
    .unwrap();
    let both = libc::PROT_READ | libc::PROT_WRITE;
    for at in (0..TOTAL).step_by(WINDOW) {
        let (addr, len) = (outer.as_ptr().wrapping_add(at), WINDOW.min(TOTAL - at));
        let (flags, fd) = (libc::MAP_SHARED | libc::MAP_FIXED, window.as_raw_fd());
        // SAFETY: replaces a part of the mapping above, which nothing has accessed.
        let answer = unsafe { libc::mmap(addr.cast(), len, both, flags, fd, 0) };
        assert_eq!(answer, addr.cast());
    }
    // SAFETY: the mapping stays until `outer` is dropped, behind the region.
    let region =
        unsafe { MmapRegion::<()>::build_raw(outer.as_ptr(), TOTAL, both, libc::MAP_SHARED) }
            .unwrap();
    let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(0x1000)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    memory
        .read_exact_volatile_from(GuestAddress(0x1000), &mut &source, TOTAL)
        .unwrap();
    let text: [u8; 16] = memory
        .read_obj(GuestAddress(0x1000 + LIMIT as u64 - 8))
        .unwrap();
    assert_eq!(&text, b"around the limit");
    let end: [u8; 3] = memory
        .read_obj(GuestAddress(0x1000 + TOTAL as u64 - 3))
        .unwrap();
    assert_eq!(&end, b"end");

    // The null device takes everything without a look at it, but no more than that at a time.
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    memory
        .write_all_volatile_to(GuestAddress(0x1000), &mut &null, TOTAL)
        .unwrap();
    assert_eq!(outer.len(), TOTAL);
}
