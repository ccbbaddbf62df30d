//! A store, its mark, a harvest at the same time, and the copy: no page is lost.

use loom::sync::atomic::{fence, AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread;

use super::marks::Marks;

/// A page's bytes, and what the migration has sent of them.
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

#[derive(Clone, Copy)]
enum Mode {
    Always,
    LookFirst,
}

impl Guest {
    /// What a device does: bytes, then the mark.
    fn write(&self, page: usize, value: u64, mode: Mode) {
        self.bytes[page].store(value, Ordering::Relaxed);
        match mode {
            Mode::Always => self.marks.set(0, 1 << page),
            Mode::LookFirst => self.marks.look_and_set(0, 1 << page),
        }
    }

    /// What a round of migration does: takes marks, then copies those pages.
    fn round(&self, sent: &mut [u64; 2], mode: Mode) {
        let mut pages = 0;
        self.marks.take(0, usize::MAX, |_, bits| pages |= bits);
        if let Mode::LookFirst = mode {
            // membarrier(2)
            fence(Ordering::SeqCst);
        }
        for (page, sent) in sent.iter_mut().enumerate() {
            if pages & (1 << page) != 0 {
                *sent = self.bytes[page].load(Ordering::Relaxed);
            }
        }
    }
}

/// Writers and two rounds; the second round is after the writers: all that they wrote has been sent.
fn nothing_is_lost(words: usize, mode: Mode, pages: &'static [usize]) {
    loom::model(move || {
        let guest = guest(words);
        // Both pages are marked from the start in one of the cases that looking first is about.
        if let Mode::LookFirst = mode {
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
        guest.round(&mut sent, mode);
        for writer in writers {
            writer.join().unwrap();
        }
        guest.round(&mut sent, mode);
        for &page in pages {
            assert_eq!(
                sent[page],
                guest.bytes[page].load(Ordering::Relaxed),
                "page {page}"
            );
        }
    });
}

#[test]
fn every_write_marks_without_a_summary() {
    nothing_is_lost(1, Mode::Always, &[0, 1]);
    nothing_is_lost(1, Mode::Always, &[0, 0]);
}

#[test]
fn every_write_marks_with_a_summary() {
    nothing_is_lost(2, Mode::Always, &[0, 1]);
    nothing_is_lost(2, Mode::Always, &[0, 0]);
}

#[test]
fn a_write_looks_before_it_marks_without_a_summary() {
    nothing_is_lost(1, Mode::LookFirst, &[0, 1]);
    nothing_is_lost(1, Mode::LookFirst, &[0, 0]);
}

#[test]
fn a_write_looks_before_it_marks_with_a_summary() {
    // One writer: with a second one, there are minutes of interleavings, and nothing new in them.
    nothing_is_lost(2, Mode::LookFirst, &[0]);
}

/// The second of two writers of a word is done while the first one stands still: a harvest that starts then finds its mark. One that sets the
/// bit above only where it found the word empty would fail here.
#[test]
fn a_mark_that_is_done_is_found_by_the_next_harvest() {
    loom::model(|| {
        let guest = guest(2);
        let other = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.write(0, 1, Mode::Always))
        };
        guest.write(1, 2, Mode::Always);
        let mut sent = [0; 2];
        guest.round(&mut sent, Mode::Always);
        assert_eq!(sent[1], 2);
        other.join().unwrap();
        guest.round(&mut sent, Mode::Always);
        assert_eq!(sent[0], 1);
    });
}

/// A bit that was cleared leaves the note of its line behind. A writer who finds that note, while a harvest takes it and finds the word empty, has
/// to be one of two: before the harvest's look, or behind its taking of the note.
#[test]
fn a_note_without_marks_misleads_nobody() {
    for mode in [Mode::Always, Mode::LookFirst] {
        loom::model(move || {
            let guest = guest(2);
            guest.marks.set(0, 1);
            guest.marks.clear(0, 1);
            let writer = {
                let guest = Arc::clone(&guest);
                thread::spawn(move || guest.write(1, 1, mode))
            };
            let mut sent = [0; 2];
            guest.round(&mut sent, mode);
            writer.join().unwrap();
            guest.round(&mut sent, mode);
            assert_eq!(sent[1], 1);
        });
    }
}

/// Two harvests at the same time, one of them of a part: every mark goes to one of the two.
#[test]
fn two_harvests_share_the_marks() {
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
                guest.marks.take(0, 2, |_, bits| found |= bits);
                found
            })
        };
        let mut found = 0;
        guest.marks.take(0, usize::MAX, |_, bits| found |= bits);
        writer.join().unwrap();
        let in_part = part.join().unwrap();
        let mut later = 0;
        guest.marks.take(0, usize::MAX, |_, bits| later |= bits);
        assert_eq!(
            [found, in_part, later]
                .iter()
                .filter(|bits| **bits == 0b10)
                .count(),
            1
        );
    });
}
