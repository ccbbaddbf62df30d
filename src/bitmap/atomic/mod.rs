//! [`AtomicBitmap`]: one bit per page, which threads set and harvest at the same time.
//!
//! ```text
//!   AtomicBitmap   pages, and whether writes mark           this file; harvest.rs; ../tracking.rs
//!     └─ MarksChain   bits that grow while threads use them    chain.rs: a list of Marks
//!          └─ Marks      a fixed number of bits, a summary       ../marks.rs, with the proof
//! ```
//!
//! The proof in `marks.rs` needs the data (`D`) to be written before the fence (`W`) or the mark
//! (`M`). An assembly block that may access memory, or a system call of the same thread, writes the
//! data. So the compiler does not move the write past the fence or the atomic operation of the
//! mark. On x86_64 both are locked instructions, which are full barriers (Intel SDM, volume 3A,
//! section 9.2.3.9). They also drain the buffers of non-temporal stores ("Methods of Caching
//! Available"). On aarch64 the fence is `dmb ish`, and the mark has release semantics.
//!
//! Data of another thread or a device are covered if the mark follows an acquire load of their
//! completion.

mod chain;
mod harvest;
mod page_size;
#[cfg(test)]
mod tests;

use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::collections::TryReserveError;
use std::sync::{Mutex, PoisonError};

use super::marks::Marks;
use super::tracking::Tracking;
use super::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use crate::bits::{bits_between, position, WORD_BITS};
use crate::page_size::{host_page_size, DEFAULT_PAGE_SIZE};
use chain::MarksChain;
use page_size::PageSize;

/// A dirty bitmap with one bit per page, which threads mark and harvest at the same time.
///
/// No interleaving loses a page: a page that is written after a harvest is in the next harvest.
///
/// Bits past the end of the bitmap do not exist. Setting one does nothing, and reading one returns
/// `false`.
///
/// A bitmap for 1 TiB in pages of 4 KiB takes 32 MiB. A large bitmap also has a summary of 0.2 % of
/// that size, with which a harvest skips ranges without marks.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroUsize;
/// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
///
/// let bitmap = AtomicBitmap::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
/// bitmap.mark_dirty(0x1ffe, 4);
/// assert!(bitmap.dirty_at(0x1000) && bitmap.dirty_at(0x2000));
/// assert_eq!(bitmap.get_and_reset(), [0b110]);
/// assert_eq!(bitmap.get_and_reset(), [0]);
/// ```
///
/// The bitmaps of a guest memory mark every write through it:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap<AtomicBitmap> =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
/// memory.write_obj(1u8, GuestAddress(0x3000))?;
/// let region = memory.find_region(GuestAddress(0)).unwrap();
/// assert_eq!(region.get_mmap().bitmap().is_addr_set(0x3000), true);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "dirty log")]
#[doc(alias = "migrate")]
#[doc(alias = "pre-copy")]
#[derive(Debug)]
pub struct AtomicBitmap {
    marks: MarksChain,
    /// The pages whose marks are in the first part of `marks`, without those added by `grow`.
    first_pages: usize,
    /// Held by a thread that grows the bitmap.
    growing: Mutex<()>,
    /// The number of pages.
    pages: AtomicUsize,
    /// The number of bytes tracked. The last page may be shorter than the others.
    byte_size: AtomicUsize,
    page_size: PageSize,
    tracking: Tracking,
}

impl AtomicBitmap {
    /// Creates a bitmap that tracks `byte_size` bytes in pages of `page_size` bytes, all clean.
    ///
    /// Any page size works. A power of two is faster, because it needs no division.
    ///
    /// If memory runs out, the process ends, as it does for a `Vec`. Use [`try_new`](Self::try_new)
    /// for a size that the caller does not control.
    pub fn new(byte_size: usize, page_size: NonZeroUsize) -> Self {
        let page_size = PageSize::new(page_size);
        let words = page_size.pages_for(byte_size).div_ceil(WORD_BITS);
        Self::with_marks(Marks::new(words), byte_size, page_size, Tracking::new())
    }

