//! The dirty pages of a run, from the bitmaps of guest memory and from KVM's log.

use std::collections::BTreeSet;

use serde::Serialize;
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::GuestAddress;

use crate::memory::{harvest, pages, GuestRam};

/// KVM's dirty log of one slot.
#[derive(Clone, Debug)]
pub struct SlotLog {
    /// The first guest address of the slot.
    pub start: GuestAddress,
    /// One bit for each page.
    pub words: Vec<u64>,
}

impl SlotLog {
    /// Returns the log in the form that [`DirtyMemory`] adds.
    pub fn words(&self) -> LogWords<'_> {
        LogWords::kvm(self.start, &self.words)
    }
}

/// The guest addresses of the dirty pages, by writer.
#[derive(Clone, Debug, Serialize)]
pub struct DirtyBySource {
    /// Pages that the devices wrote, from the bitmaps of guest memory.
    pub device: BTreeSet<u64>,
    /// Pages that the vCPU wrote, from KVM's log.
    pub vcpu: BTreeSet<u64>,
    /// Pages that either wrote: the pages that a migration would send.
    pub merged: BTreeSet<u64>,
}

impl DirtyBySource {
    /// Harvests the bitmaps of `ram` and merges them with KVM's log.
    ///
    /// A migration needs only the merged pages, which one call of [`DirtyMemory::harvest_with`]
    /// collects.
    pub fn harvest(ram: &GuestRam, logs: &[SlotLog]) -> Self {
        let mut merged = harvest(ram);
        let (device, mut vcpu) = (pages(&merged), DirtyMemory::new());
        for log in logs {
            vcpu.add_log(ram, &log.words());
            merged.add_log(ram, &log.words());
        }
        let (vcpu, merged) = (pages(&vcpu), pages(&merged));
        Self {
            device,
            vcpu,
            merged,
        }
    }
}
