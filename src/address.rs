//! Guest addresses, offsets into a region, and the arithmetic on them.
//!
//! Adding two addresses is meaningless, and a guest physical address is not an offset into a
//! region. Each kind of address is therefore a type of its own: [`GuestAddress`] and
//! [`MemoryRegionAddress`]. The trait [`Address`] provides the arithmetic that is meaningful.
//!
//! # Examples
//!
//! ```
//! use vm_memory::{Address, GuestAddress};
//!
//! let start = GuestAddress(0x1000);
//! assert_eq!(start.checked_add(0x234), Some(GuestAddress(0x1234)));
//! assert_eq!(GuestAddress(0x1234).checked_offset_from(start), Some(0x234));
//! assert_eq!(GuestAddress(u64::MAX).checked_add(1), None);
//! ```

use core::cmp::{Eq, Ord, PartialEq, PartialOrd};
use core::fmt::{self, Debug};
use core::ops::{Add, BitAnd, BitOr, Not, Sub};

/// The integer that represents an address.
///
/// It is a trait of its own so that the bounds of [`Address`] can name the type of the integer.
///
/// # Examples
///
/// ```
/// use vm_memory::{Address, GuestAddress};
///
/// fn is_aligned<A: Address>(addr: A, alignment: A::V) -> bool {
///     addr.mask(alignment - A::one()) == A::zero()
/// }
/// assert!(is_aligned(GuestAddress(0x3000), 0x1000));
/// ```
pub trait AddressValue {
    /// The type of the integer.
    type V: Copy
        + PartialEq
        + Eq
        + PartialOrd
        + Ord
        + Not<Output = Self::V>
        + Add<Output = Self::V>
        + Sub<Output = Self::V>
        + BitAnd<Output = Self::V>
        + BitOr<Output = Self::V>
        + Debug
        + From<u8>;

    /// Returns 0.
    fn zero() -> Self::V {
        0u8.into()
    }

    /// Returns 1.
    fn one() -> Self::V {
        1u8.into()
    }
}

/// An address in an address space.
///
/// Use the `checked_` methods for addresses and lengths that come from a guest. The `unchecked_`
/// methods are for results that the caller has proved to fit.
///
/// # Examples
///
/// ```
/// use vm_memory::{Address, GuestAddress};
///
/// let addr = GuestAddress(0x1234);
/// assert_eq!(addr.checked_add(0x10), Some(GuestAddress(0x1244)));
/// assert_eq!(GuestAddress(u64::MAX).checked_add(1), None);
/// assert_eq!(addr.checked_align_up(0x1000), Some(GuestAddress(0x2000)));
/// assert_eq!(addr.checked_offset_from(GuestAddress(0x1000)), Some(0x234));
/// ```
#[doc(alias = "align")]
pub trait Address:
    AddressValue
    + Sized
    + Default
    + Copy
    + Eq
    + PartialEq
    + Ord
    + PartialOrd
    + BitAnd<<Self as AddressValue>::V, Output = Self>
    + BitOr<<Self as AddressValue>::V, Output = Self>
{
    /// Creates an address from its integer.
    fn new(addr: Self::V) -> Self;

    /// Returns the integer.
    fn raw_value(&self) -> Self::V;

    /// Returns the bits of the address that are set in `mask`.
    fn mask(&self, mask: Self::V) -> Self::V {
        self.raw_value() & mask
    }

    /// Returns the distance from `base` to this address, or `None` if `base` is higher.
    fn checked_offset_from(&self, base: Self) -> Option<Self::V>;

    /// Returns the distance from `base` to this address.
    ///
    /// # Panics
    ///
    /// Panics if `base` is higher and overflow checks are enabled. Otherwise the distance wraps.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "the method is the unchecked form"
    )]
    fn unchecked_offset_from(&self, base: Self) -> Self::V {
        self.raw_value() - base.raw_value()
    }

    /// Rounds up to a multiple of `power_of_two`, or returns `None` if the result does not fit.
    ///
    /// # Panics
    ///
    /// Panics if `power_of_two` is not a power of two.
    fn checked_align_up(&self, power_of_two: Self::V) -> Option<Self> {
        let low_bits = low_bits_of::<Self>(power_of_two);
        self.checked_add(low_bits).map(|above| above & !low_bits)
    }

    /// Rounds up to a multiple of `power_of_two`.
    ///
    /// The result is meaningless if it does not fit, or if `power_of_two` is not a power of two.
    ///
    /// # Panics
    ///
    /// Panics if the result does not fit or `power_of_two` is 0, and overflow checks are enabled.
    #[expect(
        clippy::arithmetic_side_effects,
        reason = "the method is the unchecked form"
    )]
    fn unchecked_align_up(&self, power_of_two: Self::V) -> Self {
        let low_bits = power_of_two - Self::one();
        self.unchecked_add(low_bits) & !low_bits
    }

    /// Adds `other`, or returns `None` if the sum does not fit.
    fn checked_add(&self, other: Self::V) -> Option<Self>;

    /// Adds `other`, and returns whether the sum wrapped.
    fn overflowing_add(&self, other: Self::V) -> (Self, bool);

    /// Adds `other`.
    ///
    /// # Panics
    ///
    /// Panics if the sum does not fit and overflow checks are enabled. Otherwise it wraps.
    fn unchecked_add(&self, other: Self::V) -> Self;

    /// Subtracts `other`, or returns `None` if it is greater than the address.
    fn checked_sub(&self, other: Self::V) -> Option<Self>;

    /// Subtracts `other`, and returns whether the difference wrapped.
    fn overflowing_sub(&self, other: Self::V) -> (Self, bool);

    /// Subtracts `other`.
    ///
    /// # Panics
    ///
    /// Panics if `other` is greater than the address and overflow checks are enabled. Otherwise it
    /// wraps.
    fn unchecked_sub(&self, other: Self::V) -> Self;
}

