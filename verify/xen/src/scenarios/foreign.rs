//! Frames of the domain, which are mapped in advance (`FOREIGN`).

use std::fs::File;

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, MmapXenFlags, Permissions};

use super::setup::{
    assert_calls, forget_calls, grant_address, lazy, long, memory, pattern, range, seen, skip,
    FIRST,
};
use super::Scenario;
use crate::environment::{Access, Environment, NOBODY, PAGE, PAGES};
use crate::outcome::{expect_errno, Outcome};

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
fn address(env: &dyn Environment, page: usize, offset: usize) -> GuestAddress {
    GuestAddress((env.frames().start + long(page)) * long(PAGE) + long(offset))
}

/// Returns a memory of frames that begins at `at`.
fn foreign(device: &File, at: GuestAddress, size: usize, domain: u32) -> Outcome<GuestMemoryMmap> {
    memory(
        range(device, at, size, MmapXenFlags::FOREIGN.bits(), domain)?,
        at,
    )
}

fn foreign_region_is_shared_with_domain(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, 0, 0);
    let memory = foreign(&device, start, PAGES * PAGE, env.domain())?;
    forget_calls(env);
    let bytes = pattern(3 * PAGE);
    memory.write_slice(&bytes, address(env, 1, 100))?;
    assert_eq!(seen(env, 1, 100, bytes.len()), bytes);
    env.write(PAGES - 1, PAGE - 8, &0x0102_0304_0506_0708u64.to_ne_bytes());
    let value: u64 = memory.read_obj(address(env, PAGES - 1, PAGE - 8))?;
    assert_eq!(value, 0x0102_0304_0506_0708);
    assert_calls(env, &[], "accesses to memory that is mapped");
    Ok(())
}

fn foreign_region_and_grant_show_same_bytes(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, 2, 0);
    let frames = foreign(&device, start, 2 * PAGE, env.domain())?;
    env.grant(FIRST, 3, Access::ReadWrite);
    let device = env.gntdev()?;
    let grants: GuestMemoryMmap = lazy(env, &device, FIRST, 1)?;
    frames.write_obj(0x1122_3344u32, address(env, 3, 16))?;
    assert_eq!(
        grants.read_obj::<u32>(grant_address(FIRST, 16))?,
        0x1122_3344
    );
    grants.write_obj(0x5566_7788u32, grant_address(FIRST, 20))?;
    assert_eq!(frames.read_obj::<u32>(address(env, 3, 20))?, 0x5566_7788);
    Ok(())
}

fn foreign_region_for_reading_refuses_writes(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, 0, 0);
    let mut range = range(
        &device,
        start,
        PAGE,
        MmapXenFlags::FOREIGN.bits(),
        env.domain(),
    )?;
    range.set_prot(libc::PROT_READ);
    let memory: GuestMemoryMmap = memory(range, start)?;
    env.write(0, 0, &7u32.to_ne_bytes());
    assert_eq!(memory.read_obj::<u32>(start)?, 7);
    assert!(!memory.check_range(start, 4, Permissions::Write));
    assert!(memory.write_obj(8u32, start).is_err());
    assert_eq!(seen(env, 0, 0, 4), 7u32.to_ne_bytes());
    Ok(())
}

fn foreign_region_with_missing_frame_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, PAGES - 2, 0);
    let result = foreign(&device, start, 4 * PAGE, env.domain());
    expect_any_errno(result, "mapping of a frame that does not exist")
}

fn foreign_region_of_missing_frames_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, PAGES, 0);
    let result = foreign(&device, start, PAGE, env.domain());
    expect_any_errno(result, "mapping of a frame that does not exist")
}

fn foreign_region_of_unknown_domain_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, 0, 0);
    let result = foreign(&device, start, PAGE, NOBODY);
    expect_any_errno(result, "mapping of a domain that does not exist")
}

/// Checks that the system returned an error. The error number depends on the host and the domain.
fn expect_any_errno(result: Outcome<GuestMemoryMmap>, what: &str) -> Outcome {
    match result {
        Ok(_) => panic!("{what} succeeded"),
        Err(stop) if stop.errno().is_some() => Ok(()),
        Err(stop) => panic!("{what} must fail with an error of the system, not with {stop:?}"),
    }
}

fn foreign_region_with_frame_paged_out_is_tried_again(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let frame = env.frames().start + 1;
    let Some(double) = env.as_double() else {
        return Err(skip("the domain's pages cannot be paged out"));
    };
    double.page_out(frame, 2);
    let memory = foreign(&device, address(env, 0, 0), 3 * PAGE, env.domain())?;
    env.write(1, 0, &9u32.to_ne_bytes());
    assert_eq!(memory.read_obj::<u32>(address(env, 1, 0))?, 9);
    Ok(())
}

fn foreign_region_with_frame_always_paged_out_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let frame = env.frames().start + 1;
    let Some(double) = env.as_double() else {
        return Err(skip("the domain's pages cannot be paged out"));
    };
    double.page_out(frame, u32::MAX);
    let result = foreign(&device, address(env, 0, 0), 3 * PAGE, env.domain());
    expect_errno(
        result,
        libc::ENOENT,
        "mapping of a frame that stays paged out",
    )
}

fn foreign_region_inside_page_begins_there(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, 1, 0x400);
    // From 0x400 of page 1 to 0x200 of page 3: three frames, although the length needs only two.
    let memory = foreign(&device, start, 2 * PAGE - 0x200, env.domain())?;
    let bytes = pattern(3 * PAGE);
    env.write(1, 0, &bytes);
    let mut read = vec![0; 2 * PAGE - 0x200];
    memory.read_slice(&mut read, start)?;
    assert_eq!(read, bytes[0x400..0x400 + read.len()]);
    memory.write_obj(0xa5u8, GuestAddress(start.0 + long(read.len()) - 1))?;
    assert_eq!(seen(env, 3, 0x1ff, 1), [0xa5]);
    Ok(())
}

fn foreign_region_of_domain_over_16_bits_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = address(env, 0, 0);
    match foreign(&device, start, PAGE, 0x1_0000 + env.domain()) {
        Ok(_) => panic!("another domain is mapped"),
        Err(_) => Ok(()),
    }
}

#[cfg(feature = "additions")]
fn foreign_region_of_more_than_32_bits_of_frames_is_refused(env: &mut dyn Environment) -> Outcome {
    let device = env.privcmd()?;
    let start = GuestAddress(0);
    match foreign(&device, start, (1 << 32) * PAGE + PAGE, env.domain()) {
        Ok(_) => panic!("the number of frames was cut to 32 bits"),
        Err(_) => Ok(()),
    }
}

/// 0.18.0 allocates 32 GiB for the frames of such a region.
#[cfg(not(feature = "additions"))]
fn foreign_region_of_more_than_32_bits_of_frames_is_refused(_: &mut dyn Environment) -> Outcome {
    Err(skip("0.18.0 allocates 32 GiB for it"))
}
