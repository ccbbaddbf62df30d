//! Regions and memories that the scenarios use.

use std::fs::File;

use vm_memory::bitmap::NewBitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRange, MmapRegion, MmapXenFlags,
};

use crate::outcome::Outcome;
use crate::world::{mapped, Access, World, PAGE};

/// The bit that tells an address of a granted page from others.
pub const GRANTED: u64 = 1 << 63;

/// Returns the guest address of a byte of a granted page.
pub fn grant_address(reference: u32, offset: usize) -> GuestAddress {
    let offset = u64::try_from(offset).expect("the offset fits");
    GuestAddress(GRANTED | u64::from(reference) << 12 | offset)
}

/// Returns the flags of a region that is mapped at each access.
pub fn lazy_flags() -> u32 {
    (MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP).bits()
}

/// Returns a range of a device.
pub fn range(
    device: &File,
    at: GuestAddress,
    size: usize,
    flags: u32,
    domain: u32,
) -> Outcome<MmapRange> {
    let file = FileOffset::new(device.try_clone()?, 0);
    Ok(MmapRange::new(size, Some(file), at, flags, domain))
}

/// Returns a memory of one region.
pub fn memory<B: NewBitmap>(range: MmapRange, at: GuestAddress) -> Outcome<GuestMemoryMmap<B>> {
    let region = MmapRegion::from_range(range)?;
    let region =
        GuestRegionMmap::new(region, at).expect("the region does not pass the last address");
    Ok(GuestMemoryMmap::from_regions(vec![region])?)
}

/// Grants the page after the last granted one of a run. Page `n` of the domain has reference
/// `first + n`.
pub fn grant_run(world: &mut dyn World, first: u32, pages: usize, access: Access) {
    for (reference, page) in (first..).zip(0..pages) {
        world.grant(reference, page, access);
    }
}

/// Returns memory of `pages` pages that is mapped at each access, and begins with a reference.
pub fn lazy<B: NewBitmap>(
    world: &mut dyn World,
    device: &File,
    reference: u32,
    pages: usize,
) -> Outcome<GuestMemoryMmap<B>> {
    let at = grant_address(reference, 0);
    let range = range(device, at, pages * PAGE, lazy_flags(), world.domain())?;
    memory(range, at)
}

/// Requires that no grant is mapped.
pub fn assert_released(world: &dyn World, when: &str) {
    let mapped = mapped(world);
    assert!(mapped.is_empty(), "{when}, {mapped:?} are mapped");
}
