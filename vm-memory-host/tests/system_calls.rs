//! The table of system calls in the crate documentation lists the calls that are made.
//!
//! The allocator of this program makes no system calls, so it is a separate program.
#![cfg(all(target_os = "linux", not(miri)))]

mod every_region;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Result;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use every_region::{writable_regions, HUGE};
use serde_json::Value;
use test_support::{
    call_rows, documented_calls, in_own_process, record_calls, skipped, temp_file_of_len, Call,
    CallRecorder, CallRow, HugePages, StaticAllocator, MIB, PAGE_U64 as PAGE,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, Permissions};
use vm_memory_host::{
    content, describe, discard, discard_pages, huge_page_pools, plug, plug_state, prefault,
    residency, still_mapped, unplug, unplug_all, zero_range, Arena, Backing, Balloon, Description,
    Descriptors, HostResources, MemoryBuilder, NumaPolicy, PlugState, Region, TransparentHugePages,
    Unplugged, SECCOMP_FILTERS,
};

/// The documentation with the tables.
const TABLE: &str = include_str!("../src/lib.rs");

#[global_allocator]
static ALLOCATOR: StaticAllocator = StaticAllocator::new();

fn region(backing: Backing) -> Region {
    Region::new(GuestAddress(0), 4 * HUGE).backing(backing)
}

fn file() -> File {
    temp_file_of_len(4 * HUGE)
}

/// Builds, uses and drops memory of one kind.
fn use_memory(recorder: &mut CallRecorder, region: Region) -> Result<()> {
    let has_blocks = format!("{region:?}").contains("blocks: Some");
    let build = || MemoryBuilder::new().region(region.clone()).build();
    let memory: GuestMemoryMmap = recorder.run("MemoryBuilder::build", build)?.unwrap();
    let first = GuestAddress(0);
    recorder.run("content", || content(&memory).unwrap().count())?;
    if has_blocks {
        let plugged = recorder.run("plug", || plug(&memory, first, 2 * HUGE))?;
        plugged.unwrap();
    }
    memory.write_obj(1u8, first).unwrap();
    for _ in 0..2 {
        let discarded = recorder.run("discard", || discard(&memory, first, 2 * HUGE))?;
        discarded.unwrap();
        memory.write_obj(1u8, first).unwrap();
    }
    // The pages of two huge pages.
    let listed = recorder.run("discard", || discard_pages(&memory, 0..1024u32))?;
    assert_eq!(listed.refused, 0);
    memory.write_obj(1u8, first).unwrap();
    let inflate = || Balloon::new().inflate(&memory, 0..1024u32);
    assert_eq!(recorder.run("discard", inflate)?.refused, 0);
    memory.write_obj(1u8, first).unwrap();
    let zeroed = recorder.run("discard", || {
        zero_range(&memory, GuestAddress(1), 2 * HUGE - 1)
    })?;
    zeroed.unwrap();
    memory.write_obj(1u8, first).unwrap();
    let usage = recorder.run("residency", || residency(&memory))?;
    usage.unwrap();
    recorder.run("content", || content(&memory).unwrap().count())?;
    let description = recorder.run("describe", || describe(&memory).map(drop))?;
    description.unwrap();
    if has_blocks {
        let state = recorder.run("plug_state", || plug_state(&memory, first, 4 * HUGE))?;
        assert_eq!(state.unwrap(), PlugState::Mixed);
        let unplugged = recorder.run("unplug", || unplug(&memory, first, HUGE))?;
        assert_eq!(unplugged.unwrap(), HUGE);
        let unplugged = recorder.run("unplug", || unplug_all(&memory, first))?;
        assert_eq!(unplugged.unwrap(), HUGE);
    }
    recorder.run("drop of the last map", || drop(memory))
}

