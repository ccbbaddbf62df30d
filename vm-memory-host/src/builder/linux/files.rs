//! Creates or checks the file of a region, before any memory is mapped.

use std::ffi::CString;
use std::fs::{File, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use crate::builder::check::{check_alignment, check_multiple, end_in_file};
use crate::error::BuildError;
use crate::host::HostResources;
use crate::mapping::{FileIdentity, OpenedBacking};
use crate::region::{Backing, BackingKind, Region, Sharing, TransparentHugePages};
use crate::sys;

/// Checks that a region's file has the seals that the region requires.
///
/// This system call never waits, whatever the descriptor is. [`open`] makes calls that may wait for
/// the server of the file.
pub(super) fn check_seals(region: &Region) -> Result<(), BuildError> {
    match &region.backing {
        Backing::File { file, .. } if region.options.sealed && !sys::cannot_shrink(file) => {
            Err(BuildError::NotSealed {
                region: region.span(),
            })
        }
        _ => Ok(()),
    }
}

/// Creates the memfd of a region, or checks the file that the caller passed.
pub(super) fn open(region: &Region, host: &HostResources) -> Result<OpenedBacking, BuildError> {
    check_name(region)?;
    let opened = match &region.backing {
        Backing::Anonymous => OpenedBacking {
            kind: BackingKind::Anonymous,
            file: None,
            sharing: Sharing::Private,
            identity: None,
            page_size: sys::page_size_u64(),
            own_tmpfs: false,
            present: 0,
            allocated: false,
        },
        Backing::Memfd => {
            // A huge page of a file begins at a multiple of its size in the file.
            let huge = transparent_huge_page(region).unwrap_or(1);
            create_memfd(region, None, region.start.0 & huge.wrapping_sub(1))?
        }
        Backing::Hugetlb { page_size } => {
            let available = host.huge_page_sizes();
            let is_known = available
                .as_ref()
                .is_none_or(|sizes| sizes.contains(page_size));
            // memfd_create(2) takes the size as a power of two. With 1, it would use the default.
            let can_be_asked = page_size.is_power_of_two() && *page_size >= sys::page_size_u64();
            if !is_known || !can_be_asked {
                return Err(BuildError::NoSuchHugePage {
                    region: region.span(),
                    page_size: *page_size,
                    available: available.unwrap_or_default(),
                });
            }
            // Checked before the memfd exists, because the kernel would round its length up.
            check_alignment(region, *page_size)?;
            create_memfd(region, Some(*page_size), 0)?
        }
        Backing::File {
            file,
            offset,
            sharing,
        } => open_file(region, file, *offset, *sharing)?,
    };
    check_alignment(region, opened.page_size)?;
    Ok(opened)
}

/// Returns the size of the transparent huge pages that a region of ordinary pages can have.
///
/// Does not depend on the settings of the host: they can change later, and a jail can hide them.
pub(super) fn transparent_huge_page(region: &Region) -> Option<u64> {
    if region.options.transparent_huge_pages == TransparentHugePages::Off {
        return None;
    }
    Some(sys::huge_page_size()).filter(|huge| region.size >= *huge)
}

/// Creates a memfd for a region, and seals its length. `huge` is the size of its huge pages.
///
/// The region begins at `offset`. The hole before it has no pages.
fn create_memfd(
    region: &Region,
    huge: Option<u64>,
    offset: u64,
) -> Result<OpenedBacking, BuildError> {
    let name = region.options.name.as_deref().unwrap_or("guest-ram");
    let len = end_in_file(region, offset)?;
    let refused = |source: io::Error| {
        let error = source.raw_os_error();
        if let (Some(page_size), Some(libc::ENODEV | libc::ENOSYS)) = (huge, error) {
            // The kernel does not have this size, and /sys did not show it.
            return BuildError::NoSuchHugePage {
                region: region.span(),
                page_size,
                available: Vec::new(),
            };
        }
        let advice = match error {
            Some(libc::EFBIG) if sys::file_size_limit().is_some_and(|limit| len > limit) => {
                "raise the file size limit (ulimit -f)"
            }
            Some(libc::EMFILE) => "raise the limit of open files (ulimit -n)",
            Some(libc::ENFILE) => "raise the system's limit of open files (fs.file-max)",
            _ => "use Backing::Anonymous if no other process must map it",
        };
        BuildError::system(region.span(), "create its memfd", source, advice)
    };
    let name = CString::new(name).map_err(|error| refused(error.into()))?;
    let file = sys::memfd(&name, len, huge).map_err(refused)?;
    sys::seal_length(&file).map_err(refused)?;
    Ok(OpenedBacking {
        kind: match huge {
            Some(_) => BackingKind::Hugetlb,
            None => BackingKind::Memfd,
        },
        file: Some((Arc::new(file), offset)),
        sharing: Sharing::Shared,
        identity: None,
        page_size: huge.unwrap_or_else(sys::page_size_u64),
        own_tmpfs: false,
        present: 0,
        allocated: false,
    })
}

/// Checks a file against the description that the region comes from, if there is one.
fn check_description(region: &Region, kind: BackingKind, page_size: u64) -> Result<(), BuildError> {
    let found = (kind, page_size);
    let show = |(kind, page_size): (BackingKind, u64)| {
        format!("{kind} with pages of {page_size:#x} bytes")
    };
    match region.described {
        Some(described) if described != found => Err(BuildError::NotAsDescribed {
            region: region.span(),
            described: show(described),
            found: show(found),
        }),
        _ => Ok(()),
    }
}

/// Checks the file of a region.
fn open_file(
    region: &Region,
    file: &Arc<File>,
    offset: u64,
    sharing: Sharing,
) -> Result<OpenedBacking, BuildError> {
    let span = region.span();
    let refused = |source: io::Error| {
        let advice = "pass a regular file, a memfd or a device that supports mmap(2)";
        BuildError::system(span, "examine its file", source, advice)
    };
    let metadata = file.metadata().map_err(refused)?;
    let file_type = metadata.file_type();
    if file_type.is_dir() || file_type.is_fifo() || file_type.is_socket() {
        return Err(refused(io::Error::from_raw_os_error(libc::ENODEV)));
    }
    let is_written = sharing == Sharing::Shared && !region.options.read_only;
    if is_written && !sys::is_open_for_writing(file).map_err(refused)? {
        return Err(BuildError::Conflict {
            region: span,
            what: "a shared file must be open for writing; open it for reading and writing, \
                or use Backing::private_file or Region::read_only",
        });
    }
    let file_system = sys::file_system(file).map_err(refused)?;
    let (kind, page_size) = kind_of(file_type, &file_system);
    check_description(region, kind, page_size)?;
    check_length(region, file, offset, page_size, &metadata, refused)?;
    let own_tmpfs = kind == BackingKind::Memfd && file_system.is_limited;
    let on_disk = kind == BackingKind::File && file_type.is_file();
    // On a tmpfs, even a read of a hole allocates a page, so private mappings also count.
    let allocated = !region.options.sparse && (own_tmpfs || (on_disk && is_written));
    Ok(OpenedBacking {
        kind,
        file: Some((Arc::clone(file), offset)),
        sharing,
        identity: identity(&metadata),
        page_size,
        own_tmpfs,
        present: if file_type.is_file() {
            metadata.blocks().saturating_mul(512)
        } else {
            0
        },
        allocated,
    })
}

/// Returns the identity of a file, by which two descriptors of it are recognised.
fn identity(metadata: &Metadata) -> Option<FileIdentity> {
    const DEV_ZERO: u64 = libc::makedev(1, 5);
    let file_type = metadata.file_type();
    if file_type.is_file() {
        return Some((metadata.dev(), Some(metadata.ino())));
    }
    // Each shared mapping of /dev/zero has separate pages. Other files, such as anonymous inodes,
    // may share an inode without sharing memory.
    let is_device = file_type.is_block_device() || file_type.is_char_device();
    (is_device && metadata.rdev() != DEV_ZERO).then(|| (metadata.rdev(), None))
}

/// Returns the kind of a file, and the size of its pages.
///
/// For a device node, `fstatfs(2)` reports the file system of /dev, which usually is a tmpfs. A
/// device is therefore always a `File`.
fn kind_of(file_type: FileType, file_system: &sys::FileSystem) -> (BackingKind, u64) {
    match (file_system.kind, file_type.is_file()) {
        (sys::HUGETLBFS, true) => (BackingKind::Hugetlb, file_system.block_size),
        (sys::TMPFS, true) => (BackingKind::Memfd, sys::page_size_u64()),
        _ => (BackingKind::File, sys::page_size_u64()),
    }
}

/// Checks that a region's part of its file is aligned and within the file.
fn check_length(
    region: &Region,
    file: &File,
    offset: u64,
    page_size: u64,
    metadata: &Metadata,
    refused: impl Fn(io::Error) -> BuildError,
) -> Result<(), BuildError> {
    check_multiple(region, "file offset", offset, page_size)?;
    let needed = end_in_file(region, offset)?;
    let file_type = metadata.file_type();
    // A character device has no length; its driver refuses what it cannot map.
    let length = match (file_type.is_file(), file_type.is_block_device()) {
        (true, _) => Some(metadata.len()),
        (_, true) => Some(sys::block_device_length(file).map_err(refused)?),
        _ => None,
    };
    match length {
        Some(length) if length < needed => Err(BuildError::FileTooShort {
            region: region.span(),
            needed,
            length,
        }),
        _ => Ok(()),
    }
}

/// Allocates file space for all of a region, unless it may be sparse.
pub(super) fn allocate(region: &Region, backing: &OpenedBacking) -> Result<(), BuildError> {
    // Blocks take their space when they are plugged.
    let (Some((file, offset)), true, None) = (&backing.file, backing.allocated, region.blocks)
    else {
        return Ok(());
    };
    let allocate = if backing.kind == BackingKind::File {
        sys::allocate_own_range
    } else {
        sys::allocate_range
    };
    let allocated = match allocate(file, *offset, region.size) {
        // A file without holes need not be open for writing.
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => has_no_holes(file, error),
        result => result,
    };
    allocated.map_err(|source| {
        let advice = match source.raw_os_error() {
            Some(libc::EBADF) => "open it for writing or allow holes (Region::sparse)",
            Some(libc::ENOSPC) => "free space on its file system or allow holes (Region::sparse)",
            Some(libc::EDQUOT) => "raise the disk quota or allow holes (Region::sparse)",
            Some(libc::EOPNOTSUPP) => {
                "its file system cannot allocate space; allow holes (Region::sparse)"
            }
            Some(libc::EPERM) => "the file is sealed against writing; use Backing::private_file",
            Some(libc::EFBIG) => "the file was truncated; extend it",
            _ => "use another file or allow holes (Region::sparse)",
        };
        BuildError::system(region.span(), "allocate space for its file", source, advice)
    })
}

/// Returns `error` if a file has fewer blocks than its length needs.
///
/// Blocks past the end of the file count. `SEEK_HOLE` would exclude them, but moves the position of
/// a descriptor that others may use, and reports preallocated space as a hole.
fn has_no_holes(file: &File, error: io::Error) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.blocks().saturating_mul(512) >= metadata.len() {
        Ok(())
    } else {
        Err(error)
    }
}

/// Checks that `prctl(2)` (`PR_SET_VMA_ANON_NAME`) and `memfd_create(2)` accept a region's name.
pub(super) fn check_name(region: &Region) -> Result<(), BuildError> {
    let Some(name) = &region.options.name else {
        return Ok(());
    };
    let is_printable = |c: u8| matches!(c, 0x20..=0x7e) && !b"\\`$[]".contains(&c);
    if name.is_empty() || name.len() > 79 || !name.bytes().all(is_printable) {
        return Err(BuildError::Name {
            region: region.span(),
            name: name.chars().take(80).collect(),
        });
    }
    Ok(())
}
