//! [`MmapRegion::from_range`]: regions of Xen guests.

use std::io;

use super::{MmapRegion, MmapRegionBuilder, MmapRegionError, Result};
use crate::bitmap::NewBitmap;
use crate::mmap::xen::{MmapRange, MmapXenFlags};

impl<B: NewBitmap> MmapRegion<B> {
    /// Maps the memory of a Xen guest that `range` describes.
    ///
    /// # Errors
    ///
    /// - [`MmapFlags`](MmapRegionError::MmapFlags) if the flags of the range are not a valid
    ///   combination of [`MmapXenFlags`];
    /// - for a range that is not Xen memory, the errors of [`build`](Self::build).
    pub fn from_range(range: MmapRange) -> Result<Self> {
        let flags = MmapXenFlags::from_bits(range.xen_flags).filter(MmapXenFlags::is_valid);
        let flags = flags.ok_or(MmapRegionError::MmapFlags(range.xen_flags))?;
        let mut region = if flags.is_unix() {
            Self::from_unix_range(range)?
        } else {
            let error = io::Error::from(io::ErrorKind::Unsupported);
            return Err(MmapRegionError::Mmap(error));
        };
        region.xen_flags = flags.bits();
        Ok(region)
    }

    fn from_unix_range(range: MmapRange) -> Result<Self> {
        let MmapRange { prot, flags, .. } = range;
        let mut builder = MmapRegionBuilder::<()>::new(range.size)
            .with_mmap_prot(prot.unwrap_or(libc::PROT_READ | libc::PROT_WRITE))
            .with_mmap_flags(flags.unwrap_or(libc::MAP_NORESERVE | libc::MAP_SHARED));
        if let Some(place) = range.file_offset {
            builder = builder.with_file_offset(place);
        }
        if let Some(hugetlbfs) = range.hugetlbfs {
            builder = builder.with_hugetlbfs(hugetlbfs);
        }
        let mut region = builder.build_with(|()| B::with_len(range.size))?;
        region.xen_data = range.xen_data;
        Ok(region)
    }
}

impl<B> MmapRegion<B> {
    /// Returns the [`MmapXenFlags`] of the region: `UNIX` if no range named others.
    pub fn xen_mmap_flags(&self) -> u32 {
        self.xen_flags
    }

    /// Returns the number of the domain whose memory it is, as it was passed in the range.
    pub fn xen_mmap_data(&self) -> u32 {
        self.xen_data
    }
}
