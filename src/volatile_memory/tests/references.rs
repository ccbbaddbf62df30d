//! References and arrays in a slice, and plain references to its bytes.

use core::sync::atomic::{AtomicI16, AtomicU16, AtomicU32};

use super::*;

#[test]
fn get_array_ref_larger_than_address_space_returns_too_big() {
    let memory = Memory::new(16, 0);
    let (nelements, size) = (usize::MAX / 2, 4);
    let too_big = shown(Error::TooBig { nelements, size });
    assert_eq!(
        failed(memory.slice().get_array_ref::<u32>(0, nelements)),
        too_big
    );
}

#[test]
fn volatile_ref_accesses_only_its_value() {
    let memory = Memory::new(16, 1);
    let slice = memory.slice();
    let value = slice.get_ref::<u32>(5).unwrap();
    assert_eq!(value.len(), 4);
    assert_eq!(
        (value.ptr_guard().len(), value.ptr_guard_mut().len()),
        (4, 4)
    );
    assert_eq!(value.ptr_guard().as_ptr(), memory.ptr().wrapping_add(5));
    assert_eq!(value.ptr_guard_mut().as_ptr(), memory.ptr().wrapping_add(5));
    assert_eq!(value.bitmap().1, 5);
    let inside = value.to_slice().subslice(1, 2).unwrap();
    inside.copy_from(&[0xa1u8, 0xa2]);
    assert_eq!(memory.take_marks(), [6, 7]);
    assert_eq!(value.load().to_ne_bytes(), [6, 0xa1, 0xa2, 9]);
    value.clone().store(0);
    assert_eq!(value.load(), 0);

    // SAFETY: the four bytes are in the memory, which outlives the reference.
    let bare = unsafe { VolatileRef::<u32>::new(memory.ptr()) };
    memory.take_marks();
    bare.store(u32::MAX);
    assert_eq!(memory.bytes()[..5], [0xff, 0xff, 0xff, 0xff, 5]);
    assert_eq!(memory.take_marks(), [] as [usize; 0]);
}

#[test]
fn volatile_array_ref_accesses_only_its_elements() {
    let memory = Memory::new(40, 0);
    let slice = memory.slice();
    let array = slice.get_array_ref::<u16>(3, 5).unwrap();
    assert_eq!((array.len(), array.element_size()), (5, 2));
    assert_eq!(
        (array.ptr_guard().len(), array.ptr_guard_mut().len()),
        (10, 10)
    );
    assert_eq!(array.ptr_guard().as_ptr(), memory.ptr().wrapping_add(3));
    assert_eq!(array.bitmap().1, 3);
    array.store(4, 0xabab);
    assert_eq!(memory.take_marks(), [11, 12]);
    assert_eq!(array.load(4), 0xabab);
    assert_eq!(array.ref_at(1).load().to_ne_bytes(), [6, 7]);
    assert_eq!(array.to_slice().len(), 10);

    let target = memory.slice().subslice(30, 7).unwrap();
    array.copy_to_volatile_slice(target);
    assert_eq!(memory.bytes()[30..38], [4, 5, 6, 7, 8, 9, 10, 38]);
    assert_eq!(memory.take_marks(), (30..37).collect::<Vec<_>>());

    let bytes = VolatileArrayRef::from(memory.slice().subslice(2, 4).unwrap());
    assert_eq!((bytes.len(), bytes.element_size()), (4, 1));
    bytes.store(3, 0);
    assert_eq!(memory.take_marks(), [5]);
    // SAFETY: the eight bytes are in the memory, which outlives the reference.
    let bare = unsafe { VolatileArrayRef::<u32>::new(memory.ptr(), 2) };
    bare.copy_from(&[0, 0, 0]);
    assert_eq!(memory.bytes()[..9], [0, 0, 0, 0, 0, 0, 0, 0, 9]);
    assert_eq!(memory.take_marks(), [] as [usize; 0]);
    assert!(memory
        .slice()
        .get_array_ref::<u64>(40, 0)
        .unwrap()
        .is_empty());
}

#[test]
#[should_panic(expected = "index 2 is out of bounds of an array of length 2")]
fn volatile_array_ref_load_past_end_panics() {
    let memory = Memory::new(8, 0);
    memory.slice().get_array_ref::<u16>(0, 2).unwrap().load(2);
}

