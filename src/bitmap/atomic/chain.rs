//! [`MarksChain`]: marks that grow while threads use them.

use core::ops::Range;
use std::collections::TryReserveError;
use std::sync::OnceLock;

use super::super::marks::Marks;
use crate::bits::{summary_slot, WORD_BITS};

/// A list of [`Marks`]. Each part continues where the previous one ends.
///
/// It grows at its end, while other threads use it. No part is ever moved or removed, so a
/// reference to a part stays valid.
///
/// ```text
///   words     0 ……………… n-1 │ n ……………… m-1 │ m ………
///   parts     the first    │ next        │ next
/// ```
#[derive(Debug)]
pub(super) struct MarksChain {
    /// The index of this part's first word; 0 for the first part.
    first_word: usize,
    marks: Marks,
    next: OnceLock<Box<MarksChain>>,
}

impl MarksChain {
    pub(super) fn new(marks: Marks) -> Self {
        Self::starting_at(0, marks)
    }

    fn starting_at(first_word: usize, marks: Marks) -> Self {
        Self {
            first_word,
            marks,
            next: OnceLock::new(),
        }
    }

    /// Returns the marks of the first part.
    #[inline(always)]
    pub(super) fn first(&self) -> &Marks {
        &self.marks
    }

    /// Appends a part, if there are fewer than `words` words.
    ///
    /// The new part is at least as large as all parts before it together, so that the list stays
    /// short. If two threads grow the same chain at once, one of the calls may have no effect.
    ///
    /// # Errors
    ///
    /// Returns an error if the words cannot be allocated. The part itself ends the process then.
    pub(super) fn grow_to(&self, words: usize) -> Result<(), TryReserveError> {
        let Some(last) = self.parts().last() else {
            return Ok(());
        };
        let end = last.end_word();
        if words > end {
            let marks = Marks::try_new(words.saturating_sub(end).max(end))?;
            last.next
                .get_or_init(|| Box::new(Self::starting_at(end, marks)));
        }
        Ok(())
    }

    /// Returns the part that contains `word`, and the index in it; `None` past the end.
    #[inline]
    pub(super) fn locate(&self, word: usize) -> Option<(&Marks, usize)> {
        if word < self.marks.len() {
            Some((&self.marks, word))
        } else {
            self.locate_grown(word)
        }
    }

    #[cold]
    fn locate_grown(&self, word: usize) -> Option<(&Marks, usize)> {
        let part = self.parts().find(|part| word < part.end_word())?;
        Some((&part.marks, word.saturating_sub(part.first_word)))
    }

    /// Marks the existing bits of a range, after the data were written.
    pub(super) fn mark_range(&self, range: Range<usize>) {
        for part in self.parts() {
            let Range { start, end } = part.range_in(&range);
            let end = end.min(part.marks.len().saturating_mul(WORD_BITS));
            if let Some(last) = end.checked_sub(1).filter(|last| start <= *last) {
                part.marks.mark_range(start, last);
            }
        }
    }

    /// Clears the bits of a range, and adds them to `words`.
    ///
    /// The caller may read guest memory after the call. The range and `words` begin in the first
    /// block. Bits past the end of `words` are dropped. `lines` is a summary of `words`, or empty.
    pub(super) fn harvest(&self, range: Range<usize>, words: &mut [u64], lines: &mut [u64]) {
        self.marks.harvest(range.clone(), words, lines);
        self.harvest_each_grown(range, |word, bits| {
            let (slot, line) = summary_slot(word);
            if let Some(target) = words.get_mut(word) {
                *target |= bits;
            }
            if let Some(target) = lines.get_mut(slot) {
                *target |= line;
            }
        });
    }

    /// Clears the bits of a range, and calls `found` for each word that had set bits.
    ///
    /// The words ascend. The caller may read guest memory after the call, but not in `found`.
    pub(super) fn harvest_each(&self, range: Range<usize>, mut found: impl FnMut(usize, u64)) {
        self.marks.harvest_each(range.clone(), &mut found);
        self.harvest_each_grown(range, found);
    }

    fn harvest_each_grown(&self, range: Range<usize>, mut found: impl FnMut(usize, u64)) {
        for part in self.parts().skip(1) {
            part.marks
                .harvest_each(part.range_in(&range), |word, bits| {
                    found(part.first_word.saturating_add(word), bits);
                });
        }
    }

    /// Returns the number of bits of a range that are set, roughly while other threads change them.
    pub(super) fn count(&self, range: Range<usize>) -> usize {
        let counts = self
            .parts()
            .map(|part| part.marks.count(part.range_in(&range)));
        counts.fold(0, usize::saturating_add)
    }

    /// Copies the marks to `copy`, up to its length, with one load for each word.
    pub(super) fn copy_to(&self, copy: &Marks) {
        for part in self.parts() {
            part.marks.copy_to(copy, part.first_word);
        }
    }

    /// Returns a range of bits relative to this part. It may pass the end of the part.
    fn range_in(&self, range: &Range<usize>) -> Range<usize> {
        let start = self.first_word.saturating_mul(WORD_BITS);
        range.start.saturating_sub(start)..range.end.saturating_sub(start)
    }

    /// Returns the number of the word after the last one of this part.
    fn end_word(&self) -> usize {
        self.first_word.saturating_add(self.marks.len())
    }

    /// Returns this part and those after it.
    fn parts(&self) -> impl Iterator<Item = &Self> {
        core::iter::successors(Some(self), |part| part.next.get().map(|next| &**next))
    }
}
