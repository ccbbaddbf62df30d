//! [`SlotTable`]: the slots of a virtual machine, and changes of them that are all or nothing.
//!
//! # Deleted slots are dirty
//!
//! A slot that is deleted while tracking is on counts as dirty, all of it. KVM drops the log of
//! such a slot, and a vCPU may write between the last read of the log and the deletion. Reading the
//! log first would lose these pages: the memory stays in use if the slot is only split, or if the
//! change is undone. The same holds for a slot whose tracking is off for a moment.

use core::ops::Range;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

use vm_memory::arithmetic::{to_u64, to_usize};
use vm_memory::GuestAddress;

use super::log::{mark, merge};
use super::numbers::Numbers;
use super::DirtyLog;
use crate::error::{SlotAction, SlotError};
use crate::ranges::Ranges;
use crate::sys::{Calls, Ring, SlotRange};

/// A slot that KVM has.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) number: u32,
    pub(super) range: SlotRange,
    pub(super) is_tracked: bool,
    /// Dirty pages that were read from KVM and not harvested, one bit each. Empty if there are
    /// none.
    pub(super) kept: Vec<u64>,
}

/// The slots of a virtual machine.
#[derive(Debug)]
pub(super) struct SlotTable {
    pub(super) calls: Box<dyn Calls>,
    /// By first guest address. They do not overlap.
    pub(super) slots: BTreeMap<u64, Slot>,
    pub(super) numbers: Numbers,
    pub(super) is_tracking: bool,
    /// The regions whose writes a listener was told to log, by first guest address.
    pub(super) tracked_regions: BTreeSet<GuestAddress>,
    /// The slots that count as dirty as a whole, most of which are deleted.
    pub(super) dirty: Ranges,
    pub(super) log: DirtyLog,
    pub(super) rings: Vec<Ring>,
    /// The number of entries of rings since the last harvest that had no slot.
    pub(super) unknown_entries: u64,
    /// The boundaries at which ranges are cut into slots.
    pub(super) slot_size: Option<u64>,
    pub(super) page_size: u64,
}

impl SlotTable {
    /// Creates a table without slots, which may use some numbers of slots.
    pub(super) fn new(calls: Box<dyn Calls>, numbers: Range<u32>, page_size: u64) -> Self {
        Self {
            calls,
            slots: BTreeMap::new(),
            numbers: Numbers::new(numbers),
            is_tracking: false,
            tracked_regions: BTreeSet::new(),
            dirty: Ranges::default(),
            log: DirtyLog::default(),
            rings: Vec::new(),
            unknown_entries: 0,
            slot_size: None,
            page_size,
        }
    }

    /// Creates the slots of ranges.
    pub(super) fn add(&mut self, ranges: &[SlotRange]) -> Result<(), SlotError> {
        let mut sorted = ranges.to_vec();
        sorted.sort_by_key(|range| range.start);
        let mut before: Option<SlotRange> = None;
        // Counted first: a range may have more parts than there is memory for a list.
        let mut needed = 0u64;
        for range in &sorted {
            self.check_pages(range.start, range.len)?;
            self.check_host(range)?;
            let here = self.overlapping(range.start, range.last()).next();
            let before = before
                .replace(*range)
                .filter(|before| before.last() >= range.start);
            if let Some(other) = here.map(|slot| slot.range).or(before) {
                return Err(SlotError::Overlap {
                    start: GuestAddress(range.start),
                    len: range.len,
                    other: GuestAddress(other.start),
                    other_len: other.len,
                });
            }
            needed = needed.saturating_add(self.parts_of(range));
        }
        self.check_available(needed, 0)?;
        let parts: Vec<_> = sorted.iter().flat_map(|range| self.cut(range)).collect();
        self.exchange(&[], &parts)
    }

    /// Deletes the slots of a range, and creates slots for the rest of those that are partly in it.
    pub(super) fn remove(&mut self, start: u64, len: u64) -> Result<(), SlotError> {
        let last = self.check_pages(start, len)?;
        let gone: Vec<_> = self
            .overlapping(start, last)
            .map(|slot| slot.range)
            .collect();
        let rest: Vec<_> = gone
            .iter()
            .flat_map(|range| without(range, start, last))
            .collect();
        self.check_available(to_u64(rest.len()), to_u64(gone.len()))?;
        self.exchange(&gone, &rest)
    }

