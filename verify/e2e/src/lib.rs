//! End-to-end tests of vm-memory, vm-memory-host and the devices of microvm.
//!
//! A driver in Rust performs a plan of requests on microvm's block device, and checks every value
//! that it reads. After the run, an oracle compares every page, sector and number with the plan.
//! The device knows neither the plan nor the oracle.
//!
//! ```text
//!   Plan ──► Driver ──► Cpu: thread or vCPU ──► Bus ──► VirtioMmio ──► Disk: plain, io_uring,
//!    │         │ pattern, rings, buffers                   │ data             truncated
//!    │         ▼                                           ▼
//!    │       its own mapping ─────── one memory ───────── guest RAM, or a view behind an IOMMU
//!    │         │ bitmaps, KVM's log                        │ bitmaps
//!    ▼         ▼                                           ▼
//!   verify: driver pages, device pages, pattern, buffers, sectors, numbers, host memory
//! ```
//!
//! A driver on a thread does not need KVM, so these tests run everywhere. It has its own mapping of
//! guest memory. The bitmaps of this mapping are its dirty log, as KVM's log is that of a vCPU.
//!
//! # Modes
//!
//! | mode | test |
//! |---|---|
//! | driver on a thread | `runs`: every test |
//! | driver on a vCPU | `runs`: every test with `everywhere`; `vm` |
//! | built-in guest on KVM, its options and its report | `microvm`: `guest` |
//! | ELF and bzImage kernels, initrd, command line, terminal | `microvm`: `kernels` |
//! | RAM of 16 MiB to 64 GiB, not a multiple of 2 MiB | `runs`: `run_with_any_ram_size` |
//! | memfd, huge pages, shared file | `runs`: `run_with_default`, `…huge_pages`, `…file_backing` |
//! | anonymous memory | `microvm`: `guest_with_any_backing` |
//! | prefault | `runs`: `run_with_prefault`; `microvm`: `guest_with_any_backing` |
//! | disk image, read-only or writable, of any size | `runs`: `run_with_read_only_image`, `…writable_image` |
//! | disk on io_uring | `runs`: `run_on_io_uring`; `uring`; `device` |
//! | io_uring refused by a seccomp filter | `uring` |
//! | device behind an IOMMU, mappings changed in flight | `runs`: `run_behind_iommu` |
//! | memory plugged and unplugged | `runs`: `run_with_plugged_memory`; `plug_device`; `process_memory` |
//! | files truncated under the device | `runs`: `run_while_files_are_truncated`; `truncation` |
//! | invalid requests and registers | `device` |
//! | guests that hang, halt or fault | `vm` |
//! | the oracle | `verify` |
//!
//! Modes combine: `runs` also tests plugged memory with truncated files, with io_uring, behind an
//! IOMMU, and in huge pages.
//!
//! # Layers
//!
//! A module imports only from its own line or from lines above it.
//!
//! ```text
//! error                 the error type
//! memory                guest memory: second mappings, pluggable and truncatable regions
//! plug                  the device that plugs memory
//! plan                  the plan, and the pages that must be dirty
//! mapper, processor     the driver's side of the IOMMU; the thread or vCPU that it runs on
//! storm, uring          disks: truncated, or on io_uring
//! driver, vcpu          the driver, and the guest that performs its accesses
//! run                   a run, from its setup to its outcome
//! verify                the oracle
//! ```

pub mod driver;
mod error;
pub mod mapper;
pub mod memory;
pub mod plan;
pub mod plug;
pub mod processor;
pub mod run;
pub mod storm;
#[expect(unsafe_code, reason = "io_uring takes pointers to guest memory")]
pub mod uring;
#[cfg(target_arch = "x86_64")]
pub mod vcpu;
pub mod verify;

pub use error::Error;
