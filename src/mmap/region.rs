//! [`MmapRegion`]: a mapping of this process, with its dirty bitmap.

use std::any::Any;
use std::io;
use std::sync::Arc;

use super::host_range::HostRange;
use super::owner::Owner;
use super::system::{Attributes, Mapping};
use super::{BlockStates, PluggedBlocks};
use crate::bitmap::{Bitmap, BS};
use crate::guest_memory::FileOffset;
use crate::listeners::RegionNotifier;
use crate::volatile_memory::{self, VolatileMemory, VolatileSlice};

/// A mapping of this process, with a bitmap of the pages that were written.
///
/// It has no guest address; [`GuestRegionMmap`](crate::GuestRegionMmap) adds one. Use
/// [`MmapRegionBuilder`](super::MmapRegionBuilder) for other permissions, existing mappings and
/// plugged blocks.
///
/// Dropping a region unmaps it. A region of an
/// [existing mapping](super::MmapRegionBuilder::with_raw_mmap_pointer) drops its
/// [owner](super::MmapRegionBuilder::with_owner) instead, if it has one.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, MmapRegion, VolatileMemory};
///
/// let region: MmapRegion = MmapRegion::new(0x1000)?;
/// region.as_volatile_slice().write_slice(b"boot", 0x10)?;
/// region.unmap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "mmap")]
#[derive(Debug)]
pub struct MmapRegion<B = ()> {
    pub(super) mapping: Mapping,
    pub(super) bitmap: B,
    pub(super) file_offset: Option<FileOffset>,
    #[cfg_attr(
        windows,
        expect(dead_code, reason = "only mappings by `mmap(2)` have attributes")
    )]
    pub(super) attributes: Attributes,
    /// The blocks that are accessible. `None` if the whole mapping is.
    pub(super) blocks: Option<Arc<PluggedBlocks>>,
    pub(super) notifier: Option<Arc<RegionNotifier>>,
    pub(super) owner: Option<Owner>,
}

impl<B> MmapRegion<B> {
    /// Unmaps the region, and returns the error that dropping it would ignore.
    ///
    /// # Errors
    ///
    /// Returns the error of munmap(2). The addresses then stay mapped until the process ends, and
    /// private pages are freed. It is `ENOMEM` at `vm.max_map_count` (proc_sys_vm(5)), if the
    /// kernel has merged the mapping with its neighbours. Dropping the region also frees the pages.
    /// For granted memory of a Xen guest, it may also be the error of `GNTDEV_UNMAP_GRANT_REF`. On
    /// Windows, it is the error of `VirtualFree` or `UnmapViewOfFile`.
    #[doc(alias = "munmap")]
    pub fn unmap(mut self) -> io::Result<()> {
        self.mapping.unmap()
    }

    /// Returns the host addresses of the mapping.
    pub(super) fn host_range(&self) -> HostRange {
        self.mapping.host()
    }
}

impl<B: Bitmap> MmapRegion<B> {
    /// Returns the host address of the first byte.
    ///
    /// With the feature `xen`, it is null for memory that is mapped for each access.
    ///
    /// Accesses through the pointer are not checked, not marked dirty and not protected from
    /// faults.
    pub fn as_ptr(&self) -> *mut u8 {
        self.host_range().addr()
    }

