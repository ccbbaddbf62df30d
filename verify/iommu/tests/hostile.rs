//! An invalid message is refused or ends the connection, and has no other effect.

mod common;

use std::time::Duration;

use common::{end, payload, setup, table, user, Setup, HIGH, LOW, PAGE, REGION, USER};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use verify_iommu::{BackEnd, FrontEnd};
use vm_memory::iommu::{Iotlb, Mapping, SharedIotlb};
use vm_memory::{Bytes, GuestAddress, Permissions};
use vm_memory_vhost::{Header, IotlbMessage, VHOST_USER_IOTLB_MSG};

const SHORT: Duration = Duration::from_millis(20);
const IOVA: u64 = 0x8000;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// The length of an IOTLB message in headers.
const SIZE: u32 = IotlbMessage::SIZE as u32;

/// An IOTLB message with any values.
#[derive(Clone, Copy, Debug)]
struct Raw {
    iova: u64,
    size: u64,
    uaddr: u64,
    perm: u8,
    kind: u8,
}

impl Raw {
    fn encode(&self) -> Vec<u8> {
        payload(self.iova, self.size, self.uaddr, self.perm, self.kind)
    }
}

fn update(iova: u64, size: u64, uaddr: u64) -> Raw {
    Raw {
        iova,
        size,
        uaddr,
        perm: 3,
        kind: UPDATE,
    }
}

fn header() -> Header {
    Header::request(VHOST_USER_IOTLB_MSG, SIZE)
}

/// The bytes of a header with any flags and size.
fn header_with(flags: u32, size: u32) -> Vec<u8> {
    [VHOST_USER_IOTLB_MSG, flags, size]
        .map(u32::to_ne_bytes)
        .concat()
}

/// Returns all mappings, for comparison.
fn mappings(iotlb: &SharedIotlb) -> Vec<Mapping> {
    iotlb.mappings(..).collect()
}

