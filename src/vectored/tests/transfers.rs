use super::*;

#[test]
fn transfer_over_eight_regions_is_one_system_call() {
    let memory = regions(8);
    let bytes = pattern(8 * PAGE);
    let file = temp_file(&bytes);
    // The functions without `exact` make one system call.
    let count = 8 * PAGE - 10;
    assert_eq!(
        read_from_at(&memory, GuestAddress(5), count, &file, 5).unwrap(),
        count
    );
    let mut seen = vec![0; count];
    memory.read_slice(&mut seen, GuestAddress(5)).unwrap();
    assert_eq!(seen, bytes[5..5 + count]);
    assert_eq!(dirty(&memory).len(), 8);

    let mut target = temp_file(&[]);
    assert_eq!(
        write_to(&memory, GuestAddress(5), count, &target).unwrap(),
        count
    );
    assert_eq!(
        write_to_at(&memory, GuestAddress(5), 7, &target, count as u64).unwrap(),
        7
    );
    let mut written = Vec::new();
    target.seek(SeekFrom::Start(0)).unwrap();
    target.read_to_end(&mut written).unwrap();
    assert_eq!(written[..count], bytes[5..5 + count]);
    assert_eq!(written[count..], bytes[5..12]);
    assert_eq!(dirty(&memory), [0u64; 0]);
}

#[test]
fn read_with_short_count_marks_whole_range() {
    let memory = regions(4);
    let file = temp_file(&[9; PAGE + 1]);
    assert_eq!(
        read_from(&memory, GuestAddress(0x800), 3 * PAGE, &file).unwrap(),
        PAGE + 1
    );
    assert_eq!(dirty(&memory), [0, 0x1000, 0x2000, 0x3000]);
    assert_eq!(read_from(&memory, GuestAddress(0), PAGE, &file).unwrap(), 0);
    assert_eq!(dirty(&memory), [0u64; 0]);
}

#[test]
fn exact_transfer_continues_after_partial_call() {
    let memory = regions(8);
    let bytes = pattern(8 * PAGE);
    let (near, far) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let sent = &bytes;
        scope.spawn(move || {
            for part in sent.chunks(1000) {
                (&far).write_all(part).unwrap();
                std::thread::yield_now();
            }
            let mut back = vec![0; sent.len()];
            for part in back.chunks_mut(777) {
                (&far).read_exact(part).unwrap();
            }
            assert_eq!(&back, sent);
        });
        read_exact_from(&memory, GuestAddress(0), bytes.len(), &near).unwrap();
        write_all_to(&memory, GuestAddress(0), bytes.len(), &near).unwrap();
    });
    let mut seen = vec![0; bytes.len()];
    memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
    assert_eq!(seen, bytes);
}

#[test]
fn exact_transfer_of_more_than_1024_segments_makes_several_calls() {
    let memory = regions(1500);
    let bytes = pattern(1500 * PAGE);
    let file = temp_file(&bytes);
    let once = read_from_at(&memory, GuestAddress(0), bytes.len(), &file, 0).unwrap();
    assert_eq!(once, 1024 * PAGE);
    assert_eq!(dirty(&memory).len(), 1024);
    read_exact_from_at(&memory, GuestAddress(1), bytes.len() - 1, &file, 1).unwrap();
    assert_eq!(dirty(&memory).len(), 1500);
    let mut seen = vec![0; bytes.len() - 1];
    memory.read_slice(&mut seen, GuestAddress(1)).unwrap();
    assert_eq!(seen, bytes[1..]);
    let target = temp_file(&[]);
    write_all_to_at(&memory, GuestAddress(1), bytes.len() - 1, &target, 3).unwrap();
    assert_eq!(target.metadata().unwrap().len(), bytes.len() as u64 + 2);
}

#[test]
fn error_after_partial_transfer_has_the_number_of_bytes() {
    let memory = regions(2);
    let file = temp_file(&[3; 100]);
    // The file ends.
    let error = read_exact_from_at(&memory, GuestAddress(0), 200, &file, 0).unwrap_err();
    assert!(matches!(
        error,
        Error::PartialBuffer {
            expected: 200,
            completed: 100
        }
    ));
    let error = read_exact_from_at(&memory, GuestAddress(0), 200, &file, 100).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::UnexpectedEof));
    // Memory ends.
    let mut target = temp_file(&[]);
    let error = write_all_to(&memory, GuestAddress(0x1ff0), 0x20, &target).unwrap_err();
    assert!(matches!(
        error,
        Error::PartialBuffer {
            expected: 0x20,
            completed: 0x10
        }
    ));
    assert_eq!(target.seek(SeekFrom::End(0)).unwrap(), 0x10);
    assert_eq!(
        write_to_at(&memory, GuestAddress(0x1ff0), 0x20, &target, 0).unwrap(),
        0x10
    );
    assert!(matches!(
        write_to(&memory, GuestAddress(0x2000), 1, &target).unwrap_err(),
        Error::InvalidGuestAddress(GuestAddress(0x2000))
    ));
    // Offsets that are larger than any file.
    for offset in [u64::MAX, i64::MAX as u64 + 1] {
        let error = read_from_at(&memory, GuestAddress(0), 1, &file, offset).unwrap_err();
        assert!(matches!(error, Error::IOError(e) if e.raw_os_error() == Some(libc::EINVAL)));
    }
    write_all_to(&memory, GuestAddress(0), 0, &target).unwrap();
}

#[test]
fn read_error_other_than_would_block_marks_whole_range() {
    let memory = regions(3);
    let (near, _far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let error = read_from(&memory, GuestAddress(0), 2 * PAGE, &near).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::WouldBlock));
    assert_eq!(dirty(&memory), [0u64; 0]);
    let directory = File::open("/").unwrap();
    let error = read_from(&memory, GuestAddress(0x800), PAGE, &directory).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.raw_os_error() == Some(libc::EISDIR)));
    assert_eq!(dirty(&memory), [0, 0x1000]);
}

#[test]
fn transfer_ends_before_page_of_truncated_file() {
    let file = temp_file(&[1; 4 * PAGE]);
    let backing = crate::FileOffset::new(file.try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0), 4 * PAGE, Some(backing))];
    let memory = Memory::from_ranges_with_files(ranges).unwrap();
    file.set_len(PAGE as u64).unwrap();
    let source = File::open("/dev/zero").unwrap();
    let error = read_exact_from(&memory, GuestAddress(0x800), 2 * PAGE, &source).unwrap_err();
    assert!(matches!(
        error,
        Error::PartialBuffer {
            expected: 0x2000,
            completed: 0x800
        }
    ));
    let error = read_from(&memory, GuestAddress(0x1000), 1, &source).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.raw_os_error() == Some(libc::EFAULT)));
}
