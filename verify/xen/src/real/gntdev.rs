//! `/dev/xen/gntdev` by hand, to measure what the library adds to the system calls.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::environment::PAGE;

/// `_IOC(_IOC_NONE, 'G', number, size)` of the kernel's headers.
const fn request(number: libc::Ioctl, size: libc::Ioctl) -> libc::Ioctl {
    (size << 16) | (0x47 << 8) | number
}

const MAP_GRANT_REF: libc::Ioctl = request(0, 24);
const UNMAP_GRANT_REF: libc::Ioctl = request(1, 16);
const GRANT_COPY: libc::Ioctl = request(8, 16);

/// The flag of a copy whose source is a grant.
const SOURCE_IS_GRANT: u16 = 1;

#[repr(C)]
struct Map {
    count: u32,
    padding: u32,
    index: u64,
    domain: u32,
    reference: u32,
}

#[repr(C)]
struct Unmap {
    index: u64,
    count: u32,
    padding: u32,
}

#[repr(C)]
struct Segment {
    reference: u32,
    offset: u16,
    domain: u16,
    destination: *mut u8,
    len: u16,
    flags: u16,
    status: i16,
}

#[repr(C)]
struct Copy {
    count: u32,
    segments: *mut Segment,
}

/// A grant that is mapped for reading, and unmapped on drop.
#[derive(Debug)]
pub struct Mapped<'a> {
    device: &'a File,
    index: u64,
    page: NonNull<AtomicU32>,
}

impl<'a> Mapped<'a> {
    /// Maps a grant.
    pub fn new(device: &'a File, domain: u32, reference: u32) -> io::Result<Self> {
        let mut map = Map {
            count: 1,
            padding: 0,
            index: 0,
            domain,
            reference,
        };
        ioctl(device, MAP_GRANT_REF, &mut map)?;
        let offset = libc::off_t::try_from(map.index).map_err(io::Error::other)?;
        // SAFETY: a null address lets the kernel choose addresses that nothing else uses.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ,
                libc::MAP_SHARED,
                device.as_raw_fd(),
                offset,
            )
        };
        if page == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            release(device, map.index)?;
            return Err(error);
        }
        Ok(Self {
            device,
            index: map.index,
            page: NonNull::new(page.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?,
        })
    }

    /// Reads the first four bytes.
    #[expect(
        clippy::disallowed_methods,
        reason = "an atomic integer is read through it"
    )]
    pub fn read(&self) -> u32 {
        // SAFETY: the page is mapped as long as `self`, and begins at a multiple of 4. Its other
        // users have mappings of their own.
        unsafe { self.page.as_ref() }.load(Ordering::Relaxed)
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        // SAFETY: `new` made the mapping, and each borrow of it also borrows `self`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
        // A grant that stays mapped is visible in the grant table.
        let _ = release(self.device, self.index);
    }
}

/// Removes a grant from the table of the device.
fn release(device: &File, index: u64) -> io::Result<()> {
    let mut unmap = Unmap {
        index,
        count: 1,
        padding: 0,
    };
    ioctl(device, UNMAP_GRANT_REF, &mut unmap)
}

/// Reads the first `len` bytes of each of consecutive grants with one system call.
///
/// `bytes` has `len` bytes for each grant.
pub fn read_by_copying(
    device: &File,
    domain: u16,
    first: u32,
    len: u16,
    bytes: &mut [u8],
) -> io::Result<()> {
    let pieces = bytes.chunks_exact_mut(len.into());
    let mut segments: Vec<_> = (first..)
        .zip(pieces)
        .map(|(reference, piece)| Segment {
            reference,
            offset: 0,
            domain,
            destination: piece.as_mut_ptr(),
            len,
            flags: SOURCE_IS_GRANT,
            status: 0,
        })
        .collect();
    let mut copy = Copy {
        count: u32::try_from(segments.len()).map_err(io::Error::other)?,
        segments: segments.as_mut_ptr(),
    };
    ioctl(device, GRANT_COPY, &mut copy)?;
    match std::hint::black_box(segments)
        .iter()
        .find(|segment| segment.status != 0)
    {
        Some(segment) => Err(io::Error::other(format!("status {}", segment.status))),
        None => Ok(()),
    }
}

fn ioctl<T>(device: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: `argument` is the `repr(C)` structure that the request names, which the kernel reads
    // and may write. The addresses in it are those of live buffers of the lengths in it.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
