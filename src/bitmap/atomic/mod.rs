//! [`AtomicBitmap`]: a bit for each page, which threads set and take at the same time.
//!
//! Pages, sizes, growth and modes are here; harvests and logs in `atomic/harvest.rs`; the bits, and why none of them is lost, in `marks.rs`.
//!
//! `D`, the bytes that are written before their page is marked, is a block of assembly, of which the compiler moves nothing past an atomic
//! operation, since that may touch memory; on x86_64 the locked instruction of a mark is also a full barrier for the processor (Intel manual, volume 3A,
//! section 9.2.3.9), and on aarch64 it releases.

mod chain;
mod harvest;
mod page_size;
#[cfg(test)]
mod tests;

use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::io;
use std::sync::{Mutex, PoisonError};

use super::barrier::process_wide_barrier;
use super::marks::Marks;
use super::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use crate::bits::{bits_between, mask, position, words_of, WORD_BITS};
use crate::page_size::{host_page_size, DEFAULT_PAGE_SIZE};
use chain::MarksChain;
use page_size::PageSize;

/// A bitmap with a bit for each page of a range of memory, which threads mark and harvest at the same time.
///
/// No mark is lost to a harvest at the same time: a page that is written after it was harvested is found by the next harvest.
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
/// Bits past the end of the bitmap do not exist: setting one does nothing, and it never reads as set.
///
/// A bit takes a bit: a bitmap for 1 TiB in pages of 4 KiB takes 32 MiB, and 0.2 % more for a summary by which a harvest finds few
/// marks without looking at all of it.
#[derive(Debug)]
pub struct AtomicBitmap {
    marks: MarksChain,
    /// Pages whose marks are in the first part of `marks`, and have been from the start.
    first_pages: usize,
    /// Held by the one thread that grows the bitmap.
    growing: Mutex<()>,
    /// Number of pages.
    pages: AtomicUsize,
    /// Number of bytes that the pages stand for; the last page may be a part of one.
    byte_size: AtomicUsize,
    page_size: PageSize,
    /// One of the modes below.
    mode: AtomicU8,
}

/// Every write marks.
const ALWAYS: u8 = 0;
/// A write marks what is not marked.
const TEST_FIRST: u8 = 1;
/// Added to either: no write marks.
const OFF: u8 = 2;

impl AtomicBitmap {
    /// Makes a bitmap that tracks `byte_size` bytes in pages of `page_size` bytes, all of them clean.
    ///
    /// A page size that is a power of two is the fast case; others work.
    pub fn new(byte_size: usize, page_size: NonZeroUsize) -> Self {
        let page_size = PageSize::new(page_size);
        let pages = page_size.pages_for(byte_size);
        Self::of(
            Marks::new(pages.div_ceil(WORD_BITS)),
            byte_size,
            page_size,
            ALWAYS,
        )
    }

    fn of(marks: Marks, byte_size: usize, page_size: PageSize, mode: u8) -> Self {
        let pages = page_size.pages_for(byte_size);
        Self {
            first_pages: pages.min(marks.len().saturating_mul(WORD_BITS)),
            marks: MarksChain::new(marks),
            growing: Mutex::new(()),
            pages: AtomicUsize::new(pages),
            byte_size: AtomicUsize::new(byte_size),
            page_size,
            mode: AtomicU8::new(mode),
        }
    }

    /// Tracks `additional_size` more bytes at the end, whose pages are clean.
    ///
    /// For a bitmap that others use, see [`grow`](Self::grow).
    pub fn enlarge(&mut self, additional_size: usize) {
        self.grow(self.byte_size().saturating_add(additional_size));
        // Nobody else uses it: it can be of one piece again.
        if self.marks.has_grown() {
            *self = self.clone();
        }
    }

    /// Tracks `byte_size` bytes in all from now on, if it does not yet. The new pages are clean.
    ///
    /// Others may mark and harvest at the same time. What has grown is found by a few more steps at each mark: a bitmap that
    /// grows often is better made large enough.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let bitmap = AtomicBitmap::new(0x4000, NonZeroUsize::new(0x1000).unwrap());
    /// bitmap.mark_dirty(0x4000, 1);
    /// bitmap.grow(0x8000);
    /// bitmap.mark_dirty(0x7000, 1);
    /// assert_eq!(bitmap.get_and_reset(), [0b1000_0000]);
    /// ```
    pub fn grow(&self, byte_size: usize) {
        let _only_one = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if byte_size <= self.byte_size() {
            return;
        }
        let pages = self.page_size.pages_for(byte_size);
        self.marks.grow_to(pages.div_ceil(WORD_BITS));
        self.byte_size.store(byte_size, Ordering::Release);
        // After the words: who sees these pages finds them.
        self.pages.store(pages, Ordering::Release);
    }

