//! Builds in a jail without /sys and /proc.
//!
//! The tests change the root directory or the mounts of their process, so this is a separate
//! program.
#![cfg(target_os = "linux")]

mod every_region;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use every_region::writable_regions;
use rustix::mount::{mount, mount_change, MountFlags, MountPropagationFlags};
use rustix::process::{chroot, fchdir};
use rustix::thread::{unshare_unsafe, UnshareFlags};
use test_support::{skipped, temp_file_of_len, HugePages, MIB, PAGE_U64 as PAGE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, Permissions};
use vm_memory_host::{
    content, describe, discard, discard_pages, huge_page_pools, plug, plug_state, prefault,
    provisioned, residency, still_mapped, unplug, unplug_all, Arena, Backing, BackingDescription,
    Balloon, BuildError, HostResources, Lock, MemoryBuilder, NumaPolicy, PlugState, Region,
    Sharing, Span, TransparentHugePages, Unplugged,
};

/// Each test holds it from its start: a file may be missing while another test is in a jail.
static TURN: Mutex<()> = Mutex::new(());

fn take_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An empty root directory of this process, until it is dropped.
struct Jail<'a> {
    root: File,
    _directory: tempfile::TempDir,
    _turn: &'a MutexGuard<'static, ()>,
}

impl<'a> Jail<'a> {
    /// Reports `test` as skipped if this process may not change its root directory.
    fn enter(turn: &'a MutexGuard<'static, ()>, test: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let root = File::open("/").unwrap();
        if let Err(error) = chroot(directory.path()) {
            skipped(test, format!("chroot: {error}"));
            return None;
        }
        assert!(!fs::exists("/sys").unwrap());
        Some(Jail {
            root,
            _directory: directory,
            _turn: turn,
        })
    }
}

impl Drop for Jail<'_> {
    fn drop(&mut self) {
        fchdir(&self.root).and_then(|()| chroot(".")).unwrap();
    }
}

fn build(region: Region) -> Result<GuestMemoryMmap, BuildError> {
    MemoryBuilder::new().region(region).build()
}

#[test]
fn build_in_jail_without_sys_applies_transparent_huge_page_policies() {
    let turn = take_turn();
    let test = "build_in_jail_without_sys_applies_transparent_huge_page_policies";
    let enabled = "/sys/kernel/mm/transparent_hugepage/enabled";
    let mut smaps = File::open("/proc/self/smaps").unwrap();
    let has_huge_pages = fs::exists(enabled).unwrap();
    let Some(_jail) = Jail::enter(&turn, test) else {
        return;
    };
    if !has_huge_pages {
        return skipped(test, "no transparent huge pages");
    }
    let start = GuestAddress(0);
    let policies = [
        (TransparentHugePages::Off, "nh"),
        (TransparentHugePages::On, "hg"),
    ];
    // Mapped at the same time, so that each begins a VMA.
    let memories = policies.map(|(policy, flag)| {
        let region = Region::new(start, 8 * MIB).transparent_huge_pages(policy);
        (build(region).unwrap(), flag)
    });
    let mut text = String::new();
    smaps.read_to_string(&mut text).unwrap();
    for (memory, flag) in &memories {
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        let head = format!("{:x}-", mapping.host_address());
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
        let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.split(' ').any(|word| word == *flag), "{flags}");
    }
}

#[test]
fn build_in_jail_without_sys_takes_huge_pages() {
    let turn = take_turn();
    let test = "build_in_jail_without_sys_takes_huge_pages";
    vm_memory::fault::install().unwrap();
    let Some(pages) = HugePages::reserve(2, test) else {
        return;
    };
    let more_than_all = (pages.total() + 1) * 2 * MIB;
    let Some(_jail) = Jail::enter(&turn, test) else {
        return;
    };
    let region = |size, page_size| {
        Region::new(GuestAddress(0), size).backing(Backing::Hugetlb { page_size })
    };
    let memory = build(region(4 * MIB, 2 * MIB)).unwrap();
    memory.write_obj(7u8, GuestAddress(2 * MIB)).unwrap();
    drop(memory);
    let error = build(region(more_than_all, 2 * MIB)).unwrap_err();
    assert!(matches!(error, BuildError::System { .. }), "{error}");
    assert!(error.to_string().contains("nr_hugepages"), "{error}");
    let blocks = NonZeroU64::new(2 * MIB).unwrap();
    let memory = build(region(more_than_all, 2 * MIB).blocks(blocks, Unplugged::Mapped)).unwrap();
    let error = plug(&memory, GuestAddress(0), more_than_all).unwrap_err();
    assert!(error.to_string().contains("nr_hugepages"), "{error}");
    let state = plug_state(&memory, GuestAddress(0), more_than_all);
    assert_eq!(state.unwrap(), PlugState::Unplugged);
    drop(memory);
    // The kernel knows which sizes it has. It does not get one that it would round or replace.
    for size in [0, 1, 3 * MIB, 4 * MIB, 1 << 62] {
        let error = build(region(1 << 62, size)).unwrap_err();
        let is_refused = matches!(error, BuildError::NoSuchHugePage { .. });
        assert!(is_refused, "{size:#x}: {error}");
    }
}

