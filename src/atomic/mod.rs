//! Memory maps that are swapped while devices use them.
//!
//! ```text
//!   GuestMemoryAtomic ──► map A (Arc)  ◄── guard of a device that is in the middle of something
//!          │
//!          └─ lock().replace(map B):  from now on memory() gives map B;
//!                                     map A goes when its last guard does
//! ```
//!
//! [`GuestMemoryAtomic::update`] does that with one call, and returns map A with a way to learn when that is; a thread that looks often has a
//! [`GuestMemoryReader`].
//!
//! A map does not change; hotplug makes another one, which shares the regions that stay. Readers take the map of the moment without waiting for
//! anybody. Writers wait for each other.

mod reader;
mod replaced;

use core::ops::Deref;
use std::sync::{Arc, LockResult, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::{ArcSwap, Guard};

use crate::guest_memory::{GuestAddressSpace, GuestMemory};

use replaced::Earlier;

pub use reader::GuestMemoryReader;
pub use replaced::{ReplacedMap, StillRead};

/// A memory map that can be replaced while it is used.
///
/// Clones are handles to the same map: what one replaces, all see.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
/// use vm_memory::{GuestMemoryMmap, GuestRegionMmap};
///
/// let map: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let memory = GuestMemoryAtomic::new(map);
/// let device = memory.clone();
/// let before = device.memory();
///
/// let lock = memory.lock().unwrap();
/// let more = GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None)?;
/// lock.replace(memory.memory().insert_region(Arc::new(more))?);
///
/// assert_eq!(before.num_regions(), 1);
/// assert_eq!(device.memory().num_regions(), 2);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestMemoryAtomic<M: GuestMemory> {
    map: Arc<ArcSwap<M>>,
    /// Held from looking at the map that is to be replaced until the new one is in. In it are the maps that were replaced, as far as somebody still
    /// had them at the last change: a region that is taken away from one map may be in use by way of any earlier one.
    writers: Arc<Mutex<Earlier<M>>>,
}

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Begins with `map`.
    pub fn new(map: M) -> Self {
        Arc::new(map).into()
    }

    /// Keeps other writers out, so that a new map can be made of the present one and put in its place. Readers go on.
    ///
    /// A thread that has one of these guards and calls `lock` or [`update`](Self::update) of the same memory waits for itself, for ever.
    ///
    /// # Errors
    ///
    /// If a writer panicked in here before. The guard is in the error, and works.
    pub fn lock(&self) -> LockResult<GuestMemoryExclusiveGuard<'_, M>> {
        match self.writers.lock() {
            Ok(guard) => Ok(GuestMemoryExclusiveGuard {
                parent: self,
                earlier: guard,
            }),
            Err(poisoned) => Err(PoisonError::new(GuestMemoryExclusiveGuard {
                parent: self,
                earlier: poisoned.into_inner(),
            })),
        }
    }
}

/// Begins with a map that others share.
impl<M: GuestMemory> From<Arc<M>> for GuestMemoryAtomic<M> {
    fn from(map: Arc<M>) -> Self {
        GuestMemoryAtomic {
            map: Arc::new(ArcSwap::new(map)),
            writers: Arc::default(),
        }
    }
}

/// Another handle to the same map.
impl<M: GuestMemory> Clone for GuestMemoryAtomic<M> {
    fn clone(&self) -> Self {
        Self {
            map: Arc::clone(&self.map),
            writers: Arc::clone(&self.writers),
        }
    }
}

impl<M: GuestMemory> GuestAddressSpace for GuestMemoryAtomic<M> {
    type M = M;
    type T = GuestMemoryLoadGuard<M>;

    #[inline]
    fn memory(&self) -> Self::T {
        GuestMemoryLoadGuard {
            guard: self.map.load(),
        }
    }
}

/// The map of one moment. It stays as it is, and stays mapped, as long as this is kept.
#[derive(Debug)]
pub struct GuestMemoryLoadGuard<M: GuestMemory> {
    guard: Guard<Arc<M>>,
}

