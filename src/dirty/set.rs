//! [`DirtyMemory`] as a set: ranges of guest addresses, and operations on two sets.

use core::num::NonZeroUsize;
use core::ops::Range;

use super::region::DirtyRegion;
use super::{reached, DirtyMemory};
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::GuestAddress;

impl DirtyMemory {
    /// Adds the pages of the `len` bytes at `addr`. Bytes outside the regions are ignored.
    ///
    /// A page that is only partly in the range is added as a whole. The set has the regions of the
    /// last [harvest](Self::harvest), [`add_log`](Self::add_log) or
    /// [`try_reserve`](Self::try_reserve). A new set has no regions, so the call adds nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)];
    /// let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&ranges)?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// dirty.insert_range(GuestAddress(0x3800), 0x5000);
    /// let runs: Vec<_> = dirty.runs().map(|(start, len)| (start.0, len)).collect();
    /// assert_eq!(runs, [(0x3000, 0x1000), (0x8000, 0x1000)]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn insert_range(&mut self, addr: GuestAddress, len: u64) {
        if let Some(last) = last_of(addr, len) {
            for region in reached(&mut self.regions, addr.0, last) {
                region.add(addr.0, last);
            }
        }
    }

    /// Adds all pages of all regions, for the first copy of a migration or a full snapshot.
    ///
    /// [Harvest](Self::harvest) before this call. The set then has the regions of the memory, and
    /// [`runs`](Self::runs) omits the bytes that cannot be read.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x4000)])?;
    /// DirtyMemory::set_tracking(&memory, true);
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// dirty.insert_all();
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x1000), 0x4000)]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn insert_all(&mut self) {
        for region in &mut self.regions {
            region.pages.insert_range(0, region.pages.byte_size());
        }
    }

    /// Removes the pages that are entirely in the `len` bytes at `addr`.
    ///
    /// A page that is only partly in the range stays, because its other part may be dirty. The last
    /// page of a region ends with the region.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// dirty.insert_all();
    /// // The balloon took these bytes.
    /// dirty.remove_range(GuestAddress(0x1800), 0x1800);
    /// let runs: Vec<_> = dirty.runs().map(|(start, len)| (start.0, len)).collect();
    /// assert_eq!(runs, [(0, 0x2000), (0x3000, 0x1000)]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn remove_range(&mut self, addr: GuestAddress, len: u64) {
        if let Some(last) = last_of(addr, len) {
            for region in reached(&mut self.regions, addr.0, last) {
                region.remove(addr.0, last);
            }
        }
    }

    /// Adds the pages that `other` covers, completely or partly.
    ///
    /// The sets may be for different memories. Their pages are matched by guest address. Pages of
    /// `other` outside the regions of this set are ignored. To keep them,
    /// [harvest](Self::harvest) the newer memory into this set before this call.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// let mut unsent = dirty.clone();
    /// unsent.insert_range(GuestAddress(0x1000), 0x2000);
    /// dirty.insert_range(GuestAddress(0x2000), 0x2000);
    ///
    /// dirty.union_with(&unsent);
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x1000), 0x3000)]);
    /// dirty.difference_with(&unsent);
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x3000), 0x1000)]);
    /// assert!(dirty != unsent);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "merge")]
    pub fn union_with(&mut self, other: &DirtyMemory) {
        for region in &mut self.regions {
            if let Some(same) = other.region_like(region) {
                region.pages.union_with(&same.pages);
                continue;
            }
            for range in other.ranges_in(region.start, region.pages.byte_size()) {
                region.pages.insert_range(range.start, range.len());
            }
        }
    }

    /// Removes the pages that `other` covers completely.
    ///
    /// The sets may be for different memories. Their pages are matched by guest address. Several
    /// pages of `other` may cover a page together. Pages that are covered only partly stay.
    ///
    /// See [`union_with`](Self::union_with) for an example.
    #[doc(alias = "subtract")]
    pub fn difference_with(&mut self, other: &DirtyMemory) {
        for region in &mut self.regions {
            if let Some(same) = other.region_like(region) {
                region.pages.difference_with(&same.pages);
                continue;
            }
            for range in joined(other.ranges_in(region.start, region.pages.byte_size())) {
                region.pages.remove_range(range.start, range.len());
            }
        }
    }

    /// Returns the dirty pages, ascending, as guest addresses and lengths in bytes.
    ///
    /// A page has the page size of its region. The last page of a region ends with the region, so
    /// it may be shorter. Pages that cannot be read are included, as in
    /// [`total_pages`](Self::total_pages).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    /// memory.write_slice(&[1; 2], GuestAddress(0x1fff))?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// let pages: Vec<_> = dirty.pages().map(|(start, len)| (start.0, len)).collect();
    /// assert_eq!(pages, [(0x1000, 0x1000), (0x2000, 0x1000)]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pages(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        self.regions.iter().flat_map(DirtyRegion::each_page)
    }

    /// Returns [`runs`](Self::runs) in chunks of at most `max_bytes` bytes.
    ///
    /// All chunks of a run but its last have `max_bytes` bytes. If that is a multiple of the page
    /// size, no chunk ends inside a page that can be read as a whole.
    ///
    /// # Examples
    ///
    /// Buffers of 8 KiB for a connection:
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// dirty.insert_range(GuestAddress(0x1000), 0x5000);
    /// let mut buffer = [0; 0x2000];
    /// let mut sent = Vec::new();
    /// for (start, len) in dirty.chunks(NonZeroUsize::new(buffer.len()).unwrap()) {
    ///     memory.read_slice(&mut buffer[..len], start)?;
    ///     sent.push((start.0, len));
    /// }
    /// assert_eq!(sent, [(0x1000, 0x2000), (0x3000, 0x2000), (0x5000, 0x1000)]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn chunks(
        &self,
        max_bytes: NonZeroUsize,
    ) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let max = max_bytes.get();
        self.runs().flat_map(move |(start, len)| {
            (0..len).step_by(max).map(move |offset| {
                // Inside the run, so the sum does not overflow.
                let addr = start.0.wrapping_add(to_u64(offset));
                (GuestAddress(addr), len.saturating_sub(offset).min(max))
            })
        })
    }

    /// Returns the region with the bounds and the page size of `region`.
    fn region_like(&self, region: &DirtyRegion) -> Option<&DirtyRegion> {
        let first = self
            .regions
            .partition_point(|known| known.start < region.start);
        let here = self.regions.iter().skip(first);
        // A region without bytes may begin at the same address.
        let mut here = here.take_while(|known| known.start == region.start);
        here.find(|known| known.has_layout_of(region))
    }

    /// Returns the dirty ranges in the `len` bytes at `start`, ascending, as offsets from `start`.
    pub(super) fn ranges_in(
        &self,
        start: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        let first = self.regions.partition_point(|known| known.last() < start.0);
        let regions = self.regions.get(first..).unwrap_or_default().iter();
        let reached =
            regions.take_while(move |known| to_usize(known.start.0.saturating_sub(start.0)) < len);
        reached.flat_map(move |known| known.ranges_in(start, len))
    }

    /// Returns the dirty guest addresses. Adjacent pages are one range, also of two regions.
    fn addresses(&self) -> impl Iterator<Item = Range<u128>> + '_ {
        let runs = self.regions.iter().flat_map(DirtyRegion::runs);
        joined(runs.map(|(start, len)| {
            let start = u128::from(start.0);
            start..start.saturating_add(u128::from(to_u64(len)))
        }))
    }
}

