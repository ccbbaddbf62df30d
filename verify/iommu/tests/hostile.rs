//! An invalid message is refused or ends the connection, and has no other effect.

mod common;

use std::time::Duration;

use common::{end, setup, table, user, Setup, HIGH, LOW, PAGE, REGION, USER};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use verify_iommu::{FrontEnd, Header, IotlbMessage, VhostIommu, IOTLB_SIZE, MAX_PAYLOAD};
use vhost::vhost_user::message::FrontendReq;
use vhost::VhostAccess;
use vm_memory::iommu::Iotlb;
use vm_memory::{Bytes, GuestAddress, Permissions};

const SHORT: Duration = Duration::from_millis(20);
const IOVA: u64 = 0x8000;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

fn request() -> u32 {
    FrontendReq::IOTLB_MSG.into()
}

fn update(iova: u64, size: u64, uaddr: u64) -> IotlbMessage {
    IotlbMessage {
        iova,
        size,
        uaddr,
        perm: 3,
        kind: UPDATE,
    }
}

/// Returns all mappings, for comparison.
fn mappings(iommu: &VhostIommu) -> String {
    format!("{:?}", *iommu.iotlb())
}

#[test]
fn send_of_invalid_message_is_refused_without_effect() {
    let Setup {
        memory, front_end, ..
    } = setup(SHORT);
    assert!(front_end
        .update(IOVA, PAGE, user(LOW), VhostAccess::ReadWrite)
        .unwrap());
    let before = mappings(memory.iommu());

    let good = update(IOVA, PAGE, user(PAGE));
    let top = 0u64.wrapping_sub(PAGE);
    let last_user = USER + 2 * REGION;
    let messages = [
        ("update of an empty range", IotlbMessage { size: 0, ..good }),
        (
            "invalidation of an empty range",
            IotlbMessage {
                size: 0,
                kind: INVALIDATE,
                ..good
            },
        ),
        ("range past the end", update(top, PAGE + 1, user(PAGE))),
        (
            "range of 2^64 - 1 bytes",
            update(IOVA, u64::MAX, user(PAGE)),
        ),
        ("target past the end", update(IOVA, PAGE, u64::MAX - 1)),
        ("target outside of memory", update(IOVA, PAGE, 0)),
        (
            "target ends after memory",
            update(IOVA, PAGE, last_user - PAGE + 1),
        ),
        ("target starts after memory", update(IOVA, 1, last_user)),
        ("more than all memory", update(IOVA, 2 * REGION + 1, USER)),
        ("permissions 4", IotlbMessage { perm: 4, ..good }),
        ("permissions 0xff", IotlbMessage { perm: 0xff, ..good }),
        ("type 0", IotlbMessage { kind: 0, ..good }),
        ("miss", IotlbMessage { kind: 1, ..good }),
        ("access failure", IotlbMessage { kind: 4, ..good }),
        ("type 7", IotlbMessage { kind: 7, ..good }),
        ("type 0xff", IotlbMessage { kind: 0xff, ..good }),
    ];
    for (what, message) in messages {
        assert!(!front_end.send(message).unwrap(), "{what}");
        assert_eq!(mappings(memory.iommu()), before, "{what}");
    }

    let payload = good.to_bytes();
    for size in [0, 1, 26, IOTLB_SIZE - 1] {
        let header = Header::request(request(), size as u32, true);
        assert!(
            !front_end.send_with(&header, &payload[..size]).unwrap(),
            "{size} bytes"
        );
    }
    for size in [IOTLB_SIZE + 1, 2 * IOTLB_SIZE, MAX_PAYLOAD] {
        let header = Header::request(request(), size as u32, true);
        let mut long = payload.to_vec();
        long.resize(size, 0);
        assert!(
            !front_end.send_with(&header, &long).unwrap(),
            "{size} bytes"
        );
    }
    for other in [0, 1, 21, 23, u32::MAX] {
        let header = Header::request(other, IOTLB_SIZE as u32, true);
        assert!(
            !front_end.send_with(&header, &payload).unwrap(),
            "request {other}"
        );
    }
    assert_eq!(mappings(memory.iommu()), before);

    assert!(front_end.send(good).unwrap());
    memory.write_obj(1u8, GuestAddress(IOVA)).unwrap();
    end(&memory);
}