/// Prefaults with several threads, and drops one of two adjacent regions.
fn use_adjacent_regions(recorder: &mut CallRecorder) -> Result<()> {
    let region = |start: u64| Region::new(GuestAddress(start), 80 * MIB);
    let numa = region(80 * MIB).numa(NumaPolicy::Preferred(0));
    let builder = MemoryBuilder::new().region(region(0)).region(numa);
    let memory: GuestMemoryMmap = builder.build().unwrap();
    let threads = NonZeroUsize::new(3).unwrap();
    let run = || prefault(&memory, threads, |_| ControlFlow::Continue(()));
    recorder.run("prefault", run)?.unwrap();
    let (rest, region) = memory.remove_region(GuestAddress(0), 80 * MIB).unwrap();
    drop(memory);
    recorder.run("drop of the last map", || drop(region))?;
    recorder.run("drop of the last map", || drop(rest))
}

/// Maps and unmaps a file in an arena.
fn use_arena(recorder: &mut CallRecorder) -> Result<()> {
    let arena = recorder
        .run("Arena::new", || Arena::new(8 * HUGE))?
        .unwrap();
    let file = file();
    let access = Permissions::ReadWrite;
    let map = || arena.map(HUGE, HUGE, &file, 0, access);
    recorder.run("Arena::map", map)?.unwrap();
    recorder
        .run("Arena::unmap", || arena.unmap(0, 4 * HUGE))?
        .unwrap();
    Ok(())
}

/// Builds memory with blocks, of which the first is plugged, and describes it.
fn described() -> (Description, Vec<OwnedFd>) {
    let blocks = NonZeroU64::new(HUGE).unwrap();
    let second = Region::new(GuestAddress(8 * HUGE), 4 * HUGE).backing(Backing::Memfd);
    let builder = MemoryBuilder::new().region(region(Backing::Memfd));
    let builder = builder.region(second.blocks(blocks, Unplugged::Mapped));
    let memory: GuestMemoryMmap = builder.build().unwrap();
    plug(&memory, GuestAddress(8 * HUGE), HUGE).unwrap();
    let (mut description, files) = describe(&memory).unwrap();
    for region in &mut description.regions {
        region.options.sealed = true;
    }
    let files = files.iter().map(|file| file.try_clone().unwrap().into());
    (description, files.collect())
}

/// Builds memory from a description, and changes its blocks.
fn use_description(recorder: &mut CallRecorder) -> Result<()> {
    let (description, files) = described();
    let received = || {
        let files = files.iter().map(|file| file.try_clone().unwrap());
        Descriptors::from(files.collect::<Vec<_>>())
    };
    let (unused, descriptors) = (received(), received());
    recorder.run("drop of [`Descriptors`]", || drop(unused))?;
    let builder = recorder.run("Description::builder", || description.builder(descriptors))?;
    let builder = builder.unwrap();
    let same = recorder.run("MemoryBuilder::build", || builder.build::<()>())?;
    let same = same.unwrap();
    let builder = recorder.run("Description::fresh", || description.fresh())?;
    let builder = builder.unwrap();
    let fresh = recorder.run("MemoryBuilder::build", || builder.build::<()>())?;
    let fresh = fresh.unwrap();
    let unplug = || unplug_all(&fresh, GuestAddress(8 * HUGE)).unwrap();
    assert_eq!(recorder.run("unplug", unplug)?, HUGE);
    let plug = || description.apply_blocks(&fresh);
    recorder.run("plug", plug)?.unwrap();
    let compare = || description.missing_from(&same).regions.len();
    assert_eq!(recorder.run("Description::missing_from", compare)?, 0);
    let compare = || description.surplus_in(&same).len();
    assert_eq!(recorder.run("Description::surplus_in", compare)?, 0);
    Ok(())
}

