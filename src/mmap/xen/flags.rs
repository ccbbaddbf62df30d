//! [`MmapXenFlags`]: the kinds of Xen guest memory.

use bitflags::bitflags;

bitflags! {
    /// The kind of a mapping of Xen guest memory.
    ///
    /// Four values are [valid](Self::is_valid):
    ///
    /// | flags | memory | mapped |
    /// |---|---|---|
    /// | `UNIX` | zeroes or a file, as without Xen | in advance |
    /// | `FOREIGN` | frames of another domain, through `privcmd` | in advance |
    /// | `GRANT` | pages that another domain granted, through `gntdev` | in advance |
    /// | `GRANT \| NO_ADVANCE_MAP` | the same | for each access |
    ///
    /// A vhost-user front end sends the value with each region. `NO_ADVANCE_MAP` is the value 8,
    /// which existing front ends and back ends use. The vhost-user specification calls it "bit 8".
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::MmapXenFlags;
    ///
    /// let on_demand = MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP;
    /// assert!(on_demand.is_valid() && !on_demand.mmap_in_advance());
    /// assert!(!MmapXenFlags::ALL.is_valid());
    /// assert_eq!(MmapXenFlags::from_bits(4), None);
    /// ```
    #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
    pub struct MmapXenFlags: u32 {
        /// Zeroes or a file, as without Xen.
        const UNIX = 0x0;
        /// Frames of another domain.
        const FOREIGN = 0x1;
        /// Pages that another domain granted.
        const GRANT = 0x2;
        /// Granted pages are mapped for each access, and not in advance.
        const NO_ADVANCE_MAP = 0x8;
        /// `FOREIGN` and `GRANT`, which are not valid together. Not the same as [`all`](Self::all).
        const ALL = Self::FOREIGN.bits() | Self::GRANT.bits();
    }
}

impl MmapXenFlags {
    /// Returns whether the flags are one of the four values that name a kind of mapping.
    pub fn is_valid(&self) -> bool {
        match *self {
            flags if flags == Self::GRANT | Self::NO_ADVANCE_MAP => true,
            flags => [Self::UNIX, Self::FOREIGN, Self::GRANT].contains(&flags),
        }
    }

    /// Returns whether the region maps zeroes or a file.
    pub fn is_unix(&self) -> bool {
        self.bits() == Self::UNIX.bits()
    }

    /// Returns whether the region maps frames of another domain.
    pub fn is_foreign(&self) -> bool {
        self.contains(Self::FOREIGN)
    }

    /// Returns whether the region maps granted pages.
    pub fn is_grant(&self) -> bool {
        self.contains(Self::GRANT)
    }

    /// Returns whether the memory is mapped when the region is created.
    pub fn mmap_in_advance(&self) -> bool {
        !self.contains(Self::NO_ADVANCE_MAP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_four_kinds_are_valid() {
        let valid = (0..16).filter_map(MmapXenFlags::from_bits);
        let valid: Vec<u32> = valid.filter(|f| f.is_valid()).map(|f| f.bits()).collect();
        assert_eq!(valid, [0, 1, 2, 10]);
        assert_eq!(MmapXenFlags::ALL.bits(), 3);
        assert_eq!(MmapXenFlags::all().bits(), 11);
    }

    #[test]
    fn flags_tell_the_kind_of_memory() {
        let kinds = [0, 1, 2, 10].map(MmapXenFlags::from_bits_retain);
        assert_eq!(kinds.map(|f| f.is_unix()), [true, false, false, false]);
        assert_eq!(kinds.map(|f| f.is_foreign()), [false, true, false, false]);
        assert_eq!(kinds.map(|f| f.is_grant()), [false, false, true, true]);
        assert_eq!(
            kinds.map(|f| f.mmap_in_advance()),
            [true, true, true, false]
        );
        assert_eq!(
            format!("{:?}", MmapXenFlags::ALL),
            "MmapXenFlags(FOREIGN | GRANT)"
        );
    }
}
