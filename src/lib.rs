//! Guest physical memory for virtual machine monitors.
//!
//! Between a VMM's devices, loaders and migration code, and the bytes that the guest's CPUs are using at the same moment, lies this crate.
//! It takes the place of the published crate `vm-memory` 0.18.0, without a line changed in its users; README.md says what is better,
//! and where that shows.
//!
//! ```text
//!     device, loader, migration
//!        │ read_obj(GuestAddress)          │ read_volatile_from(file)     │ get_slices, check_range
//!        ▼                                 ▼                              ▼
//!   Bytes<GuestAddress> ──────────────► GuestMemory                 GuestAddressSpace (maps that are swapped)
//!                                          │
//!                    ┌─────────────────────┴──────────┐
//!                    ▼ guest physical address         ▼ IOVA
//!            GuestMemoryBackend ◄───────────────── IommuMemory ──► Iommu, Iotlb
//!                    │ find_region
//!                    ▼
//!            GuestMemoryRegion      0x0 ├──── RAM ────┤  hole  ├──── RAM ────┤
//!                    │ get_slice
//!                    ▼
//!              VolatileSlice ──► one primitive that moves the bytes ──► Bitmap (marked dirty, after the write)
//! ```
//!
//! ```
//! # #[cfg(feature = "backend-mmap")] {
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! // 1 GiB of RAM below the 32-bit hole of a PC, and 1 GiB above it.
//! let memory: GuestMemoryMmap =
//!     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 30), (GuestAddress(1 << 32), 1 << 30)])?;
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
//! # Where to go from here
//!
//! | to | see |
//! |---|---|
//! | read and write by address | [`Bytes`], and [`ByteValued`] for structures of your own |
//! | get at slices of host memory | [`GuestMemory::get_slices`], [`VolatileSlice`] |
//! | make memory | [`GuestMemoryMmap`], [`MmapRegion`], [`mmap`]; the crate `vm-memory-host` for huge pages, NUMA and the like |
//! | let parts of it come and go | [`mmap::PluggedBlocks`], [`GuestMemoryAtomic`] |
//! | use regions of your own kind | [`GuestMemoryRegion`], [`GuestRegionCollection`] |
//! | track dirty pages | [`bitmap`], [`bitmap::AtomicBitmap`], [`dirty::DirtyMemory`] |
//! | change the map while devices run | [`GuestMemoryAtomic`], [`GuestMemoryReader`] |
//! | move bytes between files and the guest | [`ReadVolatile`], [`WriteVolatile`] |
//! | put a device behind an IOMMU | [`iommu`], [`IommuMemory`], [`iommu::SharedIotlb`] |
//! | survive pages that go away | [`fault`] |
//!
//! # Memory model
//!
//! Guest memory is written at any moment by CPUs that the compiler cannot see, and by other threads through this crate.
//!
//! - A naturally aligned access of 1, 2, 4 or 8 bytes is never torn: [`Bytes::read_obj`], [`Bytes::write_obj`], [`VolatileRef`], each
//!   element of [`VolatileSlice::copy_to`] and [`copy_from`](VolatileSlice::copy_from) (in ascending order, but for those in the same aligned 32 bytes), and every copy of exactly that size and alignment.
//! - [`Bytes::load`] and [`Bytes::store`] are that, with the ordering asked for.
//! - Everything else may be seen in parts, in any order.
//! - A page is marked dirty after it was written; no interleaving with a harvest loses it.
//! - What is reached by pointer or reference ([`VolatileMemory::get_atomic_ref`], `aligned_as_ref`, `ptr_guard`) is outside these promises.
//!
//! # Features
//!
//! | feature | brings |
//! |---|---|
//! | `rawfd` (default) | [`ReadVolatile`] and [`WriteVolatile`] for files, sockets and descriptors; [`vectored`] |
//! | `backend-mmap` | [`mmap`]: memory in mappings of this process |
//! | `backend-bitmap` | [`bitmap::AtomicBitmap`] |
//! | `backend-atomic` | [`atomic`]: maps that are swapped |
//! | `iommu` | [`iommu`]: translated memory |
//!
//! # System calls
//!
//! No path makes a system call that the same path of 0.18.0 does not make, except that mapping a file asks `fstat` for its length: see
//! [`mmap`]. Each module that makes any lists them.

