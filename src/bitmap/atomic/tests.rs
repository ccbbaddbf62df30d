//! [`AtomicBitmap`], and what it is harvested into.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::*;
use test_support::skipped;

fn bitmap(bytes: usize, page: usize) -> AtomicBitmap {
    AtomicBitmap::new(bytes, NonZeroUsize::new(page).unwrap())
}

#[test]
fn a_part_of_a_page_counts_as_one() {
    assert_eq!(bitmap(0, 1).len(), 0);
    assert_eq!(bitmap(1, 4096).len(), 1);
    assert_eq!(bitmap(4096, 4096).len(), 1);
    assert_eq!(bitmap(4097, 4096).len(), 2);
    assert_eq!(bitmap(100, 3).len(), 34);
    assert_eq!(bitmap(usize::MAX, usize::MAX).len(), 1);
}

#[test]
fn bits_past_the_end_do_not_exist() {
    let bitmap = bitmap(10_000, 4096);
    bitmap.set_bit(3);
    bitmap.set_bit(usize::MAX);
    bitmap.set_addr_range(usize::MAX, usize::MAX);
    assert_eq!(bitmap.get_and_reset(), [0]);
    bitmap.set_addr_range(0, usize::MAX);
    assert_eq!(bitmap.get_and_reset(), [0b111]);
}

#[test]
fn ranges_fill_whole_words_and_nothing_beside() {
    let bitmap = bitmap(300 * 16, 16);
    bitmap.set_addr_range(16 * 60 + 15, 16 * 200);
    assert_eq!(
        bitmap.clone().get_and_reset(),
        [0xf << 60, u64::MAX, u64::MAX, u64::MAX, 0x1f]
    );
    bitmap.reset_addr_range(16 * 64, 16 * 128);
    assert_eq!(bitmap.get_and_reset(), [0xf << 60, 0, 0, u64::MAX, 0x1f]);
}

#[test]
fn growth_keeps_marks_and_adds_clean_pages() {
    let mut bitmap = bitmap(10_000, 4096);
    bitmap.set_bit(1);
    bitmap.enlarge(1);
    assert_eq!((bitmap.len(), bitmap.byte_size()), (3, 10_001));
    bitmap.enlarge(4096 * 70);
    assert_eq!(bitmap.len(), 73);
    assert_eq!(bitmap.get_and_reset(), [2, 0]);
    bitmap.grow_to_track(100);
    assert_eq!(bitmap.len(), 73);
}

/// What a thread marked before it was joined is found, whatever else went on.
#[test]
fn no_mark_is_lost_to_a_harvest_at_the_same_time() {
    no_mark_is_lost(bitmap(64 * 4096, 4096));
    let mut looking = bitmap(64 * 4096, 4096);
    match looking.test_before_marking() {
        Ok(()) => no_mark_is_lost(looking),
        Err(error) => skipped(
            "no_mark_is_lost_to_a_harvest_at_the_same_time",
            format!("no membarrier(2): {error}"),
        ),
    }
}

fn no_mark_is_lost(bitmap: AtomicBitmap) {
    let rounds = if cfg!(miri) { 50 } else { 20_000 };
    let written: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
    let mut copied = vec![0u64; 64];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 1..=rounds {
                let page = (round * 7 % 64) as usize;
                written[page].store(round, Ordering::Relaxed);
                bitmap.mark_dirty(page * 4096, 1);
            }
        });
        let mut harvest = || {
            let bits = bitmap.get_and_reset()[0];
            for page in (0..64).filter(|page| bits & (1 << page) != 0) {
                copied[page] = written[page].load(Ordering::Relaxed);
            }
        };
        while !writer.is_finished() {
            harvest();
        }
        writer.join().unwrap();
        harvest();
    });
    let last: Vec<u64> = written.iter().map(|w| w.load(Ordering::Relaxed)).collect();
    assert_eq!(copied, last);
}

