//! The calls of listeners of a memory, and their failures.
#![cfg(all(feature = "backend-mmap", feature = "backend-atomic"))]

use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::atomic::{ListenerId, UpdateError};
use vm_memory::listeners::{
    BoxError, ChangeKind, ListenerError, MemoryChange, MemoryListener, NotAsBefore, RegionNotifier,
};
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

const PAGE: u64 = 0x1000;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Call = Box<dyn FnMut() -> Result<(), BoxError> + Send>;

/// The calls of several listeners, in order.
type Log = Arc<Mutex<Vec<String>>>;

/// Writes to a log, and then calls a function.
struct Listener {
    name: &'static str,
    log: Log,
    call: Call,
}

impl Listener {
    fn boxed(name: &'static str, log: &Log, call: Call) -> Box<Self> {
        let log = Arc::clone(log);
        Box::new(Self { name, log, call })
    }

    fn log(&self, text: String) {
        self.log
            .lock()
            .unwrap()
            .push(format!("{} {text}", self.name));
    }
}

impl MemoryListener<GuestRegionMmap> for Listener {
    fn name(&self) -> &str {
        self.name
    }

    fn change(&mut self, change: &MemoryChange<'_, GuestRegionMmap>) -> Result<(), BoxError> {
        self.log(format!("{} {:#x}", change.kind(), change.start().0));
        (self.call)()
    }

    fn commit(&mut self) -> Result<(), BoxError> {
        self.log("commit".to_owned());
        Ok(())
    }
}

/// Adds a listener that the memory accepts.
fn listen(memory: &Memory, name: &'static str, log: &Log, call: Call) -> ListenerId {
    let listener = Listener::boxed(name, log, call);
    memory.add_listener(listener).unwrap()
}

fn accepts() -> Call {
    Box::new(|| Ok(()))
}

/// Fails in the call of that number, counted from 0, and in all calls of number `until` or higher.
fn fails_in(number: usize, until: usize) -> Call {
    let mut calls = 0;
    Box::new(move || {
        calls += 1;
        match calls - 1 {
            call if call == number || call >= until => Err("no room".into()),
            _ => Ok(()),
        }
    })
}

fn region(start: u64) -> Arc<GuestRegionMmap> {
    Arc::new(GuestRegionMmap::from_range(GuestAddress(start), 0x1000, None).unwrap())
}

fn memory() -> Memory {
    GuestMemoryAtomic::new(GuestMemoryMmap::from_arc_regions(vec![region(0)]).unwrap())
}

fn take(log: &Log) -> Vec<String> {
    std::mem::take(&mut log.lock().unwrap())
}

/// Replaces the region at 0 by one at `start`, in one change.
fn move_region(memory: &Memory, start: u64) -> Result<(), UpdateError<Infallible>> {
    let map = GuestMemoryMmap::from_arc_regions(vec![region(start)]).unwrap();
    memory.update(|_| Ok(map)).map(drop)
}

#[test]
fn update_tells_removals_in_reverse_order_and_additions_in_order() {
    let (memory, log) = (memory(), Log::default());
    for name in ["a", "b"] {
        listen(&memory, name, &log, accepts());
    }
    let present = [
        "a add 0x0",
        "a plug 0x0",
        "a commit",
        "b add 0x0",
        "b plug 0x0",
        "b commit",
    ];
    assert_eq!(take(&log), present);
    move_region(&memory, PAGE).unwrap();
    assert_eq!(
        take(&log),
        [
            "b unplug 0x0",
            "a unplug 0x0",
            "b remove 0x0",
            "a remove 0x0",
            "a add 0x1000",
            "b add 0x1000",
            "a plug 0x1000",
            "b plug 0x1000",
            "a commit",
            "b commit",
        ]
    );
    // The same regions: nothing to tell.
    memory.update(|map| Ok::<_, ()>(map.clone())).unwrap();
    assert_eq!(take(&log), [""; 0]);
}

