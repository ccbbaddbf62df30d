//! The region of vm-memory that lies on a [`HostMapping`], and the way back from one to the other.

use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::HostMapping;
use crate::error::NotProvisioned;
use crate::region::{BackingKind, Span};

/// Returns what is known of the memory behind a region.
///
/// # Errors
///
/// If this crate did not make it.
pub fn provisioned<B: Bitmap>(region: &GuestRegionMmap<B>) -> Result<&HostMapping, NotProvisioned> {
    let span = span_of(region);
    region.owner().ok_or(NotProvisioned { region: span })
}

/// Where a region is in the map that has it.
pub(crate) fn span_of<B: Bitmap>(region: &GuestRegionMmap<B>) -> Span {
    Span {
        start: region.start_addr().0,
        size: region.len(),
    }
}

impl HostMapping {
    /// Makes a region of vm-memory of the whole mapping. The region keeps the mapping.
    pub(crate) fn mmap_region<B: Bitmap>(
        self: &Arc<Self>,
        bitmap: B,
    ) -> Result<MmapRegion<B>, MmapRegionError> {
        let sharing = match self.backing.is_shared() {
            true => libc::MAP_SHARED,
            false => libc::MAP_PRIVATE,
        };
        let anonymous = match self.backing.file {
            Some(_) => 0,
            None => libc::MAP_ANONYMOUS,
        };
        let mut builder = MmapRegionBuilder::new_with_bitmap(self.mapped.len(), bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | anonymous | libc::MAP_NORESERVE)
            .with_hugetlbfs(self.backing.kind == BackingKind::Hugetlb)
            .with_owner(Arc::clone(self));
        if let Some((file, offset)) = &self.backing.file {
            builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), *offset));
        }
        if let Some(blocks) = self.plugged_blocks() {
            builder = builder.with_plugged_blocks(Arc::clone(blocks));
        }
        // SAFETY: the contract of `with_raw_mmap_pointer`, clause by clause.
        // 1. Size and protection: the region is made with the length of `mapped`, which
        //    `Reserved::map` maps readable and writable. `Mapped::protect` takes that away only
        //    from blocks that `PluggedBlocks`, which the region has too, lets no access reach.
        // 2. In place until the region and its slices are gone: the region keeps `self`, which
        //    owns `mapped`, and only the drop of `mapped` unmaps it. Nothing moves it out:
        //    `HostMapping` lends it by shared reference only, and `splice_over` changes pages,
        //    not the mapping's place or protection.
        // 3. No Rust reference: `sys` hands out no reference to the bytes, and reads or writes
        //    them by `VolatileSlice` and system calls only.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.mapped.addr()) };
        builder.build()
    }
}