/// Sets are equal if the same guest addresses are dirty, whatever their regions and page sizes.
impl PartialEq for DirtyMemory {
    fn eq(&self, other: &Self) -> bool {
        let pairs = || self.regions.iter().zip(&other.regions);
        let is_same_layout = self.regions.len() == other.regions.len()
            && pairs().all(|(one, other)| one.has_layout_of(other));
        if is_same_layout {
            pairs().all(|(one, other)| one.pages.words() == other.pages.words())
        } else {
            self.addresses().eq(other.addresses())
        }
    }
}

impl Eq for DirtyMemory {}

/// Returns the last guest address of a range, or `None` for an empty range.
fn last_of(addr: GuestAddress, len: u64) -> Option<u64> {
    let more = len.checked_sub(1)?;
    Some(addr.0.saturating_add(more))
}

/// Joins adjacent ranges, which must be in ascending order.
fn joined<T: Copy + Ord>(ranges: impl Iterator<Item = Range<T>>) -> impl Iterator<Item = Range<T>> {
    let mut ranges = ranges.peekable();
    core::iter::from_fn(move || {
        let mut joined = ranges.next()?;
        while let Some(next) = ranges.next_if(|next| next.start <= joined.end) {
            joined.end = joined.end.max(next.end);
        }
        Some(joined)
    })
}
