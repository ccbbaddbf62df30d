//! Regions of Xen guests: [`MmapRange`] and [`MmapXenFlags`].

mod flags;
mod range;

pub use flags::MmapXenFlags;
pub use range::MmapRange;
