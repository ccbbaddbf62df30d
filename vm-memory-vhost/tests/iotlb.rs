//! The effect of IOTLB messages, and the causes of their errors.

use std::error::Error as _;

use test_support::assert_causes_printed_once;
use vm_memory::iommu::SharedIotlb;
use vm_memory::{GuestAddress, Permissions};
use vm_memory_vhost::{ApplyError, IotlbMessage, MemoryRegion, RegionTable};

const USER: u64 = 0x7f00_0000_0000;
const IOVA: u64 = 0x8000;

/// Two regions of a page, which are adjacent for the front end only.
fn table() -> RegionTable {
    let region = |guest, user| MemoryRegion::new(GuestAddress(guest), 0x1000, user, 0);
    RegionTable::new([region(0x4000, USER), region(0, USER + 0x1000)]).unwrap()
}

fn update(iova: u64, size: u64, user_address: u64) -> IotlbMessage {
    IotlbMessage::Update {
        iova: GuestAddress(iova),
        size,
        user_address,
        permissions: Permissions::ReadWrite,
    }
}

/// Returns (first IOVA, last IOVA, target) of all mappings.
fn mappings(iotlb: &SharedIotlb) -> Vec<(u64, u64, u64)> {
    let all = iotlb.mappings(..);
    all.map(|mapping| (mapping.first.0, mapping.last.0, mapping.target.0))
        .collect()
}

#[test]
fn apply_of_update_across_regions_makes_several_mappings() {
    let iotlb = SharedIotlb::new();
    let change = update(IOVA, 0x1800, USER + 0x400).apply(&table(), &iotlb);
    assert!(change.is_ok());
    let expected = [
        (IOVA, IOVA + 0xbff, 0x4400),
        (IOVA + 0xc00, IOVA + 0x17ff, 0),
    ];
    assert_eq!(mappings(&iotlb), expected);
}

#[test]
fn apply_of_refused_message_returns_reason_and_changes_nothing() {
    let iotlb = SharedIotlb::new();
    assert!(update(IOVA, 0x1000, USER).apply(&table(), &iotlb).is_ok());
    let before = mappings(&iotlb);
    let (iova, size, access) = (GuestAddress(IOVA), 8, Permissions::Read);
    let refused = [
        (update(IOVA, 0x1000, USER + 0x1001), "is not guest memory"),
        (update(IOVA, 0, USER), "refuses the mapping"),
        (update(u64::MAX, 2, USER), "refuses the mapping"),
        (
            IotlbMessage::Miss { iova, size, access },
            "of type VHOST_IOTLB_MISS",
        ),
        (
            IotlbMessage::AccessFail { iova, size, access },
            "of type VHOST_IOTLB_ACCESS_FAIL",
        ),
    ];
    for (message, end) in refused {
        let error = message.apply(&table(), &iotlb).unwrap_err();
        assert!(error.to_string().ends_with(end), "{error}");
        let is_from_back_end = matches!(error, ApplyError::NotFromFrontEnd(_));
        assert_eq!(error.source().is_none(), is_from_back_end);
        assert_causes_printed_once(&error);
        assert_eq!(mappings(&iotlb), before);
    }
    let reason = |message: IotlbMessage| {
        let error = message.apply(&table(), &iotlb).unwrap_err();
        error.source().map(ToString::to_string).unwrap()
    };
    assert!(reason(update(IOVA, 0, USER)).ends_with("the range is empty"));
    assert!(reason(update(u64::MAX, 2, USER)).ends_with("passes the end of the address space"));
}
