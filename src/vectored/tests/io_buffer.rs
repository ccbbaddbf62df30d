use super::*;

/// Three pages of I/O addresses, and the guest addresses that they are mapped to, in reverse order.
#[cfg(feature = "iommu")]
const REVERSED: [(GuestAddress, GuestAddress); 3] = [
    (GuestAddress(0), GuestAddress(0x2000)),
    (GuestAddress(0x1000), GuestAddress(0x1000)),
    (GuestAddress(0x2000), GuestAddress(0)),
];

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_keeps_memory_and_marks_all_on_complete() {
    let memory = Arc::new(regions(4));
    let weak = Arc::downgrade(&memory);
    let mut buffer = IoBuffer::new(memory, Permissions::Write);
    buffer.push(GuestAddress(0x800), 0x1000).unwrap();
    buffer.push(GuestAddress(0x3000), 0x10).unwrap();
    assert!(buffer.push(GuestAddress(0x3ff0), 0x11).is_err());
    assert_eq!((buffer.len(), buffer.vectors().len()), (0x1010, 3));

    let source = File::open("/dev/zero").unwrap();
    let first = buffer.vectors().as_ptr();
    // SAFETY: `first` points to three `iovec`s, and `buffer` keeps the memory that they name
    // mapped. No reference to it exists.
    let moved = unsafe { libc::readv(std::os::fd::AsRawFd::as_raw_fd(&source), first, 3) };
    assert_eq!(moved, 0x1010);
    let memory = weak.upgrade().unwrap();
    assert_eq!(dirty(&memory), [0u64; 0]);
    assert_eq!(buffer.complete(0x801), 0x801);
    assert_eq!(dirty(&memory), [0, 0x1000, 0x3000]);
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

#[cfg(feature = "backend-atomic")]
#[test]
fn io_buffer_takes_guard_of_current_map() {
    use crate::{GuestAddressSpace, GuestMemoryAtomic};
    let memory = GuestMemoryAtomic::new(regions(2));
    let guard = memory.memory();
    let ranges = [(GuestAddress(0), 1), (GuestAddress(0x1fff), 1)];
    let mut first = IoBuffer::from_ranges(&guard, ranges, Permissions::Read).unwrap();
    let second = IoBuffer::from_ranges(guard, ranges, Permissions::Read).unwrap();
    assert!(Arc::ptr_eq(first.memory(), second.memory()));
    let old = memory.update(|_| Ok::<_, ()>(regions(3))).unwrap();
    assert_eq!(old.readers(), 2);
    first.set_memory(memory.memory());
    drop(second);
    assert!(old.is_done());
    first.push(GuestAddress(0x2000), PAGE).unwrap();
}

#[cfg(feature = "iommu")]
#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_push_behind_rwlock_iotlb_returns_unsupported() {
    use crate::{IommuMemory, Iotlb};
    use std::sync::RwLock;
    let mut iotlb = Iotlb::new();
    for (iova, to) in REVERSED {
        let mapped = iotlb.set_mapping(iova, to, PAGE, Permissions::ReadWrite);
        mapped.unwrap();
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

#[cfg(feature = "iommu")]
#[test]
fn b09_invalidation_waits_for_io_buffer_behind_shared_iotlb() {
    use crate::iommu::SharedIotlb;
    use crate::IommuMemory;
    let iotlb = SharedIotlb::new();
    for (iova, to) in REVERSED {
        let mapped = iotlb.set_mapping(iova, to, PAGE, Permissions::ReadWrite);
        mapped.unwrap();
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

#[cfg(feature = "iommu")]
mod holds {
    use std::sync::Mutex;

    use super::*;
    use crate::guest_memory::TranslationHold;
    use crate::iommu::{self, Iommu, IommuMemory, IotlbIterator, IotlbSnapshot, SharedIotlb};

    /// An IOMMU whose front end invalidates another mapping before it maps a missing page.
    #[derive(Debug, Default)]
    struct Asking {
        iotlb: SharedIotlb,
        /// The readers of each invalidation, which the front end would wait for.
        readers: Mutex<Vec<usize>>,
    }

    impl Iommu for Asking {
        type IotlbGuard<'a> = IotlbSnapshot;
        fn translate(
            &self,
            iova: GuestAddress,
            length: usize,
            access: Permissions,
        ) -> std::result::Result<IotlbIterator<IotlbSnapshot>, iommu::Error> {
            if self.iotlb.lookup(iova, length, access).is_err() {
                let gone = self
                    .iotlb
                    .invalidate_mapping(GuestAddress(0x666_0000), PAGE);
                self.readers.lock().unwrap().push(gone.readers());
                self.iotlb
                    .set_mapping(iova, iova, length, Permissions::ReadWrite)?;
            }
            self.iotlb.translate(iova, length, access)
        }
        fn hold_translation(&self) -> Option<TranslationHold> {
            self.iotlb.hold_translation()
        }
    }

    #[test]
    fn io_buffer_first_push_that_misses_holds_nothing_during_the_miss() {
        let bitmap = AtomicBitmap::new(4 * PAGE, PAGE.try_into().unwrap());
        let memory = IommuMemory::new(regions(4), Asking::default(), true, bitmap);
        let memory = Arc::new(memory);
        let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
        buffer.push(GuestAddress(0x1000), PAGE).unwrap();
        assert_eq!(*memory.iommu().readers.lock().unwrap(), [0]);
        let gone = memory
            .iommu()
            .iotlb
            .invalidate_mapping(GuestAddress(0x1000), 1);
        assert!(!gone.is_done());
    }

    #[test]
    fn io_buffer_from_ranges_that_miss_holds_nothing_during_the_misses() {
        let bitmap = AtomicBitmap::new(4 * PAGE, PAGE.try_into().unwrap());
        let memory = IommuMemory::new(regions(4), Asking::default(), true, bitmap);
        let memory = Arc::new(memory);
        let ranges = [0, 0x1000, 0x3000].map(|at| (GuestAddress(at), PAGE));
        let buffer = IoBuffer::from_ranges(&memory, ranges, Permissions::Write).unwrap();
        assert_eq!(*memory.iommu().readers.lock().unwrap(), [0, 0, 0]);
        let held = || {
            !memory
                .iommu()
                .iotlb
                .invalidate_mapping(ranges[2].0, 1)
                .is_done()
        };
        assert!(held());
        drop(buffer);
        assert!(!held());
    }

    /// Returns four pages of memory, mapped to themselves.
    fn identity_mapped() -> Arc<IommuMemory<Memory, SharedIotlb>> {
        let iotlb = SharedIotlb::new();
        let zero = GuestAddress(0);
        iotlb
            .set_mapping(zero, zero, 4 * PAGE, Permissions::ReadWrite)
            .unwrap();
        let bitmap = AtomicBitmap::new(8 * PAGE, PAGE.try_into().unwrap());
        Arc::new(IommuMemory::new(regions(4), iotlb, true, bitmap))
    }

    /// Returns whether a snapshot of the IOTLB is held.
    fn is_held(memory: &IommuMemory<Memory, SharedIotlb>) -> bool {
        let unmapped = GuestAddress(0x666_0000);
        !memory.iommu().invalidate_mapping(unmapped, PAGE).is_done()
    }

    #[test]
    fn io_buffer_that_becomes_empty_releases_the_translation() {
        let (memory, zero) = (identity_mapped(), GuestAddress(0));
        let held = || is_held(&memory);
        let mut buffer = IoBuffer::new(&memory, Permissions::Write);
        let ends: [fn(&mut IoBuffer<_>); 5] = [
            |buffer| buffer.clear(),
            |buffer| buffer.truncate(0),
            |buffer| buffer.set_memory(Arc::clone(buffer.memory())),
            |buffer| assert_eq!(buffer.complete_front(usize::MAX), 2 * PAGE),
            |buffer| assert_eq!(buffer.cancel_front(2 * PAGE), 2 * PAGE),
        ];
        for end in ends {
            buffer.push(zero, 2 * PAGE).unwrap();
            assert_eq!(buffer.complete_front(0), 0);
            assert!(held());
            end(&mut buffer);
            assert!(!held() && buffer.is_empty());
        }
    }

    #[test]
    fn io_buffer_without_ranges_holds_no_translation() {
        let (memory, zero) = (identity_mapped(), GuestAddress(0));
        let held = || is_held(&memory);

        let mut buffer = IoBuffer::new(&memory, Permissions::Write);
        buffer.push(GuestAddress(0x3000), 2 * PAGE).unwrap_err();
        assert!(!held(), "the translation failed");
        buffer.set_segment_limit(1);
        buffer.push(zero, 2 * PAGE).unwrap_err();
        assert!(!held(), "there were too many segments");
        buffer.push(zero, 0).unwrap();
        assert!(!held(), "the range has no bytes");
        buffer.push(zero, PAGE).unwrap();
        assert!(held());
        let mut rest = buffer.split_off(0).unwrap();
        assert!(held(), "the second part has the range");
        let end = rest.split_off(PAGE).unwrap();
        drop(rest);
        assert!(!held(), "the parts that are left are empty");
        drop((buffer, end));
    }
}
