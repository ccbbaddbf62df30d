//! [`LogError`]: the errors of dirty logs.

use std::io;
use std::os::fd::OwnedFd;

use vm_memory::mmap::MmapRegionError;
use vm_memory::VolatileMemoryError;

/// The error of a dirty log that is shared with a peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The log has no bytes.
    #[error("dirty log has no bytes")]
    Empty,
    /// The log does not begin at a multiple of 8 bytes in its file.
    #[error("dirty log begins at offset {offset:#x} of its file, which is not a multiple of 8")]
    Misaligned {
        /// The offset in the file.
        offset: u64,
    },
    /// The log ends past the end of the address space.
    #[error("dirty log of {size:#x} bytes at offset {offset:#x} of its file is too large")]
    TooLarge {
        /// The offset in the file.
        offset: u64,
        /// The number of bytes.
        size: u64,
    },
    /// The memfd of a new log cannot be created.
    #[error("cannot create a memfd for the dirty log")]
    Create(#[source] io::Error),
    /// The file does not have the seal `F_SEAL_SHRINK`, so a peer may truncate or serve it.
    #[error("the peer can truncate the file of the dirty log; seal it with F_SEAL_SHRINK")]
    Unsealed {
        /// The file. If the peer serves it (FUSE), its close may wait without limit: drop it in a
        /// separate thread.
        file: OwnedFd,
    },
    /// The file is not on tmpfs. On hugetlbfs, an access to a missing page raises SIGBUS.
    #[error("the file of the dirty log is not on tmpfs; use a memfd without MFD_HUGETLB")]
    HugePages {
        /// The file.
        file: OwnedFd,
    },
    /// The file cannot be mapped, or is shorter than the log.
    #[error("cannot map the dirty log")]
    Map(#[source] MmapRegionError),
    /// The log has no bits for the last pages of the memory.
    #[error(
        "dirty log has bits for {pages:#x} pages, but the memory ends at page {needed:#x}; \
         use a larger log"
    )]
    TooShort {
        /// The number of pages for which the log has bits.
        pages: u64,
        /// The number of pages up to the last address of the memory.
        needed: u64,
    },
    /// At the deadline, threads were still marking in the log that is being replaced.
    #[error(
        "{writers} threads still mark in the replaced dirty log; keep the old log, and try again"
    )]
    WritersRemain {
        /// The number of threads.
        writers: usize,
    },
    /// The log cannot be read: its file was truncated, or its memory is poisoned.
    ///
    /// Pages may be dirty that are not known. Treat all pages as dirty.
    #[error("cannot read the dirty log; treat all pages as dirty")]
    Inaccessible(#[source] VolatileMemoryError),
    /// Memory for the harvested words ran out. The marks stay.
    #[error("cannot allocate {words:#x} words for a dirty log")]
    OutOfMemory {
        /// The number of words.
        words: usize,
    },
}