impl<M: GuestMemory> GuestMemoryLoadGuard<M> {
    /// Returns the map as a counted pointer, which is the better one to keep for long.
    pub fn into_inner(self) -> Arc<M> {
        Guard::into_inner(self.guard)
    }
}

/// The same map once more.
impl<M: GuestMemory> Clone for GuestMemoryLoadGuard<M> {
    fn clone(&self) -> Self {
        GuestMemoryLoadGuard {
            guard: Guard::from_inner(Arc::clone(&*self.guard)),
        }
    }
}

impl<M: GuestMemory> Deref for GuestMemoryLoadGuard<M> {
    type Target = M;

    #[inline]
    fn deref(&self) -> &M {
        &self.guard
    }
}

/// The right to replace the map. Other writers wait until it is gone.
#[derive(Debug)]
pub struct GuestMemoryExclusiveGuard<'a, M: GuestMemory> {
    parent: &'a GuestMemoryAtomic<M>,
    earlier: MutexGuard<'a, Earlier<M>>,
}

impl<M: GuestMemory> GuestMemoryExclusiveGuard<'_, M> {
    /// Replaces the map, and lets other writers in.
    ///
    /// Whoever looks from now on sees `map`. The old one goes when its last guard does.
    pub fn replace(mut self, map: M) {
        let old = self.parent.map.swap(Arc::new(map));
        self.earlier.remember(&old, Weak::new());
    }
}

#[cfg(all(test, feature = "backend-mmap"))]
mod tests {
    use super::*;
    use crate::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

