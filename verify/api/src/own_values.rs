//! User-defined values: plain structures, and a value that is loaded and stored atomically.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::everything::*;
use crate::{Outcome, PAGE};

/// A descriptor, as in most device models.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Descriptor {
    address: Le64,
    length: Le32,
    flags: Le16,
    next: Le16,
}

// SAFETY: the four fields have no padding between them, and all their bit patterns are valid.
unsafe impl ByteValued for Descriptor {}

/// An atomic with a byte order.
#[derive(Debug)]
pub struct BigEndianAtomic(AtomicU32);

// SAFETY: an `AtomicU32` has no padding, all bit patterns are valid, and loads and stores are
// single accesses.
unsafe impl AtomicInteger for BigEndianAtomic {
    type V = u32;

    fn new(value: u32) -> Self {
        Self(AtomicU32::new(value.to_be()))
    }

    fn load(&self, order: Ordering) -> u32 {
        u32::from_be(self.0.load(order))
    }

    fn store(&self, value: u32, order: Ordering) {
        self.0.store(value.to_be(), order);
    }
}

/// A value that is loaded and stored through the atomic.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Doorbell(pub u32);

// SAFETY: a `u32` has no padding, and all bit patterns are valid.
unsafe impl ByteValued for Doorbell {}

impl From<u32> for Doorbell {
    fn from(value: u32) -> Self {
        Self(value)
    }
}

impl From<Doorbell> for u32 {
    fn from(value: Doorbell) -> Self {
        value.0
    }
}

impl AtomicAccess for Doorbell {
    type A = BigEndianAtomic;
}

/// Reads and writes the structure in guest memory.
pub fn structures() -> Outcome {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGE)])?;
    let mut descriptor = Descriptor {
        address: 0x1000.into(),
        length: 0x200.into(),
        flags: 1.into(),
        ..Default::default()
    };
    memory.write_obj(descriptor, GuestAddress(0x10))?;
    assert_eq!(
        memory.read_obj::<Descriptor>(GuestAddress(0x10))?,
        descriptor
    );
    assert_eq!(descriptor.as_slice().len(), 16);
    descriptor.as_mut_slice()[0] = 1;
    assert_eq!(descriptor.address, 0x1001);
    assert_eq!(descriptor.as_bytes().read_obj::<Le32>(8)?, 0x200);
    assert_eq!(Descriptor::zeroed(), Descriptor::default());
    assert_eq!(Descriptor::from_slice(&[0; 15]), None);
    let slice = memory.get_slice(GuestAddress(0x10), 64)?;
    assert_eq!(slice.get_ref::<Descriptor>(0)?.load().length, 0x200);
    let table = slice.get_array_ref::<Descriptor>(0, 4)?;
    table.ref_at(1).store(descriptor);
    assert_eq!(table.load(1).address, 0x1001);
    Ok(())
}

/// Loads and stores the value; its atomic converts the byte order both ways.
pub fn atomics() -> Outcome {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGE)])?;
    memory.store(
        Doorbell(0x0102_0304),
        GuestAddress(0x100),
        Ordering::Release,
    )?;
    assert_eq!(
        memory.read_obj::<[u8; 4]>(GuestAddress(0x100))?,
        [1, 2, 3, 4]
    );
    assert_eq!(
        memory.load::<Doorbell>(GuestAddress(0x100), Ordering::Acquire)?,
        Doorbell(0x0102_0304)
    );
    let slice = memory.get_slice(GuestAddress(0x100), 4)?;
    assert_eq!(
        slice
            .get_atomic_ref::<BigEndianAtomic>(0)?
            .load(Ordering::Relaxed),
        0x0102_0304
    );
    Ok(())
}