#[test]
fn plain_references_out_of_bounds_or_misaligned_return_error() {
    let memory = Memory::new(16, 2);
    let slice = memory.slice();
    let half = slice.get_atomic_ref::<AtomicU16>(2).unwrap();
    assert_eq!(half.load(Ordering::Relaxed).to_ne_bytes(), [3, 4]);
    let word = slice.get_atomic_ref::<AtomicU32>(6).unwrap();
    word.store(0, Ordering::Relaxed);
    assert_eq!(memory.bytes()[5..11], [6, 0, 0, 0, 0, 11]);
    let (addr, alignment) = (memory.ptr() as usize + 1, 2);
    let misaligned = shown(Error::Misaligned { addr, alignment });
    assert_eq!(failed(slice.get_atomic_ref::<AtomicI16>(1)), misaligned);
    assert_eq!(
        failed(slice.get_atomic_ref::<AtomicI16>(15)),
        out_of_bounds(17)
    );
    // SAFETY: only this thread accesses the memory, through one reference at a time.
    unsafe {
        assert_eq!(slice.aligned_as_ref::<[u8; 2]>(0).unwrap(), &[1, 2]);
        *slice.aligned_as_mut::<u16>(0).unwrap() = 0;
        assert_eq!(failed(slice.aligned_as_ref::<u16>(1)), misaligned);
        assert_eq!(failed(slice.aligned_as_mut::<u16>(1)), misaligned);
        assert_eq!(failed(slice.aligned_as_ref::<u64>(14)), out_of_bounds(22));
        assert_eq!(failed(slice.aligned_as_mut::<u64>(14)), out_of_bounds(22));
    }
    assert_eq!(memory.bytes()[..3], [0, 0, 3]);
}

/// A slice without bytes may begin at null, which no reference may be.
#[test]
fn plain_references_to_value_without_bytes_are_not_null() {
    use crate::atomic_integer::AtomicInteger;

    struct Nothing;
    // SAFETY: it has no bytes, so it has only bytes of atomic integers.
    unsafe impl AtomicInteger for Nothing {
        type V = [u64; 0];
        fn new(_: [u64; 0]) -> Self {
            Nothing
        }
        fn load(&self, _: Ordering) -> [u64; 0] {
            []
        }
        fn store(&self, _: [u64; 0], _: Ordering) {}
    }

    // SAFETY: the slice has no bytes.
    let empty = unsafe { VolatileSlice::new(std::ptr::null_mut(), 0) };
    // SAFETY: the values have no bytes, so nothing accesses them.
    let (shared, mutable) = unsafe {
        (
            empty.aligned_as_ref::<[u64; 0]>(0).unwrap(),
            empty.aligned_as_mut::<[u64; 0]>(0).unwrap(),
        )
    };
    let atomic = empty.get_atomic_ref::<Nothing>(0).unwrap();
    assert_ne!(std::ptr::from_ref(shared).addr(), 0);
    assert_ne!(std::ptr::from_mut(mutable).addr(), 0);
    assert_ne!(std::ptr::from_ref(atomic).addr(), 0);

    // SAFETY: no bytes are mapped at null, so an access would be unsound. The test makes none: each
    // reference is refused.
    let null = unsafe { VolatileSlice::new(std::ptr::null_mut(), 8) };
    assert_eq!(
        failed(null.get_atomic_ref::<AtomicU32>(0)),
        out_of_bounds(0)
    );
    // SAFETY: the slice has no values, and no reference is returned.
    let result = unsafe { null.aligned_as_ref::<u32>(0) };
    assert_eq!(failed(result), out_of_bounds(0));
}

/// A third-party memory may return slices of another length.
#[test]
fn references_from_slice_of_wrong_length_return_error() {
    struct OtherLength<'a>(VolatileSlice<'a>, usize);
    impl VolatileMemory for OtherLength<'_> {
        type B = ();
        fn len(&self) -> usize {
            self.0.len()
        }
        fn get_slice(&self, _offset: usize, _count: usize) -> Result<VolatileSlice<'_>> {
            self.0.subslice(0, self.1)
        }
    }
    let mut bytes = [0u64; 2];
    for given in [0, 1, 3, 5, 16] {
        let memory = OtherLength(bytes.as_bytes(), given);
        assert!(!memory.is_empty());
        let (expected, completed) = (4, given);
        let partial = shown(Error::PartialBuffer {
            expected,
            completed,
        });
        assert_eq!(failed(memory.get_ref::<u32>(0)), partial);
        assert_eq!(failed(memory.get_array_ref::<u16>(0, 2)), partial);
        assert_eq!(failed(memory.get_atomic_ref::<AtomicU32>(0)), partial);
        // SAFETY: only this thread accesses the memory, through one reference at a time.
        unsafe {
            assert_eq!(failed(memory.aligned_as_ref::<u32>(0)), partial);
            assert_eq!(failed(memory.aligned_as_mut::<u32>(0)), partial);
        }
    }
    let whole = OtherLength(bytes.as_bytes(), 16);
    assert_eq!(whole.as_volatile_slice().len(), 16);
}
