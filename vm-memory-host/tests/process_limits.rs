//! Builds, drops and discards in a process that is at a limit.
//!
//! Each test changes limits and counts mappings, so it runs in a process of its own.
#![cfg(target_os = "linux")]
#![expect(
    clippy::disallowed_methods,
    reason = "no seccomp filter refuses getrlimit in these tests"
)]

use std::fs;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::mm::{mlockall, munlockall, MlockAllFlags};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
use rustix::thread::{capabilities, set_capabilities, CapabilitySet};
use test_support::{error_chain, in_own_process, skipped, temp_file_of_len, MIB, PAGE_U64 as PAGE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion, Permissions, VolatileMemory,
};
use vm_memory_host::{
    discard, plug, prefault, provisioned, residency, still_mapped, unplug, Arena, Backing,
    BuildError, Description, Lock, MemoryBuilder, Region, Sharing, Unplugged,
};

/// A resource limit that is restored when this is dropped.
struct Limited(Resource, Rlimit);

impl Limited {
    fn to(resource: Resource, most: u64) -> Self {
        let before = getrlimit(resource);
        let now = Rlimit {
            current: Some(most),
            maximum: before.maximum,
        };
        setrlimit(resource, now).unwrap();
        Self(resource, before)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        setrlimit(self.0, self.1).unwrap();
    }
}

/// Returns a size in /proc/self/status, in bytes.
fn status(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}

fn vmas() -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().map(str::to_owned).collect()
}

fn max_map_count() -> u64 {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    most.trim().parse().unwrap()
}

/// Builds a private mapping of a new sparse file.
fn private_file(size: u64) -> GuestMemoryMmap {
    let file = temp_file_of_len(size);
    let region = Region::new(GuestAddress(0), size).backing(Backing::private_file(file, 0));
    MemoryBuilder::new().region(region).build().unwrap()
}

fn filled(regions: &[Region]) -> GuestMemoryMmap {
    let builder = regions
        .iter()
        .fold(MemoryBuilder::new(), |builder, region| {
            builder.region(region.clone())
        });
    let prefault = builder.prefault(NonZeroUsize::MIN, |_| ControlFlow::Continue(()));
    prefault.build().unwrap()
}

#[test]
fn drop_at_address_space_limit_frees_pages() {
    in_own_process("drop_at_address_space_limit_frees_pages", |_| {
        let backings = [("anonymous", Backing::Anonymous), ("memfd", Backing::Memfd)];
        for (what, backing) in backings {
            let of =
                |start: u64| Region::new(GuestAddress(start), 32 * MIB).backing(backing.clone());
            // The only region of a reservation.
            let before = status("VmRSS");
            let memory = filled(&[of(0)]);
            assert!(status("VmRSS") > before + 30 * MIB, "{what}");
            let limit = Limited::to(Resource::As, 16 * MIB);
            drop(memory);
            drop(limit);
            let after = status("VmRSS");
            assert!(
                after < before + 8 * MIB,
                "{what}: {before} bytes before, {after} after"
            );

            // The middle one of three regions in a reservation, then the others.
            let all = filled(&[of(0), of(32 * MIB), of(64 * MIB)]);
            let (memory, region) = all.remove_region(GuestAddress(32 * MIB), 32 * MIB).unwrap();
            drop(all);
            let three = status("VmRSS");
            let limit = Limited::to(Resource::As, 16 * MIB);
            drop(region);
            drop(limit);
            let two = status("VmRSS");
            assert!(
                two + 30 * MIB < three,
                "{what}: {three} bytes with three, {two} with two"
            );
            memory.write_obj(7u8, GuestAddress(0)).unwrap();
            memory.write_obj(7u8, GuestAddress(64 * MIB)).unwrap();
            drop(memory);
            let after = status("VmRSS");
            assert!(
                after < before + 8 * MIB,
                "{what}: {before} bytes before, {after} after"
            );
            assert!(!vmas().iter().any(|vma| vma.contains("memfd")), "{what}");
        }
    });
}