#[test]
fn update_that_a_listener_refuses_is_undone_in_reverse_order() {
    let (memory, log) = (memory(), Log::default());
    listen(&memory, "a", &log, accepts());
    // Two calls for the present map, then `unplug`, `remove` and `add`.
    listen(&memory, "b", &log, fails_in(4, 100));
    take(&log);
    let before = memory.memory().into_inner();
    let error = move_region(&memory, PAGE).unwrap_err();
    let UpdateError::Listener(ListenerError::Refused {
        listener,
        kind,
        start,
        len,
        ..
    }) = error
    else {
        panic!("{error:?}");
    };
    assert_eq!((listener.as_str(), kind), ("b", ChangeKind::Added));
    assert_eq!((start, len), (GuestAddress(PAGE), PAGE));
    assert!(Arc::ptr_eq(&memory.memory().into_inner(), &before));
    assert_eq!(
        take(&log),
        [
            "b unplug 0x0",
            "a unplug 0x0",
            "b remove 0x0",
            "a remove 0x0",
            "a add 0x1000",
            "b add 0x1000",
            "a remove 0x1000",
            "a add 0x0",
            "b add 0x0",
            "a plug 0x0",
            "b plug 0x0",
            "a commit",
            "b commit",
        ]
    );
    assert_eq!(memory.detached_listeners().unwrap(), []);
}

#[test]
fn listener_that_panics_has_refused_the_change() {
    let (memory, log) = (memory(), Log::default());
    let call: Call = Box::new(|| std::panic::resume_unwind(Box::new("expected by the test")));
    let error = memory
        .add_listener(Listener::boxed("a", &log, call))
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "panicked: expected by the test");
    // It was not added.
    take(&log);
    move_region(&memory, PAGE).unwrap();
    assert_eq!(take(&log), [""; 0]);
}

#[test]
fn listener_that_fails_to_undo_is_detached_and_keeps_both_maps() {
    let (memory, log) = (memory(), Log::default());
    let id = listen(&memory, "a", &log, fails_in(6, 6));
    listen(&memory, "b", &log, fails_in(4, 5));
    let (kept, new) = (Arc::downgrade(&memory.memory().into_inner()), region(PAGE));
    let weak_new = Arc::downgrade(&new);
    let map = GuestMemoryMmap::from_arc_regions(vec![new]).unwrap();
    let error = memory.update(|_| Ok::<_, Infallible>(map)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("listener b refused") && text.contains("detached: "),
        "{text}"
    );
    let detached = memory.detached_listeners().unwrap();
    assert!(detached
        .iter()
        .any(|listener| listener.id == id && listener.error == "no room"));

    // Later changes are not announced to it, and do not free what it may use.
    take(&log);
    move_region(&memory, 2 * PAGE).unwrap();
    assert!(take(&log).iter().all(|entry| !entry.starts_with("a ")));
    assert!(kept.upgrade().is_some() && weak_new.upgrade().is_some());
    for listener in detached {
        memory.remove_listener(listener.id).unwrap();
    }
    assert!(kept.upgrade().is_none() && weak_new.upgrade().is_none());
    assert_eq!(
        memory.remove_listener(id).err().unwrap().to_string(),
        UNKNOWN
    );
}

const UNKNOWN: &str = "the memory has no listener of this number";

#[test]
fn replace_with_listener_that_fails_publishes_map_and_detaches_it() {
    let (memory, log) = (memory(), Log::default());
    let id = listen(&memory, "a", &log, fails_in(2, 3));
    let old = Arc::downgrade(&memory.memory().into_inner());
    let map = GuestMemoryMmap::from_arc_regions(vec![region(PAGE)]).unwrap();
    memory.lock().unwrap().replace(map);
    assert!(memory.memory().find_region(GuestAddress(PAGE)).is_some());
    assert_eq!(memory.detached_listeners().unwrap()[0].id, id);
    assert!(old.upgrade().is_some());
    memory.remove_listener(id).unwrap();
    assert!(old.upgrade().is_none());
}

