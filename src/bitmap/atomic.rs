//! [`AtomicBitmap`]: a bit for each page, in words that threads set and clear at the same time.
//!
//! # No interleaving loses a page
//!
//! Three parties: a *writer* (a device thread) stores bytes `D` and then marks their page, `M = fetch_or(bit, Release)`. A *harvest*
//! takes a word, `H = swap(0, AcqRel)`, and then reads the bytes of the pages whose bits it found, `R`.
//!
//! All operations on one word are ordered (modification order). Take any writer's `M` and any harvest's `H` of that word:
//!
//! - `M` before `H`: no operation between them clears the bit, or there would be an earlier harvest `H'` that found it, and what
//!   follows holds for `H'`. So `H` finds the bit. Every operation between them is a read-modify-write, which continues the release
//!   sequence that `M` heads, so `H` acquires what `M` released: `D` happens before `R`, and `R` sees the new bytes.
//! - `M` after `H`: the bit is set when `M` is done, whatever it was before, and the next harvest finds it.
//!
//! In both cases the page is copied after `D`. This rests on two choices. `M` is a read-modify-write even where the bit seems to be
//! set already: a plain look first could be answered before `D` is visible, and a harvest in between would clear the bit and read old
//! bytes. And marking comes after the write: the slices of guest memory see to that. The clearing of single pages
//! (`reset_bit`, `reset_addr_range`) is a read-modify-write as well, so that it breaks no release sequence.
//!
//! A harvest may pass over a word in which a relaxed look finds no bit: it clears nothing, and is the case "`M` after `H`" for every mark
//! that it does not see. A harvest after the writers have stopped (joined, or paused through a lock) sees all their marks, since
//! those happen before it.
//!
//! `D` is a block of assembly, of which the compiler moves nothing past an atomic operation with a memory clobber; on x86_64 the locked
//! instruction of `M` is also a full barrier for the processor (Intel manual, volume 3A, section 9.2.3.9).

use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// Bits in a word.
const WORD_BITS: usize = 64;

/// The page size where none is given and none can be asked for, in bytes.
const DEFAULT_PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

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
#[derive(Debug)]
pub struct AtomicBitmap {
    words: Vec<AtomicU64>,
    /// Number of pages.
    pages: usize,
    /// Number of bytes that the pages stand for; the last page may be a part of one.
    byte_size: usize,
    page_size: PageSize,
}

/// A page size, ready to divide by.
#[derive(Clone, Copy, Debug)]
enum PageSize {
    /// A power of two: two to this.
    Shift(u32),
    /// Any other number, as the reference allows.
    Odd(NonZeroUsize),
}

impl PageSize {
    fn new(bytes: NonZeroUsize) -> Self {
        if bytes.is_power_of_two() {
            Self::Shift(bytes.trailing_zeros())
        } else {
            Self::Odd(bytes)
        }
    }

    /// The page of a byte.
    #[inline(always)]
    fn page_of(self, offset: usize) -> usize {
        match self {
            Self::Shift(shift) => offset >> shift,
            Self::Odd(size) => offset / size,
        }
    }

    /// How many pages hold that many bytes.
    fn pages_for(self, bytes: usize) -> usize {
        match bytes.checked_sub(1) {
            // No overflow: there is a byte, so the quotient is less than the greatest number, or the page size is 1 and the sum is `bytes`.
            Some(last) => self.page_of(last).saturating_add(1),
            None => 0,
        }
    }
}

impl AtomicBitmap {
    /// Makes a bitmap that tracks `byte_size` bytes in pages of `page_size` bytes, all of them clean.
    ///
    /// A page size that is a power of two is the fast case; others work.
    pub fn new(byte_size: usize, page_size: NonZeroUsize) -> Self {
        let page_size = PageSize::new(page_size);
        let pages = page_size.pages_for(byte_size);
        let words = (0..pages.div_ceil(WORD_BITS))
            .map(|_| AtomicU64::new(0))
            .collect();
        Self {
            words,
            pages,
            byte_size,
            page_size,
        }
    }

    /// Tracks `additional_size` more bytes at the end, whose pages are clean.
    pub fn enlarge(&mut self, additional_size: usize) {
        self.byte_size = self.byte_size.saturating_add(additional_size);
        self.pages = self.page_size.pages_for(self.byte_size);
        self.words
            .resize_with(self.pages.div_ceil(WORD_BITS), || AtomicU64::new(0));
    }

