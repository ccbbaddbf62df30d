//! Values of 16 and 64 bytes, accessed from code that compiles differently than a plain loop.

use std::hint::black_box;

use anyhow::Result;

use super::kinds::{memory, Plain};
use super::vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use crate::contest::Batch;
use crate::layout::{Addresses, Layout};
use crate::stage::Stage;
use crate::values::Words;

/// Reads through a closure that the loop cannot inline.
pub fn read_obj_boxed<T: Words>(stage: &Stage) -> Result<Batch> {
    let (memory, addresses) = (memory::<Plain>(stage, Layout::apart(1))?, addresses::<T>());
    let read: Box<dyn Fn(u64) -> Option<u64>> = black_box(Box::new(move |number| {
        let value: T = memory.read_obj(GuestAddress(addresses.at(number))).ok()?;
        Some(value.sum())
    }));
    Ok(Batch::of(read))
}

/// Writes through a closure that the loop cannot inline.
pub fn write_obj_boxed<T: Words>(stage: &Stage) -> Result<Batch> {
    let (memory, addresses) = (memory::<Plain>(stage, Layout::apart(1))?, addresses::<T>());
    let write: Box<dyn Fn(u64) -> Option<()>> = black_box(Box::new(move |number| {
        let addr = GuestAddress(addresses.at(number));
        memory.write_obj(T::from_word(number), addr).ok()
    }));
    Ok(Batch::of(write))
}

/// A device, as the threads of a VMM use it.
trait Device {
    fn read(&mut self) -> Option<u64>;
    fn write(&mut self) -> Option<()>;
}

/// A device that works with any kind of handle to the memory.
struct Generic<S, T> {
    space: S,
    addresses: Addresses,
    next: u64,
    last: T,
}

impl<S: GuestAddressSpace, T: Words> Device for Generic<S, T> {
    fn read(&mut self) -> Option<u64> {
        let memory = self.space.memory();
        let addr = GuestAddress(self.addresses.at(self.next));
        self.last = memory.read_obj(addr).ok()?;
        self.next += 1;
        Some(self.last.sum())
    }

    fn write(&mut self) -> Option<()> {
        let memory = self.space.memory();
        let addr = GuestAddress(self.addresses.at(self.next));
        memory.write_obj(self.last, addr).ok()?;
        self.next += 1;
        Some(())
    }
}

fn device<T: Words>(stage: &Stage) -> Result<Box<dyn Device>> {
    let space = GuestMemoryAtomic::new(memory::<Plain>(stage, Layout::apart(1))?);
    Ok(black_box(Box::new(Generic {
        space,
        addresses: addresses::<T>(),
        next: 0,
        last: T::from_word(0),
    })))
}

/// Reads in a device that is generic over its handle to the memory.
pub fn read_obj_device<T: Words>(stage: &Stage) -> Result<Batch> {
    let mut device = device::<T>(stage)?;
    Ok(Batch::of(move |_| device.read()))
}

/// Writes in a device that is generic over its handle to the memory.
pub fn write_obj_device<T: Words>(stage: &Stage) -> Result<Batch> {
    let mut device = device::<T>(stage)?;
    Ok(Batch::of(move |_| device.write()))
}

fn addresses<T>() -> Addresses {
    Layout::apart(1).addresses(size_of::<T>(), size_of::<T>())
}
