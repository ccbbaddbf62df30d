//! Single cases.

use vm_memory::listeners::{BoxError, ChangeKind, MemoryChange, MemoryListener, NotAsBefore};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::region::GuestMemoryRegionBytes;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, Permissions};

use super::{page_size, pages_of, slot_range, slots_with, DirtyLog, KvmSlots, LIMIT};
use crate::error::{SlotAction, SlotError};

#[test]
fn remove_of_the_middle_of_a_slot_keeps_both_ends() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    slots.add_pages(0, 100, 1000).unwrap();
    slots.remove_pages(40, 20).unwrap();
    assert_eq!(slots.pages(), [(0, 40), (60, 40)]);
    let hosts: Vec<_> = double
        .slots()
        .iter()
        .map(|(range, _)| range.host / page_size())
        .collect();
    assert_eq!(hosts, [1000, 1060]);
}

#[test]
fn add_with_a_slot_size_cuts_at_its_multiples_only() {
    let (slots, _) = slots_with(DirtyLog::Bitmap, Some(16));
    slots.add_pages(8, 40, 1000).unwrap();
    assert_eq!(slots.pages(), [(8, 8), (16, 16), (32, 16)]);
    slots.remove_pages(16, 16).unwrap();
    assert_eq!(slots.pages(), [(8, 8), (32, 16)]);
}

#[test]
fn add_with_too_few_slots_names_the_needed_and_available_ones() {
    let (slots, _) = slots_with(DirtyLog::Bitmap, Some(1));
    slots.add_pages(0, 3, 1000).unwrap();
    let error = slots.add_pages(100, 1 << 40, 1000).unwrap_err();
    let SlotError::TooManySlots {
        needed,
        available,
        limit,
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((needed, available, limit), (1 << 40, 5, u64::from(LIMIT)));
    // The numbers of deleted slots are used again.
    slots.remove_pages(0, 3).unwrap();
    slots.add_pages(50, 8, 1000).unwrap();
    let error = slots.add_pages(100, 1, 1000).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("needs 1 memory slots, but 0 of 8 are available"),
        "{error}"
    );
}

#[test]
fn remove_of_a_part_without_a_free_slot_changes_nothing() {
    let (slots, _) = slots_with(DirtyLog::Bitmap, None);
    for number in 0..u64::from(LIMIT) {
        slots.add_pages(number * 10, 5, 1000).unwrap();
    }
    slots.set_tracking(true).unwrap();
    let before = slots.slots();
    let error = slots.remove_pages(1, 1).unwrap_err();
    assert!(
        matches!(
            error,
            SlotError::TooManySlots {
                needed: 1,
                available: 0,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(slots.slots(), before);
    // No slot was deleted for a moment.
    assert!(slots.take_log().unwrap().is_empty());
    // The rest of a slot may use its number.
    slots.remove_pages(0, 1).unwrap();
}

#[test]
fn add_of_ranges_that_kvm_would_refuse_returns_an_error() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    let page = page_size();
    slots.add_pages(10, 10, 1000).unwrap();
    let host = std::ptr::without_provenance_mut(page as usize);
    let add = |start: u64, len: u64, host: *mut u8| {
        let range = slot_range(GuestAddress(start), len, host, Permissions::ReadWrite);
        slots.table().add(&[range]).unwrap_err()
    };
    for (start, len) in [(0, 0), (1, page), (0, page - 1)] {
        assert!(matches!(add(start, len, host), SlotError::NotPages { .. }));
    }
    assert!(matches!(
        add(0, page, host.wrapping_byte_add(1)),
        SlotError::HostAddress { .. }
    ));
    assert!(matches!(
        add(0u64.wrapping_sub(page), 2 * page, host),
        SlotError::PastTheEnd { .. }
    ));
    let last = std::ptr::without_provenance_mut(0usize.wrapping_sub(page as usize));
    assert!(matches!(
        add(0, 2 * page, last),
        SlotError::PastTheEnd { .. }
    ));
    for (start, len) in [(9, 2), (19, 1), (12, 2), (0, 100)] {
        assert!(matches!(
            add(start * page, len * page, host),
            SlotError::Overlap { .. }
        ));
    }
    assert_eq!(double.slots().len(), 1);
}

#[test]
fn add_of_ranges_that_overlap_each_other_returns_an_error() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    let page = page_size();
    let range = |first: u64, count: u64| {
        let host = std::ptr::without_provenance_mut(page as usize);
        let start = GuestAddress(first * page);
        slot_range(start, count * page, host, Permissions::ReadWrite)
    };
    let error = slots
        .table()
        .add(&[range(10, 2), range(0, 5), range(4, 1)])
        .unwrap_err();
    assert!(matches!(error, SlotError::Overlap { .. }), "{error}");
    assert!(double.slots().is_empty());
    slots
        .table()
        .add(&[range(10, 2), range(0, 5), range(5, 5)])
        .unwrap();
    assert_eq!(slots.pages(), [(0, 5), (5, 5), (10, 2)]);
}

#[test]
fn add_memory_with_too_few_slots_adds_no_region() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, Some(16));
    let page = page_size();
    let ranges = [(0, 16), (16, 16 * 8)];
    let ranges = ranges.map(|(first, count)| (GuestAddress(first * page), (count * page) as usize));
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let error = slots.add_memory(&memory).unwrap_err();
    assert!(
        matches!(
            error,
            SlotError::TooManySlots {
                needed: 9,
                available: 8,
                ..
            }
        ),
        "{error}"
    );
    assert!(double.slots().is_empty());
}

