//! Copies by the hypervisor: `MmapRange::set_grant_copy`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::{
    Bytes, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    Permissions,
};

use super::setup::{
    advance, assert_calls, assert_released, calls_of_access, forget_calls, grant_address,
    grant_run, lazy_flags, memory, pattern, range, seen, silent, FIRST,
};
use super::Scenario;
use crate::double::memory::memfd;
use crate::double::Call;
use crate::environment::{mapped, Access, Environment, NOBODY, PAGE, PAGES};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        copies_over_pages_reach_domain,
        copy_of_region_inside_page_begins_there,
        copy_of_more_pages_than_a_request_is_complete,
        copy_ends_at_page_that_is_not_granted,
        copy_of_several_requests_ends_at_page_that_is_not_granted,
        copy_that_fails_marks_all_pages_that_it_wrote,
        copy_to_read_only_grant_returns_einval,
        copy_to_region_for_reading_is_refused,
        copy_of_domain_that_does_not_exist_returns_einval,
        copy_past_end_of_region_ends_there,
        aligned_values_are_mapped_and_not_copied,
        unaligned_values_are_copied,
        elements_and_files_are_mapped_and_not_copied,
        overlapping_copies_of_copied_memory_reach_domain,
        window_of_copied_memory_is_mapped,
        granted_region_in_advance_is_not_copied,
    ],
];

/// The number of pages of one request of the library.
const REQUEST: usize = 64;

/// Returns memory that begins with a reference, and whose bytes the hypervisor copies.
fn copied<B: NewBitmap>(
    env: &dyn Environment,
    device: &File,
    reference: u32,
    pages: usize,
) -> Outcome<GuestMemoryMmap<B>> {
    let at = grant_address(reference, 0);
    let mut range = range(device, at, pages * PAGE, lazy_flags(), env.domain())?;
    range.set_grant_copy(true);
    memory(range, at)
}

/// Grants pages for reading and writing, and returns memory whose bytes the hypervisor copies.
fn granted_copied(env: &mut dyn Environment, pages: usize) -> Outcome<(File, GuestMemoryMmap)> {
    grant_run(env, FIRST, pages, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory = copied(env, &device, FIRST, pages)?;
    Ok((device, memory))
}

fn copies_over_pages_reach_domain(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_copied(env, 4)?;
    env.write(0, 0, &[0xee; 4 * PAGE]);
    let at = PAGE - 16;
    let bytes = pattern(2 * PAGE + 32);
    forget_calls(env);
    memory.write_slice(&bytes, grant_address(FIRST, at))?;
    assert_calls(env, &[Call::CopyGrants(4)], "write_slice");
    assert_eq!(seen(env, 0, at, bytes.len()), bytes);
    assert_eq!(seen(env, 0, at - 8, 8), [0xee; 8], "before the copy");
    let end = at + bytes.len();
    assert_eq!(seen(env, 0, end, 8), [0xee; 8], "after the copy");
    let mut read = vec![0; bytes.len()];
    forget_calls(env);
    memory.read_slice(&mut read, grant_address(FIRST, at))?;
    assert_calls(env, &[Call::CopyGrants(4)], "read_slice");
    assert_eq!(read, bytes);
    // Other lengths, at other offsets in a page.
    for (at, len) in [(0, 3), (1, 2), (0x123, 1000), (PAGE - 1, 2), (0, 4 * PAGE)] {
        let new: Vec<_> = pattern(len).iter().map(|byte| !byte).collect();
        memory.write_slice(&new, grant_address(FIRST, at))?;
        assert_eq!(seen(env, 0, at, len), new, "{len} bytes at {at:#x}");
        let mut read = vec![0; len];
        memory.read_slice(&mut read, grant_address(FIRST, at))?;
        assert_eq!(read, new, "{len} bytes at {at:#x}");
    }
    assert_released(env, "after the copies");
    Ok(())
}

fn copy_of_region_inside_page_begins_there(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 2, Access::ReadWrite);
    env.write(0, 0, &pattern(2 * PAGE));
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0x234);
    let mut range = range(&device, at, PAGE, lazy_flags(), env.domain())?;
    range.set_grant_copy(true);
    let memory: GuestMemoryMmap = memory(range, at)?;
    let mut read = vec![0; PAGE];
    memory.read_slice(&mut read, at)?;
    assert_eq!(read, pattern(2 * PAGE)[0x234..0x234 + PAGE]);
    memory.write_slice(&[0x99; 3], grant_address(FIRST, PAGE + 0x231))?;
    assert_eq!(seen(env, 1, 0x231, 3), [0x99; 3]);
    Ok(())
}

