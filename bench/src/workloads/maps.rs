//! Maps that are swapped while in use.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::kinds::{memory, Plain};
use super::vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestRegionMmap};
use crate::comparison::Batch;
use crate::layout::{Layout, MANY_LEN};
use crate::shared_pages::SharedPages;

pub fn memory_guard(shared: &SharedPages) -> Result<Batch> {
    let atomic = GuestMemoryAtomic::new(memory::<Plain>(shared, Layout::apart(4))?);
    Ok(Batch::of(move |_| {
        let guard = black_box(&atomic).memory();
        black_box(core::ptr::from_ref(&*guard));
    }))
}

pub fn memory_guard_clone(shared: &SharedPages) -> Result<Batch> {
    let atomic = GuestMemoryAtomic::new(memory::<Plain>(shared, Layout::apart(4))?);
    Ok(Batch::of(move |_| {
        let guard = black_box(&atomic).memory();
        let second = black_box(&guard).clone();
        black_box(core::ptr::from_ref(&*second));
    }))
}

pub fn lock_replace(shared: &SharedPages, regions: usize) -> Result<Batch> {
    let map = memory::<Plain>(shared, Layout::apart(regions))?;
    let atomic = GuestMemoryAtomic::new(map.clone());
    Ok(Batch::of(move |_| {
        let guard = black_box(&atomic).lock().ok()?;
        guard.replace(map.clone());
        Some(())
    }))
}

/// Adds a region in the hole in the middle of a map of `regions`, and drops the new map.
pub fn insert_region(shared: &SharedPages, regions: usize) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let map = memory::<Plain>(shared, layout)?;
    let hole = GuestAddress(middle(layout) + layout.region_len as u64);
    let region = GuestRegionMmap::<Plain>::from_range(hole, MANY_LEN, None);
    let region = Arc::new(region.context("no region")?);
    Ok(Batch::of(move |_| {
        black_box(&map).insert_region(Arc::clone(&region)).ok()
    }))
}

/// Removes the region in the middle of a map of `regions`, and drops the new map.
pub fn remove_region(shared: &SharedPages, regions: usize) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let map = memory::<Plain>(shared, layout)?;
    let (start, len) = (GuestAddress(middle(layout)), layout.region_len as u64);
    Ok(Batch::of(move |_| {
        black_box(&map).remove_region(start, len).ok()
    }))
}

/// Returns the start of the region in the middle.
fn middle(layout: Layout) -> u64 {
    (layout.regions as u64 - 1) / 2 * layout.stride
}
