//! Parts of a slice, and copies between them.

use proptest::prelude::*;

use super::access::end_of;
use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 512 }))]

    /// Compares start, length, bitmap offset and errors.
    #[test]
    fn subslice_offset_and_split_at_agree_with_arithmetic(
        len in 0usize..40,
        a in prop_oneof![4 => 0usize..50, 1 => any::<usize>(), 1 => Just(usize::MAX)],
        b in prop_oneof![4 => 0usize..50, 1 => any::<usize>(), 1 => Just(usize::MAX)],
    ) {
        let memory = Memory::new(len, 0);
        let slice = memory.slice();
        let host = memory.ptr() as usize;
        let describe = |s: VolatileSlice<'_, ByteMap>| {
            prop_assert_eq!(s.is_empty(), matches!(s.len(), 0));
            prop_assert_eq!((s.ptr_guard().len(), s.ptr_guard_mut().len()), (s.len(), s.len()));
            prop_assert_eq!(s.ptr_guard().as_ptr(), s.ptr_guard_mut().as_ptr().cast_const());
            Ok((s.ptr_guard().as_ptr() as usize - host, s.len(), s.bitmap().1))
        };
        let want = end_of(a, b, len).map(|_| (a, b, a));
        for got in [slice.subslice(a, b), slice.get_slice(a, b)] {
            prop_assert_eq!(shown(got.map(|s| describe(s).unwrap())), shown(&want));
        }
        prop_assert_eq!(shown(slice.compute_end_offset(a, b)), shown(end_of(a, b, len)));

        let offset_error = match host.checked_add(a) {
            None => Error::Overflow { base: host, offset: a },
            Some(addr) => Error::OutOfBounds { addr },
        };
        let (offset, split) = (slice.offset(a), slice.split_at(a));
        if a <= len {
            prop_assert_eq!(describe(offset.unwrap())?, (a, len - a, a));
            let (head, tail) = split.unwrap();
            prop_assert_eq!(describe(head)?, (0, a, 0));
            prop_assert_eq!(describe(tail)?, (a, len - a, a));
        } else {
            prop_assert_eq!(shown(offset.unwrap_err()), shown(&offset_error));
            prop_assert_eq!(shown(split.unwrap_err()), shown(&offset_error));
        }
    }

    /// Compares with a copy through a vector. Only the target may be marked.
    #[test]
    fn copy_to_volatile_slice_with_overlap_copies_original_bytes(
        (from, from_len) in (0usize..600, 0usize..600),
        (to, to_len) in (0usize..600, 0usize..600),
    ) {
        let memory = Memory::new(600, 3);
        let part = |at: usize, n: usize| memory.slice().subslice(at, n.min(600 - at)).unwrap();
        let (source, target) = (part(from, from_len), part(to, to_len));
        let count = source.len().min(target.len());
        let mut model = memory.bytes();
        let through: Vec<u8> = model[from..from + count].to_vec();
        model[to..to + count].copy_from_slice(&through);
        source.copy_to_volatile_slice(target);
        prop_assert_eq!(memory.bytes(), model);
        prop_assert_eq!(memory.take_marks(), (to..to + count).collect::<Vec<_>>());
    }
}

#[test]
fn is_zero_depends_on_each_byte_of_the_slice_and_no_other() {
    let mut memory = [0xffu8; 220];
    for start in [0, 1, 7, 16] {
        for len in (0..200).step_by(if cfg!(miri) { 37 } else { 1 }) {
            memory.fill(0xff);
            memory[start..start + len].fill(0);
            let all = VolatileSlice::from(memory.as_mut_slice());
            let slice = all.subslice(start, len).unwrap();
            assert!(slice.is_zero().unwrap(), "{len} bytes at {start}");
            for offset in 0..len {
                slice.write_obj(0x80u8, offset).unwrap();
                assert!(
                    !slice.is_zero().unwrap(),
                    "{len} bytes at {start}, byte {offset}"
                );
                slice.write_obj(0u8, offset).unwrap();
            }
        }
    }
}
