//! Compares accesses to several regions, with and without holes, with a map of bytes.

use proptest::prelude::*;

use super::access::{Access, Kind, KINDS};
use super::model::Model;
use super::stream::Stream;
use super::*;
use crate::region::GuestMemoryRegion;

const EAGAIN: i32 = libc::EAGAIN;

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    /// The address, relative to 4 bytes before the first region.
    at: u64,
    count: usize,
    /// The seed of the bytes written.
    seed: u8,
    stream: Stream,
}

fn op() -> impl Strategy<Value = Op> {
    let stream = (
        0usize..60,
        prop::collection::vec(prop_oneof![1usize..8, Just(100)], 1..4),
        prop::collection::vec(any::<bool>(), 1..4),
        prop::sample::select(vec![0, EIO, EAGAIN]),
    )
        .prop_map(|(left, steps, interrupts, end)| Stream::new(left, steps, interrupts, end));
    let kind = prop::sample::select(KINDS.to_vec());
    (kind, 0u64..90, 0usize..70, any::<u8>(), stream).prop_map(|(kind, at, count, seed, stream)| {
        Op {
            kind,
            at,
            count,
            seed,
            stream,
        }
    })
}

/// Compares the bytes and the dirty pages of all regions with the model, and clears the marks.
fn check_regions(
    memory: &Memory,
    model: &mut Model,
    page: usize,
    op: &Op,
) -> std::result::Result<(), TestCaseError> {
    let dirty = std::mem::take(&mut model.dirty);
    for region in memory.iter() {
        let start = region.start_addr().0;
        let mut bytes = vec![0; region.size()];
        let slice = region.as_volatile_slice().unwrap();
        slice.read_slice(&mut bytes, 0).unwrap();
        prop_assert_eq!(&bytes, &model.reach(start, bytes.len()), "{:?}", op);
        let bitmap = (**region).bitmap();
        let offsets: Vec<usize> = (0..bytes.len()).collect();
        for (number, of_page) in offsets.chunks(page).enumerate() {
            let expected = of_page.iter().any(|&i| dirty.contains(&(start + i as u64)));
            let marked = bitmap.is_bit_set(number);
            prop_assert_eq!(marked, expected, "page {} after {:?}", number, op);
        }
        bitmap.reset();
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Compares values, counts, errors, bytes and dirty bits, also at the end of the address space.
    #[test]
    fn accesses_agree_with_map_of_bytes(
        layout in prop::collection::vec((0u64..3, 1usize..24), 1..5),
        at_top in any::<bool>(),
        page in prop::sample::select(vec![1usize, 4, 7]),
        ops in prop::collection::vec(op(), 1..16),
    ) {
        let total: u64 = layout.iter().map(|&(gap, len)| gap + len as u64).sum();
        let first = if at_top { u64::MAX - total } else { 4 };
        let mut next = first;
        let mut places = vec![];
        for (gap, len) in layout {
            places.push((next + gap, len));
            next += gap + len as u64;
        }
        let memory = memory(&places, page);
        let mut model = Model::new(places);
        for op in ops {
            let addr = (first - 4).saturating_add(op.at);
            let byte = |i: usize| (i as u8).wrapping_mul(7) ^ op.seed;
            let access = Access {
                memory: &memory,
                model: &mut model,
                addr,
                count: op.count,
                data: (0..op.count.max(24)).map(byte).collect(),
                stream: op.stream.clone(),
            };
            let (got, want) = access.run(op.kind)?;
            prop_assert_eq!(got, want, "{:?} at {:#x}", op, addr);
            check_regions(&memory, &mut model, page, &op)?;
        }
    }
}
