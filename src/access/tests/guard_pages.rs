//! Accesses next to inaccessible guard pages.

use super::*;
#[cfg(windows)]
use windows_sys::Win32::System::Memory;

/// A mapping of readable and writable pages, between two guard areas of the same length.
pub(super) struct GuardedPages {
    base: *mut u8,
    /// The length of the pages, and of each guard area, in bytes.
    len: usize,
}

impl GuardedPages {
    pub(super) fn one() -> Self {
        Self::new(1)
    }

    pub(super) fn new(pages: usize) -> Self {
        let len = test_support::page_size() * pages;
        Self {
            base: reserve_and_open(len),
            len,
        }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.base.wrapping_add(self.len)
    }

    pub(super) fn end(&self) -> *mut u8 {
        self.start().wrapping_add(self.len)
    }
}

impl Drop for GuardedPages {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping, and nothing refers to it any more.
        #[cfg(unix)]
        unsafe {
            libc::munmap(self.base.cast(), 3 * self.len);
        }
        // SAFETY: `new` reserved this memory, and nothing refers to it any more.
        #[cfg(windows)]
        unsafe {
            Memory::VirtualFree(self.base.cast(), 0, Memory::MEM_RELEASE);
        }
    }
}

/// Maps `3 * len` inaccessible bytes, and makes the middle third of them accessible.
#[cfg(unix)]
fn reserve_and_open(len: usize) -> *mut u8 {
    // SAFETY: makes a new mapping, at an address that the system chooses.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            3 * len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(base, libc::MAP_FAILED);
    let base = base.cast::<u8>();
    // SAFETY: the range is the middle third of the new mapping, which nothing refers to.
    let status = unsafe {
        libc::mprotect(
            base.wrapping_add(len).cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    };
    assert_eq!(status, 0);
    base
}

/// Reserves `3 * len` bytes, and commits the middle third of them.
#[cfg(windows)]
fn reserve_and_open(len: usize) -> *mut u8 {
    let (reserve, closed) = (Memory::MEM_RESERVE, Memory::PAGE_NOACCESS);
    // SAFETY: makes a new reservation, at an address that the system chooses.
    let base = unsafe { Memory::VirtualAlloc(std::ptr::null(), 3 * len, reserve, closed) };
    assert!(!base.is_null());
    let base = base.cast::<u8>();
    let middle = base.wrapping_add(len).cast();
    let (commit, open) = (Memory::MEM_COMMIT, Memory::PAGE_READWRITE);
    // SAFETY: the range is the middle third of the new reservation, which nothing refers to.
    let committed = unsafe { Memory::VirtualAlloc(middle, len, commit, open) };
    assert_eq!(committed.addr(), middle.addr());
    base
}

pub(in crate::access) fn copy_and_fill_next_to_guard_page_do_not_touch_it<R: TestedSet>() {
    let (one, other) = (GuardedPages::one(), GuardedPages::one());
    for len in (0..=MAX_LEN).chain([1000, 4095, 4096]) {
        for ends in 0..4 {
            let place = |page: &GuardedPages, at_end: bool| {
                if at_end {
                    page.end().wrapping_sub(len)
                } else {
                    page.start()
                }
            };
            let (src, dst) = (place(&one, ends & 1 != 0), place(&other, ends & 2 != 0));
            // SAFETY: `len` bytes follow both addresses in their pages. The mappings differ, so the
            // operands do not overlap.
            unsafe {
                R::fill(src, (len % 250) as u8 + 1, len).unwrap();
                R::fill_ascending(dst, 0, len).unwrap();
                R::copy(Destination, dst, src, len).unwrap();
                let copied = (0..len).all(|i| {
                    let byte = R::load_ordered(dst.add(i), 1, Ordering::Relaxed).unwrap();
                    byte == (len % 250) as u64 + 1
                });
                assert!(copied, "{len} bytes");
                R::copy(Source, dst, src, len).unwrap();
                R::copy_ascending(Source, dst, src, len).unwrap();
                R::copy_ascending(Destination, dst, src, len).unwrap();
                R::copy_overlapping(dst, src, len).unwrap();
                R::copy_ascending(Both, dst, src, len).unwrap();
                R::copy_overlapping(src, src, len).unwrap();
            }
            for size in [2, 4, 8] {
                // Both addresses are aligned to `size`.
                let bytes = len / size * size;
                let place = |page: &GuardedPages, at_end: bool| {
                    if at_end {
                        page.end().wrapping_sub(bytes)
                    } else {
                        page.start()
                    }
                };
                let (src, dst) = (place(&one, ends & 1 != 0), place(&other, ends & 2 != 0));
                // SAFETY: `bytes` bytes follow both addresses in their pages, aligned to `size`.
                // The mappings differ, so the operands do not overlap.
                unsafe {
                    R::copy_elements(Destination, dst, src, len / size, size).unwrap();
                    R::copy_elements(Source, dst, src, len / size, size).unwrap();
                }
            }
        }
        // Overlapping ranges at the start and at the end of the page.
        let shift = len.min(4096 - len).min(13);
        let (low, high) = (one.start(), one.end().wrapping_sub(len));
        // SAFETY: both ranges are in the page: `len + shift` is at most 4096.
        unsafe {
            R::copy_overlapping(low, low.add(shift), len).unwrap();
            R::copy_overlapping(low.add(shift), low, len).unwrap();
            R::copy_overlapping(high, high.sub(shift), len).unwrap();
            R::copy_overlapping(high.sub(shift), high, len).unwrap();
        }
    }
}

pub(in crate::access) fn accesses_to_word_next_to_guard_page_do_not_touch_it<R: TestedSet>() {
    let page = GuardedPages::one();
    let order = Ordering::SeqCst;
    for size in [1usize, 2, 4, 8, 16] {
        for at in [page.start(), page.end().wrapping_sub(size)] {
            let value = (u128::MAX / 7) >> (128 - 8 * size);
            // SAFETY: `size` bytes follow `at` in the page.
            let loaded = unsafe {
                R::store(at, value, size).unwrap();
                R::load(at, size).unwrap()
            };
            assert_eq!(loaded, value);
            if size > 8 {
                continue;
            }
            // SAFETY: `size` bytes follow `at` in the page, aligned to `size`.
            unsafe {
                R::store_ordered(at, 1, size, order).unwrap();
                for (change, operand, expected) in [
                    (Fetch::Swap, 0x16, 0x16),
                    (Fetch::Add, 0x13, 0x29),
                    (Fetch::And, 0x0f, 0x09),
                    (Fetch::Or, 0x42, 0x4b),
                ] {
                    R::fetch(at, change, operand, size, order).unwrap();
                    assert_eq!(R::load_ordered(at, size, order).unwrap(), expected);
                }
                R::compare_exchange(at, 0x4b, 1, size, Ordering::AcqRel, Ordering::Relaxed)
                    .unwrap();
                assert_eq!(R::load_ordered(at, size, order).unwrap(), 1);
            }
        }
    }
}

macro_rules! guard_page_tests {
    ($routines:ty) => {
        instantiate!(
            guard_pages, $routines:
            copy_and_fill_next_to_guard_page_do_not_touch_it,
            accesses_to_word_next_to_guard_page_do_not_touch_it
        );
    };
}