#[test]
fn send_without_need_reply_has_no_reply() {
    let Setup {
        memory, front_end, ..
    } = setup(SHORT);
    let header = Header::request(request(), IOTLB_SIZE as u32, false);
    for message in [update(IOVA, PAGE, user(HIGH)), update(IOVA, PAGE, 0)] {
        let bytes = [&header.to_bytes()[..], &message.to_bytes()].concat();
        front_end.send_bytes(&bytes).unwrap();
    }
    // This would receive the reply to an earlier message, and the last of those is a refusal.
    assert!(front_end.invalidate(IOVA + PAGE, PAGE).unwrap());
    memory.write_obj(1u8, GuestAddress(IOVA)).unwrap();
    end(&memory);
}

#[test]
fn send_of_unreadable_stream_ends_connection() {
    let good = [
        &Header::request(request(), IOTLB_SIZE as u32, true).to_bytes()[..],
        &update(IOVA, PAGE, user(PAGE)).to_bytes(),
    ]
    .concat();
    let with_header = |header: Header| [&header.to_bytes()[..], &good[12..]].concat();
    let header = Header::request(request(), IOTLB_SIZE as u32, true);
    let cases = [
        (
            "version 0",
            with_header(Header {
                flags: 0b1000,
                ..header
            }),
        ),
        (
            "version 2",
            with_header(Header {
                flags: 0b1010,
                ..header
            }),
        ),
        (
            "reply",
            with_header(Header {
                flags: 0b0101,
                ..header
            }),
        ),
        (
            "reserved flags",
            with_header(Header {
                flags: 0x8000_0009,
                ..header
            }),
        ),
        (
            "payload above the maximum",
            with_header(Header {
                size: MAX_PAYLOAD as u32 + 1,
                ..header
            }),
        ),
        (
            "payload of 4 GiB",
            with_header(Header {
                size: u32::MAX,
                ..header
            }),
        ),
        ("one byte", good[..1].to_vec()),
        ("half a header", good[..11].to_vec()),
        ("no payload", good[..12].to_vec()),
        ("half a payload", good[..43].to_vec()),
    ];
    for (what, bytes) in cases {
        let Setup {
            memory, front_end, ..
        } = setup(SHORT);
        assert!(front_end
            .update(IOVA, PAGE, user(LOW), VhostAccess::ReadWrite)
            .unwrap());
        front_end.send_bytes(&bytes).unwrap();
        if bytes.len() < good.len() {
            front_end.hang_up().unwrap();
        }
        let ended = memory.iommu().wait_for_end().unwrap().unwrap();
        assert!(ended.is_err(), "{what}");
        assert!(!memory.iommu().is_connected(), "{what}");
        // No message can invalidate the mapping now, so it is removed.
        memory.read_obj::<u8>(GuestAddress(IOVA)).unwrap_err();
    }
}

/// Generates numbers near 0, near 2^64 and in guest memory.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0u64..64).prop_map(|n| n * 0x800),
        (0u64..64).prop_map(|n| 0u64.wrapping_sub(n * 0x800)),
        0u64..4,
        (0u64..4).prop_map(|n| u64::MAX - n),
        (0u64..3 * REGION).prop_map(|n| USER - 0x100 + n),
        any::<u64>(),
    ]
}

fn message() -> impl Strategy<Value = IotlbMessage> {
    let perm = prop_oneof![8 => 0u8..4, 1 => any::<u8>()];
    let kind = prop_oneof![6 => Just(UPDATE), 3 => Just(INVALIDATE), 1 => any::<u8>()];
    let uaddr = prop_oneof![3 => USER..USER + 2 * REGION, 1 => number()];
    (number(), number(), uaddr, perm, kind).prop_map(|(iova, size, uaddr, perm, kind)| {
        IotlbMessage {
            iova,
            size,
            uaddr,
            perm,
            kind,
        }
    })
}

fn idle() -> (FrontEnd, VhostIommu) {
    let (front_end, main, requests) = FrontEnd::pair().unwrap();
    let iommu = VhostIommu::start(main, requests, table(), SHORT).unwrap();
    (front_end, iommu)
}

fn is_mapped(iotlb: &Iotlb, addr: u64) -> bool {
    Iotlb::lookup(iotlb, GuestAddress(addr), 1, Permissions::No).is_ok()
}

