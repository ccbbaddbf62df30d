//! Hosts whose pages have 16 or 64 KiB, while those of Xen have 4.

#[cfg(feature = "additions")]
use vm_memory::VolatileMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::setup::{
    advance, assert_calls, assert_released, forget_calls, grant_address, grant_run, lazy, long,
    memory, pattern, range, seen, silent, skip, FIRST,
};
use super::Scenario;
use crate::double::Call;
use crate::environment::{mapped, Access, Environment, PAGE};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    X15: [
        foreign_region_on_host_with_large_pages_maps_its_frames,
        grant_in_advance_on_host_with_large_pages_is_one_page,
        accesses_on_host_with_large_pages_map_one_grant_at_a_time,
    ],
];

/// The page sizes of an Arm host, other than that of Xen.
const LARGE: [usize; 2] = [16 << 10, 64 << 10];

/// Simulates a host with pages of this size.
fn host_with(env: &mut dyn Environment, page_size: usize) -> Outcome {
    match env.as_double() {
        Some(double) => double.set_host_page_size(page_size),
        None => return Err(skip("the host's pages have 4 KiB")),
    }
    Ok(())
}

fn foreign_region_on_host_with_large_pages_maps_its_frames(env: &mut dyn Environment) -> Outcome {
    env.write(0, 0, &pattern(4 * PAGE));
    for page_size in LARGE {
        host_with(env, page_size)?;
        let device = env.privcmd()?;
        // Inside the second frame, and so inside a page of the host.
        let at = GuestAddress((env.frames().start + 1) * long(PAGE) + 0x400);
        forget_calls(env);
        let flags = vm_memory::MmapXenFlags::FOREIGN.bits();
        let size = PAGE + 0x800;
        let memory: GuestMemoryMmap = memory(range(&device, at, size, flags, env.domain())?, at)?;
        let calls = [
            Call::Mmap {
                len: page_size,
                writing: true,
            },
            Call::MapFrames(page_size / PAGE),
        ];
        assert_calls(env, &calls, "a foreign region");
        let mut read = vec![0; size];
        memory.read_slice(&mut read, at)?;
        assert_eq!(read, pattern(4 * PAGE)[PAGE + 0x400..][..size]);
        memory.write_obj(7u8, GuestAddress(at.0 + long(size) - 1))?;
        assert_eq!(seen(env, 2, 0xbff, 1), [7]);
        env.write(2, 0xbff, &pattern(4 * PAGE)[2 * PAGE + 0xbff..][..1]);
    }
    Ok(())
}

fn grant_in_advance_on_host_with_large_pages_is_one_page(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 3, Access::ReadWrite);
    env.write(0, 0, &pattern(3 * PAGE));
    for page_size in LARGE {
        host_with(env, page_size)?;
        let device = env.gntdev()?;
        let domain = env.domain();
        let at = grant_address(FIRST + 1, 0x400);
        let one = range(&device, at, 0xc00, advance(), domain)?;
        let memory_of_one: GuestMemoryMmap = memory(one, at)?;
        assert_eq!(mapped(env), [FIRST + 1]);
        let mut read = [0; 0xc00];
        memory_of_one.read_slice(&mut read, at)?;
        assert_eq!(read[..], pattern(3 * PAGE)[PAGE + 0x400..2 * PAGE]);
        drop(memory_of_one);
        assert_released(env, "after the region");
        // The bytes of two grants are not contiguous.
        let two = range(&device, at, 0xc01, advance(), domain)?;
        let what = "a region of two grants";
        expect_errno(memory::<()>(two, at), libc::EOPNOTSUPP, what)?;
        assert_released(env, "after the error");
    }
    Ok(())
}

fn accesses_on_host_with_large_pages_map_one_grant_at_a_time(env: &mut dyn Environment) -> Outcome {
    grant_run(env, FIRST, 3, Access::ReadWrite);
    for page_size in LARGE {
        env.write(0, 0, &pattern(3 * PAGE));
        host_with(env, page_size)?;
        let device = env.gntdev()?;
        let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 3)?;
        forget_calls(env);
        let mut read = vec![0; 2 * PAGE];
        memory.read_slice(&mut read, grant_address(FIRST, 0x800))?;
        assert_eq!(read, pattern(3 * PAGE)[0x800..][..2 * PAGE]);
        let calls: Vec<Call> = (FIRST..FIRST + 3)
            .flat_map(|reference| {
                [
                    Call::MapGrants(vec![reference]),
                    Call::Mmap {
                        len: page_size,
                        writing: false,
                    },
                    Call::Munmap(page_size),
                    Call::UnmapGrants(1),
                ]
            })
            .collect();
        assert_calls(env, &calls, "a read over three pages");
        memory.write_slice(&[0x5a; 16], grant_address(FIRST + 1, PAGE - 8))?;
        assert_eq!(seen(env, 1, PAGE - 8, 16), [0x5a; 16]);
        // The first page ends between two elements, or inside one.
        for at in [PAGE - 8, PAGE - 7, PAGE - 6] {
            env.write(0, 0, &pattern(3 * PAGE));
            let slice = memory.get_slice(grant_address(FIRST, at), 16)?;
            let mut elements = [0u32; 4];
            assert_eq!(silent(env, || slice.copy_to(&mut elements))?, 4);
            let bytes: Vec<_> = elements.iter().flat_map(|one| one.to_ne_bytes()).collect();
            assert_eq!(bytes, pattern(3 * PAGE)[at..][..16], "{at:#x}");
            let new = [0x1122_3344u32; 4];
            silent(env, || slice.copy_from(&new))?;
            assert_eq!(
                seen(env, 0, at, 16),
                new[0].to_ne_bytes().repeat(4),
                "{at:#x}"
            );
        }
        // Bytes that must be contiguous.
        let slice = memory.get_slice(grant_address(FIRST, PAGE - 2), 4)?;
        #[cfg(feature = "additions")]
        {
            let refused = slice.try_ptr_guard().map(|_| ());
            expect_errno(refused, libc::EOPNOTSUPP, "a guard over two pages")?;
            let value = slice.get_ref::<u32>(0)?;
            assert_eq!(silent(env, || value.load())?, 0);
        }
        let guard = silent(env, || slice.subslice(2, 2).map(|part| part.ptr_guard()))??;
        assert_eq!(mapped(env), [FIRST + 1]);
        drop(guard);
        assert_released(env, "after the guard");
    }
    Ok(())
}
