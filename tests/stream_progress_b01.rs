//! B1: the bytes of a stream arrive without a gap, and no error hides the bytes moved before it.
#![cfg(all(unix, feature = "backend-mmap", feature = "rawfd"))]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    MemoryRegionAddress, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile,
};

/// Creates two adjacent regions.
fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
        .unwrap()
}

/// A stream of `left` bytes. It is interrupted before each transfer, then moves up to `step` bytes.
/// At its end, it returns the error number `end`.
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

/// Checks that `bytes` are at `addr`, and that all other bytes are zero.
fn assert_bytes(memory: &GuestMemoryMmap, addr: u64, bytes: &[u8]) {
    let mut all = vec![0; 0x2000];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    let (start, end) = (addr as usize, addr as usize + bytes.len());
    assert!(
        all[..start].iter().chain(&all[end..]).all(|&b| b == 0),
        "bytes outside the range were written"
    );
    assert_eq!(&all[start..end], bytes);
}

/// Checks that a transfer of `expected` bytes failed after `completed` bytes.
#[track_caller]
fn assert_partial(result: Result<(), GuestMemoryError>, expected: usize, completed: usize) {
    match result.unwrap_err() {
        GuestMemoryError::PartialBuffer {
            expected: of,
            completed: done,
        } => assert_eq!((of, done), (expected, completed)),
        other => panic!("{other}"),
    }
}

#[test]
fn b01_read_volatile_from_stops_at_first_short_read() {
    // The boundary is 16 bytes away, and a read moves 10. To continue would leave a gap of 6.
    let (mut source, target) = (slow(100, 10, None), memory());
    assert_eq!(
        target
            .read_volatile_from(GuestAddress(0xff0), &mut source, 0x100)
            .unwrap(),
        10
    );
    assert_bytes(&target, 0xff0, &source.moved);
    assert_eq!(source.left, 90);

    // The first segment is full, the second is not.
    let (mut source, target) = (slow(100, 10, None), memory());
    assert_eq!(
        target
            .read_volatile_from(GuestAddress(0xff6), &mut source, 0x100)
            .unwrap(),
        20
    );
    assert_bytes(&target, 0xff6, &source.moved);
}

#[test]
fn b01_write_volatile_to_writes_each_segment_whole() {
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
fn b01_exact_transfers_repeat_until_complete() {
    for step in [1, 3, 10, 4096] {
        let (mut source, target) = (slow(200, step, None), memory());
        target
            .read_exact_volatile_from(GuestAddress(0xfc0), &mut source, 200)
            .unwrap();
        assert_bytes(&target, 0xfc0, &source.moved);
        assert_eq!(source.moved.len(), 200);
        let mut back = slow(200, step, None);
        target
            .write_all_volatile_to(GuestAddress(0xfc0), &mut back, 200)
            .unwrap();
        assert_eq!(back.moved, source.moved);
    }
}

/// The source may mark its whole slice at each call. Bounded slices bound these marks.
#[test]
fn b01_exact_read_of_long_range_passes_bounded_parts() {
    struct Sizes(Vec<usize>);
    impl ReadVolatile for Sizes {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buf: &mut VolatileSlice<B>,
        ) -> Result<usize, VolatileMemoryError> {
            self.0.push(buf.len());
            Ok(buf.len())
        }
    }
    const MIB: usize = 1 << 20;
    let start = GuestAddress(0);
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(start, 33 * MIB)]).unwrap();
    let (mut by_address, mut by_slice) = (Sizes(vec![]), Sizes(vec![]));
    memory
        .read_exact_volatile_from(start, &mut by_address, 33 * MIB)
        .unwrap();
    assert_eq!(by_address.0, [16 * MIB, 16 * MIB, MIB]);
    let slice = memory.get_slice(start, 33 * MIB).unwrap();
    slice
        .read_exact_volatile_from(0, &mut by_slice, 33 * MIB)
        .unwrap();
    assert_eq!(by_slice.0, by_address.0);
}

#[test]
fn b01_exact_transfers_at_end_of_stream_return_count() {
    let (mut source, target) = (slow(100, 7, None), memory());
    assert_partial(
        target.read_exact_volatile_from(GuestAddress(0xfc0), &mut source, 200),
        200,
        100,
    );
    assert_bytes(&target, 0xfc0, &source.moved);
    assert_partial(
        target.write_all_volatile_to(GuestAddress(0xfc0), &mut slow(100, 7, None), 200),
        200,
        100,
    );
    // The guest memory ends before the stream.
    assert_partial(
        target.read_exact_volatile_from(GuestAddress(0x1ff0), &mut slow(100, 7, None), 32),
        32,
        16,
    );
}

