//! Accesses to grants that are mapped at each access (`GRANT | NO_ADVANCE_MAP`).

use std::sync::atomic::Ordering;
use std::thread;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::iommu::{Error as IommuError, Iommu, Iotlb, IotlbIterator};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, IommuMemory, MemoryRegionAddress, Permissions, ReadVolatile, VolatileMemory,
};

use super::setup::{
    assert_calls, assert_released, at_address, calls_of_access, forget_calls, grant_address,
    grant_run, granted_lazy, lazy, lazy_flags, long, memory, pattern, range, seen, silent, FIRST,
};
use super::Scenario;
use crate::environment::{Access, Environment, PAGE};
use crate::outcome::Outcome;

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        read_obj_maps_one_page_for_reading,
        write_obj_maps_one_page_for_writing,
        write_obj_over_page_boundary_maps_both_pages,
        slices_over_pages_reach_domain,
        read_of_read_only_grant_succeeds,
        access_over_regions_maps_pages_of_each,
        element_types_keep_their_bytes,
        dirty_marks_follow_writes,
        translated_access_maps_its_page,
        swapped_memory_is_accessed,
    ],
    X1: [
        load_and_store_reach_domain,
        load_and_store_at_start_of_region_reach_domain,
        copies_between_slices_reach_domain,
        references_to_lazy_memory_are_refused,
    ],
    X5: [
        access_by_region_offset_maps_its_page,
        stream_of_few_bytes_into_large_slice_maps_its_page,
        copy_to_small_buffer_maps_its_page,
    ],
    X6: [
        copies_of_arrays_move_all_elements,
    ],
    X8: [
        lazy_region_inside_page_begins_there,
    ],
    X20: [
        threads_on_one_region_see_their_pages,
    ],
];

/// The number of pages of a large region, of which the first few are granted.
const LARGE: usize = 256;

fn read_obj_maps_one_page_for_reading(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    env.write(1, 8, &0x0102_0304_0506_0708u64.to_ne_bytes());
    forget_calls(env);
    let value: u64 = memory.read_obj(grant_address(FIRST + 1, 8))?;
    assert_eq!(value, 0x0102_0304_0506_0708);
    assert_calls(env, &calls_of_access(FIRST + 1, 1, false), "read_obj");
    assert_released(env, "after the access");
    Ok(())
}

fn write_obj_maps_one_page_for_writing(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    forget_calls(env);
    memory.write_obj(0x1122_3344u32, grant_address(FIRST + 1, PAGE - 4))?;
    assert_eq!(seen(env, 1, PAGE - 4, 4), 0x1122_3344u32.to_ne_bytes());
    assert_calls(env, &calls_of_access(FIRST + 1, 1, true), "write_obj");
    assert_released(env, "after the access");
    Ok(())
}

fn write_obj_over_page_boundary_maps_both_pages(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 3)?;
    forget_calls(env);
    memory.write_obj(0x1122_3344u32, grant_address(FIRST, PAGE - 2))?;
    assert_calls(
        env,
        &calls_of_access(FIRST, 2, true),
        "write_obj over two pages",
    );
    assert_eq!(seen(env, 0, PAGE - 2, 4), 0x1122_3344u32.to_ne_bytes());
    Ok(())
}

fn slices_over_pages_reach_domain(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 4)?;
    let bytes = pattern(2 * PAGE + 32);
    memory.write_slice(&bytes, grant_address(FIRST, PAGE - 16))?;
    assert_eq!(seen(env, 0, PAGE - 16, bytes.len()), bytes);
    let mut read = vec![0; bytes.len()];
    memory.read_slice(&mut read, grant_address(FIRST, PAGE - 16))?;
    assert_eq!(read, bytes);
    assert_released(env, "after the accesses");
    Ok(())
}

fn read_of_read_only_grant_succeeds(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadOnly);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 1)?;
    env.write(0, 0, &7u32.to_ne_bytes());
    assert_eq!(memory.read_obj::<u32>(grant_address(FIRST, 0))?, 7);
    Ok(())
}

