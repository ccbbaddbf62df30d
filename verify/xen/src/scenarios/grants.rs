//! Grants that are mapped in advance (`GRANT`).

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion};

use super::setup::{
    advance, assert_calls, assert_released, forget_calls, grant_address, grant_run, long, memory,
    pattern, range, seen, skip, FIRST,
};
use super::Scenario;
use crate::environment::{mapped, Access, Environment, PAGE};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        granted_region_in_advance_is_shared_with_domain,
        granted_region_in_advance_is_mapped_until_dropped,
        granted_region_in_advance_for_reading_maps_for_reading,
        granted_region_in_advance_has_its_flags_and_domain,
    ],
    X3: [
        granted_region_in_advance_with_bad_reference_is_refused_and_released,
        granted_region_in_advance_with_read_only_grant_is_refused_and_released,
    ],
    X4: [
        granted_region_in_advance_that_cannot_be_mapped_is_released,
    ],
    X8: [
        granted_region_in_advance_inside_page_begins_there,
        granted_region_in_advance_counts_pages_from_its_offset,
    ],
    X17: [
        granted_region_in_advance_of_more_than_a_request_is_mapped,
    ],
];

fn in_advance(
    env: &dyn Environment,
    device: &std::fs::File,
    at: GuestAddress,
    size: usize,
) -> Outcome<GuestMemoryMmap> {
    memory(range(device, at, size, advance(), env.domain())?, at)
}

fn granted_region_in_advance_is_shared_with_domain(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 4, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory = in_advance(env, &device, grant_address(FIRST, 0), 4 * PAGE)?;
    forget_calls(env);
    let bytes = pattern(2 * PAGE);
    memory.write_slice(&bytes, grant_address(FIRST, 0x800))?;
    assert_eq!(seen(env, 0, 0x800, bytes.len()), bytes);
    env.write(3, 8, &0x1122_3344u32.to_ne_bytes());
    let value: u32 = memory.load(grant_address(FIRST + 3, 8), Ordering::Acquire)?;
    assert_eq!(value, 0x1122_3344);
    memory.store(0x99u16, grant_address(FIRST + 3, 12), Ordering::Release)?;
    assert_eq!(seen(env, 3, 12, 2), 0x99u16.to_ne_bytes());
    assert_calls(env, &[], "accesses to memory that is mapped");
    Ok(())
}

fn granted_region_in_advance_is_mapped_until_dropped(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 3, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory = in_advance(env, &device, grant_address(FIRST, 0), 3 * PAGE)?;
    assert_eq!(mapped(env), [FIRST, FIRST + 1, FIRST + 2]);
    assert!(env.in_use(FIRST).writing);
    drop(memory);
    assert_released(env, "after the drop");
    Ok(())
}

fn granted_region_in_advance_for_reading_maps_for_reading(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadOnly);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut range = range(&device, at, PAGE, advance(), env.domain())?;
    range.set_prot(libc::PROT_READ);
    let memory: GuestMemoryMmap = memory(range, at)?;
    let in_use = env.in_use(FIRST);
    assert!(in_use.reading && !in_use.writing, "{in_use:?}");
    env.write(0, 0, &5u64.to_ne_bytes());
    assert_eq!(memory.read_obj::<u64>(at)?, 5);
    assert!(memory.write_obj(6u64, at).is_err());
    Ok(())
}

fn granted_region_in_advance_has_its_flags_and_domain(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let range = range(
        &device,
        grant_address(FIRST, 0),
        PAGE,
        advance(),
        env.domain(),
    )?;
    let region = MmapRegion::<()>::from_range(range)?;
    assert_eq!(region.xen_mmap_flags(), advance());
    assert_eq!(region.xen_mmap_data(), env.domain());
    assert!(!region.as_ptr().is_null());
    assert_eq!(region.size(), PAGE);
    assert!(region.file_offset().is_some());
    Ok(())
}