#[test]
fn add_of_an_alias_logs_writes_by_their_own_guest_address() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    slots.add_pages(0, 10, 1000).unwrap();
    slots.add_pages(50, 10, 1000).unwrap();
    slots.set_tracking(true).unwrap();
    assert_eq!(double.write(53), Some(true));
    assert_eq!(pages_of(&slots.take_log().unwrap()), [53].into());
}

#[test]
fn take_log_with_a_refused_call_keeps_pages_for_the_next_harvest() {
    // The calls that succeed before: the log of the first slot, then the second one, or pieces.
    let cases = [
        (DirtyLog::Bitmap, 1),
        (DirtyLog::Manual { max_pages: 64 }, 1),
        (DirtyLog::Manual { max_pages: 64 }, 2),
        (DirtyLog::Manual { max_pages: 64 }, 4),
    ];
    for (log, succeed) in cases {
        let (slots, double) = slots_with(log, None);
        slots.add_pages(0, 200, 1000).unwrap();
        slots.add_pages(300, 10, 1000).unwrap();
        slots.set_tracking(true).unwrap();
        for page in [1, 100, 301] {
            double.write(page);
        }
        double.fail(Some((succeed, 1)));
        let error = slots.take_log().unwrap_err();
        assert!(matches!(error, SlotError::Kvm { .. }), "{error}");
        assert_eq!(
            pages_of(&slots.take_log().unwrap()),
            [1, 100, 301].into(),
            "{log:?}, {succeed}"
        );
        assert!(slots.take_log().unwrap().is_empty());
    }
}

#[test]
fn take_log_in_pieces_clears_only_pieces_that_have_pages() {
    let (slots, double) = slots_with(DirtyLog::Manual { max_pages: 130 }, None);
    slots.add_pages(0, 300, 1000).unwrap();
    slots.set_tracking(true).unwrap();
    for page in [0, 299] {
        double.write(page);
    }
    assert_eq!(pages_of(&slots.take_log().unwrap()), [0, 299].into());
    assert_eq!(double.cleared(), [(0, 128), (256, 44)]);
}

#[test]
fn take_log_after_tracking_stops_returns_earlier_pages() {
    for log in [
        DirtyLog::Bitmap,
        DirtyLog::Manual { max_pages: 64 },
        DirtyLog::Ring { entries: 4 },
    ] {
        let (slots, double) = slots_with(log, None);
        slots.add_pages(0, 10, 1000).unwrap();
        slots.set_tracking(true).unwrap();
        double.write(3);
        slots.set_tracking(false).unwrap();
        double.write(4);
        slots.set_tracking(true).unwrap();
        double.write(5);
        assert_eq!(pages_of(&slots.take_log().unwrap()), [3, 5].into());
    }
}

#[test]
fn take_log_after_a_split_returns_all_pages_of_the_slot() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    slots.add_pages(0, 10, 1000).unwrap();
    slots.set_tracking(true).unwrap();
    double.write(3);
    slots.remove_pages(5, 1).unwrap();
    assert_eq!(pages_of(&slots.take_log().unwrap()), (0..10).collect());
    double.write(7);
    assert_eq!(pages_of(&slots.take_log().unwrap()), [7].into());
}

#[test]
fn remove_of_a_slot_with_entries_in_a_ring_keeps_its_pages() {
    let (slots, double) = slots_with(DirtyLog::Ring { entries: 4 }, None);
    slots.add_pages(0, 10, 1000).unwrap();
    slots.set_tracking(true).unwrap();
    double.write(3);
    slots.set_tracking(false).unwrap();
    slots.remove_pages(0, 10).unwrap();
    assert!(pages_of(&slots.take_log().unwrap()).contains(&3));
}

