//! System calls on files: creation, seals, properties, allocation and holes.

use std::ffi::CStr;
use std::fs::{File, Permissions};
use std::io::{Error, Result};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use super::signals::without_file_size_signal;
use super::{check, file_size_limit};
use crate::sys::page_size_u64;

/// Creates a sealable memfd of `len` bytes, with huge pages of `huge` bytes if that is set.
///
/// No process can execute it, or make it executable (`MFD_NOEXEC_SEAL`, Linux 6.3). Before Linux
/// 6.3, and on hugetlbfs, its owner could set the execute permission again.
pub(crate) fn memfd(name: &CStr, len: u64, huge: Option<u64>) -> Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if let Some(size) = huge {
        // The flags encode the size as a power of two at bit 26 (memfd_create(2), "MFD_HUGE_2MB").
        let shift = libc::MAP_HUGE_SHIFT.unsigned_abs();
        let size = size.trailing_zeros().wrapping_shl(shift);
        flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(size);
    }
    let file = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // The kernel does not support the flag. If something else is invalid, this fails again.
        Err(Errno::INVAL) => executable_memfd(name, flags)?,
        result => File::from(result?),
    };
    if file_size_limit().is_some_and(|limit| len > limit) {
        // ftruncate(2) would raise SIGXFSZ, which ends the process by default.
        return Err(Error::from_raw_os_error(libc::EFBIG));
    }
    file.set_len(len)?;
    Ok(file)
}

/// Creates a memfd that the kernel makes executable, and removes that permission.
fn executable_memfd(name: &CStr, flags: MemfdFlags) -> Result<File> {
    let file = File::from(rustix::fs::memfd_create(name, flags)?);
    file.set_permissions(Permissions::from_mode(0o666))?;
    Ok(file)
}

/// Seals the length of a memfd, and its seals.
pub(crate) fn seal_length(file: &File) -> Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}

/// Returns whether a descriptor is open for writing, which a shared mapping requires.
pub(crate) fn is_open_for_writing(file: &File) -> Result<bool> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(flags & OFlags::ACCMODE != OFlags::RDONLY)
}

/// Returns whether a file is sealed against shrinking; `false` if it cannot have seals.
pub(crate) fn cannot_shrink(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// Returns whether a file can have seals: it is in memory, and no other process serves it.
pub(crate) fn can_be_sealed(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok()
}

/// The file system of a file.
pub(crate) struct FileSystem {
    /// Its magic number.
    pub(crate) kind: i128,
    /// On hugetlbfs, the size of a page in bytes.
    pub(crate) block_size: u64,
    /// Whether its size is limited. The kernel's internal tmpfs, which holds memfds, has no limit.
    pub(crate) is_limited: bool,
    /// The number of free bytes.
    pub(crate) free: u64,
}

/// `HUGETLBFS_MAGIC` (Linux `include/uapi/linux/magic.h`).
pub(crate) const HUGETLBFS: i128 = 0x958458f6;
/// `TMPFS_MAGIC`, also the type of a memfd's file system.
pub(crate) const TMPFS: i128 = 0x01021994;
/// `EXT4_SUPER_MAGIC`, `XFS_SUPER_MAGIC` and `BTRFS_SUPER_MAGIC`, as in that file.
const DISK_FILE_SYSTEMS: [i128; 3] = [0xef53, 0x58465342, 0x9123683e];

impl FileSystem {
    /// Returns whether `SEEK_DATA` leaves out no data, not even pages that are only in memory.
    ///
    /// The server of a network file system or of FUSE does not see pages that were not written
    /// back. A file on overlayfs can change the file that is below it.
    pub(crate) fn reports_data(&self) -> bool {
        self.kind == TMPFS || DISK_FILE_SYSTEMS.contains(&self.kind)
    }
}

/// Returns the file system of a file (fstatfs(2)).
pub(crate) fn file_system(file: &File) -> Result<FileSystem> {
    let stat = rustix::fs::fstatfs(file)?;
    // The types of the fields differ between targets.
    let (kind, block_size) = (i128::from(stat.f_type), i128::from(stat.f_bsize));
    let free = i128::from(stat.f_bfree).saturating_mul(block_size);
    Ok(FileSystem {
        kind,
        block_size: u64::try_from(block_size).unwrap_or(0),
        free: u64::try_from(free).unwrap_or(0),
        is_limited: stat.f_blocks != 0,
    })
}

/// `BLKGETSIZE64` (Linux `include/uapi/linux/fs.h`). The kernel declares it with `size_t`.
const BLKGETSIZE64: libc::Ioctl = libc::_IOR::<usize>(0x12, 114);

/// Returns the length of a block device, which fstat(2) does not report.
///
/// Does not change its position, which other descriptors can share.
pub(crate) fn block_device_length(device: &File) -> Result<u64> {
    if !device.metadata()?.file_type().is_block_device() {
        return Err(Error::from_raw_os_error(libc::ENOTBLK));
    }
    let mut length = 0u64;
    // SAFETY: `BLKGETSIZE64` writes a `u64` to its argument (`put_u64` in Linux `block/ioctl.c`),
    // and `length` is one. `device` is a block device, as checked above, so no other driver
    // receives the request.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut length) })?;
    Ok(length)
}

/// Returns the next part of a file with data, at `from` or after it (lseek(2), `SEEK_DATA`).
///
/// Its end is the next hole. On tmpfs, finding it takes time in proportion to the data before it.
/// If there is no data, the result is empty and begins at `u64::MAX`. If the file system does not
/// report data or holes, the rest of the file is data. Changes the position of the file.
pub(crate) fn next_data(file: &File, from: u64) -> Range<u64> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        // There is no data up to the end of the file.
        Err(Errno::NXIO) => return u64::MAX..u64::MAX,
        Err(_) => return from..u64::MAX,
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start));
    start..end.unwrap_or(u64::MAX)
}

