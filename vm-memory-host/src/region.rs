//! [`Region`]: what a piece of guest memory is to be.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

/// What a region's bytes are kept in.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Backing {
    /// Private pages of zeroes, which no other process can map.
    Anonymous,
    /// A memfd (memfd_create(2)) of its own: shared memory that a descriptor can be handed to other processes for (vhost-user). Once it has its length, it is sealed
    /// against shrinking, growing and other seals, so that no process it is handed to can make pages go away by cutting it off. (One that can
    /// write to it can still punch holes, which read as zeroes.)
    Memfd,
    /// The same of huge pages of so many bytes, out of the machine's pool (Linux, "HugeTLB Pages"). A hole that another process punches in it gives a
    /// page to the pool, and no seal prevents that: whoever uses it when the pool is empty meets SIGBUS ([`vm_memory::fault`]).
    ///
    /// ```no_run
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{huge_page_pools, Backing, MemoryBuilder, Region};
    ///
    /// let pools = huge_page_pools();
    /// let pool = pools.first().ok_or("no huge pages on this machine")?;
    /// let region = Region::new(GuestAddress(0), 64 * pool.page_size);
    /// let region = region.backing(Backing::Hugetlb { page_size: pool.page_size });
    /// // An error says how many pages are missing, and where to add them.
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    Hugetlb {
        /// The size of a huge page in bytes: 2 MiB, 1 GiB, or what else the machine has.
        page_size: u64,
    },
    /// A file, or any descriptor that can be mapped: one that was handed over, a memfd of another process's, a file of hugetlbfs.
    File {
        /// The file, open for reading; for writing, too, if it is shared.
        file: Arc<File>,
        /// Where in the file the region begins, in bytes.
        offset: u64,
        /// Whether writes go to the file.
        sharing: Sharing,
    },
}

impl Backing {
    /// A file, from `offset` on (bytes), of which writes go to the file and to all who map it. It must be open for reading and writing.
    ///
    /// ```
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, MemoryBuilder, Region};
    ///
    /// let file = tempfile::tempfile()?;
    /// file.set_len(1 << 20)?;
    /// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::shared_file(file.try_clone()?, 0));
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// memory.write_slice(b"kept", GuestAddress(0x1000))?;
    ///
    /// let mut bytes = [0; 4];
    /// std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x1000)?;
    /// assert_eq!(&bytes, b"kept");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn shared_file(file: impl Into<OwnedFd>, offset: u64) -> Self {
        let (file, sharing) = (Arc::new(File::from(file.into())), Sharing::Shared);
        Self::File {
            file,
            offset,
            sharing,
        }
    }

    /// A file, from `offset` on (bytes), of which what is written is copied first and seen by nobody else: a snapshot that guests start from.
    ///
    /// ```
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, MemoryBuilder, Region};
    ///
    /// let snapshot = tempfile::NamedTempFile::new()?;
    /// std::fs::write(snapshot.path(), [7; 0x2000])?;
    /// let guest = || -> Result<GuestMemoryMmap, Box<dyn std::error::Error>> {
    ///     // Open for reading is enough.
    ///     let file = std::fs::File::open(snapshot.path())?;
    ///     let region = Region::new(GuestAddress(0), 0x2000).backing(Backing::private_file(file, 0));
    ///     Ok(MemoryBuilder::new().region(region).build()?)
    /// };
    /// let (one, other) = (guest()?, guest()?);
    /// one.write_obj(8u8, GuestAddress(0))?;
    /// assert_eq!(one.read_obj::<u8>(GuestAddress(0))?, 8);
    /// assert_eq!(other.read_obj::<u8>(GuestAddress(0))?, 7);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn private_file(file: impl Into<OwnedFd>, offset: u64) -> Self {
        let (file, sharing) = (Arc::new(File::from(file.into())), Sharing::Private);
        Self::File {
            file,
            offset,
            sharing,
        }
    }
}

/// What a region's bytes are kept in, as it was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum BackingKind {
    /// Private pages of this process.
    Anonymous,
    /// A memfd, or another file of tmpfs.
    Memfd,
    /// A file of hugetlbfs, or a memfd of huge pages.
    Hugetlb,
    /// A file on a disk, or a device.
    File,
}

impl std::fmt::Display for BackingKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb",
            Self::File => "file",
        })
    }
}

/// Who sees what is written to the mapping of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sharing {
    /// The file, and everybody who maps it (`MAP_SHARED`).
    Shared,
    /// Nobody else: pages are copied when they are written (`MAP_PRIVATE`).
    Private,
}

