//! Writers mark pages while harvests copy them, and no page is lost.
//!
//! Each model is explored twice: with plain loads, and with sequentially consistent loads that are
//! read-modify-writes. [`Run::loads_modify`] has the reason.

use std::ops::Range;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread;

use super::marks::Marks;
use super::tracking::Tracking;
use crate::harness::{choose, Run};

/// Two pages, and their marks.
struct Guest {
    bytes: [AtomicU64; 2],
    marks: Marks,
}

/// Creates a guest whose marks have a summary if there are at least 2 words.
fn guest(words: usize) -> Arc<Guest> {
    Arc::new(Guest {
        bytes: [AtomicU64::new(0), AtomicU64::new(0)],
        marks: Marks::new(words),
    })
}

/// The way in which a writer marks.
#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Always sets the mark, as for pages that are put back.
    Set,
    /// Marks a page.
    Mark,
    /// Marks a range of pages of two words.
    Range,
    /// Marks a page as a range.
    RangeOfOne,
}

/// The part of the marks that a harvest clears.
#[derive(Clone, Copy, Debug)]
enum Part {
    All,
    /// Two pages of a line that has more pages.
    Pages,
    /// None: the harvest reads a word, as for a page that two regions share.
    Read,
}

/// Harvests a range, and returns the bits of the first word.
fn harvest(marks: &Marks, range: Range<usize>) -> u64 {
    let mut words = [0; 2];
    marks.harvest(range, &mut words, &mut []);
    words[0]
}

impl Guest {
    /// Writes a page and marks it, as a device does.
    fn write(&self, page: usize, value: u64, mode: Mode) {
        self.bytes[page].store(value, Ordering::Relaxed);
        self.mark(page, mode);
    }

    /// Returns a page of the last word.
    fn last(&self) -> usize {
        (self.marks.len() - 1) * 64 + 1
    }

    fn mark(&self, page: usize, mode: Mode) {
        match mode {
            Mode::Set => self.marks.set(0, 1 << page),
            Mode::Mark => self.marks.mark(0, 1 << page),
            Mode::Range => self.marks.mark_range(page, self.last()),
            Mode::RangeOfOne => self.marks.mark_range(page, page),
        }
    }

    /// Drains marks and copies the marked pages, as a round of a migration does.
    fn round(&self, sent: &mut [u64; 2], part: Part) {
        let pages = match part {
            Part::All => harvest(&self.marks, 0..usize::MAX),
            Part::Pages => harvest(&self.marks, 0..2),
            Part::Read => self.marks.word(0),
        };
        for (page, sent) in sent.iter_mut().enumerate() {
            if pages & (1 << page) != 0 {
                *sent = self.bytes[page].load(Ordering::Relaxed);
            }
        }
    }
}

/// Explores writers during a round of a migration. The pages are clean or dirty at the start. A
/// second round follows the writers. Then all pages must have been sent.
#[derive(Clone, Copy)]
struct Model {
    words: usize,
    mode: Mode,
    part: Part,
    is_dirty: bool,
    /// The page of each writer.
    pages: &'static [usize],
    /// The number of preemptions that are explored; all of them without a bound.
    bound: Option<usize>,
}

impl Model {
    fn new(words: usize, mode: Mode, pages: &'static [usize]) -> Self {
        Self {
            words,
            mode,
            part: Part::All,
            is_dirty: false,
            pages,
            bound: None,
        }
    }

    fn loses_no_page(self) {
        let mut explored = loom::model::Builder::new();
        explored.preemption_bound = self.bound;
        explored.check(move || self.run());
    }

    fn run(self) {
        let guest = guest(self.words);
        if self.is_dirty {
            guest.marks.mark_range(0, guest.last());
        }
        let writer = |(number, &page): (usize, &usize)| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(page, number as u64 + 1, self.mode))
        };
        let writers: Vec<_> = self.pages.iter().enumerate().map(writer).collect();
        let mut sent = [0; 2];
        guest.round(&mut sent, self.part);
        for writer in writers {
            writer.join().unwrap();
        }
        guest.round(&mut sent, self.part);
        for &page in self.pages {
            let bytes = guest.bytes[page].load(Ordering::Relaxed);
            assert_eq!(sent[page], bytes, "page {page}");
        }
    }
}

/// Explores one writer, of pages that are clean and of pages that are dirty.
fn one_writer(mode: Mode) {
    for (words, is_dirty) in [(1, false), (1, true), (2, false), (2, true)] {
        let model = Model::new(words, mode, &[0]);
        Model { is_dirty, ..model }.loses_no_page();
    }
}

