//! The device serves valid requests, however they are split or batched.

use std::collections::BTreeSet;

use e2e::run::Storage;
use microvm::memory::pages_of;
use vm_memory::{Bytes, GuestAddress};

use super::rig::*;

#[test]
fn request_split_into_any_descriptors_succeeds() {
    for mut rig in Rig::both("request_split_into_any_descriptors_succeeds") {
        let expected = rig.image().read_sectors(5, 3).unwrap();
        rig.header(IN, 5);
        // The header in three parts, the data in odd parts across a page, the status after it.
        let status = DATA + 1536;
        let sent = rig.send(&[
            (HEADER, 1, 0),
            (HEADER + 1, 0, 0),
            (HEADER + 1, 8, 0),
            (HEADER + 9, 7, 0),
            (DATA, 700, WRITE),
            (DATA + 700, 1, WRITE),
            (DATA + 701, 836, WRITE),
        ]);
        assert_eq!(sent, (UNTOUCHED, 1537));
        assert_eq!(rig.load::<u8>(status), OK);
        let mut found = vec![0; 1536];
        rig.ram.read_slice(&mut found, GuestAddress(DATA)).unwrap();
        assert_eq!(found, expected);
    }
}

#[test]
fn write_and_flush_reach_the_disk() {
    for mut rig in Rig::both("write_and_flush_reach_the_disk") {
        rig.ram.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
        rig.header(OUT, 2046);
        let sent = rig.send(&[HEAD, (DATA, 1024, 0), TAIL]);
        assert_eq!(sent, (OK, 1));
        assert_eq!(rig.image().read_sectors(2046, 2).unwrap(), [7; 1024]);
        rig.header(FLUSH, 0);
        assert_eq!(rig.send(&[HEAD, TAIL]), (OK, 1));
        let counts = &rig.device.block.counts;
        assert_eq!((counts.writes, counts.flushes, counts.total()), (1, 1, 2));
    }
}

#[test]
fn requests_of_one_notification_all_complete() {
    for mut rig in Rig::both("requests_of_one_notification_all_complete") {
        let expected = rig.image().read_sectors(0, 4).unwrap();
        let at = |n: u64| (HEADER + 32 * n, STATUS + 16 * n, DATA + 512 * n);
        for n in 0..4 {
            let (header, status, data) = at(n);
            rig.store(header, u64::from(IN));
            // The last one is past the end of the disk.
            rig.store(header + 8, if n == 3 { 2048 } else { n });
            rig.store(status, UNTOUCHED);
            let head = 3 * n as u16;
            rig.descriptor(3 * n, header, 16, NEXT, head + 1);
            rig.descriptor(3 * n + 1, data, 512, NEXT | WRITE, head + 2);
            rig.descriptor(3 * n + 2, status, 1, WRITE, 0);
            rig.store(AVAIL + 4 + 2 * n, head);
        }
        rig.store(AVAIL + 2, 4_u16);
        rig.forget();
        rig.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        let buffers = pages_of(DATA, 3 * 512).chain(pages_of(STATUS, 64));
        let dirty: BTreeSet<_> = buffers.chain(pages_of(USED + 2, 34)).collect();
        assert_eq!(rig.dirty(), dirty);
        assert_eq!(rig.load::<u16>(USED + 2), 4);
        let element = |n: u64| {
            (
                rig.load::<u32>(USED + 4 + 8 * n),
                rig.load::<u32>(USED + 8 + 8 * n),
            )
        };
        let mut elements: Vec<_> = (0..4).map(element).collect();
        elements.sort_unstable();
        assert_eq!(elements, [(0, 513), (3, 513), (6, 513), (9, 1)]);
        for n in 0..3 {
            let (_, status, data) = at(n);
            assert_eq!(rig.load::<u8>(status), OK);
            let mut found = [0; 512];
            rig.ram.read_slice(&mut found, GuestAddress(data)).unwrap();
            assert_eq!(found[..], expected[512 * n as usize..][..512]);
        }
        assert_eq!(rig.load::<u8>(at(3).1), IOERR);
        if let Storage::Uring(disk) = rig.device.block.disk() {
            let counts = disk.ring.counts;
            assert_eq!(
                (counts.submitted, counts.most, counts.bytes),
                (3, 3, 3 * 512)
            );
        }
        let counts = &rig.device.block.counts;
        assert_eq!((counts.reads, counts.refused), (3, 1));
    }
}
