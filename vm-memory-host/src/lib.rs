//! Guest RAM for virtual machine monitors (VMMs), on [`vm_memory`].
//!
//! It provides reservations aligned to huge pages, sealed memfds, pools of huge pages, NUMA
//! placement, prefaulting, balloons and memory hotplug. It supports Linux, and a part of it
//! supports [Windows](#windows).
//!
//! # Examples
//!
//! ```
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//! use vm_memory_host::{discard, Backing, MemoryBuilder, Region};
//!
//! // 16 MiB that a vhost-user back end can map, and 64 MiB above 4 GiB.
//! let low = Region::new(GuestAddress(0), 16 << 20).backing(Backing::Memfd).name("low");
//! let high = Region::new(GuestAddress(1 << 32), 64 << 20);
//! let memory: GuestMemoryMmap = MemoryBuilder::new().region(low).region(high).build()?;
//!
//! memory.write_obj(0x55u8, GuestAddress(0x1000))?;
//! // The guest does not need a page.
//! discard(&memory, GuestAddress(0x1000), 0x1000)?;
//! assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000))?, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Tasks
//!
//! The programs are in the folder `examples/` of the repository. Run one with
//! `cargo run -p examples --example NAME`.
//!
//! | task | items | program |
//! |---|---|---|
//! | build guest memory from a list of regions | [`MemoryBuilder`], [`Region`] | `balloon` |
//! | use anonymous memory, a memfd, huge pages or a file | [`Backing`] | `vhost_user_backend` |
//! | place pages on NUMA nodes, lock them, use transparent huge pages | [`NumaPolicy`], [`Lock`], [`TransparentHugePages`] | |
//! | map a ROM or a write-protected flash | [`Region::read_only`] | |
//! | set options for all regions | [`MemoryBuilder::each_region`] | |
//! | populate pages before the guest starts | [`MemoryBuilder::prefault`], [`prefault()`] | |
//! | return pages to the system (free page reporting) | [`discard()`] | |
//! | return pages that a guest lists by number (balloon) | [`discard_pages()`], [`Balloon`] | `balloon` |
//! | make any range read as zeroes (destination of a migration) | [`zero_range()`] | |
//! | make blocks accessible and inaccessible (virtio-mem) | [`Region::blocks`], [`plug()`], [`unplug`], [`unplug_all`], [`plug_state`] | `virtio_mem` |
//! | add and remove whole regions (DIMM hotplug) | [`Region::build`], `GuestMemoryAtomic` of vm-memory, [below](#model) | `hotplug` |
//! | put regions into a region type of the VMM | [`MemoryBuilder::build_regions`], [`HostMapped`] | |
//! | map parts of files in a window of the guest (DAX, virtio-gpu) | [`Arena`] | |
//! | find out how much memory the guest uses | [`residency()`] | `balloon` |
//! | find the ranges that have content (save, first round of a migration) | [`content()`] | |
//! | map the same memory in another process, or save the layout | [`describe`], [`Description`], [`Descriptors`] | `vhost_user_backend` |
//! | build the same layout on another host (migration) | [`Description::fresh`] | |
//! | find the offset of a guest address in a file of all regions | [`FileLayout`] | |
//! | reserve memory for the guest (overcommit accounting) | [`Region::reserve`] | |
//! | find the host address and file of a region | [`provisioned`], [`HostMapping`] | |
//! | find memory that could not be unmapped | [`still_mapped`] | |
//! | list the pools of huge pages | [`huge_page_pools`] | |
//! | build in a jail without /sys and /proc | [`HostResources`] | |
//!
//! # Model
//!
//! ```text
//!   MemoryBuilder ── Region: address, size, Backing, Options, blocks
//!        │ build()                     or BuildError: region, request, limit, remedy
//!        ▼
//!   GuestMemoryMmap ── regions of vm-memory; each keeps its HostMapping
//!        │
//!        ├─ prefault         populates pages
//!        ├─ discard, Balloon returns pages to the system
//!        ├─ plug, unplug     make blocks accessible or inaccessible
//!        ├─ residency        reports memory usage
//!        ├─ content          finds ranges that have content
//!        └─ describe         returns the layout as data, with descriptors
//! ```
//!
//! The result of a build is an ordinary [`GuestMemoryMmap`](vm_memory::GuestMemoryMmap): it works
//! behind an IOMMU, in a `GuestMemoryAtomic`, and its regions can join other maps. The functions of
//! this crate work on every map of such regions. A VMM with a region type of its own implements
//! [`HostMapped`] for it. A region is unmapped when the last map with it is dropped. Hotplug
//! of whole regions is therefore an update of the map:
//!
//! ```
//! use std::sync::Arc;
//! use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
//! use vm_memory_host::{MemoryBuilder, Region};
//!
//! let boot = Region::new(GuestAddress(0), 16 << 20);
//! let boot: GuestMemoryMmap = MemoryBuilder::new().region(boot).build()?;
//! let memory = GuestMemoryAtomic::new(boot);
//!
//! // Plug a module of 16 MiB.
//! let module = Region::new(GuestAddress(1 << 32), 16 << 20).build()?;
//! memory.update(|map| map.insert_region(Arc::new(module)))?;
//! memory.memory().write_obj(1u8, GuestAddress(1 << 32))?;
//!
//! // Unplug it. It is unmapped when the last reader of the old map is gone.
//! memory.update(|map| map.remove_region(GuestAddress(1 << 32), 16 << 20).map(|(map, _)| map))?;
//! assert!(memory.memory().write_obj(1u8, GuestAddress(1 << 32)).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Regions of two builds can map the same bytes of a file, and no check finds it. A write to one
//! region then leaves the other clean. If the files come from another process, compare them with
//! those of the existing regions first, for example by device and inode number.
//!
//! # Windows
//!
//! Each region has addresses of its own, also if it is adjacent to another one in guest memory.
//! Anonymous memory has an inaccessible page on both sides. Private memory without blocks is
//! committed during the build. Blocks are committed by [`plug()`] and decommitted by [`unplug`], so
//! a region with blocks counts against the commit limit only for those that are plugged.
//!
//! The library has not been tested with a hypervisor on Windows. Unmap a block from the guest
//! before `unplug`, and map it after `plug`.
//!
//! - [`Backing::Anonymous`] is private memory of `VirtualAlloc`.
//! - [`Backing::Hugetlb`] is large pages (`MEM_LARGE_PAGES`) of the one size that the system has.
//!   They are private and always in memory. The process needs the privilege
//!   `SeLockMemoryPrivilege`.
//! - [`Backing::File`] is a shared file. [`Backing::private_file`] and [`Backing::Memfd`] are
//!   errors of the build.
//! - [`Region::blocks`] needs anonymous memory, [`Unplugged::Protected`] and the [fault
//!   handler](vm_memory::fault).
//! - [`NumaPolicy`] is `Inherit` or `Preferred`, [`Lock`] is `No` or `Now`, and
//!   [`TransparentHugePages`] is `Leave` or `Off`. The other values are errors of the build. So are
//!   `Lock::Now` with blocks, and `NumaPolicy::Preferred` for a file.
//! - [`Region::mergeable`], [`Region::sealed`], [`Region::release_huge_pages`],
//!   [`Region::require_name`], and [`Region::core_dump`] with `false` are errors of the build.
//! - [`Region::name`] and [`Region::forked`] have no effect: the system has no names and no forks.
//!   [`Region::reserve`] has none for anonymous memory without blocks, which is always committed.
//!   For other memory it is an error of the build.
//! - [`discard()`] decommits anonymous memory and commits it again. It overwrites all other memory,
//!   locked memory, and all memory of a process without the fault handler.
//! - [`prefault()`] reads each page. Its threads do not move to the CPUs of a node.
//! - [`residency()`] returns the pages in the working set of the process. `swapped` is 0.
//! - [`Arena`] needs version 1803 of Windows 10, and unmaps a mapping as a whole
//!   ([details](Arena#windows)).
//! - `Description`, `FileLayout`, `describe`, `content`, `HostResources`, `huge_page_pools`,
//!   `MemoryBuilder::host_resources` and `SECCOMP_FILTERS` do not exist.
//!
//! A discard makes up to 2 MiB at a time inaccessible, and then accessible again. If the system
//! refuses to commit these pages, they stay inaccessible until another discard of them succeeds. An
//! access of this process through vm-memory returns an error then, with these exceptions:
//!
//! - Methods that cannot fail read zeroes, and a transfer stops early.
//! - Pointers, references and atomic integers are not covered ([limits](vm_memory::fault#limits)):
//!   the access ends the process. Pause a device that uses them during a discard.
//! - A vCPU may exit or fail.
//!
//! The system does not truncate a local file that is mapped. The server of a network file may do
//! so. An access past its new end returns an error only with the fault handler. Without it, the
//! process ends.
//!
//! # System calls
//!
//! A seccomp filter must allow these calls. A build usually runs before the filter is installed.
//! Accesses to the memory make the calls that [`vm_memory`](vm_memory#system-calls) lists: with the
//! fault handler, an access that faults makes `rt_sigreturn`. The test `tests/system_calls.rs`
//! traces the functions of this table, and compares their calls with it.
//!
//! | phase | function | when | system calls |
//! |---|---|---|---|
//! | boot | [`MemoryBuilder::build`] | always | `mmap`, `munmap`, `mprotect`, `madvise` |
//! | boot | [`MemoryBuilder::build`] | to read /sys and /proc | `openat`, `read`, `getdents64`, `statx`, `newfstatat`, `close` |
//! | boot | [`MemoryBuilder::build`] | with a memfd | `memfd_create`, `prlimit64`, `ftruncate`, `fcntl` |
//! | boot | [`MemoryBuilder::build`] | with a memfd, before Linux 6.3 | `fchmod` |
//! | boot | [`MemoryBuilder::build`] | with a file | `statx`, `fstatfs`, `fcntl`, `fallocate`, `rt_sigprocmask`; `ioctl` for a block device; `mincore` for a memfd that is locked or prefaulted |
//! | boot | [`MemoryBuilder::build`] | if another process truncates a file meanwhile | `rt_sigtimedwait` |
//! | boot | [`MemoryBuilder::build`] | in a process that has called mlockall(2) | `mincore` |
//! | boot | [`MemoryBuilder::build`] | with options | `madvise`, `mbind`, `mlock`, `mlock2`, `prctl` |
//! | boot | [`Description::builder`] | always | `fcntl` |
//! | boot | drop of [`Descriptors`] | if they are received | `fcntl`, `close` |
//! | boot | [`prefault()`] | always | `madvise`; `openat`, `read`, `statx`, `close` to read /proc and /sys |
//! | boot | [`prefault()`] | with two or more threads | `clone3`, `mmap`, `munmap`, `mprotect`, `prctl`, `futex`, `rseq`, `set_robust_list`, `rt_sigprocmask`, `exit` |
//! | boot | [`prefault()`] | with a NUMA policy | `sched_getaffinity`, `sched_setaffinity` |
//! | boot | [`prefault()`] | if memory is short | `mincore`, `mmap`, `munmap` |
//! | boot | [`HostResources::read`] | always | `openat`, `read`, `getdents64`, `statx`, `newfstatat`, `close` |
//! | boot | [`huge_page_pools`] | always | `openat`, `read`, `getdents64`, `statx`, `newfstatat`, `close` |
//! | run time | [`discard()`] | always | `madvise`, `fallocate`, `statx`; `mincore`, `pread64` for huge pages |
//! | run time | [`discard()`] | for a private file | `mmap`, `munmap`, `mprotect`, `mremap`, `mbind`, `mlock2`, `munlock`, `mincore` |
//! | run time | [`discard()`] | for huge pages that return to the pool | `rt_sigprocmask` |
//! | run time | [`plug()`] | always | `madvise`, `fallocate`, `mprotect` |
//! | run time | [`plug()`] | for a file on a tmpfs with a size limit | `rt_sigprocmask` |
//! | run time | [`discard()`] | if another process truncates a file meanwhile | `rt_sigtimedwait` |
//! | run time | [`plug()`] | if another process truncates a file meanwhile | `rt_sigtimedwait` |
//! | run time | [`plug()`] | if huge pages run out, or for a file on a tmpfs with a size limit | `openat`, `read`, `getdents64`, `statx`, `newfstatat`, `close` |
//! | run time | [`unplug`] | always | `madvise`, `fallocate`, `mprotect` |
//! | run time | [`plug_state`] | always | none |
//! | boot | [`Arena::new`] | always | `mmap`, `munmap` |
//! | boot | [`Arena::new`] | until `vm.max_map_count` is known | `madvise`; `openat`, `read`, `statx`, `close` to read /proc |
//! | run time | [`Arena::map`] | always | `fstatfs`, `mmap`, `mremap` |
//! | run time | [`Arena::map`] | for huge pages, or if the call fails | `munmap` |
//! | run time | [`Arena::map`] | if the kernel lacks memory for page tables | `mincore` |
//! | run time | [`Arena::unmap`] | always | `mmap` |
//! | run time | [`Arena::unmap`] | if the kernel lacks memory for page tables | `mincore` |
//! | run time | [`residency()`] | always | `mincore`, `statx`; `openat`, `read`, `close` to read /proc |
//! | run time | [`residency()`] | for a private file | `mmap`, `munmap` |
//! | run time | [`describe`] | for a file | `fcntl` |
//! | run time | [`still_mapped`] | always | none |
//! | run time | drop of the last map | always | `munmap`, `close` |
//! | run time | drop of the last map | next to another region | `munlock`, `madvise`, `mmap` |
//! | migration | [`content()`] | always | `openat`, `pread64`, `close` |
//! | migration | [`content()`] | for a file | `statx`, `fstatfs`, `lseek`; `mincore` for huge pages |
//! | all | allocator, locks, end of a thread | always | `brk`, `exit`, `exit_group`, `futex`, `madvise`, `mmap`, `mprotect`, `mremap`, `munmap`, `restart_syscall`, `rt_sigprocmask`, `rt_sigreturn`, `sched_yield`, `sigaltstack` |
//! | all | close of a descriptor | with debug assertions | `fcntl` |
//!
//! - Some versions of the C library call `fstat` for `newfstatat`, and `clone` for `clone3`. The
//!   exit of a thread can call `madvise`.
//! - A build that fails reads /proc and /sys and calls `fstatfs`, to name the limit that was
//!   reached. It calls `mincore` to find out whether the kernel has unmapped its addresses.
//! - In a jail without /sys and /proc, all functions make the same calls, which fail.
//!   [`HostResources`] describes the results.
//! - The crate closes some descriptors that support no seals in a thread that it creates. Their
//!   region requires seals, or no region of a description uses them, or they are received
//!   [`Descriptors`]. There are at most 64 such threads. They make the calls of [`prefault()`] with
//!   two threads.
//! - Functions that are in neither the table nor this list make no calls of their own.
//! - [`MemoryBuilder::prefault`] adds the calls of [`prefault()`] to the build.
//! - [`Region::build`] and [`MemoryBuilder::build_regions`] make the calls of
//!   [`MemoryBuilder::build`].
//! - [`unplug_all`] makes the calls of [`unplug`], and [`Description::apply_blocks`] those of
//!   [`plug()`] and [`unplug`].
//! - [`discard_pages()`], [`Balloon::inflate`] and [`zero_range()`] make the calls of
//!   [`discard()`].
//!
//! # Seccomp filters
//!
//! [`SECCOMP_FILTERS`] has a filter for each phase: `boot`, `run_time` and `migration`. A filter
//! permits the calls of its phase in the table above and in that of
//! [`vm_memory`](vm_memory#system-calls), except for memory of Xen guests. The calls that the table
//! lists for all phases are in each filter. These arguments are limited:
//!
//! | phase | system call | permitted |
//! |---|---|---|
//! | boot | `clone` | with `CLONE_THREAD` |
//! | boot | `fallocate` | `FALLOC_FL_KEEP_SIZE`, with `FALLOC_FL_UNSHARE_RANGE` |
//! | boot | `fcntl` | `F_GETFD`, `F_GETFL`, `F_ADD_SEALS`, `F_GET_SEALS` |
//! | boot | `ioctl` | `BLKGETSIZE64` |
//! | boot | `madvise` | `MADV_DONTNEED`, `MADV_DONTFORK`, `MADV_MERGEABLE`, `MADV_HUGEPAGE`, `MADV_NOHUGEPAGE`, `MADV_DONTDUMP`, `MADV_WIPEONFORK`, `MADV_POPULATE_READ`, `MADV_POPULATE_WRITE` |
//! | boot | `mlock2` | `MLOCK_ONFAULT` |
//! | boot | `mmap` | without `PROT_EXEC` |
//! | boot | `mprotect` | without `PROT_EXEC` |
//! | boot | `mremap` | `MREMAP_MAYMOVE` |
//! | boot | `openat` | `O_RDONLY` without `O_CREAT` or `O_TRUNC` |
//! | boot | `prctl` | `PR_SET_VMA`, `PR_SET_NAME` |
//! | boot | `prlimit64` | without a new limit |
//! | boot | `rt_sigaction` | `SIGBUS`, `SIGSEGV`, `SIGILL` |
//! | boot | `sched_setaffinity` | this thread |
//! | run time | `fallocate` | `FALLOC_FL_KEEP_SIZE`, with `FALLOC_FL_PUNCH_HOLE`, with `FALLOC_FL_ZERO_RANGE` |
//! | run time | `fcntl` | `F_GETFD`, `F_GET_SEALS` |
//! | run time | `madvise` | `MADV_DONTNEED`, `MADV_REMOVE`, `MADV_DONTFORK`, `MADV_MERGEABLE`, `MADV_HUGEPAGE`, `MADV_NOHUGEPAGE`, `MADV_DONTDUMP`, `MADV_POPULATE_WRITE`, `MADV_DONTNEED_LOCKED` |
//! | run time | `mlock2` | `MLOCK_ONFAULT` |
//! | run time | `mmap` | without `PROT_EXEC` |
//! | run time | `mprotect` | without `PROT_EXEC` |
//! | run time | `mremap` | `MREMAP_MAYMOVE`, with `MREMAP_FIXED` |
//! | run time | `openat` | `O_RDONLY` without `O_CREAT` or `O_TRUNC` |
//! | run time | `rt_sigaction` | `SIGBUS`, `SIGSEGV`, `SIGILL` |
//! | migration | `fcntl` | `F_GETFD` |
//! | migration | `lseek` | `SEEK_DATA`, `SEEK_HOLE` |
//! | migration | `madvise` | `MADV_DONTNEED` |
//! | migration | `mmap` | without `PROT_EXEC` |
//! | migration | `mprotect` | without `PROT_EXEC` |
//! | migration | `mremap` | `MREMAP_MAYMOVE` |
//! | migration | `openat` | `O_RDONLY` without `O_CREAT` or `O_TRUNC` |
//!
//! A test runs the functions of each phase under its filter, on Linux with glibc. Other C libraries
//! and allocators make other calls: musl calls `open` for `openat` on x86_64. No test covers them.
//!
//! # Features
//!
//! The feature `serde`, which is off by default, implements `Serialize` and `Deserialize` for
//! [`Description`], [`FileLayout`], [`Residency`], [`HugePagePool`], [`GroupLimit`], [`Progress`]
//! and the types in them. A description and a file layout are checked while they are deserialised.
//! Unknown fields of a description are refused.
//!
//! The feature `log`, which is off by default, writes messages to the crate `log`. The level `warn`
//! reports a name that the kernel does not support, and memory that cannot be unmapped. The level
//! `debug` reports each region that is mapped, and files of /proc and /sys that cannot be read. A
//! logger makes system calls of its own.

