//! The device refuses invalid requests, rings and register accesses.

use std::collections::BTreeSet;

use microvm::bus::MmioDevice;
use microvm::memory::{pages_of, HIGH_START, HOLE_START, PAGE};
use vm_memory::{Bytes, GuestAddress};

use super::rig::*;

/// A request that the device refuses.
struct Case {
    name: &'static str,
    kind: u32,
    parts: Vec<Part>,
    sector: u64,
    status: u8,
}

/// Requests whose buffer, or whose sector, does not exist.
fn bad_ranges() -> impl Iterator<Item = Case> {
    let last = HIGH_START + REGION;
    let cases = [
        ("past the end of the disk", DATA, 1024, 2047),
        ("far past the end of the disk", DATA, 512, u64::MAX),
        ("not whole sectors", DATA, 511, 0),
        ("in the hole", HOLE_START, 512, 0),
        ("in the registers", 0xd000_0000, 512, 0),
        ("over the end of RAM", last - 256, 512, 0),
        ("over the end of addresses", u64::MAX - 255, 512, 0),
        ("four gigabytes", DATA, u32::MAX - 511, 0),
    ];
    cases.into_iter().map(|(name, at, len, sector)| Case {
        name,
        kind: IN,
        parts: vec![HEAD, (at, len, WRITE), TAIL],
        sector,
        status: IOERR,
    })
}

fn bad_types() -> impl Iterator<Item = Case> {
    let cases = [("unknown type", 3), ("largest type", u32::MAX)];
    cases.into_iter().map(|(name, kind)| Case {
        name,
        kind,
        parts: vec![HEAD, (DATA, 512, WRITE), TAIL],
        sector: 0,
        status: UNSUPP,
    })
}

/// Chains whose header, data or status is missing or out of place.
fn bad_chains() -> impl Iterator<Item = Case> {
    let short_header = (HEADER, 15, 0);
    let header_in_hole = (HOLE_START, 16, 0);
    let source = (DATA, 512, 0);
    let source_in_hole = (HOLE_START, 512, 0);
    let empty_tail = (STATUS, 0, WRITE);
    let tail_in_hole = (HOLE_START, 1, WRITE);
    let cases = [
        ("short header", IN, vec![short_header, TAIL], IOERR),
        ("header in the hole", IN, vec![header_in_hole, TAIL], IOERR),
        (
            "source in the hole",
            OUT,
            vec![HEAD, source_in_hole, TAIL],
            IOERR,
        ),
        (
            "second part in the hole",
            OUT,
            vec![HEAD, source, source_in_hole, TAIL],
            IOERR,
        ),
        ("no status", IN, vec![HEAD], UNTOUCHED),
        ("empty status", IN, vec![HEAD, empty_tail], UNTOUCHED),
        (
            "status in the hole",
            IN,
            vec![HEAD, tail_in_hole],
            UNTOUCHED,
        ),
        ("readable after writable", IN, vec![TAIL, HEAD], UNTOUCHED),
    ];
    cases.into_iter().map(|(name, kind, parts, status)| Case {
        name,
        kind,
        parts,
        sector: 0,
        status,
    })
}

#[test]
fn bad_request_returns_error_and_moves_nothing() {
    for mut rig in Rig::both("bad_request_returns_error_and_moves_nothing") {
        let disk = rig.image().read_sectors(0, 2048).unwrap();
        for case in bad_ranges().chain(bad_types()).chain(bad_chains()) {
            let name = case.name;
            rig.header(case.kind, case.sector);
            rig.ram
                .write_slice(&[0x55; 1024], GuestAddress(DATA))
                .unwrap();
            let sent = rig.send(&case.parts);
            assert_eq!(
                sent,
                (case.status, u32::from(case.status != UNTOUCHED)),
                "{name}"
            );
            let mut data = [0; 1024];
            rig.ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
            assert_eq!(data, [0x55; 1024], "{name}");
            assert!(!rig.needs_reset(), "{name}");
        }
        assert_eq!(rig.image().read_sectors(0, 2048).unwrap(), disk);
        let counts = &rig.device.block.counts;
        assert_eq!((counts.bytes_read, counts.bytes_written), (0, 0));
    }
}

