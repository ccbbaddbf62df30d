//! The vm-memory region over a [`HostMapping`], and the way back: [`HostMapped`], [`provisioned`].

use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::{to_u64, HostMapping};
use crate::error::{NotProvisioned, OtherProcess};
use crate::region::Span;

/// A region type whose memory this crate may have built.
///
/// The functions of this crate accept guest memory with regions of such a type. A VMM implements
/// the trait for its own region type, and gets the memory of each region from
/// [`MemoryBuilder::build_regions`](crate::MemoryBuilder::build_regions).
///
/// The type must also return [`HostMapping::notifier`] from `GuestMemoryRegion::notifier`.
/// Otherwise, listeners of a memory with the region are not told of plugs, unplugs and discards.
///
/// Returning the mapping of another region is safe, but the functions then discard or populate the
/// pages of that region.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::bitmap::{Bitmap, BS};
/// use vm_memory::listeners::RegionNotifier;
/// use vm_memory::{
///     Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
///     GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress, VolatileSlice,
/// };
/// use vm_memory_host::{discard, HostMapped, HostMapping, Region};
///
/// /// A region with its KVM slot.
/// struct SlotRegion {
///     inner: GuestRegionMmap,
///     slot: u32,
/// }
///
/// impl HostMapped for SlotRegion {
///     fn host_mapping(&self) -> Option<&HostMapping> {
///         self.inner.host_mapping()
///     }
/// }
///
/// impl GuestMemoryRegion for SlotRegion {
///     type B = <GuestRegionMmap as GuestMemoryRegion>::B;
///
///     fn len(&self) -> GuestUsize {
///         self.inner.len()
///     }
///
///     fn start_addr(&self) -> GuestAddress {
///         self.inner.start_addr()
///     }
///
///     fn bitmap(&self) -> BS<'_, Self::B> {
///         self.inner.bitmap()
///     }
///
///     fn get_slice(
///         &self,
///         offset: MemoryRegionAddress,
///         count: usize,
///     ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>, GuestMemoryError> {
///         self.inner.get_slice(offset, count)
///     }
///
///     fn notifier(&self) -> Option<&Arc<RegionNotifier>> {
///         self.inner.notifier()
///     }
/// }
///
/// impl GuestMemoryRegionBytes for SlotRegion {}
///
/// let inner = Region::new(GuestAddress(0), 1 << 20).build()?;
/// let memory = GuestRegionCollection::from_regions(vec![SlotRegion { inner, slot: 0 }])?;
/// memory.write_obj(7u8, GuestAddress(0x3000))?;
/// discard(&memory, GuestAddress(0x3000), 0x1000)?;
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000))?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait HostMapped: GuestMemoryRegion {
    /// Returns the mapping of the whole region, or `None` if this crate did not build the region.
    ///
    /// A mapping of another length than the region counts as `None`.
    fn host_mapping(&self) -> Option<&HostMapping>;
}

impl<B: Bitmap> HostMapped for GuestRegionMmap<B> {
    fn host_mapping(&self) -> Option<&HostMapping> {
        self.owner()
    }
}

/// Returns the mapping of a region.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
/// use vm_memory_host::{provisioned, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// for region in memory.iter() {
///     println!("{} at {:#x}", provisioned(region)?.span(), provisioned(region)?.host_address());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns [`NotProvisioned`] if the region was not built by
/// [`MemoryBuilder`](crate::MemoryBuilder).
pub fn provisioned<R: HostMapped>(region: &R) -> Result<&HostMapping, NotProvisioned> {
    let has_all = |mapping: &&HostMapping| to_u64(mapping.mapped.len()) == region.len();
    let mapping = region.host_mapping().filter(has_all);
    mapping.ok_or(NotProvisioned {
        region: span_of(region),
    })
}

/// Returns the mapping of a region for an operation on its memory.
///
/// All operations get their mappings from this function. It refuses those of the parent process: a
/// child of fork(2) may have other memory at their addresses, but shares their file and its pages.
pub(crate) fn usable<R, E>(region: &R) -> Result<&HostMapping, E>
where
    R: HostMapped,
    E: From<NotProvisioned> + From<OtherProcess>,
{
    let mapping = provisioned(region)?;
    match mapping.mapped.check_here() {
        Ok(()) => Ok(mapping),
        Err(_) => Err(E::from(OtherProcess {
            region: span_of(region),
        })),
    }
}

/// Returns the guest addresses of a region in its map.
pub(crate) fn span_of<R: GuestMemoryRegion>(region: &R) -> Span {
    Span {
        start: region.start_addr().0,
        size: region.len(),
    }
}

impl HostMapping {
    /// Creates a vm-memory region over the whole mapping. The region keeps the mapping alive.
    pub(crate) fn mmap_region<B: Bitmap>(
        self: &Arc<Self>,
        bitmap: B,
    ) -> Result<MmapRegion<B>, MmapRegionError> {
        let builder = MmapRegionBuilder::new_with_bitmap(self.mapped.len(), bitmap);
        let mut builder = self.describe_to(builder).with_owner(Arc::clone(self));
        builder = builder.with_notifier(Arc::clone(&self.notifier));
        if let Some((file, offset)) = &self.backing.file {
            builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), *offset));
        }
        if let Some((_, blocks)) = &self.blocks {
            builder = builder.with_plugged_blocks(Arc::clone(blocks));
        }
        // SAFETY: the contract of `with_raw_mmap_pointer`, clause by clause.
        // 1. Size and protection: the region has the length of `mapped`. `map_source` has mapped it
        //    readable, and writable unless the options say read-only (invariant of `Mapped`). This
        //    does not hold for blocks that `protect` has made inaccessible. `plug` and `unplug`
        //    keep those unplugged in the region's record, which nothing else can change: only this
        //    crate has the `PluggedBlocks` in `blocks`. On Windows, unplugged blocks are not
        //    committed. There, `discard` also makes pages inaccessible while it runs, and after a
        //    failure until the next one. The clause permits both.
        // 2. In place until the region and its slices are gone: the region keeps an `Arc` of
        //    `self`, which owns `mapped`. Only the drop of `mapped` unmaps it. While that `Arc`
        //    exists, nothing gets `&mut HostMapping`, so `mapped` cannot be moved out or replaced.
        // 3. No Rust reference covers it (invariant of `Mapped`).
        let builder = unsafe { builder.with_raw_mmap_pointer(self.mapped.addr()) };
        builder.build()
    }
}
