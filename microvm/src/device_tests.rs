//! The device against drivers that do everything wrong.

use vm_memory::{Bytes, GuestAddress};

use std::io::Write;
use std::sync::Arc;

use super::*;
use crate::disk::Disk;
use crate::memory::{harvest, map, Backing, GuestRam, HIGH_START, HOLE_START, MIN_MEM};
use crate::pages::PageMap;
use crate::uring::Ring;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
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
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// A status byte that no device wrote.
const UNTOUCHED: u8 = 0xaa;

/// Address, length and flags of a descriptor.
type Part = (u64, u32, u16);

/// A request, by its name: type, sector, parts, and the status it must get.
type Case = (&'static str, u32, u64, Vec<Part>, u8);

/// A device with a queue that is ready.
struct Rig {
    ram: Arc<GuestRam>,
    device: VirtioMmio<GuestRam>,
    next: u16,
}

impl Rig {
    fn new() -> Self {
        Self::with(None)
    }

    /// The device without a ring, and with one where the kernel has it; if not, says so aloud.
    fn both(test: &str) -> Vec<Self> {
        let ring = Ring::open().unwrap();
        if let Err(why) = &ring {
            let _ = writeln!(std::io::stderr(), "SKIPPED: {test} by io_uring: {why}");
        }
        let ring = ring.ok().map(|ring| Self::with(Some(ring)));
        [Self::new()].into_iter().chain(ring).collect()
    }

    fn with(ring: Option<Ring>) -> Self {
        let ram = Arc::new(map(MIN_MEM, Backing::Anonymous).unwrap());
        let block = Block::new(Disk::temporary().unwrap(), PageMap::new(&ram)).with_ring(ring);
        let mut rig = Self {
            device: VirtioMmio::new(Arc::clone(&ram).into(), block).unwrap(),
            ram,
            next: 0,
        };
        rig.start([DESC, AVAIL, USED]);
        rig
    }

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
        self.ram.write_obj(0_u32, GuestAddress(AVAIL)).unwrap();
        harvest(&self.ram);
    }

    fn write(&mut self, reg: u64, value: u32) {
        self.device.write(reg, &value.to_le_bytes());
    }

    fn read(&self, reg: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(reg, &mut data);
        u32::from_le_bytes(data)
    }

    fn header(&self, kind: u32, sector: u64) {
        self.ram
            .write_obj(u64::from(kind), GuestAddress(HEADER))
            .unwrap();
        self.ram
            .write_obj(sector, GuestAddress(HEADER + 8))
            .unwrap();
        self.ram.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
    }

    fn descriptor(&self, nth: u64, at: u64, len: u32, flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.ram
            .write_obj(at, GuestAddress(DESC + 16 * nth))
            .unwrap();
        self.ram
            .write_obj(rest, GuestAddress(DESC + 16 * nth + 8))
            .unwrap();
    }

    /// Makes the chain with head `head` available, and notifies. What the driver wrote until here
    /// is no longer in the bitmap.
    fn kick(&mut self, head: u16) {
        let ring = GuestAddress(AVAIL + 4 + 2 * u64::from(self.next % SIZE));
        self.ram.write_obj(head, ring).unwrap();
        self.next = self.next.wrapping_add(1);
        self.ram
            .write_obj(self.next, GuestAddress(AVAIL + 2))
            .unwrap();
        harvest(&self.ram);
        self.write(0x50, 0);
    }

    /// Sends the parts as one chain; the status byte, and how much the device says it wrote.
    fn send(&mut self, parts: &[Part]) -> (u8, u32) {
        for (nth, &(at, len, flags)) in parts.iter().enumerate() {
            let last = nth + 1 == parts.len();
            let flags = flags | if last { 0 } else { NEXT };
            self.descriptor(nth as u64, at, len, flags, nth as u16 + 1);
        }
        self.kick(0);
        self.check_dirty();
        assert_eq!(
            self.ram.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(),
            self.next
        );
        let element = USED + 4 + 8 * u64::from((self.next - 1) % SIZE);
        let len = self.ram.read_obj(GuestAddress(element + 4)).unwrap();
        (self.ram.read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    /// The bitmap has what the device says that it wrote.
    fn check_dirty(&mut self) {
        let (got, block) = (harvest(&self.ram), &mut self.device.block);
        assert_eq!(block.dirtied.minus(&got).first(), None, "missing");
        assert_eq!(
            got.minus(&block.dirtied.union(&block.maybe_dirtied))
                .first(),
            None,
            "extra"
        );
        block.dirtied = PageMap::new(&self.ram);
        block.maybe_dirtied = PageMap::new(&self.ram);
    }

    fn needs_reset(&self) -> bool {
        self.read(0x70) & 0x40 != 0
    }
}

#[test]
fn a_request_may_be_cut_anywhere() {
    for mut rig in Rig::both("a_request_may_be_cut_anywhere") {
        let want = rig.device.block.disk().read_sectors(5, 3).unwrap();
        rig.header(IN, 5);
        // The header in three pieces, the data across a page and in odd pieces, the status behind it.
        let status = DATA + 1536;
        let (result, len) = rig.send(&[
            (HEADER, 1, 0),
            (HEADER + 1, 0, 0),
            (HEADER + 1, 8, 0),
            (HEADER + 9, 7, 0),
            (DATA, 700, WRITE),
            (DATA + 700, 1, WRITE),
            (DATA + 701, 836, WRITE),
        ]);
        assert_eq!((result, len), (UNTOUCHED, 1537));
        assert_eq!(rig.ram.read_obj::<u8>(GuestAddress(status)).unwrap(), OK);
        let mut got = vec![0; 1536];
        rig.ram.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        assert_eq!(got, want);
    }
}

#[test]
fn writes_reads_flushes_and_tells_its_name() {
    for mut rig in Rig::both("writes_reads_flushes_and_tells_its_name") {
        rig.ram.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
        rig.header(OUT, 2046);
        assert_eq!(
            rig.send(&[(HEADER, 16, 0), (DATA, 1024, 0), (STATUS, 1, WRITE)]),
            (OK, 1)
        );
        assert_eq!(
            rig.device.block.disk().read_sectors(2046, 2).unwrap(),
            [7; 1024]
        );
        rig.header(4, 0);
        assert_eq!(rig.send(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]), (OK, 1));
        rig.header(8, 0);
        assert_eq!(
            rig.send(&[(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS, 1, WRITE)]),
            (OK, 21)
        );
        let mut id = [0; 20];
        rig.ram.read_slice(&mut id, GuestAddress(DATA)).unwrap();
        assert!(id.starts_with(b"microvm disk\0"));
        assert_eq!(rig.device.block.counts.total(), 3);
    }
}

#[test]
fn a_bad_request_is_refused_and_moves_nothing() {
    let last = HIGH_START + MIN_MEM / 2;
    let data = |at, len| vec![(HEADER, 16, 0), (at, len, WRITE), (STATUS, 1, WRITE)];
    let cases: Vec<Case> = vec![
        ("past the end", IN, 2047, data(DATA, 1024), IOERR),
        ("far past the end", IN, u64::MAX, data(DATA, 512), IOERR),
        ("not whole sectors", IN, 0, data(DATA, 511), IOERR),
        ("in the hole", IN, 0, data(HOLE_START, 512), IOERR),
        ("in the registers", IN, 0, data(0xd000_0000, 512), IOERR),
        ("over the end of RAM", IN, 0, data(last - 256, 512), IOERR),
        (
            "over the end of addresses",
            IN,
            0,
            data(u64::MAX - 255, 512),
            IOERR,
        ),
        ("four gigabytes", IN, 0, data(DATA, u32::MAX - 511), IOERR),
        ("no such type", 3, 0, data(DATA, 512), UNSUPP),
        ("no such type either", u32::MAX, 0, data(DATA, 512), UNSUPP),
        ("id to nowhere", 8, 0, data(HOLE_START, 20), IOERR),
        (
            "header cut short",
            IN,
            0,
            vec![(HEADER, 15, 0), (STATUS, 1, WRITE)],
            IOERR,
        ),
        (
            "header in the hole",
            IN,
            0,
            vec![(HOLE_START, 16, 0), (STATUS, 1, WRITE)],
            IOERR,
        ),
        (
            "write from the hole",
            OUT,
            0,
            vec![(HEADER, 16, 0), (HOLE_START, 512, 0), (STATUS, 1, WRITE)],
            IOERR,
        ),
        (
            "second part in the hole",
            OUT,
            0,
            vec![
                (HEADER, 16, 0),
                (DATA, 512, 0),
                (HOLE_START, 512, 0),
                (STATUS, 1, WRITE),
            ],
            IOERR,
        ),
        ("no status", IN, 0, vec![(HEADER, 16, 0)], UNTOUCHED),
        (
            "empty status",
            IN,
            0,
            vec![(HEADER, 16, 0), (STATUS, 0, WRITE)],
            UNTOUCHED,
        ),
        (
            "status in the hole",
            IN,
            0,
            vec![(HEADER, 16, 0), (HOLE_START, 1, WRITE)],
            UNTOUCHED,
        ),
        (
            "readable behind writable",
            IN,
            0,
            vec![(STATUS, 1, WRITE), (HEADER, 16, 0)],
            UNTOUCHED,
        ),
    ];
    for mut rig in Rig::both("a_bad_request_is_refused_and_moves_nothing") {
        refuses_all(&mut rig, &cases);
    }
}

fn refuses_all(rig: &mut Rig, cases: &[Case]) {
    let before = rig.device.block.disk().read_sectors(0, 2048).unwrap();
    for &(what, kind, sector, ref parts, want) in cases {
        rig.header(kind, sector);
        rig.ram
            .write_slice(&[0x55; 1024], GuestAddress(DATA))
            .unwrap();
        let (status, len) = rig.send(parts);
        assert_eq!(
            (status, len),
            (want, u32::from(want != UNTOUCHED)),
            "{what}"
        );
        let mut data = [0; 1024];
        rig.ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert_eq!(data, [0x55; 1024], "{what}");
        assert!(!rig.needs_reset(), "{what}");
    }
    assert_eq!(
        rig.device.block.disk().read_sectors(0, 2048).unwrap(),
        before
    );
    assert_eq!(
        (
            rig.device.block.counts.bytes_read,
            rig.device.block.counts.bytes_written
        ),
        (0, 0)
    );
}

#[test]
fn chains_that_loop_or_leave_the_table_end() {
    let mut rig = Rig::new();
    rig.header(IN, 0);
    for (next, flags) in [
        (0, NEXT),
        (SIZE, NEXT),
        (u16::MAX, NEXT | WRITE),
        (0, INDIRECT),
    ] {
        rig.descriptor(0, HEADER, 16, flags, next);
        rig.kick(0);
        rig.check_dirty();
    }
    assert_eq!(rig.device.block.counts.malformed, 4);
    assert_eq!(rig.ram.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 4);
    assert!(!rig.needs_reset());
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_works_after_it() {
    let read = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    let bad_addresses = [
        [HOLE_START, AVAIL, USED],
        [DESC, HOLE_START, USED],
        [DESC, AVAIL, HOLE_START],
        [!15, AVAIL, USED],
        [DESC, !1, USED],
        [DESC, AVAIL, !3],
        [DESC, AVAIL, HIGH_START + MIN_MEM / 2 - 16],
    ];
    for addresses in bad_addresses {
        let mut rig = Rig::new();
        rig.start(addresses);
        rig.kick(0);
        assert!(rig.needs_reset(), "{addresses:x?}");
        assert_eq!(rig.read(0x60), 2);
        assert_eq!(harvest(&rig.ram).count(), 0);
        // Broken: it ignores what comes, until it is reset.
        rig.start([DESC, AVAIL, USED]);
        rig.header(IN, 0);
        assert_eq!(rig.send(&read), (OK, 513), "{addresses:x?}");
    }
    // An index that is ahead by more than the queue holds, and a head outside of the table.
    let mut rig = Rig::new();
    rig.next = SIZE;
    rig.kick(0);
    assert!(rig.needs_reset());
    let mut rig = Rig::new();
    rig.kick(SIZE);
    assert!(rig.needs_reset());
    rig.write(0x70, 0);
    assert_eq!((rig.read(0x70), rig.read(0x60)), (0, 0));
}

#[test]
fn registers_keep_their_order() {
    let mut rig = Rig::new();
    // While the queue is ready, its place is settled.
    rig.write(0x80, 0xdead_0000);
    rig.header(4, 0);
    assert_eq!(rig.send(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]), (OK, 1));
    assert_eq!(rig.read(0x60), 1);
    rig.write(0x64, 1);
    assert_eq!(rig.read(0x60), 0);
    // Without VERSION_1, or with a feature that was not offered, FEATURES_OK does not stick.
    for (half, features) in [(0, 1 << 9), (1, 3)] {
        rig.write(0x70, 0);
        rig.write(0x70, 3);
        rig.write(0x24, half);
        rig.write(0x20, features);
        rig.write(0x70, 11);
        assert_eq!(rig.read(0x70), 3);
    }
    // A notification before DRIVER_OK is ignored.
    rig.write(0x50, 0);
    assert_eq!(rig.read(0x60), 0);
    // Reads and writes of another width, or where nothing is.
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

/// Random descriptors, rings and registers: no panic, no hang, and no page written in secret.
#[test]
fn nothing_that_a_guest_writes_upsets_the_device() {
    for mut rig in Rig::both("nothing_that_a_guest_writes_upsets_the_device") {
        nothing_upsets(&mut rig);
    }
}

fn nothing_upsets(rig: &mut Rig) {
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
        let kind = [0, 1, 4, 8, random(1 << 32) as u32][random(5) as usize];
        rig.header(
            kind,
            [random(2048), 2047, random(u64::MAX)][random(3) as usize],
        );
        // A sound chain, of which some fields are replaced.
        let to_guest = [0, WRITE][usize::from(kind == 0)];
        let chain = [
            (HEADER, 16, NEXT),
            (DATA, 512, NEXT | to_guest),
            (STATUS, 1, WRITE),
        ];
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
        }
        if random(50) == 0 {
            rig.write(
                random(0x110),
                [0, 1, 15, random(1 << 32) as u32][random(4) as usize],
            );
        }
        if random(100) == 0 {
            rig.next = rig.next.wrapping_add(random(40) as u16);
        }
        rig.kick([0, 0, 0, random(18) as u16][random(4) as usize]);
        rig.check_dirty();
        if rig.read(0x70) != 15 || round % 500 == 0 {
            rig.start([DESC, AVAIL, USED]);
            rig.check_dirty();
        }
    }
    let counts = &rig.device.block.counts;
    let all = [
        counts.reads,
        counts.writes,
        counts.flushes,
        counts.ids,
        counts.refused,
        counts.malformed,
    ];
    assert!(all.iter().all(|count| *count > 100), "{counts:?}");
}

