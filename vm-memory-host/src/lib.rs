//! RAM for virtual machine monitors, on [`vm_memory`]: provisioned as it was asked for, plugged and given back while the guest runs.
//!
//! Every monitor has written this for itself: reservations that are aligned to huge pages, memfds and their seals, pools of huge pages, NUMA nodes, threads that
//! bring pages in, balloons, memory that is plugged. Here it is once.
//!
//! ```text
//!   MemoryBuilder ── Region: address, size, Backing, options, blocks
//!        │ build()                                         or an error: which region, what was asked, what there is, what to do
//!        ▼
//!   GuestMemoryMmap ── regions of vm-memory, each keeps its HostMapping
//!        │
//!        ├─ prefault   pages are there before the guest asks
//!        ├─ discard    pages go back to the system (balloon, free page reporting)
//!        ├─ plug, unplug   blocks of a region come and go (virtio-mem)
//!        ├─ residency  what it takes
//!        └─ describe   as data, with descriptors, for another process or a snapshot
//! ```
//!
//! What is built is an ordinary [`GuestMemoryMmap`](vm_memory::GuestMemoryMmap): it can be put behind an IOMMU, swapped by
//! `GuestMemoryAtomic`, and its regions can be parts of other maps. A region carries what this crate knows of it,
//! so that all functions work on any map that has it, and it is unmapped when the last map drops it: whole regions come and go by the swap of
//! the map.
//!
//! ```
//! use std::sync::Arc;
//! use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
//! use vm_memory_host::{describe, discard, Backing, MemoryBuilder, Region};
//!
//! type Memory = GuestMemoryMmap<()>;
//! let boot: Memory = MemoryBuilder::new()
//!     .region(Region::new(GuestAddress(0), 16 << 20).backing(Backing::Memfd).name("boot"))
//!     .build()?;
//! let memory = GuestMemoryAtomic::new(boot);
//!
//! // A module of 16 MiB more, and gone again.
//! let module: Memory = MemoryBuilder::new().region(Region::new(GuestAddress(1 << 32), 16 << 20)).build()?;
//! let (_, region) = module.remove_region(GuestAddress(1 << 32), 16 << 20)?;
//! memory.update(|map| map.insert_region(region))?;
//! println!("{}", describe(&*memory.memory())?.0);
//! memory.memory().write_obj(1u8, GuestAddress(1 << 32))?;
//! discard(&*memory.memory(), GuestAddress(1 << 32), 16 << 20)?;
//! memory.update(|map| map.remove_region(GuestAddress(1 << 32), 16 << 20).map(|(map, _)| map))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Linux only. Each function lists the system calls that it makes, for seccomp filters.
//!
//! # Layers
//!
//! A module imports only from its own line or from lines above it.
//!
//! ```text
//! sys                   system calls: reservations, mapped memory, files
//! region                Region, Backing, Options: the caller's request
//! error                 the error types
//! host, vma          huge page pools, NUMA nodes, available memory; the count of VMAs
//! backing               backing files, opened and checked
//! mapping               HostMapping, and the vm-memory region over it
//! residency             pages in memory
//! discard, prefault     pages returned to the system, pages populated
//! plug                  blocks made accessible and inaccessible
//! builder               MemoryBuilder: checks a request and maps it
//! description           guest memory as data
//! ```

#![cfg(target_os = "linux")]
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

mod backing;
mod builder;
mod description;
mod discard;
mod error;
mod mapping;
mod plug;
mod prefault;
mod region;
mod residency;
mod resources;
#[expect(
    unsafe_code,
    reason = "makes system calls and owns the addresses that they change"
)]
mod sys;
mod vma;

pub use builder::MemoryBuilder;
pub use description::{
    describe, BackingDescription, BlocksDescription, Description, DescriptionError,
    RegionDescription,
};
pub use discard::discard;
pub use error::{BuildError, ChangeError, NotProvisioned, PrefaultError};
pub use mapping::{provisioned, HostMapping};
pub use plug::{plug, unplug};
pub use prefault::{prefault, Progress};
pub use region::{
    Backing, BackingKind, Blocks, Lock, NumaPolicy, Options, Region, Sharing, Span,
    TransparentHugePages, Unplugged,
};
pub use residency::{residency, Residency, ResidencyError};
pub use resources::{huge_page_pools, HugePagePool};