/// Plugs more huge pages than the pool has.
fn plug_too_much(recorder: &mut CallRecorder) -> Result<()> {
    let pools = huge_page_pools();
    let pool = pools.iter().find(|pool| pool.page_size == HUGE).unwrap();
    let size = (pool.free + pool.overcommit + 1) * HUGE;
    let region = Region::new(GuestAddress(0), size).backing(Backing::Hugetlb { page_size: HUGE });
    let blocks = region.blocks(NonZeroU64::new(HUGE).unwrap(), Unplugged::Mapped);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(blocks).build().unwrap();
    let plugged = recorder.run("plug", || plug(&memory, GuestAddress(0), size))?;
    plugged.unwrap_err();
    Ok(())
}

/// Runs all scenarios. Fails if calls cannot be recorded.
fn use_everything(recorder: &mut CallRecorder, has_huge_pages: bool) -> Result<()> {
    use_arena(recorder)?;
    use_description(recorder)?;
    for region in writable_regions(GuestAddress(0), 4 * HUGE, has_huge_pages) {
        use_memory(recorder, region)?;
    }
    use_adjacent_regions(recorder)?;
    if has_huge_pages {
        plug_too_much(recorder)?;
    }
    recorder.run("huge_page_pools", huge_page_pools)?;
    recorder.run("HostResources::read", HostResources::read)?;
    recorder.run("still_mapped", still_mapped)?;
    Ok(())
}

fn filters() -> Value {
    serde_json::from_str(SECCOMP_FILTERS).unwrap()
}

/// Returns the rules of the filter for a phase of the table.
fn rules<'a>(filters: &'a Value, phase: &str) -> &'a [Value] {
    filters[phase.replace(' ', "_")]["filter"]
        .as_array()
        .unwrap()
}

/// Returns whether a rule permits the arguments of a call.
fn permits(rule: &Value, call: &Call) -> bool {
    let conditions = rule["args"].as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().all(|condition| {
        let index = condition["index"].as_u64().unwrap() as usize;
        let argument = match condition["type"].as_str() {
            Some("dword") => call.arguments[index] & u64::from(u32::MAX),
            _ => call.arguments[index],
        };
        let mask = match &condition["op"] {
            Value::String(op) if op == "eq" => u64::MAX,
            op => op["masked_eq"].as_u64().unwrap(),
        };
        Some(argument & mask) == condition["val"].as_u64()
    })
}

/// Returns the calls that the filter for the phase of their function refuses.
fn refused_by_filters(recorder: &CallRecorder) -> Vec<String> {
    let (filters, rows) = (filters(), call_rows(TABLE));
    let phase = |function: &str| {
        let row = rows.iter().find(|row| row.function == function);
        &row.unwrap().phase
    };
    let refused = recorder.calls().filter(|(function, name, call)| {
        let rules = rules(&filters, phase(function)).iter();
        let mut rules = rules.filter(|rule| rule["syscall"] == **name);
        !rules.any(|rule| permits(rule, call))
    });
    refused
        .map(|(function, name, call)| format!("{function}: {name} {:x?}", call.arguments))
        .collect()
}

#[test]
fn seccomp_filters_have_the_calls_of_the_documentation() {
    let mut rows = call_rows(TABLE);
    rows.extend(call_rows(include_str!("../../src/lib.rs")));
    let is_for_xen = |row: &CallRow| row.condition.contains("Xen") || row.function.contains("Xen");
    rows.retain(|row| !is_for_xen(row));
    for phase in ["boot", "run time", "migration"] {
        let filters = filters();
        let calls = rules(&filters, phase).iter();
        let found: BTreeSet<_> = calls
            .map(|rule| rule["syscall"].as_str().unwrap())
            .collect();
        let rows = rows
            .iter()
            .filter(|row| row.phase == phase || row.phase == "all");
        let mut documented: BTreeSet<_> = rows
            .flat_map(|row| &row.calls)
            .map(String::as_str)
            .collect();
        // Versions of the C library differ in these.
        for (call, other) in [("newfstatat", "fstat"), ("clone3", "clone")] {
            if documented.contains(call) {
                documented.insert(other);
            }
        }
        assert_eq!(found, documented, "{phase}");
    }
}

