//! [`Double`]: a virtual machine whose calls fail when a test wants it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{page_size, DirtyLog};
use crate::sys::{Calls, SharedEntries, SlotRange};

/// The number of entries of the ring.
const ENTRIES: usize = 4;

/// A virtual machine with one vCPU, which behaves as KVM does.
#[derive(Clone, Debug)]
pub(super) struct Double(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    log: DirtyLog,
    slots: BTreeMap<u32, Slot>,
    ring: SharedEntries,
    /// The place of the next entry in the ring.
    next_entry: usize,
    /// The number of calls that succeed before the first failure, and the number of failures.
    failures: Option<(u32, u32)>,
    /// The pages that the vCPU writes, one before each call takes effect.
    writes: VecDeque<u64>,
    /// The pages that the vCPU has written in calls.
    written: Vec<u64>,
    /// The numbers of pages of all calls that clear a log.
    cleared: Vec<(u64, u32)>,
}

#[derive(Debug)]
struct Slot {
    range: SlotRange,
    is_tracked: bool,
    dirty: Vec<u64>,
}

impl Double {
    pub(super) fn new(log: DirtyLog) -> Self {
        Self(Arc::new(Mutex::new(State {
            log,
            slots: BTreeMap::new(),
            ring: SharedEntries::new(ENTRIES),
            next_entry: 0,
            failures: None,
            writes: VecDeque::new(),
            written: Vec::new(),
            cleared: Vec::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn ring(&self) -> SharedEntries {
        self.state().ring.clone()
    }

    /// Makes `count` calls fail, after `skipped` calls that succeed.
    pub(super) fn fail(&self, failures: Option<(u32, u32)>) {
        self.state().failures = failures;
    }

    /// Makes the vCPU write one of these pages during each of the next calls.
    pub(super) fn write_in_calls(&self, pages: &[u64]) {
        self.state().writes = pages.iter().copied().collect();
    }

    /// Returns the pages that the vCPU has written in calls since the last time.
    pub(super) fn written_in_calls(&self) -> Vec<u64> {
        let mut state = self.state();
        state.writes.clear();
        std::mem::take(&mut state.written)
    }

    /// Returns whether the vCPU has written a page in a call since the last time.
    pub(super) fn has_written_in_calls(&self) -> bool {
        !self.state().written.is_empty()
    }

    /// Lets the vCPU write a page. Returns `None` if its ring is full, and `Some(false)` if the
    /// page has no memory that can be written.
    pub(super) fn write(&self, page: u64) -> Option<bool> {
        self.state().write(page)
    }

    /// Returns the slots: range, and whether it is tracked.
    pub(super) fn slots(&self) -> Vec<(SlotRange, bool)> {
        let state = self.state();
        let slots = state.slots.values();
        slots.map(|slot| (slot.range, slot.is_tracked)).collect()
    }

    /// Returns the first page and the number of pages of each call that cleared a log.
    pub(super) fn cleared(&self) -> Vec<(u64, u32)> {
        self.state().cleared.clone()
    }
}

impl State {
    fn write(&mut self, page: u64) -> Option<bool> {
        let addr = page * page_size();
        let mut slots = self.slots.iter_mut();
        let found = slots.find(|(_, slot)| (slot.range.start..=slot.range.last()).contains(&addr));
        let Some((number, slot)) = found.filter(|(_, slot)| !slot.range.is_read_only) else {
            return Some(false);
        };
        let bit = (addr - slot.range.start) / page_size();
        if slot.is_tracked && matches!(self.log, DirtyLog::Ring { .. }) {
            if !self.ring.push(self.next_entry, *number, bit) {
                return None;
            }
            self.next_entry += 1;
        } else if slot.is_tracked {
            slot.dirty[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        Some(true)
    }

    /// Begins a call: the vCPU writes a page, and the call may fail.
    fn begin(&mut self) -> io::Result<()> {
        if let Some(page) = self.writes.pop_front() {
            if self.write(page) == Some(true) {
                self.written.push(page);
            }
        }
        match &mut self.failures {
            Some((0, 0)) | None => Ok(()),
            Some((0, count)) => {
                *count -= 1;
                Err(io::Error::from_raw_os_error(12))
            }
            Some((skipped, _)) => {
                *skipped -= 1;
                Ok(())
            }
        }
    }
}

fn words_of(range: &SlotRange) -> Vec<u64> {
    vec![0; (range.len / page_size()).div_ceil(64) as usize]
}

impl Calls for Double {
    fn set_slot(&self, number: u32, range: &SlotRange, is_tracked: bool) -> io::Result<()> {
        let mut state = self.state();
        state.begin()?;
        if let Some(slot) = state.slots.get_mut(&number) {
            assert_eq!(slot.range, *range, "KVM cannot move or resize a slot");
            if slot.is_tracked != is_tracked {
                (slot.is_tracked, slot.dirty) = (is_tracked, words_of(range));
            }
            return Ok(());
        }
        let overlaps = |slot: &Slot| range.part(slot.range.start, slot.range.last()).is_some();
        assert!(
            !state.slots.values().any(overlaps),
            "{range:?} overlaps {state:?}"
        );
        let slot = Slot {
            range: *range,
            is_tracked,
            dirty: words_of(range),
        };
        state.slots.insert(number, slot);
        Ok(())
    }

    fn delete_slot(&self, number: u32, _: &SlotRange) -> io::Result<()> {
        let mut state = self.state();
        state.begin()?;
        state.slots.remove(&number).expect("a slot to delete");
        Ok(())
    }

    fn read_log(&self, number: u32, _: &SlotRange) -> io::Result<Vec<u64>> {
        let mut state = self.state();
        state.begin()?;
        let is_manual = matches!(state.log, DirtyLog::Manual { .. });
        let slot = state.slots.get_mut(&number).expect("a slot to read");
        assert!(slot.is_tracked, "KVM has no log of this slot");
        let words = slot.dirty.clone();
        if !is_manual {
            slot.dirty.fill(0);
        }
        Ok(words)
    }

    fn clear_log(&self, number: u32, first: u64, pages: u32, words: &mut [u64]) -> io::Result<()> {
        let mut state = self.state();
        state.begin()?;
        state.cleared.push((first, pages));
        let slot = state.slots.get_mut(&number).expect("a slot to clear");
        let end = first + u64::from(pages);
        let is_end = end == slot.range.len / page_size();
        assert!(first.is_multiple_of(64) && (is_end || pages.is_multiple_of(64)));
        let dirty = slot.dirty.iter_mut().skip((first / 64) as usize);
        for (dirty, word) in dirty.zip(words).take(pages.div_ceil(64) as usize) {
            *dirty &= !*word;
        }
        Ok(())
    }

    fn reset_rings(&self) -> io::Result<()> {
        let mut state = self.state();
        state.begin()?;
        state.ring.reset();
        Ok(())
    }
}
