//! Frames of the domain, which are mapped in advance (`FOREIGN`).

use std::fs::File;

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, MmapXenFlags, Permissions};

use super::setup::{
    assert_calls, forget_calls, grant_address, lazy, long, memory, pattern, range, seen, skip,
    FIRST,
};
use super::Scenario;
use crate::outcome::{expect_errno, Outcome};
use crate::world::{Access, World, NOBODY, PAGE, PAGES};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        foreign_region_is_shared_with_domain,
        foreign_region_and_grant_show_same_bytes,
        foreign_region_for_reading_refuses_writes,
    ],
    X7: [
        foreign_region_with_missing_frame_is_refused,
        foreign_region_of_missing_frames_is_refused,
        foreign_region_of_unknown_domain_is_refused,
        foreign_region_with_frame_paged_out_is_tried_again,
        foreign_region_with_frame_always_paged_out_is_refused,
    ],
    X8: [
        foreign_region_inside_page_begins_there,
    ],
    X11: [
        foreign_region_of_domain_over_16_bits_is_refused,
    ],
    X18: [
        foreign_region_of_more_than_32_bits_of_frames_is_refused,
    ],
];

/// Returns the guest address of a byte of the domain's pages.
fn address(world: &dyn World, page: usize, offset: usize) -> GuestAddress {
    GuestAddress((world.frames().start + long(page)) * long(PAGE) + long(offset))
}

/// Returns a memory of frames that begins at `at`.
fn foreign(device: &File, at: GuestAddress, size: usize, domain: u32) -> Outcome<GuestMemoryMmap> {
    memory(
        range(device, at, size, MmapXenFlags::FOREIGN.bits(), domain)?,
        at,
    )
}

fn foreign_region_is_shared_with_domain(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, 0, 0);
    let memory = foreign(&device, start, PAGES * PAGE, world.domain())?;
    forget_calls(world);
    let bytes = pattern(3 * PAGE);
    memory.write_slice(&bytes, address(world, 1, 100))?;
    assert_eq!(seen(world, 1, 100, bytes.len()), bytes);
    world.write(PAGES - 1, PAGE - 8, &0x0102_0304_0506_0708u64.to_ne_bytes());
    let value: u64 = memory.read_obj(address(world, PAGES - 1, PAGE - 8))?;
    assert_eq!(value, 0x0102_0304_0506_0708);
    assert_calls(world, &[], "accesses to memory that is mapped");
    Ok(())
}

fn foreign_region_and_grant_show_same_bytes(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, 2, 0);
    let frames = foreign(&device, start, 2 * PAGE, world.domain())?;
    world.grant(FIRST, 3, Access::ReadWrite);
    let device = world.gntdev()?;
    let grants: GuestMemoryMmap = lazy(world, &device, FIRST, 1)?;
    frames.write_obj(0x1122_3344u32, address(world, 3, 16))?;
    assert_eq!(
        grants.read_obj::<u32>(grant_address(FIRST, 16))?,
        0x1122_3344
    );
    grants.write_obj(0x5566_7788u32, grant_address(FIRST, 20))?;
    assert_eq!(frames.read_obj::<u32>(address(world, 3, 20))?, 0x5566_7788);
    Ok(())
}

fn foreign_region_for_reading_refuses_writes(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, 0, 0);
    let mut range = range(
        &device,
        start,
        PAGE,
        MmapXenFlags::FOREIGN.bits(),
        world.domain(),
    )?;
    range.set_prot(libc::PROT_READ);
    let memory: GuestMemoryMmap = memory(range, start)?;
    world.write(0, 0, &7u32.to_ne_bytes());
    assert_eq!(memory.read_obj::<u32>(start)?, 7);
    assert!(!memory.check_range(start, 4, Permissions::Write));
    assert!(memory.write_obj(8u32, start).is_err());
    assert_eq!(seen(world, 0, 0, 4), 7u32.to_ne_bytes());
    Ok(())
}

