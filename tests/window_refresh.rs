//! Windows whose map or IOTLB changes: [`Window::is_current`] and [`Window::refresh`].
#![cfg(all(
    feature = "backend-mmap",
    feature = "backend-atomic",
    feature = "iommu",
))]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::guest_memory::Window;
use vm_memory::iommu::SharedIotlb;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryError,
    GuestMemoryMmap, GuestRegionMmap, IommuMemory, Permissions,
};

const PAGE: usize = 0x1000;
/// An I/O virtual address.
const IOVA: GuestAddress = GuestAddress(0x8000_0000);
/// Only bounds waits that end early.
const LONG: Duration = Duration::from_secs(20);

/// Four pages at address 0.
fn physical() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 * PAGE)]).unwrap()
}

fn region(start: u64) -> Arc<GuestRegionMmap> {
    Arc::new(GuestRegionMmap::from_range(GuestAddress(start), PAGE, None).unwrap())
}

/// Maps the page at [`IOVA`] to a page of the physical memory.
fn map(iotlb: &SharedIotlb, page: u64) -> vm_memory::iommu::Invalidation {
    let to = GuestAddress(page * PAGE as u64);
    iotlb
        .set_mapping(IOVA, to, PAGE, Permissions::ReadWrite)
        .unwrap()
}

fn is_unresolved<M: GuestMemory>(window: &Window<'_, M>) -> bool {
    let gone = |error| matches!(error, GuestMemoryError::InvalidBackendAddress);
    window.write_obj(1u32, 0).is_err_and(gone)
        && window.read_obj::<[u64; 2]>(0).is_err_and(gone)
        && window.store(1u8, 0, Ordering::Relaxed).is_err_and(gone)
        && window.load::<u8>(0, Ordering::Relaxed).is_err_and(gone)
        && window.write(&[1], 0).is_err_and(gone)
        && window.slices().next().is_none()
        && !window.is_current()
}

#[test]
fn is_current_of_window_without_source_stays_true() {
    let memory = physical();
    let mut borrowed = memory
        .window(GuestAddress(0), 8, Permissions::Read)
        .unwrap();
    let arc = Arc::new(physical());
    let mut owned =
        Window::from_arc(Arc::clone(&arc), GuestAddress(8), 8, Permissions::ReadWrite).unwrap();
    assert!(borrowed.is_current() && owned.is_current());
    borrowed.refresh().unwrap();
    owned.refresh().unwrap();
    owned.write_obj(5u64, 0).unwrap();
    assert_eq!(arc.read_obj::<u64>(GuestAddress(8)).unwrap(), 5);
    assert_eq!(borrowed.read_obj::<u64>(0).unwrap(), 0);
    assert!(borrowed.is_current() && owned.is_current());
}

#[test]
fn is_current_after_each_replacement_of_map_is_false_until_refresh() {
    let memory = GuestMemoryAtomic::new(physical());
    let mut window = memory
        .window(GuestAddress(0x10), 8, Permissions::ReadWrite)
        .unwrap();
    let before = window.slices().next().unwrap().ptr_guard().as_ptr();
    assert!(window.is_current());
    memory
        .update(|map| map.insert_region(region(0x10_0000)))
        .unwrap();
    assert!(!window.is_current());
    window.refresh().unwrap();
    assert!(window.is_current());

    // The same address is in another region now.
    memory.lock().unwrap().replace(physical());
    assert!(!window.is_current());
    window.write_obj(1u64, 0).unwrap();
    let map = memory.memory();
    assert_eq!(map.read_obj::<u64>(GuestAddress(0x10)).unwrap(), 0);
    window.refresh().unwrap();
    assert!(window.is_current());
    window.write_obj(2u64, 0).unwrap();
    assert_eq!(map.read_obj::<u64>(GuestAddress(0x10)).unwrap(), 2);
    let after = window.slices().next().unwrap().ptr_guard().as_ptr();
    assert_ne!(before, after);

    // A change that fails is not one.
    memory
        .update(|map| map.insert_region(region(0)))
        .unwrap_err();
    assert!(window.is_current());
}

#[test]
fn refresh_releases_the_old_map() {
    let memory = GuestMemoryAtomic::new(physical());
    let mut window = memory
        .window(GuestAddress(0), 8, Permissions::Read)
        .unwrap();
    let old = memory
        .update(|map| map.insert_region(region(0x10_0000)))
        .unwrap();
    assert_eq!(old.readers(), 1);
    window.refresh().unwrap();
    assert!(old.is_done());
}

