//! Maps that are replaced, and their readers.

use super::*;
use crate::guest_memory::{GuestMemorySliceIterator, Result};
use crate::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, Permissions};

fn map(regions: u64) -> GuestMemoryMmap {
    let ranges: Vec<_> = (0..regions)
        .map(|i| (GuestAddress(i * 0x1000), 0x1000))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

#[test]
fn load_guard_after_replace_keeps_its_map() {
    let memory = GuestMemoryAtomic::new(map(1));
    let old = memory.memory();
    let copy = old.clone();
    memory.clone().lock().unwrap().replace(map(2));
    assert_eq!((old.num_regions(), copy.num_regions()), (1, 1));
    assert_eq!(memory.memory().num_regions(), 2);
    assert_eq!(old.into_inner().num_regions(), 1);
}

#[test]
fn load_guard_dropped_last_frees_replaced_map() {
    let first = Arc::new(map(1));
    let memory = GuestMemoryAtomic::from(Arc::clone(&first));
    let guard = memory.memory();
    memory.lock().unwrap().replace(map(2));
    assert!(Arc::strong_count(&first) >= 2);
    drop(guard);
    assert_eq!(Arc::strong_count(&first), 1);
}

#[test]
fn lock_after_panic_is_poisoned_and_usable() {
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

/// `Arc::get_mut` must fail while a reader remains. It fails afterwards as well, which differs from
/// 0.18.0: the list of retired maps has a weak pointer.
#[test]
fn arc_get_mut_of_retired_map_returns_none() {
    let mut kept = Arc::new(map(1));
    let memory = GuestMemoryAtomic::from(Arc::clone(&kept));
    let guard = memory.memory();
    memory.lock().unwrap().replace(map(2));
    assert!(Arc::get_mut(&mut kept).is_none());
    assert_eq!(guard.num_regions(), 1);
    drop(guard);
    assert!(Arc::get_mut(&mut kept).is_none());
    assert_eq!(Arc::try_unwrap(kept).unwrap().num_regions(), 1);
}

#[test]
fn retired_map_into_map_with_reader_left_returns_handle() {
    let memory = GuestMemoryAtomic::new(map(1));
    let mut reader = memory.memory().into_inner();
    let old = memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
    let old = old.into_map().unwrap_err();
    assert!(Arc::get_mut(&mut reader).is_none());
    assert_eq!((old.readers(), reader.num_regions()), (1, 1));
    drop(reader);
    assert_eq!(old.into_map().unwrap().num_regions(), 1);
}

#[test]
fn replace_by_several_writers_loses_no_region() {
    let memory = GuestMemoryAtomic::new(map(1));
    std::thread::scope(|scope| {
        for writer in 0..4u64 {
            let memory = memory.clone();
            scope.spawn(move || {
                for i in 0..8 {
                    let base = GuestAddress((1 + writer * 8 + i) * 0x1000);
                    let region = Arc::new(GuestRegionMmap::from_range(base, 0x1000, None).unwrap());
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
fn reader_sees_changes_and_counts_until_next_call() {
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
fn retired_map_counts_guards_of_all_threads() {
    let memory = GuestMemoryAtomic::new(map(1));
    // More guards than arc-swap has debt slots per thread, on two threads.
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

/// Returns a map with one more region.
fn with_page(map: &GuestMemoryMmap, at: u64) -> GuestMemoryMmap {
    let page = GuestRegionMmap::from_range(GuestAddress(at), 0x1000, None).unwrap();
    map.insert_region(Arc::new(page)).unwrap()
}

/// The guard's map has the region that the last update removes.
#[test]
fn retired_map_counts_readers_of_earlier_maps() {
    let now = std::time::Instant::now();
    for by_replace in [false, true] {
        let memory = GuestMemoryAtomic::new(map(2));
        let device = memory.memory();
        let mut reader = memory.reader();
        assert_eq!(reader.memory().num_regions(), 2);
        if by_replace {
            let lock = memory.lock().unwrap();
            lock.replace(with_page(&memory.memory(), 0x8000));
        } else {
            drop(
                memory
                    .update(|map| Ok::<_, ()>(with_page(map, 0x8000)))
                    .unwrap(),
            )
        }
        let old = memory
            .clone()
            .update(|map| {
                map.remove_region(GuestAddress(0x1000), 0x1000)
                    .map(|(map, _)| map)
            })
            .unwrap();
        assert_eq!(
            old.wait(now),
            Err(ReadersRemain { readers: 2 }),
            "by replace: {by_replace}"
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

#[test]
fn retired_map_is_not_a_reader() {
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

#[test]
fn update_forgets_maps_without_readers() {
    let memory = GuestMemoryAtomic::new(map(1));
    let guard = memory.memory();
    for change in 0..100 {
        match change % 2 {
            0 => drop(memory.update(|_| Ok::<_, ()>(map(1))).unwrap()),
            _ => memory.lock().unwrap().replace(map(1)),
        }
    }
    assert!(memory.writers.retired.len() <= 2);
    let old = memory.update(|_| Ok::<_, ()>(map(1))).unwrap();
    assert_eq!(old.readers(), 1);
    drop(guard);
    assert_eq!(old.readers(), 0);
}

#[test]
fn retired_map_into_map_ends_upgrades_of_weak_pointers() {
    let memory = GuestMemoryAtomic::new(map(1));
    let weak = Arc::downgrade(&memory.memory().into_inner());
    let old = memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
    // Not a reader before it is upgraded. The handle keeps its map.
    assert!(old.is_done());
    let reader = weak.upgrade().unwrap();
    let old = old.into_map().unwrap_err();
    assert_eq!(reader.num_regions(), 1);
    drop(reader);
    let map = old.into_map().unwrap();
    assert!(weak.upgrade().is_none());
    assert_eq!(map.num_regions(), 1);

    // Without a handle, the last reader frees the map.
    let weak = Arc::downgrade(&memory.memory().into_inner());
    drop(memory.update(|_| Ok::<_, ()>(self::map(3))).unwrap());
    assert!(weak.upgrade().is_none());
}

#[test]
fn retired_map_wait_with_own_guard_returns_error() {
    let memory = GuestMemoryAtomic::new(map(1));
    let mine = memory.memory();
    let old = memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
    let now = std::time::Instant::now();
    assert_eq!(old.wait(now), Err(ReadersRemain { readers: 1 }));
    let old = old.into_map().unwrap_err();
    drop(mine);
    old.wait(now).unwrap();
}

#[test]
fn update_that_fails_or_panics_keeps_map() {
    let memory = GuestMemoryAtomic::new(map(1));
    let failed = memory.update(|_| Err::<GuestMemoryMmap, _>(7));
    assert!(matches!(failed, Err(UpdateError::Change(7))));
    let other = memory.clone();
    std::thread::spawn(move || {
        other.update(|_| -> std::result::Result<GuestMemoryMmap, ()> {
            panic!("expected by the test")
        })
    })
    .join()
    .unwrap_err();
    assert_eq!(memory.memory().num_regions(), 1);
    memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
    assert_eq!(memory.memory().num_regions(), 2);
}

#[test]
fn lock_after_panic_in_update_is_not_poisoned() {
    let memory = GuestMemoryAtomic::new(map(1));
    for _ in 0..2 {
        let change =
            || memory.update(|_| -> std::result::Result<_, ()> { panic!("expected by the test") });
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change)).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"expected by the test"));
        let lock = memory.lock().unwrap();
        lock.replace(map(2));
    }
    assert_eq!(memory.memory().num_regions(), 2);
}

/// A writer that panicked while it held the guard poisons the lock, and a later panic in `update`
/// does not change that.
#[test]
fn update_after_panic_under_lock_works_and_keeps_lock_poisoned() {
    let memory = GuestMemoryAtomic::new(map(1));
    let under_lock = || {
        let _guard = memory.lock();
        panic!("expected by the test");
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(under_lock)).unwrap_err();
    let old = memory.update(|_| Ok::<_, ()>(map(2))).unwrap();
    assert_eq!((old.readers(), memory.memory().num_regions()), (0, 2));
    assert!(memory.lock().is_err());
}

/// The map of a region type whose `Drop` panics.
#[test]
fn replace_with_panic_in_drop_of_map_leaves_lock_usable() {
    struct PanicsWhenDropped(Arc<GuestMemoryMmap>);
    impl Drop for PanicsWhenDropped {
        fn drop(&mut self) {
            if self.0.num_regions() == 1 {
                panic!("expected by the test");
            }
        }
    }
    impl GuestMemory for PanicsWhenDropped {
        type PhysicalMemory = GuestMemoryMmap;
        type Bitmap = ();
        fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
            GuestMemory::check_range(&*self.0, addr, count, access)
        }
        fn get_slices<'a>(
            &'a self,
            addr: GuestAddress,
            count: usize,
            access: Permissions,
        ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
            GuestMemory::get_slices(&*self.0, addr, count, access)
        }
    }
    let memory = GuestMemoryAtomic::new(PanicsWhenDropped(Arc::new(map(1))));
    let replace = || {
        let lock = memory.lock().unwrap();
        lock.replace(PanicsWhenDropped(Arc::new(map(2))));
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(replace)).unwrap_err();
    assert_eq!(memory.memory().0.num_regions(), 2);
    memory
        .lock()
        .unwrap()
        .replace(PanicsWhenDropped(Arc::new(map(3))));
}

#[test]
fn retired_map_without_readers_can_be_unmapped() {
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
                    if cached {
                        read(reader.memory())
                    } else {
                        read(&memory.memory())
                    };
                }
            });
        }
        let _stop = test_support::SetOnDrop(&stop);
        for _ in 0..if cfg!(miri) { 3 } else { 200 } {
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
            let region =
                Arc::new(GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None).unwrap());
            memory.update(|map| map.insert_region(region)).unwrap();
        }
    });
}