    fn map(regions: u64) -> GuestMemoryMmap {
        let ranges: Vec<_> = (0..regions)
            .map(|i| (GuestAddress(i * 0x1000), 0x1000))
            .collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn a_guard_keeps_the_map_it_was_given() {
        let memory = GuestMemoryAtomic::new(map(1));
        let old = memory.memory();
        let copy = old.clone();
        memory.clone().lock().unwrap().replace(map(2));
        assert_eq!((old.num_regions(), copy.num_regions()), (1, 1));
        assert_eq!(memory.memory().num_regions(), 2);
        assert_eq!(old.into_inner().num_regions(), 1);
    }

    #[test]
    fn the_old_map_goes_with_its_last_guard() {
        let first = Arc::new(map(1));
        let memory = GuestMemoryAtomic::from(Arc::clone(&first));
        let guard = memory.memory();
        memory.lock().unwrap().replace(map(2));
        assert!(Arc::strong_count(&first) >= 2);
        drop(guard);
        assert_eq!(Arc::strong_count(&first), 1);
    }

    #[test]
    fn a_writer_that_panicked_poisons_the_lock_and_not_the_map() {
        let memory = GuestMemoryAtomic::new(map(1));
        let other = memory.clone();
        std::thread::spawn(move || {
            let _guard = other.lock().unwrap();
            panic!("expected by the test");
        })
        .join()
        .unwrap_err();
        assert_eq!(memory.memory().num_regions(), 1);
        memory.lock().unwrap_err().into_inner().replace(map(3));
        assert_eq!(memory.memory().num_regions(), 3);
    }

    /// Writers that each add a region do not lose one another's.
    #[test]
    fn writers_take_turns_and_readers_go_on() {
        let memory = GuestMemoryAtomic::new(map(1));
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let memory = memory.clone();
                scope.spawn(move || {
                    for i in 0..8 {
                        let base = GuestAddress((1 + writer * 8 + i) * 0x1000);
                        let region =
                            Arc::new(GuestRegionMmap::from_range(base, 0x1000, None).unwrap());
                        let lock = memory.lock().unwrap();
                        lock.replace(memory.memory().insert_region(region).unwrap());
                    }
                });
            }
            scope.spawn(|| {
                let mut seen = 0;
                while seen < 33 {
                    let now = memory.memory().num_regions();
                    assert!(now >= seen);
                    seen = now;
                }
            });
        });
    }

    #[test]
    fn a_reader_sees_every_change_and_pins_what_it_saw() {
        let memory = GuestMemoryAtomic::new(map(1));
        let mut reader = memory.reader();
        assert_eq!(reader.memory().num_regions(), 1);
        let old = memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
        assert_eq!(old.readers(), 1);
        assert_eq!(reader.memory().num_regions(), 2);
        assert_eq!(old.readers(), 0);

        let mut copy = reader.clone();
        assert_eq!(copy.memory().num_regions(), 2);
        let old = memory.update(|_| Ok::<_, ()>(map(3))).unwrap();
        assert_eq!(old.readers(), 2);
        reader.release();
        assert_eq!(old.readers(), 1);
        assert_eq!((copy.memory().num_regions(), old.readers()), (3, 0));
        assert_eq!(reader.memory().num_regions(), 3);
    }

    #[test]
    fn a_replaced_map_counts_its_readers_and_is_given_back() {
        let memory = GuestMemoryAtomic::new(map(1));
        // More guards than arc-swap has places for, and on two threads.
        let mut guards: Vec<_> = (0..20).map(|_| memory.memory()).collect();
        let other = memory.clone();
        guards.extend(
            std::thread::spawn(move || (0..20).map(|_| other.memory()).collect::<Vec<_>>())
                .join()
                .unwrap(),
        );
        let old = memory
            .update(|map| {
                map.insert_region(Arc::new(
                    GuestRegionMmap::from_range(GuestAddress(0x9000), 0x1000, None).unwrap(),
                ))
            })
            .unwrap();
        let later = memory.memory();
        assert_eq!((old.map().num_regions(), later.num_regions()), (1, 2));
        for left in (0..40).rev() {
            assert_eq!(old.readers(), left + 1);
            guards.pop();
        }
        old.wait(std::time::Instant::now()).unwrap();
        assert_eq!(old.into_map().unwrap().num_regions(), 1);
    }

    /// Adds a region of a page.
    fn with_page(map: &GuestMemoryMmap, at: u64) -> GuestMemoryMmap {
        let page = GuestRegionMmap::from_range(GuestAddress(at), 0x1000, None).unwrap();
        map.insert_region(Arc::new(page)).unwrap()
    }

    /// A guard is of the map before last, which has the region that the last change took away: the region is in use.
    #[test]
    fn a_wait_is_for_readers_of_all_earlier_maps() {
        let now = std::time::Instant::now();
        for legacy in [false, true] {
            let memory = GuestMemoryAtomic::new(map(2));
            let device = memory.memory();
            let mut reader = memory.reader();
            assert_eq!(reader.memory().num_regions(), 2);
            match legacy {
                true => {
                    let lock = memory.lock().unwrap();
                    lock.replace(with_page(&memory.memory(), 0x8000));
                }
                false => drop(
                    memory
                        .update(|map| Ok::<_, ()>(with_page(map, 0x8000)))
                        .unwrap(),
                ),
            }
            // By another handle to the same memory.
            let old = memory
                .clone()
                .update(|map| {
                    map.remove_region(GuestAddress(0x1000), 0x1000)
                        .map(|(map, _)| map)
                })
                .unwrap();
            assert_eq!(
                old.wait(now),
                Err(StillRead { readers: 2 }),
                "legacy: {legacy}"
            );
            let old = old.into_map().unwrap_err();
            let copy = device.clone();
            drop(device);
            assert_eq!(old.readers(), 2);
            assert_eq!(reader.memory().num_regions(), 2);
            assert_eq!(old.readers(), 1);
            drop(copy);
            old.wait(now).unwrap();
            assert_eq!(old.into_map().unwrap().num_regions(), 3);
        }
    }

    /// Whoever keeps handles to look at them from time to time does not keep them from each other.
    #[test]
    fn a_handle_is_no_reader() {
        let memory = GuestMemoryAtomic::new(map(1));
        let guard = memory.memory();
        let first = memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
        let second = memory.update(|_| Ok::<_, ()>(map(3))).unwrap();
        assert_eq!((first.readers(), second.readers()), (1, 1));
        drop(guard);
        assert_eq!((first.readers(), second.readers()), (0, 0));
        drop(first.into_map().unwrap());
        assert_eq!(second.readers(), 0);
    }

    /// What nobody reads any more is not remembered, however many changes there are.
    #[test]
    fn maps_that_are_gone_are_forgotten() {
        let memory = GuestMemoryAtomic::new(map(1));
        let guard = memory.memory();
        for change in 0..100 {
            match change % 2 {
                0 => drop(memory.update(|_| Ok::<_, ()>(map(1))).unwrap()),
                _ => memory.lock().unwrap().replace(map(1)),
            }
        }
        assert!(memory.writers.lock().unwrap().count() <= 2);
        let old = memory.update(|_| Ok::<_, ()>(map(1))).unwrap();
        assert_eq!(old.readers(), 1);
        drop(guard);
        assert_eq!(old.readers(), 0);
    }

    #[test]
    fn waiting_with_a_guard_in_hand_is_an_error() {
        let memory = GuestMemoryAtomic::new(map(1));
        let mine = memory.memory();
        let old = memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
        let started = std::time::Instant::now();
        let wait = std::time::Duration::from_millis(20);
        assert_eq!(old.wait(started + wait), Err(StillRead { readers: 1 }));
        assert!(started.elapsed() >= wait);
        let old = old.into_map().unwrap_err();
        drop(mine);
        old.wait(started).unwrap();
    }

    #[test]
    fn a_change_that_fails_or_panics_changes_nothing() {
        let memory = GuestMemoryAtomic::new(map(1));
        assert_eq!(
            memory.update(|_| Err::<GuestMemoryMmap, _>(7)).unwrap_err(),
            7
        );
        let other = memory.clone();
        std::thread::spawn(move || {
            other.update(|_| -> Result<GuestMemoryMmap, ()> { panic!("expected by the test") })
        })
        .join()
        .unwrap_err();
        assert_eq!(memory.memory().num_regions(), 1);
        memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
        assert_eq!(memory.memory().num_regions(), 2);
    }

    /// A region is unmapped when its map has no readers, and not before: readers on other threads never meet a page that is gone.
    #[test]
    fn nobody_reads_what_was_given_back() {
        let memory = GuestMemoryAtomic::new(map(2));
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for cached in [false, true] {
                let (memory, stop) = (memory.clone(), &stop);
                scope.spawn(move || {
                    let mut reader = memory.reader();
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let read = |map: &GuestMemoryMmap| {
                            map.iter()
                                .map(|region| {
                                    let value: u8 = crate::Bytes::read_obj(
                                        map,
                                        crate::GuestMemoryRegion::start_addr(region),
                                    )
                                    .unwrap();
                                    u64::from(value)
                                })
                                .sum::<u64>()
                        };
                        match cached {
                            true => read(reader.memory()),
                            false => read(&memory.memory()),
                        };
                    }
                });
            }
            for _ in 0..200 {
                let mut gone = None;
                let old = memory
                    .update(|map| {
                        map.remove_region(GuestAddress(0x1000), 0x1000)
                            .map(|(map, region)| {
                                gone = Some(region);
                                map
                            })
                    })
                    .unwrap();
                old.wait(std::time::Instant::now() + std::time::Duration::from_secs(20))
                    .unwrap();
                drop(old.into_map().unwrap());
                assert_eq!(Arc::strong_count(gone.as_ref().unwrap()), 1);
                drop(gone);
                let region = Arc::new(
                    GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None).unwrap(),
                );
                memory.update(|map| map.insert_region(region)).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
