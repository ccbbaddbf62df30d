//! The wire format is that of the kernel's binding in the `vhost` crate.

use std::mem::{offset_of, size_of};

use vhost::vhost_kern::vhost_binding::{
    vhost_iotlb_msg, VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_MISS,
    VHOST_IOTLB_UPDATE,
};
use vhost::vhost_user::message::{BackendReq, FrontendReq, VhostUserHeaderFlag};
use vhost::VhostAccess;
use vm_memory::{GuestAddress, Permissions};
use vm_memory_vhost::{Header, IotlbMessage, VHOST_USER_BACKEND_IOTLB_MSG, VHOST_USER_IOTLB_MSG};

#[test]
fn iotlb_message_has_layout_of_vhost_iotlb_msg() {
    assert_eq!(size_of::<vhost_iotlb_msg>(), IotlbMessage::SIZE);
    let message = IotlbMessage::Update {
        iova: GuestAddress(0x0102_0304_0506_0708),
        size: 0x1112_1314_1516_1718,
        user_address: 0x2122_2324_2526_2728,
        permissions: Permissions::ReadWrite,
    };
    let bytes = message.encode();
    let number = |offset: usize| u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap());
    let [iova, size, uaddr] = [
        offset_of!(vhost_iotlb_msg, iova),
        offset_of!(vhost_iotlb_msg, size),
        offset_of!(vhost_iotlb_msg, uaddr),
    ];
    assert_eq!(number(iova), 0x0102_0304_0506_0708);
    assert_eq!(number(size), 0x1112_1314_1516_1718);
    assert_eq!(number(uaddr), 0x2122_2324_2526_2728);
    assert_eq!(bytes[offset_of!(vhost_iotlb_msg, perm)], 3);
    assert_eq!(
        bytes[offset_of!(vhost_iotlb_msg, type_)],
        VHOST_IOTLB_UPDATE
    );
}

#[test]
fn types_permissions_and_requests_have_numbers_of_specification() {
    let (iova, size) = (GuestAddress(0), 1);
    let access = Permissions::No;
    let types = [
        (IotlbMessage::Miss { iova, size, access }, VHOST_IOTLB_MISS),
        (
            IotlbMessage::Invalidate { iova, size },
            VHOST_IOTLB_INVALIDATE,
        ),
        (
            IotlbMessage::AccessFail { iova, size, access },
            VHOST_IOTLB_ACCESS_FAIL,
        ),
    ];
    for (message, number) in types {
        let bytes = message.encode();
        assert_eq!(bytes[offset_of!(vhost_iotlb_msg, type_)], number);
    }
    let permissions = [
        (Permissions::No, VhostAccess::No),
        (Permissions::Read, VhostAccess::ReadOnly),
        (Permissions::Write, VhostAccess::WriteOnly),
        (Permissions::ReadWrite, VhostAccess::ReadWrite),
    ];
    for (access, number) in permissions {
        let bytes = IotlbMessage::Miss { iova, size, access }.encode();
        assert_eq!(bytes[offset_of!(vhost_iotlb_msg, perm)], number as u8);
    }
    assert_eq!(u32::from(FrontendReq::IOTLB_MSG), VHOST_USER_IOTLB_MSG);
    assert_eq!(
        u32::from(BackendReq::IOTLB_MSG),
        VHOST_USER_BACKEND_IOTLB_MSG
    );
}

#[test]
fn header_has_flags_of_the_vhost_crate() {
    let flags = |header: Header| u32::from_ne_bytes(header.encode()[4..8].try_into().unwrap());
    let request = Header::request(22, 32);
    let need_reply = VhostUserHeaderFlag::NEED_REPLY.bits();
    assert_eq!(flags(request), 1);
    assert_eq!(flags(request.with_need_reply()), 1 | need_reply);
    let reply = VhostUserHeaderFlag::REPLY.bits();
    assert_eq!(flags(Header::reply(22, 8)), 1 | reply);
}
