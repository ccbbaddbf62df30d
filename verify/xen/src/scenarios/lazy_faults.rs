//! Accesses to grants that fail (`GRANT | NO_ADVANCE_MAP`).

use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, MmapRegion, Permissions, VolatileMemory,
};

use super::setup::{
    assert_calls, assert_released, forget_calls, grant_address, grant_run, granted_lazy, lazy,
    lazy_flags, memory, pattern, range, seen, silent, skip, FIRST,
};
use super::Scenario;
use crate::double::{Call, Injection};
use crate::environment::{Access, Environment, NOBODY, PAGE};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    X2: [
        read_of_reference_not_granted_returns_einval,
        accesses_to_reference_not_granted_return_einval,
        write_to_read_only_grant_returns_einval,
        read_of_revoked_grant_returns_einval,
        read_of_domain_that_does_not_exist_returns_einval,
        methods_without_error_read_zeroes,
        read_over_revoked_page_returns_bytes_before_it,
    ],
    X3: [
        access_with_one_bad_page_releases_the_others,
        accesses_with_one_bad_page_do_not_panic,
    ],
    X4: [
        lazy_access_that_cannot_be_mapped_is_released,
    ],
    X13: [
        host_address_of_lazy_region_is_not_available,
    ],
    X14: [
        unmap_that_fails_is_ignored,
    ],
    X16: [
        lazy_region_for_reading_refuses_writes,
    ],
];

/// Requires an error of an access to a page that cannot be mapped.
fn expect_einval<T>(result: Result<T, GuestMemoryError>, what: &str) -> Outcome {
    expect_errno(result, libc::EINVAL, what)
}

fn read_of_reference_not_granted_returns_einval(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 1)?;
    let read = memory.read_obj::<u32>(grant_address(FIRST, 0));
    expect_einval(read, "a read of a page that is not granted")?;
    assert_released(env, "after the error");
    Ok(())
}

fn accesses_to_reference_not_granted_return_einval(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 2)?;
    let at = grant_address(FIRST, 64);
    let mut buf = [0; 64];
    expect_einval(memory.read(&mut buf, at), "read")?;
    expect_einval(memory.write(&buf, at), "write")?;
    expect_einval(memory.read_slice(&mut buf, at), "read_slice")?;
    expect_einval(memory.write_slice(&buf, at), "write_slice")?;
    expect_einval(memory.write_obj(1u64, at), "write_obj")?;
    expect_einval(memory.load::<u32>(at, Ordering::Relaxed), "load")?;
    expect_einval(memory.store(1u32, at, Ordering::Relaxed), "store")?;
    expect_einval(
        memory.read_volatile_from(at, &mut &buf[..], 64),
        "read_volatile_from",
    )?;
    let mut sink = Vec::new();
    expect_einval(
        memory.write_volatile_to(at, &mut sink, 64),
        "write_volatile_to",
    )?;
    assert!(sink.is_empty());
    let slice = memory.get_slice(at, 64)?;
    expect_errno(
        slice.read_obj::<u16>(1),
        libc::EINVAL,
        "read_obj of a slice",
    )?;
    assert_released(env, "after the errors");
    Ok(())
}

fn write_to_read_only_grant_returns_einval(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadOnly);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 1)?;
    env.write(0, 0, &7u32.to_ne_bytes());
    let write = memory.write_obj(8u32, grant_address(FIRST, 0));
    expect_einval(write, "a write to a read-only grant")?;
    let store = memory.store(8u32, grant_address(FIRST, 0), Ordering::Relaxed);
    expect_einval(store, "a store to a read-only grant")?;
    assert_eq!(seen(env, 0, 0, 4), 7u32.to_ne_bytes());
    assert_released(env, "after the error");
    Ok(())
}

