//! Matches without a wildcard, and complete patterns of structures: a new variant or field breaks
//! them.

use vm_memory::guest_memory::Error as MemoryError;
use vm_memory::iommu::{Error as IommuError, IotlbFails, IovaRange, MappedRange};
use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::volatile_memory::Error as VolatileError;
use vm_memory::{GuestAddress, GuestRegionCollectionError, Permissions};

/// Returns the text that a device reports for an error.
pub fn memory_error(error: &MemoryError) -> &'static str {
    match error {
        MemoryError::InvalidGuestAddress(GuestAddress(_)) => "invalid guest address",
        MemoryError::IOError(error) if error.raw_os_error().is_some() => "operating system",
        MemoryError::IOError(_) => "input/output",
        MemoryError::PartialBuffer {
            expected,
            completed,
        } if expected > completed => "partial",
        MemoryError::PartialBuffer { .. } => "partial, but whole",
        MemoryError::InvalidBackendAddress => "backend address",
        MemoryError::HostAddressNotAvailable => "no host address",
        MemoryError::CallbackOutOfRange => "callback",
        MemoryError::GuestAddressOverflow => "overflow",
        MemoryError::IommuError(error) => iommu_error(error),
    }
}

/// Returns the text that a device reports for a fault of its IOMMU.
pub fn iommu_error(error: &IommuError) -> &'static str {
    match error {
        IommuError::CannotResolve {
            iova_range: IovaRange { base: _, length: _ },
            reason: _,
        } => "cannot resolve",
        IommuError::Fragmented {
            iova_range: _,
            continuous_length: _,
        } => "fragmented",
        IommuError::IommuMisconfigured { reason: _ } => "misconfigured",
    }
}

/// Returns the text that a loader reports for an error.
pub fn volatile_error(error: &VolatileError) -> &'static str {
    match error {
        VolatileError::OutOfBounds { addr: _ } => "out of bounds",
        VolatileError::Overflow { base: _, offset: _ } => "overflow",
        VolatileError::TooBig {
            nelements: _,
            size: _,
        } => "too big",
        VolatileError::Misaligned {
            addr: _,
            alignment: _,
        } => "misaligned",
        VolatileError::IOError(_) => "input/output",
        VolatileError::PartialBuffer {
            expected: _,
            completed: _,
        } => "partial",
    }
}

/// Returns the text of a VMM that cannot create guest memory.
pub fn ranges_error(error: &FromRangesError) -> &'static str {
    match error {
        FromRangesError::InvalidGuestRegion => "invalid region",
        FromRangesError::Collection(error) => collection_error(error),
        FromRangesError::MmapRegion(error) => mapping_error(error),
    }
}

/// Returns the text that hotplug reports for an error.
pub fn collection_error(error: &GuestRegionCollectionError) -> &'static str {
    match error {
        GuestRegionCollectionError::NoMemoryRegion => "no region",
        GuestRegionCollectionError::MemoryRegionOverlap => "overlap",
        GuestRegionCollectionError::UnsortedMemoryRegions => "unsorted",
    }
}

/// Returns the text of a vhost-user back end that cannot map a table.
#[cfg(unix)]
pub fn mapping_error(error: &MmapRegionError) -> &'static str {
    match error {
        MmapRegionError::InvalidOffsetLength => "offset and length",
        MmapRegionError::InvalidPointer => "pointer",
        MmapRegionError::MapFixed => "fixed",
        MmapRegionError::MappingOverlap => "overlap",
        MmapRegionError::MappingPastEof => "past the end",
        MmapRegionError::Mmap(_) => "mmap",
    }
}

/// Returns the text of a VMM on Windows, where the error of a mapping is that of the system.
#[cfg(windows)]
pub fn mapping_error(error: &MmapRegionError) -> &'static str {
    let error: &std::io::Error = error;
    match error.raw_os_error() {
        Some(22) => "size",
        _ => "other",
    }
}

/// Encodes the permissions of an IOTLB message.
pub fn permissions(permissions: Permissions) -> u8 {
    match permissions {
        Permissions::No => 0,
        Permissions::Read => 1,
        Permissions::Write => 2,
        Permissions::ReadWrite => 3,
    }
}

/// Runs each match, and builds each structure from its fields.
pub fn all() {
    let range = || IovaRange {
        base: GuestAddress(1),
        length: 2,
    };
    let iommu = IommuError::CannotResolve {
        iova_range: range(),
        reason: "why".to_owned(),
    };
    assert_eq!(
        memory_error(&MemoryError::IommuError(iommu)),
        "cannot resolve"
    );
    let fragmented = IommuError::Fragmented {
        iova_range: range(),
        continuous_length: 1,
    };
    assert_eq!(iommu_error(&fragmented), "fragmented");
    let os = std::io::Error::from_raw_os_error(libc::EFAULT);
    assert_eq!(
        memory_error(&VolatileError::IOError(os).into()),
        "operating system"
    );
    assert_eq!(
        volatile_error(&VolatileError::Overflow { base: 1, offset: 2 }),
        "overflow"
    );
    let overlap = GuestRegionCollectionError::MemoryRegionOverlap;
    assert_eq!(
        ranges_error(&FromRangesError::Collection(overlap)),
        "overlap"
    );
    #[cfg(unix)]
    let (error, text) = (MmapRegionError::MappingPastEof, "past the end");
    #[cfg(windows)]
    let (error, text) = (std::io::Error::from_raw_os_error(22), "size");
    assert_eq!(ranges_error(&FromRangesError::from(error)), text);
    for (value, each) in [
        Permissions::No,
        Permissions::Read,
        Permissions::Write,
        Permissions::ReadWrite,
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(usize::from(permissions(each)), value);
        assert_eq!(each as usize, value);
        assert!(each.allow(Permissions::No));
        assert_eq!(each.has_write(), value >= 2);
        assert_eq!(
            (each | Permissions::Read) & Permissions::Write,
            each & Permissions::Write
        );
    }
    let IotlbFails {
        misses,
        access_fails,
    } = IotlbFails {
        misses: vec![range()],
        access_fails: Vec::new(),
    };
    assert_eq!((misses.len(), access_fails.len()), (1, 0));
    let MappedRange { base, length } = MappedRange {
        base: GuestAddress(3),
        length: 4,
    };
    assert_eq!((base.0, length), (3, 4));
}