/// Grants `references` pages, which repeat those of the domain, and returns their bytes.
fn grant_repeated(env: &mut dyn Environment, references: usize) -> Vec<u8> {
    let bytes = pattern(PAGES * PAGE);
    env.write(0, 0, &bytes);
    for (reference, number) in (FIRST..).zip(0..references) {
        env.grant(reference, number % PAGES, Access::ReadWrite);
    }
    let repeated = bytes.iter().cycle().take(references * PAGE);
    repeated.copied().collect()
}

fn copy_of_more_pages_than_a_request_is_complete(env: &mut dyn Environment) -> Outcome {
    let pages = 2 * REQUEST + 3;
    let bytes = grant_repeated(env, pages);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = copied(env, &device, FIRST, pages)?;
    let calls = [64, 64, 3].map(Call::CopyGrants);
    let mut read = vec![0; pages * PAGE - 0x20];
    forget_calls(env);
    memory.read_slice(&mut read, grant_address(FIRST, 0x10))?;
    assert_calls(env, &calls, "a read of three requests");
    assert!(
        read == bytes[0x10..0x10 + read.len()],
        "bytes of three requests"
    );
    let new: Vec<_> = bytes.iter().map(|byte| !byte).collect();
    forget_calls(env);
    memory.write_slice(&new, grant_address(FIRST, 0))?;
    assert_calls(env, &calls, "a write of three requests");
    assert!(seen(env, 0, 0, PAGES * PAGE) == new[..PAGES * PAGE]);
    assert_released(env, "after the copies");
    Ok(())
}

fn copy_ends_at_page_that_is_not_granted(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_copied(env, 4)?;
    env.write(0, 0, &pattern(4 * PAGE));
    env.revoke(FIRST + 2);
    let at = grant_address(FIRST, 0x800);
    let mut buf = vec![0; 3 * PAGE];
    let before = 2 * PAGE - 0x800;
    forget_calls(env);
    assert_eq!(memory.read(&mut buf, at)?, before);
    assert_calls(env, &[Call::CopyGrants(4)], "read");
    assert_eq!(buf[..before], pattern(4 * PAGE)[0x800..2 * PAGE]);
    assert_eq!(memory.write(&vec![0x5a; 3 * PAGE], at)?, before);
    assert_eq!(seen(env, 0, 0x800, before), vec![0x5a; before]);
    let missing = seen(env, 2, 0, PAGE);
    assert_eq!(missing, pattern(4 * PAGE)[2 * PAGE..3 * PAGE]);
    let all = [
        memory.read_slice(&mut buf, at),
        memory.write_slice(&buf, at),
    ];
    for result in all {
        match result {
            Err(GuestMemoryError::PartialBuffer { completed, .. }) => assert_eq!(completed, before),
            other => expect_errno(other, libc::EINVAL, "a copy over a bad page")?,
        }
    }
    let last = silent(env, vm_memory::fault::last)?;
    let fault = last.map(|fault| fault.completed);
    assert_eq!(fault, Some(before), "of fault::last");
    // The first page is the bad one.
    let bad = grant_address(FIRST + 2, 3);
    expect_errno(memory.read(&mut buf, bad), libc::EINVAL, "read")?;
    expect_errno(memory.write(&buf, bad), libc::EINVAL, "write")?;
    assert_released(env, "after the errors");
    Ok(())
}

fn copy_of_several_requests_ends_at_page_that_is_not_granted(env: &mut dyn Environment) -> Outcome {
    let pages = REQUEST + 8;
    let bytes = grant_repeated(env, pages);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = copied(env, &device, FIRST, pages)?;
    let mut buf = vec![0; pages * PAGE - 0x10];
    // The last page of the first request, and the others around it.
    for (missing, page) in (FIRST..).zip(0..pages).skip(REQUEST - 2).take(4) {
        env.revoke(missing);
        let at = grant_address(FIRST, 0x10);
        let read = silent(env, || memory.read(&mut buf, at))??;
        assert_eq!(read, page * PAGE - 0x10, "before page {page}");
        assert!(buf[..read] == bytes[0x10..0x10 + read], "page {page}");
        env.grant(missing, page % PAGES, Access::ReadWrite);
    }
    assert_released(env, "after the errors");
    Ok(())
}

