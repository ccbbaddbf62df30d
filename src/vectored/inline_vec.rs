//! [`InlineVec`]: a vector whose first elements need no allocation.

use core::mem::{self, MaybeUninit};
use core::ops::{Deref, DerefMut};
use core::{ptr, slice};
use std::collections::TryReserveError;

/// A vector whose first `N` elements are stored in itself.
///
/// ```text
///   inline    ├─ elements ─┤ places ┤         without a heap: `mark` is the number of elements
///   heap      ├ removed ┤─ elements ─┤        with a heap: `mark` is the number of removed ones
/// ```
///
/// Invariants:
///
/// - If `heap` has no capacity, the first `mark` places of `inline` have the elements. They are
///   initialised, and `mark <= N`.
/// - If `heap` has a capacity, its places from `mark` on have the elements. They are initialised,
///   and `mark <= heap.len()`.
pub(super) struct InlineVec<T, const N: usize> {
    inline: [MaybeUninit<T>; N],
    mark: usize,
    heap: Vec<MaybeUninit<T>>,
}

impl<T, const N: usize> InlineVec<T, N> {
    /// A vector of a type without bytes would have a capacity from the start.
    const HAS_BYTES: () = assert!(size_of::<T>() != 0);

    #[inline]
    pub(super) fn new() -> Self {
        let () = Self::HAS_BYTES;
        Self {
            inline: [const { MaybeUninit::uninit() }; N],
            mark: 0,
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
            self.heap.capacity().saturating_sub(self.mark)
        } else {
            N
        }
    }

    /// Appends an element. Allocates if there is no room.
    #[inline(always)]
    pub(super) fn push(&mut self, element: T) {
        if !self.is_on_heap() {
            if let Some(place) = self.inline.get_mut(self.mark) {
                place.write(element);
                // Less than `N` before.
                self.mark = self.mark.wrapping_add(1);
                return;
            }
        }
        self.push_on_heap(element);
    }

    #[cold]
    #[inline(never)]
    fn push_on_heap(&mut self, element: T) {
        self.move_to_heap();
        self.heap.push(MaybeUninit::new(element));
    }

    /// Makes room for one more element.
    pub(super) fn try_reserve_one(&mut self) -> Result<(), TryReserveError> {
        if self.is_on_heap() {
            return self.heap.try_reserve(1);
        }
        if self.mark < N {
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

    /// Moves the elements from `inline` to `heap`, which has a capacity for them.
    fn move_to(&mut self, heap: Vec<MaybeUninit<T>>) {
        let elements = self.inline.iter_mut().take(self.mark).map(take);
        self.heap = heap;
        self.heap.extend(elements);
        self.mark = 0;
    }

    /// Drops all elements but the first `len`.
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    pub(super) fn truncate(&mut self, len: usize) {
        let Some(count) = self.len().checked_sub(len) else {
            return;
        };
        let first = if self.is_on_heap() {
            let end = self.mark.saturating_add(len);
            self.heap.truncate(end);
            if len == 0 {
                self.remove_places();
            }
            self.heap.as_mut_ptr().wrapping_add(end)
        } else {
            self.mark = len;
            self.inline.as_mut_ptr().wrapping_add(len)
        };
        let removed = ptr::slice_from_raw_parts_mut(first.cast::<T>(), count);
        // SAFETY: these are the last `count` elements, which were initialised. They are in `inline`
        // or in the allocation of `heap`, which `truncate` and `clear` of a `Vec` keep. The lengths
        // exclude them, so nothing uses them after this, also if a drop panics. A `MaybeUninit<T>`
        // has the layout of a `T`.
        unsafe { ptr::drop_in_place(removed) };
    }

    /// Drops all elements, and keeps the allocation.
    pub(super) fn clear(&mut self) {
        self.truncate(0);
    }

    /// Drops the first `count` elements, and keeps the allocation.
    ///
    /// On average, moves at most one element for each one that it drops.
    pub(super) fn remove_front(&mut self, count: usize) {
        let count = count.min(self.len());
        if self.is_on_heap() {
            self.remove_front_of_heap(count);
        } else {
            self.rotate_left(count);
            self.truncate(self.len().saturating_sub(count));
        }
    }

    /// Drops the first `count` elements, which are on the heap.
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    fn remove_front_of_heap(&mut self, count: usize) {
        let first = self.heap.as_mut_ptr().wrapping_add(self.mark);
        self.mark = self.mark.saturating_add(count);
        let removed = ptr::slice_from_raw_parts_mut(first.cast::<T>(), count);
        // SAFETY: the elements begin at the previous `mark`. There are at least `count` (checked by
        // the caller), which are initialised. `mark` excludes these, so nothing uses them after
        // this, also if a drop panics. A `MaybeUninit<T>` has the layout of a `T`.
        unsafe { ptr::drop_in_place(removed) };
        // At least as many have been removed since the last move as are moved now.
        if self.mark >= self.len() {
            self.remove_places();
        }
    }

    /// Moves the elements on the heap to its first places.
    fn remove_places(&mut self) {
        self.heap.drain(..self.mark);
        self.mark = 0;
    }

    /// Moves the elements at `at` and after it to a new vector.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        let at = at.min(self.len());
        let mut rest = Self::new();
        let push = |element: MaybeUninit<T>| {
            // SAFETY: this is one of the elements, which are initialised. It was moved out of its
            // place, which the lengths exclude, so nothing else uses it.
            rest.push(unsafe { element.assume_init() });
        };
        if self.is_on_heap() {
            let end = self.mark.saturating_add(at);
            self.heap.drain(end..).for_each(push);
        } else {
            let len = mem::replace(&mut self.mark, at);
            let places = self.inline.iter_mut().take(len).skip(at);
            places.map(take).for_each(push);
        }
        rest
    }
}

/// Moves an element out of its place.
fn take<T>(place: &mut MaybeUninit<T>) -> MaybeUninit<T> {
    mem::replace(place, MaybeUninit::uninit())
}

impl<T, const N: usize> Deref for InlineVec<T, N> {
    type Target = [T];

