//! Guest physical memory for virtual machine monitors (VMMs).
//!
//! This crate gives the devices, loaders and migration code of a VMM access to guest physical
//! memory. The guest's CPUs use that memory at the same time. It is a drop-in replacement for the
//! published crate `vm-memory` 0.18.0. The file `docs/differences.md` of the repository lists the
//! behaviour that differs. The crate `vm-memory-host` builds guest RAM from memfds, huge pages and
//! files, and returns pages to the system. The crate `vm-memory-kvm` has the memory slots of KVM,
//! and `vm-memory-vhost` is for vhost-user back ends.
//!
//! ```text
//!     device, loader, migration
//!        │ read_obj(GuestAddress)     │ read_volatile_from(file)   │ get_slices, check_range
//!        ▼                            ▼                            ▼
//!   Bytes<GuestAddress> ─────────► GuestMemory              GuestAddressSpace (swapped maps)
//!                                     │
//!                    ┌────────────────┴───────────────┐
//!                    ▼ guest physical address         ▼ IOVA
//!            GuestMemoryBackend ◄───────────────── IommuMemory ──► Iommu, Iotlb
//!                    │ find_region
//!                    ▼
//!            GuestMemoryRegion      0x0 ├──── RAM ────┤  hole  ├──── RAM ────┤
//!                    │ get_slice
//!                    ▼
//!              VolatileSlice ──► access routine (moves the bytes) ──► Bitmap (marks them dirty)
//! ```
//!
//! # Examples
//!
//! ```
//! # #[cfg(feature = "backend-mmap")] {
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! // 1 GiB of RAM below the 32-bit hole of a PC, and 1 GiB above it.
//! let ranges = [(GuestAddress(0), 1 << 30), (GuestAddress(1 << 32), 1 << 30)];
//! let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
//!
//! memory.write_slice(b"console=ttyS0\0", GuestAddress(0x2_0000))?;
//! memory.write_obj(0x2_0000u64, GuestAddress(0x1_0000_0000))?;
//! let cmdline: u64 = memory.read_obj(GuestAddress(0x1_0000_0000))?;
//! let first: u8 = memory.read_obj(GuestAddress(cmdline))?;
//! assert_eq!(first, b'c');
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Tasks
//!
//! The programs are in the folder `examples/` of the repository. Run one with
//! `cargo run -p examples --example NAME`, and `xen_grants` with `--features xen`.
//!
//! | task | items | program |
//! |---|---|---|
//! | create memory | [`GuestMemoryMmap`]; the crate `vm-memory-host` for memfds, huge pages and NUMA | `boot` |
//! | read and write by guest address | [`Bytes`]; [`ByteValued`](trait@ByteValued) for structures of your own | `boot` |
//! | access a ring or a request many times | [`GuestMemory::window`] | `virtqueue` |
//! | borrow slices of host memory | [`GuestMemory::get_slices`], [`VolatileSlice`] | |
//! | keep slices valid for a request, for code that uses their pointers | [`GuestMemory::held`] | |
//! | find runs of host memory, to register them | [`GuestMemory::host_runs`] | |
//! | let a device reach only some ranges | [`guest_memory::RestrictedMemory`] | |
//! | move all bytes of a range or none | [`GuestMemory::all_or_nothing`] | |
//! | find the byte that an access cannot reach, and the reason | [`GuestMemory::explain`] | `iommu_device` |
//! | move bytes between files and the guest | [`ReadVolatile`], [`WriteVolatile`], [`vectored`] | `net_device` |
//! | move a descriptor chain by one system call | [`vectored::IoBuffer`] | `net_device` |
//! | complete I/O later, with io_uring or AIO | [`vectored::IoBuffer`] | `block_device` |
//! | track dirty pages, and migrate a guest | [`dirty::DirtyMemory`], [`bitmap::AtomicBitmap`] | `migration` |
//! | put a device behind an IOMMU | [`IommuMemory`], [`iommu::SharedIotlb`], [`iommu::AskingIommu`]; `vm-memory-vhost` for vhost-user | `iommu_device` |
//! | survive pages that disappear | [`fault::install`] | `truncated_file` |
//! | change the map while devices run | [`GuestMemoryAtomic`], [`GuestMemoryReader`] | `hotplug` |
//! | let KVM, VFIO and vhost follow the map | [`GuestMemoryAtomic::add_listener`] | `kvm_slots` |
//! | keep pages from being discarded | [`listeners::Pin`] | |
//! | plug and unplug blocks of a region | [`mmap::PluggedBlocks`]; `vm-memory-host` | `virtio_mem` |
//! | give memory to KVM, and take its dirty log | `vm-memory-kvm` | `kvm_slots`, `migration` |
//! | return pages to the system | `vm-memory-host` | `balloon` |
//! | share memory with another process | [`FileOffset`], [`GuestMemoryMmap::from_ranges_with_files`] | |
//! | write a vhost-user back end | `vm-memory-vhost` | `vhost_user_backend`, `vhost_log` |
//! | access memory that a Xen guest grants (feature `xen`) | `MmapRange` | `xen_grants` |
//! | implement a region type | [`GuestMemoryRegion`], [`GuestRegionCollection`] | `own_region` |
//!
//! # Modules
//!
//! The feature `rawfd` is on by default. The items in the crate root of 0.18.0 are re-exported
//! here, and a few more. Import the others from their modules.
//!
//! | module | content | feature |
//! |---|---|---|
//! | [`address`] | guest addresses, and checked arithmetic on them | |
//! | [`guest_memory`] | the traits of guest memory, and access by guest address | |
//! | [`region`] | regions, and collections of them | |
//! | [`bytes`], [`endian`] | reads and writes at an address; plain values; integers of fixed byte order | |
//! | [`volatile_memory`] | slices, references and arrays in memory that the guest may change | |
//! | [`io`] | streams into and from guest memory; for files and sockets with the feature | `rawfd` |
//! | [`vectored`] | a range over many regions in one system call; buffers of descriptor chains, and for asynchronous I/O | `rawfd` |
//! | [`mmap`] | memory in mappings of this process | `backend-mmap` |
//! | [`atomic`] | maps that are replaced while devices use them | `backend-atomic` |
//! | [`listeners`] | users of guest memory that follow its changes, such as KVM slots | |
//! | [`bitmap`] | dirty tracking of one region; [`AtomicBitmap`](bitmap::AtomicBitmap) with the feature | `backend-bitmap` |
//! | [`dirty`] | the dirty pages of a whole memory, merged with logs of KVM, vhost and VFIO | `backend-bitmap` |
//! | [`iommu`] | memory that an IOMMU translates | `iommu` |
//! | [`fault`] | recovery from SIGBUS, SIGSEGV and SIGILL, or from exceptions of Windows | |
//!
//! Four more features add no module. `derive` adds `#[derive(ByteValued)]`, which proves
//! that a struct is a plain value. `zerocopy` adds `Zerocopy`, a wrapper for types that the crate
//! `zerocopy` has proved to be plain. `serde` implements `Serialize` and `Deserialize` for
//! addresses, ranges of IOVAs, [`Permissions`] and [`iommu::IotlbCounters`]. `log` writes messages
//! to the crate `log`. The level `warn` reports memory that cannot be unmapped, and the level
//! `debug` the fault handler. Accesses write no messages.
//!
//! The feature `xen` adds regions of Xen guests: foreign and grant mappings, by `MmapRange`. It
//! removes two variants of `MmapRegionError`, so docs.rs shows the crate without it. In a checkout,
//! `cargo doc --no-deps -p vm-memory --features xen,backend-atomic,backend-bitmap,iommu --open`
//! shows the documentation with it.
//!
//! # Memory model
//!
//! The guest's CPUs write guest memory at any moment, and the compiler does not see them. Other
//! threads write it through this crate. These rules hold:
//!
//! - A naturally aligned access of 1, 2, 4 or 8 bytes is never torn. This holds for
//!   [`Bytes::read_obj`], [`Bytes::write_obj`], [`VolatileRef`], any copy of exactly that size and
//!   alignment, and each element of [`VolatileSlice::copy_to`] and
//!   [`copy_from`](VolatileSlice::copy_from).
//! - Naturally aligned elements of 2, 4 or 8 bytes in a typed copy move in ascending order, except
//!   within the same aligned 32 bytes. Other elements move in any order.
//! - [`Bytes::load`] and [`Bytes::store`] add the requested ordering.
//! - Any other access may be observed in parts, in any order.
//! - A page is marked dirty after it was written. No interleaving with a harvest loses it.
//! - Memory reached through a pointer or a reference ([`VolatileMemory::get_atomic_ref`],
//!   `aligned_as_ref`, `ptr_guard`) is not covered by these rules.
//!
//! # Platforms
//!
//! Linux on x86_64 and aarch64, and Windows on x86_64, have assembly access routines and fault
//! recovery. Other Unix systems, such as macOS, use the same routines on these processors, without
//! fault recovery. Other processors move bytes by relaxed atomics. Targets whose pointers have 32
//! bits are refused. CI runs tests for Linux, some of them under emulation, and for Windows under
//! Wine. For macOS, CI builds the library and runs nothing. The file `docs/support.md` of the
//! repository lists the targets. The oldest supported compiler is Rust 1.89.
//!
//! On Windows, set `default-features = false`: the features `rawfd` and `xen` do not exist there.
//!
//! # System calls
//!
//! A function of 0.18.0 makes no additional system call in this crate, with two exceptions. Mapping
//! a file calls `fstat`, and dropping a region calls `madvise` if `munmap` fails. For a new
//! function, and for memory of Xen guests, add the calls below to the seccomp filter of the thread
//! that calls it.
//!
//! | phase | function | when | system calls |
//! |---|---|---|---|
//! | boot | [`GuestMemoryMmap`], [`MmapRegion`] | created and dropped, also for hotplug | `mmap`, `munmap` |
//! | boot | [`GuestMemoryMmap`], [`MmapRegion`] | created for a file | `fstat`, or `newfstatat` |
//! | boot | [`fault::install`] | always | `rt_sigaction` |
//! | boot | `MmapRegion::from_range` | memory of a Xen guest, created and dropped | `ioctl`, `mmap`, `munmap` |
//! | boot | `MmapRegion::from_range` | frames of a Xen guest that are paged out | `clock_nanosleep` |
//! | run time | access to Xen memory that is not mapped in advance | always | `ioctl`, `mmap`, `munmap`; only `ioctl` for a copy by the hypervisor |
//! | run time | access that faults | with [`fault::install`] | `rt_sigreturn` |
//! | run time | other signal | with [`fault::install`] | `rt_sigreturn`, `rt_sigaction`; the calls of `raise(3)`: `tgkill`, `gettid`, and in some C libraries `getpid` and `rt_sigprocmask` |
//! | run time | [`ReadVolatile`] | always | `read` |
//! | run time | [`WriteVolatile`] | always | `write` |
//! | run time | [`vectored`] | always | `readv`, `writev`, `preadv`, `pwritev` |
//! | run time | [`atomic::RetiredMap::wait`], [`iommu::Invalidation::wait`] | while there are readers | `clock_nanosleep` |
//! | run time | [`iommu::AskingIommu`] | while an access waits for a mapping | `futex` |
//! | run time | [`atomic::RetiredMap::wait`], [`iommu::Invalidation::wait`], [`iommu::AskingIommu`] | if the vDSO does not read the clock | `clock_gettime` |
//!
//! Locks call `futex` where threads contend, and the allocator makes calls of its own. A mapping
//! that ends a wait of an [`iommu::AskingIommu`] calls `futex`. The crates `vm-memory-host`,
//! `vm-memory-kvm` and `vm-memory-vhost` have tables of their own functions. The test
//! `tests/system_calls.rs` of each crate traces the calls, and compares them with its table. Other
//! tests cover the rows of other signals and of Xen guests.