fn copy_that_fails_marks_all_pages_that_it_wrote(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 5, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap<AtomicBitmap> = copied(env, &device, FIRST, 5)?;
    env.revoke(FIRST + 2);
    env.write(0, 0, &[0; 5 * PAGE]);
    let result = memory.write(&[0x5a; 4 * PAGE], grant_address(FIRST, 0));
    let region = memory
        .find_region(grant_address(FIRST, 0))
        .expect("the region is there");
    // The hypervisor continues after a page that fails.
    for page in 0..5 {
        let written = seen(env, page, 0, PAGE).contains(&0x5a);
        let dirty = region.bitmap().dirty_at(page * PAGE);
        assert!(dirty || !written, "page {page} is written and not marked");
    }
    assert!(!region.bitmap().dirty_at(4 * PAGE), "after the range");
    assert_eq!(result?, 2 * PAGE);
    Ok(())
}

fn copy_to_read_only_grant_returns_einval(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 2, Access::ReadOnly);
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = copied(env, &device, FIRST, 2)?;
    env.write(0, 0, &pattern(2 * PAGE));
    let at = grant_address(FIRST, PAGE - 5);
    let mut read = [0; 10];
    memory.read_slice(&mut read, at)?;
    assert_eq!(read[..], pattern(2 * PAGE)[PAGE - 5..PAGE + 5]);
    expect_errno(memory.write_slice(&[1; 10], at), libc::EINVAL, "a copy")?;
    expect_errno(memory.write(&[1; 10], at), libc::EINVAL, "write")?;
    let aligned = memory.write_obj(1u32, grant_address(FIRST, 8));
    expect_errno(aligned, libc::EINVAL, "write_obj, which maps the page")?;
    assert_eq!(seen(env, 0, 0, 2 * PAGE), pattern(2 * PAGE));
    assert_released(env, "after the errors");
    Ok(())
}

fn copy_to_region_for_reading_is_refused(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut range = range(&device, at, PAGE, lazy_flags(), env.domain())?;
    range.set_grant_copy(true);
    range.set_prot(libc::PROT_READ);
    let memory: GuestMemoryMmap = memory(range, at)?;
    env.write(0, 0, &pattern(16));
    forget_calls(env);
    assert!(memory.write_slice(&[1; 16], at).is_err());
    // The slice of a region does not know the protection, but its memory does.
    let slice = GuestMemoryBackend::get_slice(&memory, at, 16);
    if let Ok(slice) = slice {
        assert!(slice.write_slice(&[1; 16], 0).is_err());
    }
    assert_calls(env, &[], "copies that are refused");
    assert_eq!(seen(env, 0, 0, 16), pattern(16));
    let mut read = [0; 16];
    memory.read_slice(&mut read, at)?;
    assert_eq!(read[..], pattern(16));
    Ok(())
}

fn copy_of_domain_that_does_not_exist_returns_einval(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut range = range(&device, at, PAGE, lazy_flags(), NOBODY)?;
    range.set_grant_copy(true);
    let memory: GuestMemoryMmap = memory(range, at)?;
    let mut buf = [0; 16];
    expect_errno(memory.read_slice(&mut buf, at), libc::EINVAL, "a read")?;
    expect_errno(memory.write_slice(&buf, at), libc::EINVAL, "a write")?;
    Ok(())
}

fn copy_past_end_of_region_ends_there(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 3, Access::ReadWrite);
    let device = env.gntdev()?;
    // The page after the region is also granted.
    let memory: GuestMemoryMmap = copied(env, &device, FIRST, 2)?;
    env.write(0, 0, &pattern(3 * PAGE));
    let at = grant_address(FIRST, 2 * PAGE - 10);
    assert_eq!(memory.write(&[0x5a; 20], at)?, 10);
    let after = seen(env, 2, 0, 10);
    assert_eq!(after, pattern(3 * PAGE)[2 * PAGE..2 * PAGE + 10]);
    let mut buf = [0; 20];
    assert_eq!(memory.read(&mut buf, at)?, 10);
    assert_eq!(buf[..], [[0x5a; 10], [0; 10]].concat());
    Ok(())
}

fn aligned_values_are_mapped_and_not_copied(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_copied(env, 1)?;
    env.write(0, 0, &pattern(64));
    let at = grant_address(FIRST, 0x18);
    let (reading, writing) = (
        calls_of_access(FIRST, 1, false),
        calls_of_access(FIRST, 1, true),
    );
    macro_rules! check {
        ($($value:ty)*) => {$(
            let what = stringify!($value);
            let bytes = &pattern(64)[0x18..0x18 + size_of::<$value>()];
            forget_calls(env);
            let value: $value = memory.read_obj(at)?;
            assert_calls(env, &reading, what);
            assert_eq!(value.to_ne_bytes(), bytes, "{what}");
            forget_calls(env);
            memory.write_obj(!value, at)?;
            assert_calls(env, &writing, what);
            forget_calls(env);
            assert_eq!(memory.load::<$value>(at, Ordering::Relaxed)?, !value);
            assert_calls(env, &reading, what);
            forget_calls(env);
            memory.store(value, at, Ordering::Relaxed)?;
            assert_calls(env, &writing, what);
            assert_eq!(seen(env, 0, 0x18, bytes.len()), bytes, "{what}");
        )*};
    }
    check!(u8 u16 u32 u64);
    // As bytes, they are the same access.
    forget_calls(env);
    memory.write_slice(&[1; 8], at)?;
    assert_calls(env, &writing, "write_slice of 8 aligned bytes");
    assert_released(env, "after the accesses");
    Ok(())
}

