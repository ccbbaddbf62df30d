//! Tests of [`AtomicBitmap`] and its harvests.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::*;
use crate::bitmap::sync::counted::count;

fn bitmap(bytes: usize, page: usize) -> AtomicBitmap {
    AtomicBitmap::new(bytes, NonZeroUsize::new(page).unwrap())
}

#[test]
fn len_counts_a_part_of_a_page_as_one() {
    assert_eq!(bitmap(0, 1).len(), 0);
    assert_eq!(bitmap(1, 4096).len(), 1);
    assert_eq!(bitmap(4096, 4096).len(), 1);
    assert_eq!(bitmap(4097, 4096).len(), 2);
    assert_eq!(bitmap(100, 3).len(), 34);
    assert_eq!(bitmap(usize::MAX, usize::MAX).len(), 1);
}

#[test]
fn set_past_the_end_does_nothing() {
    let bitmap = bitmap(10_000, 4096);
    bitmap.set_bit(3);
    bitmap.set_bit(usize::MAX);
    bitmap.set_addr_range(usize::MAX, usize::MAX);
    assert_eq!(bitmap.get_and_reset(), [0]);
    bitmap.set_addr_range(0, usize::MAX);
    assert_eq!(bitmap.get_and_reset(), [0b111]);
}

#[test]
fn set_addr_range_across_words_sets_its_pages_only() {
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
fn enlarge_keeps_marks_and_adds_clean_pages() {
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

#[test]
#[cfg_attr(miri, ignore = "Miri ends if memory runs out")]
fn grow_past_memory_returns_error_and_changes_nothing() {
    let bitmap = bitmap(100, 1);
    bitmap.set_bit(99);
    bitmap.grow(usize::MAX).unwrap_err();
    assert_eq!((bitmap.len(), bitmap.byte_size()), (100, 100));
    bitmap.set_bit(100);
    assert_eq!(bitmap.get_and_reset(), [0, 1 << 35]);
    assert!(AtomicBitmap::try_new(usize::MAX, NonZeroUsize::MIN).is_err());
    assert!(DirtyPages::try_new(usize::MAX, NonZeroUsize::MIN).is_err());
}

#[test]
fn concurrent_harvest_loses_no_mark() {
    let bitmap = bitmap(64 * 4096, 4096);
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

/// `AtomicBitmap` against a set of page numbers, in arithmetic that cannot overflow.
mod model {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Step {
        Mark {
            slice: usize,
            offset: usize,
            len: usize,
        },
        SetRange(usize, usize),
        SetBit(usize),
        ResetRange(usize, usize),
        ResetBit(usize),
        Grow(usize),
        Enlarge(usize),
        Clone,
        HarvestWords(usize),
        Harvest,
        HarvestSlice(usize),
        PutBack,
        SetTracking(bool),
    }

    /// Offsets and lengths: mostly inside the bitmap, and at both ends of `usize`.
    fn number() -> impl Strategy<Value = usize> {
        prop_oneof![
            6 => 0usize..200_000,
            2 => 0usize..100,
            1 => Just(usize::MAX),
            1 => (usize::MAX - 0x100)..usize::MAX,
            1 => any::<usize>(),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (prop_oneof![Just(0), number()], number(), number())
                .prop_map(|(slice, offset, len)| Step::Mark { slice, offset, len }),
            2 => (number(), number()).prop_map(|(at, len)| Step::SetRange(at, len)),
            2 => number().prop_map(Step::SetBit),
            2 => (number(), number()).prop_map(|(at, len)| Step::ResetRange(at, len)),
            1 => number().prop_map(Step::ResetBit),
            1 => (0usize..200_000).prop_map(Step::Grow),
            1 => (0usize..5_000).prop_map(Step::Enlarge),
            1 => Just(Step::Clone),
            2 => (0usize..300).prop_map(Step::HarvestWords),
            2 => Just(Step::Harvest),
            2 => (0usize..200_000).prop_map(Step::HarvestSlice),
            1 => Just(Step::PutBack),
            1 => any::<bool>().prop_map(Step::SetTracking),
        ]
    }

    /// Returns the numbers of the pages, below `pages`, that have any of the `len` bytes at `at`.
    fn touched(at: usize, len: usize, page: usize, pages: usize) -> BTreeSet<usize> {
        if len == 0 {
            return BTreeSet::new();
        }
        let (at, last, page) = (at as u128, at as u128 + len as u128 - 1, page as u128);
        let end = (last / page + 1).min(pages as u128);
        (at / page..end.max(at / page))
            .map(|page| page as usize)
            .collect()
    }

    fn set_bits(words: &[u64]) -> BTreeSet<usize> {
        let bits = 0..words.len() * 64;
        bits.filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0)
            .collect()
    }

    type Checked = Result<(), TestCaseError>;

    /// A bitmap, and the set of pages that it must have marked.
    struct Pair {
        marks: AtomicBitmap,
        model: BTreeSet<usize>,
        size: usize,
        page: usize,
        is_tracking: bool,
        /// The result of the last harvest of the whole bitmap.
        last: DirtyPages,
    }

    impl Pair {
        fn new(size: usize, page: usize, while_paused: bool) -> Self {
            let marks = bitmap(size, page);
            Self {
                marks: if while_paused {
                    marks.switched_while_paused()
                } else {
                    marks
                },
                model: BTreeSet::new(),
                size,
                page,
                is_tracking: true,
                last: DirtyPages::new(0, NonZeroUsize::MIN),
            }
        }

        fn pages(&self) -> usize {
            self.size.div_ceil(self.page)
        }

        /// Returns the pages that have any of the `len` bytes at `at`.
        fn pages_of(&self, at: usize, len: usize) -> BTreeSet<usize> {
            touched(at, len, self.page, self.pages())
        }

        fn new_set(&self, len: usize) -> DirtyPages {
            DirtyPages::new(len, NonZeroUsize::new(self.page).unwrap())
        }

        fn numbers(&self, dirty: &DirtyPages) -> BTreeSet<usize> {
            dirty
                .runs()
                .flat_map(|run| touched(run.start, run.len(), self.page, usize::MAX))
                .collect()
        }

        /// Applies a step to both, and compares its results.
        fn apply(&mut self, step: Step) -> Checked {
            match step {
                Step::Mark { slice, offset, len } => {
                    self.marks.slice_at(slice).mark_dirty(offset, len);
                    if self.is_tracking {
                        let marked = self.pages_of(slice.wrapping_add(offset), len);
                        self.model.extend(marked);
                    }
                }
                Step::SetRange(at, len) => {
                    self.marks.set_addr_range(at, len);
                    self.model.extend(self.pages_of(at, len));
                }
                Step::SetBit(bit) => {
                    self.marks.set_bit(bit);
                    self.model.extend((bit < self.pages()).then_some(bit));
                }
                Step::ResetRange(at, len) => {
                    self.marks.reset_addr_range(at, len);
                    let cleared = self.pages_of(at, len);
                    self.model.retain(|number| !cleared.contains(number));
                }
                Step::ResetBit(bit) => {
                    self.marks.reset_bit(bit);
                    self.model.remove(&bit);
                }
                Step::Grow(to) => {
                    self.marks.grow(to).unwrap();
                    self.size = self.size.max(to);
                }
                Step::Enlarge(by) => {
                    self.marks.enlarge(by);
                    self.size += by;
                }
                Step::Clone => self.marks = self.marks.clone(),
                Step::HarvestWords(words) => self.harvest_words(words)?,
                Step::Harvest => self.harvest()?,
                Step::HarvestSlice(offset) => self.harvest_slice(offset, 5000)?,
                Step::PutBack => {
                    self.marks.put_back(&self.last);
                    let (numbers, pages) = (self.numbers(&self.last), self.pages());
                    let existing = numbers.into_iter().filter(|number| *number < pages);
                    self.model.extend(existing);
                }
                Step::SetTracking(on) => {
                    if on {
                        self.marks.start_tracking()
                    } else {
                        self.marks.stop_tracking()
                    }
                    self.is_tracking = on;
                    prop_assert_eq!(self.marks.is_tracking(), on);
                }
            }
            Ok(())
        }

        fn harvest_words(&mut self, words: usize) -> Checked {
            let mut found = vec![0; words];
            self.marks.harvest_words(&mut found);
            let rest = self.model.split_off(&(words * 64));
            let expected = std::mem::replace(&mut self.model, rest);
            prop_assert_eq!(set_bits(&found), expected);
            Ok(())
        }

        fn harvest(&mut self) -> Checked {
            self.last = self.new_set(self.size);
            self.marks.harvest_into(&mut self.last);
            let expected = std::mem::take(&mut self.model);
            prop_assert_eq!(self.numbers(&self.last), expected);
            Ok(())
        }

        /// Harvests the `len` bytes at `offset`. A page that is only partly in them stays dirty.
        fn harvest_slice(&mut self, offset: usize, len: usize) -> Checked {
            let (page, size) = (self.page, self.size);
            let mut dirty = self.new_set(len);
            self.marks.slice_at(offset).harvest_into(&mut dirty);
            let in_slice = self.pages_of(offset, len);
            let taken: BTreeSet<usize> = in_slice.intersection(&self.model).copied().collect();
            let start = |number: &usize| *number as u128 * page as u128;
            let end = |number: &usize| (start(number) + page as u128).min(size as u128);
            let whole = |number: &usize| {
                start(number) >= offset as u128 && end(number) <= (offset + len) as u128
            };
            self.model
                .retain(|number| !taken.contains(number) || !whole(number));
            let expected: BTreeSet<usize> = (0..len)
                .filter(|byte| taken.contains(&((offset + byte) / page)))
                .map(|byte| byte / page)
                .collect();
            prop_assert_eq!(self.numbers(&dirty), expected);
            Ok(())
        }

        /// Compares sizes, and the marks by page and by offset.
        fn check(&self) -> Checked {
            let (marks, pages) = (&self.marks, self.pages());
            prop_assert_eq!(
                (marks.len(), marks.byte_size(), marks.page_size().get()),
                (pages, self.size, self.page)
            );
            let set: BTreeSet<usize> = (0..pages + 70)
                .filter(|index| marks.is_bit_set(*index))
                .collect();
            prop_assert_eq!(&set, &self.model);
            for index in 0..pages.min(1000) + 70 {
                if let Some(offset) = index.checked_mul(self.page) {
                    prop_assert_eq!(marks.dirty_at(offset), self.model.contains(&index));
                    prop_assert_eq!(marks.is_addr_set(offset), self.model.contains(&index));
                }
            }
            Ok(())
        }
    }

    proptest! {
        // The model works byte by byte, which is slow under an emulator or a sanitizer.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn atomic_bitmap_agrees_with_set_of_pages(
            page in prop_oneof![
                Just(1usize), Just(16), Just(4096), Just(7), Just(100), 1usize..40, Just(usize::MAX)
            ],
            size in prop_oneof![0usize..1000, 0usize..100_000],
            while_paused in any::<bool>(),
            steps in prop::collection::vec(step(), 0..40),
        ) {
            let mut pair = Pair::new(size, page, while_paused);
            for step in steps {
                pair.apply(step)?;
                pair.check()?;
            }
            let words = pair.marks.get_and_reset();
            prop_assert_eq!(words.len(), pair.pages().div_ceil(64));
            prop_assert_eq!(set_bits(&words), pair.model);
            prop_assert!(pair.marks.get_and_reset().iter().all(|word| *word == 0));
        }
    }
}

#[test]
fn copy_of_after_growth_has_no_marks_of_added_pages() {
    let original = bitmap(66 * 16, 16);
    original.set_bit(65);
    let pages = original.len();
    original.grow(500 * 16).unwrap();
    original.set_bit(66);
    original.set_bit(300);
    let copy = original.copy_of(pages);
    assert_eq!((copy.len(), copy.byte_size()), (66, 66 * 16));
    assert!(!copy.is_bit_set(66));
    assert_eq!(copy.get_and_reset(), [0, 0b10]);
    // Whole words only.
    assert_eq!(original.copy_of(64).get_and_reset(), [0]);
    assert_eq!(original.clone().get_and_reset()[..2], [0, 0b110]);
}

#[test]
fn harvest_during_growth_in_last_page_keeps_mark_of_new_bytes() {
    let (bitmap, page) = (bitmap(0x1800, 0x1000), NonZeroUsize::new(0x1000).unwrap());
    let mut dirty = DirtyPages::new(0x1800, page);
    // The harvest loads the size. Then another thread adds a region that begins in the last page,
    // and the guest writes to it.
    let seen = bitmap.byte_size();
    bitmap.grow(0x3000).unwrap();
    bitmap.slice_at(0x1800).mark_dirty(0, 1);
    bitmap.harvest_seen(0, seen, &mut dirty);
    assert!(dirty.runs().eq(std::iter::once(0x1000..0x1800)));

    let mut added = DirtyPages::new(0x1800, page);
    bitmap.slice_at(0x1800).harvest_into(&mut added);
    assert!(added.runs().eq(std::iter::once(0..0x1000)));

    // Without a mark, the page stays clean.
    bitmap.reset();
    dirty.clear();
    bitmap.harvest_seen(0, seen, &mut dirty);
    assert!(dirty.is_empty() && bitmap.get_and_reset() == [0]);
}

#[test]
fn concurrent_grow_loses_no_mark() {
    let pages = if cfg!(miri) { 80 } else { 5000 };
    let bitmap = bitmap(4096, 4096);
    let mut found = std::collections::BTreeSet::new();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for page in 0..pages {
                while bitmap.len() <= page {
                    std::hint::spin_loop();
                }
                bitmap.mark_dirty(page * 4096, 1);
            }
        });
        let mut size = 4096;
        while !writer.is_finished() {
            size = (size + 70 * 4096).min(pages * 4096);
            bitmap.grow(size).unwrap();
            let words = bitmap.get_and_reset();
            found
                .extend((0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0));
        }
    });
    let words = bitmap.get_and_reset();
    found.extend((0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0));
    assert_eq!(found.len(), pages);
}