fn read_of_revoked_grant_returns_einval(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 1)?;
    memory.write_obj(7u32, grant_address(FIRST, 0))?;
    env.revoke(FIRST);
    let read = memory.read_obj::<u32>(grant_address(FIRST, 0));
    expect_einval(read, "a read of a revoked grant")?;
    env.grant(FIRST, 0, Access::ReadWrite);
    assert_eq!(memory.read_obj::<u32>(grant_address(FIRST, 0))?, 7);
    Ok(())
}

fn read_of_domain_that_does_not_exist_returns_einval(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let memory: GuestMemoryMmap = memory(range(&device, at, PAGE, lazy_flags(), NOBODY)?, at)?;
    expect_einval(memory.read_obj::<u32>(at), "a read of nobody's page")?;
    assert_released(env, "after the error");
    Ok(())
}

fn methods_without_error_read_zeroes(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 2)?;
    let slice = memory.get_slice(grant_address(FIRST, 0), 2 * PAGE)?;
    let value = slice.get_ref::<u32>(8)?;
    assert_eq!(silent(env, || value.load())?, 0);
    silent(env, || value.store(7))?;
    let mut buf = [0xffu8; 16];
    assert_eq!(silent(env, || slice.copy_to(&mut buf))?, 0);
    silent(env, || slice.copy_from(&buf))?;
    let mut local = [1u8; 16];
    let plain = vm_memory::VolatileSlice::from(local.as_mut_slice());
    silent(env, || slice.copy_to_volatile_slice(plain))?;
    assert_eq!(local, [1; 16]);
    let array = slice.get_array_ref::<u64>(0, 4)?;
    assert_eq!(silent(env, || array.load(2))?, 0);
    silent(env, || array.store(2, 5))?;
    #[cfg(feature = "additions")]
    assert!(
        vm_memory::fault::last().is_some(),
        "fault::last reports nothing"
    );
    assert_released(env, "after the errors");
    Ok(())
}

fn read_over_revoked_page_returns_bytes_before_it(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 3)?;
    env.write(0, 0, &pattern(3 * PAGE));
    env.revoke(FIRST + 2);
    let mut buf = vec![0; 2 * PAGE];
    let read = memory.read(&mut buf, grant_address(FIRST, 0x800))?;
    assert_eq!(read, 2 * PAGE - 0x800);
    assert_eq!(buf[..read], pattern(3 * PAGE)[0x800..0x800 + read]);
    // The bytes were moved, but the access as a whole fails.
    match memory.read_slice(&mut buf, grant_address(FIRST, 0x800)) {
        Err(GuestMemoryError::PartialBuffer { completed, .. }) => assert_eq!(completed, read),
        other => expect_einval(other, "a read over a revoked page")?,
    }
    assert_released(env, "after the error");
    Ok(())
}

fn access_with_one_bad_page_releases_the_others(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 4)?;
    env.revoke(FIRST + 2);
    let at = grant_address(FIRST, 0);
    let mut buf = vec![0; 4 * PAGE];
    assert!(memory.read_slice(&mut buf, at).is_err());
    assert_released(env, "after the read");
    assert!(memory.write_slice(&buf, at).is_err());
    assert_released(env, "after the write");
    // A value over the end of a page whose second page is bad.
    let read = memory.read_obj::<u64>(grant_address(FIRST + 1, PAGE - 4));
    expect_any_error(read, "a value that is granted in part");
    assert_released(env, "after the value");
    Ok(())
}

fn expect_any_error<T>(result: Result<T, GuestMemoryError>, what: &str) {
    assert!(result.is_err(), "{what} succeeds");
}

fn accesses_with_one_bad_page_do_not_panic(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 3)?;
    env.revoke(FIRST + 1);
    let slice = memory.get_slice(grant_address(FIRST, 0), 3 * PAGE)?;
    let mut buf = vec![0u8; 3 * PAGE];
    silent(env, || slice.copy_to(&mut buf))?;
    silent(env, || slice.copy_from(&buf))?;
    let plain = vm_memory::VolatileSlice::from(buf.as_mut_slice());
    silent(env, || slice.copy_to_volatile_slice(plain))?;
    silent(env, || plain.copy_to_volatile_slice(slice))?;
    assert_released(env, "after the errors");
    Ok(())
}

