//! `GuestMemory::held`: slices that stay mapped, whose pointers code of others uses.

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, Permissions,
};

use super::guards::bytes_at;
use super::setup::{
    assert_calls, assert_released, calls_of_access, forget_calls, grant_address, grant_run,
    granted_lazy, lazy, pattern, seen, FIRST,
};
use super::Scenario;
use crate::environment::{mapped, Access, Environment, PAGE};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        slices_of_held_memory_are_mapped_once_until_it_is_dropped,
        slices_of_held_memory_survive_a_hostile_guest,
        writes_to_slices_of_held_memory_are_marked,
        accesses_to_held_memory_keep_nothing_mapped,
        held_memory_keeps_a_limited_number_of_slices,
    ],
    X2: [
        slices_of_held_memory_over_bad_page_return_einval,
    ],
];

fn slices_of_held_memory_are_mapped_once_until_it_is_dropped(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 4)?;
    env.write(0, 0, &pattern(4 * PAGE));
    let calls = calls_of_access(FIRST + 1, 2, false);
    let (made, dropped) = calls.split_at(2);
    forget_calls(env);
    let request = memory.held();
    let mut pointers = Vec::new();
    let at = grant_address(FIRST + 1, 0x800);
    for slice in request.get_slices(at, PAGE, Permissions::Read)? {
        let slice = slice?;
        let guard = slice.ptr_guard();
        assert!(guard.error().is_none());
        pointers.push((guard.as_ptr(), guard.len()));
        let mut read = [0; 16];
        slice.read_slice(&mut read, 0x10)?;
        assert_eq!(read[..], pattern(4 * PAGE)[PAGE + 0x810..][..16]);
    }
    assert_calls(env, made, "slices of held memory");
    forget_calls(env);
    assert_eq!(mapped(env), [FIRST + 1, FIRST + 2]);
    assert!(!env.in_use(FIRST + 1).writing, "mapped for writing");
    // The guards are dropped, and the pointers are valid.
    let [(pointer, len)] = pointers[..] else {
        panic!("{} slices of one region", pointers.len());
    };
    assert_eq!(
        bytes_at(pointer, len)?,
        pattern(4 * PAGE)[PAGE + 0x800..][..PAGE]
    );
    drop(request);
    assert_calls(env, dropped, "the drop of held memory");
    assert_released(env, "after the request");
    Ok(())
}

fn slices_of_held_memory_over_bad_page_return_einval(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 5)?;
    for (page, missing) in (FIRST..FIRST + 5).enumerate() {
        env.revoke(missing);
        let request = memory.held();
        for access in [Permissions::Read, Permissions::Write] {
            let mut slices = request.get_slices(grant_address(FIRST, 8), 5 * PAGE - 8, access)?;
            let first = slices.next().expect("a slice, or its error");
            expect_errno(first.map(|_| ()), libc::EINVAL, "a slice with a bad page")?;
            assert!(slices.next().is_none(), "a slice after an error");
            assert_released(env, "after the error");
        }
        env.grant(missing, page, Access::ReadWrite);
    }
    Ok(())
}

fn slices_of_held_memory_survive_a_hostile_guest(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 1)?;
    let request = memory.held();
    let at = grant_address(FIRST, 0);
    let mut slices = request.get_slices(at, 64, Permissions::ReadWrite)?;
    let slice = slices.next().expect("a page is granted")?;
    // The hypervisor may permit further mappings of a page that is mapped.
    env.revoke(FIRST);
    // The page stays mapped, and a new guard maps nothing.
    slice.write_slice(&pattern(64), 0)?;
    let guard = slice.ptr_guard();
    assert!(guard.error().is_none());
    assert_eq!(bytes_at(guard.as_ptr(), 64)?, pattern(64));
    drop(guard);
    drop(slices);
    drop(request);
    assert_eq!(seen(env, 0, 0, 64), pattern(64));
    assert_released(env, "after the request");
    Ok(())
}

fn writes_to_slices_of_held_memory_are_marked(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 3, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap<AtomicBitmap> = lazy(env, &device, FIRST, 3)?;
    let region = memory.find_region(grant_address(FIRST, 0));
    let region = region.expect("the region is there");
    let request = memory.held();
    let at = grant_address(FIRST + 1, 0x10);
    for slice in request.get_slices(at, 64, Permissions::Write)? {
        slice?.write_obj(7u32, 0)?;
    }
    let dirty = [0, 1, 2].map(|page| region.bitmap().dirty_at(page * PAGE));
    assert_eq!(dirty, [false, true, false]);
    assert_eq!(seen(env, 1, 0x10, 4), 7u32.to_ne_bytes());
    Ok(())
}

fn accesses_to_held_memory_keep_nothing_mapped(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    let request = memory.held();
    request.write_obj(0x1122_3344u32, grant_address(FIRST, PAGE - 2))?;
    assert_released(env, "after a write");
    assert_eq!(
        request.read_obj::<u32>(grant_address(FIRST, PAGE - 2))?,
        0x1122_3344
    );
    assert_released(env, "after a read");
    drop(request);
    assert_eq!(seen(env, 0, PAGE - 2, 4), 0x1122_3344u32.to_ne_bytes());
    Ok(())
}

fn held_memory_keeps_a_limited_number_of_slices(env: &mut dyn Environment) -> Outcome {
    // The hypervisor counts the mappings of a grant in 8 bits.
    let (_device, memory) = granted_lazy(env, 32)?;
    let request = memory.held();
    for number in 0..1024 {
        let at = grant_address(FIRST, number % 32 * PAGE);
        let mut slices = request.get_slices(at, 8, Permissions::Read)?;
        slices.next().expect("a page is granted")?;
    }
    let mut slices = request.get_slices(grant_address(FIRST, 0), 8, Permissions::Read)?;
    let error = slices.next().expect("an error").expect_err("a slice more");
    let expected =
        "held memory already has 1024 slices mapped, which is the limit; use a view for \
                    each request";
    let cause = std::error::Error::source(&error).map(ToString::to_string);
    assert_eq!(cause.as_deref(), Some(expected));
    drop(slices);
    drop(request);
    assert_released(env, "after the request");
    Ok(())
}