#[test]
fn listener_that_changes_a_memory_gets_an_error() {
    let (first, other, log) = (memory(), memory(), Log::default());
    let notifier = Arc::new(RegionNotifier::new());
    let (same, results) = (first.clone(), Arc::new(Mutex::new(Vec::new())));
    let added = {
        let results = Arc::clone(&results);
        let nothing = Log::default();
        Box::new(move || {
            let mut results = results.lock().unwrap();
            for memory in [&same, &other] {
                results.push(move_region(memory, PAGE).unwrap_err().to_string());
                let listener = Listener::boxed("b", &nothing, accepts());
                results.push(memory.add_listener(listener).unwrap_err().to_string());
                results.push(memory.detached_listeners().unwrap_err().to_string());
            }
            results.push(notifier.begin().unwrap_err().to_string());
            Ok(())
        })
    };
    let id = listen(&first, "a", &log, added);
    let in_listener = ListenerError::InListener.to_string();
    let results = std::mem::take(&mut *results.lock().unwrap());
    assert_eq!(results, vec![in_listener.as_str(); 14]);
    // Afterwards, the same calls succeed.
    first.remove_listener(id).unwrap();
    move_region(&first, PAGE).unwrap();
}

#[test]
fn lock_by_listener_panics_and_is_a_refusal() {
    let (memory, log) = (memory(), Log::default());
    let same = memory.clone();
    let call: Call = Box::new(move || {
        drop(same.lock());
        Ok(())
    });
    let error = memory
        .add_listener(Listener::boxed("a", &log, call))
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("cannot change guest memory"), "{source}");
    assert!(memory.lock().is_ok());
}

#[test]
fn listener_reads_the_old_map_while_it_is_told_of_a_new_one() {
    let (memory, log) = (memory(), Log::default());
    let same = memory.clone();
    let call: Call = Box::new(move || {
        assert_eq!(same.memory().num_regions(), 1);
        Ok(())
    });
    listen(&memory, "a", &log, call);
    memory
        .update(|map| map.insert_region(region(PAGE)))
        .unwrap();
    assert_eq!(memory.memory().num_regions(), 2);
}

#[test]
fn dropped_memory_tells_listeners_that_all_regions_go() {
    let (memory, log) = (memory(), Log::default());
    listen(&memory, "a", &log, accepts());
    let other = memory.clone();
    drop(memory);
    take(&log);
    drop(other);
    assert_eq!(take(&log), ["a unplug 0x0", "a remove 0x0", "a commit"]);
}

#[test]
fn dropped_memory_whose_listener_fails_stays_mapped() {
    let (memory, log) = (memory(), Log::default());
    listen(&memory, "a", &log, fails_in(2, 3));
    let map = Arc::downgrade(&memory.memory().into_inner());
    drop(memory);
    assert!(map.upgrade().is_some());
}

#[test]
fn memory_that_a_listener_drops_stays_mapped() {
    let (memory, other, log) = (memory(), memory(), Log::default());
    listen(&other, "b", &log, accepts());
    let map = Arc::downgrade(&other.memory().into_inner());
    take(&log);
    let mut other = Some(other);
    let same = memory.clone();
    let call: Call = Box::new(move || {
        drop(other.take());
        // The thread is still marked.
        assert!(same.detached_listeners().is_err());
        Ok(())
    });
    let nothing = Log::default();
    listen(&memory, "a", &nothing, call);
    assert_eq!(take(&log), [""; 0]);
    assert!(map.upgrade().is_some());
}

#[test]
fn listener_that_drops_its_own_memory_does_not_wait_for_itself() {
    let notifier = Arc::new(RegionNotifier::new());
    let (memory, log) = (memory(), Log::default());
    memory
        .update(|map| map.insert_region(region_with_blocks(&notifier, &[1])))
        .unwrap();
    let handle = Arc::new(Mutex::new(None));
    let own = Arc::clone(&handle);
    let call: Call = Box::new(move || {
        drop(own.lock().unwrap().take());
        Ok(())
    });
    listen(&memory, "a", &log, call);
    let map = Arc::downgrade(&memory.memory().into_inner());
    *handle.lock().unwrap() = Some(memory);
    let mut changes = notifier.begin().unwrap();
    let run = [(PAGE, PAGE)];
    changes.announce(ChangeKind::Discarded, &run).unwrap();
    assert!(map.upgrade().is_some());
}

