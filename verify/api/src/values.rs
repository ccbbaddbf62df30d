//! [`ByteValued`], the values with a byte order, and the atomics.

use std::sync::atomic::*;

use crate::everything::*;
use crate::Outcome;

/// Calls every method of [`ByteValued`] on an integer, an array and a value with a byte order.
pub fn byte_valued() -> Outcome {
    let mut value = 0x0403_0201u32;
    assert_eq!(ByteValued::as_slice(&value), value.to_ne_bytes());
    assert_eq!(value.as_slice().len(), 4);
    value.as_mut_slice()[0] = 0xff;
    value.as_bytes().write_obj(0xfeu8, 3)?;
    assert_eq!(u32::from_slice(&value.to_ne_bytes()), Some(&value));
    let mut bytes = [0u32; 1];
    let bytes = bytes[0].as_mut_slice();
    *u32::from_mut_slice(bytes).ok_or("misaligned")? = 5;
    assert_eq!(bytes, 5u32.to_ne_bytes());
    assert_eq!(u64::zeroed(), 0);
    assert_eq!(<[u16; 3]>::zeroed(), [0; 3]);
    assert_eq!(u16::read_exact_from(&[1u8, 1][..])?, 0x101);
    let mut sink = Vec::new();
    value.write_all_to(&mut sink)?;
    Le16::from(1).write_all_to(&mut sink)?;
    assert_eq!(&sink[4..], [1, 0]);
    assert_eq!(Be16::read_exact_from(&mut &sink[4..])?, 0x100);
    Ok(())
}

/// Compares each width of each byte order with literals whose type is inferred.
pub fn endian() {
    assert!(Le16::from(1) == 1 && 1 == Le16::from(1) && Le16::from(1).to_native() == 1);
    assert!(Le32::from(2) == 2 && 2 == Le32::from(2) && Le32::from(2).to_native() == 2);
    assert!(Le64::from(3) == 3 && 3 == Le64::from(3) && Le64::from(3).to_native() == 3);
    assert!(LeSize::from(4) == 4 && 4 == LeSize::from(4) && LeSize::from(4).to_native() == 4);
    assert!(Be16::from(1) == 1 && 1 == Be16::from(1) && Be16::from(1).to_native() == 1);
    assert!(Be32::from(2) == 2 && 2 == Be32::from(2) && Be32::from(2).to_native() == 2);
    assert!(Be64::from(3) == 3 && 3 == Be64::from(3) && Be64::from(3).to_native() == 3);
    assert!(BeSize::from(4) == 4 && 4 == BeSize::from(4) && BeSize::from(4).to_native() == 4);
    let native: u32 = Be32::from(0x0102_0304).into();
    assert_eq!(native, 0x0102_0304);
    assert_eq!(Be32::default(), Be32::from(0));
    assert_eq!(Be32::from(0x0102_0304).as_slice(), [1, 2, 3, 4]);
    assert_eq!(Le32::zeroed(), 0);
}

/// Calls the methods of the trait on a generic atomic.
fn through<A: AtomicInteger>(value: A::V) -> A::V {
    let atomic = A::new(value);
    let value = atomic.load(Ordering::Acquire);
    atomic.store(value, Ordering::Release);
    atomic.load(Ordering::Relaxed)
}

/// Calls each atomic by the trait, and by its own methods with the trait in scope.
pub fn atomics() {
    assert_eq!(through::<AtomicU8>(1), 1);
    assert_eq!(through::<AtomicU16>(2), 2);
    assert_eq!(through::<AtomicU32>(3), 3);
    assert_eq!(through::<AtomicU64>(4), 4);
    assert_eq!(through::<AtomicUsize>(5), 5);
    assert_eq!(through::<AtomicI8>(-1), -1);
    assert_eq!(through::<AtomicI16>(-2), -2);
    assert_eq!(through::<AtomicI32>(-3), -3);
    assert_eq!(through::<AtomicI64>(-4), -4);
    assert_eq!(through::<AtomicIsize>(-5), -5);
    let atomic = AtomicU32::new(1);
    atomic.store(2, Ordering::SeqCst);
    assert_eq!(atomic.load(Ordering::SeqCst), 2);
}

/// Loads a value, such as the index of a ring.
fn at_least<T: AtomicAccess + Ord>(memory: &impl Bytes<usize>, least: T) -> bool {
    memory
        .load::<T>(0, Ordering::Acquire)
        .is_ok_and(|value| value >= least)
}

/// Loads each type that can be loaded.
pub fn atomic_access() {
    let mut bytes = [0u64];
    let slice = bytes[0].as_bytes();
    assert!(
        at_least(&slice, 0u8)
            && at_least(&slice, 0u16)
            && at_least(&slice, 0u32)
            && at_least(&slice, 0u64)
    );
    assert!(
        at_least(&slice, 0i8)
            && at_least(&slice, 0i16)
            && at_least(&slice, 0i32)
            && at_least(&slice, 0i64)
    );
    assert!(at_least(&slice, 0usize) && at_least(&slice, 0isize));
    assert!(!at_least(&slice, 1u8));
}
