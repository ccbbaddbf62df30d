//! [`SlotLogs`]: the dirty pages that a harvest has taken.

use vm_memory::arithmetic::to_usize;
use vm_memory::bitmap::{DirtyLog as BitmapLog, MS};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::table::SlotTable;
use super::DirtyLog;
use crate::error::SlotError;

/// The pages that vCPUs have written, from a [harvest](crate::KvmSlots::take_log).
///
/// Nothing else has these pages any more: add them to a [`DirtyMemory`].
///
/// # Examples
///
/// ```no_run
/// use std::sync::Arc;
/// use kvm_ioctls::Kvm;
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::dirty::DirtyMemory;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_kvm::KvmSlots;
///
/// let memory: GuestMemoryMmap<AtomicBitmap> =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
/// let vm = Arc::new(Kvm::new()?.create_vm()?);
/// // SAFETY: no vCPU of the machine runs.
/// let slots = unsafe { KvmSlots::builder(vm).build() }?;
/// slots.add_memory(&memory)?;
///
/// let mut dirty = DirtyMemory::new();
/// let logs = slots.take_log()?;
/// logs.harvest_with(&mut dirty, &memory); // the bitmaps of the memory as well
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "KVM does not have these pages any more"]
pub struct SlotLogs {
    logs: Vec<(GuestAddress, Vec<u64>)>,
    ranges: Vec<(GuestAddress, u64)>,
    unknown_entries: u64,
}

impl SlotLogs {
    /// Returns the log of each slot that has dirty pages.
    pub fn logs(&self) -> impl Iterator<Item = LogWords<'_>> {
        let logs = self.logs.iter();
        logs.map(|(start, words)| LogWords::kvm(*start, words))
    }

    /// Returns the ranges that count as dirty as a whole, as guest addresses and lengths in bytes.
    ///
    /// They had slots that were deleted while tracking was on.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestAddress, u64)> + '_ {
        self.ranges.iter().copied()
    }

    /// Returns the number of entries of dirty rings that had no slot.
    ///
    /// Such an entry is that of a deleted slot, whose pages are in [`ranges`](Self::ranges) of this
    /// or an earlier harvest. Any other one has a slot that [`KvmSlots`](crate::KvmSlots) did not
    /// create.
    pub fn unknown_entries(&self) -> u64 {
        self.unknown_entries
    }

    /// Returns whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.logs.is_empty() && self.ranges.is_empty()
    }

    /// Harvests the bitmaps of a memory into a set, and adds these pages.
    ///
    /// Pages outside the regions of the memory are ignored. See
    /// [`DirtyMemory::harvest_with`].
    pub fn harvest_with<M>(&self, dirty: &mut DirtyMemory, memory: &M)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: BitmapLog,
    {
        let logs: Vec<_> = self.logs().collect();
        dirty.harvest_with(memory, &logs);
        for (start, len) in self.ranges() {
            dirty.insert_range(start, len);
        }
    }
}

impl SlotTable {
    /// Reads what KVM has logged, and keeps it.
    fn keep_all(&mut self) -> Result<(), SlotError> {
        if let DirtyLog::Ring { .. } = self.log {
            return self.keep_rings();
        }
        let tracked = self.slots.values().filter(|slot| slot.is_tracked);
        let tracked: Vec<_> = tracked.map(|slot| slot.range.start).collect();
        for start in tracked {
            self.keep_log(start, true)?;
        }
        Ok(())
    }

    /// Takes all pages that are kept.
    pub(super) fn take_log(&mut self) -> Result<SlotLogs, SlotError> {
        // After an error, all pages that were read are kept.
        self.keep_all()?;
        let slots = self.slots.values_mut().filter(|slot| !slot.kept.is_empty());
        let logs = slots.map(|slot| {
            let words = core::mem::take(&mut slot.kept);
            (GuestAddress(slot.range.start), words)
        });
        let logs = logs.collect();
        let ranges = self.dirty.take().map(|(first, last)| {
            let len = last.saturating_sub(first).saturating_add(1);
            (GuestAddress(first), len)
        });
        Ok(SlotLogs {
            logs,
            ranges: ranges.collect(),
            unknown_entries: core::mem::take(&mut self.unknown_entries),
        })
    }
}

/// Adds the bits of `words` to `kept`, which stays empty if no bit is set.
pub(super) fn merge(kept: &mut Vec<u64>, words: &[u64]) {
    if words.iter().all(|word| *word == 0) {
        return;
    }
    if kept.len() < words.len() {
        kept.resize(words.len(), 0);
    }
    for (kept, word) in kept.iter_mut().zip(words) {
        *kept |= word;
    }
}

/// Sets the bit of a page in a slot of `pages` pages. Returns whether the slot has the page.
pub(super) fn mark(kept: &mut Vec<u64>, page: u64, pages: u64) -> bool {
    if page >= pages {
        return false;
    }
    if kept.is_empty() {
        kept.resize(to_usize(pages).div_ceil(64), 0);
    }
    let word = kept.get_mut(to_usize(page / 64));
    word.map(|word| *word |= 1 << (page % 64)).is_some()
}