    /// Turns the tracking of all slots on or off.
    pub(super) fn set_tracking(&mut self, is_tracking: bool) -> Result<(), SlotError> {
        let slots = self.slots.values();
        let others = slots.filter(|slot| slot.is_tracked != is_tracking);
        let others: Vec<_> = others.map(|slot| slot.range.start).collect();
        for (done, start) in others.iter().enumerate() {
            if let Err(source) = self.track(*start, is_tracking) {
                let done = others.get(..done).unwrap_or_default();
                return Err(self.undo_tracking(done, source));
            }
        }
        self.is_tracking = is_tracking;
        Ok(())
    }

    /// Returns the slots that have a part of a range, ascending.
    fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = &Slot> {
        let before = self.slots.range(..first).next_back();
        let before = before.filter(move |(_, slot)| slot.range.last() >= first);
        let inside = self.slots.range(first..=last);
        before.into_iter().chain(inside).map(|(_, slot)| slot)
    }

    /// Checks that a range consists of pages. Returns its last guest address.
    fn check_pages(&self, start: u64, len: u64) -> Result<u64, SlotError> {
        let is_whole = |number: u64| number.checked_rem(self.page_size) == Some(0);
        let Some(more) = len
            .checked_sub(1)
            .filter(|_| is_whole(start) && is_whole(len))
        else {
            return Err(SlotError::NotPages {
                start: GuestAddress(start),
                len,
                page_size: self.page_size,
            });
        };
        let start_addr = GuestAddress(start);
        let past_the_end = SlotError::PastTheEnd {
            start: start_addr,
            len,
        };
        start.checked_add(more).ok_or(past_the_end)
    }

    /// Checks that the host memory of a range consists of pages.
    fn check_host(&self, range: &SlotRange) -> Result<(), SlotError> {
        if range.host.checked_rem(self.page_size) != Some(0) {
            return Err(SlotError::HostAddress {
                host: to_usize(range.host),
                page_size: self.page_size,
            });
        }
        let past_the_end = SlotError::PastTheEnd {
            start: GuestAddress(range.start),
            len: range.len,
        };
        range
            .host
            .checked_add(range.len)
            .map(drop)
            .ok_or(past_the_end)
    }

    fn check_available(&self, needed: u64, freed: u64) -> Result<(), SlotError> {
        let available = self.numbers.available().saturating_add(freed);
        if needed <= available {
            return Ok(());
        }
        Err(SlotError::TooManySlots {
            needed: needed.saturating_sub(freed),
            available: self.numbers.available(),
            limit: self.numbers.limit(),
        })
    }

    /// Returns the number of slots for a range.
    fn parts_of(&self, range: &SlotRange) -> u64 {
        let number = |addr: u64| addr.checked_div(self.slot_size.unwrap_or(0)).unwrap_or(0);
        number(range.last())
            .saturating_sub(number(range.start))
            .saturating_add(1)
    }

    /// Cuts a range at the multiples of the size of slots.
    fn cut(&self, range: &SlotRange) -> Vec<SlotRange> {
        let Some(size) = self.slot_size else {
            return vec![*range];
        };
        let mut parts = Vec::new();
        let mut first = range.start;
        // `size` is a power of two: the last address of its block.
        while let Some(part) = range.part(first, first | size.saturating_sub(1)) {
            parts.push(part);
            let Some(next) = part.last().checked_add(1) else {
                break;
            };
            first = next;
        }
        parts
    }

    /// Deletes the slots `gone`, and creates the slots `new`. After an error, undoes what it did.
    fn exchange(&mut self, gone: &[SlotRange], new: &[SlotRange]) -> Result<(), SlotError> {
        for (done, range) in gone.iter().enumerate() {
            if let Err(source) = self.delete(range.start) {
                let gone = gone.get(..done).unwrap_or_default();
                return Err(self.undo_exchange(gone, &[], source));
            }
        }
        for (done, range) in new.iter().enumerate() {
            if let Err(source) = self.create(*range) {
                let new = new.get(..done).unwrap_or_default();
                return Err(self.undo_exchange(gone, new, source));
            }
        }
        Ok(())
    }

