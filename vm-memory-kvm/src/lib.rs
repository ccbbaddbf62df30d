//! KVM memory slots that follow guest memory, on [`vm_memory`] and `kvm-ioctls`.
//!
//! [`KvmSlots`] has the slots of one virtual machine, and its dirty log. As a listener of a
//! `GuestMemoryAtomic`, it creates and deletes slots when regions and blocks come and go. This
//! crate supports Linux only, and starts no thread.
//!
//! ```text
//!   GuestMemoryAtomic::update ──┐ listener
//!   plug and unplug of blocks ──┴──────► KvmSlots ── slots ──► KVM
//!   DirtyMemory ◄── SlotLogs ◄── take_log ──┘ ◄── dirty log ───┘
//! ```
//!
//! | task | items |
//! |---|---|
//! | give a virtual machine its memory | [`KvmSlots::builder`], [`KvmSlots::add_memory`] |
//! | follow hotplug and blocks | `GuestMemoryAtomic::add_listener`, with a clone of [`KvmSlots`] |
//! | add and remove ranges directly | [`KvmSlots::add`], [`KvmSlots::remove`] |
//! | log the pages that vCPUs write | [`KvmSlots::set_tracking`], [`KvmSlots::take_log`] |
//! | choose a bitmap or a ring | [`DirtyLog`], [`KvmSlots::add_vcpu`], [`KvmSlots::drain_rings`] |
//! | find the region of an access that KVM could not make | [`locate`] |
//!
//! # Errors
//!
//! Each change is all or nothing: if KVM refuses a call, the calls before it are undone. If that
//! fails as well, [`SlotError::NotUndone`] lists the ranges that differ.
//!
//! # System calls
//!
//! Add these calls to the seccomp filter of the thread that calls the function. `ioctl` is called
//! with `KVM_SET_USER_MEMORY_REGION`, `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG`,
//! `KVM_RESET_DIRTY_RINGS`, `KVM_CHECK_EXTENSION` and `KVM_ENABLE_CAP`.
//!
//! | phase | function | when | system calls |
//! |---|---|---|---|
//! | boot | [`KvmSlotsBuilder::build`] | always | `ioctl` |
//! | boot | [`KvmSlots::add_memory`] | for each range | `ioctl` |
//! | boot | [`KvmSlots::add_vcpu`] | with [`DirtyLog::Ring`] | `mmap` |
//! | run time | [`KvmSlots::add`] | for each slot | `ioctl` |
//! | run time | [`KvmSlots::remove`] | for each slot | `ioctl` |
//! | migration | [`KvmSlots::set_tracking`] | for each slot | `ioctl` |
//! | migration | [`KvmSlots::take_log`] | for each slot, or once for rings | `ioctl` |
//! | migration | [`KvmSlots::drain_rings`] | always | `ioctl` |
//! | run time | [`KvmSlots`] | the last handle is dropped, with [`DirtyLog::Ring`] | `munmap` |
//! | run time | [`KvmSlots`] | the last handle of the virtual machine is dropped | `close` |
//!
//! Locks call `futex` where threads contend, and the allocator makes calls of its own.
//!
//! # Examples
//!
//! See [`KvmSlots`], [`KvmSlotsBuilder`], [`SlotLogs`] and [`locate`]. The program
//! `examples/kvm_slots.rs` runs a guest whose memory grows and shrinks.

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

#[cfg(not(target_os = "linux"))]
compile_error!("vm-memory-kvm: only Linux has KVM");

// # Layers
//
// A module imports only from its own line or from lines above it.
//
// ```text
// error, ranges         the errors; sets of guest addresses
// sys                   the calls of KVM; the memory of dirty rings
// slots                 the slots, changes that are all or nothing, dirty logs
// listener, fault       slots as a listener of guest memory; the region of a failed access
// ```
mod error;
mod fault;
mod listener;
mod ranges;
mod slots;
#[expect(
    unsafe_code,
    reason = "KVM takes host memory by its address, and shares the memory of rings"
)]
mod sys;

pub use error::{SlotAction, SlotError};
pub use fault::{locate, FaultLocation};
pub use slots::{DirtyLog, KvmSlots, KvmSlotsBuilder, SlotInfo, SlotLogs};

/// The code in README.md, compiled and run as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