fn access_over_regions_maps_pages_of_each(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 2, Access::ReadWrite);
    let device = env.gntdev()?;
    let region = |reference: u32| -> Outcome<_> {
        let at = grant_address(reference, 0);
        let range = range(&device, at, PAGE, lazy_flags(), env.domain())?;
        Ok(at_address(vm_memory::MmapRegion::from_range(range)?, at))
    };
    let regions = vec![region(FIRST)?, region(FIRST + 1)?];
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(regions)?;
    let bytes = pattern(64);
    memory.write_slice(&bytes, grant_address(FIRST, PAGE - 32))?;
    assert_eq!(seen(env, 0, PAGE - 32, 64), bytes);
    let value: u64 = memory.read_obj(grant_address(FIRST, PAGE - 4))?;
    assert_eq!(value.to_ne_bytes(), bytes[28..36]);
    assert_released(env, "after the accesses");
    Ok(())
}

fn element_types_keep_their_bytes(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    // A value at each alignment, and over the end of the page.
    for at in (0..16).chain(PAGE - 8..PAGE + 8) {
        memory.write_obj(
            0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00u128,
            grant_address(FIRST, at),
        )?;
        let value: u128 = memory.read_obj(grant_address(FIRST, at))?;
        assert_eq!(value, 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00, "{at:#x}");
        let value: u16 = memory.read_obj(grant_address(FIRST, at + 3))?;
        assert_eq!(value.to_ne_bytes(), seen(env, 0, at + 3, 2)[..], "{at:#x}");
    }
    Ok(())
}

fn dirty_marks_follow_writes(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 4, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap<AtomicBitmap> = lazy(env, &device, FIRST, 4)?;
    memory.write_obj(1u32, grant_address(FIRST + 1, PAGE - 2))?;
    memory.read_obj::<u32>(grant_address(FIRST, 0))?;
    let region = memory
        .find_region(grant_address(FIRST, 0))
        .expect("the region is there");
    let dirty = [0, 1, 2, 3].map(|page| region.bitmap().dirty_at(page * PAGE));
    assert_eq!(dirty, [false, true, true, false]);
    Ok(())
}

/// An IOMMU with a table that does not change.
#[derive(Debug)]
struct Table(Iotlb);

impl Iommu for Table {
    type IotlbGuard<'a> = &'a Iotlb;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<&Iotlb>, IommuError> {
        Iotlb::lookup(&self.0, iova, length, access).map_err(|_| IommuError::CannotResolve {
            iova_range: vm_memory::iommu::IovaRange { base: iova, length },
            reason: "the table does not have it".to_owned(),
        })
    }
}

fn translated_access_maps_its_page(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    let mut table = Iotlb::new();
    let both = Permissions::ReadWrite;
    for (iova, reference) in [(0x5000, FIRST + 1), (0x6000, FIRST)] {
        let mapped = table.set_mapping(GuestAddress(iova), grant_address(reference, 0), PAGE, both);
        mapped.expect("the ranges do not overlap");
    }
    let memory = IommuMemory::new(memory, Table(table), true, ());
    let bytes = pattern(32);
    memory.write_slice(&bytes, GuestAddress(0x5ff0))?;
    assert_eq!(seen(env, 1, 0xff0, 16), bytes[..16]);
    assert_eq!(seen(env, 0, 0, 16), bytes[16..]);
    let value: u32 = memory.load(GuestAddress(0x5ff0), Ordering::Relaxed)?;
    assert_eq!(value.to_ne_bytes(), bytes[..4]);
    assert_released(env, "after the accesses");
    Ok(())
}

fn swapped_memory_is_accessed(env: &mut dyn Environment) -> Outcome {
    let (device, memory) = granted_lazy(env, 2)?;
    let shared = GuestMemoryAtomic::new(memory);
    shared
        .memory()
        .write_obj(3u32, grant_address(FIRST + 1, 0))?;
    let smaller = lazy(env, &device, FIRST, 1)?;
    shared.lock().expect("no thread panicked").replace(smaller);
    assert!(shared
        .memory()
        .read_obj::<u32>(grant_address(FIRST + 1, 0))
        .is_err());
    shared.memory().write_obj(4u32, grant_address(FIRST, 0))?;
    assert_eq!(seen(env, 0, 0, 4), 4u32.to_ne_bytes());
    assert_eq!(seen(env, 1, 0, 4), 3u32.to_ne_bytes());
    Ok(())
}

fn load_and_store_reach_domain(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    env.write(1, 16, &0x1122_3344u32.to_ne_bytes());
    forget_calls(env);
    let value: u32 = memory.load(grant_address(FIRST + 1, 16), Ordering::SeqCst)?;
    assert_eq!(value, 0x1122_3344);
    assert_calls(env, &calls_of_access(FIRST + 1, 1, false), "load");
    forget_calls(env);
    memory.store(0x55u8, grant_address(FIRST + 1, 17), Ordering::SeqCst)?;
    assert_calls(env, &calls_of_access(FIRST + 1, 1, true), "store");
    assert_eq!(seen(env, 1, 17, 1), [0x55]);
    assert_released(env, "after the accesses");
    Ok(())
}