#![cfg_attr(docsrs, feature(doc_cfg))]
// Production code obeys these; tests may panic. The lints for both are in Cargo.toml.
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
#![cfg_attr(
    not(all(
        feature = "rawfd",
        feature = "backend-mmap",
        feature = "backend-atomic",
        feature = "backend-bitmap",
        feature = "iommu"
    )),
    expect(
        rustdoc::broken_intra_doc_links,
        reason = "links to items of features that are off"
    )
)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("vm-memory: only targets with pointers of 64 bits are supported, such as x86_64");

#[cfg(all(feature = "xen", windows))]
compile_error!("vm-memory: the feature `xen` is not supported on Windows; disable it");

#[cfg(all(feature = "rawfd", windows))]
compile_error!(
    "vm-memory: the feature `rawfd` needs file descriptors, which Windows does not have; set \
     `default-features = false`"
);

#[cfg(all(feature = "backend-mmap", not(any(unix, windows))))]
compile_error!(
    "vm-memory: the feature `backend-mmap` is implemented for Unix and Windows only; disable it on \
     this target"
);

// # Layers
//
// A module imports from its own line and from the lines above it (`cargo xtask layers`). The
// exceptions are `guest_memory::Error::IommuError` and `bitmap::MS`, which 0.18.0 publishes.
//
// ```text
// address, convert, bits, messages, page_size, zeroed, retired  arithmetic and helpers
// access                                                    the routines that move guest bytes
// xen                                                       mappings of Xen guest memory
// bitmap                                                    dirty tracking of one region
// value, bytes, io, volatile_memory, endian, atomic_integer
// region, listeners, guest_memory                           regions, and the traits of guest memory
// mmap, iommu, atomic, vectored                             mappings, translation, swapped maps
// dirty                                                     the dirty pages of a whole memory
// ```
#[macro_use]
mod messages;

