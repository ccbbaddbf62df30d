//! [`DirtyLog`]: a bitmap whose marks can be harvested, whatever its type.

use core::num::NonZeroUsize;
use core::ops::{Deref, Range};

use super::atomic::AtomicBitmap;
use super::dirty_pages::DirtyPages;
use super::slice::BaseSlice;
use crate::page_size::DEFAULT_PAGE_SIZE;

/// A bitmap, or a part of one, whose marks can be harvested.
///
/// Implement it for the slices of a bitmap of your own, and [`DirtyMemory`](crate::dirty::DirtyMemory) works with it. The unit type has no marks; `Option` has those of what
/// it has.
pub trait DirtyLog {
    /// Returns the size of a page in bytes.
    fn page_size(&self) -> NonZeroUsize;

    /// Adds the marks of its first bytes to `dirty`, as many as that is for, and clears them.
    fn harvest_into(&self, dirty: &mut DirtyPages);

    /// Harvests as [`harvest_into`](Self::harvest_into) does, but for the [barrier in all threads](super::process_wide_barrier) that has to come before the
    /// bytes are read, if there has to be one: returns whether. So the harvest of many logs takes one for all of them.
    ///
    /// Where the system refuses it, all that is in `dirty` is to be [put back](Self::put_back). The default is `harvest_into`, and that no barrier is
    /// needed.
    fn harvest_before_barrier(&self, dirty: &mut DirtyPages) -> bool {
        self.harvest_into(dirty);
        false
    }

    /// Marks ranges of bytes again, which ascend, whether [tracking](Self::set_tracking) is on or off. Bytes past the end are passed over.
    fn put_back(&self, ranges: &mut dyn Iterator<Item = Range<usize>>);

    /// Switches on or off that writes mark; where there is nothing to switch, that does nothing.
    ///
    /// Before the first copy, there has to be a barrier in all threads: see [`AtomicBitmap::start_tracking`], and [`DirtyMemory::start_tracking`](crate::dirty::DirtyMemory::start_tracking), which has it.
    fn set_tracking(&self, on: bool) {
        let _ = on;
    }
}

/// Has no marks.
impl DirtyLog for () {
    fn page_size(&self) -> NonZeroUsize {
        DEFAULT_PAGE_SIZE
    }

    fn harvest_into(&self, _dirty: &mut DirtyPages) {}

    fn put_back(&self, _ranges: &mut dyn Iterator<Item = Range<usize>>) {}
}

/// Has marks when it is `Some`.
impl<S: DirtyLog> DirtyLog for Option<S> {
    fn page_size(&self) -> NonZeroUsize {
        self.as_ref().map_or(DEFAULT_PAGE_SIZE, S::page_size)
    }

    fn harvest_into(&self, dirty: &mut DirtyPages) {
        if let Some(log) = self {
            log.harvest_into(dirty);
        }
    }

    fn harvest_before_barrier(&self, dirty: &mut DirtyPages) -> bool {
        self.as_ref()
            .is_some_and(|log| log.harvest_before_barrier(dirty))
    }

    fn put_back(&self, ranges: &mut dyn Iterator<Item = Range<usize>>) {
        if let Some(log) = self {
            log.put_back(ranges);
        }
    }

    fn set_tracking(&self, on: bool) {
        if let Some(log) = self {
            log.set_tracking(on);
        }
    }
}

/// The marks from its offset on. Switches the whole bitmap.
///
/// A page of which it has a part, and somebody else another, is harvested each time and stays marked for the other one. Have slices of a bitmap that regions
/// share begin and end with its pages.
impl<B: Deref<Target = AtomicBitmap>> DirtyLog for BaseSlice<B> {
    fn page_size(&self) -> NonZeroUsize {
        self.bitmap().page_size()
    }

    fn harvest_into(&self, dirty: &mut DirtyPages) {
        self.bitmap().harvest_from(self.base_offset(), dirty);
    }

    fn harvest_before_barrier(&self, dirty: &mut DirtyPages) -> bool {
        self.bitmap().drain_from(self.base_offset(), dirty)
    }

    fn put_back(&self, ranges: &mut dyn Iterator<Item = Range<usize>>) {
        self.bitmap().put_back_at(self.base_offset(), ranges);
    }

    fn set_tracking(&self, on: bool) {
        match on {
            true => self.bitmap().start_tracking(),
            false => self.bitmap().stop_tracking(),
        }
    }
}
