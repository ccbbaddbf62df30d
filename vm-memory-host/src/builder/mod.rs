//! [`MemoryBuilder`]: builds guest memory from a list of regions.
//!
//! A build has three phases, and the first error ends it:
//!
//! 1. `files` creates or checks the file of each region. `check`, `needed` and `shared_bytes`
//!    compare the request with the resources of the host. Nothing is mapped yet.
//! 2. `map` maps the regions and applies their options. On Linux, a run of adjacent regions is one
//!    reservation.
//! 3. Pages are populated and locked, and each mapping becomes a region of vm-memory.

mod blocks;
mod check;
#[cfg(target_os = "linux")]
mod linux;
mod shared_bytes;
#[cfg(windows)]
mod windows;

#[cfg(target_os = "linux")]
pub(crate) use check::MAX_FILE_LENGTH;
/// The steps of a build on this system.
#[cfg(target_os = "linux")]
use linux as system;
#[cfg(target_os = "linux")]
pub(crate) use linux::{check_layout, ReceivedFiles};
#[cfg(windows)]
use windows as system;

use std::collections::TryReserveError;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::error::BuildError;
use crate::host::HostResources;
use crate::mapping::HostMapping;
use crate::operations::Progress;
use crate::region::Region;

/// The callback that receives the progress of a prefault and may cancel it.
type Callback = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

/// A builder of guest memory.
///
/// The builder checks the whole request before it maps anything. If the host cannot provide a
/// region, the error names the region, the request, the limit and a remedy. The reason of the
/// system is the error's [`source`](std::error::Error::source). A failed build leaves nothing
/// mapped, except addresses that [`still_mapped`](crate::still_mapped) counts. Space that it has
/// allocated for a [file](Region::sparse) stays allocated.
///
/// On Linux, regions that are adjacent in guest memory are adjacent in this process, in one
/// reservation with an inaccessible guard page on both sides. If a region can have huge pages, host
/// addresses equal guest addresses modulo their size, so that KVM can map huge pages for the guest.
/// [`HostMapping::host_address`] has the details.
///
/// ```text
///   guest   0x0            0x4000_0000      0x1_0000_0000
///           ├── region 1 ──┼── region 2 ──┤       ├── region 3 ──┤
///   host  ▒ ├── region 1 ──┼── region 2 ──┤ ▒   ▒ ├── region 3 ──┤ ▒      ▒ guard, PROT_NONE
/// ```
///
/// A process that has called mlockall(2) with `MCL_FUTURE` populates and locks all of each region
/// during the build, also unplugged blocks. The build checks that this memory is available. A later
/// [`plug`](crate::plug()) of a protected block populates it again, without a check. Use
/// `MCL_ONFAULT` to populate nothing.
///
/// The [crate documentation](crate#system-calls) lists the system calls of a build.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{Backing, MemoryBuilder, Region, TransparentHugePages};
///
/// let low = Region::new(GuestAddress(0), 32 << 20).backing(Backing::Memfd).name("low");
/// let high = Region::new(GuestAddress(1 << 32), 64 << 20)
///     .transparent_huge_pages(TransparentHugePages::On);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(low).region(high).build()?;
/// memory.write_obj(0x55aau16, GuestAddress(0x1fe))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Errors name a remedy:
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 0x1001);
/// let error = MemoryBuilder::new().region(region).build::<()>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "region 0x0-0x1000: size 0x1001 is not a multiple of the page size, 0x1000; align it"
/// );
/// ```
#[derive(Default)]
#[doc(alias = "hostmem")]
#[doc(alias = "memory-backend")]
#[must_use = "call build() to map the memory"]
pub struct MemoryBuilder {
    regions: system::Requested,
    host: Option<HostResources>,
    allows_shared_bytes: bool,
    prefault: Option<(NonZeroUsize, Callback)>,
}

impl std::fmt::Debug for MemoryBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryBuilder")
            .field("regions", &self.regions.0)
            .finish_non_exhaustive()
    }
}

impl MemoryBuilder {
    /// Creates a builder without regions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a region. Regions may be added in any order.
    pub fn region(mut self, region: Region) -> Self {
        self.regions.0.push(region);
        self
    }

    /// Changes each region that was added before this call.
    ///
    /// Use it for options that all regions have in common. Add regions that differ afterwards.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, MemoryBuilder, Region};
    ///
    /// let memory: GuestMemoryMmap = MemoryBuilder::new()
    ///     .region(Region::new(GuestAddress(0), 16 << 20))
    ///     .region(Region::new(GuestAddress(1 << 32), 64 << 20))
    ///     .each_region(|region| region.backing(Backing::Memfd).core_dump(false))
    ///     .build()?;
    /// # Ok::<(), vm_memory_host::BuildError>(())
    /// ```
    #[doc(alias = "defaults")]
    pub fn each_region(mut self, change: impl FnMut(Region) -> Region) -> Self {
        let regions = std::mem::take(&mut self.regions.0);
        self.regions.0 = regions.into_iter().map(change).collect();
        self
    }

