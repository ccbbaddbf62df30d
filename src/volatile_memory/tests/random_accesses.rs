//! Compares accesses at every alignment with accesses to a vector.

use proptest::prelude::*;

use super::access::{Access, Op, Outcome, KINDS};
use super::*;

fn op() -> impl Strategy<Value = Op> {
    let kind = prop::sample::select(KINDS.to_vec());
    let at = prop_oneof![12 => 0usize..70, 1 => (usize::MAX - 70)..=usize::MAX];
    let size = prop::sample::select(vec![1usize, 2, 3, 4, 8, 16, 24]);
    (kind, at, size, 0usize..80, 0usize..40).prop_map(|(kind, at, size, count, elements)| Op {
        kind,
        at,
        size,
        count,
        elements,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 512 }))]

    /// Compares values, counts, errors, bytes and marks, at every alignment.
    #[test]
    fn accesses_agree_with_vector(
        len in 0usize..64,
        shift in 0usize..8,
        ops in prop::collection::vec(op(), 1..24),
    ) {
        let memory = Memory::new(len, shift);
        let slice = memory.slice();
        let mut model = memory.bytes();
        let payload = numbered(80 * 24, 101);
        for op in ops {
            let start = op.at.min(len);
            let access = Access {
                slice: &slice,
                host: memory.ptr() as usize,
                len,
                op,
                rest: &model[start..],
                payload: &payload,
            };
            let Outcome { got, want, moved } = access.run();
            prop_assert_eq!(got, want, "{:?}", op);
            let touched = start..start + moved;
            model[touched.clone()].copy_from_slice(&payload[..moved]);
            prop_assert_eq!(memory.bytes(), &*model, "{:?}", op);
            prop_assert_eq!(memory.take_marks(), touched.collect::<Vec<_>>(), "{:?}", op);
        }
    }
}
