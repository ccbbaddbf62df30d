//! [`Description`]: guest memory as data, from which another process builds the same memory.

mod apply_blocks;
mod compare;
mod descriptors;
mod display;
mod error;
mod file_layout;
#[cfg(feature = "serde")]
mod unchecked;

pub use descriptors::Descriptors;
pub use error::DescriptionError;
pub use file_layout::{FileLayout, FileLayoutError};

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::builder::MemoryBuilder;
use crate::builder::{check_layout, MAX_FILE_LENGTH};
use crate::error::{BuildError, NotProvisioned};
use crate::mapping::{provisioned, span_of, to_u64, HostMapped, HostMapping};
use crate::region::{Backing, BackingKind, Blocks, Options, Region, Sharing, Span};
use crate::sys;

/// The layout of guest memory as data.
///
/// Use it to save a guest snapshot, or to map the same memory in another process. A vhost-user
/// front end can make its memory table from it and from [`HostMapping::host_address`].
///
/// Descriptors are not data. Regions refer to them by their index in [`Descriptors`]. Send these
/// alongside the description (`SCM_RIGHTS`, unix(7)). A file that backs several regions is there
/// once.
///
/// Only the owner of the memory may [`plug`](crate::plug()) and [`unplug`](crate::unplug()) blocks:
/// both zero the blocks for all processes. Builds from a description leave them as they are.
///
/// `Display` prints one line for each region, as /proc/iomem does.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{describe, Backing, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// let (description, files) = describe(&memory)?;
///
/// // In the other process, which has received the description (feature `serde`) and the files:
/// let received = files
///     .iter()
///     .map(|file| file.try_clone().map(Into::into))
///     .collect::<Result<_, _>>()?;
/// let same: GuestMemoryMmap = description.builder(received)?.build()?;
/// memory.write_obj(0x77u8, GuestAddress(0x1234))?;
/// assert_eq!(same.read_obj::<u8>(GuestAddress(0x1234))?, 0x77);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "unchecked::Unchecked"))]
#[doc(alias = "vhost-user")]
#[doc(alias = "snapshot")]
#[doc(alias = "SCM_RIGHTS")]
#[non_exhaustive]
pub struct Description {
    /// The version of the format, which must be [`VERSION`](Self::VERSION).
    pub version: u32,
    /// The regions, ordered by address.
    pub regions: Vec<RegionDescription>,
}

/// One region of a [`Description`].
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{describe, Backing, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 4 << 20).backing(Backing::Memfd).name("ram");
/// let memory = MemoryBuilder::new().region(region).build::<()>()?;
/// let (description, _) = describe(&memory)?;
/// assert_eq!(
///     description.regions[0].to_string(),
///     "0x0-0x3fffff : memfd \"ram\", descriptor 0 at 0x0"
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct RegionDescription {
    /// The guest addresses of the region.
    pub span: Span,
    /// The backing.
    pub backing: BackingDescription,
    /// The options.
    pub options: Options,
    /// The blocks, or `None` if the region has none.
    pub blocks: Option<BlocksDescription>,
}

/// The backing of a described region: a [`Backing`] whose file is an index into the descriptors.
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{describe, Backing, BackingDescription, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
/// let memory = MemoryBuilder::new().region(region).build::<()>()?;
/// let (description, files) = describe(&memory)?;
/// match description.regions[0].backing {
///     BackingDescription::Descriptor { index, offset, .. } => {
///         let file = files.get(usize::try_from(index)?);
///         println!("descriptor {file:?} from offset {offset:#x}");
///     }
///     _ => println!("other processes cannot map this region"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub enum BackingDescription {
    /// Private pages, which are zero when they are built again.
    Anonymous,
    /// A file, memfd or device.
    Descriptor {
        /// The index of the descriptor in the list.
        index: u32,
        /// The offset in bytes at which the region begins in the file.
        offset: u64,
        /// Whether writes reach the file.
        sharing: Sharing,
        /// The page size in bytes.
        page_size: u64,
        /// The kind of file.
        kind: BackingKind,
    },
}