#[test]
fn listener_that_owns_another_memory_is_dropped_without_locks() {
    let notifier = Arc::new(RegionNotifier::new());
    let blocks = region_with_blocks(&notifier, &[1]);
    let (first, second, log) = (memory(), memory(), Log::default());
    for memory in [&first, &second] {
        memory
            .update(|map| map.insert_region(Arc::clone(&blocks)))
            .unwrap();
    }
    listen(&second, "b", &log, accepts());
    // Refused: it is dropped at once. Its clone is dropped with the memory.
    for (number, until) in [(0, 1), (100, 100)] {
        let (mut calls, owned) = (fails_in(number, until), second.clone());
        let call: Call = Box::new(move || {
            let _ = &owned;
            calls()
        });
        let _ = first.add_listener(Listener::boxed("a", &Log::default(), call));
    }
    take(&log);
    drop(second);
    assert_eq!(take(&log), [""; 0]);
    drop(first);
    assert_eq!(take(&log).last().unwrap(), "b commit");
}

#[test]
fn listener_that_is_not_as_before_is_detached() {
    let (memory, log) = (memory(), Log::default());
    let mut calls = 0;
    let call: Call = Box::new(move || {
        calls += 1;
        if calls == 3 {
            return Err(NotAsBefore::new("half done").into());
        }
        Ok(())
    });
    let id = listen(&memory, "a", &log, call);
    let new = region(PAGE);
    let kept = Arc::downgrade(&new);
    let map = GuestMemoryMmap::from_arc_regions(vec![new]).unwrap();
    memory.update(|_| Ok::<_, ()>(map)).unwrap_err();
    assert_eq!(memory.detached_listeners().unwrap()[0].id, id);
    // It may use the region that did not join.
    assert!(kept.upgrade().is_some());
    memory.remove_listener(id).unwrap();
    assert!(kept.upgrade().is_none());
}

#[test]
fn second_announcement_after_a_discard_is_an_error() {
    let notifier = RegionNotifier::new();
    let mut changes = notifier.begin().unwrap();
    changes
        .announce(ChangeKind::Discarded, &[(0, PAGE)])
        .unwrap();
    let again = changes.announce(ChangeKind::Unplugged, &[(PAGE, PAGE)]);
    assert!(matches!(again, Err(ListenerError::AlreadyAnnounced)));
}

/// Panics instead of returning its name.
struct Nameless;

impl MemoryListener<GuestRegionMmap> for Nameless {
    fn name(&self) -> &str {
        std::panic::resume_unwind(Box::new("expected by the test"))
    }

    fn change(&mut self, _: &MemoryChange<'_, GuestRegionMmap>) -> Result<(), BoxError> {
        Ok(())
    }
}

#[test]
fn listener_whose_name_panics_is_not_added() {
    let memory = memory();
    memory.add_listener(Box::new(Nameless)).unwrap_err();
    assert!(memory.lock().is_ok());
}

/// A region with blocks, of which those in `plugged` are plugged.
fn region_with_blocks(notifier: &Arc<RegionNotifier>, plugged: &[usize]) -> Arc<GuestRegionMmap> {
    let blocks = Arc::new(PluggedBlocks::new(0x4000, NonZeroUsize::new(0x1000).unwrap()).unwrap());
    for block in plugged {
        blocks.plug(block * 0x1000, 0x1000).unwrap();
    }
    let builder = MmapRegionBuilder::<()>::new(0x4000)
        .with_plugged_blocks(blocks)
        .with_notifier(Arc::clone(notifier));
    let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0x10000));
    Arc::new(region.unwrap())
}

#[test]
fn region_with_blocks_is_told_as_its_plugged_ranges() {
    let (memory, log) = (memory(), Log::default());
    let notifier = Arc::new(RegionNotifier::new());
    listen(&memory, "a", &log, accepts());
    take(&log);
    let blocks = region_with_blocks(&notifier, &[1, 3]);
    memory.update(|map| map.insert_region(blocks)).unwrap();
    assert_eq!(
        take(&log),
        [
            "a add 0x10000",
            "a plug 0x11000",
            "a plug 0x13000",
            "a commit"
        ]
    );
    let later = Log::default();
    let id = listen(&memory, "b", &later, accepts());
    assert_eq!(take(&later).len(), 6);
    memory.remove_listener(id).unwrap();
    let going = [
        "unplug 0x0",
        "remove 0x0",
        "unplug 0x11000",
        "unplug 0x13000",
        "remove 0x10000",
    ];
    let told: Vec<String> = going.iter().map(|text| format!("b {text}")).collect();
    assert_eq!(take(&later)[..5], told);
}

