//! Errors of regions with many pages, or with several runs of frames that are paged out.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile};

use super::guards::bytes_at;
use super::setup::{
    advance, assert_released, forget_calls, grant_address, granted_lazy, lazy, long, memory, range,
    silent, skip, FIRST,
};
use super::Scenario;
use crate::double::memory::memfd;
use crate::double::{Call, Injection};
use crate::environment::{Environment, PAGE};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    X3: [
        granted_region_in_advance_with_bad_page_in_second_request_is_released,
    ],
    X7: [
        foreign_region_with_runs_paged_out_is_tried_again,
        foreign_region_with_run_that_fails_later_is_refused,
    ],
    ordinary_use: [
        read_of_many_pages_is_one_system_call,
        guard_of_many_pages_maps_all_of_them,
    ],
    X2: [
        read_of_many_pages_requests_grants_in_proportion_to_those_granted,
        guard_of_many_pages_requests_grants_in_proportion_to_those_granted,
        copy_to_page_not_granted_reports_write,
    ],
];

/// The number of pages of a region that needs three requests.
const PAGES_OF_THREE: u32 = 2 * 65_536 + 1;

fn granted_region_in_advance_with_bad_page_in_second_request_is_released(
    env: &mut dyn Environment,
) -> Outcome {
    let device = env.gntdev()?;
    let Some(double) = env.as_double() else {
        return Err(skip("the domain does not have 131073 pages"));
    };
    let pages = usize::try_from(PAGES_OF_THREE).expect("the number fits");
    double.grant_long_run(FIRST, pages);
    env.revoke(FIRST + 65_540);
    let at = grant_address(FIRST, 0);
    let range = range(&device, at, pages * PAGE, advance(), env.domain())?;
    // The double simulates another thread, which maps memory where the second mmap(2) fails.
    expect_errno(
        memory::<()>(range, at),
        libc::EINVAL,
        "mapping of a reference that is not granted",
    )?;
    assert_released(env, "after the error");
    Ok(())
}

/// Maps 5 frames. Two of them are paged out: the first for `requests` requests, the second for one.
fn two_runs(env: &mut dyn Environment, requests: u32) -> Outcome<(GuestAddress, GuestMemoryMmap)> {
    let device = env.privcmd()?;
    let (first, domain) = (env.frames().start, env.domain());
    let Some(double) = env.as_double() else {
        return Err(skip("the domain's pages cannot be paged out"));
    };
    double.page_out(first + 1, requests);
    double.page_out(first + 3, 1);
    let at = GuestAddress(first * long(PAGE));
    let flags = vm_memory::MmapXenFlags::FOREIGN.bits();
    let memory = memory(range(&device, at, 5 * PAGE, flags, domain)?, at)?;
    Ok((at, memory))
}

fn foreign_region_with_runs_paged_out_is_tried_again(env: &mut dyn Environment) -> Outcome {
    let (at, memory) = two_runs(env, 3)?;
    for page in [1, 3] {
        env.write(page, 0, &9u32.to_ne_bytes());
        let address = GuestAddress(at.0 + long(page * PAGE));
        assert_eq!(memory.read_obj::<u32>(address)?, 9);
    }
    Ok(())
}

fn foreign_region_with_run_that_fails_later_is_refused(env: &mut dyn Environment) -> Outcome {
    let Some(double) = env.as_double() else {
        return Err(skip("the requests of the driver do not fail"));
    };
    // After mmap(2), the request for all frames, and that for the first run.
    let (after, errno) = (3, libc::ENOMEM);
    double.inject(Some(Injection { after, errno }));
    let result = two_runs(env, 3);
    if let Some(double) = env.as_double() {
        assert!(double.is_injected());
        double.inject(None);
    }
    expect_errno(result, errno, "mapping of a run whose request fails")
}

/// Returns the number of grants that were requested.
fn requested(calls: &[Call]) -> usize {
    let grants = |call: &Call| match call {
        Call::MapGrants(references) => references.len(),
        _ => 0,
    };
    calls.iter().map(grants).sum()
}