/// Several requests in one notification: each is answered, in whatever order they end.
#[test]
fn requests_of_one_notification_are_all_answered() {
    for mut rig in Rig::both("requests_of_one_notification_are_all_answered") {
        let by_ring = rig.device.block.ring().is_some();
        let want = rig.device.block.disk().read_sectors(0, 4).unwrap();
        let at = |n: u64| (HEADER + 32 * n, STATUS + 16 * n, DATA + 512 * n);
        for n in 0..4 {
            let (header, status, data) = at(n);
            rig.ram
                .write_obj(u64::from(IN), GuestAddress(header))
                .unwrap();
            // The last one passes the end of the disk.
            let sector = if n == 3 { 2048 } else { n };
            rig.ram.write_obj(sector, GuestAddress(header + 8)).unwrap();
            rig.ram.write_obj(UNTOUCHED, GuestAddress(status)).unwrap();
            let head = 3 * n as u16;
            rig.descriptor(3 * n, header, 16, NEXT, head + 1);
            rig.descriptor(3 * n + 1, data, 512, NEXT | WRITE, head + 2);
            rig.descriptor(3 * n + 2, status, 1, WRITE, 0);
            let ring = GuestAddress(AVAIL + 4 + 2 * n);
            rig.ram.write_obj(head, ring).unwrap();
        }
        rig.ram.write_obj(4_u16, GuestAddress(AVAIL + 2)).unwrap();
        harvest(&rig.ram);
        rig.write(0x50, 0);
        rig.check_dirty();
        assert_eq!(rig.ram.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 4);
        let mut heads: Vec<(u32, u32)> = (0..4)
            .map(|n| {
                let element = USED + 4 + 8 * n;
                let word = |at| rig.ram.read_obj(GuestAddress(at)).unwrap();
                (word(element), word(element + 4))
            })
            .collect();
        heads.sort_unstable();
        assert_eq!(heads, [(0, 513), (3, 513), (6, 513), (9, 1)]);
        for n in 0..3 {
            let (_, status, data) = at(n);
            assert_eq!(rig.ram.read_obj::<u8>(GuestAddress(status)).unwrap(), OK);
            let mut got = [0; 512];
            rig.ram.read_slice(&mut got, GuestAddress(data)).unwrap();
            assert_eq!(got[..], want[512 * n as usize..][..512]);
        }
        assert_eq!(
            rig.ram.read_obj::<u8>(GuestAddress(at(3).1)).unwrap(),
            IOERR
        );
        if by_ring {
            let counts = rig.device.block.ring().unwrap().counts;
            assert_eq!(
                (counts.operations, counts.most, counts.bytes),
                (3, 3, 3 * 512)
            );
        }
        assert_eq!(
            (
                rig.device.block.counts.reads,
                rig.device.block.counts.refused
            ),
            (3, 1)
        );
    }
}

