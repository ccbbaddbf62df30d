//! Random operations of the rest of the interface have the same outcomes on 0.18.0 and on this
//! crate.
//!
//! They are atomic accesses, streams in host memory, slices, references, arrays, and questions
//! about regions. Regions come and go, and there is memory behind an IOMMU.
//!
//! The operations stay where docs/differences.md lists no difference. Ranges have bytes and do not
//! end near 2^64. No source ends before its range. No write through the IOMMU passes the end of its
//! bitmap.
#![cfg(windows)]

use vm_memory_windows_differential::{on_ours, on_reference, Op, END, PAGE};

fn random_op(random: &mut fastrand::Rng) -> Op {
    let (addr, other) = (random.u64(0..END), random.u64(0..END));
    let longest = if random.bool() { 64 } else { 0x2800 };
    let len = random.usize(1..longest);
    let (byte, page) = (random.u8(..), |addr: u64| addr & !(PAGE - 1));
    match random.u8(0..20) {
        0 => Op::Load(addr, byte % 4),
        1 => Op::Load(addr & !7, byte % 4),
        2 => Op::Store(addr, byte % 4, random.u64(..)),
        3 => Op::Store(addr & !7, byte % 4, random.u64(..)),
        4 => Op::ReadFrom {
            addr,
            len,
            exact: false,
            seed: byte,
        },
        5 => Op::ReadFrom {
            addr,
            len,
            exact: true,
            seed: byte,
        },
        6 => Op::WriteTo {
            addr,
            len,
            all: byte % 2 == 0,
        },
        7 | 8 => Op::Ask(addr, len),
        9 => Op::Copy {
            from: addr,
            to: other,
            len,
        },
        10 => Op::Slice {
            addr,
            len,
            at: random.usize(0..len + 4),
            sub: random.usize(1..64),
        },
        11 => Op::Insert(page(addr), random.usize(1..4) * PAGE as usize),
        12 => Op::Remove(page(addr), random.u64(1..4) * PAGE),
        13 | 14 => Op::Map {
            iova: page(addr),
            addr: page(other),
            len: random.usize(1..4) * PAGE as usize,
            permission: byte,
        },
        15 => Op::Invalidate(page(addr), random.usize(1..3) * PAGE as usize),
        16 => Op::IommuWrite(addr, len, byte),
        17 => Op::IommuRead(addr, len),
        18 => Op::IommuCheck(addr, len),
        _ => Op::Marks,
    }
}

#[test]
fn random_operations_of_the_whole_interface_have_equal_outcomes() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut outcomes = std::collections::BTreeSet::new();
    for _ in 0..30 {
        let ranges = [(0, 0x2000), (0x2000, 0x3000), (0x8000, 0x1000)];
        let mut expected = on_reference::Side::new(&ranges);
        let mut found = on_ours::Side::new(&ranges);
        for at in 0..300 {
            let op = if at % 50 == 49 {
                Op::Content
            } else {
                random_op(&mut random)
            };
            let (left, right) = (expected.run(op), found.run(op));
            assert_eq!(right, left, "seed {seed}: {op:x?}");
            let kind = format!("{op:?}");
            let kind = kind
                .split(|c: char| !c.is_alphanumeric())
                .next()
                .unwrap()
                .to_owned();
            outcomes.insert((
                kind,
                left.chars().next().is_some_and(|c| c.is_ascii_uppercase()),
            ));
        }
    }
    // Each kind of operation succeeds, and those that can fail do.
    let succeeded = outcomes.iter().filter(|(_, failed)| !failed).count();
    let failed = outcomes.iter().filter(|(_, failed)| *failed).count();
    assert!(succeeded == 16 && failed >= 8, "{outcomes:?}");
}