#[test]
fn seccomp_filters_limit_the_arguments_of_the_documentation() {
    let filters = filters();
    let mut limited: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for phase in ["boot", "run time", "migration"] {
        for rule in rules(&filters, phase)
            .iter()
            .filter(|rule| !rule["args"].is_null())
        {
            let call = format!("| {phase} | {} |", rule["syscall"].as_str().unwrap());
            let permitted = rule["comment"].as_str().unwrap();
            limited.entry(call).or_default().push(permitted);
        }
    }
    let rows = limited
        .into_iter()
        .map(|(call, permitted)| format!("{call} {} |", permitted.join(", ")));
    let (_, section) = TABLE.split_once("//! # Seccomp filters").unwrap();
    let lines = section
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with("//!"));
    let documented = lines.filter_map(|line| line.strip_prefix("//! "));
    let documented =
        documented.filter(|line| line.starts_with("| ") && !line.contains("permitted"));
    let documented: BTreeSet<_> = documented.map(|line| line.replace('`', "")).collect();
    assert_eq!(documented, rows.collect());
}

#[test]
fn system_calls_are_those_of_the_documentation() {
    let test = "system_calls_are_those_of_the_documentation";
    vm_memory::fault::install().unwrap();
    let pages = HugePages::reserve(16, test);
    let mut recorder = CallRecorder::default();
    if let Err(error) = use_everything(&mut recorder, pages.is_some()) {
        return skipped(test, error);
    }
    let table = documented_calls(TABLE);
    assert_eq!(recorder.undocumented(&table), Vec::<String>::new());
    assert_eq!(refused_by_filters(&recorder), Vec::<String>::new());
    if pages.is_none() {
        return skipped(test, "no huge pages, so some calls are not made");
    }
    let mut rare = vec![
        // These need a block device, too little memory, and mlockall(2), in this order.
        "MemoryBuilder::build: ioctl",
        "prefault: mincore",
        "discard: munlock",
        // These need an old kernel, and a process that truncates a file at that moment.
        "MemoryBuilder::build: fchmod",
        "MemoryBuilder::build: rt_sigtimedwait",
        "discard: rt_sigtimedwait",
        "plug: rt_sigtimedwait",
        // This needs a file of huge pages.
        "Arena::map: munmap",
        // The kernel does not lack memory for page tables.
        "Arena::map: mincore",
        "Arena::unmap: mincore",
        // Another test of this program may build the first memory.
        "Arena::new: madvise",
        "Arena::new: openat",
        "Arena::new: read",
        "Arena::new: statx",
        "Arena::new: close",
        // The C library may reuse stacks, and a thread need not wait for another one.
        "prefault: mmap",
        "prefault: mprotect",
        "prefault: munmap",
        "prefault: futex",
    ];
    if tempfile::tempfile_in("/dev/shm").is_err() {
        rare.push("plug: rt_sigprocmask");
    }
    let unused = recorder.unused(&table).into_iter();
    let unused: Vec<_> = unused
        .filter(|call| !rare.contains(&call.as_str()))
        .collect();
    assert_eq!(unused, Vec::<String>::new());
}