#[test]
fn drop_at_vma_limit_frees_pages() {
    in_own_process("drop_at_vma_limit_frees_pages", |test| {
        let of = |start: u64| Region::new(GuestAddress(start), 32 * MIB);
        let one = filled(&[of(0)]);
        let two = filled(&[of(0), of(32 * MIB)]);
        let (other, region) = two.remove_region(GuestAddress(0), 32 * MIB).unwrap();
        drop(two);
        let before = status("VmRSS");
        let Some(mappings) = all_vmas(test) else {
            return;
        };
        let full = status("VmRSS");
        drop(one);
        drop(region);
        let after = status("VmRSS");
        drop(mappings);
        assert!(
            full >= before && after + 60 * MIB < full,
            "{full} bytes before, {after} after"
        );
        other.write_obj(7u8, GuestAddress(32 * MIB)).unwrap();
    });
}

/// Maps until the process has as many VMAs as it may have.
///
/// Reports `test` as skipped and returns `None` if they are not limited.
fn all_vmas(test: &str) -> Option<Vec<MmapRegion>> {
    // Mappings of alternating file pages, which the kernel cannot merge.
    let file = Arc::new(temp_file_of_len(4 * PAGE));
    let mut mappings: Vec<MmapRegion> = Vec::with_capacity(1 << 20);
    while let Ok(mapping) = MmapRegion::from_file(
        FileOffset::from_arc(Arc::clone(&file), mappings.len() as u64 % 2 * 2 * PAGE),
        4096,
    ) {
        mappings.push(mapping);
        if mappings.len() == mappings.capacity() {
            skipped(test, "VMAs are not limited");
            return None;
        }
    }
    Some(mappings)
}

/// Returns whether a host address is mapped.
fn is_mapped(address: usize) -> bool {
    vmas().iter().any(|line| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        (number(start)..number(end)).contains(&address)
    })
}

#[test]
fn drop_inside_a_vma_at_the_limit_is_reported_and_unmapped_later() {
    in_own_process(
        "drop_inside_a_vma_at_the_limit_is_reported_and_unmapped_later",
        |test| {
            let file = Arc::new(temp_file_of_len(96 * MIB));
            let shared = |offset| Backing::File {
                file: Arc::clone(&file),
                offset,
                sharing: Sharing::Shared,
            };
            for (what, is_file, lock) in [
                ("anonymous", false, Lock::No),
                ("locked", false, Lock::OnFault),
                ("shared file", true, Lock::No),
            ] {
                let of = |n: u64| {
                    let start = n * 32 * MIB;
                    let backing = if is_file {
                        shared(start)
                    } else {
                        Backing::Anonymous
                    };
                    let region = Region::new(GuestAddress(start), 32 * MIB);
                    region.backing(backing).lock(lock)
                };
                // One VMA for all three regions.
                let all = filled(&[of(0), of(1), of(2)]);
                let (memory, region) = all.remove_region(GuestAddress(32 * MIB), 32 * MIB).unwrap();
                drop(all);
                let host = provisioned(region.as_ref()).unwrap().host_address();
                let Some(mappings) = all_vmas(test) else {
                    return;
                };
                let before = status("VmRSS");
                drop(region);
                let after = status("VmRSS");
                let reported = still_mapped();
                drop(mappings);
                assert!(
                    after + 30 * MIB < before,
                    "{what}: {before} bytes before, {after} after"
                );
                assert_eq!(reported, 32 * MIB, "{what}");
                memory.write_obj(7u8, GuestAddress(64 * MIB)).unwrap();
                drop(memory);
                assert_eq!(still_mapped(), 0, "{what}");
                assert!(!is_mapped(host), "{what}");
            }
        },
    );
}

#[test]
fn prefault_at_vma_limit_uses_the_threads_that_it_gets() {
    in_own_process(
        "prefault_at_vma_limit_uses_the_threads_that_it_gets",
        |test| {
            let region = Region::new(GuestAddress(0), 512 * MIB);
            let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
            let Some(mut mappings) = all_vmas(test) else {
                return;
            };
            for _ in 0..24 {
                let threads = NonZeroUsize::new(4).unwrap();
                let mut done = 0;
                let result = prefault(&memory, threads, |progress| {
                    done = progress.done;
                    ControlFlow::Continue(())
                });
                assert!(result.is_ok(), "{result:?}");
                assert_eq!(done, 512 * MIB);
                assert_eq!(
                    discard(&memory, GuestAddress(0), 512 * MIB).unwrap(),
                    512 * MIB
                );
                // Leaves room for one more VMA.
                mappings.pop();
            }
        },
    );
}