    /// Deletes the slots `new`, and creates the slots `gone`. Returns the error for the caller.
    fn undo_exchange(
        &mut self,
        gone: &[SlotRange],
        new: &[SlotRange],
        source: SlotError,
    ) -> SlotError {
        let stuck = new
            .iter()
            .rev()
            .filter(|range| self.delete(range.start).is_err());
        let stuck: Vec<_> = stuck.copied().collect();
        let mut lost = Vec::new();
        for range in gone.iter().rev() {
            // A slot that is stuck has a part of the memory already.
            let mut parts = vec![*range];
            for other in &stuck {
                let cut = parts
                    .iter()
                    .flat_map(|part| without(part, other.start, other.last()));
                parts = cut.collect();
            }
            let failed = parts.into_iter().filter(|part| self.create(*part).is_err());
            lost.extend(failed.map(|part| (GuestAddress(part.start), part.len)));
        }
        let is_new = |range: &&SlotRange| {
            !gone
                .iter()
                .any(|old| old.part(range.start, range.last()).is_some())
        };
        let remaining: Vec<_> = stuck
            .iter()
            .filter(is_new)
            .map(|range| (GuestAddress(range.start), range.len))
            .collect();
        not_undone(lost, remaining, Vec::new(), source)
    }

    /// Creates a slot.
    fn create(&mut self, range: SlotRange) -> Result<(), SlotError> {
        let number = self.numbers.take(range.start);
        let number = number.ok_or_else(|| SlotError::TooManySlots {
            needed: 1,
            available: 0,
            limit: self.numbers.limit(),
        })?;
        let is_tracked = self.is_tracking;
        if let Err(error) = self.calls.set_slot(number, &range, is_tracked) {
            self.numbers.release(number);
            return Err(refused(SlotAction::Create, &range)(error));
        }
        let slot = Slot {
            number,
            range,
            is_tracked,
            kept: Vec::new(),
        };
        self.slots.insert(range.start, slot);
        Ok(())
    }

    /// Deletes the slot at `start`.
    fn delete(&mut self, start: u64) -> Result<(), SlotError> {
        // Rings may have entries of the slot from when it was tracked.
        self.keep_entries();
        let Some(slot) = self.slots.get(&start) else {
            return Ok(());
        };
        let deleted = self.calls.delete_slot(slot.number, &slot.range);
        deleted.map_err(refused(SlotAction::Delete, &slot.range))?;
        // A slot that should be tracked and is not has failed to be tracked again.
        if self.is_tracking || slot.is_tracked || !slot.kept.is_empty() {
            self.dirty.insert(start, slot.range.last());
        }
        self.numbers.release(slot.number);
        self.slots.remove(&start);
        Ok(())
    }

    /// Turns the tracking of the slot at `start` on or off.
    fn track(&mut self, start: u64, is_tracked: bool) -> Result<(), SlotError> {
        if !is_tracked && !matches!(self.log, DirtyLog::Ring { .. }) {
            // KVM drops the log. The entries of a ring stay there.
            self.keep_log(start, false)?;
        }
        let Some(slot) = self.slots.get_mut(&start) else {
            return Ok(());
        };
        let set = self.calls.set_slot(slot.number, &slot.range, is_tracked);
        set.map_err(refused(SlotAction::SetTracking, &slot.range))?;
        slot.is_tracked = is_tracked;
        if is_tracked && self.is_tracking {
            // It was not tracked for a moment, in which a vCPU may have written.
            self.dirty.insert(slot.range.start, slot.range.last());
        }
        Ok(())
    }

    /// Counts all slots as dirty.
    pub(super) fn mark_all(&mut self) {
        for slot in self.slots.values() {
            self.dirty.insert(slot.range.start, slot.range.last());
        }
    }

    /// Turns the tracking of slots back to `is_tracking`. Returns the error for the caller.
    fn undo_tracking(&mut self, done: &[u64], source: SlotError) -> SlotError {
        let is_tracking = self.is_tracking;
        let mut failed = Vec::new();
        for start in done.iter().rev() {
            let result = self.track(*start, is_tracking);
            let Some(slot) = self.slots.get(start).map(|slot| slot.range) else {
                continue;
            };
            if is_tracking {
                // A vCPU may have written while tracking was off.
                self.dirty.insert(slot.start, slot.last());
            }
            if result.is_err() {
                failed.push((GuestAddress(slot.start), slot.len));
            }
        }
        not_undone(Vec::new(), Vec::new(), failed, source)
    }

