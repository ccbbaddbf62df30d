//! Orderings and operations of `marks.rs` that the models show to be needed: each is made wrong, and a model has to fail.
//!
//! It is a list of what fails, with the model that does. What is not in it, and why, is at its end.

use super::marks_tests as models;
use super::sync::{choose, Mutant, Run, Wrong};
use Wrong::{AcqRel, InTwo, Missing, Relaxed};

const SOURCE: &str = include_str!("../../../../src/bitmap/marks.rs");

/// The number of the one line that has this in it.
fn line(of: &str) -> u32 {
    let mut lines = (1u32..)
        .zip(SOURCE.lines())
        .filter(|(_, line)| line.contains(of));
    let (number, _) = lines.next().unwrap_or_else(|| panic!("no line has {of:?}"));
    assert!(lines.next().is_none(), "several lines have {of:?}");
    number
}

/// Whether a model fails, with loads of either kind.
fn fails(model: fn(), mutant: Mutant) -> bool {
    [false, true].into_iter().any(|loads_modify| {
        let run = move || {
            choose(Run {
                loads_modify,
                mutant: Some(mutant),
            });
            model();
        };
        // On a thread of its own: a model that fails leaves loom in the middle of it.
        std::thread::spawn(run).join().is_err()
    })
}

/// Has the model fail with each of these.
fn found(of: u32, model: fn(), all: &[Wrong]) {
    for &wrong in all {
        let mutant = Mutant { line: of, wrong };
        assert!(fails(model, mutant), "nothing fails with {mutant:?}");
    }
}

/// `M`, the mark.
#[test]
fn a_mark() {
    let mark = line("target.fetch_or(bits, Ordering::SeqCst)");
    found(
        mark,
        models::a_note_without_marks_misleads_nobody,
        &[Relaxed, AcqRel, InTwo, Missing],
    );
    let words = line("word.fetch_or(u64::MAX, Ordering::SeqCst)");
    found(
        words,
        models::whole_words_are_marked,
        &[Relaxed, InTwo, Missing],
    );
}

/// `L` and `F`, the note of its line.
#[test]
fn a_note() {
    let look = line("if lines.load(Ordering::SeqCst) & line == 0");
    found(
        look,
        models::a_note_without_marks_misleads_nobody,
        &[Relaxed, AcqRel],
    );
    let note = line("lines.fetch_or(line, Ordering::SeqCst)");
    found(
        note,
        models::a_note_without_marks_misleads_nobody,
        &[Relaxed, AcqRel],
    );
    found(note, models::whole_words_are_marked, &[InTwo, Missing]);
}

/// `T`, the taking of a note.
#[test]
fn a_note_is_taken() {
    let take = line("_ => word.fetch_and(!lines, Ordering::SeqCst)");
    found(
        take,
        models::a_note_without_marks_misleads_nobody,
        &[Relaxed, AcqRel],
    );
}

/// The looks of a harvest, and `H`, the taking of marks.
#[test]
fn marks_are_taken() {
    let look = line("*seen = word.load(Ordering::SeqCst)");
    found(
        look,
        models::a_note_without_marks_misleads_nobody,
        &[Relaxed, AcqRel],
    );
    let take = line("*drained = word.swap(0, Ordering::SeqCst)");
    found(
        take,
        models::every_write_marks_without_a_summary,
        &[Relaxed, InTwo],
    );
    let part = line("_ => word.fetch_and(!bits, Ordering::SeqCst)");
    found(part, models::a_part_is_harvested, &[Relaxed]);
}

/// Clearing, and looks that take nothing.
#[test]
fn clearing_and_looking() {
    let clear = line("word.fetch_and(!bits, Ordering::SeqCst);");
    found(
        clear,
        models::a_note_without_marks_misleads_nobody,
        &[Relaxed, AcqRel],
    );
    found(
        clear,
        models::clearing_a_page_leaves_the_others_alone,
        &[InTwo],
    );
    let look = line(".map_or(0, |word| word.load(Ordering::Acquire))");
    found(
        look,
        models::a_look_that_finds_a_mark_sees_the_bytes,
        &[Relaxed],
    );
    let copy = line("match word.load(Ordering::Acquire)");
    found(
        copy,
        models::a_copy_has_the_marks_of_what_it_sees,
        &[Relaxed],
    );
}

/// `B` and `B'`, the barriers of looking first.
#[test]
fn barriers() {
    found(0, models::a_write_looks_before_it_marks, &[Missing]);
    found(1, models::a_write_looks_before_it_marks, &[Missing]);
}

// Not in the list:
//
// - The look at a word of the summary before it is taken, and the look at a word of which a part is taken. A mark that is done before a harvest is so by
//   a join or in the same thread here, and then a relaxed load finds it, too. That they are sequentially consistent is for a mark that comes before them
//   in no other order than the one of these operations.
// - `H` and the mark of whole words with acquire and release alone: what needs the one order are `M`, `L`, `F`, `T` and the looks, as the argument has it, and the
//   models of whole words have no second writer.
// - `T` in two steps: it takes the notes of its own line along, which has been looked at behind it; another line would lose one, and there is none here.
// - `T` and a part's `H` by an exchange, for 64 lines and for a whole word: the same operation as the one beside it, with more bits than a model has.
// - A clear that is left out loses nothing.
