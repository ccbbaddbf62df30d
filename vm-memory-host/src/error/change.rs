//! The errors of operations on built memory: [`PrefaultError`], [`NotProvisioned`],
//! [`OtherProcess`], [`ChangeError`], [`RefusedPage`].

use std::io;

use vm_memory::listeners::ListenerError;

use super::too_few_huge_pages;
use crate::host::GroupLimit;
use crate::region::Span;
use crate::sys::{plug_remedy, populate_remedy, SHORTAGES};

/// An error of [`prefault`](crate::prefault()).
///
/// Pages that were populated before the error stay populated.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::ops::ControlFlow;
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{prefault, MemoryBuilder, PrefaultError, Region};
///
/// let region = Region::new(GuestAddress(0), 128 << 20);
/// let memory = MemoryBuilder::new().region(region).build::<()>()?;
/// match prefault(&memory, NonZeroUsize::MIN, |_| ControlFlow::Break(())) {
///     Err(PrefaultError::Cancelled { done, total }) => assert!(done < total),
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrefaultError {
    /// The callback returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("prefault cancelled after {done:#x} of {total:#x} bytes")]
    Cancelled {
        /// The number of populated bytes.
        done: u64,
        /// The number of bytes to populate.
        total: u64,
    },
    /// A region was not built by this crate.
    #[error(transparent)]
    NotProvisioned(#[from] NotProvisioned),
    /// The parent process built a region. Nothing was populated.
    #[error(transparent)]
    OtherProcess(#[from] OtherProcess),
    /// The host has too little memory. Nothing was populated.
    #[error(
        "prefault needs {wanted:#x} bytes, but only {available:#x} bytes are available; \
        use less memory or do not prefault"
    )]
    Memory {
        /// The number of bytes to populate.
        ///
        /// Bytes that are resident already are excluded, unless the total is so large that
        /// excluding them cannot avoid the error.
        wanted: u64,
        /// The number of available bytes, computed as in
        /// [`BuildError::Memory`](super::BuildError::Memory).
        available: u64,
    },
    /// A control group of this process leaves too little memory, or too few huge pages.
    #[error(
        "prefault needs {wanted:#x} bytes, but {limit}; {done:#x} bytes were populated; \
        raise the limit, use less memory or do not prefault"
    )]
    ControlGroup {
        /// The number of bytes to populate.
        wanted: u64,
        /// The limit.
        limit: GroupLimit,
        /// The number of bytes that were populated before.
        done: u64,
    },
    /// The file of a region is too short: it was truncated after the build.
    #[error(
        "region {region}: cannot populate it: its file has {length:#x} bytes, but the region \
        needs {needed:#x}; {done:#x} of {total:#x} bytes were populated; extend the file"
    )]
    FileTooShort {
        /// The region.
        region: Span,
        /// The length that the file must have, in bytes.
        needed: u64,
        /// The length of the file in bytes.
        length: u64,
        /// The number of bytes that were populated before.
        done: u64,
        /// The number of bytes to populate.
        total: u64,
    },
    /// The system refused to populate a range.
    #[error(
        "region {region}: cannot populate {len:#x} bytes at {start:#x}, after {done:#x} of \
        {total:#x} bytes; {}",
        populate_remedy(.source)
    )]
    System {
        /// The region.
        region: Span,
        /// The guest physical address of the range.
        start: u64,
        /// The length of the range in bytes.
        len: u64,
        /// The number of bytes that were populated before.
        done: u64,
        /// The number of bytes to populate.
        total: u64,
        /// The error of the system.
        ///
        /// - `ENOMEM`: no memory is free.
        /// - `EFAULT`: the file provides no page. Its pool or file system has no free page, or
        ///   reading the file fails.
        /// - `EHWPOISON`: a page has a hardware memory error.
        /// - `EINVAL`: the kernel is older than Linux 5.14.
        source: io::Error,
    },
}

/// The error for a region that this crate did not build.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
/// use vm_memory_host::provisioned;
///
/// let foreign = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let region = foreign.iter().next().ok_or("no region")?;
/// assert!(provisioned(region).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("region {region} was not built by vm-memory-host; build it with MemoryBuilder")]
pub struct NotProvisioned {
    /// The region.
    pub region: Span,
}

/// The error for a region that the parent process built, in a child of fork(2).
///
/// # Examples
///
/// ```
/// use vm_memory_host::{ChangeError, Span};
///
/// /// Returns the region that must be discarded in the parent process.
/// fn region_of_parent(error: &ChangeError) -> Option<Span> {
///     match error {
///         ChangeError::OtherProcess(other) => Some(other.region),
///         _ => None,
///     }
/// }
/// # let _ = region_of_parent;
/// ```
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("region {region} belongs to the parent process; call this there, or build a region here")]
pub struct OtherProcess {
    /// The region.
    pub region: Span,
}

