//! A store, its mark, a harvest at the same time, and the copy: no page is lost.
//!
//! Every model is explored twice: with loads that may read old values, and with loads that are read-modify-writes ([`Run`] says why).

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread;

use super::marks::Marks;
use super::sync::{asymmetric_heavy_barrier, choose, Run};

/// Two pages' bytes, and the marks of them.
struct Guest {
    bytes: [AtomicU64; 2],
    marks: Marks,
}

/// With a summary (2 words are enough for one here), or without.
fn guest(words: usize) -> Arc<Guest> {
    Arc::new(Guest {
        bytes: [AtomicU64::new(0), AtomicU64::new(0)],
        marks: Marks::new(words),
    })
}

/// How a writer marks.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Always,
    TestFirst,
    /// As a part of a range of whole words.
    Words,
}

/// What a harvest takes.
#[derive(Clone, Copy, Debug)]
enum Part {
    All,
    /// Two pages of a line that has more.
    Pages,
    /// Looks, and takes nothing: at the page of two regions.
    Look,
}

impl Guest {
    /// What a device does: bytes, then the mark.
    fn write(&self, page: usize, value: u64, mode: Mode) {
        self.bytes[page].store(value, Ordering::Relaxed);
        match mode {
            Mode::Always => self.marks.set(0, 1 << page),
            Mode::TestFirst => self.marks.test_and_set(0, 1 << page),
            Mode::Words => self.marks.set_words(0, 1),
        }
    }

    /// What a round of migration does: takes marks, then copies those pages.
    fn round(&self, sent: &mut [u64; 2], mode: Mode, part: Part) {
        let mut pages = 0;
        match part {
            Part::All => self.marks.drain(0..usize::MAX, |word, bits| {
                if word == 0 {
                    pages |= bits;
                }
            }),
            Part::Pages => self.marks.drain(0..2, |_, bits| pages |= bits),
            Part::Look => pages = self.marks.word(0),
        }
        if let Mode::TestFirst = mode {
            asymmetric_heavy_barrier();
        }
        for (page, sent) in sent.iter_mut().enumerate() {
            if pages & (1 << page) != 0 {
                *sent = self.bytes[page].load(Ordering::Relaxed);
            }
        }
    }
}

/// Writers and two rounds; the second round is after the writers: all that they wrote has been sent.
fn nothing_is_lost(words: usize, mode: Mode, part: Part, pages: &'static [usize]) {
    nothing_is_lost_in(loom::model::Builder::new(), words, mode, part, pages);
}

fn nothing_is_lost_in(
    explored: loom::model::Builder,
    words: usize,
    mode: Mode,
    part: Part,
    pages: &'static [usize],
) {
    explored.check(move || {
        let guest = guest(words);
        // Both pages are marked from the start in one of the cases that looking first is about.
        if let Mode::TestFirst = mode {
            guest.marks.set(0, 0b11);
        }
        let writers: Vec<_> = pages
            .iter()
            .enumerate()
            .map(|(number, &page)| {
                let guest = Arc::clone(&guest);
                thread::spawn(move || guest.write(page, number as u64 + 1, mode))
            })
            .collect();
        let mut sent = [0; 2];
        guest.round(&mut sent, mode, part);
        for writer in writers {
            writer.join().unwrap();
        }
        guest.round(&mut sent, mode, part);
        for &page in pages {
            let bytes = guest.bytes[page].load(Ordering::Relaxed);
            assert_eq!(sent[page], bytes, "page {page}");
        }
    });
}

fn every_write_marks(words: usize) {
    nothing_is_lost(words, Mode::Always, Part::All, &[0, 1]);
    nothing_is_lost(words, Mode::Always, Part::All, &[0, 0]);
}

pub(super) fn every_write_marks_without_a_summary() {
    every_write_marks(1);
}

pub(super) fn every_write_marks_with_a_summary() {
    every_write_marks(2);
}

pub(super) fn whole_words_are_marked() {
    nothing_is_lost(1, Mode::Words, Part::All, &[0]);
    nothing_is_lost(2, Mode::Words, Part::All, &[0]);
}

pub(super) fn a_part_is_harvested() {
    nothing_is_lost(2, Mode::Always, Part::Pages, &[0, 1]);
    nothing_is_lost(2, Mode::TestFirst, Part::Pages, &[0]);
}

pub(super) fn a_page_of_two_regions_is_looked_at() {
    nothing_is_lost(2, Mode::Always, Part::Look, &[0, 1]);
    nothing_is_lost(2, Mode::TestFirst, Part::Look, &[0]);
}

pub(super) fn a_write_looks_before_it_marks() {
    nothing_is_lost(1, Mode::TestFirst, Part::All, &[0]);
    nothing_is_lost(2, Mode::TestFirst, Part::All, &[0]);
}

pub(super) fn two_writes_look_before_they_mark_without_a_summary() {
    nothing_is_lost(1, Mode::TestFirst, Part::All, &[0, 1]);
    nothing_is_lost(1, Mode::TestFirst, Part::All, &[0, 0]);
}

