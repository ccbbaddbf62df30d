//! A `DirtyMemory` loses no dirty page, and reports no other.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]

mod harvest;
mod panics;
mod runs;
#[cfg(feature = "iommu")]
mod set;
mod shared;
mod sizes;
mod zero_pages;

use vm_memory::dirty::DirtyMemory;

/// Returns the address and the length of each run.
fn runs(dirty: &DirtyMemory) -> Vec<(u64, usize)> {
    dirty.runs().map(|(start, len)| (start.0, len)).collect()
}
