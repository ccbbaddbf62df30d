//! [`ErrorKind`]: each error that the library creates has its kind.

use std::io;
use std::num::NonZeroUsize;
use std::time::Duration;

use super::*;

/// The kind of a failed access to 8 bytes, behind an IOMMU with one mapping, of a page at 0x1000.
fn kind_of<S: MappingSource>(source: S, iova: u64, close: bool) -> ErrorKind {
    let iotlb = SharedIotlb::new();
    let iommu = AskingIommu::new(iotlb.clone(), Duration::ZERO, source);
    if close {
        assert!(iommu.close().is_done());
    }
    let page = GuestAddress(0x1000);
    iotlb.set_mapping(page, page, 0x1000, Read).unwrap();
    let error = iommu.translate(GuestAddress(iova), 8, Write).unwrap_err();
    error.kind()
}

#[test]
fn kind_of_failed_request_is_that_of_its_failure() {
    let silent = |_: &IovaRange, _: Permissions| Ok(());
    assert_eq!(kind_of(silent, 0x2000, false), ErrorKind::TimedOut);
    assert_eq!(kind_of(silent, 0x2000, true), ErrorKind::Closed);
    for close in [false, true] {
        assert_eq!(kind_of(silent, 0x1000, close), ErrorKind::NotPermitted);
        assert_eq!(kind_of(silent, u64::MAX, close), ErrorKind::PastTheEnd);
    }
    // The text of an error does not decide.
    for text in [
        "does not permit",
        "is not mapped, and no mapping arrived within",
    ] {
        let failing = move |_: &IovaRange, _: Permissions| Err(io::Error::other(text));
        assert_eq!(kind_of(failing, 0x2000, false), ErrorKind::RequestFailed);
    }
}

/// A source that fails to report refusals.
struct Unreported;

impl MappingSource for Unreported {
    fn request_mapping(&self, _: &IovaRange, _: Permissions) -> io::Result<()> {
        Ok(())
    }

    fn report_refusal(&self, _: &IovaRange, _: Permissions) -> io::Result<()> {
        Err(io::Error::other("the request failed"))
    }
}

#[test]
fn kind_of_refusal_whose_report_fails_is_not_permitted() {
    assert_eq!(kind_of(Unreported, 0x1000, false), ErrorKind::NotPermitted);
}

#[test]
fn kind_of_lookup_and_mapping_errors_is_that_of_the_cause() {
    let iotlb = SharedIotlb::new();
    let page = GuestAddress(0x1000);
    iotlb.set_bound(NonZeroUsize::new(1));
    iotlb
        .set_mapping(page, GuestAddress(0), 0x1000, Read)
        .unwrap();
    let kind = |iova, length| {
        let error = iotlb.translate(GuestAddress(iova), length, Read);
        error.unwrap_err().kind()
    };
    assert_eq!(kind(0x2000, 8), ErrorKind::NotMapped);
    let next = GuestAddress(0x2000);
    iotlb
        .set_mapping(next, GuestAddress(0x8000), 0x1000, Read)
        .unwrap();
    assert_eq!(kind(0x1000, 0x2000), ErrorKind::RefusedByBound);
    for (iova, target) in [(u64::MAX, 0), (0, u64::MAX)] {
        let error = iotlb.set_mapping(GuestAddress(iova), GuestAddress(target), 2, Read);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::PastTheEnd);
    }
    let none = IotlbFails {
        misses: Vec::new(),
        access_fails: Vec::new(),
    };
    let error = none.into_error(page, 8, Read);
    assert_eq!(error.kind(), ErrorKind::NotMapped);
}

#[test]
fn kind_of_tries_that_are_spent_is_refused_by_bound() {
    let iotlb = SharedIotlb::new();
    iotlb.set_bound(NonZeroUsize::new(2));
    let kinds: Vec<_> = (0..100)
        .map(|_| {
            // The guest unmaps the second page before each lookup.
            let page = GuestAddress(0x1000);
            iotlb.set_mapping(page, page, 0x1000, Read).unwrap();
            iotlb.translate(page, 0x2000, Read).unwrap_err().kind()
        })
        .collect();
    assert_eq!(kinds[0], ErrorKind::NotMapped);
    assert!(kinds.contains(&ErrorKind::RefusedByBound), "{kinds:?}");
}

#[test]
fn kind_of_other_variants_and_foreign_reasons() {
    let iova_range = IovaRange {
        base: GuestAddress(0),
        length: 8,
    };
    let scattered = Error::Fragmented {
        iova_range: iova_range.clone(),
        continuous_length: 4,
    };
    assert_eq!(scattered.kind(), ErrorKind::Scattered);
    let reason = "no bitmap".to_string();
    let misconfigured = Error::IommuMisconfigured { reason };
    assert_eq!(misconfigured.kind(), ErrorKind::Misconfigured);
    for reason in ["", " ", "the page table is not readable", "0x0-0x7 is gone"] {
        let reason = reason.to_string();
        let iova_range = iova_range.clone();
        let error = Error::CannotResolve { iova_range, reason };
        assert_eq!(error.kind(), ErrorKind::Other);
    }
}
