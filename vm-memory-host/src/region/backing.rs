//! [`Backing`]: the memory or file that a region requests, and [`BackingKind`]: its kind.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use crate::sys::OwnedFile;

/// The memory or file to map for a region.
///
/// | backing | other processes can map it | pages come from |
/// |---|---|---|
/// | [`Anonymous`](Self::Anonymous) | no | ordinary memory |
/// | [`Memfd`](Self::Memfd) | yes, by descriptor | ordinary memory |
/// | [`Hugetlb`](Self::Hugetlb) | yes, by descriptor | a huge page pool |
/// | [`File`](Self::File), shared | yes | the page cache, a device, or the memfd that was passed |
/// | [`File`](Self::File), private | no | the file until the guest writes, then ordinary memory |
///
/// # Windows
///
/// [`Anonymous`](Self::Anonymous) is private memory of `VirtualAlloc`. [`Hugetlb`](Self::Hugetlb)
/// is large pages of the one size that the system has. No other process can map them, they are
/// always in memory, and they need the privilege `SeLockMemoryPrivilege`. [`Memfd`](Self::Memfd)
/// and [`private_file`](Self::private_file) are errors of the build.
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{Backing, Region};
///
/// // Guest RAM that a vhost-user back end can map.
/// let region = Region::new(GuestAddress(0), 64 << 20).backing(Backing::Memfd);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Backing {
    /// Private pages of this process, initially zero.
    #[doc(alias = "MAP_ANONYMOUS")]
    Anonymous,
    /// A new memfd (memfd_create(2)), initially zero.
    ///
    /// A process that receives the descriptor can map the same memory (vhost-user). The memfd is
    /// sealed against shrinking, growing and further seals, so no such process can truncate it. A
    /// process that can write to it can still punch holes, which read as zeroes.
    ///
    /// Such a process can also keep the kernel's lock on the file. A write(2) to the file holds it
    /// while it waits for the page of its buffer, which userfaultfd(2) or FUSE may never provide.
    /// [`discard`](crate::discard()), [`plug`](crate::plug()), [`unplug`](crate::unplug()) and
    /// [`content`](crate::content()) then wait until that process ends. Builds and accesses do not.
    /// Deny untrusted processes both services, or call these functions in a thread that may wait.
    ///
    /// No process can execute it (`MFD_NOEXEC_SEAL`). Before Linux 6.3, it has no execute
    /// permission, but a process of the same user can set that again (fchmod(2)).
    ///
    /// The region may begin at an offset in the memfd ([`HostMapping::file`]), so that it can have
    /// transparent huge pages.
    ///
    /// [`HostMapping::file`]: crate::HostMapping::file
    #[doc(alias = "MAP_SHARED")]
    #[doc(alias = "vhost-user")]
    Memfd,
    /// A new memfd of huge pages from the host's pool (Linux, "HugeTLB Pages").
    ///
    /// The memfd is sealed like [`Memfd`](Self::Memfd). It has no execute permission, but hugetlbfs
    /// lets a process of the same user set that (fchmod(2)).
    ///
    /// Seals do not prevent another process from punching a hole, which returns the page to the
    /// pool. An access to the hole raises SIGBUS while the pool is empty (see
    /// [`vm_memory::fault`]).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{huge_page_pools, Backing, MemoryBuilder, Region};
    ///
    /// let pools = huge_page_pools();
    /// let pool = pools.first().ok_or("this host has no huge pages")?;
    /// let region = Region::new(GuestAddress(0), 64 * pool.page_size);
    /// let region = region.backing(Backing::Hugetlb { page_size: pool.page_size });
    /// // An error says how many pages are missing, and where to add them.
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "hugetlbfs")]
    #[doc(alias = "MAP_HUGETLB")]
    #[doc(alias = "MFD_HUGETLB")]
    Hugetlb {
        /// The size of a huge page in bytes, such as 2 MiB or 1 GiB.
        page_size: u64,
    },
    /// A file, memfd or device that the caller opened or received.
    ///
    /// [`shared_file`](Self::shared_file) and [`private_file`](Self::private_file) create it.
    /// Regions that share one `Arc` are described with one descriptor.
    File {
        /// The file, open for reading. A shared file must also be open for writing, unless the
        /// region is [read-only](crate::Region::read_only).
        file: Arc<File>,
        /// The offset in bytes at which the region begins in the file.
        offset: u64,
        /// Whether writes reach the file.
        sharing: Sharing,
    },
}

