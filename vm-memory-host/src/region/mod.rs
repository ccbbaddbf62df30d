//! [`Region`]: the request for one region of guest memory.

mod backing;
mod options;

pub use backing::{Backing, BackingKind, Sharing};
pub use options::{Lock, NumaPolicy, Options, TransparentHugePages};

use std::fmt;
use std::num::NonZeroU64;
use std::ops::Range;

use vm_memory::GuestAddress;

/// The blocks of a region that a guest plugs and unplugs.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory_host::{Blocks, Unplugged};
///
/// let blocks = Blocks::new(NonZeroU64::new(2 << 20).unwrap(), Unplugged::default());
/// assert_eq!(blocks.unplugged, Unplugged::Mapped);
/// ```
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Blocks {
    /// The size of a block in bytes, a power of two.
    pub size: NonZeroU64,
    /// The treatment of unplugged blocks.
    pub unplugged: Unplugged,
}

impl Blocks {
    /// Creates blocks of `size` bytes, a power of two.
    pub fn new(size: NonZeroU64, unplugged: Unplugged) -> Self {
        Self { size, unplugged }
    }
}

/// The treatment of unplugged blocks, as the guest's CPUs see them.
///
/// Accesses of this process through vm-memory never reach an unplugged block.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{Region, Unplugged};
///
/// // A guest that touches an unplugged block stops with an error.
/// let block = NonZeroU64::new(128 << 20).unwrap();
/// let region = Region::new(GuestAddress(1 << 32), 8 << 30).blocks(block, Unplugged::Protected);
/// ```
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Unplugged {
    /// Unplugged blocks stay mapped.
    ///
    /// A vCPU that touches one gets pages of zeroes, which use memory until the block is next
    /// plugged or unplugged.
    #[default]
    Mapped,
    /// Unplugged blocks are inaccessible (`PROT_NONE`).
    ///
    /// For a vCPU that touches one, `KVM_RUN` fails with `EFAULT`, or KVM emulates the
    /// instruction. It then returns `KVM_EXIT_MMIO` with an address of the block, or
    /// `KVM_EXIT_INTERNAL_ERROR` if it cannot emulate the instruction. Which of these happens
    /// depends on the instruction, the processor and the kernel: handle all of them. An MMIO exit
    /// at an address of RAM is an error of the guest, not an access to a device.
    ///
    /// Each boundary between plugged and unplugged blocks costs a VMA. The number of protected
    /// blocks of a process is therefore limited to half of `vm.max_map_count` (65530 by default).
    ///
    /// An access of this process that is in progress when its block is unplugged raises SIGSEGV.
    /// The build therefore requires [`vm_memory::fault::install`], after which the access returns
    /// an error. Accesses through references and pointers are [not
    /// covered](vm_memory::fault#limits): stop them before the block is unplugged.
    #[doc(alias = "PROT_NONE")]
    Protected,
}

/// A request for one region of guest memory.
///
/// # Examples
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
#[must_use = "a region has no memory before it is built"]
pub struct Region {
    pub(crate) start: GuestAddress,
    pub(crate) size: u64,
    pub(crate) backing: Backing,
    pub(crate) options: Options,
    pub(crate) blocks: Option<Blocks>,
    /// Initially plugged ranges, as offset and length.
    pub(crate) plugged: Vec<(u64, u64)>,
    /// The kind and page size of the file, if the region comes from a description.
    #[cfg_attr(windows, expect(dead_code, reason = "Windows has no descriptions"))]
    pub(crate) described: Option<(BackingKind, u64)>,
}

impl Region {
    /// Creates a request for `size` bytes of anonymous memory at guest address `start`.
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

    /// Sets the memory or file to map.
    #[doc(alias = "memfd")]
    #[doc(alias = "hugetlbfs")]
    pub fn backing(self, backing: Backing) -> Self {
        Self { backing, ..self }
    }

    /// Sets the use of transparent huge pages.
    #[doc(alias = "THP")]
    pub fn transparent_huge_pages(mut self, policy: TransparentHugePages) -> Self {
        self.options.transparent_huge_pages = policy;
        self
    }