/// The blocks of a described region.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{describe, plug, MemoryBuilder, Region, Unplugged};
///
/// let block = NonZeroU64::new(2 << 20).unwrap();
/// let region = Region::new(GuestAddress(0), 8 << 20).blocks(block, Unplugged::Mapped);
/// let memory = MemoryBuilder::new().region(region).build::<()>()?;
/// plug(&memory, GuestAddress(2 << 20), 4 << 20)?;
/// let (description, _) = describe(&memory)?;
/// let blocks = description.regions[0].blocks.as_ref().ok_or("no blocks")?;
/// assert_eq!(blocks.plugged, [(2 << 20, 4 << 20)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct BlocksDescription {
    /// The size of the blocks and the treatment of unplugged ones.
    pub blocks: Blocks,
    /// The plugged ranges, as offset in the region and length, in bytes.
    pub plugged: Vec<(u64, u64)>,
}

/// Describes guest memory, and returns the files that its regions refer to.
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{describe, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory = MemoryBuilder::new().region(region).build::<()>()?;
/// let (description, files) = describe(&memory)?;
/// assert_eq!(description.to_string(), "0x0-0xfffff : anonymous\n");
/// assert!(files.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns [`NotProvisioned`] if a region was not built by this crate.
pub fn describe<M>(memory: &M) -> Result<(Description, Descriptors), NotProvisioned>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let (mut regions, mut files) = (Vec::new(), Files::default());
    for region in memory.iter() {
        let mapping = provisioned(region)?;
        let mut options = mapping.options().clone();
        // The receiver then detects an unsealed file that replaces a sealed one.
        let file = mapping.file();
        options.sealed |= file.is_some_and(|(file, _)| sys::cannot_shrink(file));
        regions.push(RegionDescription {
            span: span_of(region),
            backing: backing(mapping, &mut files),
            options,
            blocks: blocks(mapping),
        });
    }
    Ok((
        Description::new(regions),
        Descriptors::of_memory(files.list),
    ))
}

/// The files of regions, each of them once.
#[derive(Default)]
struct Files {
    list: Vec<Arc<File>>,
    /// The index of each file, by its address. The list keeps the files, so no two files have the
    /// same address.
    known: BTreeMap<*const File, u32>,
}

impl Files {
    /// Returns the index of a file, and adds it if it is new.
    ///
    /// A process has less than 2^32 descriptors.
    fn index(&mut self, file: &Arc<File>) -> u32 {
        let next = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        let index = *self.known.entry(Arc::as_ptr(file)).or_insert(next);
        if index == next {
            self.list.push(Arc::clone(file));
        }
        index
    }
}

/// Describes a backing, and adds its file to `files` unless they contain it.
fn backing(mapping: &HostMapping, files: &mut Files) -> BackingDescription {
    let Some((file, offset)) = &mapping.backing.file else {
        return BackingDescription::Anonymous;
    };
    let index = files.index(file);
    BackingDescription::Descriptor {
        index,
        offset: *offset,
        sharing: mapping.backing.sharing,
        page_size: mapping.page_size(),
        kind: mapping.kind(),
    }
}

fn blocks(mapping: &HostMapping) -> Option<BlocksDescription> {
    let (blocks, record) = mapping.blocks.as_ref()?;
    let plugged = record
        .runs()
        .map(|(offset, len)| (to_u64(offset), to_u64(len)));
    Some(BlocksDescription::new(*blocks, plugged.collect()))
}

impl Description {
    /// The version of the format that this crate reads and writes.
    pub const VERSION: u32 = 1;

