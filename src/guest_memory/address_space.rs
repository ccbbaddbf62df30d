//! [`GuestAddressSpace`]: where a device gets its memory map from.

use core::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use super::GuestMemory;

/// What gives out the memory map of the moment.
///
/// A device that runs for long keeps one of these rather than a map: regions come and go. A reference or a counted pointer to
/// a map that never changes is the simplest; [`GuestMemoryAtomic`](crate::GuestMemoryAtomic) swaps maps.
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
pub trait GuestAddressSpace: Clone {
    /// The kind of memory.
    type M: GuestMemory;

    /// What keeps a map alive while it is used.
    type T: Clone + Deref<Target = Self::M>;

    /// Returns the map of this moment. It stays as it is for as long as the result is kept.
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