    /// Sets the NUMA nodes that pages come from.
    #[doc(alias = "mbind")]
    pub fn numa(mut self, policy: NumaPolicy) -> Self {
        self.options.numa = policy;
        self
    }

    /// Sets the locking of pages in memory.
    #[doc(alias = "mlock")]
    pub fn lock(mut self, lock: Lock) -> Self {
        self.options.lock = lock;
        self
    }

    /// Sets whether core dumps may include the region. The default is `true`.
    ///
    /// If `true`, the process's coredump_filter decides (core(5)).
    #[doc(alias = "MADV_DONTDUMP")]
    pub fn core_dump(mut self, core_dump: bool) -> Self {
        self.options.core_dump = core_dump;
        self
    }

    /// Sets whether the kernel may merge pages with equal contents (KSM). The default is `false`.
    ///
    /// Only private pages can be merged.
    #[doc(alias = "KSM")]
    #[doc(alias = "MADV_MERGEABLE")]
    pub fn mergeable(mut self, mergeable: bool) -> Self {
        self.options.mergeable = mergeable;
        self
    }

    /// Sets whether children of fork(2) inherit the region. The default is `true`.
    ///
    /// A child that does not inherit it must not use any map with the region: the child's own
    /// memory may be at these addresses. In every child, [`discard`](crate::discard()),
    /// [`plug`](crate::plug()), [`unplug`](crate::unplug()), [`prefault`](crate::prefault()) and
    /// [`residency`](crate::residency()) return an error, and dropping a map unmaps nothing.
    #[doc(alias = "MADV_DONTFORK")]
    pub fn forked(mut self, forked: bool) -> Self {
        self.options.forked = forked;
        self
    }