#[expect(unsafe_code, reason = "moves guest bytes; no other module does")]
mod access;
pub use access::fault;
pub mod address;
/// Arithmetic that the other crates of this repository share. It is not part of the interface, but
/// keep its items within 0.18: released versions of those crates use them.
#[doc(hidden)]
pub mod arithmetic {
    #[cfg(any(feature = "backend-bitmap", feature = "backend-mmap"))]
    pub use crate::bits::{bit_number, words_of, WORD_BITS};
    pub use crate::convert::{to_u64, to_usize};
}
#[cfg(feature = "backend-atomic")]
pub mod atomic;
#[expect(
    unsafe_code,
    reason = "`AtomicInteger` is an unsafe trait: a promise about the bytes of its types"
)]
mod atomic_integer;
pub mod bitmap;
#[cfg(any(feature = "backend-bitmap", feature = "backend-mmap"))]
mod bits;
pub mod bytes;
mod convert;
#[cfg(feature = "backend-bitmap")]
pub mod dirty;
#[expect(unsafe_code, reason = "implements `ByteValued` for its types")]
pub mod endian;
pub mod guest_memory;
#[cfg_attr(
    all(feature = "rawfd", unix),
    expect(
        unsafe_code,
        reason = "passes pointers into guest memory to read(2) and write(2)"
    )
)]
pub mod io;
#[cfg(feature = "iommu")]
pub mod iommu;
pub mod listeners;
#[cfg(feature = "backend-mmap")]
#[expect(
    unsafe_code,
    reason = "creates and removes mappings, and slices of them"
)]
pub mod mmap;
#[cfg(any(feature = "backend-bitmap", feature = "backend-mmap"))]
mod page_size;
pub mod region;
#[cfg(any(feature = "backend-atomic", feature = "iommu"))]
mod retired;
#[expect(
    unsafe_code,
    reason = "`ByteValued` is an unsafe trait: a promise about the bytes of its types"
)]
mod value;
#[cfg(all(feature = "rawfd", unix))]
#[expect(
    unsafe_code,
    reason = "passes pointers into guest memory to readv(2) and writev(2), and stores slices of memory that it owns"
)]
pub mod vectored;
#[expect(
    unsafe_code,
    reason = "creates slices and values from a pointer and a length"
)]
pub mod volatile_memory;
#[cfg_attr(
    feature = "xen",
    expect(
        unsafe_code,
        reason = "creates and removes mappings, and makes requests to devices"
    )
)]
#[cfg_attr(not(feature = "xen"), path = "xen/absent.rs")]
mod xen;
#[cfg(any(feature = "backend-bitmap", feature = "backend-mmap"))]
#[expect(unsafe_code, reason = "allocates memory that is zeroed already")]
mod zeroed;