/// An error of [`discard`](crate::discard()), [`zero_range`](crate::zero_range()),
/// [`plug`](crate::plug()), [`unplug`](crate::unplug()), [`unplug_all`](crate::unplug_all) or
/// [`plug_state`](crate::plug_state), or the reason of a [`RefusedPage`].
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{discard, ChangeError, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// match discard(&memory, GuestAddress(0), 2 << 20) {
///     Err(ChangeError::Hole { addr }) => assert_eq!(addr, 1 << 20),
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// A part of the range is in no region. Nothing was changed.
    #[error("no region contains guest address {addr:#x}; pass a range without holes")]
    Hole {
        /// The lowest guest physical address of the range that is in no region.
        addr: u64,
    },
    /// The range passes the end of the guest's address space. Nothing was changed.
    #[error("{len:#x} bytes at guest address {start:#x} pass 2^64; pass a shorter range")]
    PastTop {
        /// The guest physical address of the range.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A page number stands for an address that is not below 2^64. Nothing was changed.
    #[error("page {page:#x} is past the end of guest memory; page numbers are below {:#x}", 1u64 << 52)]
    PageNumber {
        /// The guest physical address of the page, divided by 4096.
        page: u64,
    },
    /// The range is empty.
    #[error("no bytes at guest address {addr:#x} were requested; pass at least one block")]
    Empty {
        /// The guest physical address of the range.
        addr: u64,
    },
    /// A region was not built by this crate. Nothing was changed.
    #[error(transparent)]
    NotProvisioned(#[from] NotProvisioned),
    /// The parent process built a region. Nothing was changed.
    #[error(transparent)]
    OtherProcess(#[from] OtherProcess),
    /// The range does not consist of whole pages or blocks. Nothing was changed.
    #[error(
        "region {region}: {len:#x} bytes at {start:#x} are not whole {what} of {granularity:#x} \
        bytes; align the range"
    )]
    Unaligned {
        /// The region.
        region: Span,
        /// The guest physical address of the range's part in the region.
        start: u64,
        /// The length of that part in bytes.
        len: u64,
        /// `pages` or `blocks`.
        what: &'static str,
        /// The size of a page or block in bytes.
        granularity: u64,
    },
    /// The region is read-only. Nothing was changed.
    #[error("region {region} is read-only; do not discard its pages")]
    ReadOnly {
        /// The region.
        region: Span,
    },
    /// The region has no blocks. Nothing was changed.
    #[error("region {region} has no blocks; build it with Region::blocks")]
    NoBlocks {
        /// The region.
        region: Span,
    },
    /// The pool has too few huge pages for a block. The block was not plugged.
    #[error(
        "region {region}: cannot plug {len:#x} bytes at {start:#x}: {}; \
        {done:#x} bytes were plugged before",
        too_few_huge_pages(*.wanted, *.free, *.page_size, &[])
    )]
    NoPages {
        /// The region.
        region: Span,
        /// The guest physical address of the range's part in the region.
        start: u64,
        /// The length of that part in bytes.
        len: u64,
        /// The number of huge pages that it needs.
        wanted: u64,
        /// The number of free huge pages.
        free: u64,
        /// The size of a huge page in bytes.
        page_size: u64,
        /// The number of bytes at the start of the range that were plugged.
        done: u64,
        /// The error of the system.
        source: io::Error,
    },
    /// A control group of this process leaves too little memory, or too few huge pages.
    ///
    /// The block that needs them was not plugged.
    #[error(
        "region {region}: cannot plug {len:#x} bytes at {start:#x}: {wanted:#x} bytes are \
        required, but {limit}; raise the limit or plug fewer blocks; \
        {done:#x} bytes were plugged before"
    )]
    ControlGroup {
        /// The region.
        region: Span,
        /// The guest physical address of the range's part in the region.
        start: u64,
        /// The length of that part in bytes.
        len: u64,
        /// The number of bytes that its unplugged blocks need.
        wanted: u64,
        /// The limit.
        limit: GroupLimit,
        /// The number of bytes at the start of the range that were plugged.
        done: u64,
    },
    /// The host has less memory than a block needs. The block was not plugged.
    #[error(
        "region {region}: cannot plug {len:#x} bytes at {start:#x}: {wanted:#x} bytes are \
        required, but only {available:#x} bytes are available; free memory or plug fewer blocks; \
        {done:#x} bytes were plugged before"
    )]
    Memory {
        /// The region.
        region: Span,
        /// The guest physical address of the range's part in the region.
        start: u64,
        /// The length of that part in bytes.
        len: u64,
        /// The number of bytes that its unplugged blocks need.
        wanted: u64,
        /// The number of available bytes, computed as in
        /// [`BuildError::Memory`](super::BuildError::Memory).
        available: u64,
        /// The number of bytes at the start of the range that were plugged.
        done: u64,
    },
    /// The system refused a call. The part of the range before `start` was changed.
    #[error(
        "region {region}: cannot {what} {len:#x} bytes at {start:#x}; \
        {done:#x} bytes were changed before{}",
        remedy(.what, .source)
    )]
    System {
        /// The region.
        region: Span,
        /// The operation.
        what: &'static str,
        /// The guest physical address of the range's part in the region.
        start: u64,
        /// The length of that part in bytes.
        len: u64,
        /// The number of bytes at the start of the range that were changed.
        done: u64,
        /// The error of the system.
        ///
        /// It is `EFAULT` if huge pages cannot be plugged, and the number of free ones cannot be
        /// read, such as in a jail without /sys.
        source: io::Error,
    },
    /// A [listener](vm_memory::listeners) refused the change, or pages are pinned.
    #[error(
        "region {region}: cannot change {len:#x} bytes at {start:#x}, after {done:#x} bytes: a \
        listener refused, or pages are pinned"
    )]
    Listener {
        /// The region.
        region: Span,
        /// The guest physical address of the range.
        start: u64,
        /// The length of the range in bytes.
        len: u64,
        /// The number of bytes that were changed before.
        done: u64,
        /// The reason.
        source: Box<ListenerError>,
    },
}

