//! [`DirtyLog`]: a bitmap of any type that can be harvested.

use core::num::NonZeroUsize;
use core::ops::{Deref, Range};
use core::ptr;

use super::atomic::AtomicBitmap;
use super::dirty_pages::DirtyPages;
use super::slice::BaseSlice;
use crate::page_size::DEFAULT_PAGE_SIZE;

/// A bitmap, or a slice of one, that can be harvested.
///
/// [`DirtyMemory`](crate::dirty::DirtyMemory) harvests the regions of a memory through this trait.
/// Implement it for the slices of your own bitmap type to use it there. `()` and `None` have no
/// marks.
///
/// # Examples
///
/// A log for memory that another component tracks, and that is always sent as a whole:
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::ops::Range;
/// use std::sync::atomic::{fence, Ordering};
/// use vm_memory::bitmap::{DirtyLog, DirtyPages};
///
/// struct AlwaysDirty;
///
/// impl DirtyLog for AlwaysDirty {
///     fn page_size(&self) -> NonZeroUsize {
///         NonZeroUsize::new(0x1000).unwrap()
///     }
///
///     fn harvest_into(&self, dirty: &mut DirtyPages) {
///         dirty.insert_range(0, dirty.byte_size());
///         fence(Ordering::SeqCst);
///     }
///
///     fn put_back(&self, _ranges: &mut dyn Iterator<Item = Range<usize>>) {}
/// }
///
/// let mut dirty = DirtyPages::new(0x3000, AlwaysDirty.page_size());
/// AlwaysDirty.harvest_into(&mut dirty);
/// assert_eq!(dirty.total_pages(), 3);
/// ```
#[doc(alias = "harvest")]
#[doc(alias = "KVM_GET_DIRTY_LOG")]
pub trait DirtyLog {
    /// Returns the size of a page in bytes.
    fn page_size(&self) -> NonZeroUsize;

    /// Returns the number of bytes for which the log has bits, from the start of its memory.
    ///
    /// [`DirtyMemory`](crate::dirty::DirtyMemory) allocates a bit for each page of RAM. For a
    /// region that is not mapped in this process, it allocates only the bits of these bytes. The
    /// default is for a log that has bits for all of its memory.
    fn tracked_bytes(&self) -> usize {
        usize::MAX
    }

    /// Returns the address of the bitmap, and the offset in it at which this log begins, in bytes.
    ///
    /// Logs of one bitmap share their marks: a harvest of one clears them for all.
    /// [`DirtyMemory`](crate::dirty::DirtyMemory) compares the addresses. It harvests such logs
    /// once, through the one with the smallest offset, and reports the pages in the regions of all
    /// of them.
    ///
    /// The default, `None`, is for a log whose marks no other region shares. Implement this method
    /// if several regions of a memory may have logs with the same marks.
    fn bitmap_and_offset(&self) -> Option<(usize, usize)> {
        None
    }

    /// Adds the marks to `dirty`, and clears them.
    ///
    /// These are the marks of the first [`byte_size`](DirtyPages::byte_size) bytes. These may be
    /// more bytes than the region has, if others [share](Self::bitmap_and_offset) the bitmap.
    ///
    /// After the call, the data of all pages whose marks it cleared must be visible to this thread.
    /// A custom implementation must end with `fence(SeqCst)`.
    fn harvest_into(&self, dirty: &mut DirtyPages);

    /// Returns about how many of the first `len` bytes are marked. The marks stay.
    ///
    /// Writers may mark at the same time. The default counts all bytes for which the log has bits.
    /// So a log that does not know its marks never lets a migration pause its guest too early.
    fn estimate(&self, len: usize) -> usize {
        len.min(self.tracked_bytes())
    }

    /// Marks ranges of bytes again, even if [tracking](Self::set_tracking) is off.
    ///
    /// The ranges ascend. Bytes past the end are ignored.
    fn put_back(&self, ranges: &mut dyn Iterator<Item = Range<usize>>);

    /// Switches marking on or off. The default does nothing.
    ///
    /// After switching it on, all unmarked writes must be visible to this thread: see
    /// [`AtomicBitmap::start_tracking`].
    fn set_tracking(&self, on: bool) {
        let _ = on;
    }
}

impl DirtyLog for () {
    fn page_size(&self) -> NonZeroUsize {
        DEFAULT_PAGE_SIZE
    }

    fn tracked_bytes(&self) -> usize {
        0
    }

    fn harvest_into(&self, _dirty: &mut DirtyPages) {}

    fn put_back(&self, _ranges: &mut dyn Iterator<Item = Range<usize>>) {}
}

impl<S: DirtyLog> DirtyLog for Option<S> {
    fn page_size(&self) -> NonZeroUsize {
        self.as_ref().map_or(DEFAULT_PAGE_SIZE, S::page_size)
    }

    fn tracked_bytes(&self) -> usize {
        self.as_ref().map_or(0, S::tracked_bytes)
    }

    fn bitmap_and_offset(&self) -> Option<(usize, usize)> {
        self.as_ref().and_then(S::bitmap_and_offset)
    }

    fn harvest_into(&self, dirty: &mut DirtyPages) {
        if let Some(log) = self {
            log.harvest_into(dirty);
        }
    }

    fn estimate(&self, len: usize) -> usize {
        self.as_ref().map_or(0, |log| log.estimate(len))
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

/// Harvests the part of the bitmap that starts at the slice's offset.
///
/// [`set_tracking`](Self::set_tracking) switches the whole bitmap.
///
/// If a page is only partly in the slice, every harvest reports it and leaves it dirty, because the
/// mark also stands for bytes outside. Slices of one bitmap for several regions should therefore
/// begin and end at page boundaries.
impl<B: Deref<Target = AtomicBitmap>> DirtyLog for BaseSlice<B> {
    fn page_size(&self) -> NonZeroUsize {
        self.bitmap().page_size()
    }

    fn tracked_bytes(&self) -> usize {
        self.bitmap().byte_size().saturating_sub(self.base_offset())
    }

    fn bitmap_and_offset(&self) -> Option<(usize, usize)> {
        Some((ptr::from_ref(self.bitmap()).addr(), self.base_offset()))
    }

    fn harvest_into(&self, dirty: &mut DirtyPages) {
        self.bitmap().harvest_from(self.base_offset(), dirty);
    }

    fn estimate(&self, len: usize) -> usize {
        self.bitmap().estimate_from(self.base_offset(), len)
    }

    fn put_back(&self, ranges: &mut dyn Iterator<Item = Range<usize>>) {
        self.bitmap().put_back_at(self.base_offset(), ranges);
    }

    fn set_tracking(&self, on: bool) {
        if on {
            self.bitmap().start_tracking()
        } else {
            self.bitmap().stop_tracking()
        }
    }
}