#[test]
fn refresh_without_memory_returns_its_error_and_releases_the_map() {
    let memory = GuestMemoryAtomic::new(physical());
    let addr = GuestAddress(0x10_0ff0);
    memory
        .update(|map| map.insert_region(region(0x10_0000)))
        .unwrap();
    let mut window = memory.window(addr, 16, Permissions::ReadWrite).unwrap();
    let old = memory
        .update(|map| {
            let removed = map.remove_region(GuestAddress(0x10_0000), PAGE as u64);
            removed.map(|(map, _)| map)
        })
        .unwrap();
    window.write_obj(1u32, 0).unwrap();
    for _ in 0..2 {
        let error = window.refresh().unwrap_err();
        assert!(matches!(error, GuestMemoryError::InvalidGuestAddress(at) if at == addr));
        assert!(is_unresolved(&window));
        assert!(old.is_done());
    }
    memory
        .update(|map| map.insert_region(region(0x10_0000)))
        .unwrap();
    window.refresh().unwrap();
    window.write_obj(7u32, 0).unwrap();
    assert!(window.is_current());
    assert_eq!(memory.memory().read_obj::<u32>(addr).unwrap(), 7);
}

#[test]
fn refresh_of_range_that_lost_its_end_releases_the_rest() {
    let memory = GuestMemoryAtomic::new(physical());
    let end = GuestAddress(4 * PAGE as u64);
    memory
        .update(|map| map.insert_region(region(end.0)))
        .unwrap();
    let addr = GuestAddress(end.0 - 16);
    let mut window = memory.window(addr, 32, Permissions::ReadWrite).unwrap();
    assert_eq!(window.slices().count(), 2);
    let old = memory
        .update(|map| map.remove_region(end, PAGE as u64).map(|(map, _)| map))
        .unwrap();
    let error = window.refresh().unwrap_err();
    assert!(matches!(error, GuestMemoryError::InvalidGuestAddress(at) if at == end));
    assert!(is_unresolved(&window) && old.is_done());
}

#[test]
fn is_current_after_each_change_of_iotlb_is_false_until_refresh() {
    let iotlb = SharedIotlb::new();
    map(&iotlb, 1);
    let memory = IommuMemory::new(physical(), iotlb.clone(), true, ());
    let mut window = memory.window(IOVA, 8, Permissions::ReadWrite).unwrap();
    assert!(window.is_current());

    let remapped = map(&iotlb, 2);
    assert!(!window.is_current() && !remapped.is_done());
    window.write_obj(1u64, 0).unwrap();
    window.refresh().unwrap();
    assert!(window.is_current() && remapped.is_done());
    window.write_obj(2u64, 0).unwrap();
    let page = |number: u64| {
        let addr = GuestAddress(number * PAGE as u64);
        memory.get_backend().read_obj::<u64>(addr).unwrap()
    };
    assert_eq!((page(1), page(2)), (1, 2));

    let unmapped = iotlb.invalidate_all();
    assert!(!window.is_current() && !unmapped.is_done());
    assert!(matches!(
        window.refresh(),
        Err(GuestMemoryError::IommuError(_))
    ));
    assert!(is_unresolved(&window));
    // The invalidation does not wait for a window that could not be resolved again.
    assert!(unmapped.is_done());

    // An update that fails is not a change.
    map(&iotlb, 3);
    window.refresh().unwrap();
    iotlb
        .set_mapping(GuestAddress(u64::MAX), IOVA, PAGE, Permissions::ReadWrite)
        .unwrap_err();
    assert!(window.is_current());
}

#[test]
fn is_current_of_window_with_map_and_iotlb_notices_either() {
    let iotlb = SharedIotlb::new();
    map(&iotlb, 1);
    let memory = GuestMemoryAtomic::new(IommuMemory::new(physical(), iotlb.clone(), true, ()));
    let mut window = memory.window(IOVA, 8, Permissions::ReadWrite).unwrap();
    assert!(window.is_current());
    map(&iotlb, 2);
    assert!(!window.is_current());
    window.refresh().unwrap();
    assert!(window.is_current());
    let replace = |memory: &IommuMemory<GuestMemoryMmap, SharedIotlb>| {
        Ok::<_, ()>(memory.with_replaced_backend(physical()))
    };
    memory.update(replace).unwrap();
    assert!(!window.is_current());
    window.refresh().unwrap();
    assert!(window.is_current());
    window.write_obj(9u8, 0).unwrap();
    assert_eq!(memory.memory().read_obj::<u8>(IOVA).unwrap(), 9);
}