fn foreign_region_with_missing_frame_is_refused(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, PAGES - 2, 0);
    let result = foreign(&device, start, 4 * PAGE, world.domain());
    expect_any_errno(result, "mapping of a frame that does not exist")
}

fn foreign_region_of_missing_frames_is_refused(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, PAGES, 0);
    let result = foreign(&device, start, PAGE, world.domain());
    expect_any_errno(result, "mapping of a frame that does not exist")
}

fn foreign_region_of_unknown_domain_is_refused(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, 0, 0);
    let result = foreign(&device, start, PAGE, NOBODY);
    expect_any_errno(result, "mapping of a domain that does not exist")
}

/// Requires an error of the system. Its number depends on the kind of host and of domain.
fn expect_any_errno(result: Outcome<GuestMemoryMmap>, what: &str) -> Outcome {
    match result {
        Ok(_) => panic!("{what} succeeded"),
        Err(stop) if stop.errno().is_some() => Ok(()),
        Err(stop) => panic!("{what} must fail with an error of the system, not with {stop:?}"),
    }
}

fn foreign_region_with_frame_paged_out_is_tried_again(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let frame = world.frames().start + 1;
    let Some(double) = world.as_double() else {
        return Err(skip("the domain's pages cannot be paged out"));
    };
    double.page_out(frame, 2);
    let memory = foreign(&device, address(world, 0, 0), 3 * PAGE, world.domain())?;
    world.write(1, 0, &9u32.to_ne_bytes());
    assert_eq!(memory.read_obj::<u32>(address(world, 1, 0))?, 9);
    Ok(())
}

fn foreign_region_with_frame_always_paged_out_is_refused(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let frame = world.frames().start + 1;
    let Some(double) = world.as_double() else {
        return Err(skip("the domain's pages cannot be paged out"));
    };
    double.page_out(frame, u32::MAX);
    let result = foreign(&device, address(world, 0, 0), 3 * PAGE, world.domain());
    expect_errno(
        result,
        libc::ENOENT,
        "mapping of a frame that stays paged out",
    )
}

fn foreign_region_inside_page_begins_there(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, 1, 0x400);
    // From 0x400 of page 1 to 0x200 of page 3: three frames, although the length needs only two.
    let memory = foreign(&device, start, 2 * PAGE - 0x200, world.domain())?;
    let bytes = pattern(3 * PAGE);
    world.write(1, 0, &bytes);
    let mut read = vec![0; 2 * PAGE - 0x200];
    memory.read_slice(&mut read, start)?;
    assert_eq!(read, bytes[0x400..0x400 + read.len()]);
    memory.write_obj(0xa5u8, GuestAddress(start.0 + long(read.len()) - 1))?;
    assert_eq!(seen(world, 3, 0x1ff, 1), [0xa5]);
    Ok(())
}

fn foreign_region_of_domain_over_16_bits_is_refused(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = address(world, 0, 0);
    match foreign(&device, start, PAGE, 0x1_0000 + world.domain()) {
        Ok(_) => panic!("another domain is mapped"),
        Err(_) => Ok(()),
    }
}

#[cfg(feature = "additions")]
fn foreign_region_of_more_than_32_bits_of_frames_is_refused(world: &mut dyn World) -> Outcome {
    let device = world.privcmd()?;
    let start = GuestAddress(0);
    match foreign(&device, start, (1 << 32) * PAGE + PAGE, world.domain()) {
        Ok(_) => panic!("the number of frames was cut to 32 bits"),
        Err(_) => Ok(()),
    }
}

/// 0.18.0 allocates 32 GiB for the frames of such a region.
#[cfg(not(feature = "additions"))]
fn foreign_region_of_more_than_32_bits_of_frames_is_refused(_: &mut dyn World) -> Outcome {
    Err(skip("0.18.0 allocates 32 GiB for it"))
}