/// Whether the kernel may put transparent huge pages below a region (Linux, "Transparent Hugepage Support").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransparentHugePages {
    /// As the machine is set.
    #[default]
    Leave,
    /// Where it can (`MADV_HUGEPAGE`).
    On,
    /// Never (`MADV_NOHUGEPAGE`).
    Off,
}

/// On which NUMA nodes a region takes its pages (mbind(2)). Nodes are numbered as under /sys/devices/system/node. Pages that a file has already stay where
/// they are.
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{MemoryBuilder, NumaPolicy, Region};
///
/// let region = |start, node| Region::new(GuestAddress(start), 64 << 20).numa(NumaPolicy::Bind(vec![node]));
/// let builder = MemoryBuilder::new().region(region(0, 0)).region(region(1 << 32, 1));
/// match builder.build::<()>() {
///     Ok(memory) => println!("a node of the guest on each of two of the machine: {memory:?}"),
///     // region 100000000-103ffffff: the machine has no memory on NUMA node 1, but on [0]
///     Err(error) => println!("{error}"),
/// }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NumaPolicy {
    /// As the process does.
    #[default]
    Inherit,
    /// On these nodes and on no others.
    Bind(Vec<u32>),
    /// On this node while it has some.
    Preferred(u32),
    /// On these nodes in turn.
    Interleave(Vec<u32>),
}

/// Whether a region's pages stay in memory (mlock2(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lock {
    /// The system may swap them out.
    #[default]
    No,
    /// They are brought in now, and stay.
    Now,
    /// Each stays from when it is first used.
    OnFault,
}

/// What else is to be true of a region's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Transparent huge pages.
    pub transparent_huge_pages: TransparentHugePages,
    /// NUMA nodes.
    pub numa: NumaPolicy,
    /// Locked in memory.
    pub lock: Lock,
    /// Whether its bytes are part of a core dump of this process.
    pub core_dump: bool,
    /// Whether pages that are the same may be merged (Linux, "Kernel Samepage Merging").
    pub mergeable: bool,
    /// Whether a child of fork(2) has it, too.
    pub forked: bool,
    /// What it is called in /proc/self/maps.
    pub name: Option<String>,
    /// Whether a shared file may have holes, for which there may be no room on its disk when they are written.
    pub sparse: bool,
    /// Whether its file must be sealed against shrinking.
    pub sealed: bool,
    /// Whether huge pages that are given back can be had by others.
    pub release_huge_pages: bool,
}

impl Default for Options {
    /// Nothing special: dumped, not merged, forked, no name, no holes.
    fn default() -> Self {
        Self {
            transparent_huge_pages: TransparentHugePages::default(),
            numa: NumaPolicy::default(),
            lock: Lock::default(),
            core_dump: true,
            mergeable: false,
            forked: true,
            name: None,
            sparse: false,
            sealed: false,
            release_huge_pages: false,
        }
    }
}

/// The blocks of a region that a guest plugs and unplugs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// Their size in bytes, a power of two.
    pub size: NonZeroU64,
    /// What becomes of those that are not plugged.
    pub unplugged: Unplugged,
}

/// What holds a guest's CPUs from blocks that are not plugged. Accesses of this process are held back in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unplugged {
    /// Nothing: a vCPU that touches one gets pages of zeroes there, which cost memory until the block is plugged or unplugged again.
    #[default]
    Mapped,
    /// It has no protection (`PROT_NONE`): `KVM_RUN` answers a vCPU that touches it with `EFAULT`. That costs the kernel an entry in its table of areas for each
    /// change from blocks that are there to ones that are not, so that no more blocks of the kind can be had in a process than half of that table has
    /// (`vm.max_map_count`, 65 530 as a rule). An access of this process that is under way when a
    /// block is unplugged meets SIGSEGV then, which is an error where [`vm_memory::fault`] is installed, and the end of the process elsewhere.
    Protected,
}

/// A piece of guest memory, as it is to be.
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{Backing, Lock, Region};
///
/// let region = Region::new(GuestAddress(0), 64 << 20)
///     .backing(Backing::Memfd)
///     .lock(Lock::OnFault)
///     .core_dump(false)
///     .name("guest-ram");
/// assert_eq!(region.options().name.as_deref(), Some("guest-ram"));
/// ```
#[derive(Clone, Debug)]
pub struct Region {
    pub(crate) start: GuestAddress,
    pub(crate) size: u64,
    pub(crate) backing: Backing,
    pub(crate) options: Options,
    pub(crate) blocks: Option<Blocks>,
    /// Ranges (offset, length) of blocks that are plugged from the start.
    pub(crate) plugged: Vec<(u64, u64)>,
    /// What a description says of its file: its kind, and the size of its pages.
    pub(crate) described: Option<(BackingKind, u64)>,
}