impl ChangeError {
    /// Returns whether blocks were not plugged because pages, or memory for them, were short.
    ///
    /// The same request may succeed later. A virtio-mem device then returns `VIRTIO_MEM_RESP_BUSY`
    /// (virtio 1.2, section 5.15.6.3), so that the driver tries it again. The variants are
    /// [`NoPages`](Self::NoPages), [`ControlGroup`](Self::ControlGroup), [`Memory`](Self::Memory),
    /// and [`System`](Self::System) of a plug with one of these errors:
    ///
    /// - `EFAULT`: huge pages are short, but their number cannot be read, such as in a jail without
    ///   /sys. A file that was truncated gives the same error.
    /// - `ENOMEM`: the kernel lacks memory, or the process has too many VMAs.
    /// - `ENOSPC` or `EDQUOT`: the file system of a file is full.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory_host::ChangeError;
    ///
    /// let response = |error: &ChangeError| if error.is_shortage() { 2u16 } else { 3 };
    /// assert_eq!(response(&ChangeError::Hole { addr: 0 }), 3);
    /// ```
    #[must_use]
    pub fn is_shortage(&self) -> bool {
        match self {
            ChangeError::NoPages { .. }
            | ChangeError::ControlGroup { .. }
            | ChangeError::Memory { .. } => true,
            ChangeError::System { what, source, .. } => *what == PLUG && is_shortage(source),
            _ => false,
        }
    }
}

impl PrefaultError {
    /// Returns whether pages were not populated because they, or memory for them, were short.
    ///
    /// The same call may succeed later. The variants are [`Memory`](Self::Memory),
    /// [`ControlGroup`](Self::ControlGroup), and [`System`](Self::System) with the errors that
    /// [`ChangeError::is_shortage`] lists.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory_host::PrefaultError;
    ///
    /// assert!(PrefaultError::Memory { wanted: 2 << 30, available: 1 << 30 }.is_shortage());
    /// assert!(!PrefaultError::Cancelled { done: 0, total: 2 << 30 }.is_shortage());
    /// ```
    #[must_use]
    pub fn is_shortage(&self) -> bool {
        match self {
            PrefaultError::Memory { .. } | PrefaultError::ControlGroup { .. } => true,
            PrefaultError::System { source, .. } => is_shortage(source),
            _ => false,
        }
    }
}

/// Returns whether an error of the system says that pages, or memory for them, are short.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    number.is_some_and(|number| SHORTAGES.contains(&number))
}

/// Returns a remedy for a refused operation, to append to a message.
fn remedy(what: &str, source: &io::Error) -> &'static str {
    // Other operations need no new pages, or fault for other reasons, such as a truncated file.
    match what {
        PLUG => plug_remedy(source),
        _ => "",
    }
}

/// The operation of a [`ChangeError::System`] that did not plug a block.
pub(crate) const PLUG: &str = "plug";

/// A page that [`discard_pages`](crate::discard_pages) or
/// [`Balloon::inflate`](crate::Balloon::inflate) has refused, and the reason.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{discard_pages, ChangeError, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// let refused = discard_pages(&memory, [0x100u32]).first_refused.ok_or("no page was refused")?;
/// assert_eq!(refused.to_string(), "page 0x100 was refused");
/// assert!(matches!(refused.source, ChangeError::Hole { .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[error("page {page:#x} was refused")]
#[non_exhaustive]
pub struct RefusedPage {
    /// The guest physical address of the page, divided by 4096.
    pub page: u64,
    /// The reason. It may describe a range that includes the page.
    pub source: ChangeError,
}
