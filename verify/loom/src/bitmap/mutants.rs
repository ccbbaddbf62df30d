//! The orderings, operations and fences of `marks.rs` and `tracking.rs` that a model needs: each is
//! weakened or left out, and the model fails.
//!
//! The letters in the names of the tests are those of the protocol in `src/bitmap/marks.rs`. The
//! end of this file lists the orderings that no model needs, with the reason.

use super::marks_tests as models;
use crate::harness::{fails, Mutant, Wrong};
use Wrong::{AcqRel, InTwo, Missing, Relaxed};

/// A line of a file.
type Place = (&'static str, u32);

/// Returns the only line that contains `of`.
fn find(file: &'static str, source: &str, of: &str) -> Place {
    let mut lines = (1u32..)
        .zip(source.lines())
        .filter(|(_, line)| line.contains(of));
    let (number, _) = lines.next().unwrap_or_else(|| panic!("no line has {of:?}"));
    assert!(lines.next().is_none(), "several lines have {of:?}");
    (file, number)
}

fn marks(of: &str) -> Place {
    let source = include_str!("../../../../src/bitmap/marks.rs");
    find("bitmap/marks.rs", source, of)
}

fn tracking(of: &str) -> Place {
    let source = include_str!("../../../../src/bitmap/tracking.rs");
    find("bitmap/tracking.rs", source, of)
}

/// Returns the line after a line.
fn after((file, line): Place) -> Place {
    (file, line + 1)
}

/// Checks that a model fails with each of these changes of the operation at a line.
fn each_fails((file, line): Place, model: fn(), all: &[Wrong]) {
    for &wrong in all {
        let mutant = Mutant { file, line, wrong };
        assert!(
            fails(model, Some(mutant)),
            "the model passes with {mutant:?}"
        );
    }
}

#[test]
fn w_or_f_left_out_loses_a_page() {
    let mark = after(marks(
        "// A harvest may have cleared the marks before the data",
    ));
    each_fails(mark, models::mark_during_harvest_loses_no_page, &[Missing]);
    let range = after(marks("// Orders the data before all checks."));
    each_fails(
        range,
        models::mark_range_during_harvest_loses_no_page,
        &[Missing],
    );
    let harvest = after(marks("// The matching fences of the writers"));
    each_fails(
        harvest,
        models::mark_during_harvest_loses_no_page,
        &[Missing],
    );
}

#[test]
fn fence_of_tracking_left_out_loses_a_page() {
    for before in ["fn is_on_after_fence(&self)", "self.state.store(state"] {
        each_fails(
            after(tracking(before)),
            models::tracking_switched_on_during_write_loses_no_page,
            &[Missing],
        );
    }
}

#[test]
fn m_or_ms_weakened_loses_a_page() {
    let places = [
        after(marks("if let Some(target) = self.words.get(word) {")),
        after(marks("// Orders the data as well.")),
        // `M` after `W`, and `MS`.
        marks(" word.fetch_or(bits, Ordering::SeqCst)"),
    ];
    for place in places {
        each_fails(
            place,
            models::mark_during_harvest_of_empty_line_loses_no_page,
            &[Relaxed, AcqRel, InTwo, Missing],
        );
    }
}

#[test]
fn l_or_ls_weakened_loses_a_page() {
    let check = marks("word.load(Ordering::SeqCst) & bits == bits");
    each_fails(
        check,
        models::mark_during_harvest_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
    each_fails(
        check,
        models::mark_found_before_its_summary_bit_is_found_by_next_harvest,
        &[Relaxed],
    );
}

#[test]
fn t_weakened_loses_a_page() {
    each_fails(
        marks("word.fetch_and(!lines, Ordering::SeqCst)"),
        models::mark_during_harvest_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
}

#[test]
fn s_or_h_weakened_loses_a_page() {
    each_fails(
        after(marks("fn load(word: &AtomicU64) -> u64 {")),
        models::mark_during_harvest_of_empty_line_loses_no_page,
        &[Relaxed, AcqRel],
    );
    each_fails(
        marks("swap_pair(pair, seen)"),
        models::set_during_harvest_loses_no_page,
        &[InTwo],
    );
    let part = marks("word.fetch_and(!bits, Ordering::SeqCst)");
    each_fails(
        part,
        models::harvest_of_page_during_write_keeps_other_marks,
        &[InTwo],
    );
}

#[test]
fn reads_weakened_lose_a_page() {
    let read = marks(".map_or(0, |word| word.load(Ordering::Acquire))");
    each_fails(read, models::word_with_mark_acquires_data, &[Relaxed]);
    let copy = marks("match word.load(Ordering::Acquire)");
    each_fails(
        copy,
        models::copy_to_during_write_acquires_marked_data,
        &[Relaxed],
    );
}

// No model needs these:
//
// - Sequential consistency of only one of the checks. loom runs loads in the order of the program,
//   and orders more by sequentially consistent operations than the language does.
// - Sequential consistency of the load of a summary word before it is cleared, and of a word before
//   a part of it is cleared. In the models, a mark is complete before a harvest only by a join, or
//   in the same thread. Then a relaxed load finds it. In the library it may be complete by the
//   total order alone.
// - Any ordering of `H`. `F` follows it, and acquires what it read.
// - Atomicity of `T`. It clears the bit of a line whose words are loaded after it. A model with
//   more lines would lose one.
// - `L` of the words between the first and the last one of a range. It is the same operation as
//   that of those two; the models have no more words.