fn load_and_store_at_start_of_region_reach_domain(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 1)?;
    env.write(0, 0, &0x1122_3344_5566_7788u64.to_ne_bytes());
    let value: u64 = memory.load(grant_address(FIRST, 0), Ordering::Acquire)?;
    assert_eq!(value, 0x1122_3344_5566_7788);
    memory.store(0x99aau16, grant_address(FIRST, 0), Ordering::Release)?;
    assert_eq!(seen(env, 0, 0, 2), 0x99aau16.to_ne_bytes());
    let result = memory.load::<u64>(grant_address(FIRST, 4), Ordering::Acquire);
    assert!(result.is_err(), "a load that is not aligned succeeds");
    Ok(())
}

fn copies_between_slices_reach_domain(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 4)?;
    let bytes = pattern(PAGE + 64);
    env.write(0, 0, &bytes);
    let from = memory.get_slice(grant_address(FIRST, 0), bytes.len())?;
    // Into mapped memory, out of it, and from one page to another.
    let mut buf = vec![0u8; bytes.len()];
    let plain = vm_memory::VolatileSlice::from(buf.as_mut_slice());
    silent(env, || from.copy_to_volatile_slice(plain))?;
    assert_eq!(buf, bytes);
    let to = memory.get_slice(grant_address(FIRST + 2, 32), bytes.len())?;
    silent(env, || from.copy_to_volatile_slice(to))?;
    assert_eq!(seen(env, 2, 32, bytes.len()), bytes);
    buf.fill(0x5a);
    let plain = vm_memory::VolatileSlice::from(buf.as_mut_slice());
    silent(env, || plain.copy_to_volatile_slice(to))?;
    assert_eq!(seen(env, 2, 32, bytes.len()), vec![0x5a; bytes.len()]);
    // Two slices that overlap.
    let overlapping = memory.get_slice(grant_address(FIRST, 16), bytes.len())?;
    silent(env, || from.copy_to_volatile_slice(overlapping))?;
    assert_eq!(seen(env, 0, 16, bytes.len()), bytes);
    assert_released(env, "after the copies");
    Ok(())
}

#[expect(unsafe_code, reason = "aligned_as_ref is unsafe")]
fn references_to_lazy_memory_are_refused(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 1)?;
    let slice = memory.get_slice(grant_address(FIRST, 0), PAGE)?;
    let atomic = slice.get_atomic_ref::<std::sync::atomic::AtomicU32>(0);
    assert!(
        atomic.is_err(),
        "get_atomic_ref points to memory that is not mapped"
    );
    // SAFETY: no guest accesses the page of the double, and the result is not used.
    let plain = unsafe { slice.aligned_as_ref::<u32>(0) }.map(|_| ());
    assert!(
        plain.is_err(),
        "aligned_as_ref points to memory that is not mapped"
    );
    // SAFETY: no guest accesses the page of the double, and the result is not used.
    let plain = unsafe { slice.aligned_as_mut::<u32>(0) }.map(|_| ());
    assert!(
        plain.is_err(),
        "aligned_as_mut points to memory that is not mapped"
    );
    assert_released(env, "after the refusals");
    Ok(())
}

fn access_by_region_offset_maps_its_page(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 8, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, LARGE)?;
    let region = memory
        .find_region(grant_address(FIRST, 0))
        .expect("the region is there");
    forget_calls(env);
    region.write_obj(0x1122_3344u32, MemoryRegionAddress(0x3010))?;
    assert_calls(
        env,
        &calls_of_access(FIRST + 3, 1, true),
        "write_obj of the region",
    );
    assert_eq!(seen(env, 3, 0x10, 4), 0x1122_3344u32.to_ne_bytes());
    assert_eq!(
        region.read_obj::<u32>(MemoryRegionAddress(0x3010))?,
        0x1122_3344
    );
    let mut read = [0; 2];
    region.read_slice(&mut read, MemoryRegionAddress(0x3010))?;
    assert_eq!(read, 0x1122_3344u32.to_ne_bytes()[..2]);
    Ok(())
}