#[test]
fn drop_after_partial_drop_leaves_foreign_mappings() {
    in_own_process("drop_after_partial_drop_leaves_foreign_mappings", |test| {
        let of = |start: u64| Region::new(GuestAddress(start), 2 * MIB);
        let all = filled(&[of(0), of(2 * MIB), of(4 * MIB)]);
        let (memory, region) = all.remove_region(GuestAddress(2 * MIB), 2 * MIB).unwrap();
        drop(all);
        let start = provisioned(region.as_ref()).unwrap().host_address();
        let hole = start..start + (2 << 20);
        let limit = Limited::to(Resource::As, 2 * MIB);
        drop(region);
        drop(limit);
        // Map until the kernel reuses the addresses of the dropped region.
        let mut others: Vec<MmapRegion> = Vec::new();
        while !others
            .iter()
            .any(|other| hole.contains(&other.as_ptr().addr()))
        {
            if others.len() == 4096 {
                return skipped(test, "addresses are not reused");
            }
            others.push(MmapRegion::new(1 << 20).unwrap());
        }
        drop(memory);
        for other in &others {
            let slice = other.get_slice(0, 1 << 20).unwrap();
            slice.write_obj(0x55u8, 0).unwrap();
            assert_eq!(slice.read_obj::<u8>(0).unwrap(), 0x55);
        }
    });
}

#[test]
fn discard_refused_by_a_limit_uses_no_vmas() {
    in_own_process("discard_refused_by_a_limit_uses_no_vmas", |_| {
        let most = max_map_count();
        let memory = private_file(4 * MIB);
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let limit = Limited::to(Resource::As, MIB);
        for _ in 0..most / 4 + 100 {
            assert_eq!(discard(&memory, GuestAddress(0), PAGE).unwrap(), 0);
        }
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
        drop(limit);
        let before = vmas();
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(discard(&memory, GuestAddress(0), PAGE).unwrap(), PAGE);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
        // A successful discard adds one VMA.
        assert_eq!(vmas().len(), before.len() + 1);
    });
}

#[test]
fn discard_that_joins_ranges_releases_vmas() {
    in_own_process("discard_that_joins_ranges_releases_vmas", |_| {
        let most = max_map_count();
        let pages = most / 2 + 1000;
        let memory = private_file(pages * PAGE);
        let discard_pages = |page: u64, count: u64| {
            discard(&memory, GuestAddress(page * PAGE), count * PAGE).unwrap()
        };
        for page in (0..pages).step_by(2) {
            discard_pages(page, 1);
        }
        assert_eq!(discard_pages(pages - 1, 1), 0, "the budget is not used up");
        // One range over all pages but the last two.
        assert_eq!(discard_pages(0, pages - 3), (pages - 3) * PAGE);
        assert_eq!(discard_pages(pages - 1, 1), PAGE);
    });
}

#[test]
fn build_at_data_limit_leaves_no_addresses() {
    in_own_process("build_at_data_limit_leaves_no_addresses", |_| {
        let build = || {
            let region = Region::new(GuestAddress(0), 1024 * MIB);
            MemoryBuilder::new().region(region).build::<()>()
        };
        drop(build().unwrap());
        let before = status("VmSize");
        let limit = Limited::to(Resource::Data, status("VmData") + 32 * MIB);
        let results: Vec<_> = (0..4).map(|_| build().map(drop)).collect();
        drop(limit);
        for result in results {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("cannot map it"), "{error}");
            assert!(error.to_string().contains("data size limit"), "{error}");
        }
        let after = status("VmSize");
        assert!(
            after < before + 1024 * MIB,
            "{before} bytes of addresses before, {after} after"
        );
    });
}

