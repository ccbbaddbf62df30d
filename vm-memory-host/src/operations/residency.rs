//! [`residency`]: reports the memory that each region uses.

use std::io;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

use vm_memory::GuestMemoryBackend;

use super::system::{unknown_usage, usages};
use crate::error::{NotProvisioned, OtherProcess};
use crate::mapping::{span_of, usable, HostMapped};
use crate::region::Span;

/// The memory that a region uses, in bytes.
///
/// The kernel reports `resident` and `file` page by page; the fields list exceptions. The other
/// numbers come from its statistics of VMAs: if adjacent regions share a VMA, each gets a share in
/// proportion to its size.
///
/// The region uses `private + file` bytes of memory, and `swapped` bytes of swap. For a private
/// mapping of a file, this can be twice its size: each page that the guest has written is in memory
/// twice.
///
/// # Windows
///
/// The numbers count the pages in the working set of this process (`QueryWorkingSetEx`). So
/// `mapped` is the same as `resident`, and `swapped` is 0. Pages of a file that only other
/// processes have in memory do not count. Large pages count as `huge`.
///
/// # Examples
///
/// ```
/// use vm_memory_host::Residency;
///
/// let mut region = Residency::default();
/// region.resident = 4096;
/// let total: Residency = [region, region].into_iter().sum();
/// assert_eq!(total.resident, 8192);
/// ```
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[doc(alias = "RSS")]
#[non_exhaustive]
pub struct Residency {
    /// The bytes that are in memory (mincore(2)).
    ///
    /// These are the pages of this process, and the pages of the file, including those that other
    /// processes populated. Anonymous pages that were only read count, although all of them are one
    /// shared page of zeroes; `mapped` excludes them. Pages that fallocate(2) has allocated on a
    /// tmpfs do not count before their first access: the kernel does not report them by range. A
    /// build allocates such pages on a tmpfs with a size limit.
    ///
    /// The kernel hides the page cache of a file that this process neither owns nor may write:
    /// all of it then counts as resident. For a part of a file of huge pages, only the pages that
    /// this process maps count.
    pub resident: u64,
    /// The bytes in pages that only this process has: anonymous pages, and private copies of file
    /// pages (`Anonymous` of /proc/thread-self/smaps).
    ///
    /// For a private mapping of huge pages, these are all pages that this process maps.
    pub private: u64,
    /// The bytes of the region's file that are in memory: its page cache, or its pages on a tmpfs.
    ///
    /// Other processes may use the same pages. A discard of a private file does not free them. The
    /// kernel can reclaim the page cache of a disk, but writes pages of a tmpfs to swap only. Pages
    /// of a tmpfs that were allocated and never accessed do not count, as in `resident`. For a
    /// private part of a file of huge pages, this is an upper bound.
    pub file: u64,
    /// The bytes that this process has mapped (`Rss` of /proc/thread-self/smaps, and hugetlb
    /// pages).
    pub mapped: u64,
    /// The part of `mapped` in hugetlb pages and completely mapped transparent huge pages.
    pub huge: u64,
    /// The bytes that are swapped out.
    pub swapped: u64,
    /// The bytes that are locked in memory.
    pub locked: u64,
    /// Whether only `resident` and `file` are known, because /proc/thread-self/smaps is missing or
    /// may not be read. The other numbers are then 0.
    pub is_partial: bool,
}

/// The sums of all numbers. It is partial if one of the two is.
impl Add for Residency {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            resident: self.resident.saturating_add(other.resident),
            private: self.private.saturating_add(other.private),
            file: self.file.saturating_add(other.file),
            mapped: self.mapped.saturating_add(other.mapped),
            huge: self.huge.saturating_add(other.huge),
            swapped: self.swapped.saturating_add(other.swapped),
            locked: self.locked.saturating_add(other.locked),
            is_partial: self.is_partial || other.is_partial,
        }
    }
}

impl AddAssign for Residency {
    fn add_assign(&mut self, other: Self) {
        *self = Add::add(*self, other);
    }
}

/// Adds the usage of regions. Regions with a file in common count it once each.
impl Sum for Residency {
    fn sum<I: Iterator<Item = Self>>(regions: I) -> Self {
        regions.fold(Self::default(), Add::add)
    }
}

/// An error of [`residency`] or [`content`](crate::content()).
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{residency, ResidencyError};
///
/// let foreign = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// assert!(matches!(residency(&foreign), Err(ResidencyError::NotProvisioned(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResidencyError {
    /// A region was not built by this crate.
    #[error(transparent)]
    NotProvisioned(#[from] NotProvisioned),
    /// The parent process built a region.
    #[error(transparent)]
    OtherProcess(#[from] OtherProcess),
    /// The system refused a call.
    #[error(
        "region {region}: cannot read its memory usage; {}",
        unknown_usage(.source)
    )]
    System {
        /// The region.
        region: Span,
        /// The error of the system.
        source: io::Error,
    },
}

/// Returns the memory that each region uses, in the order of addresses.
///
/// The cost grows with the number of pages, since the kernel looks up each of them, and with the
/// number of VMAs of the process. On Windows, the numbers are those of the
/// [working set](Residency#windows).
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{residency, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 64 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// memory.write_obj(1u8, GuestAddress(0x1000))?;
/// let (span, usage) = residency(&memory)?[0];
/// assert!(usage.resident >= 4096 && usage.resident < span.size);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns a [`ResidencyError`] if a region was not built by this crate, or was built by the parent
/// process. Also returns one if mincore(2) or a read of /proc/thread-self/smaps fails, or the query
/// of the working set. If that file is missing or may not be read, the result
/// [is partial](Residency::is_partial).
#[doc(alias = "mincore")]
#[doc(alias = "smaps")]
pub fn residency<M>(memory: &M) -> Result<Vec<(Span, Residency)>, ResidencyError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let known = |region| Ok((span_of(region), usable::<_, ResidencyError>(region)?));
    let mappings = memory
        .iter()
        .map(known)
        .collect::<Result<Vec<_>, ResidencyError>>()?;
    usages(&mappings)
}
