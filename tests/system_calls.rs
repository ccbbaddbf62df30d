//! The table of system calls in the crate documentation lists exactly the calls that are made. Each
//! constructor of a mapping makes only its own calls, and marks and harvests make none.
//!
//! The allocator of this program makes no system calls, so it is a program of its own.
#![cfg(all(
    target_os = "linux",
    feature = "backend-atomic",
    feature = "backend-bitmap",
    feature = "backend-mmap",
    feature = "iommu",
    feature = "rawfd",
    not(miri)
))]

use std::collections::BTreeSet;
use std::io::Result;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use test_support::{
    documented_calls, record_calls, skipped, temp_file, temp_file_of_len, CallRecorder,
    StaticAllocator, PAGE,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::iommu::{AskingIommu, Iommu, IovaRange, SharedIotlb};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    fault, vectored, Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic,
    GuestMemoryMmap, GuestRegionMmap, MmapRegion, Permissions, VolatileMemory,
};

const SIZE: usize = 0x1_0000;
const START: GuestAddress = GuestAddress(0);

#[global_allocator]
static ALLOCATOR: StaticAllocator = StaticAllocator::new();

type Memory = GuestMemoryMmap<AtomicBitmap>;

fn memory() -> Memory {
    Memory::from_ranges(&[(START, SIZE)]).unwrap()
}

/// Maps regions without a memory.
fn map_regions(recorder: &mut CallRecorder) -> Result<()> {
    let backing = FileOffset::new(temp_file_of_len(SIZE as u64), 0);
    recorder.run("MmapRegion", || {
        drop(MmapRegion::<()>::new(SIZE).unwrap());
        drop(MmapRegion::<()>::from_file(backing.clone(), SIZE).unwrap());
    })
}

/// Installs the fault handler, and makes an access that faults.
fn fault(recorder: &mut CallRecorder) -> Result<()> {
    if recorder.run("fault::install", fault::install)?.is_err() {
        // Not supported on this target.
        return Ok(());
    }
    let file = temp_file_of_len(SIZE as u64);
    let backing = FileOffset::new(file.try_clone()?, 0);
    let ranges = [(START, SIZE, Some(backing))];
    let mapped = recorder.run("GuestMemoryMmap", || {
        Memory::from_ranges_with_files(&ranges)
    })?;
    let mapped = mapped.unwrap();
    file.set_len(0)?;
    let access = || mapped.read_obj::<u64>(START).is_err();
    assert!(recorder.run("access that faults", access)?);
    Ok(())
}

/// Moves bytes between guest memory and a file.
fn transfer(recorder: &mut CallRecorder) -> Result<()> {
    let memory = memory();
    let access = || {
        memory.write_obj(1u64, START).unwrap();
        memory.read_obj::<u64>(START).unwrap()
    };
    recorder.run("an access", access)?;
    let mut file = temp_file(&[7; 4 * SIZE]);
    recorder.run("ReadVolatile", || {
        memory.read_volatile_from(START, &mut file, SIZE).unwrap();
    })?;
    recorder.run("WriteVolatile", || {
        memory.write_volatile_to(START, &mut file, SIZE).unwrap();
    })?;
    recorder.run("vectored", || {
        vectored::read_from(&memory, START, SIZE, &file).unwrap();
        vectored::write_to(&memory, START, SIZE, &file).unwrap();
        vectored::read_from_at(&memory, START, SIZE, &file, 0).unwrap();
        vectored::write_to_at(&memory, START, SIZE, &file, 0).unwrap();
    })?;
    let memory = Arc::new(memory);
    recorder.run("vectored", || {
        let ranges = [(START, SIZE)];
        let mut buffer =
            vectored::IoBuffer::from_ranges(&memory, ranges, Permissions::ReadWrite).unwrap();
        buffer.read_from(&file).unwrap();
        buffer.write_to(&file).unwrap();
        buffer.read_from_at(&file, 0).unwrap();
        buffer.write_to_at(&file, 0).unwrap();
        buffer.complete_front(1);
        buffer.clear();
    })
}

/// Replaces a map that has a reader.
fn replace(recorder: &mut CallRecorder) -> Result<()> {
    let atomic = GuestMemoryAtomic::new(memory());
    let reader = atomic.memory();
    let replaced = recorder.run("an update", || {
        atomic.update(|map| Ok::<_, ()>(map.clone()))
    })?;
    let replaced = replaced.unwrap();
    let deadline = Instant::now() + Duration::from_millis(5);
    let waited = recorder.run("atomic::RetiredMap::wait", || {
        replaced.wait(deadline).is_err()
    })?;
    assert!(waited);
    drop(reader);
    Ok(())
}