    /// Returns the size in bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.host_range().size()
    }

    /// Returns the file and the offset in it that the region was built with, if there is one.
    ///
    /// On Unix, the file has the bytes of the region only if the flags contain `MAP_SHARED` and not
    /// `MAP_ANONYMOUS`. With `MAP_PRIVATE`, writes to the region do not reach the file. With
    /// `MAP_ANONYMOUS`, the region never had bytes of the file. Check the flags before you pass the
    /// file to another process as this memory. For an existing mapping, the file and the flags are
    /// those that the caller stated.
    pub fn file_offset(&self) -> Option<&FileOffset> {
        self.file_offset.as_ref()
    }

    /// Returns the owner of the mapping ([`with_owner`](super::MmapRegionBuilder::with_owner)), if
    /// it is a `T`.
    pub fn owner<T: Any>(&self) -> Option<&T> {
        self.owner.as_ref()?.get()
    }

    /// Returns the states of the region's blocks, or `None` if it has no blocks.
    ///
    /// They decide which bytes are accessible.
    pub fn plugged_blocks(&self) -> Option<&BlockStates> {
        self.blocks.as_deref().map(|blocks| &**blocks)
    }

    /// Returns whether all bytes are in plugged blocks, or the region has no blocks.
    ///
    /// The cost does not depend on the number of blocks.
    pub(super) fn is_fully_plugged(&self) -> bool {
        let blocks = self.blocks.as_ref();
        blocks.is_none_or(|blocks| blocks.is_whole() && blocks.size() >= self.size())
    }

    /// Returns whether the memory is mapped in advance, rather than for each access.
    pub(super) fn has_host_address(&self) -> bool {
        self.mapping.on_demand().is_none()
    }

    /// Returns the `count` bytes at `offset`, if they are all in plugged blocks, or mapped for each
    /// access.
    ///
    /// This is the slow path, after [`HostRange::slice`] has returned `None`.
    #[cold]
    #[inline(never)]
    pub(super) fn plugged_slice(
        &self,
        offset: usize,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        #[cfg(feature = "xen")]
        if let Some(memory) = self.mapping.on_demand() {
            return self.on_demand_slice(memory, offset, count);
        }
        let blocks = self.blocks.as_ref()?;
        // Each access by offset asks for the whole region, so this case must not search the blocks.
        let is_plugged = if (offset, count) == (0, self.size()) {
            self.is_fully_plugged()
        } else {
            blocks.is_plugged(offset, count)
        };
        if !is_plugged {
            return None;
        }
        let host = self.host_range().opened();
        // SAFETY: the mapping stays in place while `self` is borrowed. Either it belongs to
        // `self.mapping`, which unmaps it on drop, or clause 2 of `build_raw` or
        // `with_raw_mmap_pointer` demands it.
        unsafe { host.slice(offset, count, || self.bitmap.slice_at(offset)) }
    }

    /// Returns the bytes at `offset`, up to `count`, that are in plugged blocks.
    ///
    /// It loads each state once. So a block that another thread plugs or unplugs is either included
    /// or not, and the bytes before it are included. Returns `None` if the region has no blocks, or
    /// if `offset` is past its end.
    pub(super) fn plugged_part(
        &self,
        offset: usize,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        let blocks = self.blocks.as_ref()?;
        let count = count.min(self.size().checked_sub(offset)?);
        let plugged = blocks.plugged_from(offset, count);
        let host = self.host_range().opened();
        // SAFETY: the mapping stays in place while `self` is borrowed. Either it belongs to
        // `self.mapping`, which unmaps it on drop, or clause 2 of `build_raw` or
        // `with_raw_mmap_pointer` demands it.
        unsafe { host.slice(offset, plugged, || self.bitmap.slice_at(offset)) }
    }

    /// Returns the bitmap of the pages that were written.
    #[inline]
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }
}

impl<B: Bitmap> VolatileMemory for MmapRegion<B> {
    type B = B;

    #[inline]
    fn len(&self) -> usize {
        self.host_range().size()
    }

    #[inline]
    fn get_slice(
        &self,
        offset: usize,
        count: usize,
    ) -> volatile_memory::Result<VolatileSlice<'_, BS<'_, B>>> {
        let bitmap = || self.bitmap.slice_at(offset);
        // SAFETY: the mapping stays in place while `self` is borrowed. Either it belongs to
        // `self.mapping`, which unmaps it on drop, or clause 2 of `build_raw` or
        // `with_raw_mmap_pointer` demands it.
        let slice = unsafe { self.host_range().slice(offset, count, bitmap) };
        match slice.or_else(|| self.plugged_slice(offset, count)) {
            Some(slice) => Ok(slice),
            // The range overflows, ends past the mapping, or is not plugged.
            None => {
                let addr = self.compute_end_offset(offset, count)?;
                Err(volatile_memory::Error::OutOfBounds { addr })
            }
        }
    }

    /// Returns all bytes of the region, or no bytes if any block of it is not plugged.
    ///
    /// The guest decides which blocks are plugged, so this must not panic.
    fn as_volatile_slice(&self) -> VolatileSlice<'_, BS<'_, B>> {
        match self.get_slice(0, self.len()) {
            Ok(slice) => slice,
            Err(_) => {
                let bitmap = self.bitmap.slice_at(0);
                // SAFETY: the slice has 0 bytes, so no byte needs to be mapped or free of
                // references.
                unsafe { VolatileSlice::with_bitmap(self.as_ptr(), 0, bitmap, None) }
            }
        }
    }
}
