use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;
use test_support::temp_file;

use super::*;
use crate::bitmap::AtomicBitmap;
use crate::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const PAGE: usize = 0x1000;

/// Makes `count` adjacent regions of one page each.
fn regions(count: u64) -> Memory {
    let ranges: Vec<_> = (0..count)
        .map(|i| (GuestAddress(i * 0x1000), PAGE))
        .collect();
    Memory::from_ranges(&ranges).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8).collect()
}

/// Returns the addresses of the dirty regions, and makes them clean.
fn dirty(memory: &Memory) -> Vec<u64> {
    memory
        .iter()
        .filter(|region| region.get_mmap().bitmap().get_and_reset() != [0])
        .map(|region| region.start_addr().0)
        .collect()
}

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
fn read_marks_only_bytes_read() {
    let memory = regions(4);
    let file = temp_file(&[9; PAGE + 1]);
    assert_eq!(
        read_from(&memory, GuestAddress(0x800), 3 * PAGE, &file).unwrap(),
        PAGE + 1
    );
    assert_eq!(dirty(&memory), [0, 0x1000]);
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

#[test]
fn io_vectors_cover_exactly_the_range() {
    let memory = regions(3);
    let range = io_vectors(&memory, GuestAddress(0xff0), 0x1020, Permissions::Write).unwrap();
    assert_eq!(range.len(), 0x1020);
    let named: Vec<_> = range
        .vectors()
        .iter()
        .map(|vector| (vector.base(), vector.len()))
        .collect();
    let host = |address| memory.get_host_address(GuestAddress(address)).unwrap();
    assert_eq!(
        named,
        [
            (host(0xff0), 0x10),
            (host(0x1000), 0x1000),
            (host(0x2000), 0x10)
        ]
    );
    range.mark_dirty(0x10, 0x1001);
    assert_eq!(dirty(&memory), [0x1000, 0x2000]);
    range.mark_dirty(0, 0);
    range.mark_dirty(0x1020, 5);
    assert_eq!(dirty(&memory), [0u64; 0]);
    assert!(io_vectors(&memory, GuestAddress(0x2ff0), 0x11, Permissions::Read).is_err());
    assert!(io_vectors(&memory, GuestAddress(5), 0, Permissions::Read)
        .unwrap()
        .is_empty());
}

#[test]
fn io_buffer_keeps_memory_and_marks_on_complete() {
    let memory = Arc::new(regions(4));
    let weak = Arc::downgrade(&memory);
    let mut buffer = IoBuffer::new(memory, Permissions::Write);
    buffer.push(GuestAddress(0x800), 0x1000).unwrap();
    buffer.push(GuestAddress(0x3000), 0x10).unwrap();
    assert!(buffer.push(GuestAddress(0x3ff0), 0x11).is_err());
    assert_eq!((buffer.len(), buffer.vectors().len()), (0x1010, 3));

    let source = File::open("/dev/zero").unwrap();
    let first = buffer.vectors().as_ptr().cast::<libc::iovec>();
    // SAFETY: `first` points to three `iovec`s, and `buffer` keeps the memory that they name
    // mapped. No reference to it exists.
    let moved = unsafe { libc::readv(std::os::fd::AsRawFd::as_raw_fd(&source), first, 3) };
    assert_eq!(moved, 0x1010);
    let memory = weak.upgrade().unwrap();
    assert_eq!(dirty(&memory), [0u64; 0]);
    assert_eq!(buffer.complete(0x801), 0x801);
    assert_eq!(dirty(&memory), [0, 0x1000]);
    drop(memory);
    assert!(weak.upgrade().is_none());
}

#[test]
fn vectors_on_heap_keep_address_when_buffer_is_moved() {
    let mut buffer = IoBuffer::new(Arc::new(regions(2)), Permissions::Read);
    buffer.push(GuestAddress(0), 0x2000).unwrap();
    let before = buffer.vectors_on_heap().as_ptr();
    let boxed = Box::new(buffer);
    assert_eq!(boxed.vectors().as_ptr(), before);
    assert!(boxed.copy_from(0, &[1]).is_err());
}

#[cfg(feature = "iommu")]
#[test]
fn io_buffer_push_behind_rwlock_iotlb_returns_unsupported() {
    use crate::{IommuMemory, Iotlb};
    use std::sync::RwLock;
    let mut iotlb = Iotlb::new();
    for page in 0..3u64 {
        let to = GuestAddress((2 - page) * 0x1000);
        iotlb
            .set_mapping(
                GuestAddress(page * 0x1000),
                to,
                PAGE,
                Permissions::ReadWrite,
            )
            .unwrap();
    }
    let bitmap = AtomicBitmap::new(3 * PAGE, PAGE.try_into().unwrap());
    let memory = IommuMemory::new(regions(3), RwLock::new(iotlb), true, bitmap);
    let bytes = pattern(3 * PAGE);
    let file = temp_file(&bytes);
    assert_eq!(
        read_from(&memory, GuestAddress(0), 3 * PAGE, &file).unwrap(),
        3 * PAGE
    );
    let mut seen = vec![0; 3 * PAGE];
    memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
    assert_eq!(seen, bytes);
    let mut last = vec![0; PAGE];
    memory
        .get_backend()
        .read_slice(&mut last, GuestAddress(0))
        .unwrap();
    assert_eq!(last, bytes[2 * PAGE..]);
    {
        let vectors = io_vectors(&memory, GuestAddress(0), 3 * PAGE, Permissions::Read).unwrap();
        assert_eq!(vectors.vectors().len(), 3);
        // The vectors keep the translation in use.
        assert!(memory.iommu().try_write().is_err());
    }
    assert!(memory.iommu().try_write().is_ok());
    let mut buffer = IoBuffer::new(Arc::new(memory), Permissions::Read);
    let error = buffer.push(GuestAddress(0), 1).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::Unsupported));
}