    #[inline(always)]
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    fn deref(&self) -> &[T] {
        let (first, len) = if self.is_on_heap() {
            let first = self.heap.as_ptr().wrapping_add(self.mark);
            (first, self.heap.len().wrapping_sub(self.mark))
        } else {
            (self.inline.as_ptr(), self.mark)
        };
        // SAFETY: these are the places of the elements, which are initialised (invariants of the
        // type). A `MaybeUninit<T>` has the layout of a `T`. `self` is borrowed for as long as the
        // result.
        unsafe { slice::from_raw_parts(first.cast(), len) }
    }
}

impl<T, const N: usize> DerefMut for InlineVec<T, N> {
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    fn deref_mut(&mut self) -> &mut [T] {
        let (first, len) = if self.is_on_heap() {
            let first = self.heap.as_mut_ptr().wrapping_add(self.mark);
            (first, self.heap.len().wrapping_sub(self.mark))
        } else {
            (self.inline.as_mut_ptr(), self.mark)
        };
        // SAFETY: these are the places of the elements, which are initialised (invariants of the
        // type). A `MaybeUninit<T>` has the layout of a `T`. `self` is borrowed for as long as the
        // result, exclusively.
        unsafe { slice::from_raw_parts_mut(first.cast(), len) }
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
        if mem::needs_drop::<T>() {
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
    fn remove_front_of_each_element_moves_each_about_once() {
        for count in [1, 3] {
            let (mut some, mut expected) = (numbers(0..1000), 0);
            let (mut moved, mut last) = (0, some.last().map(ptr::from_ref));
            while !some.is_empty() {
                some.remove_front(count);
                expected = (expected + count).min(1000);
                assert_eq!(some.first().map(|first| **first).unwrap_or(1000), expected);
                // A move changes the address of each element.
                let now = some.last().map(ptr::from_ref).or(last);
                if now != last {
                    (moved, last) = (moved + some.len(), now);
                }
            }
            assert!((500..=1000).contains(&moved), "{moved}");
        }
    }

    #[test]
    fn capacity_of_queue_stays_bounded() {
        let (mut queue, mut model) = (
            numbers(0..100),
            std::collections::VecDeque::from_iter(0..100),
        );
        let end = if cfg!(miri) { 500 } else { 10_000 };
        for number in 100..end {
            queue.try_reserve_one().unwrap();
            queue.push(Rc::new(number));
            queue.remove_front(1);
            model.push_back(number);
            model.pop_front();
            assert_eq!(queue.len(), 100);
            assert!(queue
                .iter()
                .map(|number| **number)
                .eq(model.iter().copied()));
        }
        assert!(queue.heap.capacity() <= 512, "{}", queue.heap.capacity());
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
