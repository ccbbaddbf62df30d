//! [`MmapRegion::from_range`]: regions of Xen guests.

use std::io;
use std::sync::Arc;

use super::mapping::Mapping;
use super::{Attributes, MmapRegionError, Result};
use crate::bitmap::{Bitmap, NewBitmap, BS};
use crate::mmap::builder::{check_bitmap, no_memory_for_bitmap};
use crate::mmap::xen::{MmapRange, MmapXenFlags};
use crate::mmap::{MmapRegion, MmapRegionBuilder};
use crate::volatile_memory::VolatileSlice;
use crate::xen::{
    domain, invalid, ForeignMapping, GrantMapping, MmapXen, References, XenMemory, REQUEST_PAGES,
};

/// The flags and the data of the range that a region was mapped from.
#[derive(Debug, Default)]
pub(super) struct XenKind {
    flags: u32,
    data: u32,
}

impl<B: NewBitmap> MmapRegion<B> {
    /// Maps the memory of a Xen guest that `range` describes.
    ///
    /// [`MmapXenFlags`] lists the kinds of memory, and [`MmapRange`] says how they differ.
    ///
    /// # Errors
    ///
    /// - [`MmapFlags`](MmapRegionError::MmapFlags) if the flags of the range are not a valid
    ///   combination of [`MmapXenFlags`];
    /// - [`InvalidFileOffset`](MmapRegionError::InvalidFileOffset) if foreign or granted memory has
    ///   no file, and [`InvalidOffsetLength`](MmapRegionError::InvalidOffsetLength) if the offset
    ///   in the file is not 0;
    /// - [`MapFixed`](MmapRegionError::MapFixed) if the flags of mmap(2) contain `MAP_FIXED`;
    /// - [`Mmap`](MmapRegionError::Mmap) with `EINVAL` for a size of 0, or a domain number of more
    ///   than 16 bits;
    /// - [`Mmap`](MmapRegionError::Mmap) with `EINVAL` for flags of mmap(2) with `MAP_ANONYMOUS`,
    ///   or a guest address that is not one of granted pages;
    /// - [`Mmap`](MmapRegionError::Mmap) with the error of the first frame that cannot be mapped,
    ///   of a page that is not granted (`EINVAL`), or of mmap(2) or ioctl(2);
    /// - [`Mmap`](MmapRegionError::Mmap) with `InvalidInput` if a new bitmap of type `B` does not
    ///   track all bytes of the region;
    /// - for a range that is not Xen memory, the errors of [`build`](Self::build).
    ///
    /// After an error, nothing stays mapped.
    pub fn from_range(range: MmapRange) -> Result<Self> {
        let known_flags = MmapXenFlags::from_bits(range.xen_flags);
        let xen_flags = known_flags
            .filter(MmapXenFlags::is_valid)
            .ok_or(MmapRegionError::MmapFlags(range.xen_flags))?;
        let xen = XenKind {
            flags: xen_flags.bits(),
            data: range.xen_data,
        };
        let mut region = if xen_flags.is_unix() {
            Self::from_unix_range(range)?
        } else {
            Self::from_xen_range(range, xen_flags)?
        };
        region.attributes.xen = xen;
        Ok(region)
    }

    fn from_unix_range(range: MmapRange) -> Result<Self> {
        let (prot, flags) = protection_and_flags(&range);
        let mut builder = MmapRegionBuilder::<()>::new(range.size)
            .with_mmap_prot(prot)
            .with_mmap_flags(flags);
        if let Some(file_offset) = range.file_offset {
            builder = builder.with_file_offset(file_offset);
        }
        if let Some(hugetlbfs) = range.hugetlbfs {
            builder = builder.with_hugetlbfs(hugetlbfs);
        }
        builder.build_with(|()| B::try_with_len(range.size))
    }

    fn from_xen_range(range: MmapRange, xen_flags: MmapXenFlags) -> Result<Self> {
        let (prot, flags) = protection_and_flags(&range);
        let file_offset = range
            .file_offset
            .as_ref()
            .ok_or(MmapRegionError::InvalidFileOffset)?;
        if file_offset.start() != 0 {
            return Err(MmapRegionError::InvalidOffsetLength);
        }
        if flags & FIXED != 0 {
            return Err(MmapRegionError::MapFixed);
        }
        let device = file_offset.arc();
        let (addr, size, protection) = (range.addr, range.size, (prot, flags));
        let make = || {
            // Without the device, the memory would be zeroes.
            if flags & libc::MAP_ANONYMOUS != 0 {
                return Err(invalid());
            }
            let domid = domain(range.xen_data)?;
            if xen_flags.is_foreign() {
                let mapping = ForeignMapping::new(device, domid, (addr, size), protection)?;
                return Ok(XenMemory::Foreign(mapping));
            }
            let references = References::of(addr, size)?;
            if xen_flags.mmap_in_advance() {
                let mapping =
                    GrantMapping::new(device, domid, &references, protection, REQUEST_PAGES)?;
                return Ok(XenMemory::Granted(mapping));
            }
            let device = Arc::clone(device);
            let memory = MmapXen::new(device, domid, references, protection, range.grant_copy);
            Ok(XenMemory::OnDemand(memory))
        };
        let memory: io::Result<XenMemory> = make();
        let memory = memory.map_err(MmapRegionError::Mmap)?;
        let bitmap = B::try_with_len(size).map_err(no_memory_for_bitmap)?;
        check_bitmap(&bitmap, size)?;
        Ok(MmapRegion {
            mapping: Mapping::of_xen(memory, size, prot),
            bitmap,
            file_offset: range.file_offset,
            attributes: Attributes {
                prot,
                flags,
                hugetlbfs: range.hugetlbfs,
                xen: XenKind::default(),
            },
            blocks: None,
            notifier: None,
            owner: None,
        })
    }
}