    /// Sets whether two regions may map the same bytes of a file. The default is `false`.
    ///
    /// A write to one region then changes the other, but marks only the written address dirty. A
    /// migration would lose the change of the other. Two descriptors of one file are recognised,
    /// and ranges that overlap in part are refused. Private mappings may have bytes in common with
    /// each other.
    ///
    /// The check covers the regions of one builder. It does not find bytes that two builds have in
    /// common, even if their regions join one map ([hotplug](crate#model)).
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, MemoryBuilder, Region};
    ///
    /// let file = tempfile::tempfile()?;
    /// file.set_len(1 << 20)?;
    /// let region = |start, file| {
    ///     Region::new(GuestAddress(start), 1 << 20).backing(Backing::shared_file(file, 0))
    /// };
    /// let builder = || -> std::io::Result<MemoryBuilder> {
    ///     let (one, other) = (region(0, file.try_clone()?), region(1 << 32, file.try_clone()?));
    ///     Ok(MemoryBuilder::new().region(one).region(other))
    /// };
    /// assert!(builder()?.build::<()>().is_err());
    /// let memory: GuestMemoryMmap = builder()?.allow_shared_bytes(true).build()?;
    /// memory.write_obj(7u8, GuestAddress(0))?;
    /// assert_eq!(memory.read_obj::<u8>(GuestAddress(1 << 32))?, 7);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "alias")]
    pub fn allow_shared_bytes(self, allow: bool) -> Self {
        Self {
            allows_shared_bytes: allow,
            ..self
        }
    }

    /// Populates all pages during the build, with `threads` threads.
    ///
    /// The builder calls `progress` after each step. [`ControlFlow::Break`] cancels the build. See
    /// [`prefault`](crate::prefault()) for which pages are populated and how.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use std::ops::ControlFlow;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{residency, MemoryBuilder, Region};
    ///
    /// let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new()
    ///     .region(Region::new(GuestAddress(0), 64 << 20))
    ///     .prefault(threads, |progress| {
    ///         eprint!("\r{} of {} MiB", progress.done >> 20, progress.total >> 20);
    ///         ControlFlow::Continue(())
    ///     })
    ///     .build()?;
    /// assert_eq!(residency(&memory)?[0].1.resident, 64 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "prealloc")]
    #[doc(alias = "populate")]
    pub fn prefault<F>(self, threads: NonZeroUsize, progress: F) -> Self
    where
        F: FnMut(Progress) -> ControlFlow<()> + Send + 'static,
    {
        Self {
            prefault: Some((threads, Box::new(progress))),
            ..self
        }
    }

    /// Builds the memory, with a dirty bitmap of the host's page size for each region.
    ///
    /// # Errors
    ///
    /// Returns a [`BuildError`] if
    ///
    /// - no region was added, or regions are empty, overlap, are not aligned, or do not fit the
    ///   guest's address space;
    /// - an option contradicts a region's backing, or its blocks need the fault handler
    ///   ([`Region::blocks`]);
    /// - two regions map the same bytes of a file
    ///   ([`allow_shared_bytes`](Self::allow_shared_bytes));
    /// - the host lacks huge pages, NUMA nodes, memory, file space or addresses;
    /// - memory for a dirty bitmap cannot be allocated;
    /// - the system refuses a call; or
    /// - the callback of [`prefault`](Self::prefault) returns [`ControlFlow::Break`] before all
    ///   pages are populated.
    pub fn build<B: NewBitmap>(self) -> Result<GuestMemoryMmap<B>, BuildError> {
        let regions = self.build_regions()?;
        Ok(GuestMemoryMmap::from_regions(regions)?)
    }

    /// Builds the regions, in the order of their addresses, without a map.
    ///
    /// Use it to add regions to an existing map, or to put each into a region type of the VMM
    /// ([`HostMapped`](crate::HostMapped) has an example). [`Region::build`] builds one region.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};
    /// use vm_memory_host::{MemoryBuilder, Region};
    ///
    /// let region = |start| Region::new(GuestAddress(start), 16 << 20);
    /// let builder = MemoryBuilder::new().region(region(1 << 32)).region(region(0));
    /// let regions: Vec<GuestRegionMmap> = builder.build_regions()?;
    /// assert_eq!(regions[1].start_addr(), GuestAddress(1 << 32));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns a [`BuildError`] under the conditions that [`build`](Self::build) lists.
    pub fn build_regions<B: NewBitmap>(self) -> Result<Vec<GuestRegionMmap<B>>, BuildError> {
        self.build_with_results(|_, size| B::try_with_len(size))
    }

    /// Builds the regions as [`build_regions`](Self::build_regions) does, with a bitmap from
    /// `bitmap` for each.
    ///
    /// `bitmap` receives the guest address of the region and its size in bytes.
    ///
    /// # Examples
    ///
    /// Track dirty memory by blocks of 64 KiB:
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{MemoryBuilder, Region};
    ///
    /// let granularity = NonZeroUsize::new(64 << 10).unwrap();
    /// let regions = MemoryBuilder::new()
    ///     .region(Region::new(GuestAddress(0), 16 << 20))
    ///     .build_regions_with_bitmaps(|_start, size| AtomicBitmap::new(size, granularity))?;
    /// let memory = GuestMemoryMmap::from_regions(regions)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Bitmaps that are parts of one log, which begins at guest address 0:
    ///
    /// ```
    /// use vm_memory::GuestAddress;
    /// use vm_memory_host::{MemoryBuilder, Region};
    ///
    /// let region = |start, size| Region::new(GuestAddress(start), size);
    /// let (low, high) = (region(0, 2 << 20), region(1 << 32, 4 << 20));
    /// let builder = MemoryBuilder::new().region(high).region(low);
    /// let mut words = Vec::new();
    /// builder.build_regions_with_bitmaps(|start, size| {
    ///     // One bit for each page of 4 KiB.
    ///     words.push((start.0 >> 18, size >> 18));
    /// })?;
    /// assert_eq!(words, [(0, 8), (0x4000, 16)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns a [`BuildError`] under the conditions that [`build`](Self::build) lists.
    pub fn build_regions_with_bitmaps<B: Bitmap>(
        self,
        mut bitmap: impl FnMut(GuestAddress, usize) -> B,
    ) -> Result<Vec<GuestRegionMmap<B>>, BuildError> {
        self.build_with_results(|start, size| Ok(bitmap(start, size)))
    }

    fn build_with_results<B: Bitmap>(
        self,
        mut bitmap: impl FnMut(GuestAddress, usize) -> Result<B, TryReserveError>,
    ) -> Result<Vec<GuestRegionMmap<B>>, BuildError> {
        // Its files are closed after the regions that use them, whatever fails below.
        let built = system::build(self)?;
        built
            .mappings
            .iter()
            .map(|mapping| guest_region(mapping, &mut bitmap))
            .collect()
    }
}