    /// Returns whether the page with number `index` is marked; `false` if there is no such page.
    #[inline]
    pub fn is_bit_set(&self, index: usize) -> bool {
        let (word, bit) = position(index);
        // Bits past the last page are never set, so that only the word needs to exist.
        self.words
            .get(word)
            .is_some_and(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Returns whether the page of the byte at `addr` is marked; `false` if the bitmap does not track it.
    #[inline]
    pub fn is_addr_set(&self, addr: usize) -> bool {
        self.is_bit_set(self.page_size.page_of(addr))
    }

    /// Marks the pages of the `len` bytes at `start_addr`. Bytes that the bitmap does not track are passed over.
    #[inline]
    pub fn set_addr_range(&self, start_addr: usize, len: usize) {
        self.for_each_word(start_addr, len, |word, bits| {
            word.fetch_or(bits, Ordering::Release);
        });
    }

    /// Clears the marks of all pages that have one of the `len` bytes at `start_addr`.
    pub fn reset_addr_range(&self, start_addr: usize, len: usize) {
        self.for_each_word(start_addr, len, |word, bits| {
            word.fetch_and(!bits, Ordering::AcqRel);
        });
    }

    /// Marks the page with number `index`, if there is one.
    pub fn set_bit(&self, index: usize) {
        if index < self.pages {
            let (word, bit) = position(index);
            if let Some(word) = self.words.get(word) {
                word.fetch_or(bit, Ordering::Release);
            }
        }
    }

    /// Clears the mark of the page with number `index`, if there is one.
    pub fn reset_bit(&self, index: usize) {
        let (word, bit) = position(index);
        if let Some(word) = self.words.get(word) {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// Returns the number of pages.
    #[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
    pub fn len(&self) -> usize {
        self.pages
    }

    /// Returns the number of bytes that are tracked.
    pub fn byte_size(&self) -> usize {
        self.byte_size
    }

    /// Harvests the bitmap: returns all marks and clears them, word by word.
    ///
    /// Bit `i` of word `w` is page `64 * w + i`. A page that is written while this runs is in the result, or will be in the next.
    pub fn get_and_reset(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| match word.load(Ordering::Relaxed) {
                0 => 0,
                _ => word.swap(0, Ordering::AcqRel),
            })
            .collect()
    }

    /// Clears all marks.
    pub fn reset(&self) {
        for word in &self.words {
            word.swap(0, Ordering::AcqRel);
        }
    }

    /// Calls `update` for each word that has bits of the pages of `len` bytes at `start`, with a mask of those bits.
    #[inline]
    fn for_each_word(&self, start: usize, len: usize, update: impl Fn(&AtomicU64, u64)) {
        let Some(last_byte) = len.checked_sub(1).map(|more| start.saturating_add(more)) else {
            return;
        };
        let Some(last_page) = self.pages.checked_sub(1) else {
            return;
        };
        let first = self.page_size.page_of(start);
        let last = self.page_size.page_of(last_byte).min(last_page);
        if first > last {
            return;
        }
        let (first_word, first_bit) = position(first);
        let (last_word, last_bit) = position(last);
        // `bit - 1` are the bits below one, and `bit | (bit - 1)` those up to it; a bit is never 0.
        let from_first = !first_bit.wrapping_sub(1);
        let up_to_last = last_bit | last_bit.wrapping_sub(1);
        if first_word == last_word {
            if let Some(word) = self.words.get(first_word) {
                update(word, from_first & up_to_last);
            }
            return;
        }
        if let Some([first, between @ .., last]) = self.words.get(first_word..=last_word) {
            update(first, from_first);
            for word in between {
                update(word, u64::MAX);
            }
            update(last, up_to_last);
        }
    }
}

/// The word of a page, and its bit in there.
#[inline(always)]
fn position(page: usize) -> (usize, u64) {
    (page / WORD_BITS, 1u64 << (page % WORD_BITS))
}

/// A copy of the marks as they are found, word by word.
impl Clone for AtomicBitmap {
    fn clone(&self) -> Self {
        let copy = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Acquire));
        Self {
            words: self.words.iter().map(copy).collect(),
            pages: self.pages,
            byte_size: self.byte_size,
            page_size: self.page_size,
        }
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
        self.set_addr_range(offset, len);
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
                .is_some_and(|last_byte| self.page_size.page_of(last_byte) < self.pages)
    }

    fn grow_to_track(&mut self, len: usize) {
        self.enlarge(len.saturating_sub(self.byte_size));
    }
}

impl NewBitmap for AtomicBitmap {
    fn with_len(len: usize) -> Self {
        Self::new(len, host_page_size())
    }
}

/// The size of a page of this machine, in bytes.
fn host_page_size() -> NonZeroUsize {
    #[cfg(all(unix, not(miri)))]
    {
        #[expect(unsafe_code, reason = "sysconf(3) has no safe form in libc")]
        // SAFETY: asks for a number.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if let Some(size) = usize::try_from(size).ok().and_then(NonZeroUsize::new) {
            return size;
        }
    }
    DEFAULT_PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(bytes: usize, page: usize) -> AtomicBitmap {
        AtomicBitmap::new(bytes, NonZeroUsize::new(page).unwrap())
    }

