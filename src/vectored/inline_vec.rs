//! [`InlineVec`]: a vector whose first elements need no allocation.

use core::mem::MaybeUninit;
use core::ops::{Deref, DerefMut};
use core::{ptr, slice};
use std::collections::TryReserveError;

/// A vector whose first `N` elements are stored in itself.
///
/// Invariants:
///
/// - The first `inline_len` elements of `inline` are initialised, and `inline_len <= N`.
/// - If `heap` has a capacity, it has all elements, and `inline_len` is 0.
pub(super) struct InlineVec<T, const N: usize> {
    inline: [MaybeUninit<T>; N],
    inline_len: usize,
    heap: Vec<T>,
}

impl<T, const N: usize> InlineVec<T, N> {
    /// A vector of a type without bytes would have a capacity from the start.
    const HAS_BYTES: () = assert!(size_of::<T>() != 0);

    #[inline]
    pub(super) fn new() -> Self {
        let () = Self::HAS_BYTES;
        Self {
            inline: [const { MaybeUninit::uninit() }; N],
            inline_len: 0,
            heap: Vec::new(),
        }
    }

    /// Returns whether the elements are on the heap.
    #[inline]
    pub(super) fn is_on_heap(&self) -> bool {
        self.heap.capacity() != 0
    }

    /// Returns the number of elements for which there is room.
    pub(super) fn capacity(&self) -> usize {
        if self.is_on_heap() {
            self.heap.capacity()
        } else {
            N
        }
    }

    /// Appends an element. Allocates if there is no room.
    #[inline(always)]
    pub(super) fn push(&mut self, element: T) {
        if !self.is_on_heap() {
            if let Some(place) = self.inline.get_mut(self.inline_len) {
                place.write(element);
                // Less than `N` before.
                self.inline_len = self.inline_len.wrapping_add(1);
                return;
            }
        }
        self.push_on_heap(element);
    }

    #[cold]
    #[inline(never)]
    fn push_on_heap(&mut self, element: T) {
        self.move_to_heap();
        self.heap.push(element);
    }

    /// Makes room for one more element.
    pub(super) fn try_reserve_one(&mut self) -> Result<(), TryReserveError> {
        if self.is_on_heap() {
            return self.heap.try_reserve(1);
        }
        if self.inline_len < N {
            return Ok(());
        }
        let mut heap = Vec::new();
        heap.try_reserve(N.saturating_mul(2))?;
        self.move_to(heap);
        Ok(())
    }

    /// Moves the elements to the heap, unless they are there.
    pub(super) fn move_to_heap(&mut self) {
        if !self.is_on_heap() {
            self.move_to(Vec::with_capacity(N.saturating_mul(2).max(1)));
        }
    }

    /// Moves the elements from `inline` to `heap`, which has a capacity.
    fn move_to(&mut self, heap: Vec<T>) {
        let len = core::mem::take(&mut self.inline_len);
        self.heap = heap;
        // The elements are not in `inline` any more: if a push panics, the others are not dropped.
        for place in self.inline.iter().take(len) {
            // SAFETY: the first `len` elements of `inline` are initialised (invariant of the type).
            // Each is moved out once, and `inline_len` is 0, so nothing reads them again.
            self.heap.push(unsafe { place.assume_init_read() });
        }
    }

    /// Drops all elements but the first `len`.
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    pub(super) fn truncate(&mut self, len: usize) {
        self.heap.truncate(len);
        let Some(rest) = self.inline.get_mut(len..self.inline_len) else {
            return;
        };
        self.inline_len = len;
        let rest = ptr::slice_from_raw_parts_mut(rest.as_mut_ptr().cast::<T>(), rest.len());
        // SAFETY: `rest` is a part of the elements that were initialised, and is borrowed from
        // `self`. `inline_len` excludes them, so nothing uses them after this, also if a drop
        // panics. A `MaybeUninit<T>` has the layout of a `T`.
        unsafe { ptr::drop_in_place(rest) };
    }

    /// Drops all elements, and keeps the allocation.
    pub(super) fn clear(&mut self) {
        self.truncate(0);
    }

    /// Drops the first `count` elements, and keeps the allocation.
    pub(super) fn remove_front(&mut self, count: usize) {
        let count = count.min(self.len());
        self.rotate_left(count);
        self.truncate(self.len().saturating_sub(count));
    }