#[test]
fn region_and_listener_that_join_later_log_writes() {
    let (memory, log) = (memory(), Log::default());
    listen(&memory, "a", &log, accepts());
    take(&log);
    memory.track_writes(true).unwrap();
    // Already on.
    memory.track_writes(true).unwrap();
    assert_eq!(take(&log), ["a track 0x0", "a commit"]);
    move_region(&memory, PAGE).unwrap();
    let moved = [
        "unplug 0x0",
        "stop tracking 0x0",
        "remove 0x0",
        "add 0x1000",
        "track 0x1000",
    ];
    let moved: Vec<String> = moved.iter().map(|text| format!("a {text}")).collect();
    assert_eq!(take(&log)[..5], moved);
    let later = Log::default();
    listen(&memory, "b", &later, accepts());
    let known = [
        "b add 0x1000",
        "b track 0x1000",
        "b plug 0x1000",
        "b commit",
    ];
    assert_eq!(take(&later), known);
    memory.track_writes(false).unwrap();
    assert_eq!(take(&later), ["b stop tracking 0x1000", "b commit"]);
}

#[test]
fn tracking_that_a_listener_refuses_stays_off() {
    let (memory, log) = (memory(), Log::default());
    listen(&memory, "a", &log, accepts());
    listen(&memory, "b", &log, fails_in(2, 100));
    take(&log);
    memory.track_writes(true).unwrap_err();
    let undone = [
        "a track 0x0",
        "b track 0x0",
        "a stop tracking 0x0",
        "a commit",
    ];
    assert_eq!(take(&log), undone);
    memory.track_writes(true).unwrap();
}

#[test]
fn change_of_region_in_two_memories_is_undone_if_one_refuses() {
    let notifier = Arc::new(RegionNotifier::new());
    let blocks = region_with_blocks(&notifier, &[1]);
    let log = Log::default();
    let memories = [memory(), memory()];
    for memory in &memories {
        memory
            .update(|map| map.insert_region(Arc::clone(&blocks)))
            .unwrap();
    }
    listen(&memories[0], "a", &log, accepts());
    // Four calls for the present map.
    listen(&memories[1], "b", &log, fails_in(4, 100));
    take(&log);
    let unplug = || {
        notifier
            .begin()?
            .announce(ChangeKind::Unplugged, &[(PAGE, PAGE)])
    };
    unplug().unwrap_err();
    let undone = [
        "a unplug 0x11000",
        "a commit",
        "b unplug 0x11000",
        "a plug 0x11000",
        "a commit",
    ];
    assert_eq!(take(&log), undone);
    unplug().unwrap();
    assert_eq!(take(&log).len(), 4);
}

#[test]
fn region_that_left_the_map_tells_its_listeners_nothing() {
    let notifier = Arc::new(RegionNotifier::new());
    let (memory, log) = (memory(), Log::default());
    listen(&memory, "a", &log, accepts());
    memory
        .update(|map| map.insert_region(region_with_blocks(&notifier, &[1])))
        .unwrap();
    assert!(format!("{notifier:?}").contains("memories: 1"));
    let (start, len) = (GuestAddress(0x10000), 0x4000);
    memory
        .update(|map| map.remove_region(start, len).map(|(map, _)| map))
        .unwrap();
    take(&log);
    notifier
        .begin()
        .unwrap()
        .announce(ChangeKind::Unplugged, &[(PAGE, PAGE)])
        .unwrap();
    assert_eq!(take(&log), [""; 0]);
    assert!(format!("{notifier:?}").contains("memories: 0"));
}

