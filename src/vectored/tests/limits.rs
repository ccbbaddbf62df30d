//! Limits: permissions, numbers of segments, time, and ranges of no bytes.

use super::*;

type Function = fn(&Memory, GuestAddress, usize, &File) -> Result<usize>;

/// The functions of this module, by the direction of the descriptor.
const READS: [Function; 4] = [
    |m, a, n, f| read_from(m, a, n, f),
    |m, a, n, f| read_from_at(m, a, n, f, 0),
    |m, a, n, f| read_exact_from(m, a, n, f).map(|()| n),
    |m, a, n, f| read_exact_from_at(m, a, n, f, 0).map(|()| n),
];
const WRITES: [Function; 4] = [
    |m, a, n, f| write_to(m, a, n, f),
    |m, a, n, f| write_to_at(m, a, n, f, 0),
    |m, a, n, f| write_all_to(m, a, n, f).map(|()| n),
    |m, a, n, f| write_all_to_at(m, a, n, f, 0).map(|()| n),
];

#[test]
fn transfer_of_no_bytes_makes_no_call() {
    let memory = regions(1);
    // Neither end of a pipe supports all calls: EBADF for the direction, and ESPIPE for an offset.
    let (reader, writer) = std::io::pipe().unwrap();
    let (reader, writer) = (
        File::from(OwnedFd::from(reader)),
        File::from(OwnedFd::from(writer)),
    );
    for at in [0, 0x800, 0x1000, 0x5000, u64::MAX].map(GuestAddress) {
        for fd in [&reader, &writer] {
            for transfer in READS.iter().chain(&WRITES) {
                assert_eq!(transfer(&memory, at, 0, fd).unwrap(), 0);
            }
        }
        let offset = read_from_at(&memory, at, 0, &reader, u64::MAX).unwrap();
        assert_eq!(offset, 0);
    }
    assert_eq!(dirty(&memory), [0u64; 0]);
    for transfer in READS {
        assert!(transfer(&memory, GuestAddress(0), 1, &writer).is_err());
    }
    for transfer in WRITES {
        assert!(transfer(&memory, GuestAddress(0), 1, &reader).is_err());
    }
}

#[test]
fn io_buffer_push_past_segment_limit_returns_error() {
    let memory = Arc::new(regions(1100));
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    let error = buffer.push(GuestAddress(0), 1100 * PAGE).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::InvalidInput));
    assert!(buffer.is_empty() && buffer.vectors().is_empty());
    buffer.push(GuestAddress(0), 1023 * PAGE).unwrap();
    buffer.push(GuestAddress(8), 2 * PAGE).unwrap_err();
    assert_eq!((buffer.len(), buffer.vectors().len()), (1023 * PAGE, 1023));
    buffer.push(GuestAddress(0x8000), PAGE).unwrap();
    buffer.push(GuestAddress(0x8000), 1).unwrap_err();
    buffer.push(GuestAddress(0x8000), 0).unwrap();
    buffer.set_segment_limit(1026);
    buffer.push(GuestAddress(8), PAGE).unwrap();
    buffer.push(GuestAddress(0), 1).unwrap_err();
    assert_eq!(buffer.vectors().len(), 1026);
    let mut rest = buffer.split_off(8).unwrap();
    rest.push(GuestAddress(0), 1).unwrap_err();
    buffer.push(GuestAddress(0), 1).unwrap();
}

#[test]
fn complete_front_by_segment_moves_each_segment_about_once() {
    const SEGMENTS: usize = 2000;
    let memory = Arc::new(regions(1));
    let mut buffer = IoBuffer::new(memory, Permissions::Write);
    buffer.set_segment_limit(SEGMENTS);
    for _ in 0..SEGMENTS {
        buffer.push(GuestAddress(0x10), 4).unwrap();
    }
    let last = |buffer: &IoBuffer<Memory>| buffer.vectors().last().map(std::ptr::from_ref);
    let (mut moved, mut address) = (0, last(&buffer));
    for left in (0..2 * SEGMENTS).rev() {
        // Half of a segment.
        assert_eq!(buffer.complete_front(2), 2);
        assert_eq!(buffer.len(), 2 * left);
        let now = last(&buffer).or(address);
        if now != address {
            (moved, address) = (moved + buffer.vectors().len(), now);
        }
    }
    assert!(moved <= SEGMENTS, "{moved}");
}

