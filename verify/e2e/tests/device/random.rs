//! Random descriptors, rings and registers do not make the device panic or hang, and each page that
//! it writes is marked.

use std::collections::BTreeSet;

use fastrand::Rng;
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

/// Returns one of several values.
fn one_of<T: Copy>(random: &mut Rng, choices: &[T]) -> T {
    choices[random.usize(..choices.len())]
}

fn send_random_requests(rig: &mut Rig) {
    let random = &mut Rng::with_seed(0x1234_5678_9abc_def1);
    for round in 0..20_000 {
        let named = write_random_chain(rig, random);
        if random.u64(..50) == 0 {
            let (any, reg) = (random.u32(..), random.u32(..0x110));
            rig.write(reg, one_of(random, &[0, 1, 15, any]));
        }
        if random.u64(..100) == 0 {
            rig.next = rig.next.wrapping_add(random.u16(..40));
        }
        let any = random.u16(..18);
        rig.notify(one_of(random, &[0, 0, 0, any]));
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
fn write_random_chain(rig: &Rig, random: &mut Rng) -> BTreeSet<u64> {
    let any = random.u32(..);
    let kind = one_of(random, &[IN, OUT, FLUSH, any]);
    let sectors = [random.u64(..2048), 2047, random.u64(..u64::MAX)];
    rig.header(kind, one_of(random, &sectors));
    let to_guest = if kind == IN { WRITE } else { 0 };
    let chain = [
        (HEADER, 16, NEXT),
        (DATA, 512, NEXT | to_guest),
        (STATUS, 1, WRITE),
    ];
    let mut named: BTreeSet<u64> = pages_of(USED, 6 + 8 * u64::from(SIZE)).collect();
    for (nth, (mut at, mut len, mut flags)) in chain.into_iter().enumerate() {
        let mut next = nth as u16 + 1;
        match random.u64(..12) {
            0 => at = one_of(random, &PLACES),
            1 => len = one_of(random, &LENGTHS),
            2 => flags = random.u16(..8),
            3 => next = random.u16(..20),
            _ => {}
        }
        rig.descriptor(nth as u64, at, len, flags, next);
        if flags & WRITE != 0 {
            named.extend(pages_of(at, u64::from(len).min(2 * REGION)));
        }
    }
    named
}