fn config() -> ProptestConfig {
    // `cargo test` runs in the folder of the package.
    let file = FileFailurePersistence::Direct("proptest-regressions/hostile.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(file)),
        ..ProptestConfig::with_cases(256)
    }
}

fn check_messages(messages: Vec<IotlbMessage>) -> Result<(), TestCaseError> {
    let (_front_end, iommu) = idle();
    let header = Header::request(request(), IOTLB_SIZE as u32, true);
    for message in messages {
        let before = mappings(&iommu);
        let result = iommu.handle(&header, &message.to_bytes());
        let fits = message
            .size
            .checked_sub(1)
            .and_then(|more| message.iova.checked_add(more));
        match (
            message.kind,
            fits,
            table().translate(message.uaddr, message.size),
        ) {
            (UPDATE, Some(_), Ok(ranges)) if message.perm < 4 => {
                prop_assert!(result.is_ok(), "{result:?}");
                let access = [
                    Permissions::No,
                    Permissions::Read,
                    Permissions::Write,
                    Permissions::ReadWrite,
                ];
                let access = access[usize::from(message.perm)];
                let iotlb = iommu.iotlb();
                let found: Vec<_> = Iotlb::lookup(
                    &*iotlb,
                    GuestAddress(message.iova),
                    message.size as usize,
                    access,
                )
                .unwrap()
                .map(|range| (range.base, range.length as u64))
                .collect();
                prop_assert_eq!(found, ranges);
            }
            (INVALIDATE, last, _) if message.size != 0 => {
                prop_assert!(result.is_ok(), "{result:?}");
                let last = last.unwrap_or(u64::MAX);
                let iotlb = iommu.iotlb();
                for addr in [message.iova, message.iova + (last - message.iova) / 2, last] {
                    prop_assert!(!is_mapped(&iotlb, addr));
                }
                let everything = Iotlb::lookup(
                    &*iotlb,
                    GuestAddress(message.iova),
                    (last - message.iova) as usize,
                    Permissions::No,
                );
                prop_assert!(everything.is_err() || last == message.iova);
            }
            _ => {
                prop_assert!(result.is_err());
                prop_assert_eq!(mappings(&iommu), before);
            }
        }
    }
    iommu.disconnect().unwrap().unwrap().unwrap();
    Ok(())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn handle_of_random_messages_has_reported_effect(
        messages in prop::collection::vec(message(), 1..24),
    ) {
        check_messages(messages)?;
    }

    #[test]
    fn handle_of_random_header_and_payload_does_not_panic(
        request in prop_oneof![Just(request()), any::<u32>()],
        flags in any::<u32>(),
        size in any::<u32>(),
        payload in prop_oneof![
            prop::collection::vec(any::<u8>(), IOTLB_SIZE),
            prop::collection::vec(any::<u8>(), 0..80),
        ],
    ) {
        let (_front_end, iommu) = idle();
        let before = mappings(&iommu);
        let result = iommu.handle(&Header { request, flags, size }, &payload);
        if result.is_err() {
            prop_assert_eq!(mappings(&iommu), before);
        }
        iommu.disconnect().unwrap().unwrap().unwrap();
    }

    /// Some of the bytes start like messages.
    #[test]
    fn send_of_random_bytes_does_not_panic(
        chunks in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..100),
            (message(), any::<bool>()).prop_map(|(message, reply)| {
                let header = Header::request(request(), IOTLB_SIZE as u32, reply);
                [&header.to_bytes()[..], &message.to_bytes()].concat()
            }),
            (any::<u32>(), 0u32..100).prop_map(|(flags, size)| {
                Header { request: request(), flags: flags & 0xf | 1, size }.to_bytes().to_vec()
            }),
        ], 1..12),
    ) {
        let (front_end, iommu) = idle();
        for chunk in chunks {
            // The back end may have ended the connection.
            if front_end.send_bytes(&chunk).is_err() {
                break;
            }
        }
        let _ = front_end.hang_up();
        // The inner result depends on the bytes. The outer one is an error if the thread panicked.
        prop_assert!(iommu.wait_for_end().unwrap().is_ok());
        prop_assert!(!iommu.is_connected());
        prop_assert!(!is_mapped(&iommu.iotlb(), 0));
    }
}