/// The kernel fills a page that it allocates. A guest could have one page of 1 GiB filled again and
/// again, by two small requests of a balloon.
#[test]
fn discard_of_released_huge_pages_allocates_each_once() {
    let test = "discard_of_released_huge_pages_allocates_each_once";
    let Some(_pages) = HugePages::reserve(4, test) else {
        return;
    };
    let region = region(Backing::Hugetlb { page_size: HUGE }).release_huge_pages(true);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
    let mut balloon = Balloon::new();
    let mut recorder = CallRecorder::default();
    let mut record = || {
        let inflate = || balloon.inflate(&memory, 0..1024u32).discarded;
        assert_eq!(recorder.run("inflate", inflate)?, 1024);
        balloon.deflate(&memory, [7u32]);
        let again = || balloon.inflate(&memory, [7u32]).discarded;
        assert_eq!(recorder.run("inflate again", again)?, 512);
        let discard = || discard(&memory, GuestAddress(0), 3 * HUGE).unwrap();
        recorder.run("discard", discard)
    };
    if let Err(error) = record() {
        return skipped(test, error);
    }
    let calls = |wanted, name| {
        let calls = recorder.calls();
        let calls = calls.filter(|(function, call, _)| *function == wanted && call == name);
        calls.count()
    };
    let both = |function| (calls(function, "fallocate"), calls(function, "madvise"));
    // MADV_REMOVE and MADV_DONTNEED for each page.
    assert_eq!(both("inflate"), (2, 4));
    assert_eq!(both("inflate again"), (0, 2));
    // Only the third page has not been released.
    assert_eq!(both("discard"), (1, 6));
}

/// Guests cause these calls at run time, when a seccomp filter may forbid open(2). The process runs
/// no other test, which could read the files in advance. Protected blocks would read the limit of
/// VMAs during the build, and hide a later read.
#[test]
fn discard_and_plug_after_build_open_no_files() {
    in_own_process("discard_and_plug_after_build_open_no_files", |test| {
        let build = |region: Region| -> GuestMemoryMmap {
            MemoryBuilder::new().region(region).build().unwrap()
        };
        let private = || region(Backing::private_file(file(), 0));
        let memories = [
            build(private()),
            build(private().transparent_huge_pages(TransparentHugePages::Off)),
            build(region(Backing::Anonymous)),
            build(region(Backing::Memfd)),
            build(region(Backing::shared_file(file(), 0))),
        ];
        let blocks = NonZeroU64::new(HUGE).unwrap();
        let blocks = build(region(Backing::Memfd).blocks(blocks, Unplugged::Mapped));
        let recorded = record_calls(|| {
            for memory in &memories {
                memory.write_obj(7u8, GuestAddress(PAGE)).unwrap();
                assert_eq!(discard(memory, GuestAddress(PAGE), PAGE).unwrap(), PAGE);
                assert_eq!(memory.read_obj::<u8>(GuestAddress(PAGE)).unwrap(), 0);
                assert_eq!(discard_pages(memory, [1u32, 3, 2]).discarded, 3);
            }
            plug(&blocks, GuestAddress(0), 2 * HUGE).unwrap();
            unplug(&blocks, GuestAddress(0), HUGE).unwrap();
            unplug_all(&blocks, GuestAddress(0)).unwrap();
        });
        let calls = match recorded {
            Ok(((), calls)) => calls,
            Err(error) => return skipped(test, error),
        };
        let open = [
            libc::SYS_openat,
            libc::SYS_openat2,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open,
        ];
        assert!(calls.is_disjoint(&open.into()), "{calls:?}");
        assert!(calls.contains(&libc::SYS_madvise), "{calls:?}");
    });
}

/// The sender of a memfd can hold its lock, for which fallocate(2), lseek(2) and others wait.
#[test]
fn build_from_description_makes_no_call_that_waits_for_its_sender() {
    let test = "build_from_description_makes_no_call_that_waits_for_its_sender";
    let (description, files) = described();
    let numbers: Vec<u64> = files.iter().map(|file| file.as_raw_fd() as u64).collect();
    let mut recorder = CallRecorder::default();
    let build = || description.builder(files.into()).unwrap().build::<()>();
    match recorder.run("build", build) {
        Ok(memory) => drop(memory.unwrap()),
        Err(error) => return skipped(test, error),
    }
    let calls = recorder.calls().filter(|(_, name, call)| {
        let file = if name == "mmap" { 4 } else { 0 };
        numbers.contains(&call.arguments[file])
    });
    let names: BTreeSet<String> = calls.map(|(_, name, _)| name).collect();
    let expected = ["fcntl", "fstatfs", "mmap", "statx"].map(str::to_owned);
    assert_eq!(names, expected.into());
}

