//! B3: the guard of a volatile array has the length in bytes, not in elements.

use vm_memory::{VolatileArrayRef, VolatileMemory, VolatileSlice};

#[test]
fn b03_array_ref_guards_have_length_in_bytes() {
    let mut memory = [0u8; 64];
    let start = memory.as_ptr();
    let slice = VolatileSlice::from(memory.as_mut_slice());
    macro_rules! check {
        ($($element:ty, $count:literal, $bytes:literal;)*) => {
            $(
                let array = slice.get_array_ref::<$element>(8, $count).unwrap();
                assert_eq!(array.len(), $count);
                assert_eq!(array.ptr_guard().len(), $bytes);
                assert_eq!(array.ptr_guard_mut().len(), $bytes);
                assert_eq!(array.to_slice().len(), $bytes);
                assert_eq!(array.ptr_guard().as_ptr(), start.wrapping_add(8));
                assert_eq!(array.ptr_guard_mut().as_ptr().cast_const(), start.wrapping_add(8));
            )*
        };
    }
    check! {
        u8, 3, 3;
        u16, 3, 6;
        u32, 3, 12;
        u64, 7, 56;
        u128, 2, 32;
        [u8; 3], 5, 15;
        u64, 0, 0;
        [u64; 0], 9, 0;
    }
}

#[test]
fn b03_array_ref_from_slice_has_its_length() {
    let mut memory = [0u8; 7];
    let array = VolatileArrayRef::from(VolatileSlice::from(memory.as_mut_slice()));
    assert_eq!(
        (
            array.len(),
            array.ptr_guard().len(),
            array.ptr_guard_mut().len()
        ),
        (7, 7, 7)
    );
    let element = array.ref_at(6);
    assert_eq!(
        (element.ptr_guard().len(), element.ptr_guard_mut().len()),
        (1, 1)
    );
}