/// The same bits, whichever way a mark comes and a harvest goes: against a set of pages.
mod model {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Step {
        Mark(usize, usize),
        Set(usize),
        Reset(usize, usize),
        ResetBit(usize),
        Grow(usize),
        Enlarge(usize),
        Clone,
        Words(usize),
        Harvest,
        From(usize),
        PutBack,
        Switch(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        let byte = 0usize..200_000;
        prop_oneof![
            8 => (byte.clone(), prop_oneof![0usize..100, 0usize..150_000]).prop_map(|(at, len)| Step::Mark(at, len)),
            2 => (0usize..20_000).prop_map(Step::Set),
            1 => (byte.clone(), 0usize..20_000).prop_map(|(at, len)| Step::Reset(at, len)),
            1 => (0usize..20_000).prop_map(Step::ResetBit),
            1 => (0usize..200_000).prop_map(Step::Grow),
            1 => (0usize..5_000).prop_map(Step::Enlarge),
            1 => Just(Step::Clone),
            2 => (0usize..300).prop_map(Step::Words),
            2 => Just(Step::Harvest),
            2 => byte.prop_map(Step::From),
            1 => Just(Step::PutBack),
            1 => any::<bool>().prop_map(Step::Switch),
        ]
    }

    proptest! {
        // The model goes over bytes: under an emulator or a sanitizer, that takes its time.
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn marks_are_a_set_of_pages(
            page in prop_oneof![Just(1usize), Just(16), Just(4096), Just(7), Just(100)],
            size in 0usize..100_000,
            look in any::<bool>(),
            steps in prop::collection::vec(step(), 0..40),
        ) {
            let mut marks = bitmap(size, page);
            if look {
                // Where the kernel refuses, the other mode is tried twice.
                let _ = marks.test_before_marking();
            }
            let (mut size, mut on, mut model) = (size, true, BTreeSet::<usize>::new());
            let mut last = DirtyPages::new(0, NonZeroUsize::MIN);
            for step in steps {
                let pages = size.div_ceil(page);
                let of = |at: usize, len: usize| (len != 0).then(|| at / page..=(at + len - 1) / page).into_iter().flatten().filter(move |p| *p < pages);
                match step {
                    Step::Mark(at, len) => {
                        marks.mark_dirty(at, len);
                        if on { model.extend(of(at, len)); }
                    }
                    Step::Set(bit) => {
                        marks.set_bit(bit);
                        if bit < pages { model.insert(bit); }
                    }
                    Step::Reset(at, len) => {
                        marks.reset_addr_range(at, len);
                        for page in of(at, len) { model.remove(&page); }
                    }
                    Step::ResetBit(bit) => {
                        marks.reset_bit(bit);
                        model.remove(&bit);
                    }
                    Step::Grow(to) => {
                        marks.grow(to);
                        size = size.max(to);
                    }
                    Step::Enlarge(by) => {
                        marks.enlarge(by);
                        size += by;
                    }
                    Step::Clone => marks = marks.clone(),
                    Step::Words(words) => {
                        let mut found = vec![0; words];
                        marks.harvest_words(&mut found);
                        let found: BTreeSet<usize> = (0..words * 64).filter(|bit| found[bit / 64] >> (bit % 64) & 1 != 0).collect();
                        let rest = model.split_off(&(words * 64));
                        prop_assert_eq!(found, std::mem::replace(&mut model, rest));
                    }
                    Step::Harvest => {
                        last = DirtyPages::new(size, NonZeroUsize::new(page).unwrap());
                        marks.harvest_into(&mut last);
                        let found: BTreeSet<usize> = last.runs().flat_map(|run| run.map(|byte| byte / page)).collect();
                        prop_assert_eq!(found, std::mem::take(&mut model));
                    }
                    Step::From(offset) => {
                        // Part of the bitmap, as a slice of it is harvested.
                        let len = 5000;
                        let mut dirty = DirtyPages::new(len, NonZeroUsize::new(page).unwrap());
                        marks.slice_at(offset).harvest_into(&mut dirty);
                        let taken: BTreeSet<usize> = of(offset, len).filter(|page| model.contains(page)).collect();
                        // A page that it has only a part of stays marked for others.
                        let whole = |number: &usize| number * page >= offset && ((number + 1) * page).min(size) <= offset + len;
                        model.retain(|number| !taken.contains(number) || !whole(number));
                        let bytes = taken.iter().flat_map(|number| number * page..(number + 1) * page).filter(|byte| (offset..offset + len).contains(byte));
                        let expected: BTreeSet<usize> = bytes.map(|byte| (byte - offset) / page).collect();
                        let found: BTreeSet<usize> = dirty.runs().flat_map(|run| run.map(|byte| byte / page)).collect();
                        prop_assert_eq!(found, expected);
                    }
                    Step::PutBack => {
                        marks.put_back(&last);
                        model.extend(last.runs().flat_map(|run| run.map(|byte| byte / page)).filter(|p| *p < pages));
                    }
                    Step::Switch(to) => {
                        if to { marks.start_tracking() } else { marks.stop_tracking() }
                        on = to;
                        prop_assert_eq!(marks.is_tracking(), to);
                    }
                }
                prop_assert_eq!((marks.len(), marks.byte_size(), marks.page_size().get()), (size.div_ceil(page), size, page));
                let set: BTreeSet<usize> = (0..marks.len() + 70).filter(|bit| marks.is_bit_set(*bit)).collect();
                prop_assert_eq!(&set, &model);
            }
            let words = marks.get_and_reset();
            prop_assert_eq!(words.len(), size.div_ceil(page).div_ceil(64));
            let found: BTreeSet<usize> = (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0).collect();
            prop_assert_eq!(found, model);
            prop_assert!(marks.get_and_reset().iter().all(|word| *word == 0));
        }
    }
}

/// It grew after the copy was begun, by pages that are in the last word of the copy, and one of them is marked.
#[test]
fn a_copy_has_no_pages_past_its_last() {
    let original = bitmap(66 * 16, 16);
    original.set_bit(65);
    let pages = original.len();
    original.grow(500 * 16);
    original.set_bit(66);
    original.set_bit(300);
    let copy = original.copy_of(pages);
    assert_eq!((copy.len(), copy.byte_size()), (66, 66 * 16));
    assert!(!copy.is_bit_set(66));
    assert_eq!(copy.get_and_reset(), [0, 0b10]);
    // Of whole words, there is none behind.
    assert_eq!(original.copy_of(64).get_and_reset(), [0]);
    assert_eq!(original.clone().get_and_reset()[..2], [0, 0b110]);
}

/// It grows while others mark in it, and what they mark is found.
#[test]
fn growth_at_the_same_time_loses_nothing() {
    let bitmap = bitmap(4096, 4096);
    let mut found = std::collections::BTreeSet::new();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for page in 0..5000usize {
                while bitmap.len() <= page {
                    std::hint::spin_loop();
                }
                bitmap.mark_dirty(page * 4096, 1);
            }
        });
        let mut size = 4096;
        while !writer.is_finished() {
            size = (size + 70 * 4096).min(5000 * 4096);
            bitmap.grow(size);
            let words = bitmap.get_and_reset();
            found
                .extend((0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0));
        }
    });
    let words = bitmap.get_and_reset();
    found.extend((0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0));
    assert_eq!(found.len(), 5000);
}

/// A monitor that prints its guest memory for a message does not print a number for each 64 pages of it.
#[test]
fn a_bitmap_is_printed_in_a_line() {
    let bitmap = AtomicBitmap::new(1 << 40, NonZeroUsize::new(4096).unwrap());
    let printed = format!("{bitmap:?}");
    assert!(
        printed.len() < 300 && printed.contains("4194304 words"),
        "{printed}"
    );
}
