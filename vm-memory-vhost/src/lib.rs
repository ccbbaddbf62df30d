//! Guest memory for vhost-user back ends, on [`vm_memory`].
//!
//! The crates `vhost` and `vhost-user-backend` own the socket of a back end. This crate has the
//! parts that concern memory. It translates the front end's addresses, keeps the IOTLB of a device
//! behind an IOMMU, and marks dirty pages in the front end's log. It starts no thread, and supports
//! Unix only.
//!
//! ```text
//!   front end (VMM)                             back end (device)
//!     VHOST_USER_SET_MEM_TABLE, ADD_MEM_REG ──► RegionTable, GuestMemoryMmap
//!     VHOST_USER_IOTLB_MSG: update, ──────────► IotlbMessage::apply ──► SharedIotlb
//!                           invalidate                                    ▲ lookup
//!     VHOST_USER_BACKEND_IOTLB_MSG: miss, ◄──── BackendChannel ◄──── AskingIommu
//!                           access fail                                   ▲
//!                                                     device ──► IommuMemory
//!     VHOST_USER_SET_LOG_BASE ────────────────► LogBitmap::replace
//! ```
//!
//! | task | items |
//! |---|---|
//! | check the regions of a front end | [`RegionTable`], [`MemoryRegion`] |
//! | map them | [`MemoryRegion::file_ranges`], or the crate `vm-memory-host` |
//! | translate the address of a ring | [`RegionTable::guest_address`] |
//! | read and write IOTLB messages | [`IotlbMessage`], [`Header`] |
//! | apply updates and invalidations | [`IotlbMessage::apply`] |
//! | send misses, and wait for their updates | [`BackendChannel`], in a [`vm_memory::iommu::AskingIommu`] |
//! | mark dirty pages in the front end's log | [`log::LogBitmap`] |
//! | harvest the log, in the front end | [`log::SharedLog`] |
//!
//! The front end is not trusted: no message causes a panic, an overflow or a loop without bound. A
//! message that is refused has no effect. The back end limits what it accepts:
//!
//! - An update adds a mapping for each region that contains a part of its target. An update or an
//!   invalidation inside a mapping cuts it in two. A mapping takes up to 180 bytes. Limit their
//!   number by [`SharedIotlb::set_bound`](vm_memory::iommu::SharedIotlb::set_bound).
//! - A [`RegionTable`] accepts any number of regions, and an insertion takes time in proportion to
//!   it. Refuse more regions than `VHOST_USER_GET_MAX_MEM_SLOTS` returns.
//! - A front end can truncate a file, or serve it without ever replying (FUSE). Accept only files
//!   with the seal `F_SEAL_SHRINK`, as [`MemoryRegion`] shows.
//!   [`SharedLog::map`](log::SharedLog::map) does so for the file of a log.
//! - A file with this seal can still lack a huge page (hugetlbfs) or have a memory error. Call
//!   [`fault::install`](vm_memory::fault::install): such an access then returns an error, and does
//!   not end the process.
//!
//! # System calls
//!
//! Add these calls to the seccomp filter of the thread that calls the function.
//!
//! | phase | function | when | system calls |
//! |---|---|---|---|
//! | run time | [`IotlbMessage::apply`] | if an access waits for the mapping | `futex` |
//! | run time | [`BackendChannel`] | for each miss, and for each access that is not permitted | those of its writer |
//! | migration | `log::SharedLog::create` | always | `prlimit64`, `memfd_create`, `ftruncate`, `fcntl`, `fstat`, or `newfstatat`, and `mmap` |
//! | migration | `log::SharedLog::create` | before Linux 6.3 | `fchmod` |
//! | migration | [`log::SharedLog::map`] | always | `fcntl`, `fstatfs`, `fstat`, or `newfstatat`, and `mmap` |
//! | migration | [`log::SharedLog::map_unsealed`] | always | `fstat`, or `newfstatat`, and `mmap` |
//! | migration | [`log::SharedLog`] | dropped | `munmap`, `close` |
//! | migration | [`log::LogBitmap::replace`] | while threads mark in the old log | `clock_nanosleep` |
//! | migration | [`log::LogBitmap::replace`] | if the vDSO does not read the clock | `clock_gettime` |
//! | migration | [`log::LogBitmap::replace`] | drops the old log | `munmap`, `close` |
//! | migration | [`log::LogBitmap::stop`] | drops the old log | `munmap`, `close` |
//!
//! Other functions make none. Locks call `futex` where threads contend, and the allocator makes
//! calls of its own. The wait of the [`Invalidation`](vm_memory::iommu::Invalidation) that `apply`
//! returns is in the table of `vm_memory`. The test `tests/system_calls.rs` traces the calls, and
//! compares them with the table.
//!
//! # Examples
//!
//! See [`RegionTable`], [`MemoryRegion::file_ranges`], [`IotlbMessage::apply`], [`BackendChannel`]
//! and [`log::LogBitmap`].

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

#[cfg(not(unix))]
compile_error!("vm-memory-vhost: only Unix is supported, since vhost-user needs Unix sockets");

// # Layers
//
// A module imports only from its own line or from lines above it.
//
// ```text
// message, table        IOTLB messages and their headers; the regions of a front end
// iotlb, channel        the effect of messages on an IOTLB; the misses that a back end sends
// log                   dirty logs that both sides map
// ```
mod channel;
mod iotlb;
pub mod log;
mod message;
mod table;

pub use channel::BackendChannel;
pub use iotlb::ApplyError;
pub use message::{
    Header, IotlbMessage, MessageError, VHOST_USER_BACKEND_IOTLB_MSG, VHOST_USER_IOTLB_MSG,
};
pub use table::{AddressSpace, MemoryRegion, RegionTable, TableError};

/// The code in README.md, compiled and run as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