/// Reads a file into a region of `pages` pages, of which the first are granted.
///
/// Returns the number of bytes that were read at once, and of grants that were requested.
fn read_many(env: &mut dyn Environment, pages: usize, granted: usize) -> Outcome<(usize, usize)> {
    let device = env.gntdev()?;
    let Some(double) = env.as_double() else {
        return Err(skip("the domain does not have enough pages"));
    };
    double.grant_long_run(FIRST, granted);
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, pages)?;
    let mut slice = memory.get_slice(grant_address(FIRST, 0), pages * PAGE)?;
    let mut file = memfd("source")?;
    file.set_len(long(pages * PAGE))?;
    forget_calls(env);
    let read = file.read_volatile(&mut slice)?;
    assert_released(env, "after the read");
    let calls = env.as_double().map(|double| double.calls());
    let requested = requested(&calls.unwrap_or_default());
    silent(env, || (read, requested))
}

fn read_of_many_pages_is_one_system_call(env: &mut dyn Environment) -> Outcome {
    let (read, requested) = read_many(env, 1500, 1500)?;
    assert_eq!(read, 1500 * PAGE);
    assert!(requested < 3 * 1500, "{requested} grants");
    Ok(())
}

fn read_of_many_pages_requests_grants_in_proportion_to_those_granted(
    env: &mut dyn Environment,
) -> Outcome {
    for granted in [1, 300] {
        let (read, requested) = read_many(env, 1 << 20, granted)?;
        assert_eq!(read, granted * PAGE);
        assert!(requested < 20 * 256, "{requested} grants for {granted}");
    }
    Ok(())
}

/// The number of pages of a buffer that a guest states, of which it grants few.
const STATED: usize = 65_536;

fn guard_of_many_pages_requests_grants_in_proportion_to_those_granted(
    env: &mut dyn Environment,
) -> Outcome {
    for granted in [1, 300, 600] {
        let device = env.gntdev()?;
        let Some(double) = env.as_double() else {
            return Err(skip("the domain does not have as many pages"));
        };
        double.grant_long_run(FIRST, granted);
        let memory: GuestMemoryMmap = lazy(env, &device, FIRST, STATED)?;
        let slice = memory.get_slice(grant_address(FIRST, 0), STATED * PAGE)?;
        forget_calls(env);
        let guard = silent(env, || slice.ptr_guard_mut())?;
        let calls = env.as_double().map(|double| double.calls());
        let requested = requested(&calls.unwrap_or_default());
        // The first request, or those for twice the pages that are granted.
        let most = (2 * granted).next_power_of_two().max(256);
        assert!(requested <= most, "{requested} grants for {granted}");
        assert_released(env, "while a guard lives whose last pages are not granted");
        #[cfg(feature = "additions")]
        assert_eq!(
            guard.error().and_then(std::io::Error::raw_os_error),
            Some(libc::EINVAL)
        );
        drop(guard);
    }
    Ok(())
}

fn guard_of_many_pages_maps_all_of_them(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    let Some(double) = env.as_double() else {
        return Err(skip("the domain does not have as many pages"));
    };
    double.grant_long_run(FIRST, 1500);
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 1500)?;
    let slice = memory.get_slice(grant_address(FIRST, 0), 1500 * PAGE)?;
    for page in [0, 255, 256, 511, 512, 1023, 1024, 1499] {
        env.write(page, 8, &long(page).to_ne_bytes());
    }
    let guard = silent(env, || slice.ptr_guard())?;
    assert_eq!(guard.len(), 1500 * PAGE);
    let bytes = bytes_at(guard.as_ptr(), guard.len())?;
    for page in [0, 255, 256, 511, 512, 1023, 1024, 1499] {
        let at = page * PAGE + 8;
        assert_eq!(bytes[at..at + 8], long(page).to_ne_bytes(), "page {page}");
    }
    drop(guard);
    assert_released(env, "after the guard");
    Ok(())
}

fn copy_to_page_not_granted_reports_write(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 6)?;
    env.revoke(FIRST + 4);
    let source = memory.get_slice(grant_address(FIRST, 0), 2 * PAGE)?;
    let target = memory.get_slice(grant_address(FIRST + 3, 0), 2 * PAGE)?;
    silent(env, || source.copy_to_volatile_slice(target))?;
    #[cfg(feature = "additions")]
    {
        use vm_memory::fault::{last, Direction};
        let seen = || last().map(|fault| (fault.direction, fault.host_address, fault.completed));
        assert_eq!(seen(), Some((Direction::Write, 4 * PAGE, PAGE)));
        silent(env, || target.copy_to_volatile_slice(source))?;
        assert_eq!(seen(), Some((Direction::Read, 4 * PAGE, PAGE)));
    }
    assert_released(env, "after the errors");
    Ok(())
}
