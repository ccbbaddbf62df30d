//! Maps that are swapped, and the readers of those that were replaced.

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
    assert!(memory.writers.retired.len() <= 2);
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
            let region =
                Arc::new(GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None).unwrap());
            memory.update(|map| map.insert_region(region)).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
