//! [`RegionTable`]: the regions of a front end, by user address and by guest address.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;

use vm_memory::{FileOffset, GuestAddress};

/// A region of guest memory, as a front end describes it in `VHOST_USER_SET_MEM_TABLE` and
/// `VHOST_USER_ADD_MEM_REG`.
///
/// # Examples
///
/// `vm-memory-host` maps a region, and refuses a file that the front end could truncate:
///
/// ```
/// use std::fs::File;
/// use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};
/// use vm_memory_host::{Backing, BuildError, Region};
/// use vm_memory_vhost::MemoryRegion;
///
/// fn map(region: &MemoryRegion, file: File) -> Result<GuestRegionMmap, BuildError> {
///     let backing = Backing::shared_file(file, region.mmap_offset);
///     Region::new(region.guest_address, region.size).backing(backing).sealed(true).build()
/// }
///
/// # let front_end = Region::new(GuestAddress(0), 0x4000).backing(Backing::Memfd);
/// # let front_end: vm_memory::GuestMemoryMmap =
/// #     vm_memory_host::MemoryBuilder::new().region(front_end).build()?;
/// # let (_, files) = vm_memory_host::describe(&front_end)?;
/// # let file = files.get(0).unwrap().try_clone()?;
/// let guest_address = GuestAddress(1 << 32);
/// let (size, user_address) = (0x4000, 0x7f00_0000_0000);
/// let region = MemoryRegion { guest_address, size, user_address, mmap_offset: 0 };
/// assert_eq!(map(&region, file)?.start_addr(), guest_address);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Without that crate, use [`file_ranges`](Self::file_ranges).
///
/// The protocol fixes the fields, so the struct cannot grow.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[doc(alias = "VhostUserMemoryRegion")]
pub struct MemoryRegion {
    /// The first guest physical address.
    pub guest_address: GuestAddress,
    /// The length in bytes.
    pub size: u64,
    /// The first address in the address space of the front end.
    pub user_address: u64,
    /// The offset of the region in its file.
    pub mmap_offset: u64,
}

/// The reason why a region, or an address of the front end, is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The region is empty.
    #[error("the region at guest address {guest:#x} is empty", guest = guest_address.0)]
    Empty {
        /// The first guest address of the region.
        guest_address: GuestAddress,
    },
    /// A region, or a range that is translated, passes 2^64 in an address space.
    #[error("the range of {size:#x} bytes at {space} {start:#x} passes the end, 2^64")]
    PastTheEnd {
        /// The address space.
        space: AddressSpace,
        /// The first address of the range in it.
        start: u64,
        /// The length in bytes.
        size: u64,
    },
    /// The region is longer than a `usize`.
    #[error("the region of {size:#x} bytes is larger than the address space of this process")]
    TooLarge {
        /// The length in bytes.
        size: u64,
    },
    /// The region has guest addresses of another region.
    #[error(
        "the region at guest address {guest:#x} overlaps the region at {other:#x}",
        guest = guest_address.0, other = other.0
    )]
    GuestOverlap {
        /// The first guest address of the region.
        guest_address: GuestAddress,
        /// The first guest address of the other region.
        other: GuestAddress,
    },
    /// The region has user addresses of another region.
    #[error("the region at user address {user_address:#x} overlaps the region at {other:#x}")]
    UserOverlap {
        /// The first user address of the region.
        user_address: u64,
        /// The first user address of the other region.
        other: u64,
    },
    /// There is no such region.
    #[error("there is no region of {size:#x} bytes at user address {user_address:#x}")]
    Unknown {
        /// The first user address of the region.
        user_address: u64,
        /// The length in bytes.
        size: u64,
    },
    /// An address is not in any region.
    #[error("user address {user_address:#x} is not in any region")]
    Unmapped {
        /// The first such address.
        user_address: u64,
    },
}