    /// Reads the log of the slot at `start`, and keeps its pages. Clears it in KVM if `clears`.
    pub(super) fn keep_log(&mut self, start: u64, clears: bool) -> Result<(), SlotError> {
        let Some(slot) = self.slots.get_mut(&start) else {
            return Ok(());
        };
        let words = self.calls.read_log(slot.number, &slot.range);
        let mut words = words.map_err(refused(SlotAction::ReadLog, &slot.range))?;
        let pages = slot.range.len.checked_div(self.page_size).unwrap_or(0);
        // Kept first: a call that clears a part of the log may fail.
        merge(&mut slot.kept, &words);
        match self.log {
            DirtyLog::Manual { max_pages } if clears => {
                let cleared = clear(&*self.calls, slot.number, pages, max_pages, &mut words);
                cleared.map_err(refused(SlotAction::ClearLog, &slot.range))
            }
            _ => Ok(()),
        }
    }

    /// Takes the entries of all rings, and keeps their pages.
    ///
    /// An entry may be that of a deleted slot. Its page counts as dirty since the deletion. If
    /// another slot has the number now, a page of that slot also counts as dirty.
    fn keep_entries(&mut self) {
        let (slots, numbers) = (&mut self.slots, &self.numbers);
        for ring in &mut self.rings {
            ring.collect(|number, page| {
                let slot = numbers
                    .start_of(number)
                    .and_then(|start| slots.get_mut(&start));
                let is_known = slot.is_some_and(|slot| {
                    let pages = slot.range.len.checked_div(self.page_size).unwrap_or(0);
                    mark(&mut slot.kept, page, pages)
                });
                let unknown = u64::from(!is_known);
                self.unknown_entries = self.unknown_entries.saturating_add(unknown);
            });
        }
    }

    /// Takes the entries of all rings, keeps their pages, and returns the entries to KVM.
    pub(super) fn keep_rings(&mut self) -> Result<(), SlotError> {
        self.keep_entries();
        let reset = self.calls.reset_rings();
        reset.map_err(|source| SlotError::Vm {
            action: "reset the dirty rings",
            source,
        })
    }
}

/// Clears the log of a slot of `pages` pages, at most `max_pages` pages at a time.
fn clear(
    calls: &dyn Calls,
    number: u32,
    pages: u64,
    max_pages: u32,
    words: &mut [u64],
) -> io::Result<()> {
    // KVM permits pieces that are multiples of 64 pages, or end with the slot.
    let words_of_piece = (to_usize(u64::from(max_pages)) / 64).max(1);
    let mut first = 0u64;
    for piece in words.chunks_mut(words_of_piece) {
        let covered = to_u64(piece.len()).saturating_mul(64);
        let count = covered.min(pages.saturating_sub(first));
        if piece.iter().any(|word| *word != 0) {
            let count = u32::try_from(count).map_err(io::Error::other)?;
            calls.clear_log(number, first, count, piece)?;
        }
        first = first.saturating_add(covered);
    }
    Ok(())
}

/// Returns the parts of a range before and after the addresses `first..=last`.
fn without(range: &SlotRange, first: u64, last: u64) -> impl Iterator<Item = SlotRange> {
    let before = first.checked_sub(1).and_then(|end| range.part(0, end));
    let after = last
        .checked_add(1)
        .and_then(|next| range.part(next, u64::MAX));
    before.into_iter().chain(after)
}

/// Returns a function that makes the error of a call for a slot.
fn refused(action: SlotAction, range: &SlotRange) -> impl FnOnce(io::Error) -> SlotError {
    let (start, len) = (GuestAddress(range.start), range.len);
    move |source| SlotError::Kvm {
        action,
        start,
        len,
        source,
    }
}

/// Returns the error of a change that was undone, or the reason why it was not.
fn not_undone(
    lost: Vec<(GuestAddress, u64)>,
    remaining: Vec<(GuestAddress, u64)>,
    tracking: Vec<(GuestAddress, u64)>,
    source: SlotError,
) -> SlotError {
    if lost.is_empty() && remaining.is_empty() && tracking.is_empty() {
        return source;
    }
    SlotError::NotUndone {
        lost,
        remaining,
        tracking,
        source: Box::new(source),
    }
}
