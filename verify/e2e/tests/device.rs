//! The block device against invalid requests, rings and register accesses.
//!
//! The oracle does not depend on the device. It compares the guest memory that a notification
//! changes with the dirty pages, and both with the descriptors.

use std::collections::BTreeSet;
use std::sync::Arc;

use e2e::run::Storage;
use e2e::uring::{Ring, UringDisk};
use microvm::block::Block;
use microvm::bus::MmioDevice;
use microvm::disk::Image;
use microvm::memory::{harvest, pages, pages_of, GuestRam, HIGH_START, HOLE_START, PAGE};
use microvm::virtio_mmio::VirtioMmio;
use test_support::skipped;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const REGION: u64 = 0x2_0000;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
/// The elements of the used ring straddle a page boundary.
const USED: u64 = HIGH_START + 0x3ffc;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x4100;
const DATA: u64 = HIGH_START + 0x5000;
const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// A status byte that the device did not write.
const UNTOUCHED: u8 = 0xaa;

/// The address, the length and the flags of a descriptor.
type Part = (u64, u32, u16);

/// A request: name, type and descriptors, sector, and the expected status.
type Case = (&'static str, (u32, Vec<Part>), u64, u8);

/// A device with a queue that is ready.
struct Rig {
    ram: Arc<GuestRam>,
    device: VirtioMmio<GuestRam, Storage>,
    next: u16,
    before: Vec<Vec<u8>>,
}

impl Rig {
    fn new() -> Self {
        Self::with(Storage::Plain(Image::temporary(2048).unwrap()))
    }

    /// Returns a device with synchronous I/O, and one on io_uring if the kernel permits it.
    fn both(test: &str) -> Vec<Self> {
        let mut rigs = vec![Self::new()];
        match Ring::new() {
            Ok(ring) => {
                let image = Image::temporary(2048).unwrap();
                rigs.push(Self::with(Storage::Uring(UringDisk { image, ring })));
            }
            Err(e) => skipped(test, format!("io_uring: {e}")),
        }
        rigs
    }

    fn with(storage: Storage) -> Self {
        let ranges = [0, HIGH_START].map(|start| (GuestAddress(start), REGION as usize));
        let ram = Arc::new(GuestRam::from_ranges(&ranges).unwrap());
        let device = VirtioMmio::new(Arc::clone(&ram).into(), Block::new(storage)).unwrap();
        let mut rig = Self {
            device,
            ram,
            next: 0,
            before: Vec::new(),
        };
        rig.start([DESC, AVAIL, USED]);
        rig
    }

    /// Resets the device and starts it with the given rings.
    fn start(&mut self, addresses: [u64; 3]) {
        for (reg, value) in [
            (0x70, 0),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x38, 16),
        ] {
            self.write(reg, value);
        }
        for (reg, address) in [0x80, 0x90, 0xa0].into_iter().zip(addresses) {
            self.write(reg, address as u32);
            self.write(reg + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        self.write(0x70, 15);
        self.next = 0;
        self.store(AVAIL, 0_u32);
        self.forget();
    }

    fn write(&mut self, reg: u64, value: u32) {
        self.device.write(reg, &value.to_le_bytes());
    }

    fn read(&mut self, reg: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(reg, &mut data);
        u32::from_le_bytes(data)
    }

    fn store<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn load<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    fn header(&self, kind: u32, sector: u64) {
        self.store(HEADER, u64::from(kind));
        self.store(HEADER + 8, sector);
        self.store(STATUS, UNTOUCHED);
    }

    fn descriptor(&self, nth: u64, at: u64, len: u32, flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.store(DESC + 16 * nth, at);
        self.store(DESC + 16 * nth + 8, rest);
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        let read = |region: &microvm::memory::GuestRegion| {
            let mut bytes = vec![0; region.len() as usize];
            region
                .read_slice(&mut bytes, vm_memory::MemoryRegionAddress(0))
                .unwrap();
            bytes
        };
        self.ram.iter().map(read).collect()
    }

    /// Clears the dirty pages of the driver, so that only later writes count.
    fn forget(&mut self) {
        harvest(&self.ram);
        self.before = self.contents();
    }

    /// Makes the chain with head `head` available, and notifies the device.
    fn notify(&mut self, head: u16) {
        self.store(AVAIL + 4 + 2 * u64::from(self.next % SIZE), head);
        self.next = self.next.wrapping_add(1);
        self.store(AVAIL + 2, self.next);
        self.forget();
        self.write(0x50, 0);
    }

    /// Returns the dirty pages. Every page that has changed must be dirty.
    fn dirty(&mut self) -> BTreeSet<u64> {
        let dirty = pages(&harvest(&self.ram));
        for ((before, now), start) in self.before.iter().zip(self.contents()).zip([0, HIGH_START]) {
            for (nth, (before, now)) in before.chunks(4096).zip(now.chunks(4096)).enumerate() {
                let page = start + nth as u64 * PAGE;
                assert!(
                    before == now || dirty.contains(&page),
                    "{page:#x} changed without a mark"
                );
            }
        }
        dirty
    }

    /// Returns the pages of the last used element.
    fn used_pages(&self) -> impl Iterator<Item = u64> {
        let entry = u64::from(self.next.wrapping_sub(1) % SIZE);
        pages_of(USED + 4 + 8 * entry, 8).chain(pages_of(USED + 2, 2))
    }

    /// Sends the descriptors as one chain. Returns the status and the number of bytes in the used
    /// element. The dirty pages must be those of these bytes.
    fn send(&mut self, parts: &[Part]) -> (u8, u32) {
        for (nth, &(at, len, flags)) in parts.iter().enumerate() {
            let flags = flags | if nth + 1 == parts.len() { 0 } else { NEXT };
            self.descriptor(nth as u64, at, len, flags, nth as u16 + 1);
        }
        self.notify(0);
        assert_eq!(self.load::<u16>(USED + 2), self.next);
        let element = USED + 4 + 8 * u64::from((self.next - 1) % SIZE);
        let written: u32 = self.load(element + 4);
        let writable = parts.iter().filter(|part| part.2 & WRITE != 0);
        let bytes = writable.flat_map(|&(at, len, _)| {
            (0..len.min(0x2_0000)).map(move |n| at.wrapping_add(n.into()))
        });
        let bytes: Vec<u64> = bytes.collect();
        // A read writes all bytes, any other request the last one: the status.
        let first = if written > 1 {
            0
        } else {
            bytes.len().saturating_sub(written as usize)
        };
        let expected = bytes[first..].iter().flat_map(|at| pages_of(*at, 1));
        let expected: BTreeSet<_> = expected.chain(self.used_pages()).collect();
        assert_eq!(self.dirty(), expected);
        (self.load(STATUS), written)
    }

    fn image(&mut self) -> &Image {
        self.device.block.disk().image()
    }

    fn needs_reset(&mut self) -> bool {
        self.read(0x70) & 0x40 != 0
    }
}

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
        let sent = rig.send(&[(HEADER, 16, 0), (DATA, 1024, 0), (STATUS, 1, WRITE)]);
        assert_eq!(sent, (OK, 1));
        assert_eq!(rig.image().read_sectors(2046, 2).unwrap(), [7; 1024]);
        rig.header(FLUSH, 0);
        assert_eq!(rig.send(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]), (OK, 1));
        let counts = &rig.device.block.counts;
        assert_eq!((counts.writes, counts.flushes, counts.total()), (1, 1, 2));
    }
}