#[derive(Clone, Debug)]
enum Step {
    Push(u64, usize),
    Split(usize),
    Truncate(usize),
    CopyFrom(usize, Vec<u8>),
    CopyTo(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let near = || prop_oneof![4 => 0usize..600, 1 => any::<usize>()];
    prop_oneof![
        (prop_oneof![4 => 0u64..0x2c0, 1 => any::<u64>()], near())
            .prop_map(|(a, n)| Step::Push(a, n)),
        near().prop_map(Step::Split),
        near().prop_map(Step::Truncate),
        (near(), prop::collection::vec(any::<u8>(), 0..200))
            .prop_map(|(o, bytes)| Step::CopyFrom(o, bytes)),
        (near(), 0usize..300).prop_map(|(o, n)| Step::CopyTo(o, n)),
    ]
}

proptest! {
    #[test]
    fn io_buffer_agrees_with_list_of_addresses(steps in prop::collection::vec(step(), 1..30), written in 0usize..800) {
        // Three regions, with a hole before the last one.
        let bases = [(0u64, 0x100u64), (0x100, 0x100), (0x240, 0x80)];
        let ranges: Vec<_> = bases.iter().map(|(base, len)| (GuestAddress(*base), *len as usize)).collect();
        // Each region is smaller than a page of its bitmap, so marks are compared region by region.
        let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
        let there = |address: u64| bases.iter().any(|(base, len)| (*base..base + len).contains(&address));
        let mut bytes = vec![0u8; 0x300];
        let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
        let mut model: Vec<u64> = Vec::new();
        for step in steps {
            match step {
                Step::Push(address, count) => {
                    let end = u128::from(address) + count as u128;
                    let reachable = end <= 0x300 && (address..end as u64).all(there);
                    prop_assert_eq!(buffer.push(GuestAddress(address), count).is_ok(), reachable || count == 0);
                    if reachable {
                        model.extend(address..end as u64);
                    }
                }
                Step::Split(at) => {
                    let rest = buffer.split_off(at);
                    prop_assert_eq!(rest.is_some(), at <= model.len());
                    if let Some(rest) = rest {
                        prop_assert_eq!(rest.len(), model.len() - at);
                        prop_assert_eq!(rest.vectors().iter().map(|v| v.len()).sum::<usize>(), rest.len());
                        model.truncate(at);
                    }
                }
                Step::Truncate(len) => {
                    buffer.truncate(len);
                    model.truncate(len);
                }
                Step::CopyFrom(offset, put) => {
                    let fits = model.len().saturating_sub(offset).min(put.len());
                    prop_assert_eq!(buffer.copy_from(offset, &put).unwrap(), fits);
                    for (index, byte) in put[..fits].iter().enumerate() {
                        bytes[model[offset + index] as usize] = *byte;
                    }
                }
                Step::CopyTo(offset, count) => {
                    let fits = model.len().saturating_sub(offset).min(count);
                    let mut seen = vec![0xaa; count];
                    prop_assert_eq!(buffer.copy_to(offset, &mut seen).unwrap(), fits);
                    for (index, byte) in seen[..fits].iter().enumerate() {
                        prop_assert_eq!(bytes[model[offset + index] as usize], *byte);
                    }
                    prop_assert!(seen[fits..].iter().all(|byte| *byte == 0xaa));
                }
            }
            prop_assert_eq!(buffer.len(), model.len());
            // Byte by byte, the vectors are the addresses.
            let hosts: Vec<usize> = buffer
                .vectors()
                .iter()
                .flat_map(|vector| (0..vector.len()).map(|i| vector.base() as usize + i))
                .collect();
            let expected: Vec<usize> = model
                .iter()
                .map(|address| memory.get_host_address(GuestAddress(*address)).unwrap() as usize)
                .collect();
            prop_assert_eq!(hosts, expected);
        }
        dirty(&memory);
        let marked = buffer.complete(written);
        prop_assert_eq!(marked, written.min(model.len()));
        let region_of = |address: u64| bases.iter().rfind(|(base, _)| *base <= address).unwrap().0;
        let mut expected: Vec<u64> = model[..marked].iter().map(|address| region_of(*address)).collect();
        expected.sort_unstable();
        expected.dedup();
        prop_assert_eq!(dirty(&memory), expected);
    }
}

#[cfg(feature = "iommu")]
#[test]
fn b9_invalidation_waits_for_io_buffer_behind_shared_iotlb() {
    use crate::iommu::SharedIotlb;
    use crate::IommuMemory;
    let iotlb = SharedIotlb::new();
    for page in 0..3u64 {
        let to = GuestAddress((2 - page) * 0x1000);
        iotlb
            .set_mapping(
                GuestAddress(page * 0x1000),
                to,
                PAGE,
                Permissions::ReadWrite,
            )
            .unwrap();
    }
    let bitmap = AtomicBitmap::new(3 * PAGE, PAGE.try_into().unwrap());
    let memory = Arc::new(IommuMemory::new(regions(3), iotlb.clone(), true, bitmap));
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    buffer.push(GuestAddress(0), 2 * PAGE).unwrap();
    let rest = buffer.split_off(PAGE + 8).unwrap();
    let gone = iotlb.invalidate_all();
    assert!(!gone.is_done() && memory.read_obj::<u8>(GuestAddress(0)).is_err());

    let worker = std::thread::spawn(move || {
        buffer.copy_from(0, &[7; PAGE + 8]).unwrap();
        buffer.complete(PAGE + 8);
    });
    worker.join().unwrap();
    assert!(!gone.is_done(), "the other part is still in use");
    drop(rest);
    assert!(gone.is_done());
    assert_eq!(
        memory
            .get_backend()
            .read_obj::<u8>(GuestAddress(0x1007))
            .unwrap(),
        7
    );
    assert_eq!(memory.bitmap().get_and_reset(), [0b11]);
}
