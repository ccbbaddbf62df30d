//! [`Description`]: a guest's memory as data, from which another process builds the same.

use std::fmt::{self, Display};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::builder::MemoryBuilder;
use crate::error::NotProvisioned;
use crate::mapping::{provisioned, span_of, HostMapping};
use crate::region::{Backing, BackingKind, Blocks, Options, Region, Sharing, Span};
use crate::sys;

/// A guest's memory as data: what a snapshot or a second process needs, and a vhost-user front end for its table of memory regions. (The address in
/// this process, which that has too, is no part of it: [`HostMapping::host_address`] has an example.)
///
/// Descriptors are not data: regions name them by their number in a list that goes beside the description (`SCM_RIGHTS`, unix(7)). A file that several
/// regions are parts of is in it once.
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{describe, Backing, Description, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// let (description, files) = describe(&memory)?;
/// let text = serde_json::to_string(&description)?;
///
/// // In the other process, which has received text and descriptors:
/// let description: Description = serde_json::from_str(&text)?;
/// let received = files.iter().map(|file| file.try_clone().map(Into::into)).collect::<Result<_, _>>()?;
/// let same: GuestMemoryMmap = description.builder(received)?.build()?;
/// memory.write_obj(0x77u8, GuestAddress(0x1234))?;
/// assert_eq!(same.read_obj::<u8>(GuestAddress(0x1234))?, 0x77);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Which form of description this is: [`VERSION`](Self::VERSION). Another one is refused.
    pub version: u32,
    /// The regions, in the order of their addresses.
    pub regions: Vec<RegionDescription>,
}

/// One region of a [`Description`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionDescription {
    /// Where it is in the guest's memory.
    pub span: Span,
    /// What it is kept in.
    pub backing: BackingDescription,
    /// What else was asked for.
    pub options: Options,
    /// Its blocks that come and go.
    pub blocks: Option<BlocksDescription>,
}

/// What a region's bytes are kept in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum BackingDescription {
    /// Private memory of the process. Built again, it is zeroes.
    Anonymous,
    /// A file, memfd or device.
    Descriptor {
        /// Its number in the list of descriptors.
        index: usize,
        /// Where in the file the region begins, in bytes.
        offset: u64,
        /// Who sees what is written.
        sharing: Sharing,
        /// The size of its pages in bytes.
        page_size: u64,
        /// The kind of file.
        kind: BackingKind,
    },
}

/// The blocks of a region, and which of them are plugged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlocksDescription {
    /// Their size, and what becomes of those that are not plugged.
    pub blocks: Blocks,
    /// The plugged ranges, as offset in the region and length, in bytes.
    pub plugged: Vec<(u64, u64)>,
}

/// Why a description is not one of memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptionError {
    /// The description is of a form that this crate does not know.
    #[error(
        "description has version {version}, but this crate reads version {}; use the crate that wrote it",
        Description::VERSION
    )]
    Version {
        /// Its version.
        version: u32,
    },
    /// A region names a descriptor that is not in the list.
    #[error("region {region}: descriptor {index} is missing, only {count} were passed; pass all that describe() returned")]
    NoDescriptor {
        /// The region.
        region: Span,
        /// The number that it names.
        index: usize,
        /// How many there are.
        count: usize,
    },
}

/// Describes guest memory that this crate has built, and returns the files that go with the description.
///
/// # Errors
///
/// If a region was not built by this crate.
pub fn describe<B, M>(memory: &M) -> Result<(Description, Vec<Arc<File>>), NotProvisioned>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    let (mut regions, mut files) = (Vec::new(), Vec::new());
    for region in memory.iter() {
        let mapping = provisioned(region)?;
        let mut options = mapping.options().clone();
        // As it is: a receiver that is told so finds out if it gets another file.
        options.sealed |= mapping
            .file()
            .is_some_and(|(file, _)| sys::cannot_shrink(file));
        regions.push(RegionDescription {
            span: span_of(region),
            backing: backing(mapping, &mut files),
            options,
            blocks: blocks(mapping),
        });
    }
    let version = Description::VERSION;
    Ok((Description { version, regions }, files))
}

fn backing(mapping: &HostMapping, files: &mut Vec<Arc<File>>) -> BackingDescription {
    let Some((file, offset)) = &mapping.backing.file else {
        return BackingDescription::Anonymous;
    };
    let known = files.iter().position(|other| Arc::ptr_eq(other, file));
    let index = known.unwrap_or_else(|| {
        files.push(Arc::clone(file));
        files.len().saturating_sub(1)
    });
    BackingDescription::Descriptor {
        index,
        offset: *offset,
        sharing: mapping.backing.sharing,
        page_size: mapping.page_size(),
        kind: mapping.kind(),
    }
}

