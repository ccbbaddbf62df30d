use super::super::external_log::WORDS_READ;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn pages(byte_size: usize, page_size: usize) -> DirtyPages {
    DirtyPages::new(byte_size, NonZeroUsize::new(page_size).unwrap())
}

#[test]
fn runs_across_words_end_with_memory() {
    let mut dirty = pages(200 * 16 + 3, 16);
    assert!(dirty.is_empty() && dirty.runs().next().is_none());
    dirty.insert_range(16 * 60, 16 * 68);
    dirty.insert_range(16 * 200, 1);
    dirty.insert_range(16 * 201, 1);
    dirty.insert_range(5, 0);
    assert_eq!(
        dirty.runs().collect::<Vec<_>>(),
        [16 * 60..16 * 128, 16 * 200..16 * 200 + 3]
    );
    assert_eq!(dirty.total_pages(), 69);
    dirty.clear();
    assert!(dirty.is_empty() && dirty.words().iter().all(|word| *word == 0));
    assert!(pages(0, 1).runs().next().is_none());
}

#[test]
fn add_words_of_long_log_reads_only_words_of_the_memory() {
    let log = vec![0u64; 1 << 12];
    let page = |size| NonZeroUsize::new(size).unwrap();
    let mut dirty = pages(64 * 16, 16);
    let mut words_read = |add: &mut dyn FnMut(&mut DirtyPages)| {
        WORDS_READ.set(usize::MAX);
        add(&mut dirty);
        WORDS_READ.get()
    };
    assert_eq!(
        words_read(&mut |dirty| dirty.add_words(3, &log, page(16))),
        1
    );
    assert_eq!(
        words_read(&mut |dirty| dirty.add_words(0, &log, page(32))),
        1
    );
    assert_eq!(
        words_read(&mut |dirty| dirty.add_words_before(17, &log, page(16))),
        2
    );
    let far = 64 * 16 * 5 + 1;
    assert_eq!(
        words_read(&mut |dirty| dirty.add_words_before(far, &log, page(16))),
        2
    );
}

#[test]
fn runs_around_offset_skip_earlier_lines() {
    let mut dirty = pages(16 * 64 * 8 * 200, 16);
    for line in [0, 63, 64, 70, 199] {
        dirty.insert_range(16 * 64 * 8 * line + 16, 1);
    }
    let first = |line: usize| {
        let run = dirty.runs_around(16 * 64 * 8 * line).next();
        run.map(|run| run.start / (16 * 64 * 8))
    };
    assert_eq!(
        [0, 1, 63, 64, 65, 71, 199].map(first),
        [0, 63, 63, 64, 70, 199, 199].map(Some)
    );
    assert_eq!(first(200), None);
}

fn check_ranges_and_logs(
    byte_size: usize,
    page_size: usize,
    ranges: Vec<(usize, usize)>,
    logs: Vec<(usize, Vec<u64>, Option<usize>)>,
) -> Result<(), TestCaseError> {
    let mut dirty = pages(byte_size, page_size);
    let mut model = BTreeSet::new();
    for (offset, len) in ranges {
        dirty.insert_range(offset, len);
        model.extend(
            (offset..offset + len)
                .filter(|byte| *byte < byte_size)
                .map(|byte| byte / page_size),
        );
    }
    for (offset, words, log_page) in logs {
        let log_page = log_page.unwrap_or(page_size);
        // An offset at a word of the same pages takes the fast path.
        let offset = if log_page == page_size {
            offset / (64 * page_size) * 64 * page_size
        } else {
            offset
        };
        dirty.add_words(offset, &words, NonZeroUsize::new(log_page).unwrap());
        for bit in 0..words.len() * 64 {
            if words[bit / 64] >> (bit % 64) & 1 != 0 {
                let start = offset + bit * log_page;
                model.extend(
                    (start..start + log_page)
                        .filter(|byte| *byte < byte_size)
                        .map(|byte| byte / page_size),
                );
            }
        }
    }
    prop_assert_eq!(dirty.total_pages(), model.len());
    prop_assert_eq!(dirty.is_empty(), model.is_empty());
    let mut last_end = None;
    let mut found = BTreeSet::new();
    for run in dirty.runs() {
        prop_assert!(run.start < run.end && run.end <= byte_size);
        prop_assert!(
            last_end.is_none_or(|end| end < run.start),
            "neighbours are one run"
        );
        last_end = Some(run.end);
        found.extend(run.map(|byte| byte / page_size));
    }
    prop_assert_eq!(found, model);
    Ok(())
}

