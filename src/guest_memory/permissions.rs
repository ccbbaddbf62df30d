//! [`Permissions`]: what an access wants, and what memory grants.

use core::ops::{BitAnd, BitOr};

/// What an access wants to do, or what memory lets it do.
///
/// ```
/// use vm_memory::Permissions;
///
/// assert!(Permissions::ReadWrite.allow(Permissions::Read));
/// assert!(!Permissions::Read.allow(Permissions::Write));
/// assert_eq!(Permissions::Read | Permissions::Write, Permissions::ReadWrite);
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Permissions {
    /// Neither; as a wish, it asks only whether something is mapped.
    No = 0b00,
    /// Reading.
    Read = 0b01,
    /// Writing.
    Write = 0b10,
    /// Both.
    ReadWrite = 0b11,
}

impl Permissions {
    /// Returns whether what `self` grants covers everything that `access` wants.
    #[inline(always)]
    pub fn allow(&self, access: Self) -> bool {
        access.bits() & !self.bits() == 0
    }

    /// Returns whether writing is in it.
    #[inline]
    pub fn has_write(&self) -> bool {
        self.allow(Permissions::Write)
    }

    /// A bit for each of the two parts.
    #[inline(always)]
    #[expect(clippy::as_conversions, reason = "the discriminants are the bits")]
    pub(crate) const fn bits(self) -> u8 {
        self as u8
    }

    /// Whether reading is in it.
    #[inline]
    const fn reads(self) -> bool {
        matches!(self, Permissions::Read | Permissions::ReadWrite)
    }

    /// Whether writing is in it.
    #[inline]
    const fn writes(self) -> bool {
        matches!(self, Permissions::Write | Permissions::ReadWrite)
    }

    /// The permissions with these two parts.
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

/// What is in either.
impl BitOr for Permissions {
    type Output = Permissions;

    #[inline]
    fn bitor(self, rhs: Permissions) -> Self::Output {
        Permissions::of(self.reads() || rhs.reads(), self.writes() || rhs.writes())
    }
}

/// What is in both.
impl BitAnd for Permissions {
    type Output = Permissions;

    #[inline]
    fn bitand(self, rhs: Permissions) -> Self::Output {
        Permissions::of(self.reads() && rhs.reads(), self.writes() && rhs.writes())
    }
}

#[cfg(test)]
mod tests {
    use super::Permissions::{self, *};

    #[test]
    fn combinations_agree_with_the_bits_they_stand_for() {
        let all = [No, Read, Write, ReadWrite];
        let from_bits = |bits: u8| all[usize::from(bits)];
        for a in all {
            for b in all {
                assert_eq!(a | b, from_bits(a as u8 | b as u8));
                assert_eq!(a & b, from_bits(a as u8 & b as u8));
                assert_eq!(a.allow(b), a as u8 & b as u8 == b as u8);
            }
            assert_eq!(a.has_write(), a as u8 & 2 != 0);
        }
        assert_eq!(size_of::<Permissions>(), 1);
    }
}
