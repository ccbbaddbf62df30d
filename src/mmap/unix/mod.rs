//! Mappings by `mmap(2)`.

mod error;
#[cfg(feature = "xen")]
mod from_range;
mod mapping;
mod options;
mod region;

pub use error::MmapRegionError;
pub(super) use mapping::Mapping;
pub(super) use options::{Attributes, Options};

type Result<T> = std::result::Result<T, MmapRegionError>;

/// Returns an error of the system, or of the bitmap, as the error of a region.
pub(super) fn error(error: std::io::Error) -> MmapRegionError {
    MmapRegionError::Mmap(error)
}