    /// Returns whether the page with number `index` is marked; `false` if there is no such page.
    #[inline]
    pub fn is_bit_set(&self, index: usize) -> bool {
        let (word, bit) = position(index);
        // Bits past the last page are never set, so that only the word needs to exist.
        self.marks
            .locate(word)
            .is_some_and(|(marks, word)| marks.word(word) & bit != 0)
    }

    /// Returns whether the page of the byte at `addr` is marked; `false` if the bitmap does not track it.
    #[inline]
    pub fn is_addr_set(&self, addr: usize) -> bool {
        self.is_bit_set(self.page_size.page_of(addr))
    }

    /// Marks the pages of the `len` bytes at `start_addr`. Bytes that the bitmap does not track are passed over.
    ///
    /// It does so whether [tracking](Self::stop_tracking) is on or off.
    #[inline]
    pub fn set_addr_range(&self, start_addr: usize, len: usize) {
        self.set_pages(start_addr, len, self.tests_first());
    }

    /// Clears the marks of all pages that have one of the `len` bytes at `start_addr`.
    pub fn reset_addr_range(&self, start_addr: usize, len: usize) {
        if let Some((first, last)) = self.pages_of(start_addr, len) {
            self.for_each_word(first, last, |marks, word, bits| marks.clear(word, bits));
            self.after_drain(|bitmap| bitmap.set_addr_range(start_addr, len));
        }
    }

    /// Marks the page with number `index`, if there is one.
    pub fn set_bit(&self, index: usize) {
        if index < self.len() {
            self.set_words(index, index, self.tests_first());
        }
    }

    /// Clears the mark of the page with number `index`, if there is one.
    pub fn reset_bit(&self, index: usize) {
        if index < self.len() {
            self.for_each_word(index, index, |marks, word, bits| marks.clear(word, bits));
            self.after_drain(|bitmap| bitmap.set_bit(index));
        }
    }

    /// Returns the number of pages.
    #[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
    pub fn len(&self) -> usize {
        // Whoever sees pages sees their words.
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

    /// Marks pages of a word, of which there are such.
    #[inline]
    fn update_word(&self, word: usize, bits: u64, look: bool) {
        let Some((marks, word)) = self.marks.locate(word) else {
            return;
        };
        match look {
            true => marks.test_and_set(word, bits),
            false => marks.set(word, bits),
        }
    }

    /// From now on, writes do not mark a page that is marked: that takes a look, where marking takes a locked instruction, several times as long.
    ///
    /// Harvests pay for it: each makes a system call, [`process_wide_barrier`], since without one a look may be answered before the bytes are
    /// visible, and a page is lost. So does each of the methods that clear marks. Clones do as the original does.
    ///
    /// # Errors
    ///
    /// What the kernel answers, if it cannot have that barrier (`membarrier(2)`); nothing has changed then. Should it refuse a later one, the harvest
    /// leaves all that it found marked as well: nothing is lost, and nothing gets clean.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let mut bitmap = AtomicBitmap::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
    /// if let Err(error) = bitmap.test_before_marking() {
    ///     println!("marking is slower here: {error}");
    /// }
    /// bitmap.mark_dirty(0x3000, 1);
    /// bitmap.mark_dirty(0x3000, 1);
    /// assert_eq!(bitmap.get_and_reset(), [0b1000]);
    /// ```
    pub fn test_before_marking(&mut self) -> io::Result<()> {
        process_wide_barrier()?;
        *self.mode.get_mut() |= TEST_FIRST;
        Ok(())
    }

    /// From now on, [`mark_dirty`](Bitmap::mark_dirty), and with it every write to guest memory, marks nothing. What is marked stays.
    ///
    /// A write costs what it costs without a bitmap then, and one look at a byte that nobody writes.
    pub fn stop_tracking(&self) {
        self.mode.fetch_or(OFF, Ordering::SeqCst);
    }

    /// From now on, writes mark again.
    ///
    /// A write that another thread has under way at this moment may be neither marked nor visible yet. Before the first copy of the memory, have the
    /// threads that write pass a lock, or stop, or call [`process_wide_barrier`] after this: what they wrote before is visible then, and
    /// what they write from then on is marked. [`DirtyMemory::start_tracking`](crate::dirty::DirtyMemory::start_tracking) does both, for a whole memory.
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
        self.mode.fetch_and(!OFF, Ordering::SeqCst);
    }