#[test]
#[cfg_attr(miri, ignore = "Miri zeroes many words slowly")]
fn debug_of_large_bitmap_is_one_line() {
    let bitmap = AtomicBitmap::new(1 << 40, NonZeroUsize::new(4096).unwrap());
    let printed = format!("{bitmap:?}");
    assert!(
        printed.len() < 300 && printed.contains("4194304 words"),
        "{printed}"
    );
}

/// Sizes in pages of bitmaps without a summary and with one.
const SIZES: [usize; 2] = [2000, 1 << 22];

/// The pages of a range: in a word, over two words, over lines, and those that `grow` added.
fn ranges(pages: usize) -> [(usize, usize); 6] {
    [
        (5, 1),
        (5, 20),
        (60, 8),
        (500, 100),
        (1, 1900),
        (pages - 70, 140),
    ]
}

#[test]
fn mark_dirty_of_dirty_pages_modifies_no_shared_word() {
    for pages in SIZES {
        let bitmap = bitmap(pages, 1);
        bitmap.grow(pages + 1000).unwrap();
        for (first, len) in ranges(pages) {
            let mark = || bitmap.slice_at(0).mark_dirty(first, len);
            let words = (first + len).div_ceil(64) - first / 64;
            let lines = (first + len).div_ceil(512) - first / 512;
            // Each word once, and each line once in each part.
            let (modified, _) = count(mark);
            assert!(
                (1..=words + lines + 1).contains(&modified),
                "{modified}, {first}, {len}"
            );
            assert_eq!(count(mark).0, 0, "{pages} pages: {first}, {len}");
            // A page that is clean is the only one that is marked.
            let middle = first + len / 2;
            bitmap.reset_bit(middle);
            assert_eq!(count(mark).0, 1, "{pages} pages: {first}, {len}");
            assert!(bitmap.is_bit_set(middle));
            bitmap.reset();
        }
    }
}

