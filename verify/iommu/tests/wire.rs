//! The wire format is that of the kernel's binding in the `vhost` crate.

use std::mem::{offset_of, size_of};

use verify_iommu::{Header, IotlbMessage, HEADER_SIZE, IOTLB_SIZE};
use vhost::vhost_kern::vhost_binding::{
    vhost_iotlb_msg, VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_MISS,
    VHOST_IOTLB_UPDATE,
};
use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vhost::VhostIotlbType;

#[test]
fn iotlb_message_has_layout_of_vhost_iotlb_msg() {
    assert_eq!(size_of::<vhost_iotlb_msg>(), IOTLB_SIZE);
    let message = IotlbMessage {
        iova: 0x0102_0304_0506_0708,
        size: 0x1112_1314_1516_1718,
        uaddr: 0x2122_2324_2526_2728,
        perm: 0x31,
        kind: 0x32,
    };
    let bytes = message.to_bytes();
    let number = |offset: usize| u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap());
    assert_eq!(number(offset_of!(vhost_iotlb_msg, iova)), message.iova);
    assert_eq!(number(offset_of!(vhost_iotlb_msg, size)), message.size);
    assert_eq!(number(offset_of!(vhost_iotlb_msg, uaddr)), message.uaddr);
    assert_eq!(bytes[offset_of!(vhost_iotlb_msg, perm)], message.perm);
    assert_eq!(bytes[offset_of!(vhost_iotlb_msg, type_)], message.kind);
    assert_eq!(IotlbMessage::from_bytes(&bytes), Ok(message));
    let mut padded = bytes;
    padded[26..].fill(0xff);
    assert_eq!(IotlbMessage::from_bytes(&padded), Ok(message));
    assert!(IotlbMessage::from_bytes(&bytes[..31]).is_err());
    assert!(IotlbMessage::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
}

#[test]
fn message_types_and_requests_have_numbers_of_specification() {
    let numbers = [
        (VhostIotlbType::Miss as u8, VHOST_IOTLB_MISS, 1),
        (VhostIotlbType::Update as u8, VHOST_IOTLB_UPDATE, 2),
        (VhostIotlbType::Invalidate as u8, VHOST_IOTLB_INVALIDATE, 3),
        (VhostIotlbType::AccessFail as u8, VHOST_IOTLB_ACCESS_FAIL, 4),
    ];
    for (ours, kernels, number) in numbers {
        assert_eq!((ours, kernels), (number, number));
    }
    assert_eq!(u32::from(FrontendReq::IOTLB_MSG), 22);
    assert_eq!(u32::from(BackendReq::IOTLB_MSG), 1);
}

#[test]
fn header_has_request_flags_and_size() {
    let header = Header::request(22, 32, true);
    let bytes = header.to_bytes();
    let expected: Vec<u8> = [22u32, 0b1001, 32]
        .iter()
        .flat_map(|n| n.to_ne_bytes())
        .collect();
    assert_eq!(bytes.as_slice(), expected);
    assert_eq!(bytes.len(), HEADER_SIZE);
    assert_eq!(Header::from_bytes(&bytes), header);
    assert!(header.needs_reply() && header.is_of_this_version() && !header.is_reply());
    assert_eq!(Header::reply_to(22).flags, 0b101);
    for flags in [0, 0b10, 0b11, 0b1_0001, u32::MAX] {
        assert!(
            !Header { flags, ..header }.is_of_this_version(),
            "{flags:#b}"
        );
    }
}
