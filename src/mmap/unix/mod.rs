//! Mappings by `mmap(2)`.

mod builder;
mod error;
#[cfg(feature = "xen")]
mod from_range;
mod host_range;
mod mapping;
mod owner;
mod region;

pub use builder::MmapRegionBuilder;
pub use error::MmapRegionError;
pub(super) use host_range::HostRange;
pub use region::MmapRegion;

type Result<T> = std::result::Result<T, MmapRegionError>;
