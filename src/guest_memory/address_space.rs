//! [`GuestAddressSpace`]: the source of the current memory map. [`IntoMap`]: a share of a map.

use core::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use super::GuestMemory;

/// A source of the current memory map.
///
/// A device that outlives a memory map keeps one of these and requests the map for each operation.
/// A reference, an `Rc` or an `Arc` of a map always returns that map.
/// [`GuestMemoryAtomic`](crate::GuestMemoryAtomic) replaces maps while devices run.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::Arc;
/// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
///
/// struct Device<S: GuestAddressSpace> {
///     space: S,
/// }
///
/// impl<S: GuestAddressSpace> Device<S> {
///     fn first_byte(&self) -> Option<u8> {
///         self.space.memory().read_obj(GuestAddress(0)).ok()
///     }
/// }
///
/// let map: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// assert_eq!(Device { space: Arc::new(map) }.first_byte(), Some(0));
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "hotplug")]
pub trait GuestAddressSpace: Clone {
    /// The memory.
    type M: GuestMemory;

    /// A guard that keeps a map alive.
    type T: Clone + Deref<Target = Self::M>;

    /// Returns the current map. It does not change while the guard exists.
    fn memory(&self) -> Self::T;
}

impl<M: GuestMemory> GuestAddressSpace for &M {
    type M = M;
    type T = Self;

    fn memory(&self) -> Self {
        self
    }
}

impl<M: GuestMemory> GuestAddressSpace for Rc<M> {
    type M = M;
    type T = Self;

    fn memory(&self) -> Self {
        self.clone()
    }
}

impl<M: GuestMemory> GuestAddressSpace for Arc<M> {
    type M = M;
    type T = Self;

    fn memory(&self) -> Self {
        self.clone()
    }
}

/// A share of a memory map that a request can keep: an `Arc`, or a guard of the current map.
///
/// [`IoBuffer::new`](crate::vectored::IoBuffer::new) takes a share. A reference to an `Arc` or to a
/// guard is also a share: it is cloned. A device that is generic over its [`GuestAddressSpace`]
/// requires that the guard is a share, as in the example.
///
/// # Examples
///
/// ```
/// # #[cfg(all(unix, feature = "rawfd", feature = "backend-mmap", feature = "backend-atomic"))] {
/// use vm_memory::guest_memory::IntoMap;
/// use vm_memory::vectored::IoBuffer;
/// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
/// use vm_memory::{GuestMemoryResult, Permissions};
///
/// fn request<S>(space: &S, addr: GuestAddress) -> GuestMemoryResult<IoBuffer<S::M>>
/// where
///     S: GuestAddressSpace<T: IntoMap<M = S::M>, M: 'static>,
/// {
///     let mut buffer = IoBuffer::new(space.memory(), Permissions::Write);
///     buffer.push(addr, 0x200)?;
///     Ok(buffer)
/// }
///
/// let map: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let memory = GuestMemoryAtomic::new(map);
/// assert_eq!(request(&memory, GuestAddress(0x800))?.len(), 0x200);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait IntoMap {
    /// The memory.
    type M: GuestMemory;

    /// Returns the map.
    fn into_map(self) -> Arc<Self::M>;
}

impl<M: GuestMemory> IntoMap for Arc<M> {
    type M = M;

    #[inline]
    fn into_map(self) -> Arc<M> {
        self
    }
}

impl<M: GuestMemory> IntoMap for &Arc<M> {
    type M = M;

    #[inline]
    fn into_map(self) -> Arc<M> {
        Arc::clone(self)
    }
}