pub(super) fn set_during_harvest_loses_no_page() {
    for (words, pages) in [(1, &[0, 1]), (1, &[0, 0]), (2, &[0, 1]), (2, &[0, 0])] {
        Model::new(words, Mode::Set, pages).loses_no_page();
    }
}

pub(super) fn mark_during_harvest_loses_no_page() {
    one_writer(Mode::Mark);
}

pub(super) fn mark_range_during_harvest_loses_no_page() {
    one_writer(Mode::Range);
}

/// Explores a bounded number of preemptions: a complete exploration would take hours. One writer is
/// explored completely, and so are two writers that always set the mark.
pub(super) fn mark_by_two_writers_loses_no_page() {
    for words in [1, 2] {
        let bound = Some(3);
        for (pages, is_dirty) in [(&[0, 1], true), (&[0, 0], true), (&[0, 0], false)] {
            let model = Model::new(words, Mode::Mark, pages);
            #[rustfmt::skip]
            Model { is_dirty, bound, ..model }.loses_no_page();
        }
    }
}

pub(super) fn mark_range_by_two_writers_loses_no_page() {
    for (words, is_dirty) in [(1, true), (2, true), (2, false)] {
        let (bound, model) = (Some(3), Model::new(words, Mode::Range, &[0, 0]));
        #[rustfmt::skip]
        Model { is_dirty, bound, ..model }.loses_no_page();
    }
}

pub(super) fn harvest_of_partial_range_loses_no_page() {
    for (mode, pages) in [(Mode::Set, &[0, 1][..]), (Mode::Mark, &[0])] {
        let (part, model) = (Part::Pages, Model::new(2, mode, pages));
        Model { part, ..model }.loses_no_page();
    }
}

pub(super) fn word_read_without_harvest_loses_no_page() {
    for (mode, pages) in [(Mode::Set, &[0, 1][..]), (Mode::Mark, &[0])] {
        let (part, model) = (Part::Read, Model::new(2, mode, pages));
        Model { part, ..model }.loses_no_page();
    }
}

/// The second of two writers of a word completes while the first one is preempted. The next harvest
/// finds its mark. A writer that sets the summary only if it finds the word empty would fail here.
pub(super) fn harvest_finds_completed_mark_despite_preempted_writer() {
    for (mode, words) in [
        (Mode::Set, 1),
        (Mode::Set, 2),
        (Mode::Mark, 1),
        (Mode::Mark, 2),
    ] {
        loom::model(move || {
            let guest = guest(words);
            let other = {
                let guest = Arc::clone(&guest);
                thread::spawn(move || guest.write(0, 1, mode))
            };
            guest.write(1, 2, mode);
            let mut sent = [0; 2];
            guest.round(&mut sent, Part::All);
            assert_eq!(sent[1], 2);
            other.join().unwrap();
            guest.round(&mut sent, Part::All);
            assert_eq!(sent[0], 1);
        });
    }
}

/// Creates a guest with an empty word, whose line has a stale bit in the summary.
///
/// A harvest of a part of the line leaves that bit.
fn guest_with_stale_summary() -> Arc<Guest> {
    let guest = guest(2);
    guest.marks.set(0, 1);
    harvest(&guest.marks, 0..1);
    guest
}

/// A writer may find a stale bit in the summary while a harvest clears it and finds the word empty.
/// Then the mark precedes the harvest's load of the word, or the load of the summary follows the
/// clearing of the bit.
pub(super) fn mark_during_harvest_of_empty_line_loses_no_page() {
    for mode in [Mode::Set, Mode::Mark, Mode::Range] {
        loom::model(move || {
            let guest = guest_with_stale_summary();
            let writer = {
                let guest = Arc::clone(&guest);
                thread::spawn(move || guest.write(1, 1, mode))
            };
            let mut sent = [0; 2];
            guest.round(&mut sent, Part::All);
            writer.join().unwrap();
            guest.round(&mut sent, Part::All);
            assert_eq!(sent[1], 1);
        });
    }
}

