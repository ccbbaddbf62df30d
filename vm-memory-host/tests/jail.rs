//! Builds in a jail without /sys and /proc.
//!
//! The tests change the root directory of their process, so this is a separate program.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::Read;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{chroot, fchdir};
use test_support::{skipped, HugePages, MIB};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{
    content, provisioned, residency, Backing, BuildError, MemoryBuilder, NumaPolicy, Region, Span,
    TransparentHugePages,
};

/// An empty root directory of this process, until it is dropped.
struct Jail {
    root: File,
    _directory: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Jail {
    /// Reports `test` as skipped if this process may not change its root directory.
    fn enter(test: &str) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
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

impl Drop for Jail {
    fn drop(&mut self) {
        fchdir(&self.root).and_then(|()| chroot(".")).unwrap();
    }
}

fn build(region: Region) -> Result<GuestMemoryMmap, BuildError> {
    MemoryBuilder::new().region(region).build()
}

#[test]
fn build_in_jail_without_sys_applies_transparent_huge_page_policies() {
    let test = "build_in_jail_without_sys_applies_transparent_huge_page_policies";
    let enabled = "/sys/kernel/mm/transparent_hugepage/enabled";
    let mut smaps = File::open("/proc/self/smaps").unwrap();
    let has_huge_pages = fs::exists(enabled).unwrap();
    let Some(_jail) = Jail::enter(test) else {
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
    let test = "build_in_jail_without_sys_takes_huge_pages";
    let Some(pages) = HugePages::reserve(2, test) else {
        return;
    };
    let more_than_all = (pages.total() + 1) * 2 * MIB;
    let Some(_jail) = Jail::enter(test) else {
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
    // The kernel knows which sizes it has. It does not get one that it would round or replace.
    for size in [0, 1, 3 * MIB, 4 * MIB, 1 << 62] {
        let error = build(region(1 << 62, size)).unwrap_err();
        let is_refused = matches!(error, BuildError::NoSuchHugePage { .. });
        assert!(is_refused, "{size:#x}: {error}");
    }
}

#[test]
fn build_in_jail_without_sys_leaves_numa_nodes_to_kernel() {
    let test = "build_in_jail_without_sys_leaves_numa_nodes_to_kernel";
    let Some(_jail) = Jail::enter(test) else {
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
    let Some(_jail) = Jail::enter("residency_in_jail_without_proc_counts_resident_pages") else {
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
    let Some(_jail) = Jail::enter("content_in_jail_without_proc_is_whole_region") else {
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
