//! The table of system calls in the crate documentation lists the calls that are made.
//!
//! The allocator of this program makes no system calls, so it is a program of its own.
#![cfg(all(target_os = "linux", not(miri)))]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use test_support::{record_calls, skipped, temp_file_of_len, HugePages, StaticAllocator};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{
    content, describe, discard, huge_page_pools, plug, prefault, provisioned, residency,
    still_mapped, unplug, Backing, Lock, MemoryBuilder, NumaPolicy, Region, TransparentHugePages,
    Unplugged,
};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

#[global_allocator]
static ALLOCATOR: StaticAllocator = StaticAllocator::new();

/// Returns the name of a system call.
fn name(number: i64) -> String {
    macro_rules! names {
        ($($name:ident: $number:ident),* $(,)?) => {
            match number {
                $(libc::$number => stringify!($name).to_owned(),)*
                other => format!("call {other}"),
            }
        };
    }
    names! {
        clone3: SYS_clone3, close: SYS_close, exit: SYS_exit,
        fallocate: SYS_fallocate, fcntl: SYS_fcntl, fstatfs: SYS_fstatfs, ftruncate: SYS_ftruncate,
        newfstatat: SYS_newfstatat,
        futex: SYS_futex, getdents64: SYS_getdents64, getpid: SYS_getpid, gettid: SYS_gettid,
        lseek: SYS_lseek, madvise: SYS_madvise, mbind: SYS_mbind,
        memfd_create: SYS_memfd_create, mincore: SYS_mincore, mlock: SYS_mlock,
        mlock2: SYS_mlock2, mmap: SYS_mmap, mprotect: SYS_mprotect, mremap: SYS_mremap,
        munlock: SYS_munlock, munmap: SYS_munmap, openat: SYS_openat, prctl: SYS_prctl,
        pread64: SYS_pread64, prlimit64: SYS_prlimit64, read: SYS_read, rseq: SYS_rseq,
        rt_sigprocmask: SYS_rt_sigprocmask, rt_sigreturn: SYS_rt_sigreturn,
        sched_getaffinity: SYS_sched_getaffinity, sched_setaffinity: SYS_sched_setaffinity,
        sched_yield: SYS_sched_yield, set_robust_list: SYS_set_robust_list,
        statx: SYS_statx, write: SYS_write, brk: SYS_brk,
        sigaltstack: SYS_sigaltstack, rt_sigaction: SYS_rt_sigaction,
    }
}

/// Returns the number of the call that most versions of the C library make for the same purpose.
fn usual(number: i64) -> i64 {
    match number {
        libc::SYS_clone => libc::SYS_clone3,
        libc::SYS_fstat => libc::SYS_newfstatat,
        number => number,
    }
}

/// The system calls of each function.
type Calls = BTreeMap<&'static str, BTreeSet<String>>;

/// Reads the table in the documentation of the crate.
///
/// A row has a phase, functions, a condition and calls. A function is the name of the first link.
fn documented() -> Calls {
    let text = include_str!("../src/lib.rs");
    let (_, text) = text.split_once("//! # System calls").unwrap();
    let (text, _) = text.split_once("//! # ").unwrap();
    let mut calls = Calls::new();
    for row in text.lines().filter_map(|line| line.strip_prefix("//! | ")) {
        let columns: Vec<&'static str> = row.trim_end_matches('|').split('|').collect();
        let [phase, function, _, list] = columns[..] else {
            panic!("{row}");
        };
        if ["boot", "run time", "migration"].contains(&phase.trim()) {
            let function = function.trim().trim_matches(['[', ']', '`']);
            let function = function.split(['(', '`']).next().unwrap();
            let names = list.split('`').skip(1).step_by(2).map(str::to_owned);
            calls.entry(function).or_default().extend(names);
        }
    }
    calls
}

/// Records the calls of scenarios.
#[derive(Default)]
struct Recorder {
    made: Calls,
    refused: Option<String>,
}

impl Recorder {
    fn run<R: Send>(
        &mut self,
        function: &'static str,
        run: impl FnOnce() -> R + Send,
    ) -> Option<R> {
        match record_calls(run) {
            Ok((result, calls)) => {
                let names = calls.into_iter().map(usual).map(name);
                self.made.entry(function).or_default().extend(names);
                Some(result)
            }
            Err(error) => {
                self.refused = Some(error.to_string());
                None
            }
        }
    }
}

fn region(backing: Backing) -> Region {
    Region::new(GuestAddress(0), 4 * HUGE).backing(backing)
}

fn memfd() -> Backing {
    let memfd = memfd_create("received", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&memfd, 4 * HUGE).unwrap();
    Backing::shared_file(memfd, 0)
}

fn file() -> File {
    temp_file_of_len(4 * HUGE)
}

