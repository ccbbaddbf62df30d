//! [`Description::missing_from`] and [`Description::surplus_in`]: compare the regions of a memory.

use vm_memory::GuestMemoryBackend;

use super::{Description, RegionDescription};
use crate::mapping::span_of;
use crate::region::Span;

impl Description {
    /// Returns the description of the regions that `memory` does not have.
    ///
    /// Use it at the destination of a migration, for regions that are added while it runs. Remove
    /// the [surplus](Self::surplus_in) regions first. Then build the missing ones by
    /// [`fresh`](Self::fresh), insert them, and [apply](Self::apply_blocks) the whole description.
    /// A region of `memory` that has only a part of the addresses is another region.
    ///
    /// Regions are compared by their addresses. If the source replaces a region by a new one at the
    /// same addresses, the destination keeps the old one with its bytes. The source then sends all
    /// pages of the region, also those of zeroes: see "Regions that change between rounds" in
    /// `vm_memory::dirty`.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{describe, Description, MemoryBuilder, Region};
    ///
    /// /// Gives the destination the regions and blocks of the source.
    /// fn follow(
    ///     mut destination: GuestMemoryMmap,
    ///     described: &Description,
    /// ) -> Result<GuestMemoryMmap, Box<dyn std::error::Error>> {
    ///     for surplus in described.surplus_in(&destination) {
    ///         (destination, _) = destination.remove_region(surplus.addr(), surplus.size)?;
    ///     }
    ///     let missing = described.missing_from(&destination);
    ///     if !missing.regions.is_empty() {
    ///         for region in missing.fresh()?.build_regions()? {
    ///             destination = destination.insert_region(Arc::new(region))?;
    ///         }
    ///     }
    ///     described.apply_blocks(&destination)?;
    ///     Ok(destination)
    /// }
    ///
    /// let region = |start| Region::new(GuestAddress(start), 1 << 20);
    /// let source: GuestMemoryMmap = MemoryBuilder::new().region(region(0)).build()?;
    /// let destination: GuestMemoryMmap = describe(&source)?.0.fresh()?.build()?;
    ///
    /// // The source adds a region during the migration.
    /// let source = source.insert_region(Arc::new(region(1 << 32).build()?))?;
    /// let (described, _) = describe(&source)?;
    /// let destination = follow(destination, &described)?;
    /// assert_eq!(describe(&destination)?.0, described);
    /// assert!(described.missing_from(&destination).regions.is_empty());
    ///
    /// // It removes the region again.
    /// let (source, _) = source.remove_region(GuestAddress(1 << 32), 1 << 20)?;
    /// let (described, _) = describe(&source)?;
    /// let destination = follow(destination, &described)?;
    /// assert_eq!(describe(&destination)?.0, described);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "migration")]
    #[doc(alias = "hotplug")]
    #[must_use]
    pub fn missing_from<M>(&self, memory: &M) -> Self
    where
        M: GuestMemoryBackend,
    {
        let is_missing = |described: &&RegionDescription| {
            let found = memory.find_region(described.span.addr());
            found.is_none_or(|found| span_of(found) != described.span)
        };
        Self {
            version: self.version,
            regions: self.regions.iter().filter(is_missing).cloned().collect(),
        }
    }

    /// Returns the regions of `memory` that are not described, by ascending address.
    ///
    /// Use it at the destination of a migration, for regions that are removed while it runs.
    /// [`missing_from`](Self::missing_from) shows how. A region that has only a part of the
    /// addresses of a described region is another region. So regions of the destination that
    /// overlap missing ones are always among the result.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{describe, Description, MemoryBuilder, Region, Span};
    ///
    /// let region = Region::new(GuestAddress(0), 1 << 20);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// assert!(describe(&memory)?.0.surplus_in(&memory).is_empty());
    /// let none = Description::new(Vec::new());
    /// assert_eq!(none.surplus_in(&memory), [Span { start: 0, size: 1 << 20 }]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "migration")]
    #[doc(alias = "hot-unplug")]
    #[must_use]
    pub fn surplus_in<M>(&self, memory: &M) -> Vec<Span>
    where
        M: GuestMemoryBackend,
    {
        let mut described: Vec<_> = self.regions.iter().map(|region| region.span).collect();
        described.sort_unstable();
        let spans = memory.iter().map(span_of);
        let surplus = spans.filter(|span| described.binary_search(span).is_err());
        surplus.collect()
    }
}
