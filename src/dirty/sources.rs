//! Dirty pages from logs that are not indexed by guest address.

use super::shared::Distribution;
use super::DirtyMemory;
#[cfg(feature = "iommu")]
use super::LogWords;
use crate::convert::to_u64;
use crate::guest_memory::GuestAddress;
#[cfg(feature = "iommu")]
use crate::iommu::{Iotlb, IovaRange};
use crate::page_size::host_page_size;

impl DirtyMemory {
    /// Adds the entries of KVM's dirty rings. Returns the number of entries outside the regions.
    ///
    /// An entry is the guest address of a slot, and the number of a host page in that slot. A
    /// `struct kvm_dirty_gfn` has the page number as its `offset`, and the number of the slot. The
    /// VMM knows the address of the slot. The set has the regions of the last
    /// [harvest](Self::harvest), [`add_log`](Self::add_log) or [`try_reserve`](Self::try_reserve).
    ///
    /// Take the entries, call `KVM_RESET_DIRTY_RINGS`, and then read the pages (Linux,
    /// Documentation/virt/kvm/api.rst, "KVM_CAP_DIRTY_LOG_RING"). An entry may be outside the
    /// regions if its slot was removed since. If no slot was removed, a result other than 0 means
    /// that the VMM has confused two slots. The written page is then unknown.
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
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0x10_0000), 0x10_0000)])?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    ///
    /// // (slot, offset), as the VMM has read them from the rings.
    /// let entries = [(5, 1), (5, 2)];
    /// let slot_5 = GuestAddress(0x10_0000);
    /// let outside = dirty.insert_ring(entries.map(|(_slot, offset)| (slot_5, offset)));
    /// assert_eq!((outside, dirty.total_pages()), (0, 2));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "kvm_dirty_gfn")]
    #[doc(alias = "KVM_CAP_DIRTY_LOG_RING")]
    #[must_use = "an entry outside the regions may be a page that is lost"]
    pub fn insert_ring<I>(&mut self, entries: I) -> u64
    where
        I: IntoIterator<Item = (GuestAddress, u64)>,
    {
        let size = to_u64(host_page_size().get());
        let mut pages = self.distribution();
        let mut outside = 0u64;
        for (slot, offset) in entries {
            let offset = offset.checked_mul(size);
            let first = offset.and_then(|bytes| slot.0.checked_add(bytes));
            let is_inside = first.is_some_and(|first| {
                let last = first.saturating_add(size.saturating_sub(1));
                pages.add(first, last) < size
            });
            outside = outside.saturating_add(u64::from(!is_inside));
        }
        outside
    }

    /// Adds a dirty log by IOVA, translated through an IOTLB.
    ///
    /// [`LogWords::start`] is an IOVA here. This is for the logs of a device that the guest's IOMMU
    /// translates: VFIO's (`VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`) and iommufd's
    /// (`IOMMU_HWPT_GET_DIRTY_BITMAP`). Without an IOMMU, such a log is by guest address: use
    /// [`harvest_with`](Self::harvest_with). The set has the regions of the last
    /// [harvest](Self::harvest), [`add_log`](Self::add_log) or [`try_reserve`](Self::try_reserve).
    ///
    /// A page of the log may be larger or smaller than the mappings: the guest pages of all its
    /// bytes are added. The permissions of a mapping are ignored.
    ///
    /// `unmapped` is called for each dirty range that is not mapped, ascending. The guest pages
    /// that the device wrote there are unknown. To avoid this, add the log of a range before you
    /// remove its mapping. Otherwise translate these ranges through an older
    /// [snapshot](crate::iommu::SharedIotlb::snapshot), or [add all pages](Self::insert_all).
    ///
    /// Returns the number of dirty bytes that are mapped to addresses outside the regions, such as
    /// those of another device.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::{DirtyMemory, LogWords};
    /// use vm_memory::iommu::SharedIotlb;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
    /// let iotlb = SharedIotlb::new();
    /// let iova = GuestAddress(0x8000_0000);
    /// iotlb.set_mapping(iova, GuestAddress(0x3000), 0x1000, Permissions::ReadWrite)?;
    ///
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// let words = [0b11]; // the kernel filled it
    /// let log = LogWords::new(iova, &words, NonZeroUsize::new(0x1000).unwrap());
    /// let mut unmapped = Vec::new();
    /// let outside = dirty.insert_iova_log(&iotlb.snapshot(), &log, |range| unmapped.push(range));
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x3000), 0x1000)]);
    /// assert_eq!((unmapped[0].base, unmapped[0].length), (GuestAddress(0x8000_1000), 0x1000));
    /// assert_eq!(outside, 0);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg(feature = "iommu")]
    #[doc(alias = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT")]
    #[doc(alias = "IOMMU_HWPT_GET_DIRTY_BITMAP")]
    #[doc(alias = "VFIO_IOMMU_DIRTY_PAGES")]
    pub fn insert_iova_log(
        &mut self,
        iotlb: &Iotlb,
        log: &LogWords<'_>,
        mut unmapped: impl FnMut(IovaRange),
    ) -> u64 {
        let mut pages = self.distribution();
        let mut outside = 0u64;
        for part in log
            .spans()
            .flat_map(|(first, last)| iotlb.parts(first, last))
        {
            let more = part.last.saturating_sub(part.first);
            match part.target {
                Some(target) => {
                    let added = pages.add(target.0, target.0.saturating_add(more));
                    outside = outside.saturating_add(added);
                }
                None => unmapped(IovaRange {
                    base: GuestAddress(part.first),
                    length: crate::convert::to_usize(more).saturating_add(1),
                }),
            }
        }
        outside
    }

    /// Returns the regions, to which pages are added as those of a log are: to all regions that
    /// share the bytes.
    fn distribution(&mut self) -> Distribution<'_> {
        Distribution {
            regions: &mut self.regions,
            shared: &mut self.shared,
        }
    }
}
