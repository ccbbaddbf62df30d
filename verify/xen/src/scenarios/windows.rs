//! Windows: ranges that are mapped once, and then accessed by offset.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::guest_memory::Window;
use vm_memory::{
    Bytes, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    MmapRegion, Permissions,
};

use super::setup::{
    assert_calls, assert_released, at_address, calls_of_access, forget_calls, grant_address,
    grant_run, granted_lazy, lazy, lazy_flags, memory, pattern, range, seen, FIRST,
};
use super::Scenario;
use crate::environment::{mapped, Access, Environment, PAGE};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        window_maps_its_pages_once_until_dropped,
        window_for_reading_maps_for_reading_and_refuses_writes,
        window_for_writing_of_read_only_grant_returns_einval,
        window_for_writing_of_region_for_reading_is_refused,
        window_with_page_not_granted_is_refused_and_released,
        window_over_regions_maps_pages_of_each,
        window_with_bad_page_in_last_region_is_refused_and_released,
        window_of_region_inside_page_begins_there,
        window_marks_pages_that_it_writes,
        window_outlives_memory_and_device,
        empty_window_maps_nothing,
    ],
];

fn window_maps_its_pages_once_until_dropped(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 4)?;
    env.write(0, 0, &pattern(4 * PAGE));
    let calls = calls_of_access(FIRST + 1, 2, true);
    let (made, dropped) = calls.split_at(2);
    forget_calls(env);
    let window = memory.window(
        grant_address(FIRST + 1, 0x800),
        PAGE,
        Permissions::ReadWrite,
    )?;
    assert_calls(env, made, "a window");
    forget_calls(env);
    let both = [FIRST + 1, FIRST + 2];
    assert_eq!(mapped(env), both);
    let first = PAGE + 0x800;
    let value: u64 = window.read_obj(0)?;
    assert_eq!(
        value.to_ne_bytes(),
        pattern(4 * PAGE)[first..first + 8],
        "the first bytes"
    );
    let mut read = vec![0; PAGE];
    window.read_slice(&mut read, 0)?;
    assert_eq!(read, pattern(4 * PAGE)[first..first + PAGE]);
    window.store(0x1122_3344u32, 0x10, Ordering::Release)?;
    assert_eq!(window.load::<u32>(0x10, Ordering::Acquire)?, 0x1122_3344);
    // Over the end of the page, and up to the end of the window.
    window.write_obj(0x5566_7788u32, 0x7fe)?;
    window.write_slice(&[0x5a; 0x20], PAGE - 0x20)?;
    let past = window.write_obj(0u8, PAGE);
    assert!(past.is_err(), "a write past the end of the window");
    assert_calls(env, &[], "accesses to a window");
    assert_eq!(mapped(env), both);
    assert_eq!(seen(env, 1, 0x810, 4), 0x1122_3344u32.to_ne_bytes());
    assert_eq!(seen(env, 1, PAGE - 2, 4), 0x5566_7788u32.to_ne_bytes());
    assert_eq!(seen(env, 2, 0x7e0, 0x20), [0x5a; 0x20]);
    let after = 2 * PAGE + 0x800;
    assert_eq!(seen(env, 0, after, 8), pattern(4 * PAGE)[after..after + 8]);
    // The guest writes while the window lives.
    env.write(1, 0x808, &[7]);
    assert_eq!(window.read_obj::<u8>(8)?, 7);
    drop(window);
    assert_calls(env, dropped, "the drop of a window");
    assert_released(env, "after the window");
    Ok(())
}

fn window_for_reading_maps_for_reading_and_refuses_writes(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 1)?;
    env.write(0, 0, &pattern(64));
    let window = memory.window(grant_address(FIRST, 0), 64, Permissions::Read)?;
    assert_eq!(mapped(env), [FIRST]);
    assert!(
        !env.in_use(FIRST).writing,
        "a window for reading maps for writing"
    );
    let refused = |result: Result<(), GuestMemoryError>, what: &str| {
        let right = matches!(&result, Err(GuestMemoryError::IOError(e))
            if e.kind() == ErrorKind::PermissionDenied);
        assert!(right, "{what}: {result:?}");
    };
    refused(window.write_obj(1u32, 0), "write_obj");
    refused(window.write_slice(&[1; 8], 8), "write_slice");
    refused(window.write(&[1; 8], 8).map(|_| ()), "write");
    refused(window.store(1u32, 16, Ordering::Relaxed), "store");
    let stream = window.read_exact_volatile_from(24, &mut &[1u8; 8][..], 8);
    refused(stream, "read_exact_volatile_from");
    let mut read = [0; 64];
    window.read_slice(&mut read, 0)?;
    assert_eq!(read[..], pattern(64));
    assert_eq!(seen(env, 0, 0, 64), pattern(64));
    drop(window);
    assert_released(env, "after the window");
    Ok(())
}

