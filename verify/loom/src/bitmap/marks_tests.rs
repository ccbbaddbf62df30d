//! Writers that mark pages beside harvests that copy them: no page is lost.
//!
//! Each model is explored twice: with plain loads, and with sequentially consistent loads that are
//! read-modify-writes. [`Run::loads_modify`] has the reason.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread;

use super::marks::Marks;
use super::sync::{asymmetric_heavy_barrier, choose, Run};

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
    Always,
    TestFirst,
    /// Marks whole words.
    Words,
}

/// The part of the marks that a harvest drains.
#[derive(Clone, Copy, Debug)]
enum Part {
    All,
    /// Two pages of a line that has more pages.
    Pages,
    /// None: the harvest reads a word, as for a page that two regions share.
    Read,
}

impl Guest {
    /// Writes a page and marks it, as a device does.
    fn write(&self, page: usize, value: u64, mode: Mode) {
        self.bytes[page].store(value, Ordering::Relaxed);
        match mode {
            Mode::Always => self.marks.set(0, 1 << page),
            Mode::TestFirst => self.marks.test_and_set(0, 1 << page),
            Mode::Words => self.marks.set_words(0, 1),
        }
    }

    /// Drains marks and copies the marked pages, as a round of a migration does.
    fn round(&self, sent: &mut [u64; 2], mode: Mode, part: Part) {
        let mut pages = 0;
        match part {
            Part::All => self.marks.drain(0..usize::MAX, |word, bits| {
                if word == 0 {
                    pages |= bits;
                }
            }),
            Part::Pages => self.marks.drain(0..2, |_, bits| pages |= bits),
            Part::Read => pages = self.marks.word(0),
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

/// Explores writers beside a round of a migration. A second round follows the writers. Then all
/// pages must have been sent.
fn loses_no_page(words: usize, mode: Mode, part: Part, pages: &'static [usize]) {
    loses_no_page_in(loom::model::Builder::new(), words, mode, part, pages);
}

fn loses_no_page_in(
    explored: loom::model::Builder,
    words: usize,
    mode: Mode,
    part: Part,
    pages: &'static [usize],
) {
    explored.check(move || {
        let guest = guest(words);
        // A writer that tests first finds both pages marked at the start.
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
    loses_no_page(words, Mode::Always, Part::All, &[0, 1]);
    loses_no_page(words, Mode::Always, Part::All, &[0, 0]);
}

pub(super) fn set_by_two_writers_without_summary_loses_no_page() {
    every_write_marks(1);
}

pub(super) fn set_by_two_writers_with_summary_loses_no_page() {
    every_write_marks(2);
}

pub(super) fn set_words_beside_drain_loses_no_page() {
    loses_no_page(1, Mode::Words, Part::All, &[0]);
    loses_no_page(2, Mode::Words, Part::All, &[0]);
}

pub(super) fn drain_of_partial_range_loses_no_page() {
    loses_no_page(2, Mode::Always, Part::Pages, &[0, 1]);
    loses_no_page(2, Mode::TestFirst, Part::Pages, &[0]);
}

pub(super) fn word_read_without_drain_loses_no_page() {
    loses_no_page(2, Mode::Always, Part::Read, &[0, 1]);
    loses_no_page(2, Mode::TestFirst, Part::Read, &[0]);
}

pub(super) fn test_and_set_beside_drain_loses_no_page() {
    loses_no_page(1, Mode::TestFirst, Part::All, &[0]);
    loses_no_page(2, Mode::TestFirst, Part::All, &[0]);
}

pub(super) fn test_and_set_by_two_writers_without_summary_loses_no_page() {
    loses_no_page(1, Mode::TestFirst, Part::All, &[0, 1]);
    loses_no_page(1, Mode::TestFirst, Part::All, &[0, 0]);
}

/// Explores up to 4 preemptions: a complete exploration would take hours. One writer is explored
/// completely by `test_and_set_beside_drain_loses_no_page`, and a preempted second writer by
/// `drain_finds_completed_mark_beside_preempted_writer`.
pub(super) fn test_and_set_by_two_writers_with_summary_loses_no_page() {
    for pages in [&[0, 1], &[0, 0]] {
        let mut explored = loom::model::Builder::new();
        explored.preemption_bound = Some(4);
        loses_no_page_in(explored, 2, Mode::TestFirst, Part::All, pages);
    }
}

/// The second of two writers of a word completes while the first one is preempted. The next harvest
/// finds its mark. A writer that sets the summary only if it finds the word empty would fail here.
pub(super) fn drain_finds_completed_mark_beside_preempted_writer() {
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

/// A cleared mark leaves the summary bit of its line set. A writer may find that bit while a
/// harvest drains it and finds the word empty. Then the mark precedes the harvest's load of the
/// word, or the load of the summary follows the drain of the bit.
pub(super) fn set_beside_drain_of_empty_line_loses_no_page() {
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

/// Two writers mark one page, of an empty word whose line has a stale bit in the summary, as
/// [`Marks::clear`] leaves it. One may find the mark of the other, which has not set the summary
/// bit yet. Its own mark is then complete only if no harvest has drained the summary bit.
pub(super) fn mark_found_before_its_summary_bit_is_found_by_next_harvest() {
    let mut explored = loom::model::Builder::new();
    explored.preemption_bound = Some(3);
    explored.check(|| {
        let guest = guest(2);
        guest.marks.set(0, 1);
        guest.marks.clear(0, 1);
        let write = |at: usize| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                guest.bytes[at].store(1, Ordering::Relaxed);
                guest.marks.test_and_set(0, 1);
            })
        };
        let (completed, preempted) = (write(0), write(1));
        let round = |sent: &mut [u64; 2]| {
            let mut found = false;
            guest.marks.drain(0..usize::MAX, |_, _| found = true);
            asymmetric_heavy_barrier();
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

/// One page is cleared while another page of the same word is written and harvested.
pub(super) fn clear_beside_writer_keeps_other_marks() {
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

/// One of the two drains a part of the range.
pub(super) fn drain_by_two_threads_returns_each_mark_once() {
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

/// A copy of the marks has only marks of data that its thread reads.
pub(super) fn copy_to_beside_writer_acquires_marked_data() {
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

pub(super) fn word_with_mark_acquires_data() {
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
    copy_to_beside_writer_acquires_marked_data
    word_with_mark_acquires_data
    set_words_beside_drain_loses_no_page
    set_beside_drain_of_empty_line_loses_no_page
    mark_found_before_its_summary_bit_is_found_by_next_harvest
    test_and_set_beside_drain_loses_no_page
    clear_beside_writer_keeps_other_marks
    drain_finds_completed_mark_beside_preempted_writer
    set_by_two_writers_without_summary_loses_no_page
    word_read_without_drain_loses_no_page
    drain_of_partial_range_loses_no_page
    drain_by_two_threads_returns_each_mark_once
    set_by_two_writers_with_summary_loses_no_page
    test_and_set_by_two_writers_with_summary_loses_no_page
    test_and_set_by_two_writers_without_summary_loses_no_page
}
