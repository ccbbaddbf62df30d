//! Mappings by `VirtualAlloc` and `MapViewOfFile`.

mod mapping;
mod options;
mod region;

pub(super) use mapping::Mapping;
pub(super) use options::{Attributes, Options};
/// The reason why a mapping could not be created: on Windows, an error of the system.
pub use std::io::Error as MmapRegionError;

/// Returns an error of the system, or of the bitmap, as the error of a region.
pub(super) fn error(error: std::io::Error) -> MmapRegionError {
    error
}
