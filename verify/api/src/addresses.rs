//! [`Address`] and [`AddressValue`] on both kinds of address.

use crate::everything::*;

/// Calls every method, and the operators with literals whose type is inferred.
pub fn guest_address() {
    let address = GuestAddress(0x1000);
    assert_eq!(GuestAddress::new(0x1000), address);
    assert_eq!(address.raw_value(), 0x1000);
    assert_eq!(address.0, 0x1000);
    assert_eq!(address.mask(0xfff), 0);
    assert_eq!(address & 0x1fff, address);
    assert_eq!(address | 1, GuestAddress(0x1001));
    assert_eq!(address.checked_add(1), Some(GuestAddress(0x1001)));
    assert_eq!(address.checked_sub(0x1001), None);
    assert_eq!(address.checked_offset_from(GuestAddress(0xff0)), Some(0x10));
    assert_eq!(address.checked_align_up(0x2000), Some(GuestAddress(0x2000)));
    assert_eq!(address.overflowing_add(1), (GuestAddress(0x1001), false));
    assert!(address.overflowing_sub(0x1001).1);
    assert_eq!(address.unchecked_add(2), GuestAddress(0x1002));
    assert_eq!(address.unchecked_sub(1), GuestAddress(0xfff));
    assert_eq!(address.unchecked_offset_from(GuestAddress(0)), 0x1000);
    assert_eq!(address.unchecked_align_up(0x4000), GuestAddress(0x4000));
    assert_eq!(GuestAddress::default(), GuestAddress(GuestAddress::zero()));
    assert_eq!(GuestAddress::one(), 1);
    assert!(address < GuestAddress(u64::MAX));
    assert_eq!(address.max(GuestAddress(1)), address);
    assert_eq!(format!("{address:?}"), "GuestAddress(4096)");
    let usage: GuestUsize = address.raw_value();
    assert_eq!(usage, 4096);
}

/// Calls the same methods on an offset in a region.
pub fn region_address() {
    let offset = MemoryRegionAddress(0x10);
    assert_eq!(MemoryRegionAddress::new(0x10), offset);
    assert_eq!(offset.raw_value(), 0x10);
    assert_eq!(offset.mask(0xf), 0);
    assert_eq!((offset & 0x1f) | 1, MemoryRegionAddress(0x11));
    assert_eq!(offset.checked_add(u64::MAX), None);
    assert_eq!(offset.checked_sub(0x10), Some(MemoryRegionAddress(0)));
    assert_eq!(offset.checked_offset_from(MemoryRegionAddress(0x11)), None);
    assert_eq!(offset.checked_align_up(0x10), Some(offset));
    assert!(offset.overflowing_add(u64::MAX).1);
    assert_eq!(offset.overflowing_sub(1), (MemoryRegionAddress(0xf), false));
    assert_eq!(offset.unchecked_add(1), MemoryRegionAddress(0x11));
    assert_eq!(offset.unchecked_sub(1), MemoryRegionAddress(0xf));
    assert_eq!(offset.unchecked_offset_from(MemoryRegionAddress(1)), 0xf);
    assert_eq!(offset.unchecked_align_up(0x20), MemoryRegionAddress(0x20));
    assert_eq!(
        MemoryRegionAddress::default().0,
        MemoryRegionAddress::zero()
    );
    assert_eq!(MemoryRegionAddress::one(), 1);
}

/// A user-defined address, such as that of an I/O port.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct PortAddress(pub u16);

impl AddressValue for PortAddress {
    type V = u16;
}

impl std::ops::BitAnd<u16> for PortAddress {
    type Output = Self;

    fn bitand(self, mask: u16) -> Self {
        Self(self.0 & mask)
    }
}

impl std::ops::BitOr<u16> for PortAddress {
    type Output = Self;

    fn bitor(self, bits: u16) -> Self {
        Self(self.0 | bits)
    }
}

impl Address for PortAddress {
    fn new(value: u16) -> Self {
        Self(value)
    }

    fn raw_value(&self) -> u16 {
        self.0
    }

    fn checked_offset_from(&self, base: Self) -> Option<u16> {
        self.0.checked_sub(base.0)
    }

    fn checked_add(&self, other: u16) -> Option<Self> {
        self.0.checked_add(other).map(Self)
    }

    fn overflowing_add(&self, other: u16) -> (Self, bool) {
        let (value, over) = self.0.overflowing_add(other);
        (Self(value), over)
    }

    fn unchecked_add(&self, offset: u16) -> Self {
        Self(self.0 + offset)
    }

    fn checked_sub(&self, other: u16) -> Option<Self> {
        self.0.checked_sub(other).map(Self)
    }

    fn overflowing_sub(&self, other: u16) -> (Self, bool) {
        let (value, over) = self.0.overflowing_sub(other);
        (Self(value), over)
    }

    fn unchecked_sub(&self, other: u16) -> Self {
        Self(self.0 - other)
    }
}

/// Calls the methods that the trait provides.
pub fn own_address() {
    let port = PortAddress::new(0x3f8);
    assert_eq!(port.mask(7), 0);
    assert_eq!(port.checked_align_up(0x100), Some(PortAddress(0x400)));
    assert_eq!(port.unchecked_align_up(8), port);
    assert_eq!(port.unchecked_offset_from(PortAddress(0x3f0)), 8);
    assert_eq!(PortAddress::zero(), 0);
    assert_eq!(PortAddress::one(), 1);
}
