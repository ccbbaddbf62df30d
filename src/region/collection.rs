//! [`GuestRegionCollection`]: guest memory as a sorted set of regions.

use std::sync::Arc;

use super::index::RegionIndex;
use super::GuestMemoryRegion;
use crate::guest_memory::{GuestAddress, GuestMemoryBackend, GuestUsize};

/// An error of creating or changing a collection of regions.
#[derive(Debug, thiserror::Error)]
pub enum GuestRegionCollectionError {
    /// The list of regions is empty, or has no region with that address and size.
    #[error("no memory region was passed, or none has that start address and size")]
    NoMemoryRegion,
    /// Two regions overlap.
    #[error("memory regions overlap; move or shrink one of them")]
    MemoryRegionOverlap,
    /// A region starts below its predecessor.
    #[error("memory regions are not sorted by address; sort them by start address")]
    UnsortedMemoryRegions,
}

/// Guest memory that consists of regions, sorted by address, without overlaps.
///
/// A collection is immutable. [`insert_region`](Self::insert_region) and
/// [`remove_region`](Self::remove_region) return a new collection, which shares the regions. To
/// give it to running devices, use [`GuestMemoryAtomic`](crate::GuestMemoryAtomic).
///
/// # Examples
///
/// Hotplug, and removal:
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
#[doc(alias = "memory map")]
#[doc(alias = "hotplug")]
#[derive(Debug)]
pub struct GuestRegionCollection<R> {
    index: RegionIndex<R>,
}

impl<R> Default for GuestRegionCollection<R> {
    fn default() -> Self {
        Self {
            index: RegionIndex::default(),
        }
    }
}

/// The clone shares the regions. Cloning takes the same time for any number of them.
impl<R> Clone for GuestRegionCollection<R> {
    #[inline]
    fn clone(&self) -> Self {
        Self {
            index: self.index.clone(),
        }
    }
}

impl<R: GuestMemoryRegion> GuestRegionCollection<R> {
    /// Creates an empty collection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a collection of regions, which must be sorted by address and must not overlap.
    ///
    /// # Errors
    ///
    /// - [`NoMemoryRegion`](GuestRegionCollectionError::NoMemoryRegion) if `regions` is empty.
    /// - [`UnsortedMemoryRegions`](GuestRegionCollectionError::UnsortedMemoryRegions) if a region
    ///   starts below its predecessor.
    /// - [`MemoryRegionOverlap`](GuestRegionCollectionError::MemoryRegionOverlap) if two overlap.
    pub fn from_regions(regions: Vec<R>) -> Result<Self, GuestRegionCollectionError> {
        Self::from_arc_regions(regions.into_iter().map(Arc::new).collect())
    }

    /// Creates a collection of shared regions, which must be sorted and must not overlap.
    ///
    /// # Errors
    ///
    /// - [`NoMemoryRegion`](GuestRegionCollectionError::NoMemoryRegion) if `regions` is empty.
    /// - [`UnsortedMemoryRegions`](GuestRegionCollectionError::UnsortedMemoryRegions) if a region
    ///   starts below its predecessor.
    /// - [`MemoryRegionOverlap`](GuestRegionCollectionError::MemoryRegionOverlap) if two overlap.
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
            index: RegionIndex::from_sorted(regions),
        })
    }

    /// Returns a collection of these regions and `region`.
    ///
    /// # Errors
    ///
    /// Returns [`MemoryRegionOverlap`](GuestRegionCollectionError::MemoryRegionOverlap) if another
    /// region overlaps `region`.
    pub fn insert_region(
        &self,
        region: Arc<R>,
    ) -> Result<GuestRegionCollection<R>, GuestRegionCollectionError> {
        match self.index.rank_of_new(&region) {
            Some(rank) => Ok(Self {
                index: self.index.inserted(rank, region),
            }),
            None => Err(GuestRegionCollectionError::MemoryRegionOverlap),
        }
    }

    /// Returns a collection without the region of `size` bytes at `base`, and that region.
    ///
    /// # Errors
    ///
    /// Returns [`NoMemoryRegion`](GuestRegionCollectionError::NoMemoryRegion) if no region has
    /// exactly this start and size.
    pub fn remove_region(
        &self,
        base: GuestAddress,
        size: GuestUsize,
    ) -> Result<(GuestRegionCollection<R>, Arc<R>), GuestRegionCollectionError> {
        match self.index.starting_at(base) {
            Some((number, region)) if region.len() == size => {
                let region = Arc::clone(region);
                // Created in place: if the index were returned through memory, copying it would
                // stall.
                if self.index.len() == 1 {
                    return Ok((Self::default(), region));
                }
                let index = self.index.removed(number);
                Ok((Self { index }, region))
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
