//! [`GuestRegionCollection`]: the regions of a guest, sorted by address.

use std::sync::Arc;

use super::index::{Entry, RegionIndex};
use super::GuestMemoryRegion;
use crate::guest_memory::{GuestAddress, GuestMemoryBackend, GuestUsize};

/// Why regions do not make a collection.
#[derive(Debug, thiserror::Error)]
pub enum GuestRegionCollectionError {
    /// There is no region, or none that is the one asked for.
    #[error("there is no such memory region")]
    NoMemoryRegion,
    /// Two regions have an address in common.
    #[error("memory regions overlap")]
    MemoryRegionOverlap,
    /// A region begins below the one before it.
    #[error("memory regions are not sorted by address")]
    UnsortedMemoryRegions,
}

/// Regions of guest memory, sorted by address, that do not overlap.
///
/// A collection does not change: [`insert_region`](Self::insert_region) and [`remove_region`](Self::remove_region) make another one, which
/// shares the regions. [`GuestMemoryAtomic`](crate::GuestMemoryAtomic) hands it to devices that are running.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let more = GuestRegionMmap::from_range(GuestAddress(0x2000), 0x1000, None)?;
/// let both = memory.insert_region(Arc::new(more))?;
/// assert_eq!((memory.num_regions(), both.num_regions()), (1, 2));
/// let (one, removed) = both.remove_region(GuestAddress(0), 0x1000)?;
/// assert_eq!(one.num_regions(), 1);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestRegionCollection<R> {
    index: RegionIndex<R>,
}

/// A collection without regions.
impl<R> Default for GuestRegionCollection<R> {
    fn default() -> Self {
        Self {
            index: RegionIndex::default(),
        }
    }
}

/// A second collection of the same regions; their memory is shared.
impl<R> Clone for GuestRegionCollection<R> {
    fn clone(&self) -> Self {
        Self {
            index: self.index.clone(),
        }
    }
}

impl<R: GuestMemoryRegion> GuestRegionCollection<R> {
    /// Makes a collection without regions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a collection of regions, which must be sorted by address and not overlap.
    ///
    /// # Errors
    ///
    /// If there is no region, they are not sorted, or two overlap.
    pub fn from_regions(regions: Vec<R>) -> Result<Self, GuestRegionCollectionError> {
        Self::from_arc_regions(regions.into_iter().map(Arc::new).collect())
    }

    /// Makes a collection of regions that others share, which must be sorted by address and not overlap.
    ///
    /// # Errors
    ///
    /// If there is no region, they are not sorted, or two overlap.
    pub fn from_arc_regions(regions: Vec<Arc<R>>) -> Result<Self, GuestRegionCollectionError> {
        if regions.is_empty() {
            return Err(GuestRegionCollectionError::NoMemoryRegion);
        }
        for (one, next) in regions.iter().zip(regions.iter().skip(1)) {
            if one.start_addr() > next.start_addr() {
                return Err(GuestRegionCollectionError::UnsortedMemoryRegions);
            }
            if one.last_addr() >= next.start_addr() {
                return Err(GuestRegionCollectionError::MemoryRegionOverlap);
            }
        }
        Ok(Self {
            index: RegionIndex::from_sorted(regions.into_iter().map(Entry::new).collect()),
        })
    }

    /// Returns the collection with one more region.
    ///
    /// # Errors
    ///
    /// If it overlaps one that is there.
    pub fn insert_region(
        &self,
        region: Arc<R>,
    ) -> Result<GuestRegionCollection<R>, GuestRegionCollectionError> {
        let new = Entry::new(region);
        match self.index.rank_of_new(&new) {
            Some(rank) => Ok(Self {
                index: self.index.inserted(rank, new),
            }),
            None => Err(GuestRegionCollectionError::MemoryRegionOverlap),
        }
    }

    /// Returns the collection without the region that begins at `base` and is `size` bytes long, and that region.
    ///
    /// # Errors
    ///
    /// If there is no region of exactly that place and size.
    pub fn remove_region(
        &self,
        base: GuestAddress,
        size: GuestUsize,
    ) -> Result<(GuestRegionCollection<R>, Arc<R>), GuestRegionCollectionError> {
        match self.index.starting_at(base) {
            Some((number, region)) if region.len() == size => {
                let index = self.index.removed(number);
                Ok((Self { index }, Arc::clone(region)))
            }
            _ => Err(GuestRegionCollectionError::NoMemoryRegion),
        }
    }
}

impl<R: GuestMemoryRegion> GuestMemoryBackend for GuestRegionCollection<R> {
    type R = R;

    #[inline]
    fn num_regions(&self) -> usize {
        self.index.len()
    }

    #[inline(always)]
    fn find_region(&self, addr: GuestAddress) -> Option<&R> {
        self.index.find(addr)
    }

    fn iter(&self) -> impl Iterator<Item = &R> {
        self.index.regions()
    }

    #[inline(always)]
    fn regions_from(&self, addr: GuestAddress) -> impl Iterator<Item = &R> {
        self.index.find_run(addr)
    }
}
