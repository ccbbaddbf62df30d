//! Pages that a device wrote are marked, however the buffer ends.

use super::*;

/// Creates a buffer of three pages in `memory`, whose vectors were lent if `lent`.
fn buffer(memory: &Arc<Memory>, access: Permissions, lent: bool) -> IoBuffer<Memory> {
    let mut buffer = IoBuffer::new(Arc::clone(memory), access);
    buffer.push(GuestAddress(0), PAGE).unwrap();
    buffer.push(GuestAddress(0x2000), 2 * PAGE).unwrap();
    if lent {
        assert_eq!(buffer.vectors().len(), 3);
    }
    buffer
}

#[test]
fn io_buffer_dropped_after_vectors_marks_all_pages() {
    let memory = Arc::new(regions(4));
    for access in [Permissions::Write, Permissions::ReadWrite] {
        drop(buffer(&memory, access, true));
        assert_eq!(dirty(&memory), [0, 0x2000, 0x3000]);
        let mut on_heap = buffer(&memory, access, false);
        on_heap.vectors_on_heap();
        drop(on_heap);
        assert_eq!(dirty(&memory), [0, 0x2000, 0x3000]);
        // Not lent.
        drop(buffer(&memory, access, false));
        assert_eq!(dirty(&memory), [0u64; 0]);
    }
    drop(buffer(&memory, Permissions::Read, true));
    buffer(&memory, Permissions::Read, true).complete(1);
    assert_eq!(dirty(&memory), [0u64; 0]);
}

#[test]
fn io_buffer_dropped_on_another_thread_marks_all_pages() {
    let memory = Arc::new(regions(4));
    let shared = buffer(&memory, Permissions::Write, false);
    std::thread::scope(|scope| {
        scope.spawn(|| shared.vectors().len());
    });
    std::thread::spawn(move || drop(shared)).join().unwrap();
    assert_eq!(dirty(&memory), [0, 0x2000, 0x3000]);
}

#[test]
fn io_buffer_parts_mark_their_own_pages() {
    let memory = Arc::new(regions(4));
    let mut first = buffer(&memory, Permissions::Write, true);
    let rest = first.split_off(PAGE + 8).unwrap();
    drop(rest);
    assert_eq!(dirty(&memory), [0x2000, 0x3000]);
    drop(first);
    assert_eq!(dirty(&memory), [0, 0x2000]);

    let mut truncated = buffer(&memory, Permissions::Write, true);
    truncated.truncate(8);
    assert_eq!(dirty(&memory), [0, 0x2000, 0x3000]);
    truncated.truncate(usize::MAX);
    truncated.truncate(0);
    assert_eq!(dirty(&memory), [0]);
    drop(truncated);
    assert_eq!(dirty(&memory), [0u64; 0]);
}

#[test]
fn io_buffer_in_panic_or_early_return_marks_all_pages() {
    let memory = Arc::new(regions(4));
    let lent = buffer(&memory, Permissions::Write, true);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _lent = lent;
        std::panic::resume_unwind(Box::new("a device panics"));
    }));
    assert!(caught.is_err());
    assert_eq!(dirty(&memory), [0, 0x2000, 0x3000]);

    let submit = |mut buffer: IoBuffer<Memory>| {
        buffer.vectors_on_heap();
        buffer.push(GuestAddress(0x4000), 1)?;
        Ok::<_, Error>(buffer)
    };
    submit(buffer(&memory, Permissions::Write, false)).unwrap_err();
    assert_eq!(dirty(&memory), [0, 0x2000, 0x3000]);
}

#[test]
fn io_buffer_complete_marks_all_and_cancel_marks_nothing() {
    let memory = Arc::new(regions(4));
    for (written, told) in [(0, 0), (1, 1), (3 * PAGE, 3 * PAGE), (usize::MAX, 3 * PAGE)] {
        let lent = buffer(&memory, Permissions::Write, true);
        assert_eq!(lent.complete(written), told);
        assert_eq!(dirty(&memory), [0, 0x2000, 0x3000]);
    }
    buffer(&memory, Permissions::Write, true).cancel();
    assert_eq!(dirty(&memory), [0u64; 0]);
    // A part that was cancelled does not change the other one.
    let mut lent = buffer(&memory, Permissions::Write, true);
    lent.split_off(PAGE).unwrap().cancel();
    assert_eq!(dirty(&memory), [0u64; 0]);
    drop(lent);
    assert_eq!(dirty(&memory), [0]);
}

#[test]
fn io_vectors_dropped_after_vectors_mark_all_pages() {
    let memory = regions(3);
    let range = |access| io_vectors(&memory, GuestAddress(0x10), 2 * PAGE, access).unwrap();
    range(Permissions::Write).vectors();
    assert_eq!(dirty(&memory), [0, 0x1000, 0x2000]);
    drop(range(Permissions::Write));
    range(Permissions::Read).vectors();
    let cancelled = range(Permissions::Write);
    cancelled.vectors();
    cancelled.cancel();
    assert_eq!(dirty(&memory), [0u64; 0]);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let lent = range(Permissions::ReadWrite);
        lent.vectors();
        std::panic::resume_unwind(Box::new("a device panics"));
    }));
    assert!(caught.is_err());
    assert_eq!(dirty(&memory), [0, 0x1000, 0x2000]);
}

#[cfg(feature = "iommu")]
#[test]
fn io_buffer_dropped_behind_iommu_marks_by_both_addresses() {
    use crate::iommu::{MarkedIommuMemory, SharedIotlb};
    let iotlb = SharedIotlb::new();
    for page in 0..3u64 {
        let (iova, to) = (GuestAddress(page << 12), GuestAddress((2 - page) << 12));
        let mapped = iotlb.set_mapping(iova, to, PAGE, Permissions::Write);
        assert!(mapped.unwrap().is_done());
    }
    let by_iova = AtomicBitmap::new(4 * PAGE, PAGE.try_into().unwrap());
    let memory = MarkedIommuMemory::by_both(regions(3), iotlb.clone(), true, by_iova);
    let memory = Arc::new(memory);
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    buffer.push(GuestAddress(0), PAGE + 1).unwrap();
    buffer.vectors();
    let removed = iotlb.invalidate_all();
    assert!(!removed.is_done());
    drop(buffer);
    assert!(removed.is_done());
    assert_eq!(memory.bitmap().get_and_reset(), [0b11]);
    assert_eq!(dirty(memory.get_backend()), [0x1000, 0x2000]);
}

/// A stream whose reads deliver a few bytes each, and end.
#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn read_exact_that_ends_early_marks_whole_range() {
    let memory = regions(4);
    let (near, far) = UnixStream::pair().unwrap();
    (&far).write_all(&[7; 10]).unwrap();
    drop(far);
    let error = read_exact_from(&memory, GuestAddress(0), 3 * PAGE, &near).unwrap_err();
    assert!(matches!(error, Error::PartialBuffer { completed: 10, .. }));
    assert_eq!(dirty(&memory), [0, 0x1000, 0x2000]);
    // The end of the stream comes before the first byte.
    read_exact_from(&memory, GuestAddress(0), 3 * PAGE, &near).unwrap_err();
    assert_eq!(dirty(&memory), [0u64; 0]);
}