#[test]
fn build_at_a_limit_names_it() {
    in_own_process("build_at_a_limit_names_it", |_| {
        let build = |region: Region| {
            let built = MemoryBuilder::new().region(region).build::<()>();
            built.map(drop).unwrap_err().to_string()
        };
        let region = || Region::new(GuestAddress(0), 1024 * MIB);
        let limit = Limited::to(Resource::As, status("VmSize") + 512 * MIB);
        let error = build(region());
        drop(limit);
        assert!(error.contains("address space limit"), "{error}");
        // No limit explains it.
        let error = build(Region::new(GuestAddress(0), 1 << 56));
        assert!(!error.contains("ulimit"), "{error}");
        let _limit = Limited::to(Resource::Memlock, MIB);
        let mut mine = capabilities(None).unwrap();
        mine.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, mine).unwrap();
        let locked = Region::new(GuestAddress(0), 4 * MIB).lock(Lock::Now);
        let error = build(locked);
        assert!(error.contains("locked memory limit of 0x100000"), "{error}");
    });
}

#[test]
fn build_without_memory_for_bitmap_returns_error() {
    in_own_process("build_without_memory_for_bitmap_returns_error", |_| {
        // Its bits take 128 MiB. That is more than the limit and the heap of a thread leave.
        const SIZE: u64 = 4 << 40;
        let region = Region::new(GuestAddress(0), SIZE);
        let limit = Limited::to(Resource::As, status("VmSize") + SIZE + 16 * MIB);
        let built = MemoryBuilder::new().region(region).build::<AtomicBitmap>();
        drop(limit);
        let error = built.map(drop).unwrap_err();
        assert!(matches!(error, BuildError::Bitmap { .. }), "{error}");
        assert!(status("VmSize") < SIZE);
    });
}

/// Limits locked memory to `most` bytes, and locks all mappings that are made later.
///
/// Reports `test` as skipped and returns `false` if that is not possible.
fn lock_with_limit(most: u64, test: &str) -> bool {
    let few = Rlimit {
        current: Some(most),
        ..getrlimit(Resource::Memlock)
    };
    // CAP_IPC_LOCK would lift the limit.
    let mut mine = capabilities(None).unwrap();
    mine.effective.remove(CapabilitySet::IPC_LOCK);
    let locked = setrlimit(Resource::Memlock, few)
        .and_then(|()| set_capabilities(None, mine))
        .and_then(|()| mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT));
    if let Err(error) = &locked {
        skipped(test, error);
    }
    locked.is_ok()
}

#[test]
fn build_in_locked_process_counts_memory_once() {
    in_own_process("build_in_locked_process_counts_memory_once", |test| {
        if !lock_with_limit(7 * MIB, test) {
            return;
        }
        let region = Region::new(GuestAddress(0), 4 * MIB);
        let builds = || MemoryBuilder::new().region(region.clone()).build::<()>();
        let results: Vec<_> = (0..3).map(|_| builds().map(drop)).collect();
        munlockall().unwrap();
        assert!(results.iter().all(Result::is_ok), "{results:?}");
    });
}

/// A file is first mapped elsewhere, which counts against the limit as well.
#[test]
fn failed_build_of_file_in_locked_process_leaves_no_addresses() {
    let test = "failed_build_of_file_in_locked_process_leaves_no_addresses";
    in_own_process(test, |test| {
        if !lock_with_limit(4 * MIB, test) {
            return;
        }
        let before = status("VmSize");
        let build = |size| {
            let region = Region::new(GuestAddress(0), size).backing(Backing::Memfd);
            let built = MemoryBuilder::new().region(region).build::<()>();
            built.map(drop).map_err(|error| error.to_string())
        };
        let sizes = (MIB..5 * MIB).step_by(MIB as usize / 8);
        let results: Vec<_> = sizes.map(build).collect();
        let (after, kept) = (status("VmSize"), still_mapped());
        munlockall().unwrap();
        assert!(
            after < before + MIB && kept == 0,
            "{before} bytes of addresses before, {after} after"
        );
        let errors: Vec<_> = results.iter().filter_map(|it| it.as_ref().err()).collect();
        // The reservation and one mapping of 1.5 MiB fit the limit.
        assert!(results[4].is_ok() && errors.len() > 8, "{results:?}");
        let is_named = |error: &&String| error.contains("locked memory limit");
        assert!(errors.iter().all(is_named), "{errors:?}");
    });
}

