//! Files: made, sealed, looked at, and given holes.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Error, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{check, file_size_limit};

/// Makes an anonymous file of `len` bytes: of ordinary pages, or of huge ones of `huge` bytes. It can be sealed.
pub(crate) fn memfd(name: &CStr, len: u64, huge: Option<u64>) -> Result<File> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if let Some(size) = huge {
        // The size as a power of two, at bit 26 (memfd_create(2), "MFD_HUGE_2MB").
        flags |= libc::MFD_HUGETLB
            | size
                .trailing_zeros()
                .wrapping_shl(libc::MAP_HUGE_SHIFT.unsigned_abs());
    }
    // SAFETY: the kernel reads the name, up to its end.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    check(fd)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    if file_size_limit().is_some_and(|limit| len > limit) {
        // The kernel would send SIGXFSZ, which ends the process, before it answers that.
        return Err(Error::from_raw_os_error(libc::EFBIG));
    }
    file.set_len(len)?;
    Ok(file)
}

/// Seals a memfd: nobody can change its length any more, nor its seals.
pub(crate) fn seal_length(file: &File) -> Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: changes flags of a file.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })
}

/// Whether a descriptor can be written to, as a shared mapping is.
pub(crate) fn is_open_for_writing(file: &File) -> Result<bool> {
    // SAFETY: reads flags of a descriptor.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    Ok(flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// What `fstatfs(2)` says of a file.
pub(crate) fn file_system(file: &File) -> Result<FileSystem> {
    let mut answer = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `answer` has room for what fstatfs(2) writes.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr()) })?;
    // SAFETY: zeroes are a valid `statfs`, and the call has succeeded in filling it.
    let answer = unsafe { answer.assume_init() };
    // The fields are of different types for different targets.
    let (kind, block_size) = (i128::from(answer.f_type), i128::from(answer.f_bsize));
    Ok(FileSystem {
        kind,
        block_size: u64::try_from(block_size).unwrap_or(0),
        is_limited: answer.f_blocks != 0,
    })
}

/// What a file is on.
pub(crate) struct FileSystem {
    pub(crate) kind: i128,
    /// On hugetlbfs, the size of a page in bytes.
    pub(crate) block_size: u64,
    /// Whether it has an end: the kernel's own tmpfs, which memfds are on, has none.
    pub(crate) is_limited: bool,
}

/// The kind of file system that hugetlbfs is (`HUGETLBFS_MAGIC`, Linux `include/uapi/linux/magic.h`).
pub(crate) const HUGETLBFS: i128 = 0x958458f6;
/// The kind of file system that tmpfs is, and with it a memfd (`TMPFS_MAGIC`).
pub(crate) const TMPFS: i128 = 0x01021994;

/// Makes a range of a file zeroes. Its length stays.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> Result<()> {
    allocate(
        file,
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    )
}

/// Gives pages of a file back: they read as zeroes. Its length stays.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> Result<()> {
    allocate(
        file,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    )
}

/// Takes pages, or blocks of a disk, for a range of a file where there are none.
pub(crate) fn allocate_range(file: &File, offset: u64, len: u64) -> Result<()> {
    allocate(file, libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

fn allocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> Result<()> {
    let invalid = |_| Error::from_raw_os_error(libc::EINVAL);
    let offset = libc::off_t::try_from(offset).map_err(invalid)?;
    let len = libc::off_t::try_from(len).map_err(invalid)?;
    loop {
        // SAFETY: changes a file; memory that is mapped from it stays mapped, and its bytes may change at any time anyway.
        match check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            answer => return answer,
        }
    }
}

/// Whether a file is sealed against shrinking; false for one that cannot be.
pub(crate) fn cannot_shrink(file: &File) -> bool {
    // SAFETY: asks for flags.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}
