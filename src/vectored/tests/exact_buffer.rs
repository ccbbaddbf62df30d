//! Whole buffers, read and written by as many system calls as necessary.

use std::os::unix::net::UnixDatagram;

use super::segments::PASSED;
use super::*;

/// The number and the length of the segments of a disk request.
const SEGMENTS: u64 = 2000;
const SEGMENT: usize = 0x100;

/// Creates a buffer of [`SEGMENTS`] segments, one for each page from the last one down.
fn scattered(memory: &Arc<Memory>, access: Permissions) -> IoBuffer<Memory> {
    let mut buffer = IoBuffer::new(Arc::clone(memory), access);
    buffer.set_segment_limit(SEGMENTS as usize);
    let pages = (0..SEGMENTS).rev();
    let ranges = pages.map(|page| (GuestAddress(page * 0x1000 + 7), SEGMENT));
    buffer.try_extend(ranges).unwrap();
    buffer
}

/// Creates a memory of one region, whose pages [`scattered`] uses.
fn one_region() -> Arc<Memory> {
    let ranges = [(GuestAddress(0), SEGMENTS as usize * PAGE)];
    Arc::new(Memory::from_ranges(&ranges).unwrap())
}

/// Returns the dirty pages of the first region, and makes them clean.
fn dirty_pages(memory: &Memory) -> Vec<u64> {
    let region = memory.iter().next().unwrap().get_mmap();
    let words = region.bitmap().get_and_reset().into_iter().enumerate();
    let pages = words.flat_map(|(index, word)| {
        let bits = (0..64).filter(move |bit| word & (1 << bit) != 0);
        bits.map(move |bit| index as u64 * 64 + bit)
    });
    pages.collect()
}

