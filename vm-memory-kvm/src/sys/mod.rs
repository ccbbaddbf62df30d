//! The calls of KVM, and the memory of its dirty rings.
//!
//! [`Calls`] is what the rest of the crate needs of a virtual machine. Tests implement it by a
//! double, whose calls fail when the test wants it.

mod ring;
mod vm;

use std::{fmt, io};

#[cfg(test)]
pub(crate) use ring::double::SharedEntries;
pub(crate) use ring::{MappedRing, Ring};
pub(crate) use vm::Vm;

/// The host memory of a slot, and its place in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotRange {
    /// The first guest address, a multiple of the page size.
    pub(crate) start: u64,
    /// The length in bytes, a multiple of the page size and not 0.
    pub(crate) len: u64,
    /// The host address of the first byte.
    pub(crate) host: u64,
    /// Writes of the guest exit to the VMM.
    pub(crate) is_read_only: bool,
}

impl SlotRange {
    /// Returns the last guest address. The caller of `SlotTable::add` checks that it exists.
    pub(crate) fn last(&self) -> u64 {
        self.start.saturating_add(self.len.saturating_sub(1))
    }

    /// Returns the part with the guest addresses `first..=last`, or `None` if it is empty.
    pub(crate) fn part(&self, first: u64, last: u64) -> Option<Self> {
        let (first, last) = (first.max(self.start), last.min(self.last()));
        let more = last.checked_sub(first)?;
        let skipped = first.saturating_sub(self.start);
        Some(Self {
            start: first,
            len: more.saturating_add(1),
            host: self.host.saturating_add(skipped),
            is_read_only: self.is_read_only,
        })
    }
}

/// The calls of a virtual machine.
pub(crate) trait Calls: fmt::Debug + Send {
    /// Creates slot `number`, or changes its tracking.
    fn set_slot(&self, number: u32, range: &SlotRange, is_tracked: bool) -> io::Result<()>;

    /// Deletes a slot.
    fn delete_slot(&self, number: u32, range: &SlotRange) -> io::Result<()>;

    /// Reads the dirty log of a slot. Clears it, unless the log is cleared by `clear_log`.
    fn read_log(&self, number: u32, range: &SlotRange) -> io::Result<Vec<u64>>;

    /// Clears the bits that are set in `words`, which stand for `pages` pages at `first_page`.
    fn clear_log(
        &self,
        number: u32,
        first_page: u64,
        pages: u32,
        words: &mut [u64],
    ) -> io::Result<()>;

    /// Gives the collected entries of all rings back to KVM, which logs their pages again.
    fn reset_rings(&self) -> io::Result<()>;
}
