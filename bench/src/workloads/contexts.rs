//! Accesses from code that the compiler optimizes differently from a plain loop.

use std::hint::black_box;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use anyhow::Result;

use super::kinds::memory;
use super::vm_memory::bitmap::NewBitmap;
use super::vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryRegion,
};
use crate::comparison::Batch;
use crate::layout::{Addresses, Layout};
use crate::shared_pages::SharedPages;
use crate::values::Words;

/// An access at an address of guest memory.
pub trait Access: 'static {
    /// The number of bytes, which is also their alignment.
    const SIZE: usize;

    fn run<M: GuestMemoryBackend>(memory: &M, addr: GuestAddress, number: u64) -> Option<u64>;
}

/// Defines a type that implements [`Access`].
macro_rules! access {
    (
        $name:ident $(<$value:ident>)?, $size:expr,
        |$memory:ident, $addr:ident, $number:ident| $run:expr
    ) => {
        pub struct $name $(<$value>(PhantomData<$value>))?;

        impl $(<$value: Words>)? Access for $name $(<$value>)? {
            const SIZE: usize = $size;

            #[inline(always)]
            fn run<M: GuestMemoryBackend>(
                $memory: &M,
                $addr: GuestAddress,
                $number: u64,
            ) -> Option<u64> {
                $run
            }
        }
    };
}

access!(FindRegion, 1, |memory, addr, _number| memory
    .find_region(addr)
    .map(|region| region.len()));
access!(ReadObj<T>, size_of::<T>(), |memory, addr, _number| memory
    .read_obj(addr)
    .ok()
    .map(|value: T| value.sum()));
access!(WriteObj<T>, size_of::<T>(), |memory, addr, number| memory
    .write_obj(T::from_word(number), addr)
    .ok()
    .map(|()| 0));
access!(Load, 2, |memory, addr, _number| memory
    .load::<u16>(addr, Ordering::Acquire)
    .ok()
    .map(u64::from));
access!(Store, 8, |memory, addr, number| memory
    .store(number, addr, Ordering::Release)
    .ok()
    .map(|()| 0));
access!(ReadSlice, 64, |memory, addr, _number| {
    let mut bytes = [0; 64];
    memory.read_slice(black_box(&mut bytes), addr).ok()?;
    Some(0)
});

/// Makes accesses in a closure that the loop cannot inline.
pub fn boxed<A: Access, B: NewBitmap + 'static>(
    shared: &SharedPages,
    regions: usize,
) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let (memory, addresses) = (
        memory::<B>(shared, layout)?,
        layout.addresses(A::SIZE, A::SIZE),
    );
    let run: Box<dyn Fn(u64) -> Option<u64>> = black_box(Box::new(move |number| {
        A::run(&memory, GuestAddress(addresses.at(number)), number)
    }));
    Ok(Batch::of(run))
}

/// A device that makes accesses, and works with any kind of handle to the memory.
struct Accesses<S, A> {
    space: S,
    addresses: Addresses,
    next: u64,
    access: PhantomData<A>,
}

/// A device that the loop cannot inline.
trait Accessor {
    fn access(&mut self) -> Option<u64>;
}

impl<S: GuestAddressSpace, A: Access> Accessor for Accesses<S, A>
where
    S::M: GuestMemoryBackend,
{
    fn access(&mut self) -> Option<u64> {
        let memory = self.space.memory();
        let addr = GuestAddress(self.addresses.at(self.next));
        let value = A::run(&*memory, addr, self.next)?;
        self.next += 1;
        Some(value)
    }
}

/// Makes accesses in a device that is generic over its handle to the memory.
pub fn in_device<A: Access, B: NewBitmap + 'static>(
    shared: &SharedPages,
    regions: usize,
) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let mut device: Box<dyn Accessor> = black_box(Box::new(Accesses {
        space: GuestMemoryAtomic::new(memory::<B>(shared, layout)?),
        addresses: layout.addresses(A::SIZE, A::SIZE),
        next: 0,
        access: PhantomData::<A>,
    }));
    Ok(Batch::of(move |_| device.access()))
}