fn check_set_operations(
    (size, page): (usize, usize),
    (other_size, other_page): (usize, Option<usize>),
    mine: Vec<(usize, usize)>,
    theirs: Vec<(usize, usize)>,
    (removed, removed_len): (usize, usize),
) -> Result<(), TestCaseError> {
    let filled = |size, page, ranges: &[(usize, usize)]| {
        let mut dirty = pages(size, page);
        for &(offset, len) in ranges {
            dirty.insert_range(offset, len);
        }
        dirty
    };
    let mine = filled(size, page, &mine);
    let theirs = filled(other_size, other_page.unwrap_or(page), &theirs);
    let has = |dirty: &DirtyPages, byte: usize| byte < dirty.byte_size() && dirty.contains(byte);
    let bytes = |number: usize| number * page..((number + 1) * page).min(size);
    let (mut union, mut difference, mut both, mut rest) =
        (mine.clone(), mine.clone(), mine.clone(), mine.clone());
    union.union_with(&theirs);
    difference.difference_with(&theirs);
    both.intersect_with(&theirs);
    rest.remove_range(removed, removed_len);
    for number in 0..size.div_ceil(page) {
        let (at, in_mine) = (number * page, mine.contains(number * page));
        let any = bytes(number).any(|byte| has(&theirs, byte));
        let all = bytes(number).all(|byte| has(&theirs, byte));
        prop_assert_eq!(union.contains(at), in_mine || any);
        prop_assert_eq!(difference.contains(at), in_mine && !all);
        prop_assert_eq!(both.contains(at), in_mine && any);
        let gone = bytes(number).all(|byte| (removed..removed + removed_len).contains(&byte));
        prop_assert_eq!(rest.contains(at), in_mine && !gone);
    }
    // The summary leads to every page, and to none past the end.
    for dirty in [&union, &difference, &both, &rest] {
        let found: BTreeSet<usize> = dirty.runs().flatten().collect();
        let expected: BTreeSet<usize> = (0..size).filter(|byte| dirty.contains(*byte)).collect();
        prop_assert_eq!(found, expected);
    }
    Ok(())
}

proptest! {
    /// Compares with a set of single pages, for any page size, log and offset.
    #[test]
    fn ranges_and_logs_agree_with_set_of_pages(
        byte_size in 0usize..40_000,
        page_size in 1usize..70,
        ranges in prop::collection::vec((0usize..50_000, 0usize..5000), 0..6),
        logs in prop::collection::vec(
            (
                0usize..20_000,
                prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..8),
                prop_oneof![Just(None), (1usize..200).prop_map(Some)],
            ),
            0..4,
        ),
    ) {
        check_ranges_and_logs(byte_size, page_size, ranges, logs)?;
    }

    #[test]
    fn set_operations_agree_with_sets_of_bytes(
        sizes in (0usize..5000, 1usize..40),
        other_sizes in (0usize..5000, prop_oneof![Just(None), (1usize..80).prop_map(Some)]),
        mine in prop::collection::vec((0usize..5000, 0usize..600), 0..6),
        theirs in prop::collection::vec((0usize..5000, 0usize..600), 0..6),
        removed in (0usize..5000, 0usize..3000),
    ) {
        check_set_operations(sizes, other_sizes, mine, theirs, removed)?;
    }
}