/// An address space of a [`MemoryRegion`]. `Display` prints the kind of its addresses.
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_vhost::{AddressSpace, MemoryRegion, RegionTable, TableError};
///
/// let region = MemoryRegion::new(GuestAddress(0), 0x1000, u64::MAX, 0);
/// let error = RegionTable::new([region]).unwrap_err();
/// let TableError::PastTheEnd { space, start, .. } = error else { panic!("{error}") };
/// assert_eq!((space, start), (AddressSpace::FrontEnd, u64::MAX));
/// assert_eq!(space.to_string(), "user address");
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum AddressSpace {
    /// Guest physical addresses.
    Guest,
    /// The addresses of the front end.
    FrontEnd,
    /// The offsets in the file of the region.
    File,
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest address",
            Self::FrontEnd => "user address",
            Self::File => "file offset",
        })
    }
}

/// Returns the last of `size` addresses at `first`.
fn last_of(first: u64, size: u64) -> Option<u64> {
    first.checked_add(size.checked_sub(1)?)
}

/// Returns whether two ranges of checked regions have a common address.
fn overlap(one: u64, one_size: u64, other: u64, other_size: u64) -> bool {
    match one.checked_sub(other) {
        Some(offset) => offset < other_size,
        None => other.saturating_sub(one) < one_size,
    }
}

impl MemoryRegion {
    /// Creates a region of its fields, in the order of the protocol.
    #[must_use]
    pub fn new(
        guest_address: GuestAddress,
        size: u64,
        user_address: u64,
        mmap_offset: u64,
    ) -> Self {
        Self {
            guest_address,
            size,
            user_address,
            mmap_offset,
        }
    }

    /// Checks the region by itself.
    fn check(&self) -> Result<(), TableError> {
        let &Self {
            guest_address,
            size,
            ..
        } = self;
        if size == 0 {
            return Err(TableError::Empty { guest_address });
        }
        let starts = [
            (AddressSpace::Guest, guest_address.0),
            (AddressSpace::FrontEnd, self.user_address),
            (AddressSpace::File, self.mmap_offset),
        ];
        for (space, start) in starts {
            last_of(start, size).ok_or(TableError::PastTheEnd { space, start, size })?;
        }
        Ok(())
    }

    /// Returns the range of a region, as `GuestRegionMmap::from_range` and
    /// `GuestMemoryMmap::from_ranges_with_files` take it.
    ///
    /// The latter expects ranges in ascending order: use [`file_ranges`](Self::file_ranges) for
    /// several regions.
    ///
    /// A front end may truncate its file later, and an access then raises SIGBUS. So does an access
    /// to a page of hugetlbfs for which no huge page is left, also in a sealed file. Install the
    /// handler of [`vm_memory::fault`]. It does not help against a file that the front end serves
    /// itself (FUSE), where accesses may wait without limit: require seals (see [`MemoryRegion`]).
    ///
    /// # Errors
    ///
    /// Returns [`TableError::TooLarge`] if the size does not fit in a `usize`.
    pub fn file_range(
        &self,
        file: impl Into<OwnedFd>,
    ) -> Result<(GuestAddress, usize, Option<FileOffset>), TableError> {
        let size =
            usize::try_from(self.size).map_err(|_| TableError::TooLarge { size: self.size })?;
        let file = FileOffset::new(File::from(file.into()), self.mmap_offset);
        Ok((self.guest_address, size, Some(file)))
    }

