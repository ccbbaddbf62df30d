//! Slices, references and arrays in guest memory.

use std::io::Cursor;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::everything::*;
use crate::Outcome;

/// Calls every method of a slice, of [`VolatileMemory`], and of [`Bytes`].
pub fn slice() -> Outcome {
    let mut words = [0u64; 8];
    let bytes = words.as_mut_slice().len() * 8;
    // SAFETY: the array has this length, and is accessed only through the slice while it lives.
    let slice: VolatileSlice = unsafe { VolatileSlice::new(words.as_mut_ptr().cast(), bytes) };
    assert_eq!(slice.len(), 64);
    assert!(!slice.is_empty());
    let () = slice.bitmap();
    assert_eq!(slice.offset(60)?.len(), 4);
    assert_eq!(slice.subslice(8, 16)?.len(), 16);
    let (low, high) = slice.split_at(24)?;
    assert_eq!((low.len(), high.len()), (24, 40));
    slice.copy_from(&[1u16, 2, 3]);
    let mut copy = [0u16; 3];
    assert_eq!(slice.copy_to(&mut copy), 3);
    assert_eq!(copy, [1, 2, 3]);
    slice.subslice(0, 6)?.copy_to_volatile_slice(high);
    assert_eq!(high.read_obj::<u16>(4)?, 3);
    let (shared, exclusive) = (slice.ptr_guard(), slice.ptr_guard_mut());
    assert_eq!((shared.len(), exclusive.len()), (64, 64));
    assert_eq!(shared.as_ptr(), exclusive.as_ptr().cast_const());

    assert_eq!(slice.get_slice(8, 8)?.len(), 8);
    assert_eq!(slice.as_volatile_slice().len(), 64);
    assert_eq!(slice.compute_end_offset(1, 1)?, 2);
    assert_eq!(slice.get_ref::<u16>(2)?.load(), 2);
    assert_eq!(slice.get_array_ref::<u16>(2, 2)?.load(1), 3);
    assert_eq!(
        slice
            .get_atomic_ref::<AtomicU16>(0)?
            .load(Ordering::Relaxed),
        1
    );
    // SAFETY: one thread has the array, and the reference ends with the statement.
    assert_eq!(*unsafe { slice.aligned_as_ref::<u16>(0) }?, 1);
    // SAFETY: one thread has the array, and the reference ends with the statement.
    *unsafe { slice.aligned_as_mut::<u16>(0) }? = 4;

    assert_eq!(slice.read_obj::<u16>(0)?, 4);
    slice.write_obj(5u16, 0)?;
    slice.store(6u16, 0, Ordering::SeqCst)?;
    assert_eq!(slice.load::<u16>(0, Ordering::SeqCst)?, 6);
    assert_eq!(slice.write(&[1, 2], 62)?, 2);
    slice.write_slice(&[1, 2], 62)?;
    let mut buffer = [0; 2];
    assert_eq!(slice.read(&mut buffer, 62)?, 2);
    slice.read_slice(&mut buffer, 62)?;
    assert_eq!(buffer, [1, 2]);
    assert_eq!(slice.read_volatile_from(0, &mut &[7u8; 4][..], 4)?, 4);
    slice.read_exact_volatile_from(0, &mut Cursor::new([7u8; 4]), 4)?;
    let mut sink = Vec::new();
    assert_eq!(slice.write_volatile_to(0, &mut sink, 2)?, 2);
    slice.write_all_volatile_to(0, &mut sink, 2)?;
    assert_eq!(sink, [7; 4]);
    let answers: [Mine; 3] = [slice.as_iovec(), slice.read_cstr(0), slice.zero_range(0, 1)];
    assert_eq!(answers[0], Mine("as_iovec"));
    Ok(())
}

/// Creates slices by conversion and with a bitmap.
pub fn converted() -> Outcome {
    let mut bytes = vec![0u8; 16];
    let slice: VolatileSlice = bytes.as_mut_slice().into();
    slice.write_obj(1u64, 0)?;
    let array = VolatileArrayRef::from(slice);
    assert_eq!(array.load(0), 1);
    assert_eq!(VolatileSlice::from(&mut bytes[..4]).len(), 4);

    let bitmap = AtomicBitmap::new(16, std::num::NonZeroUsize::MIN);
    // SAFETY: the vector has this length, and is accessed only through the slice while it lives.
    let tracked = unsafe {
        VolatileSlice::with_bitmap(bytes.as_mut_ptr(), bytes.len(), bitmap.slice_at(0), None)
    };
    tracked.write_obj(2u8, 3)?;
    assert!(tracked.bitmap().dirty_at(3));
    assert!(bitmap.is_bit_set(3) && !bitmap.is_bit_set(4));
    let copy = tracked;
    assert_eq!(copy.len(), 16);
    Ok(())
}

/// Calls every method of a reference to one value.
pub fn reference() -> Outcome {
    let mut word = 0u32;
    // SAFETY: the value is accessed only through the reference while it lives.
    let place = unsafe { VolatileRef::new((&raw mut word).cast()) };
    place.store(5u32);
    assert_eq!(place.load(), 5);
    assert_eq!(place.len(), 4);
    let () = place.bitmap();
    assert_eq!(place.to_slice().read_obj::<u32>(0)?, 5);
    assert_eq!(
        place.ptr_guard().as_ptr(),
        place.ptr_guard_mut().as_ptr().cast_const()
    );
    // SAFETY: the value is accessed only through the reference while it lives.
    let tracked = unsafe { VolatileRef::<u32, ()>::with_bitmap((&raw mut word).cast(), (), None) };
    assert_eq!(tracked.load(), 5);
    Ok(())
}

/// Calls every method of an array.
pub fn array() -> Outcome {
    let mut words = [1u16, 2, 3, 4];
    // SAFETY: the four elements are accessed only through the array while it lives.
    let array = unsafe { VolatileArrayRef::<u16>::new(words.as_mut_ptr().cast(), 4) };
    assert_eq!(
        (array.len(), array.element_size(), array.is_empty()),
        (4, 2, false)
    );
    assert_eq!(array.load(3), 4);
    array.store(3, 5);
    assert_eq!(array.ref_at(3).load(), 5);
    let () = array.bitmap();
    let mut copy = [0u16; 4];
    assert_eq!(array.copy_to(&mut copy), 4);
    assert_eq!(copy, [1, 2, 3, 5]);
    array.copy_from(&[9, 8]);
    assert_eq!(array.to_slice().len(), 8);
    assert_eq!(
        array.ptr_guard().as_ptr(),
        array.ptr_guard_mut().as_ptr().cast_const()
    );
    let mut target = [0u8; 8];
    array.copy_to_volatile_slice(VolatileSlice::from(&mut target[..]));
    assert_eq!(target[0], 9);
    // SAFETY: the four elements are accessed only through the array while it lives.
    let tracked =
        unsafe { VolatileArrayRef::<u16, ()>::with_bitmap(words.as_mut_ptr().cast(), 4, (), None) };
    assert_eq!(tracked.load(1), 8);
    Ok(())
}

/// Calls the free function, and formats the errors.
pub fn errors() {
    assert_eq!(compute_offset(1, 2).ok(), Some(3));
    let error: VolatileMemoryResult<usize> = compute_offset(usize::MAX, 1);
    let error: GuestMemoryError = error.map_or_else(GuestMemoryError::from, |_| {
        GuestMemoryError::InvalidBackendAddress
    });
    assert!(!error.to_string().is_empty());
}