/// Waits for an access through an IOTLB, and for a mapping that is missing.
fn wait_for_mappings(recorder: &mut CallRecorder) -> Result<()> {
    let iotlb = SharedIotlb::new();
    iotlb
        .set_mapping(START, START, SIZE, Permissions::Read)
        .unwrap();
    let reader = iotlb.translate(START, 8, Permissions::Read).unwrap();
    let removed = iotlb.invalidate_mapping(START, SIZE);
    let deadline = Instant::now() + Duration::from_millis(5);
    let waited = recorder.run("iommu::Invalidation::wait", || {
        removed.wait(deadline).is_err()
    })?;
    assert!(waited);
    drop(reader);
    let source = |_: &IovaRange, _| Ok(());
    let iommu = AskingIommu::new(iotlb, Duration::from_millis(5), source);
    let is_missing = recorder.run("iommu::AskingIommu", || {
        iommu.translate(START, 8, Permissions::Read).is_err()
    })?;
    assert!(is_missing);
    Ok(())
}

/// Tracks and harvests dirty pages.
fn track(recorder: &mut CallRecorder) -> Result<()> {
    let page = NonZeroUsize::new(4096).unwrap();
    let mut dirty = DirtyPages::new(SIZE, page);
    let bitmap = AtomicBitmap::new(SIZE, page);
    recorder.run("a harvest", || bitmap.harvest_into(&mut dirty))?;
    let memory = memory();
    recorder.run("switched tracking", || {
        DirtyMemory::set_tracking(&memory, false);
        DirtyMemory::set_tracking(&memory, true);
    })
}

#[test]
fn system_calls_are_those_of_the_documentation() {
    let mut recorder = CallRecorder::default();
    let scenarios = [
        map_regions,
        fault,
        transfer,
        replace,
        wait_for_mappings,
        track,
    ];
    let memory = recorder.run("GuestMemoryMmap", memory);
    let dropped = memory.and_then(|memory| recorder.run("GuestMemoryMmap", || drop(memory)));
    let done = dropped.and_then(|()| scenarios.iter().try_for_each(|run| run(&mut recorder)));
    if let Err(error) = done {
        return skipped("system_calls_are_those_of_the_documentation", error);
    }
    let table = documented_calls(include_str!("../src/lib.rs"));
    assert_eq!(recorder.undocumented(&table), Vec::<String>::new());
    let unused = recorder.unused(&table).into_iter();
    // `fault_handler_alone` and the unit tests of the handler cover other signals. `verify/xen`
    // covers the memory of Xen guests, which needs its devices or their double.
    // The vDSO reads the clock on most hosts.
    let mut untested = vec![
        "atomic::RetiredMap::wait: clock_gettime",
        "iommu::Invalidation::wait: clock_gettime",
        "iommu::AskingIommu: clock_gettime",
        "other signal",
        "MmapRegion::from_range",
        "access to Xen memory",
    ];
    if fault::install().is_err() {
        let test = "system_calls_are_those_of_the_documentation: calls of faults";
        skipped(test, "the fault handler does not support this target");
        untested.extend([
            "fault::install",
            "access that faults",
            "GuestMemoryMmap: newfstatat",
        ]);
    }
    let is_tested = |call: &String| !untested.iter().any(|start| call.starts_with(start));
    let unused: Vec<_> = unused.filter(is_tested).collect();
    assert_eq!(unused, Vec::<String>::new());
}

/// Returns the calls of a function. Reports `test` as skipped if they cannot be recorded.
///
/// Some versions of the C library make `newfstatat` for `fstat`.
fn calls(test: &str, function: impl FnOnce() + Send) -> Option<BTreeSet<i64>> {
    let usual = |number| match number {
        libc::SYS_newfstatat => libc::SYS_fstat,
        number => number,
    };
    match record_calls(function) {
        Ok(((), calls)) => Some(calls.into_iter().map(usual).collect()),
        Err(error) => {
            skipped(test, format!("seccomp notifications: {error}"));
            None
        }
    }
}