/// Creates a buffer of three segments of four bytes in the pages 0, 2 and 1.
fn three(memory: &Arc<Memory>, access: Permissions) -> IoBuffer<Memory> {
    let ranges = [0x10, 0x2010, 0x1010].map(|addr| (GuestAddress(addr), 4));
    IoBuffer::from_ranges(memory, ranges, access).unwrap()
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_of_2000_segments_is_transferred_completely() {
    let memory = one_region();
    let bytes = pattern(SEGMENTS as usize * SEGMENT);
    let source = temp_file(&[&[0; 3], &bytes[..]].concat());
    let request = scattered(&memory, Permissions::ReadWrite);
    let most = MAX_VECTORS * SEGMENT;
    assert_eq!(request.read_from_at(&source, 3).unwrap(), most);

    request.read_exact_from_at(&source, 3).unwrap();
    assert_eq!(dirty_pages(&memory), (0..SEGMENTS).collect::<Vec<_>>());
    let mut seen = vec![0; bytes.len()];
    assert_eq!(request.copy_to(0, &mut seen).unwrap(), bytes.len());
    assert!(seen == bytes);

    let mut target = temp_file(&[]);
    request.write_all_to(&target).unwrap();
    request
        .write_all_to_at(&target, bytes.len() as u64)
        .unwrap();
    let mut written = Vec::new();
    target.seek(SeekFrom::Start(0)).unwrap();
    target.read_to_end(&mut written).unwrap();
    assert!(written == [&bytes[..], &bytes].concat());
    assert_eq!(dirty_pages(&memory), [0u64; 0]);

    // From the position of the file, whose bytes are then used up.
    let mut source = source;
    source.seek(SeekFrom::Start(3)).unwrap();
    request.copy_from(0, &vec![0; bytes.len()]).unwrap();
    request.read_exact_from(&source).unwrap();
    request.copy_to(0, &mut seen).unwrap();
    assert!(seen == bytes);
    assert_eq!(request.len(), bytes.len());
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_read_exact_of_short_file_marks_what_each_call_reaches() {
    let memory = one_region();
    // The second call reaches the second segment and those up to 1025.
    let file = temp_file(&[5; SEGMENT + 1]);
    let request = scattered(&memory, Permissions::Write);
    let error = request.read_exact_from_at(&file, 0).unwrap_err();
    let Error::PartialBuffer {
        expected,
        completed,
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!((expected, completed), (request.len(), SEGMENT + 1));
    // The first call had a short count, and the second one began a segment later.
    let first = SEGMENTS - MAX_VECTORS as u64;
    let reached: Vec<_> = (first - 1..SEGMENTS).collect();
    assert_eq!(dirty_pages(&memory), reached);

    let error = request.read_exact_from_at(&file, 0x1000).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::UnexpectedEof));
    assert_eq!(dirty_pages(&memory), reached[1..]);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_read_exact_joins_short_reads_and_marks_what_calls_reach() {
    let memory = Arc::new(regions(4));
    let request = three(&memory, Permissions::ReadWrite);
    // Each read returns one packet.
    let (peer, socket) = UnixDatagram::pair().unwrap();
    for packet in [&b"abcde"[..], b"f", b"ghijk", b"l"] {
        peer.send(packet).unwrap();
    }
    request.read_exact_from(&socket).unwrap();
    let mut seen = [0; 12];
    request.copy_to(0, &mut seen).unwrap();
    assert_eq!(&seen, b"abcdefghijkl");
    assert_eq!(dirty(&memory), [0, 0x1000, 0x2000]);

    // No packet is left after six bytes, which are in two of the pages. The calls reached all.
    socket.set_nonblocking(true).unwrap();
    peer.send(b"12345").unwrap();
    peer.send(b"6").unwrap();
    let mut request = request;
    let error = request.read_exact_from(&socket).unwrap_err();
    assert!(matches!(
        error,
        Error::PartialBuffer {
            expected: 12,
            completed: 6
        }
    ));
    assert_eq!(dirty(&memory), [0, 0x1000, 0x2000]);
    assert_eq!(request.complete_front(6), 6);
    assert_eq!(dirty(&memory), [0x0, 0x2000]);
    let error = request.read_exact_from(&socket).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::WouldBlock));
    assert_eq!(dirty(&memory), [0u64; 0]);
    peer.send(b"789012").unwrap();
    request.read_exact_from(&socket).unwrap();
    assert_eq!(
        memory.read_obj::<[u8; 4]>(GuestAddress(0x2010)).unwrap(),
        *b"5678"
    );
    assert_eq!(dirty(&memory), [0x1000, 0x2000]);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_read_exact_of_many_packets_passes_each_segment_a_few_times() {
    let memory = one_region();
    let request = scattered(&memory, Permissions::ReadWrite);
    let bytes = pattern(request.len());
    let (peer, socket) = UnixDatagram::pair().unwrap();
    let packets = bytes.chunks(250);
    let calls = packets.len();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for packet in packets {
                peer.send(packet).unwrap();
            }
        });
        PASSED.set(0);
        request.read_exact_from(&socket).unwrap();
    });
    // Each call begins in the segment in which the call before it ended.
    let passed = PASSED.get();
    assert!(passed <= calls + SEGMENTS as usize, "{passed}");
    let mut seen = vec![0; bytes.len()];
    request.copy_to(0, &mut seen).unwrap();
    assert_eq!(seen, bytes);
    assert_eq!(dirty_pages(&memory), (0..SEGMENTS).collect::<Vec<_>>());
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_read_exact_at_end_of_stream_returns_error() {
    let memory = Arc::new(regions(4));
    let request = three(&memory, Permissions::Write);
    let (near, far) = UnixStream::pair().unwrap();
    (&far).write_all(b"abcde").unwrap();
    drop(far);
    let error = request.read_exact_from(&near).unwrap_err();
    assert!(matches!(error, Error::PartialBuffer { completed: 5, .. }));
    assert_eq!(dirty(&memory), [0, 0x1000, 0x2000]);
    let error = request.read_exact_from(&near).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::UnexpectedEof));
    assert_eq!(dirty(&memory), [0u64; 0]);
}