    /// Sets the name of the region in /proc/self/maps.
    ///
    /// Names of anonymous memory need Linux 5.17 with `CONFIG_ANON_VMA_NAME`. Without it, the
    /// memory has no name, unless the region [requires](Self::require_name) it. A new memfd is
    /// created with the name, and one that was passed keeps its own. A file on a disk is shown by
    /// its path and cannot have a name.
    #[doc(alias = "PR_SET_VMA_ANON_NAME")]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.name = Some(name.into());
        self
    }

    /// Sets whether the build fails if the kernel does not support the [name](Self::name) of
    /// anonymous memory. The default is `false`.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{MemoryBuilder, Region};
    ///
    /// let region = Region::new(GuestAddress(0), 1 << 20).name("guest-ram");
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region.clone()).build()?;
    ///
    /// let region = region.require_name(true);
    /// match MemoryBuilder::new().region(region).build::<()>() {
    ///     Ok(memory) => println!("{memory:?}"),
    ///     // "region 0x0-0xfffff: cannot set its name; …"
    ///     Err(error) => println!("{error}"),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn require_name(mut self, require: bool) -> Self {
        self.options.require_name = require;
        self
    }

    /// Sets whether the region can only be read: a ROM, or a write-protected flash. The default is
    /// `false`.
    ///
    /// The backing must be a file that has the bytes, and that need not be open for writing.
    /// Accesses of this process that write return an error, and so does
    /// [`discard`](crate::discard()). For the guest, register the region's KVM slot with
    /// `KVM_MEM_READONLY`: a write of a vCPU is then an MMIO exit. Without this flag, the write
    /// ends like an access to a [protected block](Unplugged::Protected).
    ///
    /// A flash that the guest can write receives such exits. Its device writes to the shared file,
    /// and the region has the new bytes at once. The device marks the region's bitmap itself.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::fs::File;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, MemoryBuilder, Region};
    ///
    /// let firmware = tempfile::NamedTempFile::new()?;
    /// std::fs::write(firmware.path(), [0x90; 0x1000])?;
    ///
    /// let backing = Backing::shared_file(File::open(firmware.path())?, 0);
    /// let rom = Region::new(GuestAddress(0xffff_f000), 0x1000).backing(backing).read_only(true);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(rom).build()?;
    /// assert_eq!(memory.read_obj::<u8>(GuestAddress(0xffff_fff0))?, 0x90);
    /// assert!(memory.write_obj(0u8, GuestAddress(0xffff_fff0)).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "ROM")]
    #[doc(alias = "pflash")]
    #[doc(alias = "KVM_MEM_READONLY")]
    #[doc(alias = "PROT_READ")]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.options.read_only = read_only;
        self
    }

    /// Sets whether a file may have holes. The default is `false`.
    ///
    /// An access to a hole raises SIGBUS while its file system has no free space. The build
    /// therefore allocates space for the whole region (fallocate(2)). This applies to shared files
    /// on a disk and to all files on a tmpfs with a size limit.
    ///
    /// A private file on such a tmpfs can be open for reading only. It then cannot be allocated,
    /// and must have no holes. The build compares only its space (`st_blocks` of stat(3type)) with
    /// its length. Space that was allocated past its end (`FALLOC_FL_KEEP_SIZE`) counts, so a file
    /// with such space can pass although it has holes. Do not pass such a file, or open it for
    /// writing.
    ///
    /// The build also copies blocks of the file that another file shares (XFS). It cannot prepare
    /// for blocks that are shared later (`cp --reflink`). Nor can it for Btrfs, which writes each
    /// block to a new place unless the file has the attribute `C` (chattr(1)). On these, an access
    /// may raise SIGBUS while there is no free space.
    ///
    /// [Discarded](crate::discard()) pages of a sparse region become holes. Other regions keep
    /// their space.
    #[doc(alias = "fallocate")]
    pub fn sparse(mut self, sparse: bool) -> Self {
        self.options.sparse = sparse;
        self
    }

    /// Sets whether the file must be sealed against shrinking (fcntl(2), `F_SEAL_SHRINK`).
    ///
    /// The sender of a sealed file cannot truncate it while the guest runs. Memfds that the builder
    /// creates are always sealed.
    #[doc(alias = "F_SEAL_SHRINK")]
    pub fn sealed(mut self, sealed: bool) -> Self {
        self.options.sealed = sealed;
        self
    }

    /// Sets whether [discarded](crate::discard()) huge pages return to the pool.
    ///
    /// The default is `false`: they stay with the region and read as zeroes.
    ///
    /// If `true`, an access to a discarded page raises SIGBUS while the pool is empty, in the guest
    /// and in this process. With [`vm_memory::fault`] installed, the access of this process returns
    /// an error; otherwise the process ends. Pages of unplugged blocks always return to the pool.
    pub fn release_huge_pages(mut self, release: bool) -> Self {
        self.options.release_huge_pages = release;
        self
    }

    /// Sets whether the kernel sets memory aside for all pages. The default is `false`.
    ///
    /// If `true`, the region counts as committed memory from the start (`Committed_AS` of
    /// proc_meminfo(5)). The build fails if `vm.overcommit_memory` is
    ///
    /// - 2, and the commit limit has no room for the region. Otherwise, pages are always available
    ///   to the guest.
    /// - 0, and the region is larger than memory and swap.
    ///
    /// Only anonymous memory without blocks can be reserved. Huge pages of a pool are always
    /// reserved.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{MemoryBuilder, Region};
    ///
    /// let region = Region::new(GuestAddress(0), 64 << 20).reserve(true);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// # Ok::<(), vm_memory_host::BuildError>(())
    /// ```
    #[doc(alias = "MAP_NORESERVE")]
    #[doc(alias = "overcommit")]
    pub fn reserve(mut self, reserve: bool) -> Self {
        self.options.reserve = reserve;
        self
    }

    /// Replaces all options.
    pub fn with_options(self, options: Options) -> Self {
        Self { options, ..self }
    }

    /// Divides the region into blocks of `size` bytes, all initially unplugged.
    ///
    /// The guest plugs and unplugs blocks while it runs ([`plug`](crate::plug()),
    /// [`unplug`](crate::unplug())). The backing must be anonymous memory, a shared memfd or shared
    /// huge pages, because the pages of an unplugged block are freed.
    ///
    /// An access of a device can be in progress when the guest unplugs its block. It raises a
    /// signal if unplugged blocks are [protected](Unplugged::Protected). It also does so if no page
    /// is left in the pool of huge pages or on a tmpfs with a size limit. For these regions, the
    /// build returns an error unless [`vm_memory::fault::install`] was called before.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroU64;
    /// use vm_memory::GuestAddress;
    /// use vm_memory_host::{Region, Unplugged};
    ///
    /// let block = NonZeroU64::new(2 << 20).unwrap();
    /// let region = Region::new(GuestAddress(1 << 32), 1 << 30).blocks(block, Unplugged::Mapped);
    /// ```
    #[doc(alias = "virtio-mem")]
    #[doc(alias = "hotplug")]
    pub fn blocks(mut self, size: NonZeroU64, unplugged: Unplugged) -> Self {
        self.blocks = Some(Blocks::new(size, unplugged));
        self
    }

    /// Returns the options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn span(&self) -> Span {
        Span {
            start: self.start.0,
            size: self.size,
        }
    }
}