/// The flags of mmap(2) that would replace existing mappings, or map at address 0.
#[cfg(target_os = "linux")]
const FIXED: i32 = libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE;
#[cfg(not(target_os = "linux"))]
const FIXED: i32 = libc::MAP_FIXED;

/// Returns the protection and the flags of mmap(2), or their defaults.
fn protection_and_flags(range: &MmapRange) -> (i32, i32) {
    (
        range.prot.unwrap_or(libc::PROT_READ | libc::PROT_WRITE),
        range
            .flags
            .unwrap_or(libc::MAP_NORESERVE | libc::MAP_SHARED),
    )
}

impl<B> MmapRegion<B> {
    /// Returns the [`MmapXenFlags`] of the region: `UNIX` if no range named others.
    pub fn xen_mmap_flags(&self) -> u32 {
        self.attributes.xen.flags
    }

    /// Returns the ID of the domain that owns the memory.
    pub fn xen_mmap_data(&self) -> u32 {
        self.attributes.xen.data
    }
}

impl<B: Bitmap> MmapRegion<B> {
    /// Returns the `count` bytes at `offset` of memory that is mapped for each access.
    pub(in crate::mmap) fn on_demand_slice<'a>(
        &'a self,
        memory: &'a MmapXen,
        offset: usize,
        count: usize,
    ) -> Option<VolatileSlice<'a, BS<'a, B>>> {
        if offset.checked_add(count)? > self.size() {
            return None;
        }
        // The memory has no host address, and no access uses this one.
        let start = core::ptr::without_provenance_mut(memory.offset_from_first_page(offset));
        let bitmap = self.bitmap.slice_at(offset);
        // SAFETY: `start` is the start of the bytes in `memory`, which has them (just checked).
        // Each access maps them again, so no Rust reference covers them, and other accesses are
        // those of the guest, or atomic to the compiler.
        Some(unsafe { VolatileSlice::with_bitmap(start, count, bitmap, Some(memory)) })
    }
}

#[cfg(all(test, feature = "backend-bitmap"))]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::address::GuestAddress;
    use crate::bitmap::{AtomicBitmap, WithBitmapSlice};
    use crate::mmap::FileOffset;

    /// A bitmap that is a page too short.
    #[derive(Debug, Default)]
    struct Short(AtomicBitmap);

    impl<'a> WithBitmapSlice<'a> for Short {
        type S = BS<'a, AtomicBitmap>;
    }

    impl Bitmap for Short {
        fn mark_dirty(&self, offset: usize, len: usize) {
            self.0.mark_dirty(offset, len);
        }
        fn dirty_at(&self, offset: usize) -> bool {
            self.0.dirty_at(offset)
        }
        fn slice_at(&self, offset: usize) -> BS<'_, Self> {
            self.0.slice_at(offset)
        }
        fn tracks_range(&self, offset: usize, len: usize) -> bool {
            self.0.tracks_range(offset, len)
        }
    }

    impl NewBitmap for Short {
        fn with_len(len: usize) -> Self {
            Self(AtomicBitmap::with_len(len - 0x1000))
        }
    }

    #[test]
    fn from_range_with_bitmap_that_is_too_short_returns_error() {
        // Memory that is mapped at each access needs no request in advance.
        let lazy = (MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP).bits();
        let at = GuestAddress(1 << 63);
        let device = || FileOffset::new(File::open("/dev/null").unwrap(), 0);
        let ranges = [
            MmapRange::new_unix(0x4000, None, GuestAddress(0)),
            MmapRange::new(0x4000, Some(device()), at, lazy, 1),
        ];
        for range in ranges {
            assert!(MmapRegion::<AtomicBitmap>::from_range(range.clone()).is_ok());
            let error = MmapRegion::<Short>::from_range(range).unwrap_err();
            assert_eq!(
                error.to_string(),
                "cannot map memory: \
                 bitmap does not track all 0x4000 bytes of the region; use a larger bitmap"
            );
        }
    }
}
