//! Maps that are swapped while in use.

use std::hint::black_box;

use anyhow::Result;

use super::kinds::{memory, Plain};
use super::vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use crate::contest::Batch;
use crate::layout::Layout;
use crate::stage::Stage;

pub fn memory_guard(stage: &Stage) -> Result<Batch> {
    let atomic = GuestMemoryAtomic::new(memory::<Plain>(stage, Layout::apart(4))?);
    Ok(Batch::of(move |_| {
        let guard = black_box(&atomic).memory();
        black_box(core::ptr::from_ref(&*guard));
    }))
}

pub fn memory_guard_clone(stage: &Stage) -> Result<Batch> {
    let atomic = GuestMemoryAtomic::new(memory::<Plain>(stage, Layout::apart(4))?);
    Ok(Batch::of(move |_| {
        let guard = black_box(&atomic).memory();
        let second = black_box(&guard).clone();
        black_box(core::ptr::from_ref(&*second));
    }))
}

pub fn lock_replace(stage: &Stage, regions: usize) -> Result<Batch> {
    let map = memory::<Plain>(stage, Layout::apart(regions))?;
    let atomic = GuestMemoryAtomic::new(map.clone());
    Ok(Batch::of(move |_| {
        let guard = black_box(&atomic).lock().ok()?;
        guard.replace(map.clone());
        Some(())
    }))
}