/// A range of guest physical addresses.
///
/// `Display` prints the first and last address in hexadecimal. Spans are ordered by address.
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::Span;
///
/// let span = Span { start: 0x1000, size: 4 << 20 };
/// assert_eq!(span.to_string(), "0x1000-0x400fff");
/// assert_eq!(span, Span::from(0x1000..0x40_1000));
/// assert!(span.contains(GuestAddress(0x40_0fff)));
/// assert_eq!(span.end(), Some(GuestAddress(0x40_1000)));
/// ```
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Span {
    /// The guest physical address of the first byte.
    pub start: u64,
    /// The number of bytes.
    pub size: u64,
}

impl Span {
    /// Returns the guest physical address of the first byte.
    pub fn addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    /// Returns the first guest physical address past the end, or `None` if that is 2^64 or more.
    pub fn end(&self) -> Option<GuestAddress> {
        self.start.checked_add(self.size).map(GuestAddress)
    }

    /// Returns whether the byte at `addr` is in the span.
    pub fn contains(&self, addr: GuestAddress) -> bool {
        let offset = addr.0.checked_sub(self.start);
        offset.is_some_and(|offset| offset < self.size)
    }

    /// Returns whether all of the `len` bytes at `addr` are in the span.
    ///
    /// A device checks the range of a guest's request in this way. An empty range is in the span if
    /// its address is, or is the first one past the end.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::GuestAddress;
    /// use vm_memory_host::Span;
    ///
    /// let device = Span { start: 1 << 32, size: 64 << 20 };
    /// let last_block = GuestAddress((1 << 32) + (62 << 20));
    /// assert!(device.contains_range(last_block, 2 << 20));
    /// assert!(!device.contains_range(last_block, 4 << 20));
    /// assert!(!device.contains_range(last_block, u64::MAX));
    /// ```
    pub fn contains_range(&self, addr: GuestAddress, len: u64) -> bool {
        let offset = addr.0.checked_sub(self.start);
        let end = offset.and_then(|offset| offset.checked_add(len));
        end.is_some_and(|end| end <= self.size)
    }
}

/// Creates an empty span if the end is before the start.
impl From<Range<u64>> for Span {
    fn from(range: Range<u64>) -> Self {
        Self {
            start: range.start,
            size: range.end.saturating_sub(range.start),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.start.saturating_add(self.size.saturating_sub(1));
        write!(f, "{:#x}-{last:#x}", self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn span_contains_range_only_if_all_bytes_are_inside() {
        let span = Span::from(0x1000..0x3000);
        for (addr, len, is_inside) in [
            (0x1000, 0x2000, true),
            (0x2fff, 1, true),
            (0x3000, 0, true),
            (0x3001, 0, false),
            (0xfff, 1, false),
            (0xfff, 0, false),
            (0x1000, 0x2001, false),
            (0x2fff, 2, false),
            (0x2000, u64::MAX, false),
            (u64::MAX, u64::MAX, false),
        ] {
            let contains = span.contains_range(GuestAddress(addr), len);
            assert_eq!(contains, is_inside, "{len:#x} bytes at {addr:#x}");
        }
        let last = Span {
            start: u64::MAX,
            size: 1,
        };
        assert!(last.contains_range(GuestAddress(u64::MAX), 1));
        assert!(!last.contains_range(GuestAddress(u64::MAX), 2));
    }
}