#[cfg(feature = "backend-bitmap")]
#[test]
fn window_with_unplugged_block_returns_error_and_refresh_too() {
    use std::num::NonZeroUsize;
    use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};

    let blocks = PluggedBlocks::new(4 * PAGE, NonZeroUsize::new(PAGE).unwrap()).unwrap();
    let blocks = Arc::new(blocks);
    let mapping = MmapRegionBuilder::<()>::new(4 * PAGE)
        .with_plugged_blocks(Arc::clone(&blocks))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    blocks.plug(PAGE, PAGE).unwrap();

    let page = PAGE as u64;
    for (addr, len) in [(page - 1, 2), (2 * page - 1, 2), (0, 1), (2 * page, 1)] {
        let window = memory.window(GuestAddress(addr), len, Permissions::Read);
        assert!(window.is_err(), "{addr:#x}");
    }
    let addr = GuestAddress(page);
    let mut window = memory.window(addr, PAGE, Permissions::ReadWrite).unwrap();
    window.write_obj(3u64, PAGE - 8).unwrap();
    blocks.unplug(PAGE, PAGE).unwrap();
    window.refresh().unwrap_err();
    assert!(is_unresolved(&window));
    blocks.plug(PAGE, PAGE).unwrap();
    window.refresh().unwrap();
    assert_eq!(window.read_obj::<u64>(PAGE - 8).unwrap(), 3);
}

/// Stops the devices, also if an assertion fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A device writes through its window for as long as the driver remaps the page. After an
/// invalidation is done, no write of the device reaches the old page.
#[test]
fn window_during_remaps_never_writes_to_a_page_whose_invalidation_is_done() {
    const ROUNDS: u64 = 100;
    let iotlb = SharedIotlb::new();
    map(&iotlb, 0);
    let memory = Arc::new(IommuMemory::new(physical(), iotlb.clone(), true, ()));
    let (stop, start) = (AtomicBool::new(false), Barrier::new(3));
    let device = || {
        let mut window =
            Window::from_arc(Arc::clone(&memory), IOVA, PAGE, Permissions::ReadWrite).unwrap();
        start.wait();
        let mut refreshes = 0u64;
        while !stop.load(Ordering::Relaxed) {
            if !window.is_current() {
                window.refresh().unwrap();
                refreshes += 1;
            }
            window.store(1u64, 8, Ordering::Release).unwrap();
            window.write_slice(&[1; 256], 64).unwrap();
            thread::yield_now();
        }
        refreshes
    };
    thread::scope(|scope| {
        let devices = [scope.spawn(device), scope.spawn(device)];
        start.wait();
        let stopping = StopOnDrop(&stop);
        for round in 0..ROUNDS {
            let (old, new) = (round % 4, (round + 1) % 4);
            let done = map(&iotlb, new);
            done.wait(Instant::now() + LONG).unwrap();
            // The devices use the new page, so this page is the driver's.
            let page = GuestAddress(old * PAGE as u64);
            let physical = memory.get_backend();
            physical.write_slice(&[0; 512], page).unwrap();
            for _ in 0..5 {
                let mut bytes = [0; 512];
                physical.read_slice(&mut bytes, page).unwrap();
                assert!(bytes == [0; 512], "round {round}: a device wrote");
                thread::yield_now();
            }
        }
        drop(stopping);
        for device in devices {
            assert!(device.join().unwrap() >= ROUNDS - 1);
        }
    });
}

/// The same for maps: after a map has no readers, no write of the device reaches its region.
#[test]
fn window_during_replacements_never_writes_to_a_map_without_readers() {
    const ROUNDS: u64 = 100;
    let memory = GuestMemoryAtomic::new(physical());
    let (stop, start) = (AtomicBool::new(false), Barrier::new(2));
    let device = || {
        let mut window = memory
            .window(GuestAddress(0), 64, Permissions::ReadWrite)
            .unwrap();
        start.wait();
        while !stop.load(Ordering::Relaxed) {
            if !window.is_current() {
                window.refresh().unwrap();
            }
            window.write_obj([1u64; 8], 0).unwrap();
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        let device = scope.spawn(device);
        start.wait();
        let stopping = StopOnDrop(&stop);
        for round in 0..ROUNDS {
            let old = memory.update(|_| Ok::<_, ()>(physical())).unwrap();
            old.wait(Instant::now() + LONG).unwrap();
            let map = old.map();
            map.write_obj([0u64; 8], GuestAddress(0)).unwrap();
            for _ in 0..5 {
                let bytes: [u64; 8] = map.read_obj(GuestAddress(0)).unwrap();
                assert!(bytes == [0; 8], "round {round}: the device wrote");
                thread::yield_now();
            }
        }
        drop(stopping);
        device.join().unwrap();
    });
}