/// Checks the calls of each constructor, of an access, and of the drop. `place` outlives all of
/// them, so that no file is closed.
fn assert_calls_of_mapping(test: &str, place: Option<&FileOffset>, expected: &[i64]) {
    let copy = || place.cloned();
    let access = |region: &MmapRegion| {
        let slice = region.as_volatile_slice();
        slice.write_obj(7u64, 8).unwrap();
        assert_eq!(slice.read_obj::<u64>(8).unwrap(), 7);
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = match place {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let new = || match copy() {
        Some(place) => access(&MmapRegion::from_file(place, SIZE).unwrap()),
        None => access(&MmapRegion::new(SIZE).unwrap()),
    };
    let build = || access(&MmapRegion::build(copy(), SIZE, prot, flags).unwrap());
    let builder = || {
        let builder = MmapRegionBuilder::new(SIZE);
        let builder = match copy() {
            Some(place) => builder.with_file_offset(place),
            None => builder,
        };
        access(&builder.build().unwrap());
    };
    let region = || drop(GuestRegionMmap::<()>::from_range(START, SIZE, copy()).unwrap());
    let memory = || {
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([(START, SIZE, copy())]);
        memory.unwrap().write_obj(7u64, START).unwrap();
    };
    let constructors: [(&str, &(dyn Fn() + Sync)); 5] = [
        ("new or from_file", &new),
        ("build", &build),
        ("MmapRegionBuilder", &builder),
        ("from_range", &region),
        ("from_ranges_with_files", &memory),
    ];
    for (name, constructor) in constructors {
        let Some(made) = calls(test, constructor) else {
            return;
        };
        assert_eq!(made, expected.iter().copied().collect(), "{name}");
    }
}

#[test]
fn mapping_of_file_calls_mmap_fstat_and_munmap_only() {
    let place = FileOffset::new(temp_file_of_len(SIZE as u64), 0);
    assert_calls_of_mapping(
        "mapping_of_file_calls_mmap_fstat_and_munmap_only",
        Some(&place),
        &[libc::SYS_mmap, libc::SYS_fstat, libc::SYS_munmap],
    );
}

#[test]
fn mapping_of_anonymous_memory_calls_mmap_and_munmap_only() {
    assert_calls_of_mapping(
        "mapping_of_anonymous_memory_calls_mmap_and_munmap_only",
        None,
        &[libc::SYS_mmap, libc::SYS_munmap],
    );
}

#[test]
fn marks_and_harvests_of_bitmap_make_no_system_call() {
    let page = NonZeroUsize::new(PAGE).unwrap();
    // The second size has a summary.
    for pages in [100usize, 1 << 22] {
        let bitmap = AtomicBitmap::new(pages * PAGE, page);
        let mut dirty = DirtyPages::new(pages * PAGE, page);
        let mut words = vec![0u64; pages.div_ceil(64)];
        let made = calls("marks_and_harvests_of_bitmap_make_no_system_call", || {
            bitmap.mark_dirty(5, 1);
            bitmap.set_addr_range(0, 70 * PAGE);
            bitmap.reset_addr_range(0, PAGE);
            bitmap.set_bit(99);
            bitmap.reset_bit(99);
            bitmap.harvest_into(&mut dirty);
            bitmap.put_back(&dirty);
            bitmap.harvest_words(&mut words);
            bitmap.set_from_words(PAGE, &words, page);
            bitmap.stop_tracking();
            bitmap.start_tracking();
            bitmap.reset();
        });
        let Some(made) = made else { return };
        assert_eq!(made, BTreeSet::new(), "{pages} pages");
    }
}

#[test]
fn marks_and_harvests_of_memory_make_no_system_call() {
    let page = NonZeroUsize::new(PAGE).unwrap();
    let ranges = [(START, 0x8000), (GuestAddress(0x1_0000), 0x8000)];
    let memory = Memory::from_ranges(&ranges).unwrap();
    let mut dirty = DirtyMemory::new();
    // The first harvest allocates the buffers.
    dirty.harvest(&memory);
    let log = LogWords::new(GuestAddress(0x2000), &[0b101], page);
    let made = calls("marks_and_harvests_of_memory_make_no_system_call", || {
        memory.write_obj(1u64, GuestAddress(0x1000)).unwrap();
        DirtyMemory::mark(&memory, &log);
        dirty.put_back(&memory);
        DirtyMemory::set_tracking(&memory, false);
        DirtyMemory::set_tracking(&memory, true);
        dirty.clear();
        dirty.harvest_with(&memory, &[log]);
        dirty.add_log(&memory, &log);
        assert_eq!(dirty.total_bytes(), 0x3000);
    });
    let Some(made) = made else { return };
    assert_eq!(made, BTreeSet::new());
}
