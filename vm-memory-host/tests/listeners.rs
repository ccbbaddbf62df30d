//! Listeners of a memory under random changes, compared with a set of pages for each listener.
//!
//! After each change, each listener may use exactly the accessible pages of the current map. It
//! checks in each call that the pages that it may use still have their bytes. Some calls fail or
//! panic, and some listeners also fail to undo.
//!
//! `LISTENER_CHANGES=1000000 cargo test --release -p vm-memory-host --test listeners` makes a
//! million changes. `LISTENER_SEED` sets the seed.
#![cfg(target_os = "linux")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::panic;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::atomic::{ListenerId, UpdateError};
use vm_memory::listeners::{
    BoxError, ChangeKind, ListenerError, MemoryChange, MemoryListener, Pin,
};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};
use vm_memory_host::{
    discard, discard_pages, plug, prefault, provisioned, residency, unplug, zero_range, Backing,
    ChangeError, MemoryBuilder, Region, Unplugged,
};

/// The block size, and the unit of the model.
const BLOCK: u64 = 64 << 10;
/// The number of blocks in a region.
const BLOCKS: u64 = 8;
/// The number of places where a region can be.
const PLACES: u64 = 6;
/// The distance of two places.
const DISTANCE: u64 = 1 << 20;

/// The knowledge of a listener, and the call in which it fails.
#[derive(Default)]
struct Known {
    /// The guest address of each block that it may use, and the address of its region.
    usable: BTreeMap<u64, usize>,
    /// The regions that were added.
    added: BTreeSet<u64>,
    /// The number of calls before one that fails.
    fails_in: Option<u64>,
    panics: bool,
    /// Whether all calls after the first failure fail as well.
    stays_broken: bool,
    /// The blocks that got their stamp after the listener was detached.
    kept: BTreeSet<u64>,
    /// The blocks of whose discard it was told, and whose bytes may be gone.
    discarded: BTreeSet<u64>,
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Known>>);

impl Recorder {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn count_call(&mut self) -> Result<(), BoxError> {
        match &mut self.fails_in {
            None => return Ok(()),
            Some(0) => {}
            Some(left) => {
                *left -= 1;
                return Ok(());
            }
        }
        if !self.stays_broken {
            self.fails_in = None;
        }
        if self.panics {
            panic::resume_unwind(Box::new("expected by the test"));
        }
        Err("expected by the test".into())
    }
}

/// Returns the guest addresses of the blocks in a range.
fn blocks_of(start: u64, len: u64) -> impl Iterator<Item = u64> {
    (start..start + len).step_by(usize::try_from(BLOCK).unwrap())
}

impl MemoryListener<GuestRegionMmap> for Recorder {
    fn change(&mut self, change: &MemoryChange<'_, GuestRegionMmap>) -> Result<(), BoxError> {
        let mut known = self.known();
        known.count_call()?;
        // The library would take a failed assertion for a failure of the listener.
        let followed = panic::catch_unwind(panic::AssertUnwindSafe(|| known.follow(change)));
        followed.unwrap_or_else(|_| std::process::abort());
        Ok(())
    }

    fn commit(&mut self) -> Result<(), BoxError> {
        self.known().count_call()
    }
}