    /// Creates a bitmap like [`new`](Self::new), but returns an error if memory runs out.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::AtomicBitmap;
    ///
    /// assert_eq!(AtomicBitmap::try_new(0x10_000, NonZeroUsize::MIN)?.len(), 0x10_000);
    /// assert!(AtomicBitmap::try_new(usize::MAX, NonZeroUsize::MIN).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns an error if memory runs out.
    pub fn try_new(byte_size: usize, page_size: NonZeroUsize) -> Result<Self, TryReserveError> {
        let page_size = PageSize::new(page_size);
        let words = page_size.pages_for(byte_size).div_ceil(WORD_BITS);
        let marks = Marks::try_new(words)?;
        Ok(Self::with_marks(
            marks,
            byte_size,
            page_size,
            Tracking::new(),
        ))
    }

    fn with_marks(marks: Marks, byte_size: usize, page_size: PageSize, tracking: Tracking) -> Self {
        let pages = page_size.pages_for(byte_size);
        Self {
            first_pages: pages.min(marks.len().saturating_mul(WORD_BITS)),
            marks: MarksChain::new(marks),
            growing: Mutex::new(()),
            pages: AtomicUsize::new(pages),
            byte_size: AtomicUsize::new(byte_size),
            page_size,
            tracking,
        }
    }

    /// Tracks `additional_size` more bytes at the end. The new pages are clean.
    ///
    /// [`grow`](Self::grow) does the same for a bitmap that other threads use. If memory runs out,
    /// the process ends, as it does for a `Vec`.
    pub fn enlarge(&mut self, additional_size: usize) {
        let byte_size = self.byte_size().saturating_add(additional_size);
        let pages = self.page_size.pages_for(byte_size);
        self.enlarge_into(Marks::new(pages.div_ceil(WORD_BITS)), byte_size);
    }

    /// Moves the marks to `marks`, to track `byte_size` bytes.
    fn enlarge_into(&mut self, marks: Marks, byte_size: usize) {
        // The bitmap is borrowed mutably, so all bits can be made contiguous.
        self.marks.copy_to(&marks);
        *self = Self::with_marks(marks, byte_size, self.page_size, self.tracking.copy());
    }

    /// Tracks `byte_size` bytes in total, unless it tracks more already. The new pages are clean.
    ///
    /// Other threads may mark and harvest at the same time. Marking a page that was added this way
    /// takes a few more steps. If a bitmap would grow often, make it large enough at the start.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let bitmap = AtomicBitmap::new(0x4000, NonZeroUsize::new(0x1000).unwrap());
    /// bitmap.mark_dirty(0x4000, 1); // past the end
    /// bitmap.grow(0x8000)?;
    /// bitmap.mark_dirty(0x7000, 1);
    /// assert_eq!(bitmap.get_and_reset(), [0b1000_0000]);
    /// # Ok::<(), std::collections::TryReserveError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns an error if the words of the new pages cannot be allocated. The bitmap is then
    /// unchanged. The small list entry for these words ends the process if it cannot be allocated,
    /// as an entry of a `Vec` does.
    #[doc(alias = "hotplug")]
    pub fn grow(&self, byte_size: usize) -> Result<(), TryReserveError> {
        let _guard = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if byte_size <= self.byte_size() {
            return Ok(());
        }
        let pages = self.page_size.pages_for(byte_size);
        self.marks.grow_to(pages.div_ceil(WORD_BITS))?;
        self.byte_size.store(byte_size, Ordering::Release);
        // Release, after the words were added: a thread that loads the new number of pages (`len`)
        // also finds their words.
        self.pages.store(pages, Ordering::Release);
        Ok(())
    }

    /// Returns the number of pages.
    #[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
    pub fn len(&self) -> usize {
        // Acquire: pairs with the store in `grow`.
        self.pages.load(Ordering::Acquire)
    }

    /// Returns the number of bytes that are tracked.
    pub fn byte_size(&self) -> usize {
        self.byte_size.load(Ordering::Acquire)
    }