    /// Returns the ranges of several regions, in ascending order of their guest addresses.
    ///
    /// The regions may be in any order. `GuestMemoryMmap::from_ranges_with_files` takes the result.
    /// Each region comes with its descriptor. See [`file_range`](Self::file_range) for files that
    /// may be truncated. Check the regions by [`RegionTable::new`] first: this does not.
    ///
    /// # Errors
    ///
    /// Returns [`TableError::TooLarge`] if a size does not fit in a `usize`.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::fs::File;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_vhost::{MemoryRegion, RegionTable};
    ///
    /// # fn receive() -> std::io::Result<(Vec<MemoryRegion>, Vec<File>)> {
    /// #     let file = tempfile::tempfile()?;
    /// #     file.set_len(0x4000)?;
    /// #     let (size, mmap_offset) = (0x2000, 0);
    /// #     let region = |guest_address, user_address| MemoryRegion {
    /// #         guest_address: GuestAddress(guest_address), size, user_address, mmap_offset,
    /// #     };
    /// #     let high = region(1 << 32, 0x7f00_0000_0000);
    /// #     Ok((vec![high, region(0, 0x7f00_0000_2000)], vec![file.try_clone()?, file]))
    /// # }
    /// // A message `VHOST_USER_SET_MEM_TABLE`, with its descriptors.
    /// let (regions, files) = receive()?;
    /// let table = RegionTable::new(regions.iter().copied())?;
    /// let ranges = MemoryRegion::file_ranges(regions.into_iter().zip(files))?;
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(ranges)?;
    ///
    /// // An address of `VHOST_USER_SET_VRING_ADDR`.
    /// let ring = table.guest_address(0x7f00_0000_1000).ok_or("the ring is in no region")?;
    /// memory.write_obj(7u16, ring)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn file_ranges<F: Into<OwnedFd>>(
        regions: impl IntoIterator<Item = (Self, F)>,
    ) -> Result<Vec<(GuestAddress, usize, Option<FileOffset>)>, TableError> {
        let ranges = regions
            .into_iter()
            .map(|(region, file)| region.file_range(file));
        let mut ranges = ranges.collect::<Result<Vec<_>, _>>()?;
        ranges.sort_by_key(|(start, ..)| *start);
        Ok(ranges)
    }
}

/// The regions of a front end. Translates between the front end's addresses and the guest's.
///
/// Front ends name rings, and the targets of IOTLB messages, by their own addresses ("user
/// addresses" in the specification).
///
/// No two regions overlap, in either address space. Their number is not limited: the back end
/// refuses more than it supports.
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_vhost::{MemoryRegion, RegionTable};
///
/// let region = |guest: u64, user_address| MemoryRegion {
///     guest_address: GuestAddress(guest),
///     size: 0x1000,
///     user_address,
///     mmap_offset: 0,
/// };
/// let mut table = RegionTable::new([region(0x8000, 0x7000_1000), region(0, 0x7000_0000)])?;
/// assert_eq!(table.guest_address(0x7000_1010), Some(GuestAddress(0x8010)));
/// assert_eq!(table.user_address(GuestAddress(0x8010)), Some(0x7000_1010));
///
/// // The regions are adjacent for the front end, and apart in the guest.
/// let ranges = table.translate(0x7000_0ff0, 0x20)?;
/// assert_eq!(ranges, [(GuestAddress(0xff0), 0x10), (GuestAddress(0x8000), 0x10)]);
///
/// // A hostile front end adds a region twice.
/// assert!(table.insert(region(0x1_0000, 0x7000_0fff)).is_err());
/// # Ok::<(), vm_memory_vhost::TableError>(())
/// ```
#[derive(Clone, Debug, Default)]
#[doc(alias = "VHOST_USER_SET_MEM_TABLE")]
pub struct RegionTable {
    /// Sorted by user address.
    regions: Vec<MemoryRegion>,
}

impl RegionTable {
    /// Creates a table of regions in any order, as `VHOST_USER_SET_MEM_TABLE` has them.
    ///
    /// # Errors
    ///
    /// Returns [`TableError`] if a region is refused, as by [`insert`](Self::insert).
    pub fn new(regions: impl IntoIterator<Item = MemoryRegion>) -> Result<Self, TableError> {
        let mut table = Self::default();
        for region in regions {
            table.insert(region)?;
        }
        Ok(table)
    }

    /// Returns the regions, in the order of their user addresses.
    #[must_use]
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Adds a region (`VHOST_USER_ADD_MEM_REG`).
    ///
    /// # Errors
    ///
    /// Returns [`TableError`] if the region is empty, passes the end of an address space, or
    /// overlaps another one in one of them. The table is then unchanged.
    #[doc(alias = "VHOST_USER_ADD_MEM_REG")]
    pub fn insert(&mut self, region: MemoryRegion) -> Result<(), TableError> {
        region.check()?;
        for other in &self.regions {
            let (guest, other_guest) = (region.guest_address, other.guest_address);
            if overlap(guest.0, region.size, other_guest.0, other.size) {
                return Err(TableError::GuestOverlap {
                    guest_address: guest,
                    other: other_guest,
                });
            }
            let (user, other_user) = (region.user_address, other.user_address);
            if overlap(user, region.size, other_user, other.size) {
                return Err(TableError::UserOverlap {
                    user_address: user,
                    other: other_user,
                });
            }
        }
        let at = self
            .regions
            .partition_point(|other| other.user_address < region.user_address);
        self.regions.insert(at, region);
        Ok(())
    }