    /// Creates a description of `regions`, such as from the layout in a snapshot of your own.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::GuestMemoryMmap;
    /// use vm_memory_host::{BackingDescription, Description, RegionDescription, Span};
    ///
    /// let span = Span { start: 0, size: 1 << 20 };
    /// let region = RegionDescription::new(span, BackingDescription::Anonymous);
    /// let memory: GuestMemoryMmap = Description::new(vec![region]).fresh()?.build()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(regions: Vec<RegionDescription>) -> Self {
        let version = Self::VERSION;
        Self { version, regions }
    }

    /// Creates a builder for the same memory from the received descriptors.
    ///
    /// Shared memory then has the same bytes, private memory has the bytes of its file, and
    /// anonymous memory has zeroes.
    ///
    /// A description may come from an untrusted process: the build checks everything in it. The
    /// receiver must decide five things itself:
    ///
    /// - Whether the sender may truncate a file later. Set `options.sealed` of each region to
    ///   accept [sealed](Region::sealed) files only, or see [`vm_memory::fault`]. The builder then
    ///   never waits for the server of a file (FUSE), even if it is dropped. Without seals, such a
    ///   server can delay system calls and accesses without limit.
    /// - The [`Options`] that use resources or change who sees the bytes. The sender also chooses
    ///   `lock`, `reserve`, `numa`, `mergeable` and `core_dump`: set or refuse them. The check for
    ///   enough memory is not a protection: the sender can punch holes in a file after it. A lock
    ///   then allocates all pages, and the OOM killer may end the receiver.
    /// - The maximum size of a guest. Addresses cost nothing, but each page needs a bit in a
    ///   bitmap, and so does each block.
    /// - The maximum number of regions. Each region takes VMAs from the budget of the process (half
    ///   of `vm.max_map_count`), and time to build.
    /// - The maximum number of attempts per peer. A thread closes a descriptor whose server may
    ///   never reply, and there are at most 64 such threads in a process. While all of them wait,
    ///   or the system refuses another thread, further descriptors stay open until a later drop
    ///   finds one. Change the user or group of the process before: setuid(2) and setgid(2) of the
    ///   C library wait for these threads.
    ///
    /// # Examples
    ///
    /// ```
    /// # use vm_memory::GuestAddress;
    /// # use vm_memory_host::{describe, Backing, MemoryBuilder, Options, Region};
    /// # let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
    /// # let memory = MemoryBuilder::new().region(region).build::<()>()?;
    /// # let (mut description, files) = describe(&memory)?;
    /// # let received = files.iter().map(|file| file.try_clone().map(Into::into));
    /// # let received = received.collect::<Result<_, _>>()?;
    /// let sizes = description.regions.iter().map(|region| u128::from(region.span.size));
    /// if sizes.sum::<u128>() > 64 << 30 {
    ///     return Err("the guest is larger than 64 GiB".into());
    /// }
    /// for region in &mut description.regions {
    ///     region.options = Options::default();
    ///     region.options.sealed = true;
    /// }
    /// let memory = description.builder(received)?.build::<()>()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns a [`DescriptionError`] if the version is not [`VERSION`](Self::VERSION), or if a
    /// region refers to a descriptor that is not in `descriptors`.
    pub fn builder(&self, descriptors: Descriptors) -> Result<MemoryBuilder, DescriptionError> {
        // Dropped last: closes the files that no region uses, and all of them after an error.
        let files = descriptors.take();
        self.check_version()?;
        let mut builder = MemoryBuilder::new();
        for described in &self.regions {
            builder = builder.region(described.region(files.list())?);
        }
        Ok(builder)
    }

    /// Creates a builder for memory of the same layout, with pages of its own, which are zeroes.
    ///
    /// Use it for the destination of a migration over a network, which has no descriptors of the
    /// source. Each region has the same addresses, options, page size and plugged blocks:
    ///
    /// | described | new memory |
    /// |---|---|
    /// | anonymous, private file | anonymous |
    /// | memfd, shared file | memfd |
    /// | huge pages | memfd of huge pages |
    ///
    /// Options that apply only to files of the source are left out: [`sealed`](Region::sealed),
    /// [`sparse`](Region::sparse) and [`read_only`](Region::read_only). The bytes of a ROM must be
    /// written like those of other regions. NUMA nodes, locks and names stay. Change them with
    /// [`MemoryBuilder::each_region`] if this host differs from the source.
    ///
    /// If the guest plugs or unplugs blocks during the migration, apply later descriptions with
    /// [`apply_blocks`](Self::apply_blocks).
    ///
    /// A description may come from an untrusted process. [`builder`](Self::builder) lists the
    /// decisions of the receiver.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{describe, Backing, MemoryBuilder, Region};
    ///
    /// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// memory.write_obj(7u8, GuestAddress(0x1000))?;
    /// let (description, _) = describe(&memory)?;
    ///
    /// // On the destination, which has received the description (feature `serde`):
    /// let other: GuestMemoryMmap = description.fresh()?.build()?;
    /// assert_eq!(other.read_obj::<u8>(GuestAddress(0x1000))?, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns a [`DescriptionError`] if the version is not [`VERSION`](Self::VERSION), or if a
    /// region would end past the largest length of a file.
    #[doc(alias = "migration")]
    pub fn fresh(&self) -> Result<MemoryBuilder, DescriptionError> {
        self.check_version()?;
        self.check_offsets()?;
        let regions = self.regions.iter().map(RegionDescription::fresh);
        Ok(regions.fold(MemoryBuilder::new(), MemoryBuilder::region))
    }

    /// Checks the description as far as that needs neither the files nor this host.
    ///
    /// Regions must not overlap and must end below 2^64. Blocks, plugged ranges, names and NUMA
    /// policies must be valid. A description that is deserialised has passed this check.
    ///
    /// A description without regions is valid, because a memory map may have none. A build from it
    /// fails.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory_host::{BackingDescription, Description, RegionDescription, Span};
    ///
    /// let region = |start| {
    ///     let span = Span { start, size: 0x2000 };
    ///     RegionDescription::new(span, BackingDescription::Anonymous)
    /// };
    /// assert!(Description::new(vec![region(0), region(0x2000)]).check().is_ok());
    /// assert!(Description::new(vec![region(0), region(0x1000)]).check().is_err());
    /// ```
    ///
    /// # Errors
    ///
    /// Returns a [`DescriptionError`] that names the region, unless the version is not
    /// [`VERSION`](Self::VERSION).
    pub fn check(&self) -> Result<(), DescriptionError> {
        self.check_version()?;
        self.check_offsets()?;
        if self.regions.is_empty() {
            return Ok(());
        }
        let regions = self.regions.iter().map(RegionDescription::fresh);
        Ok(check_layout(regions.collect())?)
    }

    fn check_offsets(&self) -> Result<(), BuildError> {
        let mut regions = self.regions.iter();
        regions.try_for_each(RegionDescription::check_offset)
    }

    fn check_version(&self) -> Result<(), DescriptionError> {
        if self.version == Self::VERSION {
            return Ok(());
        }
        Err(DescriptionError::Version {
            version: self.version,
        })
    }
}

