//! Memory of Xen guests: foreign and grant mappings.
//!
//! `crate::mmap` makes regions of it, and `crate::volatile_memory` accesses it.

/// The memory of a region that is mapped for each access, and not in advance.
#[derive(Debug)]
pub struct MmapXen(());