#![cfg_attr(
    not(all(
        feature = "backend-mmap",
        feature = "backend-atomic",
        feature = "backend-bitmap",
        feature = "iommu"
    )),
    allow(
        rustdoc::broken_intra_doc_links,
        reason = "links to what a feature brings"
    )
)]
#![cfg_attr(
    test,
    allow(
        missing_docs,
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing,
        clippy::multiple_unsafe_ops_per_block,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test that goes wrong may panic, and says what it does in fewer words"
    )
)]

#[cfg(feature = "xen")]
compile_error!(
    "vm-memory: the feature `xen` is not built yet; leave it off, or stay with 0.18.0 from the registry"
);

#[cfg(all(feature = "backend-mmap", not(unix)))]
compile_error!(
    "vm-memory: the feature `backend-mmap` is built for Unix only so far; leave it off on this target"
);

#[expect(
    unsafe_code,
    reason = "moves guest bytes: the module that everything unsafe about them is in"
)]
mod access;
pub use access::fault;
pub mod address;
#[cfg(feature = "backend-atomic")]
pub mod atomic;
#[expect(
    unsafe_code,
    reason = "the trait of atomic integers is a promise about their bytes"
)]
mod atomic_integer;
pub mod bitmap;
pub mod bytes;
#[cfg(feature = "backend-bitmap")]
pub mod dirty;
#[expect(unsafe_code, reason = "its types make the promise of plain values")]
pub mod endian;
pub mod guest_memory;
#[cfg_attr(
    all(feature = "rawfd", unix),
    expect(
        unsafe_code,
        reason = "hands pointers into guest memory to read(2) and write(2)"
    )
)]
pub mod io;
#[cfg(feature = "iommu")]
pub mod iommu;
#[cfg(feature = "backend-mmap")]
#[expect(unsafe_code, reason = "makes and removes mappings, and slices of them")]
pub mod mmap;
pub mod region;
#[cfg(test)]
mod skipped;
#[expect(
    unsafe_code,
    reason = "the trait of plain values is a promise about their bytes"
)]
mod value;
#[cfg(all(feature = "rawfd", unix))]
#[expect(
    unsafe_code,
    reason = "hands pointers into guest memory to readv(2) and writev(2), and keeps slices of memory that it owns"
)]
pub mod vectored;
#[expect(
    unsafe_code,
    reason = "turns pointers with a length into slices and values"
)]
pub mod volatile_memory;
#[cfg(any(feature = "backend-atomic", feature = "iommu"))]
mod wait;

pub use address::{Address, AddressValue};
#[cfg(feature = "backend-atomic")]
pub use atomic::{GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryReader};
pub use atomic_integer::AtomicInteger;
pub use bytes::{AtomicAccess, ByteValued, Bytes};
pub use endian::{Be16, Be32, Be64, BeSize, Le16, Le32, Le64, LeSize};
pub use guest_memory::{
    Error as GuestMemoryError, FileOffset, GuestAddress, GuestAddressSpace, GuestMemory,
    GuestMemoryBackend, GuestUsize, MemoryRegionAddress, Permissions, Result as GuestMemoryResult,
};
pub use io::{ReadVolatile, WriteVolatile};
#[cfg(feature = "iommu")]
pub use iommu::{Iommu, IommuMemory, Iotlb};
#[cfg(all(feature = "backend-mmap", unix))]
pub use mmap::{GuestMemoryMmap, GuestRegionMmap, MmapRegion};
pub use region::{
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionCollectionError,
};
pub use volatile_memory::{
    Error as VolatileMemoryError, Result as VolatileMemoryResult, VolatileArrayRef, VolatileMemory,
    VolatileRef, VolatileSlice,
};