/// Returns the bits below the single bit of `power_of_two`.
#[inline]
fn low_bits_of<A: Address>(power_of_two: A::V) -> A::V {
    assert!(
        power_of_two != A::zero(),
        "the alignment 0 is not a power of two"
    );
    #[expect(clippy::arithmetic_side_effects, reason = "the number is not 0")]
    let low_bits = power_of_two - A::one();
    assert!(
        power_of_two & low_bits == A::zero(),
        "the alignment {power_of_two:?} is not a power of two"
    );
    low_bits
}

/// Implements [`Address`] and its operators for a struct with one `u64`.
macro_rules! impl_address {
    ($name:ident) => {
        impl AddressValue for $name {
            type V = u64;
        }

        impl Address for $name {
            #[inline]
            fn new(value: u64) -> Self {
                Self(value)
            }

            #[inline]
            fn raw_value(&self) -> u64 {
                self.0
            }

            #[inline]
            fn checked_offset_from(&self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }

            #[inline]
            fn checked_add(&self, other: u64) -> Option<Self> {
                self.0.checked_add(other).map(Self)
            }

            #[inline]
            fn overflowing_add(&self, other: u64) -> (Self, bool) {
                let (sum, wrapped) = self.0.overflowing_add(other);
                (Self(sum), wrapped)
            }

            #[inline]
            #[expect(
                clippy::arithmetic_side_effects,
                reason = "the method is the unchecked form"
            )]
            fn unchecked_add(&self, other: u64) -> Self {
                Self(self.0 + other)
            }

            #[inline]
            fn checked_sub(&self, other: u64) -> Option<Self> {
                self.0.checked_sub(other).map(Self)
            }

            #[inline]
            fn overflowing_sub(&self, other: u64) -> (Self, bool) {
                let (difference, wrapped) = self.0.overflowing_sub(other);
                (Self(difference), wrapped)
            }

            #[inline]
            #[expect(
                clippy::arithmetic_side_effects,
                reason = "the method is the unchecked form"
            )]
            fn unchecked_sub(&self, other: u64) -> Self {
                Self(self.0 - other)
            }
        }

        impl core::default::Default for $name {
            fn default() -> Self {
                Self(0)
            }
        }

        impl core::ops::BitAnd<u64> for $name {
            type Output = Self;

            fn bitand(self, other: u64) -> Self {
                Self(self.0 & other)
            }
        }

        impl core::ops::BitOr<u64> for $name {
            type Output = Self;

            fn bitor(self, other: u64) -> Self {
                Self(self.0 | other)
            }
        }

        impl From<u64> for $name {
            fn from(addr: u64) -> Self {
                Self(addr)
            }
        }

        impl From<$name> for u64 {
            fn from(addr: $name) -> u64 {
                addr.0
            }
        }

        /// Prints the address in hexadecimal, with the prefix `0x`.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl fmt::UpperHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::UpperHex::fmt(&self.0, f)
            }
        }
    };
}

