//! The message of an error that has a cause contains the message of the cause, as in 0.18.0. A user
//! who prints an error with `{}` sees the number of the system's error.

/// Returns each error that has a cause, and the text of the cause that a user must see.
macro_rules! errors_with_causes {
    ($library:ident) => {{
        use $library::mmap::{FromRangesError, MmapRegionError};
        use $library::{iommu, GuestAddress, GuestMemoryError, GuestRegionCollectionError};
        let system = || std::io::Error::from_raw_os_error(libc::ENOMEM);
        let iova_range = iommu::IovaRange {
            base: GuestAddress(0x7000),
            length: 0x2000,
        };
        let reason = "not mapped".to_owned();
        let no_translation = iommu::Error::CannotResolve { iova_range, reason };
        let no_region = || GuestRegionCollectionError::NoMemoryRegion;
        let number = "(os error 12)".to_owned();
        let errors: Vec<(Box<dyn std::error::Error>, String)> = vec![
            (GuestMemoryError::IOError(system()).into(), number.clone()),
            (
                GuestMemoryError::IommuError(no_translation).into(),
                "not mapped".to_owned(),
            ),
            (
                $library::VolatileMemoryError::IOError(system()).into(),
                number.clone(),
            ),
            (MmapRegionError::Mmap(system()).into(), number.clone()),
            (
                FromRangesError::MmapRegion(MmapRegionError::Mmap(system())).into(),
                number,
            ),
            (
                FromRangesError::Collection(no_region()).into(),
                no_region().to_string(),
            ),
        ];
        errors
    }};
}

#[test]
fn message_of_error_with_cause_contains_it_as_in_the_reference() {
    let all = [errors_with_causes!(reference), errors_with_causes!(ours)];
    for (error, cause) in all.into_iter().flatten() {
        assert!(
            error.to_string().contains(&cause),
            "{error}\nlacks\n{cause}"
        );
    }
    for (error, _) in errors_with_causes!(ours) {
        // This crate also returns the cause, which 0.18.0 does for the last two only.
        let cause = error.source().map(ToString::to_string);
        assert!(cause.is_some_and(|cause| error.to_string().ends_with(&cause)));
    }
}