impl BlocksDescription {
    /// Creates a description of `blocks` with their plugged ranges, as offset and length in bytes.
    pub fn new(blocks: Blocks, plugged: Vec<(u64, u64)>) -> Self {
        Self { blocks, plugged }
    }
}

impl RegionDescription {
    /// Creates a description with default options and without blocks.
    pub fn new(span: Span, backing: BackingDescription) -> Self {
        Self {
            span,
            backing,
            options: Options::default(),
            blocks: None,
        }
    }

    /// Returns the request for this region.
    fn region(&self, files: &[Arc<File>]) -> Result<Region, DescriptionError> {
        let mut region = Region::new(GuestAddress(self.span.start), self.span.size);
        if let BackingDescription::Descriptor {
            index,
            offset,
            sharing,
            page_size,
            kind,
        } = &self.backing
        {
            let file = usize::try_from(*index).ok();
            let file = file.and_then(|index| files.get(index)).cloned();
            region.backing = Backing::File {
                file: file.ok_or(DescriptionError::NoDescriptor {
                    region: self.span,
                    index: *index,
                    count: files.len(),
                })?,
                offset: *offset,
                sharing: *sharing,
            };
            region.described = Some((*kind, *page_size));
        }
        Ok(self.with_options_and_blocks(region))
    }

    /// Checks that the region ends below the largest length of a file.
    fn check_offset(&self) -> Result<(), BuildError> {
        let BackingDescription::Descriptor { offset, .. } = self.backing else {
            return Ok(());
        };
        match offset.checked_add(self.span.size) {
            Some(..=MAX_FILE_LENGTH) => Ok(()),
            _ => Err(BuildError::FileOffset {
                region: self.span,
                offset,
            }),
        }
    }

    /// Returns the request for a region of the same layout with pages of its own.
    fn fresh(&self) -> Region {
        let region = Region::new(GuestAddress(self.span.start), self.span.size);
        let mut region = self.with_options_and_blocks(region);
        region.options.sealed = false;
        region.options.sparse = false;
        region.options.read_only = false;
        if let BackingDescription::Descriptor {
            sharing,
            page_size,
            kind,
            ..
        } = self.backing
        {
            region.backing = match (kind, sharing) {
                (BackingKind::Hugetlb, _) => Backing::Hugetlb { page_size },
                (_, Sharing::Shared) => Backing::Memfd,
                (_, Sharing::Private) => Backing::Anonymous,
            };
        }
        region
    }

    fn with_options_and_blocks(&self, mut region: Region) -> Region {
        region.options = self.options.clone();
        if let Some(described) = &self.blocks {
            region.blocks = Some(described.blocks);
            region.plugged.clone_from(&described.plugged);
        }
        region
    }
}