#[test]
fn chain_that_loops_or_leaves_the_table_is_malformed() {
    let mut rig = Rig::new();
    rig.header(IN, 0);
    for (next, flags) in [
        (0, NEXT),
        (SIZE, NEXT),
        (u16::MAX, NEXT | WRITE),
        (0, INDIRECT),
    ] {
        rig.descriptor(0, HEADER, 16, flags, next);
        rig.notify(0);
        let expected: BTreeSet<_> = rig.used_pages().collect();
        assert_eq!(rig.dirty(), expected);
    }
    assert_eq!(rig.device.block.counts.malformed, 4);
    assert_eq!(rig.load::<u16>(USED + 2), 4);
    assert!(!rig.needs_reset());
}

#[test]
fn broken_queue_needs_reset_and_works_after_it() {
    let read = [HEAD, (DATA, 512, WRITE), TAIL];
    let bad_addresses = [
        [HOLE_START, AVAIL, USED],
        [DESC, HOLE_START, USED],
        [DESC, AVAIL, HOLE_START],
        [!15, AVAIL, USED],
        [DESC, !1, USED],
        [DESC, AVAIL, !3],
        [DESC, AVAIL, HIGH_START + REGION - 16],
    ];
    for addresses in bad_addresses {
        let mut rig = Rig::new();
        rig.start(addresses);
        rig.notify(0);
        assert!(rig.needs_reset(), "{addresses:x?}");
        assert_eq!(rig.interrupt_status(), 2);
        assert!(rig.dirty().is_empty());
        rig.start([DESC, AVAIL, USED]);
        rig.header(IN, 0);
        assert_eq!(rig.send(&read), (OK, 513), "{addresses:x?}");
    }
    // An index that is ahead by more than the size of the queue, and a head outside the table.
    let mut rig = Rig::new();
    rig.next = SIZE;
    rig.notify(0);
    assert!(rig.needs_reset());
    let mut rig = Rig::new();
    rig.notify(SIZE);
    assert!(rig.needs_reset());
    rig.write(reg::VIRTIO_MMIO_STATUS, RESET);
    assert_eq!((rig.status(), rig.interrupt_status()), (RESET, 0));
}

#[test]
fn register_out_of_order_is_ignored() {
    let mut rig = Rig::new();
    // The addresses of a queue that is ready do not change.
    rig.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0xdead_0000);
    rig.header(FLUSH, 0);
    assert_eq!(rig.send(&[HEAD, TAIL]), (OK, 1));
    assert_eq!(rig.interrupt_status(), 1);
    rig.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(rig.interrupt_status(), 0);
    // A notification before DRIVER_OK.
    rig.negotiate(1, VERSION_1);
    rig.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(rig.interrupt_status(), 0);
}

#[test]
fn features_without_version_1_or_not_offered_are_refused() {
    let mut rig = Rig::new();
    for (half, features) in [(0, 1 << 9), (1, VERSION_1 | 2)] {
        rig.negotiate(half, features);
        assert_eq!(rig.status(), DRIVER);
    }
}

#[test]
fn register_access_of_other_width_or_without_register_is_ignored() {
    let mut rig = Rig::new();
    let mut byte = [1];
    rig.device.read(0, &mut byte);
    assert_eq!(byte, [0]);
    rig.device.write(reg::VIRTIO_MMIO_STATUS.into(), &[0]);
    rig.device.write(u64::MAX, &[0; 4]);
    assert_eq!(rig.status(), DRIVER_OK);
    let mut capacity = [1; 8];
    rig.device
        .read(reg::VIRTIO_MMIO_CONFIG.into(), &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
    rig.device.read(0xffc, &mut [1; 8]);
}

#[test]
fn read_past_the_end_of_a_truncated_image_returns_error() {
    for mut rig in Rig::both("read_past_the_end_of_a_truncated_image_returns_error") {
        rig.image().file.set_len(7 * 512).unwrap();
        rig.header(IN, 6);
        rig.chain(&[HEAD, (DATA, 1024, WRITE), TAIL]);
        rig.notify(0);
        assert_eq!(rig.load::<u8>(STATUS), IOERR);
        // The device may have read the first sector. Then the page is marked.
        let named = pages_of(DATA, 1024)
            .chain([STATUS & !(PAGE - 1)])
            .chain(rig.used_pages());
        let named: BTreeSet<_> = named.collect();
        assert!(rig.dirty().is_subset(&named));
        assert_eq!(rig.device.block.counts.refused, 1);
    }
}