fn stream_of_few_bytes_into_large_slice_maps_its_page(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 8, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, LARGE)?;
    let mut slice = memory.get_slice(grant_address(FIRST, 0x10), (LARGE - 1) * PAGE)?;
    let mut source = &b"few bytes"[..];
    forget_calls(env);
    let read = source.read_volatile(&mut slice)?;
    assert_eq!((read, source.len()), (9, 0));
    assert_calls(env, &calls_of_access(FIRST, 1, true), "read_volatile");
    assert_eq!(seen(env, 0, 0x10, 9), b"few bytes");
    Ok(())
}

fn copy_to_small_buffer_maps_its_page(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 8, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, LARGE)?;
    env.write(1, 0, &pattern(16));
    let slice = memory.get_slice(grant_address(FIRST + 1, 0), (LARGE - 1) * PAGE)?;
    forget_calls(env);
    let mut buf = [0u8; 16];
    let copied = silent(env, || slice.copy_to(&mut buf))?;
    assert_eq!((copied, &buf[..]), (16, &pattern(16)[..]));
    assert_calls(env, &calls_of_access(FIRST + 1, 1, false), "copy_to");
    silent(env, || slice.copy_from(&[1u16, 2, 3]))?;
    assert_eq!(seen(env, 1, 2, 2), 2u16.to_ne_bytes());
    assert_released(env, "after the copies");
    Ok(())
}

fn copies_of_arrays_move_all_elements(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 9)?;
    let elements: Vec<u64> = (1..=long(PAGE)).collect();
    let slice = memory.get_slice(grant_address(FIRST, 0), 9 * PAGE)?;
    let array = slice.get_array_ref::<u64>(16, elements.len())?;
    // 32 KiB, where 0.18.0 maps 4 KiB.
    silent(env, || array.copy_from(&elements))?;
    let bytes: Vec<u8> = elements
        .iter()
        .flat_map(|element| element.to_ne_bytes())
        .collect();
    assert_eq!(seen(env, 0, 16, bytes.len()), bytes);
    let mut read = vec![0u64; elements.len()];
    let copied = silent(env, || array.copy_to(&mut read))?;
    assert_eq!(copied, elements.len());
    assert_eq!(read, elements);
    assert_eq!(array.ptr_guard().len(), bytes.len());
    let value = silent(env, || array.load(513))?;
    assert_eq!(value, 514);
    silent(env, || array.store(600, 77))?;
    assert_eq!(seen(env, 1, 16 + 600 * 8 - PAGE, 8), 77u64.to_ne_bytes());
    assert_released(env, "after the copies");
    Ok(())
}

fn lazy_region_inside_page_begins_there(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 2, Access::ReadWrite);
    let device = env.gntdev()?;
    let start = grant_address(FIRST, 0x400);
    let range = range(&device, start, PAGE, lazy_flags(), env.domain())?;
    let memory: GuestMemoryMmap = memory(range, start)?;
    env.write(0, 0, &pattern(2 * PAGE));
    let mut read = vec![0; PAGE];
    memory.read_slice(&mut read, start)?;
    assert_eq!(read, pattern(2 * PAGE)[0x400..0x400 + PAGE]);
    forget_calls(env);
    memory.write_obj(0xa5u8, grant_address(FIRST + 1, 0x3ff))?;
    assert_calls(env, &calls_of_access(FIRST + 1, 1, true), "write_obj");
    assert_eq!(seen(env, 1, 0x3ff, 1), [0xa5]);
    let value: u32 = memory.load(grant_address(FIRST, 0x404), Ordering::Relaxed)?;
    assert_eq!(value.to_ne_bytes(), pattern(0x408)[0x404..]);
    assert!(memory
        .read_obj::<u8>(grant_address(FIRST + 1, 0x400))
        .is_err());
    Ok(())
}

fn threads_on_one_region_see_their_pages(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 4)?;
    let result: Outcome = thread::scope(|scope| {
        let threads: Vec<_> = (0..4u32)
            .map(|page| {
                let memory = &memory;
                scope.spawn(move || -> Outcome {
                    for round in 0..10u32 {
                        let at = grant_address(FIRST + page, 64);
                        memory.write_obj(round << 8 | page, at)?;
                        assert_eq!(memory.read_obj::<u32>(at)?, round << 8 | page);
                    }
                    Ok(())
                })
            })
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Outcome>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().try_for_each(join)
    });
    result?;
    assert_released(env, "after the threads");
    Ok(())
}
