//! System calls that bypass the symbols of the double.

#![expect(unsafe_code, reason = "makes system calls")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use libc::{c_int, c_void};

/// A place and a size in the address space of the process, as a caller of `mmap` names them.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub addr: usize,
    pub len: usize,
    pub prot: c_int,
    pub flags: c_int,
}

/// Creates an empty file without a name.
pub fn memfd(name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: the name is a C string, and the call accesses no other memory.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Returns the device and the inode of a descriptor.
pub fn inode(fd: c_int) -> Option<(u64, u64)> {
    // SAFETY: all bytes zero are a valid `stat`.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: fstat(2) writes one `stat` at this address.
    let result = unsafe { libc::fstat(fd, &mut stat) };
    (result == 0).then_some((stat.st_dev, stat.st_ino))
}

/// Calls mmap(2).
///
/// # Safety
///
/// Nothing relies on memory at the place, if the flags contain `MAP_FIXED`.
pub unsafe fn mmap(place: Place, fd: c_int, offset: i64) -> Result<usize, i32> {
    // SAFETY: only `MAP_FIXED` replaces memory, which nothing relies on (this function's contract).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            place.addr,
            place.len,
            place.prot,
            place.flags,
            fd,
            offset,
        )
    };
    usize::try_from(result).map_err(|_| errno())
}

/// Calls munmap(2).
///
/// # Safety
///
/// Nothing relies on the memory.
pub unsafe fn munmap(addr: usize, len: usize) -> Result<(), i32> {
    // SAFETY: nothing relies on the memory (this function's contract).
    match unsafe { libc::syscall(libc::SYS_munmap, addr, len) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

/// Calls ioctl(2).
///
/// # Safety
///
/// The argument is valid for the request.
pub unsafe fn ioctl(fd: c_int, request: u32, argument: *mut c_void) -> Result<c_int, i32> {
    // SAFETY: the argument is valid for the request (this function's contract).
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    match c_int::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(errno()),
    }
}

/// Moves bytes between a file and memory that the caller of an ioctl has named.
///
/// # Safety
///
/// If `to_memory`, nothing relies on the contents of the memory.
pub unsafe fn transfer(
    file: &File,
    at: u64,
    memory: *mut c_void,
    len: usize,
    to_memory: bool,
) -> Result<(), i32> {
    let at = i64::try_from(at).map_err(|_| libc::EINVAL)?;
    let fd = file.as_raw_fd();
    let moved = if to_memory {
        // SAFETY: the system checks the memory, and nothing relies on its contents (this function's
        // contract).
        unsafe { libc::pread(fd, memory, len, at) }
    } else {
        // SAFETY: the system checks the memory, and only reads it.
        unsafe { libc::pwrite(fd, memory, len, at) }
    };
    match usize::try_from(moved) {
        Ok(moved) if moved == len => Ok(()),
        _ => Err(libc::EFAULT),
    }
}

/// Returns the calling thread's `errno`.
pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Sets the calling thread's `errno`.
pub fn set_errno(value: i32) {
    // SAFETY: the function returns a pointer to a number of the calling thread.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: the pointer is valid, and no other thread uses it.
    unsafe { *location = value };
}
