//! Tests of the slots on a double of KVM.

mod cases;
mod double;
mod model;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddress, Permissions};

use super::table::SlotTable;
use super::{slot_range, DirtyLog, KvmSlots, SlotLogs};
use crate::error::SlotError;
use crate::sys::Ring;
use double::Double;

/// The number of slots that the double has.
const LIMIT: u32 = 8;

fn page_size() -> u64 {
    test_support::page_size() as u64
}

/// Creates slots on a double of KVM.
fn slots_with(log: DirtyLog, slot_pages: Option<u64>) -> (KvmSlots, Double) {
    let double = Double::new(log);
    let mut table = SlotTable::new(Box::new(double.clone()), 0..LIMIT, page_size());
    table.log = log;
    table.slot_size = slot_pages.map(|pages| pages * page_size());
    table.rings.push(Ring::new(Box::new(double.ring())));
    let table = Arc::new(Mutex::new(table));
    (KvmSlots { table }, double)
}

/// The methods of [`KvmSlots`] by numbers of pages.
impl KvmSlots {
    /// Adds pages. The page at `host` is the first one of the host memory.
    fn add_pages(&self, first: u64, count: u64, host: u64) -> Result<(), SlotError> {
        self.add_pages_with(first, count, host, Permissions::ReadWrite)
    }

    fn add_pages_with(
        &self,
        first: u64,
        count: u64,
        host: u64,
        access: Permissions,
    ) -> Result<(), SlotError> {
        let host = std::ptr::without_provenance_mut((host * page_size()) as usize);
        let start = GuestAddress(first * page_size());
        // The double accesses no memory.
        self.table()
            .add(&[slot_range(start, count * page_size(), host, access)])
    }

    fn remove_pages(&self, first: u64, count: u64) -> Result<(), SlotError> {
        self.remove(GuestAddress(first * page_size()), count * page_size())
    }

    /// Returns the first pages and the lengths of all slots.
    fn pages(&self) -> Vec<(u64, u64)> {
        let slots = self.slots().into_iter();
        let pages = |slot: super::SlotInfo| (slot.start.0 / page_size(), slot.len / page_size());
        slots.map(pages).collect()
    }
}

/// Returns the pages of a harvest.
fn pages_of(logs: &SlotLogs) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    for log in logs.logs() {
        let first = log.start.0 / page_size();
        let bits = 0..log.words.len() as u64 * 64;
        let is_set = |bit: &u64| log.words[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
        pages.extend(bits.filter(is_set).map(|bit| first + bit));
    }
    for (start, len) in logs.ranges() {
        let first = start.0 / page_size();
        pages.extend(first..first + len / page_size());
    }
    pages
}
