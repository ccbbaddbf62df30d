//! A small virtual machine monitor on vm-memory.
//!
//! Start reading at `vmm::run`: it runs a guest from the first mapping to the report.
//!
//! # Layers
//!
//! A module imports only from its own line or from lines above it.
//!
//! ```text
//! error                 the reasons for which no guest runs
//! memory                guest RAM: backing, layout, dirty bitmaps
//! segments, block       a request's buffers, and the block device that moves their data
//! disk                  a raw disk image
//! serial, bus           the UART, and the dispatch of accesses to the devices
//! virtio_mmio           the registers and the queue of the block device
//! dirty                 dirty pages, from the bitmaps and from KVM's log
//! report, args          the report and the command line
//! kvm                   memory slots, the vCPU and its exits
//! boot, guest           kernels, and the built-in guest
//! vmm                   all of it, in the order of a run
//! ```
//!
//! All accesses to guest memory use the public API of vm-memory. The package `e2e` tests the
//! devices with a driver that runs as a thread, so that tests without KVM cover them.

#![cfg_attr(
    not(test),
    deny(
        missing_docs,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::multiple_unsafe_ops_per_block,
        clippy::panic,
        clippy::unwrap_used
    )
)]

pub mod args;
pub mod block;
pub mod bus;
pub mod dirty;
pub mod disk;
mod error;
pub mod memory;
pub mod report;
pub mod segments;
pub mod serial;
pub mod virtio_mmio;

#[cfg(target_arch = "x86_64")]
pub mod boot;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the guest is constant data between two labels")]
pub mod guest;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
#[cfg(target_arch = "x86_64")]
pub mod vmm;

pub use error::Error;