#[test]
fn io_buffer_extended_past_segment_limit_is_unchanged() {
    let memory = Arc::new(regions(2));
    let ranges = |count| std::iter::repeat_n((GuestAddress(0xff8), 0x10), count);
    let error = IoBuffer::from_ranges(&memory, ranges(513), Permissions::Write).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::InvalidInput));
    let mut buffer = IoBuffer::from_ranges(&memory, ranges(511), Permissions::Write).unwrap();
    buffer.try_extend(ranges(2)).unwrap_err();
    // An endless iterator of other ranges also leaves it unchanged.
    buffer
        .try_extend(std::iter::repeat((GuestAddress(0), 1)))
        .unwrap_err();
    assert_eq!((buffer.len(), buffer.vectors().len()), (511 * 0x10, 1022));
    buffer.try_extend(ranges(1)).unwrap();
    buffer
        .try_extend([(GuestAddress(0), 0), (GuestAddress(0x5000), 0)])
        .unwrap();
    assert_eq!(buffer.vectors().len(), MAX_VECTORS);
}

#[test]
fn io_vectors_of_more_segments_than_one_call_takes_return_error() {
    let memory = regions(1025);
    let vectors = |pages| io_vectors(&memory, GuestAddress(0), pages * PAGE, Permissions::Read);
    assert_eq!(vectors(1024).unwrap().vectors().len(), MAX_VECTORS);
    let error = vectors(1025).unwrap_err();
    assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::InvalidInput));
}

#[test]
fn io_buffer_copies_need_their_permission() {
    let memory = Arc::new(regions(2));
    let refused = |result| is_refused_by_buffer(&result);
    for (access, reads, writes) in [
        (Permissions::Read, true, false),
        (Permissions::Write, false, true),
        (Permissions::ReadWrite, true, true),
    ] {
        let mut buffer = IoBuffer::new(Arc::clone(&memory), access);
        buffer.push(GuestAddress(0xff8), 0x10).unwrap();
        let rest = buffer.split_off(4).unwrap();
        for part in [&buffer, &rest] {
            assert_eq!(refused(part.copy_to(0, &mut [0; 4])), !reads, "{access:?}");
            assert_eq!(refused(part.copy_from(0, &[0; 4])), !writes, "{access:?}");
            let (read, written) = (part.read_obj::<u32>(0), part.write_obj(0u32, 0));
            assert_eq!(is_refused_by_buffer(&read), !reads, "{access:?}");
            assert_eq!(is_refused_by_buffer(&written), !writes, "{access:?}");
        }
    }
    // Vectors without a permission could be used for anything.
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::No);
    assert!(refused(buffer.push(GuestAddress(0), 1).map(|()| 0)));
    let vectors = io_vectors(&*memory, GuestAddress(0), 1, Permissions::No);
    assert!(refused(vectors.map(|range| range.len())));
}

#[cfg(feature = "iommu")]
mod behind_iommu {
    use test_support::temp_file_of_len;

    use super::*;
    use crate::iommu::{Iommu, IotlbIterator, IotlbSnapshot, SharedIotlb};
    use crate::{GuestMemoryMmap, IommuMemory, Permissions};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Adds up the lengths of all translations.
    #[derive(Debug, Default)]
    struct Counting {
        iotlb: SharedIotlb,
        bytes: AtomicUsize,
        calls: AtomicUsize,
    }

    impl Iommu for Counting {
        type IotlbGuard<'a> = IotlbSnapshot;

        fn translate(
            &self,
            iova: GuestAddress,
            length: usize,
            access: Permissions,
        ) -> std::result::Result<IotlbIterator<IotlbSnapshot>, crate::iommu::Error> {
            self.bytes.fetch_add(length, Ordering::Relaxed);
            self.calls.fetch_add(1, Ordering::Relaxed);
            self.iotlb.translate(iova, length, access)
        }
    }

    /// Maps `pages` pages, each to a part of memory of two pages, with `access`.
    fn scattered(pages: u64, access: Permissions) -> IommuMemory<GuestMemoryMmap, Counting> {
        let ranges = [(GuestAddress(0), 2 * PAGE)];
        let memory = IommuMemory::new(
            GuestMemoryMmap::from_ranges(&ranges).unwrap(),
            Counting::default(),
            true,
            (),
        );
        for page in 0..pages {
            // Neighbours do not continue each other.
            let (iova, to) = (GuestAddress(page * 0x1000), GuestAddress(page % 2 * 0xff0));
            let iotlb = &memory.iommu().iotlb;
            iotlb.set_mapping(iova, to, PAGE, access).unwrap();
        }
        memory
    }

    #[test]
    fn transfer_of_many_fragments_translates_each_byte_a_few_times() {
        let (pages, total) = (16 << 10, PAGE << 14);
        let memory = scattered(pages, Permissions::ReadWrite);
        let file = temp_file_of_len(total as u64);
        let null = File::options().write(true).open("/dev/null").unwrap();
        let translated = || memory.iommu().bytes.swap(0, Ordering::Relaxed);
        for read in [true, false] {
            let (mut done, mut calls) = (0, 0);
            while done < total {
                let at = GuestAddress(done as u64);
                done += if read {
                    read_from_at(&memory, at, total - done, &file, done as u64).unwrap()
                } else {
                    write_to(&memory, at, total - done, &null).unwrap()
                };
                calls += 1;
            }
            assert_eq!((done, calls), (total, 16));
            assert!(translated() <= 2 * total);
        }
        read_exact_from_at(&memory, GuestAddress(0), total, &file, 0).unwrap();
        assert_eq!(translated(), total);
        write_all_to(&memory, GuestAddress(0), total, &null).unwrap();
        assert_eq!(translated(), total);
    }