#![cfg_attr(docsrs, feature(doc_cfg))]
// Production code obeys these; tests may panic. The lints for both are in the root Cargo.toml.
#![cfg_attr(
    not(test),
    deny(
        missing_docs,
        missing_debug_implementations,
        unreachable_pub,
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::multiple_unsafe_ops_per_block,
        clippy::panic,
        clippy::unwrap_used
    )
)]

#[cfg(not(any(target_os = "linux", windows)))]
compile_error!("vm-memory-host: only Linux and Windows are supported");

// # Layers
//
// A module imports only from its own line or from lines above it.
//
// ```text
// messages              messages to the crate log
// sys                   system calls: reservations, mapped memory, files, threads
// region                the request: Region, Backing, Options
// host                  resources and limits of the machine: pools, NUMA nodes, control groups
// error                 the error types
// mapping               HostMapping: the memory of a region that is built
// arena                 Arena: addresses in which files are mapped later
// operations            prefault, discard, plug, residency, content
// builder, description  builds memory from a request; describes it as data
// ```
#[macro_use]
mod messages;

mod arena;
mod builder;
#[cfg(target_os = "linux")]
mod description;
mod error;
mod host;
mod mapping;
mod operations;
mod region;
#[expect(
    unsafe_code,
    reason = "makes system calls and owns the addresses that they change"
)]
mod sys;

