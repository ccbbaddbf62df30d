//! [`RegionList`]: the regions of an index, most of which other indexes share.

use core::fmt;
use core::iter;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ops::Deref;
use core::ptr::NonNull;
use std::sync::Arc;

/// An immutable list of shared regions, which is a slice for lookups.
///
/// A change of one region creates another list. If the two lists shared no owners, the change would
/// increment the counter of each region. Locked increments do not overlap, so this would take most
/// of the time. Therefore, chunks of regions own the regions, and lists share the chunks:
///
/// ```text
///   regions   │ A │ B │ C │ D │ E │ F │ G │ ...   plain copies of the pointers in the chunks
///   chunks    │ A, B, C   │ D, E, F, G    │ ...   each with a counter, and counted regions
/// ```
///
/// A change replaces one chunk by none, one or two. It increments the counters of the regions in
/// it, and of each other chunk. It copies `regions` as plain memory.
pub(super) struct RegionList<R> {
    /// The slice of `owner` that lists all regions.
    regions: NonNull<[Arc<R>]>,
    owner: Owner<R>,
}

/// Regions with one counter for all.
type Chunk<R> = Arc<[Arc<R>]>;

/// The maximum number of regions in a chunk. A list of at most this number is a single chunk.
///
/// A change increments a counter for each region of the chunk, and for each other chunk. Removing
/// one of 64 regions is slower with chunks of 32, and removing one of 1024 is as fast. The rows
/// `remove_region` of bench/rows.md measure chunks of 16.
const MOST: usize = 16;

/// The average number of regions in a chunk below which all regions are cut into new chunks.
///
/// Removals leave small chunks. New ones have at least twice as many, so they are rarely cut again.
const FEWEST: usize = 4;

enum Owner<R> {
    /// No region. A shared empty chunk would have a counter.
    None,
    /// The chunk is also the slice that lists all regions.
    Chunk(Chunk<R>),
    Chunks(Arc<Chunks<R>>),
}

/// Several chunks, each of at least one region, and of at most [`MOST`].
struct Chunks<R> {
    chunks: Vec<Chunk<R>>,
    /// Copies of the pointers in `chunks`, in the same order. They are not counted.
    regions: Vec<ManuallyDrop<Arc<R>>>,
}

// SAFETY: a list is a pointer to memory that `owner` keeps, and `owner`. Any thread may follow the
// pointer while the list exists. `owner` consists of `Arc`s and `Vec`s of `Arc<R>`, which may move
// to another thread since `R: Send + Sync`.
unsafe impl<R: Send + Sync> Send for RegionList<R> {}
// SAFETY: through `&RegionList`, a thread reads the list, clones an `Arc<R>` of it, or clones
// `owner`. All that is possible from several threads at once, since `R: Send + Sync`.
unsafe impl<R: Send + Sync> Sync for RegionList<R> {}

impl<R> Deref for RegionList<R> {
    type Target = [Arc<R>];

    #[inline(always)]
    #[expect(clippy::disallowed_methods, reason = "the list is not guest memory")]
    fn deref(&self) -> &[Arc<R>] {
        // SAFETY: an empty slice needs only an aligned pointer that is not null (`default`).
        // Otherwise `regions` is the slice of an `Arc<[Arc<R>]>` (`from_chunk`), or that of the
        // vector in an `Arc<Chunks<R>>` (`from_chunks`). `owner` is that `Arc` or a clone, and the
        // returned borrow keeps `self`. So the slice stays in place, and nothing changes it.
        unsafe { self.regions.as_ref() }
    }
}

impl<R> Clone for RegionList<R> {
    #[inline(always)]
    fn clone(&self) -> Self {
        Self {
            regions: self.regions,
            owner: match &self.owner {
                Owner::None => Owner::None,
                Owner::Chunk(chunk) => Owner::Chunk(Arc::clone(chunk)),
                Owner::Chunks(chunks) => Owner::Chunks(Arc::clone(chunks)),
            },
        }
    }
}

impl<R> Default for RegionList<R> {
    fn default() -> Self {
        Self {
            regions: NonNull::slice_from_raw_parts(NonNull::dangling(), 0),
            owner: Owner::None,
        }
    }
}

impl<R: fmt::Debug> fmt::Debug for RegionList<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<R> RegionList<R> {
    /// Creates a list of these regions.
    pub(super) fn new(regions: Vec<Arc<R>>) -> Self {
        match regions.len() {
            0..=MOST => Self::from_chunk(regions.into()),
            _ => Self::from_chunks(cut(regions).collect()),
        }
    }

