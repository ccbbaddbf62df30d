//! Converts errors of the crate under test to [`Fault`].

use super::vm;
use crate::out::{Fault, Out, Place};

/// The starts of the machine's regions, which turn host addresses into distances.
#[derive(Clone, Default)]
pub struct Hosts(pub Vec<usize>);

impl Hosts {
    /// Converts `address` to a form that is comparable between machines.
    pub fn place(&self, address: usize) -> Out {
        let from_region = self
            .0
            .iter()
            .map(|&base| address.wrapping_sub(base))
            .collect();
        Out::Host(Place {
            raw: address,
            from_region,
        })
    }
}

/// An error that is comparable between machines.
pub trait IntoFault {
    /// Converts the error, without host addresses and texts.
    fn fault(self, hosts: &Hosts) -> Fault;
}

impl IntoFault for vm::GuestMemoryError {
    fn fault(self, hosts: &Hosts) -> Fault {
        use vm::GuestMemoryError as E;
        match self {
            E::InvalidGuestAddress(at) => Fault::InvalidGuestAddress(at.0),
            E::InvalidBackendAddress => Fault::InvalidBackendAddress,
            E::IOError(error) => error.into(),
            E::PartialBuffer {
                expected,
                completed,
            } => Fault::PartialBuffer {
                expected,
                completed,
            },
            E::HostAddressNotAvailable => Fault::HostAddressNotAvailable,
            E::CallbackOutOfRange => Fault::CallbackOutOfRange,
            E::GuestAddressOverflow => Fault::GuestAddressOverflow,
            E::IommuError(error) => Fault::Iommu(Box::new(error.fault(hosts))),
        }
    }
}

impl IntoFault for vm::VolatileMemoryError {
    fn fault(self, hosts: &Hosts) -> Fault {
        use vm::VolatileMemoryError as E;
        match self {
            E::OutOfBounds { addr } => Fault::OutOfBounds(Box::new(hosts.place(addr))),
            E::Overflow { base, offset } => Fault::Overflow {
                base: Box::new(hosts.place(base)),
                offset,
            },
            E::TooBig { nelements, size } => Fault::TooBig { nelements, size },
            E::Misaligned { addr, alignment } => Fault::Misaligned {
                addr: Box::new(hosts.place(addr)),
                alignment,
            },
            E::IOError(error) => error.into(),
            E::PartialBuffer {
                expected,
                completed,
            } => Fault::PartialBuffer {
                expected,
                completed,
            },
        }
    }
}

impl IntoFault for vm::iommu::Error {
    fn fault(self, _: &Hosts) -> Fault {
        use vm::iommu::Error as E;
        match self {
            E::CannotResolve { iova_range, .. } => Fault::CannotResolve {
                base: iova_range.base.0,
                len: iova_range.length,
            },
            E::Fragmented {
                iova_range,
                continuous_length,
            } => Fault::Fragmented {
                base: iova_range.base.0,
                len: iova_range.length,
                continuous: continuous_length,
            },
            E::IommuMisconfigured { .. } => Fault::IommuMisconfigured,
        }
    }
}

impl IntoFault for vm::iommu::IotlbFails {
    fn fault(self, _: &Hosts) -> Fault {
        let plain = |ranges: Vec<vm::iommu::IovaRange>| {
            ranges.iter().map(|r| (r.base.0, r.length)).collect()
        };
        Fault::Unmapped {
            misses: plain(self.misses),
            access_fails: plain(self.access_fails),
        }
    }
}

impl IntoFault for vm::mmap::MmapRegionError {
    fn fault(self, _: &Hosts) -> Fault {
        use vm::mmap::MmapRegionError as E;
        match self {
            E::InvalidOffsetLength => Fault::Named("InvalidOffsetLength"),
            E::InvalidPointer => Fault::Named("InvalidPointer"),
            E::MapFixed => Fault::Named("MapFixed"),
            E::MappingOverlap => Fault::Named("MappingOverlap"),
            E::MappingPastEof => Fault::Named("MappingPastEof"),
            E::Mmap(error) => error.into(),
        }
    }
}

impl IntoFault for vm::mmap::FromRangesError {
    fn fault(self, hosts: &Hosts) -> Fault {
        use vm::mmap::FromRangesError as E;
        match self {
            E::Collection(error) => error.fault(hosts),
            E::InvalidGuestRegion => Fault::Named("InvalidGuestRegion"),
            E::MmapRegion(error) => Fault::Mmap(Box::new(error.fault(hosts))),
        }
    }
}

impl IntoFault for vm::GuestRegionCollectionError {
    fn fault(self, _: &Hosts) -> Fault {
        use vm::GuestRegionCollectionError as E;
        Fault::Collection(match self {
            E::MemoryRegionOverlap => "MemoryRegionOverlap",
            E::NoMemoryRegion => "NoMemoryRegion",
            E::UnsortedMemoryRegions => "UnsortedMemoryRegions",
        })
    }
}