/// A guest physical address, or an IOVA behind an IOMMU.
///
/// # Examples
///
/// ```
/// use vm_memory::{Address, GuestAddress};
///
/// let next_page = GuestAddress(0x1234).checked_align_up(0x1000);
/// assert_eq!(next_page, Some(GuestAddress(0x2000)));
/// assert_eq!(format!("{} {:x}", GuestAddress(0x2000), GuestAddress(0x2000)), "0x2000 2000");
/// ```
#[doc(alias = "GPA")]
#[doc(alias = "IOVA")]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Ord, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct GuestAddress(pub u64);
impl_address!(GuestAddress);

/// An offset in bytes from the start of a region.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MemoryRegionAddress};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)])?;
/// let region = memory.find_region(GuestAddress(0x1000)).ok_or("no region")?;
/// region.write_obj(7u32, MemoryRegionAddress(0x10))?;
/// assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1010))?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Ord, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct MemoryRegionAddress(pub u64);
impl_address!(MemoryRegionAddress);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn checked_align_up_past_highest_address_returns_none() {
        assert_eq!(
            GuestAddress(0).checked_align_up(0x1000),
            Some(GuestAddress(0))
        );
        assert_eq!(
            GuestAddress(1).checked_align_up(0x1000),
            Some(GuestAddress(0x1000))
        );
        assert_eq!(
            GuestAddress(0x1000).unchecked_align_up(0x1000),
            GuestAddress(0x1000)
        );
        assert_eq!(GuestAddress(u64::MAX).checked_align_up(2), None);
        assert_eq!(
            GuestAddress(u64::MAX).checked_align_up(1),
            Some(GuestAddress(u64::MAX))
        );
    }

    /// As in 0.18.0.
    #[test]
    fn unchecked_align_up_to_other_number_does_not_panic() {
        for (addr, other, expected) in [(0, 3, 0), (1, 6, 2), (5, 6, 10), (1, u64::MAX, 1)] {
            let aligned = GuestAddress(addr).unchecked_align_up(other);
            assert_eq!(aligned, GuestAddress(expected), "{addr}, {other}");
        }
    }

    #[test]
    #[should_panic(expected = "not a power of two")]
    fn checked_align_up_to_three_panics() {
        let _ = GuestAddress(0).checked_align_up(3);
    }

    #[test]
    #[should_panic(expected = "not a power of two")]
    fn checked_align_up_to_zero_panics() {
        let _ = GuestAddress(0).checked_align_up(0);
    }

    #[test]
    fn format_of_address_prints_hexadecimal() {
        let addr = GuestAddress(0xabc);
        assert_eq!(addr.to_string(), "0xabc");
        assert_eq!(
            format!("{addr:x} {addr:#010x} {addr:X}"),
            "abc 0x00000abc ABC"
        );
        // As in 0.18.0.
        assert_eq!(format!("{addr:?}"), "GuestAddress(2748)");
        assert_eq!(MemoryRegionAddress(0).to_string(), "0x0");
    }

    #[test]
    fn from_and_into_u64_keep_the_number() {
        assert_eq!(GuestAddress::from(7), GuestAddress(7));
        assert_eq!(u64::from(MemoryRegionAddress::from(u64::MAX)), u64::MAX);
        let set = std::collections::HashSet::from([GuestAddress(7), GuestAddress(7)]);
        assert_eq!(set.len(), 1);
    }

    fn check_arithmetic(a: u64, b: u64, shift: u32) -> Result<(), TestCaseError> {
        let (addr, wide_a, wide_b) = (GuestAddress(a), i128::from(a), i128::from(b));
        let fits = |n: i128| u64::try_from(n).ok().map(GuestAddress);
        prop_assert_eq!(addr.checked_add(b), fits(wide_a + wide_b));
        prop_assert_eq!(addr.checked_sub(b), fits(wide_a - wide_b));
        prop_assert_eq!(
            addr.checked_offset_from(GuestAddress(b)).map(GuestAddress),
            fits(wide_a - wide_b)
        );
        prop_assert_eq!(addr.overflowing_add(b).1, fits(wide_a + wide_b).is_none());
        prop_assert_eq!(addr.overflowing_sub(b).1, fits(wide_a - wide_b).is_none());
        let alignment = 1i128 << shift;
        prop_assert_eq!(
            addr.checked_align_up(1 << shift),
            fits((wide_a + alignment - 1) / alignment * alignment)
        );
        prop_assert_eq!(addr.mask(b), a & b);
        Ok(())
    }

    proptest! {
        #[test]
        fn arithmetic_agrees_with_wide_integers(a: u64, b: u64, shift in 0u32..64) {
            check_arithmetic(a, b, shift)?;
        }
    }
}