#[test]
fn failed_build_of_file_at_vma_limit_leaves_no_addresses() {
    let test = "failed_build_of_file_at_vma_limit_leaves_no_addresses";
    in_own_process(test, |test| {
        let build = || {
            let region = Region::new(GuestAddress(0), MIB).backing(Backing::Memfd);
            MemoryBuilder::new().region(region).build::<()>().map(drop)
        };
        build().unwrap();
        let Some(mut mappings) = all_vmas(test) else {
            return;
        };
        let before = status("VmSize");
        let mut failed = 0;
        for _ in 0..8 {
            failed += u64::from(build().is_err());
            mappings.pop();
        }
        let (after, kept) = (status("VmSize"), still_mapped());
        assert!(
            after < before + MIB && kept == 0,
            "{before} bytes of addresses before, {after} after {failed} builds"
        );
        assert!((1..8).contains(&failed), "{failed}");
        build().unwrap();
    });
}

#[test]
fn map_of_whole_arena_in_locked_process_fits_three_times_its_size() {
    let test = "map_of_whole_arena_in_locked_process_fits_three_times_its_size";
    in_own_process(test, |test| {
        let file = temp_file_of_len(2 * MIB);
        // The alignment takes 2 MiB while the arena is reserved.
        if !lock_with_limit(6 * MIB + 64 * PAGE, test) {
            return;
        }
        let arena = Arena::new(2 * MIB).unwrap();
        for access in [Permissions::Read, Permissions::ReadWrite, Permissions::No] {
            let mapped = arena.map(0, arena.size(), &file, 0, access);
            mapped.map_err(|error| error_chain(&error)).unwrap();
        }
        assert_eq!(arena.mapped(), []);
    });
}

#[test]
fn discard_in_locked_process_adds_no_vmas() {
    in_own_process("discard_in_locked_process_adds_no_vmas", |test| {
        if let Err(error) = mlockall(MlockAllFlags::FUTURE) {
            return skipped(test, error);
        }
        let file = temp_file_of_len(4 * MIB);
        let region = Region::new(GuestAddress(0), 4 * MIB).backing(Backing::private_file(file, 0));
        let built = MemoryBuilder::new().region(region).build::<()>();
        match built {
            Err(error) => skipped(test, error),
            Ok(memory) => {
                let before = vmas().len();
                let (locked, resident) = (status("VmLck"), status("RssAnon"));
                for page in 0..500 {
                    let page = GuestAddress(page * PAGE);
                    memory.write_obj(1u8, page).unwrap();
                    assert_eq!(discard(&memory, page, PAGE).unwrap(), PAGE);
                    if page.0.is_multiple_of(2 * PAGE) {
                        memory.write_obj(1u8, page).unwrap();
                    }
                }
                let more = vmas().len() - before;
                assert!(more < 20, "{more} VMAs more");
                // The pages stay locked, and discarded pages are not resident.
                assert!(status("VmLck") + MIB > locked && status("VmLck") < locked + MIB);
                assert!(status("RssAnon") + 200 * PAGE < resident);
            }
        }
        munlockall().unwrap();
    });
}

#[test]
fn build_of_memfd_beyond_file_size_limit_returns_error() {
    in_own_process(
        "build_of_memfd_beyond_file_size_limit_returns_error",
        |_| {
            let _limit = Limited::to(Resource::Fsize, MIB);
            let memfd = |size| {
                let region = Region::new(GuestAddress(0), size).backing(Backing::Memfd);
                MemoryBuilder::new().region(region).build::<()>()
            };
            let error = memfd(16 * MIB).unwrap_err().to_string();
            assert!(
                error.contains("raise the file size limit (ulimit -f)"),
                "{error}"
            );
            assert!(memfd(MIB).is_ok());
        },
    );
}