/// A peer can seal its file between two calls, so the second one would be refused. mmap(2) with
/// MAP_FIXED may unmap its target before that, and leave a hole in the window of the guest.
#[test]
fn map_in_arena_asks_the_file_once_and_never_with_map_fixed() {
    let test = "map_in_arena_asks_the_file_once_and_never_with_map_fixed";
    let mut recorder = CallRecorder::default();
    if let Err(error) = use_arena(&mut recorder) {
        return skipped(test, error);
    }
    let calls = recorder.calls();
    let calls = calls.filter(|(function, name, _)| *function == "Arena::map" && name == "mmap");
    let of_file = calls.filter(|(_, _, call)| call.arguments[4] as i32 >= 0);
    let flags: Vec<_> = of_file
        .map(|(_, _, call)| call.arguments[3] as i32)
        .collect();
    assert_eq!(flags.len(), 1, "{flags:x?}");
    assert_eq!(flags[0] & libc::MAP_FIXED, 0, "{flags:x?}");
}

#[test]
#[expect(unsafe_code, reason = "protects a block as unplug does")]
fn access_makes_no_system_call_unless_it_faults() {
    let test = "access_makes_no_system_call_unless_it_faults";
    vm_memory::fault::install().unwrap();
    let blocks = NonZeroU64::new(HUGE).unwrap();
    let region = region(Backing::Anonymous).blocks(blocks, Unplugged::Protected);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
    let access = || memory.write_obj(1u8, GuestAddress(0)).is_ok();
    plug(&memory, GuestAddress(0), HUGE).unwrap();
    let calls = match record_calls(access) {
        Ok((true, calls)) => calls,
        Ok(_) => panic!("the access fails"),
        Err(error) => return skipped(test, error),
    };
    assert!(calls.is_empty(), "{calls:?}");
    unplug(&memory, GuestAddress(0), HUGE).unwrap();
    assert!(!access());
    // Protecting the block simulates an access that began before the block was unplugged.
    plug(&memory, GuestAddress(0), HUGE).unwrap();
    let host = memory.get_host_address(GuestAddress(0)).unwrap();
    // SAFETY: the block belongs to `memory`, and no reference to its bytes exists.
    let protected = unsafe { libc::mprotect(host.cast(), HUGE as usize, libc::PROT_NONE) };
    assert_eq!(protected, 0);
    let (is_ok, calls) = record_calls(access).unwrap();
    assert!(!is_ok);
    assert_eq!(calls, BTreeSet::from([libc::SYS_rt_sigreturn]));
}

#[test]
fn build_of_block_device_does_not_change_its_position() {
    let test = "build_of_block_device_does_not_change_its_position";
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 * HUGE).unwrap();
    let losetup = |arguments: &[&OsStr]| Command::new("losetup").args(arguments).output();
    let attached = losetup(&["--find".as_ref(), "--show".as_ref(), file.path().as_ref()]);
    let path = match attached {
        Ok(done) if done.status.success() => String::from_utf8(done.stdout).unwrap(),
        other => return skipped(test, format!("no loop device: {other:?}")),
    };
    let device = File::options().read(true).write(true).open(path.trim());
    let build = || {
        let backing = Backing::shared_file(device.unwrap(), 0);
        MemoryBuilder::new()
            .region(region(backing))
            .build::<()>()
            .map(drop)
    };
    let built = record_calls(build);
    losetup(&["--detach".as_ref(), path.trim().as_ref()]).unwrap();
    let (built, calls) = match built {
        Ok(built) => built,
        Err(error) => return skipped(test, error),
    };
    built.unwrap();
    assert!(calls.contains(&libc::SYS_ioctl), "{calls:?}");
    assert!(!calls.contains(&libc::SYS_lseek), "{calls:?}");
}