pub use arena::{Arena, ArenaError};
pub use builder::MemoryBuilder;
pub use error::{
    BuildError, ChangeError, NotProvisioned, OtherProcess, PrefaultError, RefusedPage,
};
pub use host::GroupLimit;
pub use mapping::{provisioned, still_mapped, HostMapped, HostMapping};
pub use operations::{
    discard, discard_pages, plug, plug_state, prefault, residency, unplug, unplug_all, zero_range,
    Balloon, DiscardReport, PlugState, Progress, Residency, ResidencyError,
};
pub use region::{
    Backing, BackingKind, Blocks, Lock, NumaPolicy, Options, Region, Sharing, Span,
    TransparentHugePages, Unplugged,
};

#[cfg(target_os = "linux")]
pub use linux::*;

/// The items that only Linux has.
#[cfg(target_os = "linux")]
mod linux {
    pub use crate::description::{
        describe, BackingDescription, BlocksDescription, Description, DescriptionError,
        Descriptors, FileLayout, FileLayoutError, RegionDescription,
    };
    pub use crate::host::{huge_page_pools, HostResources, HugePagePool};
    pub use crate::operations::{content, Content};
}

/// Seccomp filters for each [phase](crate#system-calls), in the JSON format of `seccompiler`.
///
/// The filters are `boot`, `run_time` and `migration`. They are for x86_64 and aarch64, and for
/// glibc. A thread also needs the calls of the rest of the VMM: add the rules to those of its
/// filter. Two filters that are installed in turn permit only the calls that both permit.
///
/// # Examples
///
/// ```
/// use seccompiler::{compile_from_json, TargetArch};
/// use vm_memory_host::SECCOMP_FILTERS;
///
/// let filters = compile_from_json(SECCOMP_FILTERS.as_bytes(), TargetArch::x86_64)?;
/// assert!(filters.contains_key("run_time"));
/// # Ok::<(), seccompiler::Error>(())
/// ```
#[doc(alias = "seccompiler")]
#[doc(alias = "BPF")]
#[cfg(target_os = "linux")]
pub const SECCOMP_FILTERS: &str = include_str!("../seccomp.json");

/// The code in README.md, compiled and run as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
