//! Windows that notice when the map is replaced.

use std::sync::Arc;

use super::GuestMemoryAtomic;
use crate::guest_memory::{GuestAddress, GuestMemory, Permissions, Result, SeenGeneration, Window};

impl<M: GuestMemory + Send + Sync + 'static> GuestMemoryAtomic<M> {
    /// Returns the `len` bytes at `addr` as a window, which a device can keep.
    ///
    /// It keeps the current map, as a guard does. [`Window::is_current`] returns `false` once
    /// another map is current, and [`Window::refresh`] moves the window there.
    ///
    /// # Examples
    ///
    /// See [`Window::refresh`].
    ///
    /// # Errors
    ///
    /// Returns the errors of [`GuestMemory::window`].
    #[doc(alias = "MemoryRegionCache")]
    #[doc(alias = "virtqueue")]
    pub fn window(
        &self,
        addr: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<Window<'static, M>> {
        let memory = self.clone();
        Window::from_source(Box::new(move || memory.map_and_state()), addr, len, access)
    }

    /// Returns the current map, and a state that is not newer.
    fn map_and_state(&self) -> (Arc<M>, SeenGeneration) {
        // The order matters: a map that is replaced after this line is not current.
        let seen = self.writers.generation.now();
        (self.map.load_full(), seen)
    }
}