impl Known {
    /// Checks that a change is possible, and remembers it.
    fn follow(&mut self, change: &MemoryChange<'_, GuestRegionMmap>) {
        let known = self;
        let (region, start) = (change.region(), change.start().0);
        let region_start = region.start_addr().0;
        match change.kind() {
            ChangeKind::Added => assert!(known.added.insert(region_start)),
            ChangeKind::Removed => {
                assert!(known.added.remove(&region_start));
                let mut rest = known
                    .usable
                    .range(region_start..region_start + region.len());
                assert_eq!(rest.next(), None);
            }
            ChangeKind::Plugged => {
                assert!(known.added.contains(&region_start));
                for block in blocks_of(start, change.len()) {
                    let former = known.usable.insert(block, ptr::from_ref(region).addr());
                    assert_eq!(former, None, "{block:#x} was usable");
                    known.discarded.insert(block);
                }
            }
            ChangeKind::Unplugged | ChangeKind::Discarded => {
                for block in blocks_of(start, change.len()) {
                    // Still there, with its bytes. A plug that is undone was not recorded.
                    let stamp = region.read_obj(MemoryRegionAddress(block - region_start));
                    let is_new = known.discarded.contains(&block);
                    match stamp {
                        Ok(0u64) | Err(_) => assert!(is_new, "{block:#x}: {stamp:?}"),
                        Ok(stamp) => assert_eq!(stamp, block + 1),
                    }
                    match change.kind() {
                        ChangeKind::Discarded => {
                            assert!(known.usable.contains_key(&block));
                            known.discarded.insert(block);
                        }
                        _ => assert!(known.usable.remove(&block).is_some(), "{block:#x}"),
                    }
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

struct Test {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    listeners: Vec<(ListenerId, Recorder)>,
    detached: Vec<(ListenerId, Recorder)>,
    pins: Vec<Pin>,
    /// All regions that exist.
    regions: Vec<Weak<GuestRegionMmap>>,
    random: fastrand::Rng,
    /// The memory of this process.
    process: File,
    refused: u64,
}

fn place(number: u64) -> GuestAddress {
    GuestAddress(number * DISTANCE)
}

impl Test {
    /// Returns the accessible blocks of the current map, and writes a stamp to each.
    fn usable(&self) -> BTreeSet<u64> {
        let map = self.memory.memory();
        let mut usable = BTreeSet::new();
        for region in map.iter() {
            let start = region.start_addr().0;
            for block in blocks_of(start, region.len()) {
                if map.write_obj(block + 1, GuestAddress(block)).is_ok() {
                    usable.insert(block);
                }
            }
        }
        usable
    }

    fn check(&mut self) {
        self.check_detached();
        let usable = self.usable();
        for (_, recorder) in &self.listeners {
            let mut known = recorder.known();
            assert!(
                known.usable.keys().eq(&usable),
                "{:x?} {usable:x?}",
                known.usable
            );
            known.discarded.clear();
        }
        self.regions.retain(|region| region.strong_count() != 0);
    }

    /// Checks that detached listeners still have what they may use.
    fn check_detached(&self) {
        for (_, recorder) in &self.detached {
            let mut known = recorder.known();
            for (block, address) in known.usable.clone() {
                let regions = self.regions.iter().filter_map(Weak::upgrade);
                let mut regions = regions.filter(|region| Arc::as_ptr(region).addr() == address);
                let region = regions.next().expect("kept for the listener");
                let offset = region.to_region_addr(GuestAddress(block)).unwrap();
                let host = region.as_ptr().addr() as u64 + offset.0;
                // A plug that is undone was not recorded, so the library cannot read the block.
                let mut stamp = [0; 8];
                self.process.read_exact_at(&mut stamp, host).unwrap();
                let expected = block + 1;
                if known.kept.insert(block) {
                    self.process
                        .write_all_at(&expected.to_ne_bytes(), host)
                        .unwrap();
                } else {
                    assert_eq!(u64::from_ne_bytes(stamp), expected, "{block:#x}");
                }
            }
        }
    }

    /// Builds a region of one of the kinds.
    fn region(&mut self, at: GuestAddress) -> GuestRegionMmap {
        let region = Region::new(at, BLOCKS * BLOCK);
        let block = NonZeroU64::new(BLOCK).unwrap();
        let region = match self.random.u8(0..4) {
            0 => region,
            1 => region.backing(Backing::Memfd),
            2 => region.blocks(block, Unplugged::Mapped),
            _ => region
                .backing(Backing::Memfd)
                .blocks(block, Unplugged::Mapped),
        };
        region.build().unwrap()
    }

    fn range(&mut self) -> (GuestAddress, u64) {
        let first = self.random.u64(0..BLOCKS);
        let count = self.random.u64(1..=BLOCKS - first);
        let start = self.random.u64(0..PLACES) * DISTANCE + first * BLOCK;
        (GuestAddress(start), count * BLOCK)
    }

    /// Makes a random change. Errors of listeners and pins are counted.
    fn change(&mut self) {
        let (addr, len) = self.range();
        let map = self.memory.memory().into_inner();
        match self.random.u8(0..20) {
            0..=3 => self.toggle_regions(),
            4..=8 => self.count(plug(&*map, addr, len)),
            9..=12 => self.count(unplug(&*map, addr, len)),
            13..=15 => self.count(discard(&*map, addr, len)),
            16 => self.add_listener(),
            17 => self.remove_listener(),
            18 if self.pins.len() < 3 => {
                if let Some((region, offset)) = map.to_region_addr(addr) {
                    let notifier = provisioned(region).unwrap().notifier();
                    self.pins.push(notifier.pin(offset.0, len).unwrap());
                }
            }
            _ => drop(self.pins.pop()),
        }
        self.collect_detached();
    }

    fn count<T>(&mut self, result: Result<T, ChangeError>) {
        match result {
            Ok(_) | Err(ChangeError::Hole { .. } | ChangeError::NoBlocks { .. }) => {}
            Err(ChangeError::Listener { .. }) => self.refused += 1,
            Err(other) => panic!("{other}"),
        }
    }

    /// Adds a region, or removes or replaces one, or two of them at once.
    fn toggle_regions(&mut self) {
        let map = self.memory.memory().into_inner();
        let places: BTreeSet<u64> = (0..self.random.u64(1..3))
            .map(|_| self.random.u64(0..PLACES))
            .collect();
        let mut new = (*map).clone();
        for at in places.into_iter().map(place) {
            let mut keep = true;
            if new.find_region(at).is_some() {
                keep = self.random.u8(0..3) == 0;
                new = new.remove_region(at, BLOCKS * BLOCK).unwrap().0;
            }
            if keep {
                let region = Arc::new(self.region(at));
                self.regions.push(Arc::downgrade(&region));
                new = new.insert_region(region).unwrap();
            }
        }
        if self.random.u8(0..4) == 0 {
            self.memory.lock().unwrap().replace(new);
            return;
        }
        match self.memory.update(|_| Ok::<_, ()>(new)) {
            Ok(_) => {}
            Err(UpdateError::Listener(_)) => {
                self.refused += 1;
                let now = self.memory.memory().into_inner();
                assert!(Arc::ptr_eq(&now, &map), "the old map stays");
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    fn add_listener(&mut self) {
        let recorder = Recorder::default();
        if self.listeners.len() > 4 {
            return;
        }
        if self.random.u8(0..4) == 0 {
            self.break_listener(&recorder);
        }
        let known = self.memory.detached_listeners().unwrap();
        match self.memory.add_listener(Box::new(recorder.clone())) {
            Ok(id) => self.listeners.push((id, recorder)),
            Err(ListenerError::Refused { .. } | ListenerError::NotCommitted { .. }) => {
                self.refused += 1;
                let now = self.memory.detached_listeners().unwrap();
                match now.into_iter().find(|listener| !known.contains(listener)) {
                    Some(listener) => self.listeners.push((listener.id, recorder)),
                    None => assert!(recorder.known().usable.is_empty()),
                }
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn remove_listener(&mut self) {
        if !self.detached.is_empty() {
            let (id, _) = self.detached.remove(0);
            self.memory.remove_listener(id).unwrap();
        } else if self.listeners.len() > 1 {
            let number = self.random.usize(0..self.listeners.len());
            let (id, recorder) = self.listeners[number].clone();
            match self.memory.remove_listener(id) {
                Ok(_) => {
                    assert!(recorder.known().usable.is_empty());
                    self.listeners.remove(number);
                }
                Err(_) => self.refused += 1,
            }
        }
    }

    fn break_listener(&mut self, recorder: &Recorder) {
        let mut known = recorder.known();
        known.fails_in = Some(self.random.u64(0..6));
        known.panics = self.random.bool();
        known.stays_broken = self.random.u8(0..4) == 0;
    }

    /// Moves the listeners that are detached now to their list.
    fn collect_detached(&mut self) {
        let detached = self.memory.detached_listeners().unwrap();
        let is_detached = |id: ListenerId| detached.iter().any(|listener| listener.id == id);
        let listeners = std::mem::take(&mut self.listeners).into_iter();
        let (gone, rest) = listeners.partition::<Vec<_>, _>(|(id, _)| is_detached(*id));
        self.listeners = rest;
        self.detached.extend(gone);
    }
}

#[test]
fn listeners_under_random_changes_know_exactly_the_accessible_pages() {
    let setting = |name| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse().ok())
    };
    let changes: u64 = setting("LISTENER_CHANGES").unwrap_or(3000);
    let seed = setting("LISTENER_SEED").unwrap_or(1);
    println!("seed {seed}, {changes} changes");
    let mut test = Test {
        memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
        listeners: Vec::new(),
        detached: Vec::new(),
        pins: Vec::new(),
        regions: Vec::new(),
        random: fastrand::Rng::with_seed(seed),
        process: File::options()
            .read(true)
            .write(true)
            .open("/proc/self/mem")
            .unwrap(),
        refused: 0,
    };
    test.add_listener();
    for _ in 0..changes {
        if test.random.u8(0..8) == 0 && !test.listeners.is_empty() {
            let number = test.random.usize(0..test.listeners.len());
            let recorder = test.listeners[number].1.clone();
            test.break_listener(&recorder);
        }
        test.change();
        test.check();
    }
    println!("refused: {}", test.refused);
    assert!(test.refused > changes / 100);
}

/// Calls a function for each change.
struct Calls<F>(F);

impl<F> MemoryListener<GuestRegionMmap> for Calls<F>
where
    F: FnMut(&MemoryChange<'_, GuestRegionMmap>) -> Result<(), BoxError> + Send,
{
    fn change(&mut self, change: &MemoryChange<'_, GuestRegionMmap>) -> Result<(), BoxError> {
        (self.0)(change)
    }
}

/// A memory of eight blocks, of which the first is plugged and has bytes.
fn memory_with_blocks() -> GuestMemoryAtomic<GuestMemoryMmap> {
    let block = NonZeroU64::new(BLOCK).unwrap();
    let region = Region::new(place(0), BLOCKS * BLOCK).blocks(block, Unplugged::Mapped);
    let map = MemoryBuilder::new().region(region).build().unwrap();
    plug(&map, place(0), BLOCK).unwrap();
    map.write_obj(7u64, place(0)).unwrap();
    GuestMemoryAtomic::new(map)
}

#[test]
fn pinned_pages_are_neither_discarded_nor_unplugged() {
    let memory = memory_with_blocks();
    let map = memory.memory();
    let region = map.iter().next().unwrap();
    let pin = provisioned(region).unwrap().notifier().pin(0, 8).unwrap();
    for refused in [
        discard(&*map, place(0), BLOCK),
        unplug(&*map, place(0), BLOCK),
    ] {
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("pages are pinned"), "{error}");
        assert_eq!(map.read_obj::<u64>(place(0)).unwrap(), 7);
    }
    let page = provisioned(region).unwrap().page_size();
    let report = discard_pages(&*map, [0u64, 2 * page / 4096]);
    assert_eq!((report.discarded, report.refused), (1, 1));
    // The zeroes are written to the pinned page.
    assert_eq!(zero_range(&*map, place(0), page).unwrap(), 0);
    assert_eq!(map.read_obj::<u64>(place(0)).unwrap(), 0);
    assert!(residency(&*map).unwrap()[0].1.resident >= page);
    drop(pin);
    assert_eq!(unplug(&*map, place(0), BLOCK).unwrap(), BLOCK);
}

#[test]
fn blocks_that_a_listener_refuses_stay_unplugged_and_have_no_pages() {
    let memory = memory_with_blocks();
    let refuse = |change: &MemoryChange<'_, _>| match (change.kind(), change.offset()) {
        (ChangeKind::Plugged, 0) | (ChangeKind::Added, _) => Ok(()),
        _ => Err(BoxError::from("no slot is free")),
    };
    memory.add_listener(Box::new(Calls(refuse))).unwrap();
    let map = memory.memory();
    let before = residency(&*map).unwrap()[0].1.resident;
    let error = plug(&*map, place(0), 2 * BLOCK).unwrap_err();
    let ChangeError::Listener {
        start, len, source, ..
    } = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!((*start, *len), (0, 2 * BLOCK));
    assert!(
        source
            .to_string()
            .contains("refused to plug 0x10000 bytes at 0x10000"),
        "{source}"
    );
    assert!(map.read_obj::<u64>(GuestAddress(BLOCK)).is_err());
    assert_eq!(residency(&*map).unwrap()[0].1.resident, before);
    // The plugged block cannot go either, and keeps its bytes.
    unplug(&*map, place(0), BLOCK).unwrap_err();
    assert_eq!(map.read_obj::<u64>(place(0)).unwrap(), 7);
}

#[test]
fn listener_reads_and_populates_the_memory_that_it_is_told_of() {
    let memory = memory_with_blocks();
    let same = memory.clone();
    let calls = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&calls);
    let look = move |_: &MemoryChange<'_, _>| {
        let map = same.memory();
        prefault(&*map, NonZeroUsize::MIN, |_| ControlFlow::Continue(()))?;
        residency(&*map)?;
        *counted.lock().unwrap() += 1;
        Ok(())
    };
    memory.add_listener(Box::new(Calls(look))).unwrap();
    let map = memory.memory();
    plug(&*map, place(0), 2 * BLOCK).unwrap();
    discard(&*map, place(0), BLOCK).unwrap();
    unplug(&*map, place(0), 2 * BLOCK).unwrap();
    assert_eq!(*calls.lock().unwrap(), 5);
}

/// A plug that one listener refuses, and that another one fails to undo.
#[test]
fn pages_that_a_detached_listener_may_use_are_not_freed() {
    let memory = memory_with_blocks();
    let mut calls = 0;
    let fails_to_undo = move |change: &MemoryChange<'_, _>| {
        calls += u32::from(change.offset() == BLOCK);
        if calls > 1 {
            return Err(BoxError::from("the device does not respond"));
        }
        Ok(())
    };
    let id = memory.add_listener(Box::new(Calls(fails_to_undo))).unwrap();
    let refuse = |change: &MemoryChange<'_, _>| match change.offset() {
        BLOCK => Err(BoxError::from("no slot is free")),
        _ => Ok(()),
    };
    let other = memory.add_listener(Box::new(Calls(refuse))).unwrap();
    let map = memory.memory();
    let second = GuestAddress(BLOCK);
    plug(&*map, second, BLOCK).unwrap_err();
    assert_eq!(memory.detached_listeners().unwrap()[0].id, id);
    memory.remove_listener(other).unwrap();

    // The device writes to the block that it may use.
    let host = map.iter().next().unwrap().as_ptr().addr() as u64 + BLOCK;
    let process = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem")
        .unwrap();
    process.write_all_at(&[7], host).unwrap();
    for refused in [
        plug(&*map, second, BLOCK),
        unplug(&*map, place(0), 2 * BLOCK),
        discard(&*map, second, BLOCK),
    ] {
        assert!(
            matches!(refused, Err(ChangeError::Listener { .. })),
            "{refused:?}"
        );
    }
    let mut byte = [0];
    process.read_exact_at(&mut byte, host).unwrap();
    assert_eq!(byte, [7]);
    memory.remove_listener(id).unwrap();
    assert_eq!(plug(&*map, second, BLOCK).unwrap(), BLOCK);
}
