//! The causes of errors: `source` returns each of them, and the messages of the errors of 0.18.0
//! contain them.

use std::error::Error;
use std::io;

use vm_memory::{GuestMemoryError, VolatileMemoryError};

fn system() -> io::Error {
    io::Error::from_raw_os_error(libc::EAGAIN)
}

/// Checks that the immediate cause of an error is a `T`, and that its message ends with it.
fn assert_cause<T: Error + 'static>(error: impl Error) {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<T>());
    let cause = cause.map(ToString::to_string);
    let cause = cause.unwrap_or_else(|| panic!("{error} has no such cause"));
    assert!(
        error.to_string().ends_with(&format!(": {cause}")),
        "{error}\nlacks\n{cause}"
    );
}

#[test]
fn source_of_error_with_cause_returns_it_and_message_contains_it() {
    assert_cause::<io::Error>(GuestMemoryError::IOError(system()));
    assert_cause::<io::Error>(VolatileMemoryError::IOError(system()));
    #[cfg(feature = "iommu")]
    {
        use vm_memory::iommu::Error;
        let reason = "not set up".to_owned();
        let error = Error::IommuMisconfigured { reason };
        assert_cause::<Error>(GuestMemoryError::IommuError(error));
    }
    #[cfg(all(feature = "backend-mmap", unix))]
    {
        use vm_memory::mmap::{FromRangesError, MmapRegionError};
        use vm_memory::GuestRegionCollectionError;
        assert_cause::<io::Error>(MmapRegionError::Mmap(system()));
        let error = MmapRegionError::Mmap(system());
        assert_cause::<MmapRegionError>(FromRangesError::MmapRegion(error));
        let error = GuestRegionCollectionError::NoMemoryRegion;
        assert_cause::<GuestRegionCollectionError>(FromRangesError::Collection(error));
        #[cfg(feature = "xen")]
        assert_cause::<vmm_sys_util::fam::Error>(MmapRegionError::Fam(
            vmm_sys_util::fam::Error::SizeLimitExceeded,
        ));
    }
}

#[test]
fn source_of_error_without_cause_returns_none() {
    // No variant with a cause may be missing above: the match has no wildcard.
    let has_cause = |error: &GuestMemoryError| match error {
        GuestMemoryError::IOError(_) => true,
        #[cfg(feature = "iommu")]
        GuestMemoryError::IommuError(_) => true,
        GuestMemoryError::InvalidGuestAddress(_)
        | GuestMemoryError::InvalidBackendAddress
        | GuestMemoryError::HostAddressNotAvailable
        | GuestMemoryError::CallbackOutOfRange
        | GuestMemoryError::GuestAddressOverflow
        | GuestMemoryError::PartialBuffer { .. } => false,
    };
    for error in [
        GuestMemoryError::IOError(system()),
        GuestMemoryError::InvalidBackendAddress,
        GuestMemoryError::PartialBuffer {
            expected: 2,
            completed: 1,
        },
    ] {
        assert_eq!(error.source().is_some(), has_cause(&error), "{error}");
    }
}