impl Region {
    /// Builds this region alone, with a dirty bitmap of the host's page size.
    ///
    /// Use one [`MemoryBuilder`] for several regions that are adjacent, or that need much memory
    /// together.
    ///
    /// # Examples
    ///
    /// Adds a memory module to a map that is in use:
    ///
    /// ```
    /// use std::sync::Arc;
    /// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
    /// use vm_memory_host::Region;
    ///
    /// let boot = Region::new(GuestAddress(0), 16 << 20).build()?;
    /// let map = GuestMemoryMmap::<()>::from_regions(vec![boot])?;
    /// let memory = GuestMemoryAtomic::new(map);
    ///
    /// let module = Region::new(GuestAddress(1 << 32), 16 << 20).build()?;
    /// memory.update(|map| map.insert_region(Arc::new(module)))?;
    /// memory.memory().write_obj(1u8, GuestAddress(1 << 32))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns a [`BuildError`] under the conditions that [`MemoryBuilder::build`] lists.
    pub fn build<B: NewBitmap>(self) -> Result<GuestRegionMmap<B>, BuildError> {
        let regions = MemoryBuilder::new().region(self).build_regions()?;
        regions.into_iter().next().ok_or(BuildError::NoRegion)
    }
}

/// Creates the vm-memory region of a mapping.
fn guest_region<B: Bitmap>(
    mapping: &Arc<HostMapping>,
    bitmap: &mut impl FnMut(GuestAddress, usize) -> Result<B, TryReserveError>,
) -> Result<GuestRegionMmap<B>, BuildError> {
    let span = mapping.span();
    let bitmap = bitmap(mapping.start, mapping.mapped().len());
    let bitmap = bitmap.map_err(|source| BuildError::Bitmap {
        region: span,
        source,
    })?;
    let region = mapping
        .mmap_region(bitmap)
        .map_err(|source| BuildError::Region {
            region: span,
            source,
        })?;
    GuestRegionMmap::new(region, mapping.start).ok_or(BuildError::PastTop {
        start: span.start,
        size: span.size,
    })
}
