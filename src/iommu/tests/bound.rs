//! B14: the bound of an IOTLB, and ranges that need more mappings.

use super::*;

/// Without the refusal, a caller would request the misses forever.
#[test]
fn b14_lookup_of_more_mappings_than_bound_is_refused() {
    let iotlb = SharedIotlb::new();
    iotlb.set_bound(NonZeroUsize::new(3));
    let mut rounds = 0;
    let refused = loop {
        rounds += 1;
        assert!(rounds < 10, "the loop does not end");
        match iotlb.lookup(GuestAddress(0), 5 * 0x1000, Read) {
            Ok(_) => unreachable!("five mappings in an IOTLB of three"),
            Err(fails) if !fails.access_fails.is_empty() => break fails,
            Err(fails) => {
                for missing in fails.misses {
                    for page in 0..missing.length as u64 / PAGE {
                        let iova = missing.base.0 + page * PAGE;
                        // No page continues the one before.
                        iotlb
                            .set_mapping(GuestAddress(iova), GuestAddress(iova * 2), 0x1000, Read)
                            .unwrap();
                    }
                }
            }
        }
    };
    assert!(refused.misses.is_empty());
    let fails = iotlb
        .lookup(GuestAddress(0x10_0000), 0x1000, Read)
        .unwrap_err();
    assert!(fails.access_fails.is_empty() && fails.misses.len() == 1);
    // After an invalidation it is a plain miss again.
    iotlb.invalidate_all().readers();
    let fails = iotlb.lookup(GuestAddress(0), 5 * 0x1000, Read).unwrap_err();
    assert!(fails.access_fails.is_empty());
}

#[test]
fn b14_lookup_of_merged_mapping_is_not_refused() {
    let mut iotlb = Iotlb::new();
    iotlb.set_bound(NonZeroUsize::new(2));
    let page = |number: u64| GuestAddress(number * PAGE);
    iotlb
        .set_mapping(page(1), page(0x50), 0x1000, Read)
        .unwrap();
    iotlb
        .set_mapping(page(9), page(0x70), 0x1000, Read)
        .unwrap();
    // Evicts page 1.
    iotlb
        .set_mapping(page(0), page(0x10), 0x1000, Read)
        .unwrap();
    iotlb.invalidate_mapping(page(9), 0x1000);
    iotlb
        .set_mapping(page(2), page(0x12), 0x1000, Read)
        .unwrap();
    let fails = Iotlb::lookup(&iotlb, page(0), 0x3000, Read).unwrap_err();
    assert!(fails.access_fails.is_empty(), "{fails:?}");
    iotlb
        .set_mapping(page(1), page(0x11), 0x1000, Read)
        .unwrap();
    assert_eq!(iotlb.entries(), 1);
    assert!(Iotlb::lookup(&iotlb, page(0), 0x3000, Read).is_ok());
}

/// Pages 0, 2 and 4 exceed the bound only as long as pages 1 and 3 are missing.
#[test]
fn b14_lookup_with_holes_that_may_join_is_not_refused() {
    let mut iotlb = Iotlb::new();
    iotlb.set_bound(NonZeroUsize::new(2));
    for page in [4, 0, 2] {
        let at = GuestAddress(page * PAGE);
        iotlb.set_mapping(at, at, 0x1000, Read).unwrap();
    }
    let fails = Iotlb::lookup(&iotlb, GuestAddress(0), 5 * 0x1000, Read).unwrap_err();
    assert!(
        fails.access_fails.is_empty() && fails.misses.len() == 2,
        "{fails:?}"
    );
    for page in [1, 3, 4] {
        let at = GuestAddress(page * PAGE);
        iotlb.set_mapping(at, at, 0x1000, Read).unwrap();
    }
    assert!(Iotlb::lookup(&iotlb, GuestAddress(0), 5 * 0x1000, Read).is_ok());
}

#[test]
fn b14_refusal_ends_after_any_change_of_the_range() {
    let mut iotlb = Iotlb::new();
    let fill = |iotlb: &mut Iotlb| {
        for page in [0, 1] {
            iotlb
                .set_mapping(
                    GuestAddress(page * PAGE),
                    GuestAddress(0),
                    0x1000,
                    ReadWrite,
                )
                .unwrap();
        }
        Iotlb::lookup(&*iotlb, GuestAddress(0), 0x2000, Read).unwrap_err()
    };
    iotlb.set_bound(NonZeroUsize::new(1));
    let fails = fill(&mut iotlb);
    assert!(fails.is_refused_by_bound() && fails.misses.is_empty());
    let error = fails.into_error(GuestAddress(0), 0x2000, Read);
    let Error::CannotResolve { iova_range, reason } = error else {
        panic!("{error}");
    };
    assert_eq!((iova_range.base.0, iova_range.length), (0, 0x2000));
    assert!(reason.contains("bound of the IOTLB"), "{reason}");
    // Each of these may have changed the evicted mapping.
    type Change = fn(&mut Iotlb);
    let changes: [Change; 4] = [
        |iotlb| iotlb.set_bound(NonZeroUsize::new(1)),
        |iotlb| iotlb.invalidate_mapping(GuestAddress(0x10_0000), 0x1000),
        // Replaces page 1, so page 0 may also have been replaced.
        |iotlb| {
            iotlb
                .set_mapping(GuestAddress(PAGE), GuestAddress(0x8000), 0x1000, ReadWrite)
                .unwrap();
        },
        |iotlb| {
            iotlb.invalidate_all();
            iotlb
                .set_mapping(GuestAddress(PAGE), GuestAddress(0), 0x1000, ReadWrite)
                .unwrap();
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        assert!(fill(&mut iotlb).is_refused_by_bound());
        change(&mut iotlb);
        let fails = Iotlb::lookup(&iotlb, GuestAddress(0), 0x2000, Read).unwrap_err();
        assert!(
            !fails.is_refused_by_bound() && !fails.misses.is_empty(),
            "change {number}: {fails:?}"
        );
    }
    // A lack of permission is not a refusal by the bound.
    iotlb
        .set_mapping(GuestAddress(0), GuestAddress(0), 0x1000, Read)
        .unwrap();
    let fails = Iotlb::lookup(&iotlb, GuestAddress(0), 0x1000, Write).unwrap_err();
    assert!(!fails.is_refused_by_bound() && fails.access_fails.len() == 1);
}
