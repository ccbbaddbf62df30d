//! `/dev/xen/privcmd`: hypercalls, and mappings of another domain's memory and grant table.
//!
//! Only the tests use this module, to create and inspect the domain. The library has its own code
//! for foreign mappings, which the scenarios test.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::environment::PAGE;

/// `_IOC(_IOC_NONE, 'P', number, size)` of the kernel's headers.
const fn request(number: libc::Ioctl, size: libc::Ioctl) -> libc::Ioctl {
    (size << 16) | (0x50 << 8) | number
}

const HYPERCALL: libc::Ioctl = request(0, 48);
const MMAPBATCH_V2: libc::Ioctl = request(4, 32);
const MMAP_RESOURCE: libc::Ioctl = request(7, 32);

/// The kind of the resource: the grant table of a domain.
const RESOURCE_GRANT_TABLE: u32 = 1;
/// The part of the grant table that the domain writes.
const GRANT_TABLE_SHARED: u32 = 0;

/// The argument of a hypercall.
#[repr(C)]
struct Hypercall {
    number: u64,
    arguments: [u64; 5],
}

/// The argument of `IOCTL_PRIVCMD_MMAPBATCH_V2`.
#[repr(C)]
struct Batch {
    count: u32,
    domain: u16,
    address: *mut u8,
    frames: *const u64,
    errors: *mut i32,
}

/// The argument of `IOCTL_PRIVCMD_MMAP_RESOURCE`.
#[repr(C)]
struct Resource {
    domain: u16,
    kind: u32,
    id: u32,
    first: u32,
    count: u64,
    address: *mut u8,
}

/// The open device.
#[derive(Debug)]
pub struct Privcmd {
    file: File,
}

impl Privcmd {
    /// Opens the device.
    ///
    /// # Errors
    ///
    /// Returns an error if this is not a privileged domain of Xen.
    pub fn open() -> io::Result<Self> {
        let file = super::open(super::PRIVCMD)?;
        Ok(Self { file })
    }

    /// Executes the hypercall `number`, and returns the result.
    ///
    /// An argument may be the address of a structure. The hypervisor reads and writes it, so its
    /// pages must be present and writable.
    ///
    /// # Errors
    ///
    /// Returns the error of the hypervisor, which uses the error numbers of Linux.
    pub fn hypercall(&self, number: u64, arguments: [u64; 2]) -> io::Result<i64> {
        let mut call = Hypercall {
            number,
            arguments: [arguments[0], arguments[1], 0, 0, 0],
        };
        self.ioctl(HYPERCALL, &mut call).map(i64::from)
    }

    /// Maps `count` frames of `domain`, starting at `first`, for reading and writing.
    ///
    /// # Errors
    ///
    /// Returns an error if the device refuses the request, or if a frame cannot be mapped.
    pub fn map_frames(&self, domain: u16, first: u64, count: usize) -> io::Result<Mapping> {
        let mapping = self.reserve(count)?;
        let frames: Vec<u64> = (first..).take(count).collect();
        let mut errors = vec![0i32; count];
        let mut batch = Batch {
            count: u32::try_from(count).map_err(io::Error::other)?,
            domain,
            address: mapping.as_ptr(),
            frames: frames.as_ptr(),
            errors: errors.as_mut_ptr(),
        };
        self.ioctl(MMAPBATCH_V2, &mut batch)?;
        match errors.iter().find(|error| **error != 0) {
            Some(error) => Err(io::Error::from_raw_os_error(-error)),
            None => Ok(mapping),
        }
    }

    /// Maps the first `count` frames of the grant table of `domain`.
    ///
    /// # Errors
    ///
    /// Returns an error if the device or the hypervisor refuses the request.
    pub fn map_grant_table(&self, domain: u16, count: usize) -> io::Result<Mapping> {
        let mapping = self.reserve(count)?;
        let mut resource = Resource {
            domain,
            kind: RESOURCE_GRANT_TABLE,
            id: GRANT_TABLE_SHARED,
            first: 0,
            count: u64::try_from(count).map_err(io::Error::other)?,
            address: mapping.as_ptr(),
        };
        self.ioctl(MMAP_RESOURCE, &mut resource)?;
        Ok(mapping)
    }

    /// Maps the device, to reserve addresses at which a request can map frames.
    fn reserve(&self, count: usize) -> io::Result<Mapping> {
        let len = count.checked_mul(PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a null address lets the kernel choose addresses that nothing else uses.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                self.file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(address.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Mapping { start, len })
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
        // SAFETY: `argument` is the `repr(C)` structure of the request, which the kernel reads and
        // may write. Each address in it is that of a live buffer of the stated length, or of a
        // mapping of this device that the caller owns.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }
}

/// Returns the address of a structure that the hypervisor reads or writes.
pub fn address<T>(structure: &mut T) -> u64 {
    let address = std::ptr::from_mut(structure).expose_provenance();
    u64::try_from(address).expect("an address has 64 bits")
}

/// A mapping. Dropping it unmaps it.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Returns the first byte of the mapping.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Returns the length of the mapping.
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` are those of a mapping that `reserve` created and nothing else
        // unmaps. Borrows of its bytes ended with the borrow of `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