#[test]
fn announce_of_pinned_range_is_undone() {
    let notifier = Arc::new(RegionNotifier::new());
    let (memory, log) = (memory(), Log::default());
    listen(&memory, "a", &log, accepts());
    memory
        .update(|map| map.insert_region(region_with_blocks(&notifier, &[1, 2])))
        .unwrap();
    let pin = notifier.pin(2 * PAGE, 1).unwrap();
    take(&log);
    let announce = |kind, offset| notifier.begin()?.announce(kind, &[(offset, PAGE)]);
    let error = announce(ChangeKind::Unplugged, 2 * PAGE).unwrap_err();
    assert!(matches!(
        error,
        ListenerError::Pinned {
            kind: ChangeKind::Unplugged,
            ..
        }
    ));
    assert_eq!(
        take(&log).concat(),
        "a unplug 0x12000a commita plug 0x12000a commit"
    );
    // No one is told of a discard that cannot take place.
    announce(ChangeKind::Discarded, 2 * PAGE).unwrap_err();
    assert_eq!(take(&log), [""; 0]);
    announce(ChangeKind::Unplugged, PAGE).unwrap();
    drop(pin);
    announce(ChangeKind::Discarded, 2 * PAGE).unwrap();
}

#[test]
fn range_that_is_being_freed_cannot_be_pinned() {
    let notifier = Arc::new(RegionNotifier::new());
    let mut changes = notifier.begin().unwrap();
    changes
        .announce(ChangeKind::Discarded, &[(PAGE, PAGE)])
        .unwrap();
    let error = notifier.pin(PAGE, 1).unwrap_err();
    assert!(matches!(error, ListenerError::BeingFreed { .. }));
    let (before, after) = (
        notifier.pin(0, PAGE).unwrap(),
        notifier.pin(2 * PAGE, 1).unwrap(),
    );
    drop((changes, before, after));
    drop(notifier.pin(PAGE, 1).unwrap());
}

#[test]
fn wait_until_unpinned_ends_with_the_pin_or_at_the_deadline() {
    let notifier = Arc::new(RegionNotifier::new());
    let pin = notifier.pin(0, PAGE).unwrap();
    notifier
        .wait_until_unpinned(0, PAGE, Instant::now())
        .unwrap_err();
    notifier
        .wait_until_unpinned(PAGE, PAGE, Instant::now())
        .unwrap();
    let waits = Arc::clone(&notifier);
    let later = Instant::now() + Duration::from_secs(600);
    let waiter = std::thread::spawn(move || waits.wait_until_unpinned(0, PAGE, later));
    drop(pin);
    waiter.join().unwrap().unwrap();
}

#[test]
fn retired_map_names_the_regions_that_were_added_and_removed() {
    let memory = memory();
    let old = memory
        .update(|map| map.insert_region(region(PAGE)))
        .unwrap();
    let now = memory.memory();
    let starts = |regions: Vec<&GuestRegionMmap>| -> Vec<u64> {
        regions.iter().map(|region| region.start_addr().0).collect()
    };
    assert_eq!(starts(old.added_regions(&now)), [PAGE]);
    assert_eq!(starts(old.removed_regions(&now)), [0; 0]);
}

/// Updates of two memories and changes of a region that both have, from several threads.
#[test]
fn changes_of_several_threads_end_without_deadlock() {
    let notifier = Arc::new(RegionNotifier::new());
    let blocks = region_with_blocks(&notifier, &[1]);
    let memories = [memory(), memory()];
    for memory in &memories {
        listen(memory, "a", &Log::default(), accepts());
    }
    std::thread::scope(|scope| {
        for memory in &memories {
            let blocks = &blocks;
            scope.spawn(move || {
                for _ in 0..200 {
                    memory
                        .update(|map| map.insert_region(Arc::clone(blocks)))
                        .unwrap();
                    let (start, len) = (blocks.start_addr(), blocks.len());
                    memory
                        .update(|map| map.remove_region(start, len).map(|(map, _)| map))
                        .unwrap();
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let mut changes = notifier.begin().unwrap();
                    changes
                        .announce(ChangeKind::Discarded, &[(PAGE, PAGE)])
                        .unwrap();
                }
            });
        }
    });
}