/// Two writers mark one page, of an empty word whose line has a stale bit in the summary. One may
/// find the mark of the other, which has not set the summary bit yet. Its own mark is then complete
/// only if no harvest has cleared the summary bit.
pub(super) fn mark_found_before_its_summary_bit_is_found_by_next_harvest() {
    for mode in [Mode::Mark, Mode::RangeOfOne] {
        let mut explored = loom::model::Builder::new();
        explored.preemption_bound = Some(4);
        explored.check(move || {
            let guest = guest_with_stale_summary();
            let write = |at: usize| {
                let guest = Arc::clone(&guest);
                thread::spawn(move || {
                    guest.bytes[at].store(1, Ordering::Relaxed);
                    guest.mark(0, mode);
                })
            };
            let (completed, preempted) = (write(0), write(1));
            let round = |sent: &mut [u64; 2]| {
                let found = harvest(&guest.marks, 0..usize::MAX) != 0;
                for (sent, byte) in sent.iter_mut().zip(&guest.bytes) {
                    if found {
                        *sent = byte.load(Ordering::Relaxed);
                    }
                }
            };
            let mut sent = [0; 2];
            round(&mut sent);
            completed.join().unwrap();
            round(&mut sent);
            assert_eq!(sent[0], 1);
            preempted.join().unwrap();
            round(&mut sent);
            assert_eq!(sent[1], 1);
        });
    }
}

/// One page is cleared while another page of the same word is written and harvested.
pub(super) fn harvest_of_page_during_write_keeps_other_marks() {
    loom::model(|| {
        let guest = guest(2);
        guest.marks.set(0, 1);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(1, 1, Mode::Mark))
        };
        let clears = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || harvest(&guest.marks, 0..1))
        };
        let mut sent = [0; 2];
        guest.round(&mut sent, Part::All);
        writer.join().unwrap();
        clears.join().unwrap();
        guest.round(&mut sent, Part::All);
        assert_eq!(sent[1], 1);
    });
}

/// Tracking is switched on during a write, and all of memory is copied. Harvests follow.
pub(super) fn tracking_switched_on_during_write_loses_no_page() {
    loom::model(|| {
        let guest = guest(1);
        let tracking = Arc::new(Tracking::new());
        tracking.switch(false);
        let writer = {
            let (guest, tracking) = (Arc::clone(&guest), Arc::clone(&tracking));
            thread::spawn(move || {
                guest.bytes[0].store(1, Ordering::Relaxed);
                if tracking.is_on_after_write() {
                    guest.mark(0, Mode::Mark);
                }
            })
        };
        tracking.switch(true);
        let mut sent = [guest.bytes[0].load(Ordering::Relaxed), 0];
        writer.join().unwrap();
        guest.round(&mut sent, Part::All);
        assert_eq!(sent[0], 1);
    });
}

/// One of the two harvests a part of the range.
pub(super) fn harvest_by_two_threads_returns_each_mark_once() {
    loom::model(|| {
        let guest = guest(2);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(1, 1, Mode::Set))
        };
        let part = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || harvest(&guest.marks, 0..2))
        };
        let found = harvest(&guest.marks, 0..usize::MAX);
        writer.join().unwrap();
        let in_part = part.join().unwrap();
        let later = harvest(&guest.marks, 0..usize::MAX);
        let found = [found, in_part, later];
        assert_eq!(found.iter().filter(|bits| **bits == 0b10).count(), 1);
    });
}

/// A copy of the marks has only marks of data that its thread reads.
pub(super) fn copy_to_during_write_acquires_marked_data() {
    loom::model(|| {
        let guest = guest(1);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(0, 1, Mode::Set))
        };
        let copy = Marks::new(1);
        guest.marks.copy_to(&copy, 0);
        if copy.word(0) != 0 {
            assert_eq!(guest.bytes[0].load(Ordering::Relaxed), 1);
        }
        writer.join().unwrap();
    });
}

pub(super) fn word_with_mark_acquires_data() {
    loom::model(|| {
        let guest = guest(1);
        let writer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(0, 1, Mode::Set))
        };
        if guest.marks.word(0) != 0 {
            assert_eq!(guest.bytes[0].load(Ordering::Relaxed), 1);
        }
        writer.join().unwrap();
    });
}

/// Creates two tests of each model, one for each kind of load.
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
    copy_to_during_write_acquires_marked_data
    word_with_mark_acquires_data
    set_during_harvest_loses_no_page
    mark_during_harvest_loses_no_page
    mark_range_during_harvest_loses_no_page
    mark_by_two_writers_loses_no_page
    mark_range_by_two_writers_loses_no_page
    mark_during_harvest_of_empty_line_loses_no_page
    mark_found_before_its_summary_bit_is_found_by_next_harvest
    harvest_of_page_during_write_keeps_other_marks
    harvest_of_partial_range_loses_no_page
    harvest_by_two_threads_returns_each_mark_once
    harvest_finds_completed_mark_despite_preempted_writer
    word_read_without_harvest_loses_no_page
    tracking_switched_on_during_write_loses_no_page
}
