//! Tests of prefaulting.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::common::*;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};
use vm_memory_host::{plug, prefault, unplug, Backing, MemoryBuilder, Region, Unplugged};

const START: u64 = 1 << 32;
const SIZE: u64 = 16 * MIB;
/// The number of bytes that a prefault populates between two callbacks.
const STEP: u64 = 32 * MIB;

#[test]
fn prefault_makes_pages_resident_and_keeps_bytes() {
    let pages = HugePages::reserve(8, "prefault_makes_pages_resident_and_keeps_bytes (hugetlb)");
    for (kind, region) in region_of_each_backing(0, 16 * MIB, pages.is_some()) {
        let memory = build(region).unwrap();
        fill(&memory, PAGE, PAGE, 0x42);
        let mut seen = Vec::new();
        let threads = NonZeroUsize::new(2).unwrap();
        prefault(&memory, threads, |progress| {
            seen.push(progress);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(resident(&memory), 16 * MIB, "{kind}");
        assert_eq!(byte_of_page(&memory, PAGE), Some(0x42), "{kind}");
        assert!(seen.windows(2).all(|pair| pair[0].done < pair[1].done));
        assert_eq!(
            seen.last().map(|last| (last.done, last.total)),
            Some((16 * MIB, 16 * MIB))
        );
    }
}

#[test]
fn prefault_whose_callback_breaks_is_cancelled() {
    let is_early = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&is_early);
    let threads = NonZeroUsize::new(2).unwrap();
    let error = MemoryBuilder::new()
        .region(Region::new(GuestAddress(0), 256 * MIB))
        .prefault(threads, move |progress| {
            noted.store(progress.done < progress.total, Ordering::Relaxed);
            ControlFlow::Break(())
        })
        .build::<()>()
        .unwrap_err();
    assert!(is_early.load(Ordering::Relaxed));
    let message = error.to_string();
    assert!(
        message.starts_with("prefault cancelled after 0x2000000 of 0x10000000"),
        "{message}"
    );
}

#[test]
fn prefault_uses_its_threads_and_populates_for_writing() {
    let memory = build(Region::new(GuestAddress(0), 512 * MIB)).unwrap();
    let mut threads = HashSet::new();
    prefault(&memory, NonZeroUsize::new(2).unwrap(), |progress| {
        threads.insert(std::thread::current().id());
        if threads.len() == 1 {
            // The other thread has populated a step that it has not reported yet.
            test_support::wait_until(|| resident(&memory) >= progress.done + STEP);
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(threads.len(), 2);
    // Pages of this process, not the shared zero page.
    let anonymous = smaps(host_address(&memory));
    let anonymous = anonymous
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"))
        .unwrap();
    assert_eq!(anonymous.trim(), format!("{} kB", 512 << 10));
}

#[test]
fn prefault_skips_unplugged_blocks() {
    let region = Region::new(GuestAddress(START), SIZE).blocks(non_zero(HUGE), Unplugged::Mapped);
    let memory = build(region).unwrap();
    plug(&memory, GuestAddress(START + HUGE), HUGE).unwrap();
    let mut total = 0;
    prefault(&memory, NonZeroUsize::MIN, |progress| {
        total = progress.total;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((total, resident(&memory)), (HUGE, HUGE));
}

#[test]
fn prefault_during_unplug_leaves_no_pages() {
    let region =
        Region::new(GuestAddress(0), 64 * MIB).blocks(non_zero(HUGE), Unplugged::Protected);
    let memory = build(region).unwrap();
    for _ in 0..20 {
        plug(&memory, GuestAddress(0), 64 * MIB).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                prefault(&memory, NonZeroUsize::MIN, |_| ControlFlow::Continue(())).unwrap();
            });
            for block in (0..64 * MIB).step_by(HUGE as usize) {
                unplug(&memory, GuestAddress(block), HUGE).unwrap();
            }
        });
        assert_eq!(resident(&memory), 0);
    }
}

#[test]
fn prefault_of_truncated_file_names_region_of_map_and_length() {
    let file = test_support::temp_file_of_len(MIB);
    let shared = Backing::shared_file(file.try_clone().unwrap(), 0);
    let memory = build(Region::new(GuestAddress(0), MIB).backing(shared)).unwrap();
    let mapped = memory.iter().next().unwrap().get_mmap();
    // A map has the region at another address than that of the build.
    let moved = GuestRegionMmap::with_arc(mapped, GuestAddress(START)).unwrap();
    let moved = Memory::from_regions(vec![moved]).unwrap();
    file.set_len(PAGE).unwrap();
    let result = prefault(&moved, NonZeroUsize::MIN, |_| ControlFlow::Continue(()));
    let error = result.unwrap_err().to_string();
    let expected =
        "region 0x100000000-0x1000fffff: cannot populate it: its file has 0x1000 bytes, \
        but the region needs 0x100000; 0x0 of 0x100000 bytes were populated; extend the file";
    assert_eq!(error, expected);
}