pub use address::{Address, AddressValue};
#[cfg(feature = "backend-atomic")]
pub use atomic::{GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryReader};
pub use atomic_integer::AtomicInteger;
#[cfg(feature = "zerocopy")]
pub use bytes::Zerocopy;
pub use bytes::{AtomicAccess, ByteValued, Bytes};
pub use endian::{Be16, Be32, Be64, BeSize, Le16, Le32, Le64, LeSize};
pub use guest_memory::{
    Error as GuestMemoryError, FileOffset, GuestAddress, GuestAddressSpace, GuestMemory,
    GuestMemoryBackend, GuestUsize, MemoryRegionAddress, Permissions, Result as GuestMemoryResult,
};
pub use io::{ReadVolatile, WriteVolatile};
#[cfg(feature = "iommu")]
pub use iommu::{Iommu, IommuMemory, Iotlb};
#[cfg(feature = "backend-mmap")]
pub use mmap::{GuestMemoryMmap, GuestRegionMmap, MmapRegion};
#[cfg(all(feature = "xen", unix))]
pub use mmap::{MmapRange, MmapXenFlags};
pub use region::{
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionCollectionError,
};
/// Implements the trait [`ByteValued`](trait@ByteValued) for a struct, and proves it.
#[cfg(feature = "derive")]
pub use vm_memory_derive::ByteValued;
pub use volatile_memory::{
    Error as VolatileMemoryError, Result as VolatileMemoryResult, VolatileArrayRef, VolatileMemory,
    VolatileRef, VolatileSlice,
};

/// The code in README.md, compiled and run as a documentation test.
#[cfg(all(doctest, unix, feature = "backend-mmap", feature = "backend-bitmap"))]
#[doc = include_str!("../README.md")]
struct Readme;
