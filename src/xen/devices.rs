//! The requests of the devices gntdev and privcmd. Only this module calls `ioctl(2)`.
//!
//! The layouts are those of Linux, `include/uapi/xen/gntdev.h` and `include/uapi/xen/privcmd.h`.
//! The argument of `MAP_GRANT_REF` has a variable length. It is an array of words: `count` and
//! padding, `index`, then `domid` and `ref` of each grant.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::{out_of_memory, PAGE_SIZE};
use crate::convert::to_usize;

/// Returns the number of a request: the size of its argument, the type and the number.
#[expect(
    clippy::as_conversions,
    reason = "the sizes of the arguments are less than 64, and a byte fits"
)]
const fn request(size: usize, kind: u8, number: u32) -> u32 {
    (size as u32) << 16 | (kind as u32) << 8 | number
}

/// The number has the size of a request for one page, whatever the number of pages.
const MAP_GRANT_REF: u32 = request(24, b'G', 0);
const UNMAP_GRANT_REF: u32 = request(size_of::<UnmapGrantRef>(), b'G', 1);
const GRANT_COPY: u32 = request(size_of::<GrantCopy>(), b'G', 8);
const MAP_BATCH: u32 = request(size_of::<MapBatch>(), b'P', 4);

#[repr(C)]
struct UnmapGrantRef {
    index: u64,
    count: u32,
    pad: u32,
}

#[repr(C)]
struct MapBatch {
    num: u32,
    dom: u16,
    pad: u16,
    addr: u64,
    frames: *const u64,
    errors: *mut i32,
}

#[repr(C)]
struct GrantCopy {
    count: u32,
    /// The C structure has a hole here. It is a field, so that it is initialised.
    pad: u32,
    segments: *mut CopySegment,
}

/// The source and the target of a copy between a granted page and memory of this process.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct CopySegment {
    source: CopyPlace,
    target: CopyPlace,
    len: u16,
    flags: u16,
    status: i16,
    /// The C structure has a hole here. It is a field, so that it is initialised.
    pad: u16,
}

/// A place in memory of this process, or in a granted page.
#[derive(Clone, Copy)]
#[repr(C)]
union CopyPlace {
    local: *mut u8,
    granted: GrantedPlace,
}

/// A place in a page that the domain `domid` granted.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct GrantedPlace {
    pub(super) reference: u32,
    pub(super) offset: u16,
    pub(super) domid: u16,
}

/// The source, or the target, of a [`CopySegment`] is a granted page.
const SOURCE_IS_GRANTED: u16 = 1;
const TARGET_IS_GRANTED: u16 = 2;

const _: () = {
    assert!(size_of::<UnmapGrantRef>() == 16);
    assert!(size_of::<MapBatch>() == 32);
    assert!(size_of::<GrantCopy>() == 16);
    assert!(size_of::<CopySegment>() == 24);
};

impl CopySegment {
    /// A segment that copies nothing, to fill an array.
    pub(super) const EMPTY: Self = {
        let nowhere = CopyPlace {
            local: core::ptr::null_mut(),
        };
        Self {
            source: nowhere,
            target: nowhere,
            len: 0,
            flags: 0,
            status: 0,
            pad: 0,
        }
    };

    /// Creates a copy of `len` bytes from a granted page.
    pub(super) fn from_grant(source: GrantedPlace, target: *mut u8, len: u16) -> Self {
        Self {
            source: CopyPlace { granted: source },
            target: CopyPlace { local: target },
            len,
            flags: SOURCE_IS_GRANTED,
            status: 0,
            pad: 0,
        }
    }

    /// Creates a copy of `len` bytes to a granted page.
    pub(super) fn to_grant(target: GrantedPlace, source: *const u8, len: u16) -> Self {
        Self {
            source: CopyPlace {
                local: source.cast_mut(),
            },
            target: CopyPlace { granted: target },
            len,
            flags: TARGET_IS_GRANTED,
            status: 0,
            pad: 0,
        }
    }

    /// Returns the number of bytes.
    pub(super) fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Returns whether the bytes were copied, after [`copy_grants`] has returned `Ok`.
    pub(super) fn is_done(&self) -> bool {
        self.status == 0
    }
}