fn window_for_writing_of_read_only_grant_returns_einval(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadOnly);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 1)?;
    let at = grant_address(FIRST, 0);
    for access in [Permissions::Write, Permissions::ReadWrite] {
        let window = memory.window(at, 64, access).map(|_| ());
        expect_errno(window, libc::EINVAL, "a window of a read-only grant")?;
        assert_released(env, "after the error");
    }
    let window = memory.window(at, 64, Permissions::Read)?;
    assert_eq!(mapped(env), [FIRST]);
    drop(window);
    assert_released(env, "after the window");
    Ok(())
}

fn window_for_writing_of_region_for_reading_is_refused(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut range = range(&device, at, PAGE, lazy_flags(), env.domain())?;
    range.set_prot(libc::PROT_READ);
    let memory: GuestMemoryMmap = memory(range, at)?;
    forget_calls(env);
    for access in [Permissions::Write, Permissions::ReadWrite] {
        assert!(memory.window(at, 64, access).is_err(), "{access:?}");
    }
    assert_calls(env, &[], "windows that are refused");
    memory.window(at, 64, Permissions::Read)?;
    assert_released(env, "after the window");
    Ok(())
}

fn window_with_page_not_granted_is_refused_and_released(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 5)?;
    for (page, missing) in (FIRST..FIRST + 5).enumerate() {
        env.revoke(missing);
        for access in [Permissions::Read, Permissions::ReadWrite] {
            let window = memory.window(grant_address(FIRST, 0x10), 5 * PAGE - 0x20, access);
            expect_errno(window.map(|_| ()), libc::EINVAL, "a window of a bad page")?;
            assert_released(env, "after the error");
        }
        env.grant(missing, page, Access::ReadWrite);
    }
    let all = memory.window(grant_address(FIRST, 0), 5 * PAGE, Permissions::Read)?;
    assert_eq!(mapped(env).len(), 5);
    drop(all);
    assert_released(env, "after the window");
    Ok(())
}