#[test]
fn build_in_jail_without_sys_leaves_numa_nodes_to_kernel() {
    let turn = take_turn();
    let test = "build_in_jail_without_sys_leaves_numa_nodes_to_kernel";
    let Some(_jail) = Jail::enter(&turn, test) else {
        return;
    };
    let region = |node| {
        let policy = NumaPolicy::Bind(vec![node]);
        Region::new(GuestAddress(0), MIB).numa(policy)
    };
    match build(region(0)) {
        Ok(memory) => memory.write_obj(7u8, GuestAddress(0)).unwrap(),
        // A kernel without NUMA.
        Err(error) => skipped(test, error),
    }
    let error = build(region(900)).unwrap_err();
    assert!(matches!(error, BuildError::System { .. }), "{error}");
    assert!(error.to_string().contains("NUMA"), "{error}");
}

#[test]
fn residency_in_jail_without_proc_counts_resident_pages() {
    let turn = take_turn();
    let Some(_jail) = Jail::enter(
        &turn,
        "residency_in_jail_without_proc_counts_resident_pages",
    ) else {
        return;
    };
    let memory = build(Region::new(GuestAddress(0), MIB)).unwrap();
    memory.write_obj(7u8, GuestAddress(0)).unwrap();
    let (_, usage) = residency(&memory).unwrap()[0];
    assert!(usage.is_partial);
    assert!((1..=MIB).contains(&usage.resident), "{usage:?}");
    assert_eq!((usage.mapped, usage.private), (0, 0));
}

#[test]
fn content_in_jail_without_proc_is_whole_region() {
    let turn = take_turn();
    let Some(_jail) = Jail::enter(&turn, "content_in_jail_without_proc_is_whole_region") else {
        return;
    };
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let memory = build(Region::new(GuestAddress(0), MIB).backing(backing)).unwrap();
        let found: Result<Vec<_>, _> = content(&memory).unwrap().collect();
        let all = Span {
            start: 0,
            size: MIB,
        };
        assert_eq!(found.unwrap(), [all]);
    }
}

/// Moves this thread to a mount namespace in which /sys and /proc are empty.
#[expect(unsafe_code, reason = "rustix marks this system call as unsafe")]
fn hide_sys_and_proc() -> io::Result<()> {
    // SAFETY: a mount namespace of this thread changes no descriptors and no memory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    for path in ["/sys", "/proc"] {
        mount("none", path, "tmpfs", MountFlags::RDONLY, None)?;
        assert_eq!(fs::read_dir(path)?.count(), 0);
    }
    Ok(())
}

const START: u64 = 1 << 32;

/// Returns these regions, and read-only ones.
fn regions(has_huge_pages: bool) -> Vec<Region> {
    let start = GuestAddress(START);
    let mut all = writable_regions(start, 4 * MIB, has_huge_pages);
    let file = || temp_file_of_len(4 * MIB);
    for backing in [
        Backing::shared_file(file(), 0),
        Backing::private_file(file(), 0),
    ] {
        all.push(Region::new(start, 4 * MIB).backing(backing).read_only(true));
    }
    all
}