#[test]
fn drain_rings_with_entries_of_unknown_slots_counts_them() {
    let (slots, double) = slots_with(DirtyLog::Ring { entries: 4 }, None);
    slots.add_pages(0, 10, 1000).unwrap();
    slots.set_tracking(true).unwrap();
    let ring = double.ring();
    // Number 5 has no slot, slot 0 has no page 10, and no slot has such numbers.
    for (place, (slot, page)) in [(5, 0), (0, 10), (u32::MAX, u64::MAX), (0, 9)]
        .iter()
        .enumerate()
    {
        assert!(ring.push(place, *slot, *page));
    }
    slots.drain_rings().unwrap();
    let logs = slots.take_log().unwrap();
    assert_eq!((logs.unknown_entries(), pages_of(&logs)), (3, [9].into()));
    assert_eq!(slots.take_log().unwrap().unknown_entries(), 0);
}

#[test]
fn ring_calls_without_a_ring_return_an_error() {
    let (slots, _) = slots_with(DirtyLog::Bitmap, None);
    assert!(matches!(slots.drain_rings(), Err(SlotError::NoRing)));
}

#[test]
fn remove_that_is_refused_twice_lists_the_lost_range() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    slots.add_pages(0, 10, 1000).unwrap();
    // The slot is deleted. Its rest cannot be created, and neither can the slot.
    double.fail(Some((1, 9)));
    let error = slots.remove_pages(5, 1).unwrap_err();
    let SlotError::NotUndone {
        lost,
        remaining,
        source,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(*lost, [(GuestAddress(0), 10 * page_size())]);
    assert!(remaining.is_empty());
    assert!(matches!(
        **source,
        SlotError::Kvm {
            action: SlotAction::Create,
            ..
        }
    ));
    assert!(
        error.to_string().contains("lost 0xa000 bytes at 0x0"),
        "{error}"
    );
    assert!(slots.slots().is_empty() && double.slots().is_empty());
}

#[test]
fn add_that_is_refused_twice_lists_the_remaining_range() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, Some(16));
    // The first slot is created. The second is refused, and so is the deletion of the first.
    double.fail(Some((1, 2)));
    let error = slots.add_pages(0, 32, 1000).unwrap_err();
    let SlotError::NotUndone {
        lost, remaining, ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(lost.is_empty());
    assert_eq!(*remaining, [(GuestAddress(0), 16 * page_size())]);
    slots.remove_pages(0, 16).unwrap();
    assert!(double.slots().is_empty());
}

/// Two slots of 16 pages. A stop of tracking fails at the second one, and the first one stays
/// untracked, although tracking is on.
fn slots_with_one_that_is_not_tracked() -> (KvmSlots, super::Double) {
    let (slots, double) = slots_with(DirtyLog::Bitmap, Some(16));
    slots.add_pages(0, 32, 1000).unwrap();
    slots.set_tracking(true).unwrap();
    // The log and the flag of the first slot succeed.
    double.fail(Some((2, 2)));
    let error = slots.set_tracking(false).unwrap_err();
    assert!(matches!(error, SlotError::NotUndone { .. }), "{error}");
    double.fail(None);
    let tracked: Vec<_> = double.slots().iter().map(|(_, tracked)| *tracked).collect();
    assert_eq!(tracked, [false, true]);
    // The harvest takes the mark of the slot.
    assert_eq!(pages_of(&slots.take_log().unwrap()).len(), 16);
    assert_eq!(double.write(3), Some(true));
    (slots, double)
}

#[test]
fn slot_that_was_not_tracked_is_dirty_when_it_is_tracked_again() {
    let (slots, _) = slots_with_one_that_is_not_tracked();
    slots.set_tracking(true).unwrap();
    assert!(pages_of(&slots.take_log().unwrap()).contains(&3));
}

#[test]
fn slot_that_was_not_tracked_is_dirty_when_it_is_deleted() {
    let (slots, _) = slots_with_one_that_is_not_tracked();
    slots.remove_pages(0, 16).unwrap();
    assert!(pages_of(&slots.take_log().unwrap()).contains(&3));
}

