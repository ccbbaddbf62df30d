//! Random descriptors, rings and registers do not make the device panic or hang, and each page that
//! it writes is marked.

use std::collections::BTreeSet;

use microvm::memory::{pages_of, HIGH_START, HOLE_START};

use super::rig::*;

#[test]
fn random_requests_mark_every_page_that_they_change() {
    for mut rig in Rig::both("random_requests_mark_every_page_that_they_change") {
        send_random_requests(&mut rig);
    }
}

const PLACES: [u64; 10] = [
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
const LENGTHS: [u32; 10] = [0, 1, 15, 16, 17, 511, 512, 1024, 4096, u32::MAX];

/// A xorshift generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn any_u32(&mut self) -> u32 {
        self.below(1 << 32) as u32
    }
}

fn send_random_requests(rig: &mut Rig) {
    let random = &mut Random(0x1234_5678_9abc_def1);
    for round in 0..20_000 {
        let named = write_random_chain(rig, random);
        if random.below(50) == 0 {
            let (any, reg) = (random.any_u32(), random.below(0x110) as u32);
            rig.write(reg, random.of(&[0, 1, 15, any]));
        }
        if random.below(100) == 0 {
            rig.next = rig.next.wrapping_add(random.below(40) as u16);
        }
        let any = random.below(18) as u16;
        rig.notify(random.of(&[0, 0, 0, any]));
        let dirty = rig.dirty();
        assert!(
            dirty.is_subset(&named),
            "round {round}: {dirty:x?}, {named:x?}"
        );
        if rig.status() != DRIVER_OK || round % 500 == 0 {
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

/// Writes a correct chain in which random fields are replaced. Returns the pages that the device
/// may write: those of the used ring and of the writable descriptors.
fn write_random_chain(rig: &Rig, random: &mut Random) -> BTreeSet<u64> {
    let any = random.any_u32();
    let kind = random.of(&[IN, OUT, FLUSH, any]);
    let sectors = [random.below(2048), 2047, random.below(u64::MAX)];
    rig.header(kind, random.of(&sectors));
    let to_guest = if kind == IN { WRITE } else { 0 };
    let chain = [
        (HEADER, 16, NEXT),
        (DATA, 512, NEXT | to_guest),
        (STATUS, 1, WRITE),
    ];
    let mut named: BTreeSet<u64> = pages_of(USED, 6 + 8 * u64::from(SIZE)).collect();
    for (nth, (mut at, mut len, mut flags)) in chain.into_iter().enumerate() {
        let mut next = nth as u16 + 1;
        match random.below(12) {
            0 => at = random.of(&PLACES),
            1 => len = random.of(&LENGTHS),
            2 => flags = random.below(8) as u16,
            3 => next = random.below(20) as u16,
            _ => {}
        }
        rig.descriptor(nth as u64, at, len, flags, next);
        if flags & WRITE != 0 {
            named.extend(pages_of(at, u64::from(len).min(2 * REGION)));
        }
    }
    named
}