#[test]
fn send_of_invalid_message_is_refused_without_effect() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(SHORT);
    assert!(front_end
        .update(IOVA, PAGE, user(LOW), Permissions::ReadWrite)
        .unwrap());
    let before = mappings(memory.iommu().iotlb());

    let good = update(IOVA, PAGE, user(PAGE));
    let top = 0u64.wrapping_sub(PAGE);
    let last_user = USER + 2 * REGION;
    let messages = [
        ("update of an empty range", Raw { size: 0, ..good }),
        (
            "invalidation of an empty range",
            Raw {
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
        ("permissions 4", Raw { perm: 4, ..good }),
        ("permissions 0xff", Raw { perm: 0xff, ..good }),
        ("type 0", Raw { kind: 0, ..good }),
        ("miss", Raw { kind: 1, ..good }),
        ("access failure", Raw { kind: 4, ..good }),
        ("begin of a batch", Raw { kind: 5, ..good }),
        ("end of a batch", Raw { kind: 6, ..good }),
        ("type 7", Raw { kind: 7, ..good }),
        ("type 0xff", Raw { kind: 0xff, ..good }),
    ];
    for (what, message) in messages {
        assert!(!front_end.send(&message.encode()).unwrap(), "{what}");
        assert_eq!(mappings(memory.iommu().iotlb()), before, "{what}");
    }

    let bytes = good.encode();
    for size in [0, 1, 26, IotlbMessage::SIZE - 1] {
        assert!(!front_end.send(&bytes[..size]).unwrap(), "{size} bytes");
    }
    for size in [IotlbMessage::SIZE + 1, 2 * IotlbMessage::SIZE, 0x1000] {
        let mut long = bytes.clone();
        long.resize(size, 0);
        assert!(!front_end.send(&long).unwrap(), "{size} bytes");
    }
    for other in [0, 1, 21, 23, u32::MAX] {
        let header = Header::request(other, SIZE);
        assert!(
            !front_end.send_with(&header, &bytes).unwrap(),
            "request {other}"
        );
    }
    assert_eq!(mappings(memory.iommu().iotlb()), before);

    assert!(front_end.send(&good.encode()).unwrap());
    memory.write_obj(1u8, GuestAddress(IOVA)).unwrap();
    end(&back_end);
}

#[test]
fn send_without_need_reply_has_no_reply() {
    let Setup {
        memory,
        front_end,
        back_end,
        ..
    } = setup(SHORT);
    for message in [update(IOVA, PAGE, user(HIGH)), update(IOVA, PAGE, 0)] {
        let bytes = [&header().encode()[..], &message.encode()].concat();
        front_end.send_bytes(&bytes).unwrap();
    }
    // This would receive the reply to an earlier message, and the last of those is a refusal.
    assert!(front_end.invalidate(IOVA + PAGE, PAGE).unwrap());
    memory.write_obj(1u8, GuestAddress(IOVA)).unwrap();
    end(&back_end);
}

#[test]
fn send_of_unreadable_stream_ends_connection() {
    let good = [
        &header().with_need_reply().encode()[..],
        &update(IOVA, PAGE, user(PAGE)).encode(),
    ]
    .concat();
    let with_header = |flags, size| [&header_with(flags, size)[..], &good[12..]].concat();
    let cases = [
        ("version 0", with_header(0b1000, SIZE)),
        ("version 2", with_header(0b1010, SIZE)),
        ("reply", with_header(0b0101, SIZE)),
        ("reserved flags", with_header(0x8000_0009, SIZE)),
        ("payload above the maximum", with_header(0b1001, 0x1001)),
        ("payload of 4 GiB", with_header(0b1001, u32::MAX)),
        ("one byte", good[..1].to_vec()),
        ("half a header", good[..11].to_vec()),
        ("no payload", good[..12].to_vec()),
        ("half a payload", good[..43].to_vec()),
    ];
    for (what, bytes) in cases {
        let Setup {
            memory,
            front_end,
            back_end,
            ..
        } = setup(SHORT);
        assert!(front_end
            .update(IOVA, PAGE, user(LOW), Permissions::ReadWrite)
            .unwrap());
        front_end.send_bytes(&bytes).unwrap();
        if bytes.len() < good.len() {
            front_end.hang_up().unwrap();
        }
        let ended = back_end.wait_for_end().unwrap().unwrap();
        assert!(ended.is_err(), "{what}");
        assert!(memory.iommu().is_closed(), "{what}");
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

fn message() -> impl Strategy<Value = Raw> {
    let perm = prop_oneof![8 => 0u8..4, 1 => any::<u8>()];
    let kind = prop_oneof![6 => Just(UPDATE), 3 => Just(INVALIDATE), 1 => any::<u8>()];
    let uaddr = prop_oneof![3 => USER..USER + 2 * REGION, 1 => number()];
    (number(), number(), uaddr, perm, kind).prop_map(|(iova, size, uaddr, perm, kind)| Raw {
        iova,
        size,
        uaddr,
        perm,
        kind,
    })
}

fn idle() -> (FrontEnd, BackEnd) {
    let (front_end, main, requests) = FrontEnd::pair().unwrap();
    let back_end = BackEnd::start(main, requests, table(), SHORT).unwrap();
    (front_end, back_end)
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

fn check_messages(messages: Vec<Raw>) -> Result<(), TestCaseError> {
    let (_front_end, back_end) = idle();
    let iotlb = back_end.iommu().iotlb();
    for message in messages {
        let before = mappings(iotlb);
        let result = back_end.handle(VHOST_USER_IOTLB_MSG, &message.encode());
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
                let found: Vec<_> = iotlb
                    .lookup(GuestAddress(message.iova), message.size as usize, access)
                    .unwrap()
                    .map(|range| (range.base, range.length))
                    .collect();
                prop_assert_eq!(found, ranges);
            }
            (INVALIDATE, last, _) if message.size != 0 => {
                prop_assert!(result.is_ok(), "{result:?}");
                let last = last.unwrap_or(u64::MAX);
                for addr in [message.iova, message.iova + (last - message.iova) / 2, last] {
                    prop_assert!(!is_mapped(&iotlb.snapshot(), addr));
                }
                let range = GuestAddress(message.iova)..=GuestAddress(last);
                prop_assert_eq!(iotlb.mappings(range).next(), None);
            }
            _ => {
                prop_assert!(result.is_err());
                prop_assert_eq!(mappings(iotlb), before);
            }
        }
    }
    end(&back_end);
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
    fn handle_of_random_request_and_payload_does_not_panic(
        request in prop_oneof![Just(VHOST_USER_IOTLB_MSG), any::<u32>()],
        payload in prop_oneof![
            prop::collection::vec(any::<u8>(), IotlbMessage::SIZE),
            prop::collection::vec(any::<u8>(), 0..80),
        ],
    ) {
        let (_front_end, back_end) = idle();
        let iotlb = back_end.iommu().iotlb();
        let before = mappings(iotlb);
        let result = back_end.handle(request, &payload);
        if result.is_err() {
            prop_assert_eq!(mappings(iotlb), before);
        }
        end(&back_end);
    }

    /// Some of the bytes start like messages.
    #[test]
    fn send_of_random_bytes_does_not_panic(
        chunks in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..100),
            (message(), any::<bool>()).prop_map(|(message, reply)| {
                let header = if reply { header().with_need_reply() } else { header() };
                [&header.encode()[..], &message.encode()].concat()
            }),
            (any::<u32>(), 0u32..100).prop_map(|(flags, size)| {
                header_with(flags & 0xf | 1, size)
            }),
        ], 1..12),
    ) {
        let (front_end, back_end) = idle();
        for chunk in chunks {
            // The back end may have ended the connection.
            if front_end.send_bytes(&chunk).is_err() {
                break;
            }
        }
        let _ = front_end.hang_up();
        // The inner result depends on the bytes. The outer one is an error if the thread panicked.
        prop_assert!(back_end.wait_for_end().unwrap().is_ok());
        prop_assert!(back_end.iommu().is_closed());
        prop_assert!(!is_mapped(&back_end.iommu().iotlb().snapshot(), 0));
    }
}