#[cfg(target_os = "linux")]
#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_read_exact_with_fault_marks_what_failed_call_reaches() {
    use crate::FileOffset;
    // The last of three pages has no file.
    let file = temp_file(&[0; 3 * PAGE]);
    let mapped = file.try_clone().unwrap();
    let range = (GuestAddress(0), 3 * PAGE, Some(FileOffset::new(mapped, 0)));
    let memory = Arc::new(Memory::from_ranges_with_files([range]).unwrap());
    file.set_len(2 * PAGE as u64).unwrap();
    let request = three(&memory, Permissions::Write);
    let (peer, socket) = UnixDatagram::pair().unwrap();
    peer.send(&[9; 4]).unwrap();
    peer.send(&[9; 8]).unwrap();
    let error = request.read_exact_from(&socket).unwrap_err();
    assert!(
        matches!(error, Error::PartialBuffer { completed: 4, .. }),
        "{error:?}"
    );
    // The second call failed with EFAULT, and could reach both other pages.
    assert_eq!(dirty_pages(&memory), [0, 1, 2]);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_write_all_continues_after_short_write_to_full_socket() {
    let memory = one_region();
    let mut request = scattered(&memory, Permissions::ReadWrite);
    let bytes = pattern(request.len());
    request.copy_from(0, &bytes).unwrap();
    dirty_pages(&memory);

    let (socket, peer) = UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    let (mut received, mut is_short) = (Vec::new(), false);
    loop {
        let len = request.len();
        let written = match request.write_all_to(&socket) {
            Ok(()) => len,
            Err(Error::PartialBuffer {
                expected,
                completed,
            }) => {
                assert_eq!(expected, len);
                is_short = true;
                completed
            }
            Err(error) => panic!("{error}"),
        };
        // The socket has exactly the bytes that were counted.
        let mut part = vec![0; written];
        (&peer).read_exact(&mut part).unwrap();
        received.extend(part);
        peer.set_nonblocking(true).unwrap();
        let more = (&peer).read(&mut [0]).unwrap_err();
        assert_eq!(more.kind(), ErrorKind::WouldBlock);
        peer.set_nonblocking(false).unwrap();
        if written == len {
            break;
        }
        assert_eq!(request.cancel_front(written), written);
    }
    assert!(is_short && received == bytes);
    assert_eq!(dirty_pages(&memory), [0u64; 0]);

    drop(peer);
    let error = request.write_all_to(&socket).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::BrokenPipe));
}

#[test]
fn io_buffer_exact_transfer_needs_its_permission_and_bytes() {
    let memory = Arc::new(regions(4));
    // Neither end of a pipe supports all calls.
    let (reader, writer) = std::io::pipe().unwrap();
    for fd in [OwnedFd::from(reader), OwnedFd::from(writer)] {
        let empty = IoBuffer::new(Arc::clone(&memory), Permissions::ReadWrite);
        empty.read_exact_from(&fd).unwrap();
        empty.read_exact_from_at(&fd, u64::MAX).unwrap();
        empty.write_all_to(&fd).unwrap();
        empty.write_all_to_at(&fd, u64::MAX).unwrap();
        let is_refused = |result| is_refused_by_buffer(&result);
        let to_read = three(&memory, Permissions::Read);
        assert!(is_refused(to_read.read_exact_from(&fd)));
        assert!(is_refused(to_read.read_exact_from_at(&fd, 0)));
        let to_write = three(&memory, Permissions::Write);
        assert!(is_refused(to_write.write_all_to(&fd)));
        assert!(is_refused(to_write.write_all_to_at(&fd, 0)));
    }
    assert_eq!(dirty(&memory), [0u64; 0]);
}

#[test]
fn io_buffer_read_obj_and_write_obj_move_scattered_value_or_nothing() {
    let memory = Arc::new(regions(3));
    let buffer = three(&memory, Permissions::ReadWrite);
    let value = [1u8, 2, 3, 4, 5, 6, 7, 8];
    buffer.write_obj(value, 3).unwrap();
    assert_eq!(buffer.read_obj::<[u8; 8]>(3).unwrap(), value);
    let second = memory.read_obj::<[u8; 4]>(GuestAddress(0x2010)).unwrap();
    assert_eq!(
        (second, dirty(&memory)),
        ([2, 3, 4, 5], vec![0, 0x1000, 0x2000])
    );

    for offset in [5, 12, 13, usize::MAX] {
        let mut seen = [9; 8];
        let results = [
            buffer.read_obj::<[u8; 8]>(offset).map(drop),
            buffer.read_slice(&mut seen, offset),
            buffer.write_obj([7u8; 8], offset),
            buffer.write_slice(&[7; 8], offset),
        ];
        for result in results {
            let short = Err(Error::PartialBuffer {
                expected: 8,
                completed: 0,
            });
            assert_eq!(format!("{result:?}"), format!("{:?}", short as Result<()>));
        }
        assert_eq!((seen, dirty(&memory)), ([9; 8], vec![]));
    }
}

#[test]
fn io_buffer_split_to_after_loan_marks_each_part_on_its_own() {
    let memory = Arc::new(regions(3));
    let mut buffer = three(&memory, Permissions::Write);
    assert!(buffer.split_to(13).is_none());
    let _ = buffer.vectors();
    let header = buffer.split_to(6).unwrap();
    assert_eq!((header.len(), buffer.len()), (6, 6));
    assert_eq!(dirty(&memory), [0u64; 0]);
    drop(header);
    assert_eq!(dirty(&memory), [0, 0x2000]);
    buffer.cancel();
    assert_eq!(dirty(&memory), [0u64; 0]);
}