/// Returns memory of two adjacent regions, each with two pages.
fn two_regions(env: &mut dyn Environment) -> Outcome<GuestMemoryMmap> {
    let device = env.gntdev()?;
    let region = |reference: u32| -> Outcome<_> {
        let at = grant_address(reference, 0);
        let range = range(&device, at, 2 * PAGE, lazy_flags(), env.domain())?;
        Ok(at_address(MmapRegion::from_range(range)?, at))
    };
    let regions = vec![region(FIRST)?, region(FIRST + 2)?];
    grant_run(env, FIRST, 4, Access::ReadWrite);
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

fn window_over_regions_maps_pages_of_each(env: &mut dyn Environment) -> Outcome {
    let memory = two_regions(env)?;
    env.write(0, 0, &pattern(4 * PAGE));
    let start = 2 * PAGE - 0x20;
    let window = memory.window(grant_address(FIRST, start), 0x40, Permissions::ReadWrite)?;
    let both = [FIRST + 1, FIRST + 2];
    assert_eq!(mapped(env), both);
    forget_calls(env);
    let mut read = [0; 0x40];
    window.read_slice(&mut read, 0)?;
    assert_eq!(read[..], pattern(4 * PAGE)[start..start + 0x40]);
    let value: u64 = window.read_obj(0x1c)?;
    assert_eq!(value.to_ne_bytes(), read[0x1c..0x24]);
    window.write_slice(&[0x5a; 0x30], 8)?;
    assert_eq!(seen(env, 0, start + 8, 0x30), [0x5a; 0x30]);
    window.store(9u32, 0x20, Ordering::Relaxed)?;
    assert_eq!(seen(env, 2, 0, 4), 9u32.to_ne_bytes());
    assert_calls(env, &[], "accesses to a window over regions");
    drop(window);
    assert_released(env, "after the window");
    Ok(())
}

fn window_with_bad_page_in_last_region_is_refused_and_released(
    env: &mut dyn Environment,
) -> Outcome {
    let memory = two_regions(env)?;
    env.revoke(FIRST + 3);
    let window = memory.window(grant_address(FIRST, 0), 4 * PAGE, Permissions::Write);
    let what = "a window whose last page is not granted";
    expect_errno(window.map(|_| ()), libc::EINVAL, what)?;
    assert_released(env, "after the error");
    // A range that continues after the last region.
    let window = memory.window(grant_address(FIRST, 0), 4 * PAGE + 1, Permissions::Write);
    assert!(window.is_err(), "a window past the last region");
    drop(window);
    assert_released(env, "after the second error");
    Ok(())
}

fn window_of_region_inside_page_begins_there(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 2, Access::ReadWrite);
    env.write(0, 0, &pattern(2 * PAGE));
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0x234);
    let range = range(&device, at, PAGE, lazy_flags(), env.domain())?;
    let memory: GuestMemoryMmap = memory(range, at)?;
    let window = memory.window(at, PAGE, Permissions::ReadWrite)?;
    let mut read = vec![0; PAGE];
    window.read_slice(&mut read, 0)?;
    assert_eq!(read, pattern(2 * PAGE)[0x234..0x234 + PAGE]);
    window.write_obj(0x99u8, PAGE - 1)?;
    assert_eq!(seen(env, 1, 0x233, 1), [0x99]);
    drop(window);
    assert_released(env, "after the window");
    Ok(())
}

fn window_marks_pages_that_it_writes(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 6, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap<AtomicBitmap> = lazy(env, &device, FIRST, 6)?;
    let region = memory
        .find_region(grant_address(FIRST, 0))
        .expect("the region is there");
    let dirty = || [0, 1, 2, 3, 4, 5].map(|page| region.bitmap().dirty_at(page * PAGE));
    let at = grant_address(FIRST + 1, 0x800);
    let window = memory.window(at, 4 * PAGE, Permissions::ReadWrite)?;
    window.read_obj::<u64>(0)?;
    assert_eq!(dirty(), [false; 6], "after a read");
    // Over the end of the second page of the region.
    window.write_obj(1u32, 0x7fe)?;
    assert_eq!(dirty(), [false, true, true, false, false, false]);
    window.store(1u32, 2 * PAGE, Ordering::Relaxed)?;
    assert_eq!(dirty(), [false, true, true, true, false, false]);
    window.mark_dirty(3 * PAGE, 2 * PAGE);
    assert_eq!(dirty(), [false, true, true, true, true, true]);
    drop(window);
    assert_released(env, "after the window");
    Ok(())
}

fn window_outlives_memory_and_device(env: &mut dyn Environment) -> Outcome {
    let (device, memory) = granted_lazy(env, 2)?;
    let at = grant_address(FIRST, PAGE - 4);
    let window = Window::from_arc(Arc::new(memory), at, 8, Permissions::ReadWrite)?;
    drop(device);
    window.write_slice(&pattern(8), 0)?;
    assert_eq!(seen(env, 0, PAGE - 4, 8), pattern(8));
    // Mapped pages stay readable after the guest took its grant back.
    env.revoke(FIRST);
    assert_eq!(window.read_obj::<[u8; 8]>(0)?[..], pattern(8));
    assert!(mapped(env).contains(&(FIRST + 1)));
    drop(window);
    assert_released(env, "after the window");
    Ok(())
}

fn empty_window_maps_nothing(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 1)?;
    forget_calls(env);
    let window = memory.window(grant_address(FIRST, 8), 0, Permissions::ReadWrite)?;
    assert!(window.read_obj::<u8>(0).is_err());
    assert!(memory
        .window(grant_address(FIRST, 8), 8, Permissions::No)
        .is_err());
    drop(window);
    assert_calls(env, &[], "an empty window");
    Ok(())
}