impl Region {
    /// A region of `size` bytes at a guest physical address, of anonymous memory.
    pub fn new(start: GuestAddress, size: u64) -> Self {
        Self {
            start,
            size,
            backing: Backing::Anonymous,
            options: Options::default(),
            blocks: None,
            plugged: Vec::new(),
            described: None,
        }
    }

    /// Sets what its bytes are kept in.
    pub fn backing(self, backing: Backing) -> Self {
        Self { backing, ..self }
    }

    /// Sets whether it may have transparent huge pages.
    pub fn transparent_huge_pages(mut self, policy: TransparentHugePages) -> Self {
        self.options.transparent_huge_pages = policy;
        self
    }

    /// Sets on which NUMA nodes it takes its pages.
    pub fn numa(mut self, policy: NumaPolicy) -> Self {
        self.options.numa = policy;
        self
    }

    /// Sets whether its pages stay in memory.
    pub fn lock(mut self, lock: Lock) -> Self {
        self.options.lock = lock;
        self
    }

    /// Sets whether it may be part of a core dump; the process's coredump_filter (core(5)) decides, unless told otherwise here.
    pub fn core_dump(mut self, core_dump: bool) -> Self {
        self.options.core_dump = core_dump;
        self
    }

    /// Sets whether pages that are the same may be merged; they are not unless told otherwise.
    pub fn mergeable(mut self, mergeable: bool) -> Self {
        self.options.mergeable = mergeable;
        self
    }

    /// Sets whether children of fork(2) have it; they do unless told otherwise. A child without it must not use any map that has the region: other
    /// things of its own may be at these addresses. (Giving back, plugging and prefaulting are refused there, unless the child has its parent's number, in a PID namespace of its own.)
    pub fn forked(mut self, forked: bool) -> Self {
        self.options.forked = forked;
        self
    }

    /// Sets what it is called in /proc/self/maps. A file is called by its path there, and cannot be given a name; a memfd that was handed over keeps
    /// the one that it was made with. Names of anonymous memory are an option of the kernel's (`CONFIG_ANON_VMA_NAME`, Linux 5.17): without it, they are an error.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.name = Some(name.into());
        self
    }

    /// Sets whether a file may have holes. Unless it may, a file that is shared takes blocks on its disk for all of the region when the region is built
    /// (fallocate(2)), and a file of a tmpfs that has an end takes pages, shared or not: a hole for which there is nothing when it is used is a SIGBUS. Pages
    /// that are [given back](crate::discard()) are holes again.
    pub fn sparse(mut self, sparse: bool) -> Self {
        self.options.sparse = sparse;
        self
    }

    /// Sets whether its file must be sealed against shrinking (fcntl(2), `F_SEAL_SHRINK`): whoever handed it over cannot make pages go away then.
    /// Memfds that are made here are, and are described so.
    pub fn sealed(mut self, sealed: bool) -> Self {
        self.options.sealed = sealed;
        self
    }

    /// Sets whether huge pages that a guest [gives back](crate::discard()) go to the pool for others. Unless they do, they stay with this
    /// region, as zeroes. If they do, a guest that uses them again when the pool is empty meets SIGBUS, as does this process: an error
    /// where [`vm_memory::fault`] is installed, and the end of the process elsewhere. The pages of blocks that are unplugged always go to the pool.
    pub fn release_huge_pages(mut self, release: bool) -> Self {
        self.options.release_huge_pages = release;
        self
    }

    /// Sets all options at once.
    pub fn with_options(self, options: Options) -> Self {
        Self { options, ..self }
    }

    /// Makes it a region of blocks of `size` bytes that come and go while the guest runs ([`plug`](crate::plug), [`unplug`](crate::unplug)). None is
    /// there in the beginning. It must be of anonymous memory, a memfd or shared huge pages: those can be made zeroes that cost nothing.
    pub fn blocks(mut self, size: NonZeroU64, unplugged: Unplugged) -> Self {
        self.blocks = Some(Blocks { size, unplugged });
        self
    }

    /// Returns its options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Where it is.
    pub(crate) fn span(&self) -> Span {
        Span {
            start: self.start.0,
            size: self.size,
        }
    }
}

/// A range of guest physical addresses, as messages tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The guest physical address of the first byte.
    pub start: u64,
    /// The number of bytes.
    pub size: u64,
}

/// As in /proc/iomem: first and last address, in hexadecimal.
impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let last = self.start.saturating_add(self.size.saturating_sub(1));
        write!(f, "{:08x}-{last:08x}", self.start)
    }
}