/// Writes zeroes to a range of a file (`FALLOC_FL_ZERO_RANGE`), and keeps its length.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> Result<()> {
    let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    allocate(file, mode, offset, len)
}

/// Frees a range of a file (`FALLOC_FL_PUNCH_HOLE`), which then reads as zeroes.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    allocate(file, mode, offset, len)
}

/// Allocates pages or disk blocks for the holes in a range of a file.
///
/// Fails with `EFBIG` if the file was truncated and may not have that length (`RLIMIT_FSIZE`).
pub(crate) fn allocate_range(file: &File, offset: u64, len: u64) -> Result<()> {
    without_file_size_signal(|| {
        in_steps(offset, len, |offset, len| {
            Ok(rustix::fs::fallocate(
                file,
                FallocateFlags::KEEP_SIZE,
                offset,
                len,
            )?)
        })
    })
}

/// Allocates disk blocks for the holes in a range of a file, and copies shared blocks (XFS).
///
/// A later write to a block that another file shares would need space for the copy.
pub(crate) fn allocate_own_range(file: &File, offset: u64, len: u64) -> Result<()> {
    let mode = FallocateFlags::UNSHARE_RANGE | FallocateFlags::KEEP_SIZE;
    match allocate(file, mode, offset, len) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            allocate_range(file, offset, len)
        }
        result => result,
    }
}

/// Calls `work` for all of a range: at once, or in smaller steps after a signal has interrupted it.
///
/// Before Linux 6.18, tmpfs frees the pages of an interrupted fallocate(2) again. While a timer
/// raises signals, a repeated call of the same length might never succeed.
fn in_steps(offset: u64, len: u64, work: impl Fn(u64, u64) -> Result<()>) -> Result<()> {
    let (mut done, mut step) = (0u64, len);
    while done < len {
        let here = step.min(len.saturating_sub(done));
        match work(offset.saturating_add(done), here) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {
                step = (here / 2).next_multiple_of(page_size_u64());
            }
            result => {
                result?;
                done = done.saturating_add(here);
            }
        }
    }
    Ok(())
}

/// Calls fallocate(2), again if a signal interrupts it.
fn allocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> Result<()> {
    let allocate = || rustix::fs::fallocate(file, mode, offset, len);
    Ok(rustix::io::retry_on_intr(allocate)?)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use std::os::unix::fs::FileExt;
    use test_support::{refuse_calls_with, skipped};

    #[test]
    fn next_data_of_sparse_file_is_the_range_with_bytes() {
        let page = page_size_u64();
        let file = memfd(c"sparse", 3 * page, None).unwrap();
        file.write_all_at(&[1], page).unwrap();
        let none = u64::MAX..u64::MAX;
        for (from, expected) in [
            (0, page..2 * page),
            (page + 1, page + 1..2 * page),
            (2 * page, none.clone()),
            (3 * page, none.clone()),
            // Larger than any file offset.
            (u64::MAX >> 1, none.clone()),
            (u64::MAX - 1, none),
        ] {
            assert_eq!(next_data(&file, from), expected, "{from:#x}");
        }
    }

    /// An empty result would make `content` continue with the next byte.
    #[test]
    fn next_data_without_seek_data_is_the_rest_of_the_file() {
        let file = memfd(c"sparse", 3 * page_size_u64(), None).unwrap();
        // `SEEK_HOLE` is 4, so the filter lets it pass.
        let only_data = (2, libc::SEEK_DATA.unsigned_abs());
        match refuse_calls_with(libc::SYS_lseek, only_data, libc::EIO, || {
            next_data(&file, 5)
        }) {
            Ok(found) => assert_eq!(found, 5..u64::MAX),
            Err(error) => skipped(
                "next_data_without_seek_data_is_the_rest_of_the_file",
                format!("no seccomp filters: {error}"),
            ),
        }
    }

    #[test]
    fn in_steps_with_frequent_signals_covers_each_byte_once() {
        let (page, offset) = (page_size_u64(), 5 * page_size_u64());
        for (len, uninterrupted) in [(1000, 1000), (1000, 7), (1001, 1), (1, 1), (0, 1)] {
            let done = RefCell::new(Vec::new());
            // A call that takes longer than the time between two signals keeps nothing.
            let work = |at, len| {
                if len > uninterrupted * page {
                    return Err(Error::from_raw_os_error(libc::EINTR));
                }
                done.borrow_mut().push((at, len));
                Ok(())
            };
            in_steps(offset, len * page, work).unwrap();
            let mut next = offset;
            for (at, here) in done.into_inner() {
                assert_eq!(at, next);
                next = at + here;
            }
            assert_eq!(next, offset + len * page);
        }
        let full = |_, _| Err(Error::from_raw_os_error(libc::ENOSPC));
        let error = in_steps(0, page, full).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}
