//! [`Permissions`]: the permission that an access requires, or that memory grants.

use core::fmt;
use core::ops::{BitAnd, BitOr};
use std::io;

use super::Error;
use crate::access::fault::Direction;

/// The permission that an access requires, or that memory grants.
///
/// # Examples
///
/// ```
/// use vm_memory::Permissions;
///
/// assert!(Permissions::ReadWrite.allow(Permissions::Read));
/// assert!(!Permissions::Read.allow(Permissions::Write));
/// assert_eq!(Permissions::Read | Permissions::Write, Permissions::ReadWrite);
/// assert_eq!(Permissions::Read.to_string(), "r-");
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(u8)]
pub enum Permissions {
    /// Neither read nor write access. An access with this permission only requires a mapping.
    No = 0b00,
    /// Read access.
    Read = 0b01,
    /// Write access.
    Write = 0b10,
    /// Read and write access.
    ReadWrite = 0b11,
}

impl Permissions {
    /// Returns whether memory that grants `self` permits `access`.
    #[inline(always)]
    pub fn allow(&self, access: Self) -> bool {
        access.bits() & !self.bits() == 0
    }

    /// Returns whether write access is included.
    #[inline]
    pub fn has_write(&self) -> bool {
        self.allow(Permissions::Write)
    }

    /// Converts bits, of which 1 permits reads and 2 permits writes.
    ///
    /// `VIRTIO_IOMMU_MAP_F_READ` and `_WRITE`, `VHOST_ACCESS_RO`, `_WO` and `_RW`, and
    /// `VFIO_DMA_MAP_FLAG_READ` and `_WRITE` are such bits. Use `permissions as u32` for the
    /// reverse direction.
    ///
    /// Returns `None` if another bit is set, such as `VIRTIO_IOMMU_MAP_F_MMIO`. A virtio-iommu
    /// device that has not offered that flag responds with `VIRTIO_IOMMU_S_INVAL`. A device that
    /// has offered it removes the bit first.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::Permissions;
    ///
    /// assert_eq!(Permissions::from_rw_bits(3), Some(Permissions::ReadWrite));
    /// assert_eq!(Permissions::from_rw_bits(4), None);
    /// assert_eq!(Permissions::Write as u32, 2);
    /// ```
    #[inline]
    #[must_use]
    #[doc(alias = "from_bits")]
    #[doc(alias = "VIRTIO_IOMMU_MAP_F_READ")]
    #[doc(alias = "VHOST_ACCESS_RW")]
    pub const fn from_rw_bits(bits: u32) -> Option<Self> {
        match bits {
            0 => Some(Permissions::No),
            1 => Some(Permissions::Read),
            2 => Some(Permissions::Write),
            3 => Some(Permissions::ReadWrite),
            _ => None,
        }
    }

    /// Returns the direction of an access that was checked for these permissions.
    #[inline]
    pub(crate) fn direction(self) -> Direction {
        if self.has_write() {
            Direction::Write
        } else {
            Direction::Read
        }
    }

    /// Returns the two bits of the permission.
    #[inline(always)]
    #[expect(clippy::as_conversions, reason = "the discriminants are the bits")]
    pub(crate) const fn bits(self) -> u8 {
        self as u8
    }

    #[inline]
    const fn reads(self) -> bool {
        matches!(self, Permissions::Read | Permissions::ReadWrite)
    }

    #[inline]
    const fn writes(self) -> bool {
        matches!(self, Permissions::Write | Permissions::ReadWrite)
    }

    #[inline]
    pub(crate) const fn of(read: bool, write: bool) -> Self {
        match (read, write) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        }
    }
}

/// Prints two characters, such as `r-` for read access and `--` for none.
impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Permissions::No => "--",
            Permissions::Read => "r-",
            Permissions::Write => "-w",
            Permissions::ReadWrite => "rw",
        })
    }
}

/// The union of two permissions.
impl BitOr for Permissions {
    type Output = Permissions;

    #[inline]
    fn bitor(self, rhs: Permissions) -> Self::Output {
        Permissions::of(self.reads() || rhs.reads(), self.writes() || rhs.writes())
    }
}

/// The intersection of two permissions.
impl BitAnd for Permissions {
    type Output = Permissions;

    #[inline]
    fn bitand(self, rhs: Permissions) -> Self::Output {
        Permissions::of(self.reads() && rhs.reads(), self.writes() && rhs.writes())
    }
}

/// Returns the error of an access that a buffer or a window was not created for.
///
/// The memory may permit the access, so `GuestMemory::explain` would find no reason.
#[cold]
pub(crate) fn not_created_for(what: &str, created: Permissions, access: Permissions) -> Error {
    let reason = match created {
        Permissions::No => format!(
            "a {what} with Permissions::No permits no access; create it with Permissions::Read, \
            Write or ReadWrite"
        ),
        _ => format!(
            "the {what} was created with Permissions::{created:?}, but the access requires \
            Permissions::{access:?}; create it with Permissions::{:?}",
            created | access
        ),
    };
    Error::IOError(io::Error::new(io::ErrorKind::PermissionDenied, reason))
}

#[cfg(test)]
mod tests {
    #[test]
    fn error_of_access_that_buffer_was_not_created_for_names_both_permissions() {
        let error = super::not_created_for("buffer", Read, Write);
        assert_eq!(
            error.to_string(),
            "transfer from or to guest memory failed: the buffer was created with \
             Permissions::Read, but the access requires Permissions::Write; create it with \
             Permissions::ReadWrite"
        );
    }

    use super::Permissions::{self, *};

    #[test]
    fn from_rw_bits_accepts_read_and_write_bits_only() {
        for permissions in [No, Read, Write, ReadWrite] {
            let bits = permissions as u32;
            assert_eq!(Permissions::from_rw_bits(bits), Some(permissions));
            for other in 2..32 {
                assert_eq!(Permissions::from_rw_bits(bits | 1 << other), None);
            }
        }
    }

    #[test]
    fn bitor_bitand_and_allow_agree_with_bits() {
        let all = [No, Read, Write, ReadWrite];
        let from_bits = |bits: u8| all[usize::from(bits)];
        for a in all {
            for b in all {
                assert_eq!(a | b, from_bits(a as u8 | b as u8));
                assert_eq!(a & b, from_bits(a as u8 & b as u8));
                assert_eq!(a.allow(b), a as u8 & b as u8 == b as u8);
            }
            assert_eq!(a.has_write(), a as u8 & 2 != 0);
            assert_eq!(a.to_string().contains('w'), a.has_write());
            assert_eq!(a.to_string().contains('r'), a as u8 & 1 != 0);
        }
        assert_eq!(size_of::<Permissions>(), 1);
    }
}