/// Builds and uses memory, and returns the properties that a jail must not change.
fn use_memory(region: Region, host: Option<&HostResources>, smaps: &mut File) -> String {
    let mut builder = MemoryBuilder::new().region(region);
    if let Some(host) = host {
        builder = builder.host_resources(host.clone());
    }
    let memory: GuestMemoryMmap = builder.build().unwrap();
    let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
    let options = mapping.options();
    if options.transparent_huge_pages != TransparentHugePages::Off {
        let huge = 2 * MIB as usize;
        assert!(mapping.host_address().is_multiple_of(huge), "{mapping:?}");
    }
    let mut properties = vma_properties(mapping.host_address(), smaps);
    properties += &if options.read_only {
        read(&memory)
    } else {
        change(&memory, mapping.plugged_blocks().is_some())
    };
    properties += &build_again(&memory);
    drop(memory);
    assert_eq!(still_mapped(), 0);
    properties
}

/// Returns the properties of the VMA that contains an address.
fn vma_properties(address: usize, smaps: &mut File) -> String {
    let mut text = String::new();
    smaps.rewind().unwrap();
    smaps.read_to_string(&mut text).unwrap();
    // Inaccessible blocks are in one VMA with the guard.
    let begins_vma = |line: &&str| {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let number = |text| usize::from_str_radix(text, 16).ok();
        let range = range.and_then(|(start, end)| Some(number(start)?..number(end)?));
        range.is_some_and(|range| range.contains(&address))
    };
    let mut vma = text.lines().skip_while(|line| !begins_vma(line));
    // The inode of a memfd differs.
    let protection = vma.next().unwrap().split(' ').nth(1).unwrap();
    let of_vma = |line: &&str| line.starts_with("Rss:") || line.starts_with("VmFlags:");
    let vma: Vec<_> = vma.filter(of_vma).take(2).collect();
    format!("{protection} {vma:?}")
}

fn prefault_all(memory: &GuestMemoryMmap) {
    let threads = NonZeroUsize::new(2).unwrap();
    prefault(memory, threads, |_| ControlFlow::Continue(())).unwrap();
}

/// Reads a region that can only be read.
fn read(memory: &GuestMemoryMmap) -> String {
    prefault_all(memory);
    let first = GuestAddress(START);
    assert_eq!(memory.read_obj::<u8>(first).unwrap(), 0);
    assert!(memory.write_obj(1u8, first).is_err());
    let error = discard(memory, first, 2 * MIB).unwrap_err();
    let report = discard_pages(memory, [START / PAGE]);
    assert_eq!((report.discarded, report.refused), (0, 1));
    let resident = residency(memory).unwrap()[0].1.resident;
    assert_eq!(resident, 4 * MIB);
    format!("{error} {report}")
}

/// Uses all operations that change memory.
fn change(memory: &GuestMemoryMmap, has_blocks: bool) -> String {
    let (first, second) = (GuestAddress(START), GuestAddress(START + 2 * MIB));
    let state = || plug_state(memory, first, 4 * MIB).unwrap();
    if has_blocks {
        assert_eq!(plug(memory, second, 2 * MIB).unwrap(), 2 * MIB);
        assert_eq!(state(), PlugState::Mixed);
        assert_eq!(plug(memory, first, 4 * MIB).unwrap(), 2 * MIB);
    }
    prefault_all(memory);
    memory.write_obj(7u8, first).unwrap();
    let ranges: Vec<_> = content(memory).unwrap().map(Result::unwrap).collect();
    assert_eq!((ranges[0].start, ranges.len()), (START, 1));
    assert!(residency(memory).unwrap()[0].1.resident > 0);
    let freed = discard(memory, first, 2 * MIB).unwrap();
    assert_eq!(memory.read_obj::<u8>(first).unwrap(), 0);
    memory.write_obj(7u8, first).unwrap();
    memory.write_obj(7u8, second).unwrap();
    let pages = |addr: GuestAddress| addr.0 / PAGE..(addr.0 + 2 * MIB) / PAGE;
    let listed = discard_pages(memory, pages(first).rev());
    let inflated = Balloon::new().inflate(memory, pages(second));
    // The balloon does not change huge pages that stay with their region.
    let expected = if inflated.kept == 0 { 0 } else { 7 };
    for (addr, byte) in [(first, 0), (second, expected)] {
        assert_eq!(memory.read_obj::<u8>(addr).unwrap(), byte);
    }
    if has_blocks {
        assert_eq!(unplug(memory, first, 2 * MIB).unwrap(), 2 * MIB);
        assert_eq!(unplug_all(memory, first).unwrap(), 2 * MIB);
        assert_eq!(state(), PlugState::Unplugged);
        plug(memory, first, 4 * MIB).unwrap();
    }
    format!("{freed:#x} {listed} {inflated}")
}