/// Returns regions that together make all calls of a build.
fn regions(has_huge_pages: bool) -> Vec<Region> {
    let options = |region: Region| {
        region
            .numa(NumaPolicy::Preferred(0))
            .core_dump(false)
            .forked(false)
            .transparent_huge_pages(TransparentHugePages::Off)
    };
    let blocks = NonZeroU64::new(HUGE).unwrap();
    let mut all = vec![
        region(Backing::Anonymous),
        options(region(Backing::Anonymous)).mergeable(true),
        region(Backing::Anonymous).blocks(blocks, Unplugged::Protected),
        options(region(Backing::Memfd)).name("guest"),
        region(Backing::Memfd).blocks(blocks, Unplugged::Mapped),
        region(Backing::Memfd)
            .lock(Lock::OnFault)
            .blocks(blocks, Unplugged::Mapped),
        region(memfd()),
        region(Backing::shared_file(file(), 0)),
        region(Backing::shared_file(file(), 0)).sparse(true),
        options(region(Backing::private_file(file(), 0))),
    ];
    for lock in [Lock::Now, Lock::OnFault] {
        all.push(region(Backing::private_file(file(), 0)).lock(lock));
    }
    if can_name() {
        all.push(region(Backing::Anonymous).name("guest"));
    }
    if has_huge_pages {
        let hugetlb = || region(Backing::Hugetlb { page_size: HUGE });
        all.push(hugetlb());
        all.push(hugetlb().release_huge_pages(true));
        all.push(hugetlb().blocks(blocks, Unplugged::Mapped));
    }
    all
}

/// Returns whether the kernel can name anonymous memory.
fn can_name() -> bool {
    let named = region(Backing::Anonymous).name("guest");
    MemoryBuilder::new().region(named).build::<()>().is_ok()
}

/// Builds, uses and drops memory of one kind.
fn use_memory(recorder: &mut Recorder, region: Region) -> Option<()> {
    let has_blocks = format!("{region:?}").contains("blocks: Some");
    let build = || MemoryBuilder::new().region(region.clone()).build();
    let memory: GuestMemoryMmap = recorder.run("MemoryBuilder::build", build)?.unwrap();
    let first = GuestAddress(0);
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
    let usage = recorder.run("residency", || residency(&memory))?;
    usage.unwrap();
    recorder.run("content", || content(&memory).unwrap().count())?;
    let description = recorder.run("describe", || describe(&memory).map(drop))?;
    description.unwrap();
    if has_blocks {
        let unplugged = recorder.run("unplug", || unplug(&memory, first, 4 * HUGE))?;
        unplugged.unwrap();
    }
    recorder.run("drop of the last map", || drop(memory))
}

/// Prefaults with several threads, and drops one of two adjacent regions.
fn use_adjacent_regions(recorder: &mut Recorder) -> Option<()> {
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

/// Plugs more huge pages than the pool has.
fn plug_too_much(recorder: &mut Recorder) -> Option<()> {
    let pools = huge_page_pools();
    let pool = pools.iter().find(|pool| pool.page_size == HUGE).unwrap();
    let size = (pool.free + pool.overcommit + 1) * HUGE;
    let region = Region::new(GuestAddress(0), size).backing(Backing::Hugetlb { page_size: HUGE });
    let blocks = region.blocks(NonZeroU64::new(HUGE).unwrap(), Unplugged::Mapped);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(blocks).build().unwrap();
    let plugged = recorder.run("plug", || plug(&memory, GuestAddress(0), size))?;
    plugged.unwrap_err();
    Some(())
}

/// Runs all scenarios. Returns `None` if calls cannot be recorded.
fn use_everything(recorder: &mut Recorder, has_huge_pages: bool) -> Option<()> {
    for region in regions(has_huge_pages) {
        use_memory(recorder, region)?;
    }
    use_adjacent_regions(recorder)?;
    if has_huge_pages {
        plug_too_much(recorder)?;
    }
    recorder.run("huge_page_pools", huge_page_pools)?;
    recorder.run("still_mapped", still_mapped)?;
    Some(())
}

#[test]
fn system_calls_are_those_of_the_documentation() {
    let test = "system_calls_are_those_of_the_documentation";
    vm_memory::fault::install().unwrap();
    let pages = HugePages::reserve(16, test);
    let mut recorder = Recorder::default();
    if use_everything(&mut recorder, pages.is_some()).is_none() {
        return skipped(test, recorder.refused.unwrap());
    }
    let documented = documented();
    for (function, made) in &recorder.made {
        // With debug assertions, the standard library checks each descriptor before it closes it.
        let is_check =
            |call: &str| cfg!(debug_assertions) && call == "fcntl" && made.contains("close");
        let extra = made.difference(&documented[function]);
        let extra: Vec<_> = extra.filter(|call| !is_check(call)).collect();
        assert!(
            extra.is_empty(),
            "{function} makes {extra:?}, which are not documented"
        );
    }
    let mut rare = vec![
        ("MemoryBuilder::build", "lseek", "no block device"),
        ("prefault", "mincore", "enough memory"),
        (
            "discard",
            "munlock",
            "the process has not called mlockall(2)",
        ),
    ];
    // Depends on stacks that the C library keeps, and on which thread is first.
    for call in ["mmap", "mprotect", "munmap", "futex"] {
        rare.push(("prefault", call, "stacks and waits"));
    }
    if !can_name() {
        rare.push((
            "MemoryBuilder::build",
            "prctl",
            "no names of anonymous memory",
        ));
    }
    for (function, calls) in &documented {
        for call in calls {
            let is_rare = rare.iter().any(|one| (one.0, one.1) == (*function, call));
            let is_made = recorder.made[function].contains(call);
            assert!(
                is_made || is_rare || pages.is_none(),
                "{function} does not make {call}"
            );
        }
    }
}

#[test]
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
    // As an access that began before the block was unplugged.
    let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
    let record = mapping.plugged_blocks().unwrap();
    record.plug(0, HUGE as usize).unwrap();
    let (is_ok, calls) = record_calls(access).unwrap();
    record.unplug(0, HUGE as usize).unwrap();
    assert!(!is_ok);
    assert_eq!(calls, BTreeSet::from([libc::SYS_rt_sigreturn]));
}
