//! Slices, references and arrays: random accesses against a vector, and marks of single bytes.

mod access;
mod marks;
mod random_accesses;
mod ranges;
mod references;

use core::fmt::Debug;
use core::sync::atomic::{AtomicU64, Ordering};
use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::bitmap::{BitmapSlice, WithBitmapSlice};
use crate::bytes::Bytes;

/// A dirty bitmap with one bit per byte. A mark outside the memory panics.
#[derive(Clone, Debug)]
pub(super) struct ByteMap(Rc<RefCell<Vec<bool>>>, usize);

impl WithBitmapSlice<'_> for ByteMap {
    type S = Self;
}
impl BitmapSlice for ByteMap {}
impl Bitmap for ByteMap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.borrow_mut()[self.1 + offset..][..len].fill(true);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.0.borrow()[self.1 + offset]
    }
    fn slice_at(&self, offset: usize) -> Self {
        Self(self.0.clone(), self.1 + offset)
    }
}

/// Memory at a known alignment, between guard bytes that must not change.
pub(super) struct Memory {
    words: Vec<AtomicU64>,
    start: usize,
    len: usize,
    bitmap: ByteMap,
}

const FENCE: u8 = 0xee;

impl Memory {
    /// Creates memory of the bytes 1, 2, 3, ..., that starts `shift` bytes after a multiple of 8.
    pub(super) fn new(len: usize, shift: usize) -> Self {
        let start = 8 + shift;
        let mut bytes = vec![FENCE; (start + len + 8).next_multiple_of(8)];
        bytes[start..start + len].copy_from_slice(&numbered(len, 1));
        let word = |c: &[u8]| AtomicU64::new(u64::from_ne_bytes(c.try_into().unwrap()));
        let words = bytes.chunks(8).map(word).collect();
        let bitmap = ByteMap(Rc::new(RefCell::new(vec![false; len])), 0);
        Self {
            words,
            start,
            len,
            bitmap,
        }
    }

    pub(super) fn ptr(&self) -> *mut u8 {
        let first = self.words.as_ptr().cast_mut();
        first.cast::<u8>().wrapping_add(self.start)
    }

    pub(super) fn slice(&self) -> VolatileSlice<'_, ByteMap> {
        // SAFETY: these `len` bytes are atomics that outlive the slice.
        unsafe { VolatileSlice::with_bitmap(self.ptr(), self.len, self.bitmap.clone(), None) }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let bytes = |w: &AtomicU64| w.load(Ordering::Relaxed).to_ne_bytes();
        let all: Vec<u8> = self.words.iter().flat_map(bytes).collect();
        let end = self.start + self.len;
        assert!(all[..self.start]
            .iter()
            .chain(&all[end..])
            .all(|&b| b == FENCE));
        all[self.start..end].to_vec()
    }

    /// Returns the offsets of the marked bytes, and clears the marks.
    pub(super) fn take_marks(&self) -> Vec<usize> {
        let mut marks = self.bitmap.0.borrow_mut();
        let marked = (0..self.len).filter(|&i| marks[i]).collect();
        marks.fill(false);
        marked
    }
}

fn numbered(len: usize, first: usize) -> Vec<u8> {
    (first..first + len).map(|i| i as u8).collect()
}

pub(super) fn shown(value: impl Debug) -> String {
    format!("{value:?}")
}

/// Returns the error of `result` as text.
pub(super) fn failed<T>(result: Result<T>) -> String {
    shown(result.map(|_| "no error").unwrap_err())
}

pub(super) fn out_of_bounds(addr: usize) -> String {
    shown(Error::OutOfBounds { addr })
}
