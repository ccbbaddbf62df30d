//! What is behind a region: made, or looked at, before anything is mapped.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use crate::error::BuildError;
use crate::machine::Machine;
use crate::region::{Backing, BackingKind, Region, Sharing};
use crate::sys;

/// A region's backing with its file open and checked.
#[derive(Clone, Debug)]
pub(crate) struct OpenedBacking {
    pub(crate) kind: BackingKind,
    pub(crate) file: Option<(Arc<File>, u64)>,
    pub(crate) sharing: Sharing,
    pub(crate) page_size: u64,
    /// Whether it is on a tmpfs of somebody's own, with settings and a size of its own.
    pub(crate) own_tmpfs: bool,
    /// Whether its file has room for all of the region, or for all plugged blocks: its file system may have none later.
    pub(crate) allocated: bool,
}

/// Makes what a region is to be kept in, or looks at what was given.
pub(crate) fn open(region: &Region, machine: &Machine) -> Result<OpenedBacking, BuildError> {
    named(region)?;
    let opened = match &region.backing {
        Backing::Anonymous => OpenedBacking {
            kind: BackingKind::Anonymous,
            file: None,
            sharing: Sharing::Private,
            page_size: sys::page_size_u64(),
            own_tmpfs: false,
            allocated: false,
        },
        Backing::Memfd => memfd(region, None)?,
        Backing::Hugetlb { page_size } => {
            let there = machine.pools().iter().map(|pool| pool.page_size).collect();
            let there: Vec<u64> = there;
            if !there.contains(page_size) {
                return Err(BuildError::NoSuchHugePage {
                    region: region.span(),
                    page_size: *page_size,
                    there,
                });
            }
            // Before the file is made: its length would be rounded up, and pages set aside that nobody uses.
            aligned(region, *page_size)?;
            memfd(region, Some(*page_size))?
        }
        Backing::File {
            file,
            offset,
            sharing,
        } => given(region, file, *offset, *sharing)?,
    };
    aligned(region, opened.page_size)?;
    Ok(opened)
}

/// The greatest length of a file in bytes: lengths have a sign (`off_t`).
const GREATEST_LENGTH: u64 = u64::MAX >> 1;

/// A memfd of its own, sealed.
fn memfd(region: &Region, huge: Option<u64>) -> Result<OpenedBacking, BuildError> {
    let span = region.span();
    let name = region.options.name.as_deref().unwrap_or("guest-ram");
    let refused = |source: io::Error| BuildError::System {
        region: span,
        what: "make a memfd",
        advice: match source.raw_os_error() {
            Some(libc::EFBIG) => "let the process have longer files (ulimit -f)",
            _ => "let the process have more descriptors (ulimit -n)",
        }
        .to_owned(),
        source,
    };
    if region.size > GREATEST_LENGTH {
        return Err(BuildError::FileOffset {
            region: span,
            offset: 0,
        });
    }
    let name = CString::new(name).map_err(|error| refused(error.into()))?;
    let file = sys::memfd(&name, region.size, huge).map_err(refused)?;
    sys::seal_length(&file).map_err(refused)?;
    Ok(OpenedBacking {
        kind: if huge.is_some() {
            BackingKind::Hugetlb
        } else {
            BackingKind::Memfd
        },
        file: Some((Arc::new(file), 0)),
        sharing: Sharing::Shared,
        page_size: huge.unwrap_or_else(sys::page_size_u64),
        own_tmpfs: false,
        allocated: false,
    })
}