    /// Removes the region with the same addresses and the same size (`VHOST_USER_REM_MEM_REG`).
    ///
    /// Returns the removed region. Invalidate its translations before you unmap it.
    ///
    /// # Errors
    ///
    /// Returns [`TableError::Unknown`] if there is no such region. The table is then unchanged.
    #[doc(alias = "VHOST_USER_REM_MEM_REG")]
    pub fn remove(&mut self, region: &MemoryRegion) -> Result<MemoryRegion, TableError> {
        let same = |other: &MemoryRegion| {
            let mmap_offset = region.mmap_offset;
            *region
                == MemoryRegion {
                    mmap_offset,
                    ..*other
                }
        };
        match self.regions.iter().position(same) {
            Some(at) => Ok(self.regions.remove(at)),
            None => Err(TableError::Unknown {
                user_address: region.user_address,
                size: region.size,
            }),
        }
    }

    /// Returns the position of the region that has a user address, and the offset in it.
    fn find(&self, user_address: u64) -> Option<(usize, u64)> {
        let after = self
            .regions
            .partition_point(|region| region.user_address <= user_address);
        let at = after.checked_sub(1)?;
        let region = self.regions.get(at)?;
        let offset = user_address.checked_sub(region.user_address)?;
        (offset < region.size).then_some((at, offset))
    }

    /// Returns the guest address of an address of the front end, or `None` if no region has it.
    ///
    /// `VHOST_USER_SET_VRING_ADDR` names rings by such addresses, unless they are IOVAs.
    #[must_use]
    pub fn guest_address(&self, user_address: u64) -> Option<GuestAddress> {
        let (at, offset) = self.find(user_address)?;
        let start = self.regions.get(at)?.guest_address;
        start.0.checked_add(offset).map(GuestAddress)
    }

