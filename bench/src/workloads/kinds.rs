//! Guest memory types of either crate.

use anyhow::Result;

use super::vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use super::vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use crate::layout::Layout;
use crate::shared_pages::SharedPages;

/// Memory without dirty tracking.
pub type Plain = ();

/// Memory with a dirty bitmap.
pub type Tracked = AtomicBitmap;

/// Returns the shared pages as guest memory.
pub fn memory<B: NewBitmap>(shared: &SharedPages, layout: Layout) -> Result<GuestMemoryMmap<B>> {
    let mut ranges = Vec::with_capacity(layout.regions);
    for (start, offset) in layout.starts() {
        let file = FileOffset::new(shared.file.try_clone()?, offset);
        ranges.push((GuestAddress(start), layout.region_len, Some(file)));
    }
    Ok(GuestMemoryMmap::from_ranges_with_files(ranges)?)
}