    /// Returns the size of a page in bytes.
    pub fn page_size(&self) -> NonZeroUsize {
        self.page_size.bytes()
    }

    /// Returns whether the page with the number `index` is dirty; `false` past the last page.
    #[inline]
    pub fn is_bit_set(&self, index: usize) -> bool {
        let (word, bit) = position(index);
        // Bits past the last page are never set, so the number of pages need not be checked.
        self.marks
            .locate(word)
            .is_some_and(|(marks, word)| marks.word(word) & bit != 0)
    }

    /// Returns whether the page of the byte at `addr` is dirty.
    ///
    /// Returns `false` if the bitmap does not track it.
    #[inline]
    pub fn is_addr_set(&self, addr: usize) -> bool {
        self.is_bit_set(self.page_size.page_of(addr))
    }

    /// Marks the pages of the `len` bytes at `start_addr`, ignoring bytes past the end.
    ///
    /// It marks them even if [tracking](Self::stop_tracking) is off.
    #[inline]
    pub fn set_addr_range(&self, start_addr: usize, len: usize) {
        self.mark_pages(start_addr, len);
    }

    /// Clears the marks of all pages that have any of the `len` bytes at `start_addr`.
    pub fn reset_addr_range(&self, start_addr: usize, len: usize) {
        if let Some((first, last)) = self.pages_of(start_addr, len) {
            self.marks
                .harvest(first..last.saturating_add(1), &mut [], &mut []);
        }
    }

    /// Marks the page with the number `index`, if there is one.
    pub fn set_bit(&self, index: usize) {
        if index < self.len() {
            self.mark_range(index, index);
        }
    }

    /// Clears the mark of the page with the number `index`, if there is one.
    pub fn reset_bit(&self, index: usize) {
        if index < self.len() {
            self.marks
                .harvest(index..index.saturating_add(1), &mut [], &mut []);
        }
    }

    /// Makes tracking cheaper for a VMM that switches it only while its writers are paused.
    ///
    /// Tracking is on initially. A write to guest memory that is not marked then costs no fence.
    /// `start_tracking` and `stop_tracking` must be called while no other thread writes to the
    /// memory, or between its write and its mark. The VMM acquires what the writers released when
    /// they paused, and the writers acquire what it releases when they resume. A lock or a channel
    /// does both.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let page_size = NonZeroUsize::new(0x1000).unwrap();
    /// let bitmap = AtomicBitmap::new(0x10_000, page_size).switched_while_paused();
    /// bitmap.stop_tracking();
    /// bitmap.mark_dirty(0, 1);
    /// assert!(!bitmap.dirty_at(0));
    /// ```
    #[must_use]
    pub fn switched_while_paused(mut self) -> Self {
        self.tracking = Tracking::switched_while_paused();
        self
    }

    /// Stops marking: writes to guest memory and [`mark_dirty`](Bitmap::mark_dirty) mark nothing.
    ///
    /// Existing marks stay. A write then costs a load and a fence more than without a bitmap. It
    /// costs only the load if tracking is [switched while writers are
    /// paused](Self::switched_while_paused).
    pub fn stop_tracking(&self) {
        self.tracking.switch(false);
    }

    /// Resumes marking.
    ///
    /// When it returns, the first copy of the memory may begin. All unmarked writes of other
    /// threads are visible to this thread, and all later writes are marked.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let bitmap = AtomicBitmap::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
    /// bitmap.stop_tracking();
    /// bitmap.mark_dirty(0, 1);
    /// bitmap.start_tracking();
    /// bitmap.mark_dirty(0x1000, 1);
    /// assert_eq!(bitmap.get_and_reset(), [0b10]);
    /// ```
    pub fn start_tracking(&self) {
        self.tracking.switch(true);
    }

    /// Returns whether writes mark.
    pub fn is_tracking(&self) -> bool {
        self.tracking.is_on()
    }