    /// Returns the front end's address of a guest address, or `None` if no region has it.
    #[must_use]
    pub fn user_address(&self, guest_address: GuestAddress) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = guest_address.0.checked_sub(region.guest_address.0)?;
            let is_inside = offset < region.size;
            is_inside.then(|| region.user_address.checked_add(offset))?
        })
    }

    /// Translates `size` bytes at an address of the front end into guest ranges, in order.
    ///
    /// Regions that are adjacent for the front end may be apart in the guest. So there may be
    /// several ranges, at most one for each region. An
    /// [`IoBuffer`](vm_memory::vectored::IoBuffer) takes them.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::GuestAddress;
    /// use vm_memory_vhost::{MemoryRegion, RegionTable};
    ///
    /// let low = MemoryRegion::new(GuestAddress(0), 0x2000, 0x7f00_0000_0000, 0);
    /// let high = MemoryRegion::new(GuestAddress(1 << 32), 0x2000, 0x7f00_0000_2000, 0x2000);
    /// let table = RegionTable::new([low, high])?;
    /// let ranges = table.translate(0x7f00_0000_1000, 0x1800)?;
    /// assert_eq!(ranges, [(GuestAddress(0x1000), 0x1000), (GuestAddress(1 << 32), 0x800)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`TableError::Unmapped`] if an address is not in any region.
    /// - [`TableError::PastTheEnd`] if the range passes 2^64.
    /// - [`TableError::TooLarge`] if a length does not fit in a `usize`.
    pub fn translate(
        &self,
        user_address: u64,
        size: u64,
    ) -> Result<Vec<(GuestAddress, usize)>, TableError> {
        let mut ranges = Vec::new();
        let (mut next, mut left) = (user_address, size);
        let (mut at, mut offset) = match self.find(user_address) {
            Some(found) => found,
            None if size == 0 => return Ok(ranges),
            None => return Err(TableError::Unmapped { user_address }),
        };
        while left != 0 {
            let unmapped = TableError::Unmapped { user_address: next };
            // The next region must begin where the last one ended.
            let region = self.regions.get(at).ok_or(unmapped)?;
            if region.user_address.checked_add(offset) != Some(next) {
                return Err(unmapped);
            }
            let len = region.size.saturating_sub(offset).min(left);
            // A region does not pass the end of the guest's address space.
            let guest = region.guest_address.0.saturating_add(offset);
            // A mapped region fits in a `usize`.
            let too_large = |_| TableError::TooLarge { size: region.size };
            let host_len = usize::try_from(len).map_err(too_large)?;
            ranges.push((GuestAddress(guest), host_len));
            left = left.saturating_sub(len);
            if left != 0 {
                let after = next.checked_add(len);
                next = after.ok_or(TableError::PastTheEnd {
                    space: AddressSpace::FrontEnd,
                    start: user_address,
                    size,
                })?;
            }
            (at, offset) = (at.saturating_add(1), 0);
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(guest: u64, size: u64, user_address: u64) -> MemoryRegion {
        MemoryRegion {
            guest_address: GuestAddress(guest),
            size,
            user_address,
            mmap_offset: 0,
        }
    }

    #[test]
    fn translate_across_regions_succeeds_and_across_holes_fails() {
        let table = RegionTable::new([
            region(0x8000, 0x1000, 0x7000_1000),
            region(0, 0x1000, 0x7000_0000),
            region(0x2_0000, 0x1000, 0x7000_3000),
        ])
        .unwrap();
        let both = vec![(GuestAddress(0xff0), 0x10), (GuestAddress(0x8000), 0x10)];
        assert_eq!(table.translate(0x7000_0ff0, 0x20), Ok(both));
        let unmapped = |user_address| Err(TableError::Unmapped { user_address });
        assert_eq!(table.translate(0x7000_1fff, 2), unmapped(0x7000_2000));
        assert_eq!(table.translate(0x10, 1), unmapped(0x10));
        let last = vec![(GuestAddress(0x2_0fff), 1)];
        assert_eq!(table.translate(0x7000_3fff, 1), Ok(last));
        assert_eq!(table.translate(0x7000_3fff, 2), unmapped(0x7000_4000));
        assert_eq!(table.translate(0x7000_4000, 1), unmapped(0x7000_4000));
        assert_eq!(table.translate(0x10, 0), Ok(vec![]));
    }

    #[test]
    fn new_with_region_at_end_of_address_space_succeeds() {
        let top = 0u64.wrapping_sub(0x1000);
        let table = RegionTable::new([region(top, 0x1000, top)]).unwrap();
        assert_eq!(table.guest_address(u64::MAX), Some(GuestAddress(u64::MAX)));
        assert_eq!(table.user_address(GuestAddress(u64::MAX)), Some(u64::MAX));
        assert_eq!(table.guest_address(top - 1), None);
        for (start, size) in [(u64::MAX, 2), (top, u64::MAX)] {
            let space = AddressSpace::FrontEnd;
            let past = TableError::PastTheEnd { space, start, size };
            assert_eq!(table.translate(start, size), Err(past));
        }
        assert!(RegionTable::new([region(0, u64::MAX, 0)]).is_ok());
    }

    #[test]
    fn insert_of_hostile_region_returns_error_and_changes_nothing() {
        let mut table = RegionTable::new([region(0x1000, 0x1000, 0x7000)]).unwrap();
        let at = GuestAddress;
        let far_in_file = MemoryRegion {
            mmap_offset: u64::MAX,
            ..region(0x8000, 2, 0x1_0000)
        };
        let past = |space, start, size| TableError::PastTheEnd { space, start, size };
        let guest = |guest_address| TableError::GuestOverlap {
            guest_address,
            other: at(0x1000),
        };
        let user = |user_address| TableError::UserOverlap {
            user_address,
            other: 0x7000,
        };
        let cases = [
            (
                region(0, 0, 0),
                TableError::Empty {
                    guest_address: at(0),
                },
            ),
            (
                region(0, 2, u64::MAX),
                past(AddressSpace::FrontEnd, u64::MAX, 2),
            ),
            (
                region(u64::MAX, 2, 0),
                past(AddressSpace::Guest, u64::MAX, 2),
            ),
            (
                region(2, u64::MAX, 0),
                past(AddressSpace::Guest, 2, u64::MAX),
            ),
            (far_in_file, past(AddressSpace::File, u64::MAX, 2)),
            (region(0xfff, 2, 0), guest(at(0xfff))),
            (region(0x1fff, 1, 0), guest(at(0x1fff))),
            (region(0, u64::MAX, 0), guest(at(0))),
            (region(0x8000, 2, 0x6fff), user(0x6fff)),
            (region(0x8000, 1, 0x7fff), user(0x7fff)),
        ];
        for (hostile, error) in cases {
            assert_eq!(table.insert(hostile), Err(error));
        }
        assert_eq!(table.regions(), [region(0x1000, 0x1000, 0x7000)]);
    }

    #[test]
    fn remove_of_other_region_returns_error() {
        let mut table = RegionTable::new([region(0x1000, 0x1000, 0x7000)]).unwrap();
        for other in [
            region(0x1000, 0x1000, 0x7001),
            region(0x1001, 0x1000, 0x7000),
            region(0x1000, 0x1001, 0x7000),
        ] {
            let error = TableError::Unknown {
                user_address: other.user_address,
                size: other.size,
            };
            assert_eq!(table.remove(&other), Err(error));
        }
        // The offset in the file does not identify a region.
        let same = MemoryRegion {
            mmap_offset: 0x9000,
            ..region(0x1000, 0x1000, 0x7000)
        };
        assert!(table.remove(&same).is_ok());
        assert_eq!(table.guest_address(0x7000), None);
        assert!(table.insert(same).is_ok());
    }

    /// Translates address by address.
    fn model(regions: &[MemoryRegion], user: u64) -> Option<u64> {
        let region = regions.iter().find(|region| {
            user >= region.user_address && user - region.user_address < region.size
        })?;
        Some(region.guest_address.0 + (user - region.user_address))
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(if cfg!(miri) { 16 } else { 512 })
        })]

        #[test]
        fn translate_in_random_table_agrees_with_model(
            random in prop::collection::vec((0u64..64, 0u64..16, 0u64..64), 0..8),
            at_top in any::<bool>(),
            start in 0u64..64,
            size in 0u64..64,
        ) {
            let base = if at_top { u64::MAX - 63 } else { 0 };
            let mut table = RegionTable::default();
            for (guest, size, user) in random {
                let _ = table.insert(region(base + guest, size, base + user));
            }
            let regions = table.regions().to_vec();
            prop_assert!(regions.is_sorted_by_key(|region| region.user_address));
            let mut expected = Ok(Vec::new());
            for offset in 0..size {
                let user = (base + start).checked_add(offset);
                match (user.and_then(|user| model(&regions, user)), &mut expected) {
                    (Some(guest), Ok(list)) => list.push(guest),
                    (None, Ok(_)) => expected = Err(user),
                    _ => {}
                }
            }
            match table.translate(base + start, size) {
                Ok(ranges) => {
                    let flat = ranges.iter().flat_map(|(guest, len)| {
                        (0..*len as u64).map(|offset| guest.0 + offset)
                    });
                    prop_assert_eq!(Ok(flat.collect()), expected);
                }
                Err(TableError::Unmapped { user_address }) => {
                    prop_assert_eq!(Err(Some(user_address)), expected);
                }
                Err(TableError::PastTheEnd { .. }) => prop_assert_eq!(Err(None), expected),
                Err(other) => prop_assert!(false, "{:?}", other),
            }
            for offset in 0..64 {
                let found = table.guest_address(base + offset);
                prop_assert_eq!(found.map(|at| at.0), model(&regions, base + offset));
                if let Some(guest) = found {
                    prop_assert_eq!(table.user_address(guest), Some(base + offset));
                }
            }
        }
    }
}