    /// Moves the elements at `at` and after it to a new vector.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        let mut rest = Self::new();
        let count = self.len().saturating_sub(at);
        for element in self.heap.drain(at.min(self.heap.len())..) {
            rest.push(element);
        }
        let len = self.inline_len;
        self.inline_len = len.min(at);
        for place in self.inline.iter().take(len).skip(at) {
            // SAFETY: the element is one of the first `len`, which were initialised. It is moved
            // out once, and `inline_len` excludes it, so nothing reads it again.
            rest.push(unsafe { place.assume_init_read() });
        }
        debug_assert_eq!(rest.len(), count);
        rest
    }
}

impl<T, const N: usize> Deref for InlineVec<T, N> {
    type Target = [T];

    #[inline(always)]
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    fn deref(&self) -> &[T] {
        if self.is_on_heap() {
            return &self.heap;
        }
        // SAFETY: the first `inline_len` elements are initialised (invariant of the type), and a
        // `MaybeUninit<T>` has the layout of a `T`. They are borrowed for as long as the result.
        unsafe { slice::from_raw_parts(self.inline.as_ptr().cast(), self.inline_len) }
    }
}

impl<T, const N: usize> DerefMut for InlineVec<T, N> {
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    fn deref_mut(&mut self) -> &mut [T] {
        if self.is_on_heap() {
            return &mut self.heap;
        }
        // SAFETY: the first `inline_len` elements are initialised (invariant of the type), and a
        // `MaybeUninit<T>` has the layout of a `T`. They are borrowed for as long as the result,
        // exclusively.
        unsafe { slice::from_raw_parts_mut(self.inline.as_mut_ptr().cast(), self.inline_len) }
    }
}

impl<T, const N: usize> FromIterator<T> for InlineVec<T, N> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let mut all = Self::new();
        for element in elements {
            all.push(element);
        }
        all
    }
}

impl<T, const N: usize> Drop for InlineVec<T, N> {
    fn drop(&mut self) {
        // The heap drops its own elements.
        if self.inline_len != 0 {
            self.clear();
        }
    }
}

impl<T: core::fmt::Debug, const N: usize> core::fmt::Debug for InlineVec<T, N> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    type Numbers = InlineVec<Rc<usize>, 4>;

    fn numbers(range: core::ops::Range<usize>) -> Numbers {
        range.map(Rc::new).collect()
    }

    fn values(numbers: &Numbers) -> Vec<usize> {
        numbers.iter().map(|number| **number).collect()
    }

    #[test]
    fn operations_agree_with_vec() {
        for len in 0..10 {
            for at in 0..12 {
                let mut kept = numbers(0..len);
                kept.truncate(at);
                assert_eq!(values(&kept), Vec::from_iter(0..len.min(at)));

                let mut rest = numbers(0..len);
                rest.remove_front(at);
                assert_eq!(values(&rest), Vec::from_iter(at.min(len)..len));

                let mut first = numbers(0..len);
                let second = first.split_off(at);
                assert_eq!(values(&first), Vec::from_iter(0..len.min(at)));
                assert_eq!(values(&second), Vec::from_iter(at.min(len)..len));

                first.push(Rc::new(70));
                assert_eq!(first.last().map(|last| **last), Some(70));
            }
        }
    }

    #[test]
    fn each_element_is_dropped_once() {
        let element = Rc::new(7);
        for len in [1, 4, 5, 9] {
            let new = || -> Numbers { (0..len).map(|_| Rc::clone(&element)).collect() };
            let mut some = new();
            assert_eq!(Rc::strong_count(&element), 1 + len);
            some.move_to_heap();
            some.remove_front(1);
            assert_eq!(Rc::strong_count(&element), len);
            drop(some);
            let mut some = new();
            let rest = some.split_off(len / 2);
            some.clear();
            assert_eq!(Rc::strong_count(&element), 1 + rest.len());
            drop(rest);
            assert_eq!(Rc::strong_count(&element), 1);
        }
    }

    #[test]
    fn elements_are_on_the_heap_after_there_is_no_room() {
        let mut some = numbers(0..4);
        assert!(!some.is_on_heap());
        some.try_reserve_one().unwrap();
        assert!(some.is_on_heap() && some.capacity() >= 5);
        assert_eq!(values(&some), [0, 1, 2, 3]);
        some.clear();
        assert!(some.is_on_heap() && some.is_empty());

        let mut some = numbers(0..2);
        some.try_reserve_one().unwrap();
        assert!(!some.is_on_heap());
        some.move_to_heap();
        assert_eq!((values(&some), some.is_on_heap()), (vec![0, 1], true));
    }
}