fn blocks(mapping: &HostMapping) -> Option<BlocksDescription> {
    let (blocks, bits) = mapping.blocks.as_ref()?;
    let number = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    let plugged = bits
        .runs()
        .map(|(offset, len)| (number(offset), number(len)));
    Some(BlocksDescription {
        blocks: *blocks,
        plugged: plugged.collect(),
    })
}

impl Description {
    /// The form of descriptions that this crate makes and takes.
    pub const VERSION: u32 = 1;

    /// Begins to build the same memory from descriptors that were received with the description: shared memory has the same bytes then, private memory
    /// those of its file, anonymous memory zeroes.
    ///
    /// A description may come from a process that is not trusted: everything in it is looked at when it is built. Two things are for the receiver to
    /// decide. A file that its sender can cut off later: ask for one that is [sealed](Region::sealed), by `options.sealed` of each region, or
    /// see [`vm_memory::fault`]. And how large a guest may be: addresses cost nothing, but a bitmap costs a bit for each page, and blocks a bit for each
    /// block.
    ///
    /// ```
    /// # use vm_memory::GuestAddress;
    /// # use vm_memory_host::{describe, Backing, Description, MemoryBuilder, Region};
    /// # let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
    /// # let (description, files) = describe(&MemoryBuilder::new().region(region).build::<()>()?)?;
    /// # let text = serde_json::to_string(&description)?;
    /// # let received = files.iter().map(|file| file.try_clone().map(Into::into)).collect::<Result<_, _>>()?;
    /// let mut description: Description = serde_json::from_str(&text)?;
    /// let size: u128 = description.regions.iter().map(|region| u128::from(region.span.size)).sum();
    /// assert!(size <= 64 << 30, "no guest of ours is that large");
    /// for region in &mut description.regions {
    ///     region.options.sealed = true;
    /// }
    /// let memory = description.builder(received)?.build::<()>()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`DescriptionError`].
    pub fn builder(&self, descriptors: Vec<OwnedFd>) -> Result<MemoryBuilder, DescriptionError> {
        if self.version != Self::VERSION {
            return Err(DescriptionError::Version {
                version: self.version,
            });
        }
        let files: Vec<Arc<File>> = descriptors
            .into_iter()
            .map(|fd| Arc::new(File::from(fd)))
            .collect();
        let mut builder = MemoryBuilder::new();
        for described in &self.regions {
            builder = builder.region(described.region(&files)?);
        }
        Ok(builder)
    }
}

impl RegionDescription {
    fn region(&self, files: &[Arc<File>]) -> Result<Region, DescriptionError> {
        let backing = match &self.backing {
            BackingDescription::Anonymous => Backing::Anonymous,
            BackingDescription::Descriptor {
                index,
                offset,
                sharing,
                ..
            } => Backing::File {
                file: files
                    .get(*index)
                    .cloned()
                    .ok_or(DescriptionError::NoDescriptor {
                        region: self.span,
                        index: *index,
                        count: files.len(),
                    })?,
                offset: *offset,
                sharing: *sharing,
            },
        };
        let mut region =
            Region::new(GuestAddress(self.span.start), self.span.size).backing(backing);
        if let BackingDescription::Descriptor {
            page_size, kind, ..
        } = &self.backing
        {
            region.described = Some((*kind, *page_size));
        }
        region.options = self.options.clone();
        if let Some(described) = &self.blocks {
            region.blocks = Some(described.blocks);
            region.plugged.clone_from(&described.plugged);
        }
        Ok(region)
    }
}

/// As /proc/iomem tells it: a line for each region.
impl Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for region in &self.regions {
            writeln!(f, "{region}")?;
        }
        Ok(())
    }
}

/// As a line of /proc/iomem: `00000000-3fffffff : memfd "ram", descriptor 0 at 0x0`.
impl Display for RegionDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} : ", self.span)?;
        match &self.backing {
            BackingDescription::Anonymous => write!(f, "anonymous")?,
            BackingDescription::Descriptor {
                kind, page_size, ..
            } => match kind {
                BackingKind::Hugetlb => write!(f, "{kind} {} KiB", page_size / 1024)?,
                _ => write!(f, "{kind}")?,
            },
        }
        if let Some(name) = &self.options.name {
            write!(f, " {name:?}")?;
        }
        if let BackingDescription::Descriptor {
            index,
            offset,
            sharing,
            ..
        } = &self.backing
        {
            write!(f, ", descriptor {index} at {offset:#x}")?;
            if *sharing == Sharing::Private {
                write!(f, ", private copy")?;
            }
        }
        if let Some(described) = &self.blocks {
            let plugged = described
                .plugged
                .iter()
                .fold(0u64, |sum, (_, len)| sum.saturating_add(*len));
            let size = described.blocks.size;
            write!(f, ", blocks of {size:#x}, {plugged:#x} bytes plugged")?;
        }
        Ok(())
    }
}