    /// Creates a list of up to [`MOST`] regions.
    #[inline(always)]
    pub(super) fn from_chunk(chunk: Chunk<R>) -> Self {
        Self {
            regions: NonNull::from(&*chunk),
            owner: Owner::Chunk(chunk),
        }
    }

    fn from_chunks(chunks: Vec<Chunk<R>>) -> Self {
        let len = chunks.iter().map(|chunk| chunk.len()).sum();
        let mut regions = Vec::with_capacity(len);
        for chunk in &chunks {
            regions.extend(chunk.iter().map(uncounted));
        }
        let chunks = Arc::new(Chunks { chunks, regions });
        // `ManuallyDrop<Arc<R>>` has the layout of `Arc<R>`.
        let first = NonNull::from(&*chunks.regions).cast();
        Self {
            regions: NonNull::slice_from_raw_parts(first, chunks.regions.len()),
            owner: Owner::Chunks(chunks),
        }
    }

    /// Returns the list with `new` at the place `at`, or without the region there.
    #[inline(always)]
    pub(super) fn changed(&self, at: usize, new: Option<Arc<R>>) -> Self {
        let most = if new.is_some() { MOST - 1 } else { MOST + 1 };
        if self.len() <= most {
            Self::from_chunk(joined(self, at, new))
        } else {
            self.with_changed_chunk(at, new)
        }
    }

    /// Does what [`changed`](Self::changed) does, and shares the other chunks.
    fn with_changed_chunk(&self, at: usize, new: Option<Arc<R>>) -> Self {
        let mut chunks = match &self.owner {
            Owner::None => Vec::new(),
            Owner::Chunk(chunk) => vec![Arc::clone(chunk)],
            Owner::Chunks(owner) => owner.chunks.clone(),
        };
        // A new region may follow the last one of a chunk.
        let (removed, mut number, mut place) = (usize::from(new.is_none()), 0usize, at);
        while let Some(chunk) = chunks.get(number) {
            if place.saturating_add(removed) <= chunk.len() {
                let mut changed = Vec::with_capacity(MOST + 1);
                changed.extend_from_slice(chunk);
                match new {
                    Some(new) => changed.insert(place, new),
                    None => drop(changed.remove(place)),
                }
                chunks.splice(number..=number, cut(changed));
                break;
            }
            number = number.saturating_add(1);
            place = place.saturating_sub(chunk.len());
        }
        if chunks.len().saturating_mul(FEWEST) > self.len() {
            let regions = chunks.iter().flat_map(|chunk| chunk.iter().cloned());
            chunks = cut(regions.collect()).collect();
        }
        Self::from_chunks(chunks)
    }
}

/// Creates a chunk of the regions, with `new` at the place `at`, or without the region there.
///
/// Collecting an iterator would take longer: each step checks which part of it is next.
#[inline(always)]
pub(super) fn joined<R>(regions: &[Arc<R>], at: usize, new: Option<Arc<R>>) -> Chunk<R> {
    let (before, from) = regions.split_at_checked(at).unwrap_or((regions, &[]));
    let after = from.get(usize::from(new.is_none())..).unwrap_or_default();
    let ends = before.len().saturating_add(after.len());
    let chunk = Arc::new_uninit_slice(ends.saturating_add(usize::from(new.is_some())));
    // SAFETY: `chunk` was allocated above, and this is the only reference to its content. It is
    // last used before `chunk` is.
    let places: &mut [MaybeUninit<Arc<R>>] = unsafe { &mut *Arc::as_ptr(&chunk).cast_mut() };
    let mut places = places.iter_mut();
    for (region, place) in before.iter().zip(&mut places) {
        place.write(Arc::clone(region));
    }
    for (region, place) in new.into_iter().zip(&mut places) {
        place.write(region);
    }
    for (region, place) in after.iter().zip(&mut places) {
        place.write(Arc::clone(region));
    }
    // SAFETY: the number of places is the sum of the numbers of regions in the three loops. Each
    // iteration writes the next place, since `zip` takes a place only after it took a region.
    unsafe { chunk.assume_init() }
}

/// Copies the pointer to a region without counting it.
fn uncounted<R>(region: &Arc<R>) -> ManuallyDrop<Arc<R>> {
    // SAFETY: the pointer is that of an `Arc<R>`. The copy is never dropped, so it takes no count.
    // It is used only in `Chunks::regions`, while a chunk beside it counts the region
    // (`from_chunks`).
    ManuallyDrop::new(unsafe { Arc::from_raw(Arc::as_ptr(region)) })
}