fn granted_region_in_advance_with_bad_reference_is_refused_and_released(
    env: &mut dyn Environment,
) -> Outcome {
    grant_run(env, FIRST, 4, Access::ReadWrite);
    env.revoke(FIRST + 2);
    let device = env.gntdev()?;
    let result = in_advance(env, &device, grant_address(FIRST, 0), 4 * PAGE);
    expect_errno(
        result,
        libc::EINVAL,
        "mapping of a reference that is not granted",
    )?;
    assert_released(env, "after the error");
    Ok(())
}

fn granted_region_in_advance_with_read_only_grant_is_refused_and_released(
    env: &mut dyn Environment,
) -> Outcome {
    grant_run(env, FIRST, 4, Access::ReadWrite);
    env.grant(FIRST + 1, 1, Access::ReadOnly);
    let device = env.gntdev()?;
    let result = in_advance(env, &device, grant_address(FIRST, 0), 4 * PAGE);
    expect_errno(
        result,
        libc::EINVAL,
        "mapping of a read-only grant for writing",
    )?;
    assert_released(env, "after the error");
    Ok(())
}

fn granted_region_in_advance_that_cannot_be_mapped_is_released(
    env: &mut dyn Environment,
) -> Outcome {
    grant_run(env, FIRST, 2, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    // gntdev refuses a private mapping for writing, after MAP_GRANT_REF has succeeded.
    let mut private = range(&device, at, 2 * PAGE, advance(), env.domain())?;
    private.set_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    match memory::<()>(private, at) {
        // A library may also make it shared.
        Ok(memory) => drop(memory),
        Err(stop) if stop.errno() == Some(libc::EINVAL) => {}
        Err(stop) => return Err(stop),
    }
    assert_released(env, "after the error");
    let table = env.audit();
    assert!(table.is_empty(), "{table:?}");
    Ok(())
}

fn granted_region_in_advance_inside_page_begins_there(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory = in_advance(env, &device, grant_address(FIRST, 0x400), 0x100)?;
    env.write(0, 0x3f8, &pattern(0x110));
    let mut read = [0; 0x100];
    memory.read_slice(&mut read, grant_address(FIRST, 0x400))?;
    assert_eq!(read[..], pattern(0x110)[8..0x108]);
    memory.write_obj(0xa5u8, grant_address(FIRST, 0x4ff))?;
    assert_eq!(seen(env, 0, 0x4ff, 1), [0xa5]);
    assert!(memory.read_obj::<u8>(grant_address(FIRST, 0x500)).is_err());
    Ok(())
}

fn granted_region_in_advance_counts_pages_from_its_offset(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 2, Access::ReadWrite);
    let device = env.gntdev()?;
    let start = grant_address(FIRST, 0xf00);
    let memory = in_advance(env, &device, start, 0x200)?;
    assert_eq!(mapped(env), [FIRST, FIRST + 1]);
    let bytes = pattern(0x200);
    memory.write_slice(&bytes, start)?;
    assert_eq!(seen(env, 0, 0xf00, 0x200), bytes);
    Ok(())
}

fn granted_region_in_advance_of_more_than_a_request_is_mapped(
    env: &mut dyn Environment,
) -> Outcome {
    let device = env.gntdev()?;
    let Some(double) = env.as_double() else {
        return Err(skip("the domain does not have 65537 pages"));
    };
    let pages = 65_537;
    double.grant_long_run(FIRST, pages);
    let start = grant_address(FIRST, 0);
    let last = GuestAddress(start.0 + long((pages - 1) * PAGE));
    let memory = in_advance(env, &device, start, pages * PAGE)?;
    memory.write_obj(1u32, start)?;
    memory.write_obj(0x1122_3344u32, last)?;
    assert_eq!(seen(env, pages - 1, 0, 4), 0x1122_3344u32.to_ne_bytes());
    assert_eq!(seen(env, 0, 0, 4), 1u32.to_ne_bytes());
    Ok(())
}
