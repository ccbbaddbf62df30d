//! The readers of a [`SharedIotlb`], and its counters.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use super::*;
use crate::bytes::Bytes;
use crate::guest_memory::GuestMemory;

fn found(iotlb: &SharedIotlb, page: u64, pages: usize) -> Option<Vec<MappedRange>> {
    let found = iotlb.lookup(GuestAddress(page * PAGE), pages * 0x1000, Read);
    found.ok().map(|found| found.collect())
}

#[test]
fn invalidation_is_done_when_older_readers_are_gone() {
    let iotlb = SharedIotlb::new();
    iotlb
        .set_mapping(GuestAddress(0), GuestAddress(0x7000), 0x1000, ReadWrite)
        .unwrap();
    let before = iotlb.lookup(GuestAddress(0), 8, Read).unwrap();
    let invalidation = iotlb.invalidate_mapping(GuestAddress(0), 0x1000);
    let after = iotlb.snapshot();
    assert_eq!((invalidation.readers(), found(&iotlb, 0, 1)), (1, None));
    let soon = Instant::now() + Duration::from_millis(10);
    assert_eq!(invalidation.wait(soon), Err(ReadersRemain { readers: 1 }));
    for page in 0..2000 {
        iotlb
            .set_mapping(GuestAddress(page * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
        assert_eq!(invalidation.readers(), 1);
    }
    let later = iotlb.invalidate_all();
    assert_eq!(later.readers(), 2);
    assert_eq!(
        before.collect::<Vec<_>>(),
        [MappedRange {
            base: GuestAddress(0x7000),
            length: 8
        }]
    );
    invalidation.wait(Instant::now()).unwrap();
    assert_eq!((invalidation.is_done(), later.readers()), (true, 1));
    drop(after);
    assert!(later.is_done());
}

#[test]
fn set_mapping_without_readers_reuses_two_snapshots() {
    let iotlb = SharedIotlb::new();
    let mut snapshots = std::collections::BTreeSet::new();
    for page in 0..500u64 {
        iotlb
            .set_mapping(GuestAddress(page * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
        snapshots.insert(std::ptr::from_ref::<Iotlb>(&iotlb.snapshot()).addr());
    }
    assert_eq!(snapshots.len(), 2);
}

#[test]
fn counters_of_shared_iotlb_include_all_snapshots() {
    let iotlb = SharedIotlb::new();
    iotlb.count_lookups();
    iotlb.set_bound(NonZeroUsize::new(2));
    for page in 0..5 {
        iotlb
            .set_mapping(GuestAddress(page * 2 * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
        assert!(found(&iotlb, page * 2, 1).is_some());
    }
    assert!(found(&iotlb, 0, 1).is_none());
    let expected = IotlbCounters {
        hits: 5,
        misses: 1,
        evictions: 3,
        entries: 2,
    };
    assert_eq!(iotlb.counters(), expected);
    assert!(format!("{iotlb:?}").contains("evictions: 3"));

    // A second call has no effect. `granted` is not a lookup.
    iotlb.count_lookups();
    let snapshot = iotlb.snapshot();
    let at = GuestAddress(8 * PAGE);
    assert_eq!(snapshot.granted(at, 8), Some(Read));
    assert!(Iotlb::lookup(&*snapshot, at, 8, Read).is_ok());
    assert!(Iotlb::lookup(&*snapshot, at, 8, Write).is_err());
    assert!(Iotlb::lookup(snapshot, at, 0, Write).is_ok());
    assert!(iotlb.translate(at, 8, Read).is_ok());
    assert!(iotlb.translate(at, 8, Write).is_err());
    assert!(iotlb.translate(GuestAddress(u64::MAX), 8, Read).is_err());
    assert_eq!((iotlb.counters().hits, iotlb.counters().misses), (8, 4));
}

#[test]
fn counters_of_iotlb_count_after_count_lookups() {
    let mut iotlb = Iotlb::new();
    iotlb.set_bound(NonZeroUsize::new(1));
    for page in [0, 2] {
        iotlb
            .set_mapping(GuestAddress(page * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
    }
    let look =
        |iotlb: &Iotlb, page: u64| Iotlb::lookup(iotlb, GuestAddress(page * PAGE), 8, Read).is_ok();
    assert!(look(&iotlb, 2));
    let before = IotlbCounters {
        evictions: 1,
        entries: 1,
        ..IotlbCounters::default()
    };
    assert_eq!(iotlb.counters(), before);
    iotlb.count_lookups();
    let copy = iotlb.clone();
    assert!(look(&iotlb, 2) && look(&copy, 2) && !look(&iotlb, 0));
    assert_eq!(iotlb.granted(GuestAddress(2 * PAGE), 8), Some(Read));
    let after = IotlbCounters {
        hits: 2,
        misses: 1,
        ..before
    };
    assert_eq!((iotlb.counters(), copy.counters()), (after, after));
}

#[test]
fn b09_invalidation_done_means_no_access_in_flight() {
    let rounds = 400u64;
    let physical: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    let iotlb = SharedIotlb::new();
    let memory = IommuMemory::new(physical.clone(), iotlb.clone(), true, ());
    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let iova = GuestAddress(0x10_0000);
    iotlb
        .set_mapping(iova, GuestAddress(0), 0x1000, ReadWrite)
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut slices) = memory.get_slices(iova, 8, Read) else {
                        continue;
                    };
                    let slice = slices.next().unwrap().unwrap();
                    let first: u64 = slice.read_obj(0).unwrap();
                    std::hint::spin_loop();
                    // The iterator keeps the page.
                    assert_eq!(slice.read_obj::<u64>(0).unwrap(), first);
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _stop = test_support::SetOnDrop(&stop);
        for round in 0..rounds {
            // The readers of this page are gone before it is written.
            let (now, next) = (round % 2 * PAGE, (round + 1) % 2 * PAGE);
            let invalidation = iotlb
                .set_mapping(iova, GuestAddress(next), 0x1000, ReadWrite)
                .unwrap();
            invalidation
                .wait(Instant::now() + Duration::from_secs(20))
                .unwrap();
            physical.write_obj(round, GuestAddress(now)).unwrap();
        }
        while read.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
    });
}

/// Each way to an error of such a range gives the same reason.
#[test]
fn translation_of_range_past_end_of_address_space_returns_its_reason() {
    let expected = |base: u64, length: u128| {
        format!(
            "cannot translate IOVA range 0x{base:x}-0x{:x}: \
             the range passes the end of the address space",
            u128::from(base) + length - 1
        )
    };
    let (shared, locked) = (SharedIotlb::new(), RwLock::<Iotlb>::default());
    let last = GuestAddress(u64::MAX);
    for map in [false, true] {
        if map {
            shared.set_mapping(last, last, 1, ReadWrite).unwrap();
            let mut locked = locked.write().unwrap();
            locked.set_mapping(last, last, 1, ReadWrite).unwrap();
        }
        for length in [2, 0x1000, usize::MAX] {
            for access in [No, Read, Write, ReadWrite] {
                let text = expected(u64::MAX, length as u128);
                let of_shared = shared.translate(last, length, access).unwrap_err();
                assert_eq!(of_shared.to_string(), text);
                let of_locked = locked.translate(last, length, access).unwrap_err();
                assert_eq!(of_locked.to_string(), text);
                let fails = shared.lookup(last, length, access).unwrap_err();
                assert_eq!(fails.into_error(last, length, access).to_string(), text);
                let mapped = shared.set_mapping(last, GuestAddress(0), length, access);
                assert_eq!(mapped.unwrap_err().to_string(), text);
            }
        }
    }
    // The last address alone is a valid range.
    assert!(shared.translate(last, 1, ReadWrite).is_ok());
}