#[test]
fn bad_request_returns_error_and_moves_nothing() {
    let last = HIGH_START + REGION;
    let data = |at, len| vec![(HEADER, 16, 0), (at, len, WRITE), (STATUS, 1, WRITE)];
    let read = |parts| (IN, parts);
    let cases: Vec<Case> = vec![
        ("past the end", read(data(DATA, 1024)), 2047, IOERR),
        ("far past the end", read(data(DATA, 512)), u64::MAX, IOERR),
        ("not whole sectors", read(data(DATA, 511)), 0, IOERR),
        ("in the hole", read(data(HOLE_START, 512)), 0, IOERR),
        ("in the registers", read(data(0xd000_0000, 512)), 0, IOERR),
        ("over the end of RAM", read(data(last - 256, 512)), 0, IOERR),
        (
            "over the end of addresses",
            read(data(u64::MAX - 255, 512)),
            0,
            IOERR,
        ),
        ("four gigabytes", read(data(DATA, u32::MAX - 511)), 0, IOERR),
        ("unknown type", (3, data(DATA, 512)), 0, UNSUPP),
        ("largest type", (u32::MAX, data(DATA, 512)), 0, UNSUPP),
        (
            "short header",
            read(vec![(HEADER, 15, 0), (STATUS, 1, WRITE)]),
            0,
            IOERR,
        ),
        (
            "header in the hole",
            read(vec![(HOLE_START, 16, 0), (STATUS, 1, WRITE)]),
            0,
            IOERR,
        ),
        (
            "write from the hole",
            (
                OUT,
                vec![(HEADER, 16, 0), (HOLE_START, 512, 0), (STATUS, 1, WRITE)],
            ),
            0,
            IOERR,
        ),
        (
            "second part in the hole",
            (
                OUT,
                vec![
                    (HEADER, 16, 0),
                    (DATA, 512, 0),
                    (HOLE_START, 512, 0),
                    (STATUS, 1, WRITE),
                ],
            ),
            0,
            IOERR,
        ),
        ("no status", read(vec![(HEADER, 16, 0)]), 0, UNTOUCHED),
        (
            "empty status",
            read(vec![(HEADER, 16, 0), (STATUS, 0, WRITE)]),
            0,
            UNTOUCHED,
        ),
        (
            "status in the hole",
            read(vec![(HEADER, 16, 0), (HOLE_START, 1, WRITE)]),
            0,
            UNTOUCHED,
        ),
        (
            "readable after writable",
            read(vec![(STATUS, 1, WRITE), (HEADER, 16, 0)]),
            0,
            UNTOUCHED,
        ),
    ];
    for mut rig in Rig::both("bad_request_returns_error_and_moves_nothing") {
        let disk = rig.image().read_sectors(0, 2048).unwrap();
        for (name, (kind, parts), sector, status) in &cases {
            rig.header(*kind, *sector);
            rig.ram
                .write_slice(&[0x55; 1024], GuestAddress(DATA))
                .unwrap();
            let sent = rig.send(parts);
            assert_eq!(sent, (*status, u32::from(*status != UNTOUCHED)), "{name}");
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
    let read = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
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
        assert_eq!(rig.read(0x60), 2);
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
    rig.write(0x70, 0);
    assert_eq!((rig.read(0x70), rig.read(0x60)), (0, 0));
}

#[test]
fn register_out_of_order_is_ignored() {
    let mut rig = Rig::new();
    // The addresses of a queue that is ready do not change.
    rig.write(0x80, 0xdead_0000);
    rig.header(FLUSH, 0);
    assert_eq!(rig.send(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]), (OK, 1));
    assert_eq!(rig.read(0x60), 1);
    rig.write(0x64, 1);
    assert_eq!(rig.read(0x60), 0);
    // FEATURES_OK needs VERSION_1 and no feature that the device did not offer.
    for (half, features) in [(0, 1 << 9), (1, 3)] {
        for (reg, value) in [
            (0x70, 0),
            (0x70, 3),
            (0x24, half),
            (0x20, features),
            (0x70, 11),
        ] {
            rig.write(reg, value);
        }
        assert_eq!(rig.read(0x70), 3);
    }
    // A notification before DRIVER_OK.
    rig.write(0x50, 0);
    assert_eq!(rig.read(0x60), 0);
    // Accesses of another width, or without a register.
    let mut byte = [1];
    rig.device.read(0, &mut byte);
    rig.device.write(0x70, &[15]);
    rig.device.write(u64::MAX, &[0; 4]);
    let mut wide = [1; 8];
    rig.device.read(0x100, &mut wide);
    rig.device.read(0xffc, &mut [1; 8]);
    assert_eq!(
        (byte, u64::from_le_bytes(wide), rig.read(0x70)),
        ([0], 2048, 3)
    );
}

/// Sends random descriptors, rings and registers. The device does not panic or hang, and marks
/// every page that it writes.
#[test]
fn random_requests_mark_every_page_that_they_change() {
    for mut rig in Rig::both("random_requests_mark_every_page_that_they_change") {
        send_random_requests(&mut rig);
    }
}

fn send_random_requests(rig: &mut Rig) {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let places = [
        HEADER,
        STATUS,
        DATA,
        DATA + 100,
        HOLE_START,
        HIGH_START - 8,
        u64::MAX - 8,
        DESC,
        AVAIL,
        USED,
    ];
    let lengths = [0, 1, 15, 16, 17, 511, 512, 1024, 4096, u64::from(u32::MAX)];
    for round in 0..20_000 {
        let kind = [IN, OUT, FLUSH, random(1 << 32) as u32][random(4) as usize];
        rig.header(
            kind,
            [random(2048), 2047, random(u64::MAX)][random(3) as usize],
        );
        // A correct chain, of which some fields are replaced.
        let to_guest = [0, WRITE][usize::from(kind == IN)];
        let chain = [
            (HEADER, 16, NEXT),
            (DATA, 512, NEXT | to_guest),
            (STATUS, 1, WRITE),
        ];
        let mut named: BTreeSet<u64> = pages_of(USED, 6 + 8 * u64::from(SIZE)).collect();
        for (nth, (mut at, mut len, mut flags)) in chain.into_iter().enumerate() {
            let mut next = nth as u16 + 1;
            match random(12) {
                0 => at = places[random(10) as usize],
                1 => len = lengths[random(10) as usize],
                2 => flags = random(8) as u16,
                3 => next = random(20) as u16,
                _ => {}
            }
            rig.descriptor(nth as u64, at, len as u32, flags, next);
            if flags & WRITE != 0 {
                named.extend(pages_of(at, len.min(2 * REGION)));
            }
        }
        if random(50) == 0 {
            let value = [0, 1, 15, random(1 << 32) as u32][random(4) as usize];
            rig.write(random(0x110), value);
        }
        if random(100) == 0 {
            rig.next = rig.next.wrapping_add(random(40) as u16);
        }
        rig.notify([0, 0, 0, random(18) as u16][random(4) as usize]);
        let dirty = rig.dirty();
        assert!(
            dirty.is_subset(&named),
            "round {round}: {dirty:x?}, {named:x?}"
        );
        if rig.read(0x70) != 15 || round % 500 == 0 {
            rig.start([DESC, AVAIL, USED]);
        }
    }
    let counts = &rig.device.block.counts;
    let all = [
        counts.reads,
        counts.writes,
        counts.flushes,
        counts.refused,
        counts.malformed,
    ];
    assert!(all.iter().all(|count| *count > 100), "{counts:?}");
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
        rig.write(0x50, 0);
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

#[test]
fn read_past_the_end_of_a_truncated_image_returns_error() {
    for mut rig in Rig::both("read_past_the_end_of_a_truncated_image_returns_error") {
        rig.image().file.set_len(7 * 512).unwrap();
        rig.header(IN, 6);
        for (n, part) in [
            (HEADER, 16, NEXT),
            (DATA, 1024, NEXT | WRITE),
            (STATUS, 1, WRITE),
        ]
        .into_iter()
        .enumerate()
        {
            rig.descriptor(n as u64, part.0, part.1, part.2, n as u16 + 1);
        }
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