    /// Large mappings: the translation grows, and one call still covers them.
    #[test]
    fn transfer_of_large_mapping_is_one_call() {
        let size = 32 << 20;
        let ranges = [(GuestAddress(0), size)];
        let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let memory = IommuMemory::new(physical, Counting::default(), true, ());
        let iotlb = &memory.iommu().iotlb;
        let zero = GuestAddress(0);
        iotlb
            .set_mapping(zero, zero, size, Permissions::ReadWrite)
            .unwrap();
        let file = temp_file_of_len(size as u64);
        assert_eq!(read_from_at(&memory, zero, size, &file, 0).unwrap(), size);
        assert!(memory.iommu().calls.load(Ordering::Relaxed) <= 4);
    }

    /// The 4 MiB after the first 4 MiB are not mapped.
    #[test]
    fn transfer_to_unmapped_bytes_fails_where_they_are_translated() {
        let (half, file) = (1024 * PAGE, File::open("/dev/zero").unwrap());
        let start = GuestAddress(0);
        let many = scattered(1024, Permissions::ReadWrite);
        assert_eq!(read_from(&many, start, 2 * half, &file).unwrap(), half);
        read_from(&many, GuestAddress(half as u64), half, &file).unwrap_err();

        let one = scattered(0, Permissions::ReadWrite);
        let physical = GuestMemoryMmap::from_ranges(&[(start, half)]).unwrap();
        let one = one.with_replaced_backend(physical);
        let iotlb = &one.iommu().iotlb;
        iotlb
            .set_mapping(start, start, half, Permissions::ReadWrite)
            .unwrap();
        for memory in [&many, &one] {
            let before = memory.read_obj::<u8>(start).unwrap();
            memory.write_obj(!before, start).unwrap();
            for result in [
                read_exact_from(memory, start, 2 * half, &file),
                memory.read_exact_volatile_from(start, &mut &file, 2 * half),
                memory.write(&vec![before; 2 * half], start).map(|_| ()),
                memory
                    .host_runs(start, 2 * half, Permissions::Read)
                    .map(|_| ()),
            ] {
                assert!(matches!(result, Err(Error::IommuError(_))), "{result:?}");
            }
            assert_eq!(memory.read_obj::<u8>(start).unwrap(), !before);
        }
        let error = read_from(&one, start, 2 * half, &file).unwrap_err();
        assert!(matches!(error, Error::IommuError(_)));
    }

    #[test]
    fn io_buffer_over_huge_descriptors_returns_error() {
        let pages = 4096;
        let memory = scattered(pages, Permissions::ReadWrite);
        let physical = memory.get_backend().clone();
        let memory = IommuMemory::new(physical, memory.iommu().iotlb.clone(), true, ());
        let mut buffer = IoBuffer::new(Arc::new(memory), Permissions::Write);
        for _ in 0..64 {
            buffer
                .push(GuestAddress(0), pages as usize * PAGE)
                .unwrap_err();
        }
        assert_eq!(buffer.len(), 0);
        buffer.push(GuestAddress(0), 1024 * PAGE).unwrap();
    }

    #[test]
    fn io_buffer_of_write_only_mapping_refuses_copy_to() {
        for (granted, other) in [
            (Permissions::Write, Permissions::Read),
            (Permissions::Read, Permissions::Write),
        ] {
            let counting = scattered(2, granted);
            let (physical, iotlb) = (counting.get_backend(), &counting.iommu().iotlb);
            let memory = Arc::new(IommuMemory::new(physical.clone(), iotlb.clone(), true, ()));
            let mut buffer = IoBuffer::new(Arc::clone(&memory), granted);
            buffer.push(GuestAddress(0x800), PAGE).unwrap();
            let read = buffer.copy_to(0, &mut [0; 8]);
            let written = buffer.copy_from(0, &[1; 8]);
            assert_eq!(read.is_ok(), granted == Permissions::Read);
            assert_eq!(written.is_ok(), granted == Permissions::Write);
            for access in [other, Permissions::ReadWrite] {
                let mut buffer = IoBuffer::new(Arc::clone(&memory), access);
                assert!(buffer.push(GuestAddress(0x800), PAGE).is_err());
                assert!(io_vectors(&*memory, GuestAddress(0), 1, access).is_err());
            }
        }
    }
}