/// Cuts regions into the fewest chunks, whose lengths differ by at most one.
fn cut<R>(regions: Vec<Arc<R>>) -> impl Iterator<Item = Chunk<R>> {
    let mut chunks = regions.len().div_ceil(MOST);
    let mut regions = regions.into_iter();
    iter::from_fn(move || {
        let len = regions.len().checked_div(chunks)?;
        chunks = chunks.saturating_sub(1);
        Some(regions.by_ref().take(len).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::slice;

    impl<R> RegionList<R> {
        /// Checks the lengths of the chunks, and that they own the regions.
        fn check(&self) {
            let chunks = match &self.owner {
                Owner::None => {
                    assert!(self.is_empty());
                    &[]
                }
                Owner::Chunk(chunk) => {
                    assert!(chunk.len() <= MOST, "a chunk of {}", chunk.len());
                    slice::from_ref(chunk)
                }
                Owner::Chunks(owner) => {
                    assert!(self.len() > MOST, "{} regions in chunks", self.len());
                    for chunk in &owner.chunks {
                        let len = chunk.len();
                        assert!((1..=MOST).contains(&len), "a chunk of {len}");
                    }
                    let fewest = FEWEST * owner.chunks.len();
                    assert!(fewest <= self.len() + 1, "{fewest} for {}", self.len());
                    &owner.chunks
                }
            };
            let owned = chunks.iter().flat_map(|chunk| chunk.iter());
            assert!(owned.map(Arc::as_ptr).eq(self.iter().map(Arc::as_ptr)));
        }
    }

    fn assert_lists(list: &RegionList<usize>, model: &[usize]) {
        list.check();
        assert!(list.iter().map(|region| **region).eq(model.iter().copied()));
    }

    #[test]
    fn new_with_any_number_of_regions_cuts_even_chunks() {
        for len in [0, 1, MOST, MOST + 1, 2 * MOST, 2 * MOST + 1, 31 * MOST + 1] {
            let regions: Vec<_> = (0..len).map(Arc::new).collect();
            assert_lists(&RegionList::new(regions), &(0..len).collect::<Vec<_>>());
        }
    }

    /// Grows lists and empties them: at random places, at the start, at the end.
    #[test]
    fn changed_anywhere_keeps_small_chunks() {
        let mut random = 1u64;
        let mut below = |bound: usize| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) as usize % bound
        };
        let mut place = |kind: usize, bound: usize| match kind {
            0 => below(bound),
            1 => 0,
            _ => bound - 1,
        };
        // Under Miri, one run with two chunks: more take minutes.
        let most = if cfg!(miri) { MOST + 3 } else { 150 };
        let runs = [(0, 0), (1, 2), (2, 1), (1, 1), (0, 2)];
        let count = if cfg!(miri) { 1 } else { runs.len() };
        for &(grow, shrink) in runs.iter().take(count) {
            let mut model = Vec::new();
            let mut list = RegionList::default();
            for step in 0..2 * most {
                let (old, old_model) = (list.clone(), model.clone());
                if step < most {
                    let at = place(grow, model.len() + 1);
                    model.insert(at, step);
                    list = list.changed(at, Some(Arc::new(step)));
                } else {
                    let at = place(shrink, model.len());
                    let removed = Arc::downgrade(&list[at]);
                    model.remove(at);
                    list = list.changed(at, None);
                    assert!(removed.upgrade().is_some(), "the old list has it");
                    assert_lists(&old, &old_model);
                    drop(old);
                    assert!(removed.upgrade().is_none(), "{step}: no list has it");
                }
                assert_lists(&list, &model);
            }
            assert!(list.is_empty());
        }
    }

    #[test]
    fn list_with_small_chunks_is_cut_again() {
        let most = if cfg!(miri) { 2 * MOST + 4 } else { 40 * MOST };
        let mut list = RegionList::new((0..most).map(Arc::new).collect());
        let mut model: Vec<_> = (0..most).collect();
        // Leaves the first region of each chunk.
        while let Some(at) = model.iter().position(|number| number % MOST != 0) {
            model.remove(at);
            list = list.changed(at, None);
            assert_lists(&list, &model);
        }
    }

    #[test]
    fn dropped_last_clone_drops_each_region_once() {
        for len in [3, 100] {
            let regions: Vec<_> = (0..len).map(Arc::new).collect();
            let list = RegionList::new(regions.clone());
            let clone = list.clone();
            let changed = list.changed(1, None);
            drop(list);
            let counts = || regions.iter().map(Arc::strong_count);
            assert!(counts().all(|count| count > 1));
            drop(clone);
            assert_eq!(counts().filter(|count| *count == 1).count(), 1);
            drop(changed);
            assert!(counts().all(|count| count == 1));
        }
    }
}