#[test]
fn tracking_that_a_listener_starts_again_counts_all_slots_as_dirty() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    slots.add_pages(0, 32, 1000).unwrap();
    // Clones of the listener share the regions that need the log.
    let (first, second) = (slots.clone(), slots.clone());
    let (region, other) = (GuestAddress(0), GuestAddress(0x10_0000));
    first.start_region(region).unwrap();
    second.start_region(other).unwrap();
    assert_eq!(pages_of(&slots.take_log().unwrap()).len(), 32);
    first.stop_region(region).unwrap();
    double.write(3);
    assert_eq!(pages_of(&slots.take_log().unwrap()), [3].into());
    // A stop that is undone.
    second.stop_region(other).unwrap();
    double.write(4);
    second.start_region(other).unwrap();
    assert!(pages_of(&slots.take_log().unwrap()).contains(&4));
}

#[test]
fn listener_whose_slots_are_not_as_before_returns_an_error_that_says_so() {
    let (mut slots, double) = slots_with(DirtyLog::Bitmap, Some(1));
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x2000, None).unwrap();
    let plugged = MemoryChange::new(ChangeKind::Plugged, &region, GuestAddress(0), 0, 0x2000);
    // The first slot is created. The second is refused, and so is the deletion of the first.
    double.fail(Some((1, 2)));
    let error = slots.change(&plugged).unwrap_err();
    assert!(error.is::<NotAsBefore>(), "{error}");
    // A refusal that was undone is not one.
    let (mut slots, double) = slots_with(DirtyLog::Bitmap, Some(1));
    double.fail(Some((1, 1)));
    assert!(!slots.change(&plugged).unwrap_err().is::<NotAsBefore>());
}

/// A region without memory in this process.
struct Unmapped;

impl GuestMemoryRegionBytes for Unmapped {}

impl GuestMemoryRegion for Unmapped {
    type B = ();

    fn len(&self) -> u64 {
        16 * page_size()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(0)
    }

    fn bitmap(&self) {}
}

/// Tells a listener of a change of a range of pages.
fn change<R: GuestMemoryRegion>(
    mut slots: KvmSlots,
    kind: ChangeKind,
    region: &R,
    (offset, count): (u64, u64),
) -> Result<(), BoxError> {
    let (offset, len) = (offset * page_size(), count * page_size());
    let start = region.start_addr();
    slots.change(&MemoryChange::new(kind, region, start, offset, len))
}

#[test]
fn change_of_ranges_of_a_region_makes_and_deletes_their_slots() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    let len = 16 * page_size() as usize;
    let start = GuestAddress(32 * page_size());
    let region = GuestRegionMmap::<()>::from_range(start, len, None).unwrap();
    let host = region.as_ptr().addr() as u64;
    let change = |kind, range| change(slots.clone(), kind, &region, range);
    change(ChangeKind::Added, (0, 16)).unwrap();
    assert!(slots.pages().is_empty());
    change(ChangeKind::Plugged, (4, 4)).unwrap();
    change(ChangeKind::Plugged, (8, 8)).unwrap();
    change(ChangeKind::Discarded, (4, 12)).unwrap();
    assert_eq!(slots.pages(), [(36, 4), (40, 8)]);
    assert_eq!(double.slots()[0].0.host, host + 4 * page_size());
    assert!(change(ChangeKind::Plugged, (0, 16)).is_err());
    assert!(change(ChangeKind::Plugged, (0, 17)).is_err());
    change(ChangeKind::Unplugged, (4, 4)).unwrap();
    assert_eq!(slots.pages(), [(40, 8)]);
    change(ChangeKind::Unplugged, (8, 8)).unwrap();
    change(ChangeKind::Removed, (0, 16)).unwrap();
    assert!(slots.pages().is_empty());
}

#[test]
fn change_of_a_region_without_host_memory_makes_no_slot() {
    let (slots, _) = slots_with(DirtyLog::Bitmap, None);
    for kind in [ChangeKind::Plugged, ChangeKind::Unplugged] {
        change(slots.clone(), kind, &Unmapped, (0, 16)).unwrap();
        assert!(slots.pages().is_empty());
    }
}

#[test]
fn change_of_a_read_only_region_makes_a_read_only_slot() {
    let (slots, double) = slots_with(DirtyLog::Bitmap, None);
    let mapping = MmapRegionBuilder::<()>::new(16 * page_size() as usize)
        .with_permissions(Permissions::Read)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    change(slots.clone(), ChangeKind::Plugged, &region, (0, 16)).unwrap();
    assert!(slots.slots()[0].is_read_only && double.slots()[0].0.is_read_only);
    assert_eq!(double.write(3), Some(false));
}