    /// Returns the first and the last tracked page of the `len` bytes at `start`.
    ///
    /// Returns `None` if there is no such page.
    #[inline(always)]
    fn pages_of(&self, start: usize, len: usize) -> Option<(usize, usize)> {
        let last_byte = start.saturating_add(len.checked_sub(1)?);
        let last_page = self.len().checked_sub(1)?;
        let first = self.page_size.page_of(start);
        let last = self.page_size.page_of(last_byte).min(last_page);
        (first <= last).then_some((first, last))
    }

    /// Marks the pages of the `len` bytes at `start`.
    #[inline(always)]
    fn mark_pages(&self, start: usize, len: usize) {
        let Some(more) = len.checked_sub(1) else {
            return;
        };
        let first = self.page_size.page_of(start);
        let last = self.page_size.page_of(start.saturating_add(more));
        let (first_word, first_bit) = position(first);
        let (last_word, last_bit) = position(last);
        if first_word != last_word || last >= self.first_pages {
            return self.mark_range(first, last);
        }
        let bits = bits_between(first_bit, last_bit);
        self.marks.first().mark(first_word, bits);
    }

    /// Marks those pages from `first` to `last` that exist.
    ///
    /// This is the slow path, for pages of several words and pages that were added by `grow`.
    #[inline(never)]
    fn mark_range(&self, first: usize, last: usize) {
        if last < self.first_pages {
            self.marks.first().mark_range(first, last)
        } else {
            self.mark_grown(first, last)
        }
    }

    /// Marks pages of which some were added by [`grow`](Self::grow), or do not exist.
    #[cold]
    fn mark_grown(&self, first: usize, last: usize) {
        self.marks
            .mark_range(first..last.saturating_add(1).min(self.len()))
    }

    /// Copies the first `pages` pages.
    ///
    /// The bitmap may have grown since the caller loaded their number.
    fn copy_of(&self, pages: usize) -> Self {
        let copy = Marks::new(pages.div_ceil(WORD_BITS));
        self.marks.copy_to(&copy);
        // The last word may have marks of pages that were added in the meantime.
        copy.harvest(pages..usize::MAX, &mut [], &mut []);
        let byte_size = self
            .byte_size()
            .min(pages.saturating_mul(self.page_size().get()));
        Self::with_marks(copy, byte_size, self.page_size, self.tracking.copy())
    }
}

/// Copies the marks word by word, of the pages that exist when the copy begins.
impl Clone for AtomicBitmap {
    fn clone(&self) -> Self {
        self.copy_of(self.len())
    }
}

/// Creates a bitmap without pages.
impl Default for AtomicBitmap {
    fn default() -> Self {
        AtomicBitmap::new(0, DEFAULT_PAGE_SIZE)
    }
}

impl<'a> WithBitmapSlice<'a> for AtomicBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for AtomicBitmap {
    #[inline(always)]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.tracking.is_on_after_write() {
            self.mark_pages(offset, len);
        }
    }

    #[inline]
    fn dirty_at(&self, offset: usize) -> bool {
        self.is_addr_set(offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }

    #[inline]
    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        len == 0
            || offset
                .checked_add(len.wrapping_sub(1))
                .is_some_and(|last_byte| self.page_size.page_of(last_byte) < self.len())
    }

    fn grow_to_track(&mut self, len: usize) {
        if len > self.byte_size() {
            let pages = self.page_size.pages_for(len);
            // After an error the bitmap is unchanged, and `tracks_range` reports it.
            if let Ok(marks) = Marks::try_new(pages.div_ceil(WORD_BITS)) {
                self.enlarge_into(marks, len);
            }
        }
    }

    fn grow_shared(&self, len: usize) {
        // After an error the bitmap is unchanged, and `tracks_range` reports it.
        let _ = self.grow(len);
    }
}

impl NewBitmap for AtomicBitmap {
    fn with_len(len: usize) -> Self {
        Self::new(len, host_page_size())
    }

    fn try_with_len(len: usize) -> Result<Self, TryReserveError> {
        Self::try_new(len, host_page_size())
    }
}