#[test]
fn harvest_by_any_method_ends_with_a_fence() {
    for pages in SIZES {
        let bitmap = bitmap(pages, 1);
        bitmap.grow(pages + 1000).unwrap();
        let page = NonZeroUsize::MIN;
        let (mut words, mut dirty) = (vec![0; 40], DirtyPages::new(pages, page));
        let clears: [(&str, &mut dyn FnMut()); 7] = [
            ("get_and_reset", &mut || drop(bitmap.get_and_reset())),
            ("reset", &mut || bitmap.reset()),
            ("reset_bit", &mut || bitmap.reset_bit(700)),
            ("reset_addr_range", &mut || {
                bitmap.reset_addr_range(3, pages)
            }),
            ("harvest_words", &mut || {
                bitmap.harvest_words(&mut words);
            }),
            ("harvest_into", &mut || bitmap.harvest_into(&mut dirty)),
            ("slice", &mut || {
                bitmap
                    .slice_at(5)
                    .harvest_into(&mut DirtyPages::new(900, page))
            }),
        ];
        for (name, clear) in clears {
            bitmap.mark_dirty(0, pages + 100);
            let (modified, after_fence) = count(clear);
            assert!(
                modified > 0 && after_fence == 0,
                "{name}: {modified}, {after_fence}"
            );
        }
    }
}

