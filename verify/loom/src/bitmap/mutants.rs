//! The orderings and operations of `marks.rs` that a model needs: each is weakened, and the model
//! fails.
//!
//! The end of this file lists those that no model needs, with the reason.

use super::marks_tests as models;
use super::sync::{choose, Mutant, Run, Wrong};
use Wrong::{AcqRel, InTwo, Missing, Relaxed};

const SOURCE: &str = include_str!("../../../../src/bitmap/marks.rs");

/// Returns the number of the only line of `marks.rs` that contains `of`.
fn line(of: &str) -> u32 {
    let mut lines = (1u32..)
        .zip(SOURCE.lines())
        .filter(|(_, line)| line.contains(of));
    let (number, _) = lines.next().unwrap_or_else(|| panic!("no line has {of:?}"));
    assert!(lines.next().is_none(), "several lines have {of:?}");
    number
}

/// Returns whether a model fails, with either kind of load.
fn fails(model: fn(), mutant: Mutant) -> bool {
    [false, true].into_iter().any(|loads_modify| {
        let run = move || {
            choose(Run {
                loads_modify,
                mutant: Some(mutant),
            });
            model();
        };
        // On a new thread: a failed model leaves loom's thread-local state behind.
        std::thread::spawn(run).join().is_err()
    })
}

/// Checks that a model fails with each of these changes of the operation at a line.
fn each_fails(of: u32, model: fn(), all: &[Wrong]) {
    for &wrong in all {
        let mutant = Mutant { line: of, wrong };
        assert!(fails(model, mutant), "the model passes with {mutant:?}");
    }
}

#[test]
fn m_weakened_loses_a_page() {
    let mark = line("target.fetch_or(bits, Ordering::SeqCst)");
    each_fails(
        mark,
        models::set_beside_drain_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel, InTwo, Missing],
    );
    let words = line("word.fetch_or(u64::MAX, Ordering::SeqCst)");
    each_fails(
        words,
        models::set_words_beside_drain_loses_no_page,
        &[Relaxed, InTwo, Missing],
    );
}

#[test]
fn l_or_f_weakened_loses_a_page() {
    let l = line("if lines.load(Ordering::SeqCst) & line == 0");
    each_fails(
        l,
        models::set_beside_drain_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
    let f = line("lines.fetch_or(line, Ordering::SeqCst)");
    each_fails(
        f,
        models::set_beside_drain_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
    each_fails(
        f,
        models::set_words_beside_drain_loses_no_page,
        &[InTwo, Missing],
    );
}

#[test]
fn test_before_mark_weakened_loses_a_page() {
    each_fails(
        line("let found = word.load("),
        models::mark_found_before_its_summary_bit_is_found_by_next_harvest,
        &[Relaxed],
    );
}

#[test]
fn t_weakened_loses_a_page() {
    let t = line("_ => word.fetch_and(!lines, Ordering::SeqCst)");
    each_fails(
        t,
        models::set_beside_drain_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
}

#[test]
fn s_or_h_weakened_loses_a_page() {
    let s = line("*seen = word.load(Ordering::SeqCst)");
    each_fails(
        s,
        models::set_beside_drain_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
    let h = line("*drained = word.swap(0, Ordering::SeqCst)");
    each_fails(
        h,
        models::set_by_two_writers_without_summary_loses_no_page,
        &[Relaxed, InTwo],
    );
    let part = line("_ => word.fetch_and(!bits, Ordering::SeqCst)");
    each_fails(
        part,
        models::drain_of_partial_range_loses_no_page,
        &[Relaxed],
    );
}

#[test]
fn clear_and_reads_weakened_lose_a_page() {
    let clear = line("word.fetch_and(!bits, Ordering::SeqCst);");
    each_fails(
        clear,
        models::set_beside_drain_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
    each_fails(
        clear,
        models::clear_beside_writer_keeps_other_marks,
        &[InTwo],
    );
    let read = line(".map_or(0, |word| word.load(Ordering::Acquire))");
    each_fails(read, models::word_with_mark_acquires_data, &[Relaxed]);
    let copy = line("match word.load(Ordering::Acquire)");
    each_fails(
        copy,
        models::copy_to_beside_writer_acquires_marked_data,
        &[Relaxed],
    );
}

#[test]
fn barrier_left_out_loses_a_page() {
    each_fails(
        0,
        models::test_and_set_beside_drain_loses_no_page,
        &[Missing],
    );
    each_fails(
        1,
        models::test_and_set_beside_drain_loses_no_page,
        &[Missing],
    );
}

// No model needs these:
//
// - Sequential consistency of only one of the tests before a mark. loom runs loads in the order of
//   the program, and orders more by sequentially consistent operations than the language does.
// - Sequential consistency of the load of a summary word before it is drained, and of a word before
//   a part of it is drained. In the models, a mark is complete before a harvest only by a join, or
//   in the same thread. Then a relaxed load finds it. In the library it may be complete by the
//   total order alone.
// - Sequential consistency of `H`, and of the mark of whole words, beyond acquire and release. The
//   proof uses the total order of `M`, `L`, `F`, `T` and `S`. The models of whole words have one
//   writer.
// - Atomicity of `T`. It drains the bit of a line whose words are loaded after it. A model with
//   more lines would lose one.
// - `T` and the `H` of a part as `swap`, for 64 lines and for a whole word. It is the same
//   operation as the one beside it, with more bits than the models have.
// - The clear operation: a clear that is left out loses nothing.
