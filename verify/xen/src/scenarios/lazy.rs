//! Grants that are mapped at each access (`GRANT | NO_ADVANCE_MAP`).

use vm_memory::{Bytes, GuestMemoryMmap};

use super::setup::{assert_released, grant_address, grant_run, lazy};
use super::Scenario;
use crate::outcome::{expect_errno, Outcome};
use crate::world::{Access, World, PAGE};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    "" read_obj_of_grant_returns_bytes_of_domain
    "" write_slice_over_pages_reaches_domain
    "X2" read_of_reference_not_granted_returns_einval
];

/// The first reference of the scenarios here.
const FIRST: u32 = 32;

fn read_obj_of_grant_returns_bytes_of_domain(world: &mut dyn World) -> Outcome {
    grant_run(world, FIRST, 2, Access::ReadWrite);
    let device = world.gntdev()?;
    let memory: GuestMemoryMmap = lazy(world, &device, FIRST, 2)?;
    world.write(1, 8, &0x0102_0304_0506_0708u64.to_ne_bytes());
    let value: u64 = memory.read_obj(grant_address(FIRST + 1, 8))?;
    assert_eq!(value, 0x0102_0304_0506_0708);
    assert_released(world, "after the access");
    Ok(())
}

fn write_slice_over_pages_reaches_domain(world: &mut dyn World) -> Outcome {
    grant_run(world, FIRST, 3, Access::ReadWrite);
    let device = world.gntdev()?;
    let memory: GuestMemoryMmap = lazy(world, &device, FIRST, 3)?;
    let bytes: Vec<u8> = (0..PAGE + 32)
        .map(|at| u8::try_from(at % 251).unwrap_or(0))
        .collect();
    memory.write_slice(&bytes, grant_address(FIRST, PAGE - 16))?;
    let mut seen = vec![0; bytes.len()];
    world.read(0, PAGE - 16, &mut seen);
    assert_eq!(seen, bytes);
    assert_released(world, "after the access");
    Ok(())
}

fn read_of_reference_not_granted_returns_einval(world: &mut dyn World) -> Outcome {
    let device = world.gntdev()?;
    let memory: GuestMemoryMmap = lazy(world, &device, FIRST, 1)?;
    let read = memory.read_obj::<u32>(grant_address(FIRST, 0));
    expect_errno(read, libc::EINVAL, "a read of a page that is not granted")?;
    assert_released(world, "after the error");
    Ok(())
}