#[test]
#[cfg(feature = "backend-mmap")]
fn write_to_memory_with_dirty_pages_modifies_no_shared_word() {
    use crate::dirty::DirtyMemory;
    use crate::{Bytes, GuestAddress, GuestMemoryMmap};

    let ranges = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
    let write = || {
        memory.write_obj(1u64, GuestAddress(0x1ffc)).unwrap();
        memory
            .store(1u32, GuestAddress(0x9000), Ordering::Relaxed)
            .unwrap();
        memory
            .write_slice(&[1; 0x3000], GuestAddress(0x7000))
            .unwrap();
        let mut source = [1u8; 100].as_slice();
        memory
            .read_exact_volatile_from(GuestAddress(0x4000), &mut source, 100)
            .unwrap();
    };
    assert_eq!(count(write).0, 5);
    assert_eq!(count(write).0, 0);
    let mut dirty = DirtyMemory::new();
    let (modified, after_fence) = count(|| dirty.harvest(&memory));
    assert!(modified > 0 && after_fence == 0);
    assert_eq!(dirty.total_pages(), 6);
}

#[test]
fn put_back_sets_pages_by_read_modify_writes() {
    let bitmap = bitmap(2000, 1);
    let mut dirty = DirtyPages::new(2000, NonZeroUsize::MIN);
    bitmap.mark_dirty(60, 8);
    bitmap.harvest_into(&mut dirty);
    bitmap.mark_dirty(60, 8);
    let put_back = || bitmap.slice_at(0).put_back(&mut dirty.runs());
    assert_eq!(count(put_back).0, 2);
    assert_eq!(count(|| bitmap.put_back(&dirty)).0, 2);
    let words = [0xf << 60];
    assert_eq!(
        count(|| bitmap.set_from_words(0, &words, NonZeroUsize::MIN)).0,
        1
    );
}

#[test]
fn mark_dirty_while_switched_off_modifies_nothing() {
    for bitmap in [bitmap(100, 1), bitmap(100, 1).switched_while_paused()] {
        bitmap.stop_tracking();
        let copy = bitmap.clone();
        assert_eq!(count(|| bitmap.mark_dirty(0, 100)).0, 0);
        copy.mark_dirty(0, 100);
        assert!(!copy.is_tracking() && !copy.dirty_at(0));
        bitmap.start_tracking();
        bitmap.mark_dirty(0, 100);
        assert!(bitmap.dirty_at(99));
    }
}

#[test]
fn estimate_pages_of_grown_bitmap_counts_all_parts() {
    let bitmap = bitmap(64 * 16, 16);
    bitmap.grow(500 * 16).unwrap();
    for page in [0, 63, 64, 300, 499, 500] {
        bitmap.set_bit(page);
    }
    assert_eq!(bitmap.estimate_pages(), 5);
    bitmap.reset();
    assert_eq!(bitmap.estimate_pages(), 0);
}