#[test]
fn b01_exact_transfers_at_stream_error_return_count() {
    let (mut source, target) = (slow(100, 7, Some(libc::EIO)), memory());
    assert_partial(
        target.read_exact_volatile_from(GuestAddress(0xfc0), &mut source, 200),
        200,
        100,
    );
    assert_bytes(&target, 0xfc0, &source.moved);
    // The next call returns the error.
    let next = target.read_exact_volatile_from(GuestAddress(0xfc0 + 100), &mut source, 100);
    assert_eq!(raw_error(next), Some(libc::EIO));
    let mut sink = slow(100, 7, Some(libc::ENOSPC));
    assert_partial(
        target.write_all_volatile_to(GuestAddress(0xfc0), &mut sink, 200),
        200,
        100,
    );
    assert_eq!(
        raw_error(target.write_all_volatile_to(GuestAddress(0), &mut sink, 1)),
        Some(libc::ENOSPC)
    );
}

#[test]
fn b01_transfers_before_stream_error_return_count() {
    // The first segment is filled. The second read returns EAGAIN.
    let (mut source, target) = (slow(16, 16, Some(libc::EAGAIN)), memory());
    assert_eq!(
        target
            .read_volatile_from(GuestAddress(0xff0), &mut source, 0x40)
            .unwrap(),
        16
    );
    assert_bytes(&target, 0xff0, &source.moved);
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

#[test]
fn b01_transfers_on_nonblocking_socket_return_count() {
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
    assert_bytes(&target, 0xff0, &[9; 16]);
    let again = target.read_volatile_from(GuestAddress(0x1000), &mut &right, 0x40);
    assert_eq!(raw_error(again), Some(libc::EAGAIN));
    left.write_all(&[9; 5]).unwrap();
    assert_partial(
        target.read_exact_volatile_from(GuestAddress(0x1000), &mut &right, 8),
        8,
        5,
    );

    // A blocking socket is read until the range is full.
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
    assert_bytes(&target, 0xf80, &expected);
    drop(right);
    writer.join().unwrap();
}

/// One `read(2)` or `write(2)` moves at most 2147479552 bytes. The memory is a small file, mapped
/// repeatedly.
#[test]
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "calls memfd_create(2) and mmap(2)")]
fn b01_transfer_larger_than_system_call_limit_succeeds() {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use vm_memory::{MmapRegion, VolatileMemory};

    const WINDOW: usize = 32 << 20;
    const TOTAL: usize = (2 << 30) + (1 << 20);
    const LIMIT: usize = 2_147_479_552;
    let memfd = |len: usize| {
        use std::os::fd::FromRawFd;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"b1".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: `memfd_create` returned the descriptor, which nothing else owns.
        let file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.set_len(len as u64).unwrap();
        file
    };
    // A sparse file, with data around the limit and at the end.
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
        let result = unsafe { libc::mmap(addr.cast(), len, both, flags, fd, 0) };
        assert_eq!(result, addr.cast());
    }
    // SAFETY: 1. `outer` is a mapping of `TOTAL` bytes, created with this protection and
    // `MAP_SHARED` above. 2. `outer` is dropped after the region. 3. No reference to its bytes
    // exists.
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

    // /dev/null accepts all bytes, up to the limit per call.
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    memory
        .write_all_volatile_to(GuestAddress(0x1000), &mut &null, TOTAL)
        .unwrap();
    assert_eq!(outer.len(), TOTAL);
}

/// A sink that counts its calls, accepts three bytes per call, and is full after two calls.
#[derive(Default)]
struct Overriding {
    parts: usize,
    wholes: usize,
}

impl WriteVolatile for Overriding {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.parts += 1;
        Ok(if self.parts > 2 { 0 } else { buf.len().min(3) })
    }

    fn write_all_volatile<B: BitmapSlice>(
        &mut self,
        _: &VolatileSlice<B>,
    ) -> Result<(), VolatileMemoryError> {
        self.wholes += 1;
        Ok(())
    }
}

#[test]
fn b01_write_all_volatile_to_overriding_sink_counts_parts() {
    let memory = memory();
    let mut sink = Overriding::default();
    let error = memory
        .write_all_volatile_to(GuestAddress(0xffc), &mut sink, 8)
        .unwrap_err();
    assert!(matches!(
        error,
        GuestMemoryError::PartialBuffer {
            expected: 8,
            completed: 4
        }
    ));
    assert_eq!((sink.parts, sink.wholes), (3, 0));

    let region = memory.find_region(GuestAddress(0)).unwrap();
    region
        .write_all_volatile_to(MemoryRegionAddress(0), &mut sink, 8)
        .unwrap();
    assert_eq!((sink.parts, sink.wholes), (3, 1));
}

#[test]
fn b01_exact_read_of_ended_source_returns_count_for_memory_and_eof_for_region() {
    let memory = memory();
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let error = region
        .read_exact_volatile_from(MemoryRegionAddress(0), &mut slow(3, 2, None), 8)
        .unwrap_err();
    let end = ErrorKind::UnexpectedEof;
    assert!(matches!(error, GuestMemoryError::IOError(e) if e.kind() == end));
    let error = memory
        .read_exact_volatile_from(GuestAddress(0), &mut slow(3, 2, None), 8)
        .unwrap_err();
    assert!(matches!(
        error,
        GuestMemoryError::PartialBuffer {
            expected: 8,
            completed: 3
        }
    ));
}