fn lazy_access_that_cannot_be_mapped_is_released(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut private = range(&device, at, PAGE, lazy_flags(), env.domain())?;
    // gntdev refuses a private mapping for writing, after MAP_GRANT_REF has succeeded.
    private.set_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let Ok(memory) = memory::<()>(private, at) else {
        return Ok(());
    };
    for _ in 0..5 {
        // A library may also make the mapping shared.
        if let Err(error) = memory.write_obj(1u32, at) {
            expect_einval(Err::<(), _>(error), "a private mapping")?;
        }
        assert_released(env, "after the error");
        let table = env.audit();
        assert!(table.is_empty(), "{table:?}");
    }
    Ok(())
}

fn host_address_of_lazy_region_is_not_available(env: &mut dyn Environment) -> Outcome {
    let (device, memory) = granted_lazy(env, 1)?;
    let at = grant_address(FIRST, 0x234);
    let result = memory.get_host_address(at);
    let missing = matches!(result, Err(GuestMemoryError::HostAddressNotAvailable));
    assert!(missing, "{result:?}");
    let region = memory.find_region(at).expect("the region is there");
    let result = region.get_host_address(MemoryRegionAddress(0x234));
    let missing = matches!(result, Err(GuestMemoryError::HostAddressNotAvailable));
    assert!(missing, "{result:?}");
    // vhost sends this address to its back end.
    let range = range(
        &device,
        grant_address(FIRST, 0),
        PAGE,
        lazy_flags(),
        env.domain(),
    )?;
    assert!(MmapRegion::<()>::from_range(range)?.as_ptr().is_null());
    Ok(())
}

fn unmap_that_fails_is_ignored(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 1)?;
    let at = grant_address(FIRST, 0);
    forget_calls(env);
    memory.write_obj(7u32, at)?;
    let Some(double) = env.as_double() else {
        return Err(skip("UNMAP_GRANT_REF of the driver does not fail"));
    };
    let unmap = |call: &Call| matches!(call, Call::UnmapGrants(_));
    let after = double
        .calls()
        .iter()
        .position(unmap)
        .expect("an access unmaps");
    let errno = libc::ENOENT;
    double.inject(Some(Injection { after, errno }));
    let value: u32 = memory.read_obj(at)?;
    assert_eq!(value, 7);
    let double = env.as_double().expect("it is the double");
    assert!(double.is_injected());
    double.inject(None);
    assert_eq!(memory.read_obj::<u32>(at)?, 7);
    Ok(())
}

fn lazy_region_for_reading_refuses_writes(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut range = range(&device, at, PAGE, lazy_flags(), env.domain())?;
    range.set_prot(libc::PROT_READ);
    let memory: GuestMemoryMmap = memory(range, at)?;
    env.write(0, 0, &7u32.to_ne_bytes());
    assert_eq!(memory.read_obj::<u32>(at)?, 7);
    forget_calls(env);
    assert!(!GuestMemory::check_range(
        &memory,
        at,
        4,
        Permissions::Write
    ));
    assert!(GuestMemory::check_range(&memory, at, 4, Permissions::Read));
    assert!(memory.write_obj(8u32, at).is_err());
    assert!(memory.store(8u32, at, Ordering::Relaxed).is_err());
    assert!(GuestMemory::get_slices(&memory, at, 4, Permissions::Write)?
        .next()
        .is_none_or(|s| s.is_err()));
    // A slice of the region does not know the protection, but its memory does.
    if let Ok(slice) = GuestMemoryBackend::get_slice(&memory, at, 16) {
        assert!(slice.write_slice(&[1; 16], 0).is_err());
    }
    assert_calls(env, &[], "writes that are refused");
    assert_eq!(seen(env, 0, 0, 4), 7u32.to_ne_bytes());
    Ok(())
}
