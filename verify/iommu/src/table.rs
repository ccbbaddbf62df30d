//! [`RegionTable`]: the front end's mappings of guest memory.

use vm_memory::GuestAddress;

/// The front end's mapping of a region: an entry of `VHOST_USER_SET_MEM_TABLE`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FrontEndRegion {
    /// Its first guest physical address.
    pub guest: GuestAddress,
    /// Its length in bytes.
    pub len: u64,
    /// Its first address in the front end's address space.
    pub user: u64,
}

/// The error of an invalid table, or of an address that is not in the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TableError {
    /// A region is empty, or passes 2^64 in one of the address spaces.
    #[error("the region at user address {user:#x} is empty or passes the end of an address space")]
    Region {
        /// The first address of the region.
        user: u64,
    },
    /// Two regions overlap in the front end's address space.
    #[error("two regions overlap at user address {user:#x}")]
    Overlap {
        /// The first address that both have.
        user: u64,
    },
    /// An address is not in any region.
    #[error("user address {user:#x} is not in any region")]
    Unmapped {
        /// The first such address.
        user: u64,
    },
    /// A range passes 2^64.
    #[error("the range at user address {user:#x} passes the end of the address space")]
    Overflow {
        /// The first address of the range.
        user: u64,
    },
}

/// Translates the front end's addresses to guest physical addresses.
#[derive(Clone, Debug, Default)]
pub struct RegionTable {
    /// Sorted by the front end's addresses, without overlap.
    regions: Vec<FrontEndRegion>,
}

impl RegionTable {
    /// Creates a table from regions in any order.
    ///
    /// # Errors
    ///
    /// Returns [`TableError::Region`] if a region is empty or passes 2^64, and
    /// [`TableError::Overlap`] if two overlap in the front end's address space.
    pub fn new(mut regions: Vec<FrontEndRegion>) -> Result<Self, TableError> {
        for region in &regions {
            let fits = region.len.checked_sub(1).is_some_and(|more| {
                region.user.checked_add(more).is_some()
                    && region.guest.0.checked_add(more).is_some()
            });
            if !fits {
                return Err(TableError::Region { user: region.user });
            }
        }
        regions.sort_by_key(|region| region.user);
        for (one, next) in regions.iter().zip(regions.iter().skip(1)) {
            // The regions are sorted, so the difference is not negative.
            if next.user.saturating_sub(one.user) < one.len {
                return Err(TableError::Overlap { user: next.user });
            }
        }
        Ok(RegionTable { regions })
    }

    /// Translates `size` bytes at a front-end address into guest physical ranges, in order.
    ///
    /// Adjacent regions of the front end may be apart in the guest, so there may be several ranges.
    ///
    /// # Errors
    ///
    /// Returns [`TableError::Unmapped`] if a byte is not in any region, and
    /// [`TableError::Overflow`] if the range passes 2^64.
    pub fn translate(&self, user: u64, size: u64) -> Result<Vec<(GuestAddress, u64)>, TableError> {
        let Some(more) = size.checked_sub(1) else {
            return Ok(Vec::new());
        };
        let last = user
            .checked_add(more)
            .ok_or(TableError::Overflow { user })?;
        let mut ranges = Vec::new();
        let mut next = user;
        for region in &self.regions {
            let Some(offset) = next.checked_sub(region.user) else {
                break;
            };
            let Some(rest) = region.len.checked_sub(offset).filter(|rest| *rest != 0) else {
                continue;
            };
            let left = last.saturating_sub(next);
            let guest = GuestAddress(region.guest.0.saturating_add(offset));
            if left < rest {
                ranges.push((guest, left.saturating_add(1)));
                return Ok(ranges);
            }
            ranges.push((guest, rest));
            // There are more bytes, so there is an address after this region.
            next = next.saturating_add(rest);
        }
        Err(TableError::Unmapped { user: next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, len: u64, user: u64) -> FrontEndRegion {
        FrontEndRegion {
            guest: GuestAddress(guest),
            len,
            user,
        }
    }

    #[test]
    fn translate_across_regions_succeeds_and_across_holes_fails() {
        let table = RegionTable::new(vec![
            region(0x8000, 0x1000, 0x7000_1000),
            region(0, 0x1000, 0x7000_0000),
            region(0x2_0000, 0x1000, 0x7000_3000),
        ])
        .unwrap();
        assert_eq!(
            table.translate(0x7000_0ff0, 0x20),
            Ok(vec![
                (GuestAddress(0xff0), 0x10),
                (GuestAddress(0x8000), 0x10)
            ])
        );
        assert_eq!(
            table.translate(0x7000_1fff, 2),
            Err(TableError::Unmapped { user: 0x7000_2000 })
        );
        assert_eq!(
            table.translate(0x10, 1),
            Err(TableError::Unmapped { user: 0x10 })
        );
        assert_eq!(
            table.translate(0x7000_3fff, 1),
            Ok(vec![(GuestAddress(0x2_0fff), 1)])
        );
        assert_eq!(
            table.translate(0x7000_4000, 1),
            Err(TableError::Unmapped { user: 0x7000_4000 })
        );
        assert_eq!(
            table.translate(u64::MAX, 2),
            Err(TableError::Overflow { user: u64::MAX })
        );
    }

    #[test]
    fn new_with_region_at_end_of_address_space_succeeds() {
        let top = 0u64.wrapping_sub(0x1000);
        let table = RegionTable::new(vec![region(top, 0x1000, top)]).unwrap();
        assert_eq!(
            table.translate(u64::MAX, 1),
            Ok(vec![(GuestAddress(u64::MAX), 1)])
        );
    }

    #[test]
    fn new_with_invalid_regions_returns_error() {
        for wrong in [
            region(0, 0, 0x1000),
            region(0, 2, u64::MAX),
            region(u64::MAX, 2, 0),
        ] {
            assert_eq!(
                RegionTable::new(vec![wrong]).unwrap_err(),
                TableError::Region { user: wrong.user }
            );
        }
        assert_eq!(
            RegionTable::new(vec![region(0, 0x1001, 0), region(0x8000, 1, 0x1000)]).unwrap_err(),
            TableError::Overlap { user: 0x1000 }
        );
    }
}