fn unaligned_values_are_copied(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_copied(env, 2)?;
    for offset in [1, 0x104, 0x17, PAGE - 4] {
        let segments = if offset == PAGE - 4 { 2 } else { 1 };
        let at = grant_address(FIRST, offset);
        forget_calls(env);
        memory.write_obj(0x1122_3344_5566_7788u64, at)?;
        assert_calls(env, &[Call::CopyGrants(segments)], "write_obj");
        let bytes = 0x1122_3344_5566_7788u64.to_ne_bytes();
        assert_eq!(seen(env, 0, offset, 8), bytes, "at {offset:#x}");
        forget_calls(env);
        assert_eq!(memory.read_obj::<u64>(at)?, 0x1122_3344_5566_7788);
        assert_calls(env, &[Call::CopyGrants(segments)], "read_obj");
    }
    Ok(())
}

fn elements_and_files_are_mapped_and_not_copied(env: &mut dyn Environment) -> Outcome {
    let mut source = memfd("source")?;
    source.write_all_at(&[0x5a; 100], 0)?;
    let (_device, memory) = granted_copied(env, 2)?;
    env.write(0, 0, &pattern(2 * PAGE));
    let slice = memory.get_slice(grant_address(FIRST, 0x10), PAGE)?;
    let mut elements = [0u32; 64];
    forget_calls(env);
    silent(env, || {
        slice
            .subslice(0, 256)
            .map(|part| part.copy_to(&mut elements))
    })??;
    assert_calls(env, &calls_of_access(FIRST, 1, false), "copy_to");
    let bytes: Vec<_> = elements.iter().flat_map(|one| one.to_ne_bytes()).collect();
    assert_eq!(bytes, pattern(2 * PAGE)[0x10..0x110]);
    forget_calls(env);
    let at = grant_address(FIRST, 0x20);
    memory.read_exact_volatile_from(at, &mut source, 100)?;
    assert_calls(env, &calls_of_access(FIRST, 1, true), "a file");
    assert_eq!(seen(env, 0, 0x20, 100), [0x5a; 100]);
    assert_released(env, "after the accesses");
    Ok(())
}

fn overlapping_copies_of_copied_memory_reach_domain(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_copied(env, 4)?;
    for (from, to) in [(0x10, 0x123), (0x123, 0x10), (PAGE, 0x7ff), (5, 5)] {
        let mut expected = pattern(4 * PAGE);
        env.write(0, 0, &expected);
        let len = 2 * PAGE + 100;
        let source = memory.get_slice(grant_address(FIRST, from), len)?;
        let target = memory.get_slice(grant_address(FIRST, to), len)?;
        silent(env, || source.copy_to_volatile_slice(target))?;
        expected.copy_within(from..from + len, to);
        assert!(
            seen(env, 0, 0, 4 * PAGE) == expected,
            "from {from:#x} to {to:#x}"
        );
    }
    Ok(())
}

fn window_of_copied_memory_is_mapped(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_copied(env, 2)?;
    let at = grant_address(FIRST, PAGE - 8);
    let window = memory.window(at, 100, Permissions::ReadWrite)?;
    assert_eq!(mapped(env), [FIRST, FIRST + 1]);
    forget_calls(env);
    window.write_slice(&pattern(100), 0)?;
    let mut read = [0; 100];
    window.read_slice(&mut read, 0)?;
    assert_eq!(read[..], pattern(100));
    assert_calls(env, &[], "accesses to a window");
    assert_eq!(seen(env, 0, PAGE - 8, 100), pattern(100));
    drop(window);
    assert_released(env, "after the window");
    Ok(())
}

fn granted_region_in_advance_is_not_copied(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 1, Access::ReadWrite);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut range = range(&device, at, PAGE, advance(), env.domain())?;
    range.set_grant_copy(true);
    let memory: GuestMemoryMmap = memory(range, at)?;
    forget_calls(env);
    memory.write_slice(&pattern(100), at)?;
    assert_eq!(seen(env, 0, 0, 100), pattern(100));
    assert_calls(env, &[], "accesses to a region that is mapped in advance");
    Ok(())
}
