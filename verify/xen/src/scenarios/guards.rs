//! Guards: pointers to memory that stays mapped while they live.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

use super::setup::{
    assert_calls, assert_released, forget_calls, grant_address, grant_run, granted_lazy, lazy,
    pattern, seen, silent, FIRST,
};
use super::Scenario;
use crate::double::memory::memfd;
use crate::environment::{mapped, Access, Environment, PAGE};
use crate::outcome::Outcome;

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        guard_for_reading_keeps_its_pages_mapped,
        guard_for_writing_keeps_its_pages_mapped,
        guards_of_references_and_arrays_are_mapped,
    ],
    X2: [
        guard_of_bad_reference_points_at_no_memory,
    ],
    X12: [
        guard_of_empty_slice_maps_nothing,
    ],
    X24: [
        guard_outlives_region_and_device,
    ],
];

/// Writes the bytes at a pointer to a new file, by a system call that refuses a bad pointer.
#[expect(unsafe_code, reason = "passes a pointer to a system call")]
fn save(pointer: *const u8, len: usize) -> io::Result<File> {
    let file = memfd("saved")?;
    // SAFETY: the system checks the pointer, and only reads.
    let written = unsafe { libc::write(file.as_raw_fd(), pointer.cast(), len) };
    match usize::try_from(written) {
        Ok(written) => {
            assert_eq!(written, len);
            Ok(file)
        }
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Returns the bytes at a pointer.
pub(super) fn bytes_at(pointer: *const u8, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    save(pointer, len)?.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Writes bytes to a pointer, by a system call.
#[expect(unsafe_code, reason = "passes a pointer to a system call")]
fn load(pointer: *mut u8, bytes: &[u8]) -> io::Result<()> {
    let file = memfd("loaded")?;
    file.write_all_at(bytes, 0)?;
    // SAFETY: the system checks the pointer. The memory is of a guard for writing, which no Rust
    // reference covers.
    let read = unsafe { libc::pread(file.as_raw_fd(), pointer.cast(), bytes.len(), 0) };
    match usize::try_from(read) {
        Ok(read) => {
            assert_eq!(read, bytes.len());
            Ok(())
        }
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn guard_for_reading_keeps_its_pages_mapped(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 3)?;
    let bytes = pattern(PAGE);
    env.write(0, 0x800, &bytes);
    let slice = memory.get_slice(grant_address(FIRST, 0x800), PAGE)?;
    let guard = silent(env, || slice.ptr_guard())?;
    assert_eq!(guard.len(), PAGE);
    assert_eq!(mapped(env), [FIRST, FIRST + 1]);
    assert!(
        !env.in_use(FIRST).writing,
        "a guard for reading maps for writing"
    );
    assert_eq!(bytes_at(guard.as_ptr(), guard.len())?, bytes);
    drop(guard);
    assert_released(env, "after the guard");
    Ok(())
}

fn guard_for_writing_keeps_its_pages_mapped(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 3)?;
    let slice = memory.get_slice(grant_address(FIRST + 1, 0x10), 64)?;
    let guard = silent(env, || slice.ptr_guard_mut())?;
    assert_eq!(mapped(env), [FIRST + 1]);
    assert!(env.in_use(FIRST + 1).writing);
    load(guard.as_ptr(), &pattern(64))?;
    assert_eq!(seen(env, 1, 0x10, 64), pattern(64));
    drop(guard);
    assert_released(env, "after the guard");
    Ok(())
}

fn guards_of_references_and_arrays_are_mapped(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    env.write(0, 0, &pattern(2 * PAGE));
    let slice = memory.get_slice(grant_address(FIRST, 0), 2 * PAGE)?;
    let value = slice.get_ref::<u64>(PAGE - 4)?;
    let guard = silent(env, || value.ptr_guard())?;
    assert_eq!(guard.len(), 8);
    assert_eq!(
        bytes_at(guard.as_ptr(), 8)?,
        pattern(2 * PAGE)[PAGE - 4..PAGE + 4]
    );
    drop(guard);
    let array = slice.get_array_ref::<u32>(8, PAGE / 4)?;
    let guard = silent(env, || array.ptr_guard_mut())?;
    assert_eq!((guard.len(), mapped(env).len()), (PAGE, 2));
    load(guard.as_ptr(), &vec![0x5a; PAGE])?;
    drop(guard);
    assert_eq!(seen(env, 0, 8, PAGE), vec![0x5a; PAGE]);
    assert_released(env, "after the guards");
    Ok(())
}

fn guard_of_bad_reference_points_at_no_memory(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadOnly);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 2)?;
    let bad = memory.get_slice(grant_address(FIRST + 1, 8), 64)?;
    let guard = bad.ptr_guard();
    assert_eq!(guard.len(), 64);
    let read = bytes_at(guard.as_ptr(), 64);
    let errno = read.err().and_then(|error| error.raw_os_error());
    assert_eq!(
        errno,
        Some(libc::EFAULT),
        "of a system call with a bad guard"
    );
    drop(guard);
    let read_only = memory.get_slice(grant_address(FIRST, 8), 64)?;
    let guard = read_only.ptr_guard_mut();
    let written = load(guard.as_ptr(), &[1; 64]);
    let errno = written.err().and_then(|error| error.raw_os_error());
    assert_eq!(
        errno,
        Some(libc::EFAULT),
        "of a system call with a bad guard"
    );
    drop(guard);
    assert_released(env, "after the guards");
    errors_of_guards(env, &memory)
}

#[cfg(feature = "additions")]
fn errors_of_guards(env: &dyn Environment, memory: &GuestMemoryMmap) -> Outcome {
    use crate::outcome::expect_errno;

    let bad = memory.get_slice(grant_address(FIRST + 1, 8), 64)?;
    let good = memory.get_slice(grant_address(FIRST, 8), 64)?;
    let errno = |error: Option<&io::Error>| error.and_then(io::Error::raw_os_error);
    assert!(errno(bad.ptr_guard().error()).is_some());
    assert!(errno(good.ptr_guard_mut().error()).is_some());
    expect_errno(bad.try_ptr_guard(), libc::EINVAL, "try_ptr_guard")?;
    expect_errno(good.try_ptr_guard_mut(), libc::EINVAL, "try_ptr_guard_mut")?;
    let guard = good.try_ptr_guard()?;
    assert!(guard.error().is_none());
    assert_eq!(mapped(env), [FIRST]);
    let value = bad.get_ref::<u16>(0)?;
    expect_errno(
        value.try_ptr_guard(),
        libc::EINVAL,
        "try_ptr_guard of a value",
    )?;
    let array = bad.get_array_ref::<u16>(0, 4)?;
    expect_errno(
        array.try_ptr_guard_mut(),
        libc::EINVAL,
        "try_ptr_guard_mut of an array",
    )
}

#[cfg(not(feature = "additions"))]
fn errors_of_guards(_: &dyn Environment, _: &GuestMemoryMmap) -> Outcome {
    Ok(())
}

fn guard_of_empty_slice_maps_nothing(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    forget_calls(env);
    for offset in [0, 0x10, PAGE] {
        let slice = memory.get_slice(grant_address(FIRST, offset), 0)?;
        assert_eq!(slice.ptr_guard().len(), 0);
        assert_eq!(slice.ptr_guard_mut().len(), 0);
    }
    assert_calls(env, &[], "guards of empty slices");
    Ok(())
}

fn guard_outlives_region_and_device(env: &mut dyn Environment) -> Outcome {
    let (device, memory) = granted_lazy(env, 1)?;
    env.write(0, 0, &pattern(64));
    let slice = memory.get_slice(grant_address(FIRST, 0), 64)?;
    let guard = silent(env, || slice.ptr_guard())?;
    drop((memory, device));
    assert_eq!(bytes_at(guard.as_ptr(), guard.len())?, pattern(64));
    assert_eq!(mapped(env), [FIRST], "while the guard lives");
    drop(guard);
    assert_released(env, "after the guard");
    Ok(())
}