/// Writes go to the overlay, and a read after them takes sectors from both files: an operation for each run.
#[test]
fn a_ring_reads_from_the_image_and_its_overlay() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..16).flat_map(|n| [n; 512]).collect();
    std::fs::write(file.path(), &bytes).unwrap();
    for mut rig in Rig::both("a_ring_reads_from_the_image_and_its_overlay") {
        *rig.device.block.disk() = Disk::open(file.path(), false).unwrap();
        rig.ram
            .write_slice(&[0xee; 1024], GuestAddress(DATA))
            .unwrap();
        rig.header(OUT, 4);
        assert_eq!(
            rig.send(&[(HEADER, 16, 0), (DATA, 1024, 0), (STATUS, 1, WRITE)]),
            (OK, 1)
        );
        rig.header(IN, 2);
        let parts = [(HEADER, 16, 0), (DATA, 512 * 6, WRITE), (STATUS, 1, WRITE)];
        assert_eq!(rig.send(&parts), (OK, 512 * 6 + 1));
        let mut want = bytes.clone();
        want[4 * 512..6 * 512].fill(0xee);
        let mut got = [0; 512 * 6];
        rig.ram.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        assert_eq!(got[..], want[2 * 512..8 * 512]);
        if let Some(ring) = rig.device.block.ring() {
            assert_eq!((ring.counts.operations, ring.counts.most), (1 + 3, 3));
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), bytes);

        // The image ends before the disk does: an error, and nothing in secret.
        file.as_file().set_len(7 * 512).unwrap();
        rig.header(IN, 6);
        let parts = [(HEADER, 16, 0), (DATA, 1024, WRITE), (STATUS, 1, WRITE)];
        assert_eq!(rig.send(&parts), (IOERR, 1));
        assert_eq!(rig.device.block.counts.refused, 1);
        file.as_file().set_len(16 * 512).unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
    }
}