impl Backing {
    /// Creates a shared backing: writes reach the file and every process that maps it.
    ///
    /// The region begins at byte `offset` of `file`, which must be open for reading. It must also
    /// be open for writing, unless the region is [read-only](crate::Region::read_only).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::os::unix::fs::FileExt;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, MemoryBuilder, Region};
    ///
    /// let file = tempfile::tempfile()?;
    /// file.set_len(1 << 20)?;
    /// let backing = Backing::shared_file(file.try_clone()?, 0);
    /// let region = Region::new(GuestAddress(0), 1 << 20).backing(backing);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// memory.write_slice(b"kept", GuestAddress(0x1000))?;
    ///
    /// let mut bytes = [0; 4];
    /// file.read_exact_at(&mut bytes, 0x1000)?;
    /// assert_eq!(&bytes, b"kept");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "MAP_SHARED")]
    pub fn shared_file(file: impl Into<OwnedFile>, offset: u64) -> Self {
        let (file, sharing) = (Arc::new(File::from(file.into())), Sharing::Shared);
        Self::File {
            file,
            offset,
            sharing,
        }
    }

    /// Creates a copy-on-write backing: writes stay private to this process.
    ///
    /// The region begins at byte `offset` of `file`, which must be open for reading. A typical use
    /// is to start several guests from one snapshot.
    ///
    /// Each written page is in memory twice: the private copy, and the page of the file. The copies
    /// are ordinary memory of this process, and [`discard`](crate::discard()) frees them. It does
    /// not free pages of the file, which other guests may use. The kernel reclaims the page cache
    /// of a disk when it needs memory. Pages of a memfd or a tmpfs stay in memory or in swap, so a
    /// guest of 256 MiB can use 512 MiB there. Prefer a file on a disk, or
    /// [`shared_file`](Self::shared_file). [`residency`](crate::residency()) reports both parts as
    /// `private` and `file`.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::fs::File;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, MemoryBuilder, Region};
    ///
    /// let snapshot = tempfile::NamedTempFile::new()?;
    /// std::fs::write(snapshot.path(), [7; 0x2000])?;
    /// let guest = || -> Result<GuestMemoryMmap, Box<dyn std::error::Error>> {
    ///     let backing = Backing::private_file(File::open(snapshot.path())?, 0);
    ///     let region = Region::new(GuestAddress(0), 0x2000).backing(backing);
    ///     Ok(MemoryBuilder::new().region(region).build()?)
    /// };
    /// let (one, other) = (guest()?, guest()?);
    /// one.write_obj(8u8, GuestAddress(0))?;
    /// assert_eq!(one.read_obj::<u8>(GuestAddress(0))?, 8);
    /// assert_eq!(other.read_obj::<u8>(GuestAddress(0))?, 7);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "MAP_PRIVATE")]
    #[doc(alias = "snapshot")]
    #[doc(alias = "copy-on-write")]
    pub fn private_file(file: impl Into<OwnedFile>, offset: u64) -> Self {
        let (file, sharing) = (Arc::new(File::from(file.into())), Sharing::Private);
        Self::File {
            file,
            offset,
            sharing,
        }
    }
}

/// The kind of memory that backs a built or described region.
///
/// For a [`Backing::File`], the file system decides: the file can be a memfd or have huge pages.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
/// use vm_memory_host::{provisioned, Backing, BackingKind, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// let region = memory.iter().next().ok_or("no region")?;
/// assert_eq!(provisioned(region)?.kind(), BackingKind::Memfd);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum BackingKind {
    /// Private pages of this process.
    Anonymous,
    /// A memfd of ordinary pages, or another file of tmpfs.
    Memfd,
    /// A memfd of huge pages, or another file of hugetlbfs.
    Hugetlb,
    /// A file on a disk, or a device.
    File,
}

impl fmt::Display for BackingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb",
            Self::File => "file",
        })
    }
}

/// The visibility of writes to a mapped file.
///
/// # Examples
///
/// ```
/// use vm_memory_host::{Backing, Sharing};
///
/// let backing = Backing::private_file(tempfile::tempfile()?, 0);
/// assert!(matches!(backing, Backing::File { sharing: Sharing::Private, .. }));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Sharing {
    /// Writes reach the file and every process that maps it (`MAP_SHARED`).
    Shared,
    /// A page is copied for this process when it is written (`MAP_PRIVATE`).
    Private,
}
