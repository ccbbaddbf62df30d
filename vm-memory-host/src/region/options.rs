//! [`Options`]: the attributes of a region's memory.

/// The use of transparent huge pages in a region (Linux, "Transparent Hugepage Support").
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{Region, TransparentHugePages};
///
/// let region = Region::new(GuestAddress(0), 64 << 20)
///     .transparent_huge_pages(TransparentHugePages::On);
/// assert_eq!(region.options().transparent_huge_pages, TransparentHugePages::On);
/// ```
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[doc(alias = "THP")]
#[non_exhaustive]
pub enum TransparentHugePages {
    /// The host's setting applies.
    #[default]
    Leave,
    /// The kernel uses them where it can (`MADV_HUGEPAGE`).
    ///
    /// The build fails if the host's setting disables them. In a jail without /sys, the build
    /// cannot read the setting, and succeeds.
    #[doc(alias = "MADV_HUGEPAGE")]
    On,
    /// The kernel does not use them (`MADV_NOHUGEPAGE`).
    #[doc(alias = "MADV_NOHUGEPAGE")]
    Off,
}

/// The NUMA nodes that a region takes its pages from (mbind(2)).
///
/// Nodes are numbered as in /sys/devices/system/node. Existing pages of a file are not migrated.
///
/// # Examples
///
/// A guest with two NUMA nodes, each on a node of the host:
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{MemoryBuilder, NumaPolicy, Region};
///
/// let node = |start, node| {
///     Region::new(GuestAddress(start), 64 << 20).numa(NumaPolicy::Bind(vec![node]))
/// };
/// let builder = MemoryBuilder::new().region(node(0, 0)).region(node(1 << 32, 1));
/// match builder.build::<()>() {
///     Ok(memory) => println!("{memory:?}"),
///     // "region 0x100000000-0x103ffffff: NUMA node 1 has no memory on this host; …"
///     Err(error) => println!("{error}"),
/// }
/// ```
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[doc(alias = "NUMA")]
#[doc(alias = "mbind")]
#[non_exhaustive]
pub enum NumaPolicy {
    /// The policy of the process applies.
    #[default]
    Inherit,
    /// Pages come from these nodes only (`MPOL_BIND`).
    #[doc(alias = "MPOL_BIND")]
    Bind(Vec<u32>),
    /// Pages come from this node as long as it has free pages (`MPOL_PREFERRED`).
    #[doc(alias = "MPOL_PREFERRED")]
    Preferred(u32),
    /// Pages come from these nodes in turn (`MPOL_INTERLEAVE`).
    #[doc(alias = "MPOL_INTERLEAVE")]
    Interleave(Vec<u32>),
}

impl NumaPolicy {
    /// Returns the nodes that it names.
    pub(crate) fn nodes(&self) -> &[u32] {
        match self {
            Self::Inherit => &[],
            Self::Bind(nodes) | Self::Interleave(nodes) => nodes,
            Self::Preferred(node) => std::slice::from_ref(node),
        }
    }
}

/// The locking of a region's pages in memory (mlock2(2)).
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{Lock, Region};
///
/// let region = Region::new(GuestAddress(0), 16 << 20).lock(Lock::OnFault);
/// assert_eq!(region.options().lock, Lock::OnFault);
/// ```
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[doc(alias = "mlock")]
#[doc(alias = "mlock2")]
#[non_exhaustive]
pub enum Lock {
    /// The kernel may swap pages out.
    #[default]
    No,
    /// All pages are populated and locked during the build.
    Now,
    /// A page is locked from its first use (`MLOCK_ONFAULT`).
    ///
    /// It has no effect on huge pages of a pool, which the kernel never swaps out.
    #[doc(alias = "MLOCK_ONFAULT")]
    OnFault,
}

/// The attributes of a region's memory.
///
/// [`Region`](crate::Region) has a method for each field, which explains it in full.
///
/// # Examples
///
/// Use the same attributes for several regions:
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{Lock, Options, Region};
///
/// let mut options = Options::default();
/// (options.lock, options.core_dump) = (Lock::OnFault, false);
/// let low = Region::new(GuestAddress(0), 16 << 20).with_options(options.clone());
/// let high = Region::new(GuestAddress(1 << 32), 16 << 20).with_options(options);
/// ```
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Options {
    /// The use of transparent huge pages.
    pub transparent_huge_pages: TransparentHugePages,
    /// The NUMA nodes that pages come from.
    pub numa: NumaPolicy,
    /// The locking of pages in memory.
    pub lock: Lock,
    /// Whether core dumps of this process may include the region.
    pub core_dump: bool,
    /// Whether the kernel may merge pages with equal contents.
    pub mergeable: bool,
    /// Whether children of fork(2) inherit the region.
    pub forked: bool,
    /// The name of the region in /proc/self/maps.
    pub name: Option<String>,
    /// Whether the build fails if the kernel does not support the name.
    pub require_name: bool,
    /// Whether the region can only be read.
    pub read_only: bool,
    /// Whether a file may have holes for which its file system may lack space later.
    pub sparse: bool,
    /// Whether the file must be sealed against shrinking.
    pub sealed: bool,
    /// Whether discarded huge pages return to the pool.
    pub release_huge_pages: bool,
    /// Whether the kernel sets memory aside for all pages during the build.
    pub reserve: bool,
}

impl Default for Options {
    /// Returns the options of ordinary memory: no policy, lock or name; dumped and inherited.
    fn default() -> Self {
        Self {
            transparent_huge_pages: TransparentHugePages::default(),
            numa: NumaPolicy::default(),
            lock: Lock::default(),
            core_dump: true,
            mergeable: false,
            forked: true,
            name: None,
            require_name: false,
            read_only: false,
            sparse: false,
            sealed: false,
            release_huge_pages: false,
            reserve: false,
        }
    }
}