    /// Returns whether writes mark.
    pub fn is_tracking(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & OFF == 0
    }

    /// The first and the last page of `len` bytes at `start`, as far as they are tracked.
    #[inline(always)]
    fn pages_of(&self, start: usize, len: usize) -> Option<(usize, usize)> {
        let last_byte = start.saturating_add(len.checked_sub(1)?);
        let last_page = self.len().checked_sub(1)?;
        let first = self.page_size.page_of(start);
        let last = self.page_size.page_of(last_byte).min(last_page);
        (first <= last).then_some((first, last))
    }

    #[inline(always)]
    fn tests_first(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & TEST_FIRST != 0
    }

    /// Marks the pages of `len` bytes at `start`.
    #[inline(always)]
    fn set_pages(&self, start: usize, len: usize, look: bool) {
        let Some(more) = len.checked_sub(1) else {
            return;
        };
        let first = self.page_size.page_of(start);
        let last = self.page_size.page_of(start.saturating_add(more));
        let (first_word, first_bit) = position(first);
        let (last_word, last_bit) = position(last);
        if first_word != last_word || last >= self.first_pages {
            return self.set_words(first, last, look);
        }
        let bits = bits_between(first_bit, last_bit);
        let marks = self.marks.first();
        if look {
            marks.test_and_set(first_word, bits);
        } else {
            marks.set(first_word, bits);
        }
    }

    /// Marks the pages from `first` to `last`, as far as there are such: in several words, or in pages that have been added.
    #[inline(never)]
    fn set_words(&self, first: usize, last: usize, look: bool) {
        let last = match self.len().checked_sub(1) {
            Some(end) if first <= end => last.min(end),
            _ => return,
        };
        let (first_word, _) = position(first);
        let (last_word, _) = position(last);
        let marks = self.marks.first();
        if look {
            self.for_each_word(first, last, Marks::test_and_set);
        } else if last_word < marks.len() && last_word.saturating_sub(first_word) > 1 {
            // Both ends bit by bit, and the whole words between them a line at a time.
            let behind = (last % WORD_BITS).saturating_add(1);
            marks.set(first_word, mask(first % WORD_BITS, WORD_BITS));
            marks.set_words(first_word.saturating_add(1), last_word);
            marks.set(last_word, mask(0, behind));
        } else {
            self.for_each_word(first, last, Marks::set);
        }
    }

    /// Calls `update` for each word that has bits of the pages from `first` to `last`, with those
    /// bits.
    fn for_each_word(&self, first: usize, last: usize, update: impl Fn(&Marks, usize, u64)) {
        for (word, bits) in words_of(first..last.saturating_add(1)) {
            if let Some((marks, word)) = self.marks.locate(word) {
                update(marks, word, bits);
            }
        }
    }

    /// Copies the first pages. There may be more of them by now, in the last word of these as well.
    pub(super) fn copy_of(&self, pages: usize) -> Self {
        let copy = Marks::new(pages.div_ceil(WORD_BITS));
        self.marks.copy_to(&copy);
        copy.clear(pages / WORD_BITS, mask(pages % WORD_BITS, WORD_BITS));
        let byte_size = self
            .byte_size()
            .min(pages.saturating_mul(self.page_size().get()));
        Self::of(
            copy,
            byte_size,
            self.page_size,
            self.mode.load(Ordering::Relaxed),
        )
    }
}

/// A copy of the marks as they are found, word by word, of the pages that there are when it begins.
impl Clone for AtomicBitmap {
    fn clone(&self) -> Self {
        self.copy_of(self.len())
    }
}

/// A bitmap of no pages.
impl Default for AtomicBitmap {
    fn default() -> Self {
        AtomicBitmap::new(0, DEFAULT_PAGE_SIZE)
    }
}

impl<'a> WithBitmapSlice<'a> for AtomicBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for AtomicBitmap {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        let mode = self.mode.load(Ordering::Relaxed);
        if mode & OFF == 0 {
            self.set_pages(offset, len, mode & TEST_FIRST != 0);
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
        self.enlarge(len.saturating_sub(self.byte_size()));
    }
}

impl NewBitmap for AtomicBitmap {
    fn with_len(len: usize) -> Self {
        Self::new(len, host_page_size())
    }
}