/// To the end it would take hours: here, no thread is stopped more than this often where it could have gone on. What one writer does is explored to the end above,
/// and that a mark is found while another writer stands still is below.
pub(super) fn two_writes_look_before_they_mark_with_a_summary() {
    for pages in [&[0, 1], &[0, 0]] {
        let mut explored = loom::model::Builder::new();
        explored.preemption_bound = Some(4);
        nothing_is_lost_in(explored, 2, Mode::TestFirst, Part::All, pages);
    }
}

/// The second of two writers of a word is done while the first one stands still: a harvest that starts then finds its mark. One that sets the
/// bit above only where it found the word empty would fail here.
pub(super) fn a_mark_that_is_done_is_found_by_the_next_harvest() {
    for mode in [Mode::Always, Mode::TestFirst] {
        for words in [1, 2] {
            loom::model(move || {
                let guest = guest(words);
                let other = {
                    let guest = Arc::clone(&guest);
                    thread::spawn(move || guest.write(0, 1, mode))
                };
                guest.write(1, 2, mode);
                let mut sent = [0; 2];
                guest.round(&mut sent, mode, Part::All);
                assert_eq!(sent[1], 2);
                other.join().unwrap();
                guest.round(&mut sent, mode, Part::All);
                assert_eq!(sent[0], 1);
            });
        }
    }
}

/// A bit that was cleared leaves the note of its line behind. A writer who finds that note, while a harvest takes it and finds the word empty, has
/// to be one of two: before the harvest's look, or behind its taking of the note.
pub(super) fn a_note_without_marks_misleads_nobody() {
    for mode in [Mode::Always, Mode::TestFirst] {
        loom::model(move || {
            let guest = guest(2);
            guest.marks.set(0, 1);
            guest.marks.clear(0, 1);
            let writer = {
                let guest = Arc::clone(&guest);
                thread::spawn(move || guest.write(1, 1, mode))
            };
            let mut sent = [0; 2];
            guest.round(&mut sent, mode, Part::All);
            writer.join().unwrap();
            guest.round(&mut sent, mode, Part::All);
            assert_eq!(sent[1], 1);
        });
    }
}

/// The mark of one page is cleared while another one of the same word is written and harvested.
pub(super) fn clearing_a_page_leaves_the_others_alone() {
    loom::model(|| {
        let guest = guest(2);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(1, 1, Mode::Always))
        };
        let clears = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.marks.clear(0, 1))
        };
        let mut sent = [0; 2];
        guest.round(&mut sent, Mode::Always, Part::All);
        writer.join().unwrap();
        clears.join().unwrap();
        guest.round(&mut sent, Mode::Always, Part::All);
        assert_eq!(sent[1], 1);
    });
}

/// Two harvests at the same time, one of them of a part: every mark goes to one of the two.
pub(super) fn two_harvests_share_the_marks() {
    loom::model(|| {
        let guest = guest(2);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(1, 1, Mode::Always))
        };
        let part = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                let mut found = 0;
                guest.marks.drain(0..2, |_, bits| found |= bits);
                found
            })
        };
        let mut found = 0;
        guest.marks.drain(0..usize::MAX, |_, bits| found |= bits);
        writer.join().unwrap();
        let in_part = part.join().unwrap();
        let mut later = 0;
        guest.marks.drain(0..usize::MAX, |_, bits| later |= bits);
        let found = [found, in_part, later];
        assert_eq!(found.iter().filter(|bits| **bits == 0b10).count(), 1);
    });
}

/// A copy is taken while a page is written: what it finds marked, it has seen.
pub(super) fn a_copy_has_the_marks_of_what_it_sees() {
    loom::model(|| {
        let guest = guest(1);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(0, 1, Mode::Always))
        };
        let copy = Marks::new(1);
        guest.marks.copy_to(&copy, 0);
        if copy.word(0) != 0 {
            assert_eq!(guest.bytes[0].load(Ordering::Relaxed), 1);
        }
        writer.join().unwrap();
    });
}

/// A look at one page finds it marked: so it sees what was written.
pub(super) fn a_look_that_finds_a_mark_sees_the_bytes() {
    loom::model(|| {
        let guest = guest(1);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(0, 1, Mode::Always))
        };
        if guest.marks.word(0) != 0 {
            assert_eq!(guest.bytes[0].load(Ordering::Relaxed), 1);
        }
        writer.join().unwrap();
    });
}

/// Makes two tests of each model, one for either kind of loads.
macro_rules! models {
    ($($name:ident)*) => {
        mod plain {
            $(
                #[test]
                fn $name() {
                    super::choose(super::Run::default());
                    super::$name();
                }
            )*
        }

        mod loads_modify {
            $(
                #[test]
                fn $name() {
                    super::choose(super::Run { loads_modify: true, ..Default::default() });
                    super::$name();
                }
            )*
        }
    };
}

models! {
    a_copy_has_the_marks_of_what_it_sees
    a_look_that_finds_a_mark_sees_the_bytes
    whole_words_are_marked
    a_note_without_marks_misleads_nobody
    a_write_looks_before_it_marks
    clearing_a_page_leaves_the_others_alone
    a_mark_that_is_done_is_found_by_the_next_harvest
    every_write_marks_without_a_summary
    a_page_of_two_regions_is_looked_at
    a_part_is_harvested
    two_harvests_share_the_marks
    every_write_marks_with_a_summary
    two_writes_look_before_they_mark_with_a_summary
    two_writes_look_before_they_mark_without_a_summary
}