    #[test]
    fn a_part_of_a_page_counts_as_one() {
        assert_eq!(bitmap(0, 1).len(), 0);
        assert_eq!(bitmap(1, 4096).len(), 1);
        assert_eq!(bitmap(4096, 4096).len(), 1);
        assert_eq!(bitmap(4097, 4096).len(), 2);
        assert_eq!(bitmap(100, 3).len(), 34);
        assert_eq!(bitmap(usize::MAX, usize::MAX).len(), 1);
    }

    #[test]
    fn bits_past_the_end_do_not_exist() {
        let bitmap = bitmap(10_000, 4096);
        bitmap.set_bit(3);
        bitmap.set_bit(usize::MAX);
        bitmap.set_addr_range(usize::MAX, usize::MAX);
        assert_eq!(bitmap.get_and_reset(), [0]);
        bitmap.set_addr_range(0, usize::MAX);
        assert_eq!(bitmap.get_and_reset(), [0b111]);
    }

    #[test]
    fn ranges_fill_whole_words_and_nothing_beside() {
        let bitmap = bitmap(300 * 16, 16);
        bitmap.set_addr_range(16 * 60 + 15, 16 * 200);
        assert_eq!(
            bitmap.clone().get_and_reset(),
            [0xf << 60, u64::MAX, u64::MAX, u64::MAX, 0x1f]
        );
        bitmap.reset_addr_range(16 * 64, 16 * 128);
        assert_eq!(bitmap.get_and_reset(), [0xf << 60, 0, 0, u64::MAX, 0x1f]);
    }

    #[test]
    fn growth_keeps_marks_and_adds_clean_pages() {
        let mut bitmap = bitmap(10_000, 4096);
        bitmap.set_bit(1);
        bitmap.enlarge(1);
        assert_eq!((bitmap.len(), bitmap.byte_size()), (3, 10_001));
        bitmap.enlarge(4096 * 70);
        assert_eq!(bitmap.len(), 73);
        assert_eq!(bitmap.get_and_reset(), [2, 0]);
        bitmap.grow_to_track(100);
        assert_eq!(bitmap.len(), 73);
    }

    /// What a thread marked before it was joined is found, whatever else went on.
    #[test]
    fn no_mark_is_lost_to_a_harvest_at_the_same_time() {
        let rounds = if cfg!(miri) { 50 } else { 20_000 };
        let bitmap = bitmap(64 * 4096, 4096);
        let written: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        let mut copied = vec![0u64; 64];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for round in 1..=rounds {
                    let page = (round * 7 % 64) as usize;
                    written[page].store(round, Ordering::Relaxed);
                    bitmap.mark_dirty(page * 4096, 1);
                }
            });
            let mut harvest = || {
                let bits = bitmap.get_and_reset()[0];
                for page in (0..64).filter(|page| bits & (1 << page) != 0) {
                    copied[page] = written[page].load(Ordering::Relaxed);
                }
            };
            while !writer.is_finished() {
                harvest();
            }
            writer.join().unwrap();
            harvest();
        });
        let last: Vec<u64> = written.iter().map(|w| w.load(Ordering::Relaxed)).collect();
        assert_eq!(copied, last);
    }
}