/// A file that was given.
fn given(
    region: &Region,
    file: &Arc<File>,
    offset: u64,
    sharing: Sharing,
) -> Result<OpenedBacking, BuildError> {
    let span = region.span();
    let refused = |source: io::Error| BuildError::System {
        region: span,
        what: "look at its file",
        source,
        advice: "give an open file, a memfd or a device that can be mapped".to_owned(),
    };
    let metadata = file.metadata().map_err(refused)?;
    let kind_of_file = metadata.file_type();
    if kind_of_file.is_dir() || kind_of_file.is_fifo() || kind_of_file.is_socket() {
        return Err(refused(io::Error::from_raw_os_error(libc::ENODEV)));
    }
    let file_system = sys::file_system(file).map_err(refused)?;
    // The file system of a device is that of its name, /dev, which is a tmpfs as a rule.
    let (kind, page_size) = match (file_system.kind, kind_of_file.is_file()) {
        (sys::HUGETLBFS, true) => (BackingKind::Hugetlb, file_system.block_size),
        (sys::TMPFS, true) => (BackingKind::Memfd, sys::page_size_u64()),
        _ => (BackingKind::File, sys::page_size_u64()),
    };
    if let Some(described) = region
        .described
        .filter(|described| *described != (kind, page_size))
    {
        let show = |(kind, page_size): (BackingKind, u64)| {
            format!("{kind:?} with pages of {page_size:#x} bytes")
        };
        return Err(BuildError::NotAsDescribed {
            region: span,
            described: show(described),
            found: show((kind, page_size)),
        });
    }
    if sharing == Sharing::Shared && !sys::is_open_for_writing(file).map_err(refused)? {
        return Err(BuildError::Conflict {
            region: span,
            what: "its file is shared and not open for writing; open it for reading and writing, or let its pages be copied (Backing::private_file)",
        });
    }
    if region.options.sealed && !sys::cannot_shrink(file) {
        return Err(BuildError::NotSealed { region: span });
    }
    if !offset.is_multiple_of(page_size) {
        return Err(BuildError::Misaligned {
            region: span,
            what: "offset in the file",
            value: offset,
            unit: "pages",
            unit_size: page_size,
        });
    }
    let needed = offset
        .checked_add(region.size)
        .filter(|end| *end <= GREATEST_LENGTH);
    let needed = needed.ok_or(BuildError::FileOffset {
        region: span,
        offset,
    })?;
    // Character devices have no length, and refuse what they do not have.
    let length = match (kind_of_file.is_file(), kind_of_file.is_block_device()) {
        (true, _) => Some(metadata.len()),
        (_, true) => Some(end_of(file).map_err(refused)?),
        _ => None,
    };
    if let Some(length) = length.filter(|length| *length < needed) {
        return Err(BuildError::FileTooShort {
            region: span,
            needed,
            length,
        });
    }
    let own_tmpfs = kind == BackingKind::Memfd && file_system.is_limited;
    let on_disk = kind == BackingKind::File && kind_of_file.is_file();
    // A hole in a file of a tmpfs takes a page when it is read, too.
    let allocated =
        !region.options.sparse && (own_tmpfs || (on_disk && sharing == Sharing::Shared));
    // Those of blocks are taken when they are plugged.
    if allocated && region.blocks.is_none() {
        allocate(file, offset, region.size).map_err(|source| BuildError::System {
            region: span,
            what: "have room on its file system for all of its file",
            advice: match source.raw_os_error() {
                Some(libc::EBADF) => {
                    "open it for writing, too, or say that the file may have holes (Region::sparse)"
                }
                Some(libc::EFBIG) => "let the process have longer files (ulimit -f)",
                _ => "make room there, or say that the file may have holes (Region::sparse)",
            }
            .to_owned(),
            source,
        })?;
    }
    Ok(OpenedBacking {
        kind,
        file: Some((Arc::clone(file), offset)),
        sharing,
        page_size,
        own_tmpfs,
        allocated,
    })
}

/// Takes room for a range of a file where it has none. One without holes needs not be open for writing.
fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    match sys::allocate_range(file, offset, len) {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => {
            let metadata = file.metadata()?;
            match metadata.blocks().saturating_mul(512) >= metadata.len() {
                true => Ok(()),
                false => Err(error),
            }
        }
        answer => answer,
    }
}

/// Where a block device ends: `stat` tells it of files only.
fn end_of(mut device: &File) -> io::Result<u64> {
    let position = device.stream_position()?;
    let end = device.seek(SeekFrom::End(0))?;
    device.seek(SeekFrom::Start(position))?;
    Ok(end)
}

/// Guest address and size must be whole pages: KVM maps no others, and the system rounds.
fn aligned(region: &Region, page_size: u64) -> Result<(), BuildError> {
    for (what, value) in [("size", region.size), ("guest address", region.start.0)] {
        if !value.is_multiple_of(page_size) {
            return Err(BuildError::Misaligned {
                region: region.span(),
                what,
                value,
                unit: "pages",
                unit_size: page_size,
            });
        }
    }
    Ok(())
}

/// The name must be one that the kernel shows, and a memfd may have.
fn named(region: &Region) -> Result<(), BuildError> {
    let Some(name) = &region.options.name else {
        return Ok(());
    };
    let printable = |c: u8| matches!(c, 0x20..=0x7e) && !b"\\`$[]".contains(&c);
    if name.is_empty() || name.len() > 79 || !name.bytes().all(printable) {
        return Err(BuildError::Name {
            region: region.span(),
            name: name.clone(),
        });
    }
    Ok(())
}
