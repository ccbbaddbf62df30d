//! A map that is replaced while readers use it, as in `GuestMemoryAtomic`, is out of use when it
//! has no readers.

use loom::cell::UnsafeCell;
use loom::thread;

use super::handle::{RetiredHandle, WeakVersion};
use super::list::RetiredList;
use super::sync::{lock, Arc, Mutex};

/// A region. loom reports a read that is concurrent with the unmapping.
#[derive(Debug)]
struct Region(UnsafeCell<()>);

impl Region {
    fn new() -> Arc<Self> {
        Arc::new(Self(UnsafeCell::new(())))
    }

    fn read(&self) {
        self.0.with(|_| ());
    }

    fn unmap(&self) {
        self.0.with_mut(|_| ());
    }
}

/// A map of regions.
type Map = Vec<Arc<Region>>;

/// The parts of a `GuestMemoryAtomic`.
struct Memory {
    current: Mutex<Arc<Map>>,
    version: Mutex<u64>,
    retired: RetiredList<WeakVersion<Map>>,
}

impl Memory {
    fn new(map: Map) -> Arc<Self> {
        Arc::new(Self {
            current: Mutex::new(Arc::new(map)),
            version: Mutex::new(0),
            retired: RetiredList::new(),
        })
    }

    fn load(&self) -> Arc<Map> {
        Arc::clone(&lock(&self.current))
    }

    fn swap(&self, map: Map) -> Arc<Map> {
        core::mem::replace(&mut lock(&self.current), Arc::new(map))
    }

    /// `GuestMemoryAtomic::update`: returns the handle, and the version that replaced the map.
    fn update(&self, change: impl FnOnce(&Map) -> Map) -> (RetiredHandle<Map>, u64) {
        let mut version = lock(&self.version);
        let map = change(&self.load());
        let map = self.swap(map);
        let (handle, retired) = RetiredHandle::new(*version, map);
        let unread = retired.map(|retired| self.retired.retire(retired));
        *version += 1;
        let replaced_by = *version;
        drop(version);
        drop(unread);
        (handle, replaced_by)
    }

    /// `GuestMemoryExclusiveGuard::replace`.
    fn replace(&self, map: Map) {
        let mut version = lock(&self.version);
        let old = self.swap(map);
        let retired = WeakVersion::new(*version, &old);
        let unread = retired.map(|retired| self.retired.retire(retired));
        *version += 1;
        drop(version);
        drop(unread);
    }

    fn readers(&self, replaced_by: u64) -> usize {
        self.retired.readers_before(replaced_by)
    }
}

/// A thread that reads the first region, if the current map has it.
fn reader(memory: &Arc<Memory>) -> thread::JoinHandle<()> {
    let memory = Arc::clone(memory);
    thread::spawn(move || {
        let map = memory.load();
        if let Some(region) = map.first() {
            region.read();
        }
    })
}

pub(super) fn update_without_readers_left_permits_unmapping() {
    loom::model(|| {
        let region = Region::new();
        let memory = Memory::new(vec![Arc::clone(&region)]);
        let reader = reader(&memory);
        let (handle, replaced_by) = memory.update(|_| Vec::new());
        if memory.readers(replaced_by) == 0 {
            region.unmap();
            let map = handle.into_value().expect("the map has no readers");
            assert_eq!(map.len(), 1);
        } else {
            drop(handle);
        }
        reader.join().unwrap();
        assert_eq!(memory.readers(replaced_by), 0);
    });
}

/// The reader may have an earlier map than the one whose handle counts, and another thread may take
/// that map out of the list.
pub(super) fn update_after_other_changes_counts_readers_of_earlier_maps() {
    for by_update in [false, true] {
        loom::model(move || {
            let region = Region::new();
            let memory = Memory::new(vec![Arc::clone(&region)]);
            let reader = reader(&memory);
            let other = {
                let (memory, region) = (Arc::clone(&memory), Arc::clone(&region));
                thread::spawn(move || {
                    if by_update {
                        drop(memory.update(Map::clone))
                    } else {
                        memory.replace(vec![region])
                    }
                })
            };
            other.join().unwrap();
            let (handle, replaced_by) = memory.update(|_| Vec::new());
            if memory.readers(replaced_by) == 0 {
                region.unmap();
            }
            drop(handle);
            reader.join().unwrap();
            assert_eq!(memory.readers(replaced_by), 0);
        });
    }
}

/// A handle that another thread drops is not missed: with a reader, the count is never 0.
pub(super) fn readers_before_with_handle_being_dropped_is_not_too_low() {
    loom::model(|| {
        let region = Region::new();
        let memory = Memory::new(vec![Arc::clone(&region)]);
        let mine = memory.load();
        let (handle, replaced_by) = memory.update(|_| Vec::new());
        let other = thread::spawn(move || drop(handle));
        assert_ne!(memory.readers(replaced_by), 0);
        drop(mine);
        other.join().unwrap();
        assert_eq!(memory.readers(replaced_by), 0);
    });
}

mod complete {
    #[test]
    fn update_without_readers_left_permits_unmapping() {
        super::update_without_readers_left_permits_unmapping();
    }

    #[test]
    fn update_after_other_changes_counts_readers_of_earlier_maps() {
        super::update_after_other_changes_counts_readers_of_earlier_maps();
    }

    #[test]
    fn readers_before_with_handle_being_dropped_is_not_too_low() {
        super::readers_before_with_handle_being_dropped_is_not_too_low();
    }
}