#[test]
fn plug_of_truncated_file_beyond_file_size_limit_returns_error() {
    in_own_process(
        "plug_of_truncated_file_beyond_file_size_limit_returns_error",
        |test| {
            vm_memory::fault::install().unwrap();
            let Ok(file) = tempfile::tempfile_in("/dev/shm") else {
                return skipped(test, "no /dev/shm");
            };
            file.set_len(4 * MIB).unwrap();
            let backing = Backing::shared_file(file.try_clone().unwrap(), 0);
            let blocks = NonZeroU64::new(MIB).unwrap();
            let region = Region::new(GuestAddress(0), 4 * MIB).backing(backing);
            let region = region.blocks(blocks, Unplugged::Mapped);
            let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
            let _limit = Limited::to(Resource::Fsize, PAGE);
            // The limit does not concern the length that the file has.
            plug(&memory, GuestAddress(0), MIB).unwrap();
            file.set_len(PAGE).unwrap();
            // SIGXFSZ would end this process.
            let error = plug(&memory, GuestAddress(2 * MIB), MIB).unwrap_err();
            let error = error_chain(&error);
            assert!(error.contains("File too large"), "{error}");
        },
    );
}

#[test]
fn residency_at_address_space_limit_counts_file_pages() {
    in_own_process("residency_at_address_space_limit_counts_file_pages", |_| {
        let memory = private_file(1024 * MIB);
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let _limit = Limited::to(Resource::As, status("VmSize") + 72 * MIB);
        let usage = residency(&memory).unwrap()[0].1;
        assert_eq!(usage.private, PAGE);
        let _limit = Limited::to(Resource::As, status("VmSize") + 8 * MIB);
        let error = residency(&memory).unwrap_err().to_string();
        assert!(error.contains("ulimit -v"), "{error}");
    });
}

#[test]
fn residency_at_descriptor_limit_returns_error() {
    in_own_process("residency_at_descriptor_limit_returns_error", |_| {
        let region = Region::new(GuestAddress(0), MIB);
        let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
        let _limit = Limited::to(Resource::Nofile, 3);
        let error = residency(&memory).unwrap_err().to_string();
        assert!(error.contains("ulimit -n"), "{error}");
    });
}

#[test]
fn discard_and_plug_in_locked_process_succeed() {
    in_own_process("discard_and_plug_in_locked_process_succeed", |test| {
        if let Err(error) =
            mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
        {
            return skipped(test, error);
        }
        let region = || Region::new(GuestAddress(0), 4 * MIB);
        let build =
            |region| -> GuestMemoryMmap { MemoryBuilder::new().region(region).build().unwrap() };
        let memory = build(region());
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        assert_eq!(discard(&memory, GuestAddress(0), MIB).unwrap(), MIB);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
        let block = NonZeroU64::new(MIB).unwrap();
        vm_memory::fault::install().unwrap();
        let memory = build(region().blocks(block, Unplugged::Protected));
        plug(&memory, GuestAddress(MIB), MIB).unwrap();
        memory.write_obj(7u8, GuestAddress(MIB)).unwrap();
        unplug(&memory, GuestAddress(MIB), MIB).unwrap();
    });
}

#[test]
fn builder_of_description_after_vma_limit_closes_descriptors() {
    in_own_process(
        "builder_of_description_after_vma_limit_closes_descriptors",
        |test| {
            let description = Description::new(Vec::new());
            let Some(mut mappings) = all_vmas(test) else {
                return;
            };
            // No region refers to the descriptor. Closing it may wait, since it is not a memfd.
            let receive = || {
                let file = fs::File::open("/dev/null").unwrap();
                let open = format!("/proc/self/fd/{}", file.as_raw_fd());
                drop(description.builder(vec![file.into()].into()).unwrap());
                open
            };
            // More than there may be threads. Without a thread, the descriptor stays open.
            for _ in 0..80 {
                assert!(fs::exists(receive()).unwrap());
            }
            for _ in 0..24 {
                receive();
                // Leaves room for one more VMA.
                mappings.pop();
            }
            drop(mappings);
            let open = receive();
            while fs::exists(&open).unwrap() {
                std::thread::yield_now();
            }
        },
    );
}
