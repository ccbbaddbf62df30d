//! Ranges that are refused when the region is created.

use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestAddress, MmapRange, MmapRegion, MmapXenFlags};

use super::setup::{advance, grant_address, grant_run, lazy_flags, long, range, FIRST, GRANTED};
use super::Scenario;
use crate::environment::{Access, Environment, PAGE};
use crate::outcome::Outcome;

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        xen_range_without_file_is_refused,
        xen_range_with_file_offset_is_refused,
        xen_range_with_map_fixed_is_refused,
        xen_range_with_invalid_flags_is_refused,
    ],
    X9: [
        granted_range_without_bit_63_is_refused,
    ],
    X10: [
        granted_range_over_32_bits_of_references_is_refused,
        granted_range_that_ends_past_32_bits_of_references_is_refused,
    ],
    X11: [
        granted_range_of_domain_over_16_bits_is_refused,
    ],
    X18: [
        granted_range_of_more_than_32_bits_of_pages_is_refused,
    ],
    X25: [
        xen_range_with_map_anonymous_is_refused,
    ],
];

/// The flags of the ranges that need a device.
fn kinds() -> [u32; 3] {
    [MmapXenFlags::FOREIGN.bits(), advance(), lazy_flags()]
}

fn error(range: MmapRange, what: &str) -> MmapRegionError {
    match MmapRegion::<()>::from_range(range) {
        Ok(_) => panic!("{what} is not refused"),
        Err(error) => error,
    }
}

fn xen_range_without_file_is_refused(env: &mut dyn Environment) -> Outcome {
    for flags in kinds() {
        let range = MmapRange::new(PAGE, None, grant_address(FIRST, 0), flags, env.domain());
        let error = error(range, "a range without a file");
        assert!(
            matches!(error, MmapRegionError::InvalidFileOffset),
            "{error:?}"
        );
    }
    Ok(())
}

fn xen_range_with_file_offset_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    for flags in kinds() {
        let file = FileOffset::new(device.try_clone()?, 0x1000);
        let at = grant_address(FIRST, 0);
        let range = MmapRange::new(PAGE, Some(file), at, flags, env.domain());
        let error = error(range, "a range with an offset in its file");
        assert!(
            matches!(error, MmapRegionError::InvalidOffsetLength),
            "{error:?}"
        );
    }
    Ok(())
}

fn xen_range_with_map_fixed_is_refused(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    for flags in kinds() {
        let mut range = range(&device, grant_address(FIRST, 0), PAGE, flags, env.domain())?;
        range.set_flags(libc::MAP_SHARED | libc::MAP_FIXED);
        let error = error(range, "a range with MAP_FIXED");
        assert!(matches!(error, MmapRegionError::MapFixed), "{error:?}");
    }
    Ok(())
}

fn xen_range_with_map_anonymous_is_refused(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let frame = GuestAddress(env.frames().start * long(PAGE));
    let grant = grant_address(FIRST, 0);
    for (flags, device, at) in [
        (MmapXenFlags::FOREIGN.bits(), env.privcmd()?, frame),
        (advance(), env.gntdev()?, grant),
        (lazy_flags(), env.gntdev()?, grant),
    ] {
        let mut range = range(&device, at, PAGE, flags, env.domain())?;
        range.set_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        match error(range, "a range with MAP_ANONYMOUS") {
            MmapRegionError::Mmap(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL)),
            other => panic!("{flags:#x}: {other:?}"),
        }
    }
    Ok(())
}

fn xen_range_with_invalid_flags_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    for flags in [0x3, 0x4, 0x8, 0x9, 0xb, 0x10, 0x102, u32::MAX] {
        let range = range(&device, grant_address(FIRST, 0), PAGE, flags, env.domain())?;
        match error(range, "a range with invalid flags") {
            MmapRegionError::MmapFlags(bits) => assert_eq!(bits, flags),
            other => panic!("{flags:#x}: {other:?}"),
        }
    }
    Ok(())
}

fn granted_range_without_bit_63_is_refused(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    for flags in [advance(), lazy_flags()] {
        let at = GuestAddress(grant_address(FIRST, 0).0 & !GRANTED);
        let range = range(&device, at, PAGE, flags, env.domain())?;
        error(range, "an address without the bit of granted pages");
    }
    Ok(())
}

fn granted_range_over_32_bits_of_references_is_refused(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    for flags in [advance(), lazy_flags()] {
        let at = GuestAddress(grant_address(FIRST, 0).0 + (1 << 44));
        let range = range(&device, at, PAGE, flags, env.domain())?;
        error(range, "a reference over 32 bits");
    }
    Ok(())
}

fn granted_range_that_ends_past_32_bits_of_references_is_refused(
    env: &mut dyn Environment,
) -> Outcome {
    let device = env.gntdev()?;
    for flags in [advance(), lazy_flags()] {
        let range = range(
            &device,
            grant_address(u32::MAX, 0x800),
            PAGE,
            flags,
            env.domain(),
        )?;
        error(range, "a range that ends past the last reference");
    }
    // The last reference itself is accepted.
    let last = grant_address(u32::MAX, 0x800);
    let range = range(&device, last, PAGE / 2, lazy_flags(), env.domain())?;
    assert!(MmapRegion::<()>::from_range(range).is_ok());
    Ok(())
}

fn granted_range_of_domain_over_16_bits_is_refused(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    for flags in [advance(), lazy_flags()] {
        let domain = env.domain() + 0x1_0000;
        let range = range(&device, grant_address(FIRST, 0), PAGE, flags, domain)?;
        error(range, "a domain over 16 bits");
    }
    Ok(())
}

fn granted_range_of_more_than_32_bits_of_pages_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    let size = (1 << 32) * PAGE + PAGE;
    let range = range(
        &device,
        grant_address(0, 0),
        size,
        lazy_flags(),
        env.domain(),
    )?;
    error(range, "a range of more pages than 32 bits count");
    Ok(())
}