/// Builds memory again from its descriptors, and its layout without them. Returns its description.
fn build_again(memory: &GuestMemoryMmap) -> String {
    let (description, files) = describe(memory).unwrap();
    let received = files.iter().map(|file| file.try_clone().unwrap().into());
    let builder = description.builder(received.collect()).unwrap();
    let again: GuestMemoryMmap = builder.build().unwrap();
    // A region that can only be read keeps its byte.
    let addr = GuestAddress(START + MIB);
    let written = memory.write_obj(9u8, addr).is_ok();
    let shared = match description.regions[0].backing {
        BackingDescription::Descriptor { sharing, .. } => sharing == Sharing::Shared,
        _ => false,
    };
    let byte = if written && shared { 9 } else { 0 };
    assert_eq!(again.read_obj::<u8>(addr).unwrap(), byte);
    assert!(residency(&again).is_ok());
    drop(again);
    let fresh: GuestMemoryMmap = description.fresh().unwrap().build().unwrap();
    fresh.write_obj(9u8, addr).unwrap();
    format!("{description:?}")
}

/// Maps a part of a file in reserved addresses, and unmaps it.
fn use_arena(file: &File) {
    let arena = Arena::new(8 * MIB).unwrap();
    assert!(arena.host_address().is_multiple_of(2 * MIB as usize));
    let access = Permissions::ReadWrite;
    arena.map(2 * MIB, MIB, file, MIB, access).unwrap();
    arena.map(4 * MIB, MIB, file, 0, Permissions::Read).unwrap();
    assert_eq!(arena.mapped(), [(2 * MIB, MIB), (4 * MIB, MIB)]);
    arena.unmap(0, 4 * MIB).unwrap();
    assert_eq!(arena.mapped(), [(4 * MIB, MIB)]);
    arena.map(0, 9 * MIB, file, 0, access).unwrap_err();
}

#[test]
fn memory_in_mount_namespace_without_sys_and_proc_is_the_same() {
    let _turn = take_turn();
    let test = "memory_in_mount_namespace_without_sys_and_proc_is_the_same";
    vm_memory::fault::install().unwrap();
    let pages = HugePages::reserve(4, test);
    let regions = regions(pages.is_some());
    let file = temp_file_of_len(4 * MIB);
    let mut smaps = File::open("/proc/self/smaps").unwrap();
    let outside = regions
        .iter()
        .map(|region| use_memory(region.clone(), None, &mut smaps));
    let outside: Vec<_> = outside.collect();
    let (host, pools) = (HostResources::read(), huge_page_pools());
    let jailed = || {
        if let Err(error) = hide_sys_and_proc() {
            return skipped(test, format!("cannot create a mount namespace: {error}"));
        }
        assert!(huge_page_pools().is_empty());
        use_arena(&file);
        for (region, outside) in regions.iter().zip(&outside) {
            for host in [None, Some(&host)] {
                let inside = use_memory(region.clone(), host, &mut smaps);
                assert_eq!(&inside, outside);
            }
        }
        // Resources that were read before have the limits.
        let host = |region: Region| {
            let builder = MemoryBuilder::new().host_resources(host.clone());
            builder.region(region).build::<()>().map(drop).unwrap_err()
        };
        let region = Region::new(GuestAddress(0), 1 << 46);
        let error = host(region.clone().lock(Lock::Now));
        assert!(matches!(error, BuildError::Memory { .. }), "{error}");
        let error = host(Region::new(GuestAddress(0), MIB).numa(NumaPolicy::Bind(vec![900])));
        assert!(matches!(error, BuildError::NoSuchNode { .. }), "{error}");
        if let Some(pool) = pools.first() {
            let page_size = pool.page_size;
            let error = host(region.backing(Backing::Hugetlb { page_size }));
            assert!(matches!(error, BuildError::HugePages { .. }), "{error}");
        }
    };
    std::thread::scope(|scope| scope.spawn(jailed).join()).unwrap();
}