/// Makes a request.
///
/// # Safety
///
/// The kernel may read and write the argument of the request `number` at `arg`, and all memory that
/// the argument names.
unsafe fn ioctl(device: &File, number: u32, arg: *mut c_void) -> io::Result<()> {
    #[expect(
        clippy::as_conversions,
        reason = "C libraries declare the parameter as different integers, and the number has 22 bits"
    )]
    let number = number as _;
    // SAFETY: the kernel accesses only the argument and the memory that it names, which the
    // contract of this function permits. That is so for gntdev and privcmd, and for devices that
    // do not know the request. `MmapRange::new` tells the user to pass no other device.
    match unsafe { libc::ioctl(device.as_raw_fd(), number, arg) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The number of grants whose request needs no allocation.
const INLINE: usize = 16;

/// Enters `count` grants of a domain, with consecutive references that start at `first`.
///
/// Returns the offset at which mmap(2) maps them. This request maps nothing, and does not check the
/// references.
pub(super) fn map_grants(device: &File, domid: u16, first: u32, count: u32) -> io::Result<u64> {
    // The request has 16 bytes, the number of grants and the offset, then 8 for each grant.
    let words = to_usize(u64::from(count)).saturating_add(2);
    let (mut few, mut many) = ([0u64; INLINE + 2], Vec::new());
    let request = match few.get_mut(..words) {
        Some(request) => request,
        None => {
            many.try_reserve_exact(words).map_err(|_| out_of_memory())?;
            many.resize(words, 0);
            many.as_mut_slice()
        }
    };
    let mut reference = first;
    for (at, word) in request.iter_mut().enumerate() {
        *word = match at {
            0 => pair(count, 0),
            1 => 0,
            _ => {
                let grant = pair(u32::from(domid), reference);
                // Wraps only after the last one.
                reference = reference.wrapping_add(1);
                grant
            }
        };
    }
    // The kernel writes 24 bytes, even for a request of no grants.
    if count == 0 {
        return Err(super::invalid());
    }
    // SAFETY: `request` is borrowed from a local variable, exclusively. The kernel reads
    // `16 + 8 * count` bytes, which is its size, and writes its first 24, for a `count` of at least
    // 1. It names no other memory.
    unsafe { ioctl(device, MAP_GRANT_REF, request.as_mut_ptr().cast()) }?;
    Ok(request.get(1).copied().unwrap_or_default())
}

/// Returns two fields of 32 bits, in their order in memory.
fn pair(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// Removes the `count` grants that [`map_grants`] entered at `index`.
///
/// The pages are unmapped once munmap(2) has also removed their mapping.
pub(super) fn unmap_grants(device: &File, index: u64, count: u32) -> io::Result<()> {
    let mut request = UnmapGrantRef {
        index,
        count,
        pad: 0,
    };
    let arg = core::ptr::from_mut(&mut request).cast();
    // SAFETY: `request` is a local variable of the request's type, and names no other memory.
    unsafe { ioctl(device, UNMAP_GRANT_REF, arg) }
}

/// Copies between granted pages and memory of this process.
///
/// After `Ok`, each segment records whether it [is done](CopySegment::is_done).
///
/// # Safety
///
/// The memory of this process in each segment must be valid for `len` bytes: for writes as a target
/// and for reads as a source.
pub(super) unsafe fn copy_grants(device: &File, segments: &mut [CopySegment]) -> io::Result<()> {
    let mut request = GrantCopy {
        count: u32::try_from(segments.len()).map_err(|_| super::invalid())?,
        pad: 0,
        segments: segments.as_mut_ptr(),
    };
    let arg = core::ptr::from_mut(&mut request).cast();
    // SAFETY: `request` is a local variable of the request's type. It names `segments`, which is
    // borrowed exclusively and has as many elements. They name memory that the kernel may access,
    // by the contract of this function.
    unsafe { ioctl(device, GRANT_COPY, arg) }
}

/// The error of a frame that is paged out.
pub(super) const NOT_PRESENT: i32 = -libc::ENOENT;

/// Maps frames of a domain at `addr`, and stores an error or 0 for each of them.
///
/// Returns `ENOENT` if frames are paged out. The other frames are then mapped. After an error of
/// the request as a whole, each frame has the error [`NOT_PRESENT`], unless the kernel has stored
/// others.
///
/// # Safety
///
/// The `frames.len()` pages of 4 KiB at `addr` must be in an area of the device `privcmd` that
/// nobody accesses.
pub(super) unsafe fn map_frames(
    device: &File,
    domid: u16,
    addr: *mut u8,
    frames: &[u64],
    errors: &mut [i32],
) -> io::Result<()> {
    if frames.len() != errors.len() {
        return Err(super::invalid());
    }
    // The kernel stores 0 for each frame that it maps. If it fails before that, none is mapped.
    errors.fill(NOT_PRESENT);
    let mut request = MapBatch {
        num: u32::try_from(frames.len()).map_err(|_| super::invalid())?,
        dom: domid,
        pad: 0,
        addr: u64::try_from(addr.addr()).map_err(|_| super::invalid())?,
        frames: frames.as_ptr(),
        errors: errors.as_mut_ptr(),
    };
    let arg = core::ptr::from_mut(&mut request).cast();
    // SAFETY: `request` is a local variable of the request's type. The kernel reads `num` frames
    // and writes `num` errors, whose slices are borrowed and have that length. It maps pages in an
    // area that nobody accesses, by the contract of this function.
    unsafe { ioctl(device, MAP_BATCH, arg) }
}

// The grants of a region are counted in pages of this size.
const _: () = assert!(PAGE_SIZE == 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_linux() {
        assert_eq!(MAP_GRANT_REF, 0x0018_4700);
        assert_eq!(UNMAP_GRANT_REF, 0x0010_4701);
        assert_eq!(GRANT_COPY, 0x0010_4708);
        assert_eq!(MAP_BATCH, 0x0020_5004);
    }

    /// Asserts the size, the alignment and the offsets of a type, and that it has no hole.
    macro_rules! assert_layout {
        ($type:ty, $size:literal, [$($field:ident: $of:ty = $offset:literal),*]) => {
            assert_eq!((size_of::<$type>(), align_of::<$type>()), ($size, 8));
            let mut end = 0;
            $(
                assert_eq!(offset_of!($type, $field), $offset, stringify!($field));
                assert_eq!(end, $offset, "a hole before {}", stringify!($field));
                end += size_of::<$of>();
            )*
            assert_eq!(end, $size, "a hole at the end");
        };
    }

    #[test]
    fn arguments_have_the_layout_of_linux_and_no_uninitialised_bytes() {
        use core::mem::offset_of;

        assert_layout!(UnmapGrantRef, 16, [index: u64 = 0, count: u32 = 8, pad: u32 = 12]);
        assert_layout!(MapBatch, 32, [
            num: u32 = 0, dom: u16 = 4, pad: u16 = 6, addr: u64 = 8, frames: *const u64 = 16,
            errors: *mut i32 = 24
        ]);
        assert_layout!(GrantCopy, 16, [count: u32 = 0, pad: u32 = 4, segments: *mut u8 = 8]);
        assert_layout!(CopySegment, 24, [
            source: CopyPlace = 0, target: CopyPlace = 8, len: u16 = 16, flags: u16 = 18,
            status: i16 = 20, pad: u16 = 22
        ]);
        assert_eq!(size_of::<CopyPlace>(), 8);
        assert_eq!(offset_of!(GrantedPlace, reference), 0);
        assert_eq!(offset_of!(GrantedPlace, offset), 4);
        assert_eq!(offset_of!(GrantedPlace, domid), 6);
        assert_eq!(size_of::<GrantedPlace>(), 8);
    }

    #[test]
    fn pair_has_fields_in_memory_order() {
        let bytes = pair(1, 2).to_ne_bytes();
        assert_eq!(bytes[..4], 1u32.to_ne_bytes());
        assert_eq!(bytes[4..], 2u32.to_ne_bytes());
    }
}
