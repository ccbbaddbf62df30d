//! [`MmapRegionBuilder`]: creates an [`MmapRegion`] with options.

use std::any::Any;
use std::collections::TryReserveError;
use std::fmt::Debug;
use std::io;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;

use super::owner::Owner;
use super::system::{self, Options};
use super::{MmapRegion, MmapRegionError, PluggedBlocks};
use crate::bitmap::Bitmap;
use crate::guest_memory::{FileOffset, Permissions};
use crate::listeners::RegionNotifier;

type Result<T> = std::result::Result<T, MmapRegionError>;

/// A builder of an [`MmapRegion`], for regions that need more than a size and a file.
///
/// By default, the mapping can be read and written. Without a file, it is private and filled with
/// zeroes. With a file, it is shared with the file. The caller states the protection and the flags
/// of an [existing mapping](Self::with_raw_mmap_pointer).
///
/// # Examples
///
/// A region of a file that can only be read, such as a firmware image:
///
/// ```
/// # #[cfg(unix)] {
/// use vm_memory::mmap::MmapRegionBuilder;
/// use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
///
/// let firmware = std::fs::File::open("/proc/self/exe")?;
/// let mapping = MmapRegionBuilder::<()>::new(0x1000)
///     .with_file_offset(FileOffset::new(firmware, 0))
///     .with_mmap_prot(libc::PROT_READ)
///     .build()?;
/// let region = GuestRegionMmap::new(mapping, GuestAddress(0xffff_0000)).unwrap();
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(vec![region])?;
///
/// memory.read_obj::<u32>(GuestAddress(0xffff_0000))?;
/// assert!(memory.write_obj(0u32, GuestAddress(0xffff_0000)).is_err());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "mmap")]
#[doc(alias = "memfd")]
#[derive(Debug)]
pub struct MmapRegionBuilder<B = ()> {
    size: usize,
    /// The options of this system. Its module has the methods that set them.
    pub(super) options: Options,
    file_offset: Option<FileOffset>,
    raw_ptr: Option<*mut u8>,
    owner: Option<Owner>,
    blocks: Option<Arc<PluggedBlocks>>,
    notifier: Option<Arc<RegionNotifier>>,
    bitmap: B,
}

impl<B: Bitmap + Default> MmapRegionBuilder<B> {
    /// Starts a mapping of `size` bytes with the default bitmap.
    ///
    /// [`build`](Self::build) grows the bitmap to the size of the mapping.
    pub fn new(size: usize) -> Self {
        Self::new_with_bitmap(size, B::default())
    }
}

impl<B: Bitmap> MmapRegionBuilder<B> {
    /// Starts a mapping of `size` bytes, whose writes are marked in `bitmap`.
    pub fn new_with_bitmap(size: usize, bitmap: B) -> Self {
        MmapRegionBuilder {
            size,
            options: Options::default(),
            file_offset: None,
            raw_ptr: None,
            owner: None,
            blocks: None,
            notifier: None,
            bitmap,
        }
    }

    /// Sets the accesses that the mapping permits. They are read and write accesses by default.
    ///
    /// Memory that can be written can be read as well. A file that is open for reading only needs
    /// [`Permissions::Read`].
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::mmap::MmapRegionBuilder;
    /// use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, Permissions};
    ///
    /// let firmware = std::fs::File::open(std::env::current_exe()?)?;
    /// let mapping = MmapRegionBuilder::<()>::new(0x1000)
    ///     .with_file_offset(FileOffset::new(firmware, 0))
    ///     .with_permissions(Permissions::Read)
    ///     .build()?;
    /// let region = GuestRegionMmap::new(mapping, GuestAddress(0xffff_0000)).unwrap();
    /// assert_eq!(region.allowed_access(), Permissions::Read);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn with_permissions(mut self, permissions: Permissions) -> Self {
        self.options.set_permissions(permissions);
        self
    }

    /// Maps a file.
    ///
    /// The mapping is shared with it, unless `with_mmap_flags` sets other flags. The length of a
    /// [block device](crate::mmap#devices-that-are-too-short) is not checked.
    ///
    /// With `MAP_ANONYMOUS` in the flags, `mmap(2)` ignores the file, and the memory is not the
    /// file's. The region still keeps the file: see [`file_offset`](MmapRegion::file_offset).
    pub fn with_file_offset(mut self, file_offset: FileOffset) -> Self {
        self.file_offset = Some(file_offset);
        self
    }

    /// Uses an existing mapping, which stays mapped when the region is dropped.
    ///
    /// State the protection that the mapping was created with: the region then refuses accesses
    /// that it does not permit. A region whose protection is not stated, which is the default,
    /// refuses none. A protection with neither `PROT_READ` nor `PROT_WRITE` counts as not stated.
    /// No check uses the flags. [`prot`](MmapRegion::prot) and [`flags`](MmapRegion::flags) return
    /// what was stated.
    ///
    /// Several regions may share a mapping. A write to one is then visible in the others, but only
    /// the region that was written marks it dirty.
    ///
    /// # Safety
    ///
    /// 1. `raw_ptr` must point to a mapping of at least the region's size, with the region's
    ///    protection if that is stated. With [plugged blocks](Self::with_plugged_blocks), this must
    ///    hold for each block while it is plugged. Its owner may make pages inaccessible at times:
    ///    an access to them [faults](crate::fault).
    /// 2. The mapping must stay in place until the region and all slices of it are dropped. Its
    ///    [owner](Self::with_owner) may then unmap it.
    /// 3. While the region or a slice of it exists, no Rust reference may refer to any byte of the
    ///    mapping.
    pub unsafe fn with_raw_mmap_pointer(mut self, raw_ptr: *mut u8) -> Self {
        self.raw_ptr = Some(raw_ptr);
        self
    }

    /// Keeps `owner` alive until the region is dropped.
    ///
    /// The owner of an existing mapping ([`with_raw_mmap_pointer`](Self::with_raw_mmap_pointer))
    /// keeps it in place, and may describe it. [`MmapRegion::owner`] returns it.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    /// use vm_memory::mmap::MmapRegionBuilder;
    /// use vm_memory::MmapRegion;
    ///
    /// let mapping: Arc<MmapRegion> = Arc::new(MmapRegion::new(0x2000)?);
    /// let builder = MmapRegionBuilder::<()>::new(0x1000).with_owner(Arc::clone(&mapping));
    /// // SAFETY: the first page of `mapping` is readable and writable. The region keeps `mapping`,
    /// // which hands out no Rust references.
    /// let builder = unsafe { builder.with_raw_mmap_pointer(mapping.as_ptr()) };
    /// let region = builder.build()?;
    /// assert_eq!(region.owner::<MmapRegion>().map(|owner| owner.size()), Some(0x2000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn with_owner<T>(mut self, owner: Arc<T>) -> Self
    where
        T: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe,
    {
        self.owner = Some(Owner::new(owner));
        self
    }

    /// Limits accesses to the plugged blocks of the mapping.
    ///
    /// Bytes past the end of `blocks` are not accessible. See [`PluggedBlocks`] for an example.
    #[doc(alias = "hotplug")]
    #[doc(alias = "virtio-mem")]
    #[must_use]
    pub fn with_plugged_blocks(mut self, blocks: Arc<PluggedBlocks>) -> Self {
        self.blocks = Some(blocks);
        self
    }

    /// Tells [listeners](crate::listeners) of changes of the region's pages.
    ///
    /// The code that changes the pages announces it by `notifier`, also changes of
    /// [plugged blocks](Self::with_plugged_blocks).
    #[must_use]
    pub fn with_notifier(mut self, notifier: Arc<RegionNotifier>) -> Self {
        self.notifier = Some(notifier);
        self
    }

    /// Maps the memory and creates the region.
    ///
    /// A bitmap that can [grow](Bitmap::grow_to_track), and that of a slice, is grown until it
    /// tracks the whole region. One that tracks less is refused: its marks would be lost.
    ///
    /// # Errors
    ///
    /// - [`MapFixed`](super::MmapRegionError::MapFixed) if the flags contain `MAP_FIXED` and the
    ///   mapping does not exist yet;
    /// - [`MappingPastEof`](super::MmapRegionError::MappingPastEof) if a regular file ends before
    ///   the last page of the mapping;
    /// - [`InvalidOffsetLength`](super::MmapRegionError::InvalidOffsetLength) if the mapping of a
    ///   file would end past the largest file offset;
    /// - `InvalidPointer` if an existing mapping does not start at a page boundary; with the
    ///   feature `xen`, [`Mmap`](super::MmapRegionError::Mmap) with `EINVAL`;
    /// - [`Mmap`](super::MmapRegionError::Mmap) with the error of mmap(2) or fstat(2), such as
    ///   `EINVAL` for a size of 0;
    /// - [`Mmap`](super::MmapRegionError::Mmap) with `InvalidInput` for a bitmap that does not
    ///   track the whole region, even if only memory to grow it is missing.
    ///
    /// On Windows, the errors are those of [`MmapRegion::new`] and [`MmapRegion::from_file`]. The
    /// kind is `InvalidInput` for such a bitmap, and for an existing mapping that does not start at
    /// a page boundary.
    pub fn build(self) -> Result<MmapRegion<B>> {
        let size = self.size;
        self.build_with(|mut bitmap| {
            bitmap.grow_to_track(size);
            Ok(bitmap)
        })
    }

    /// Creates the region, with the bitmap that `bitmap` creates from the builder's.
    ///
    /// `bitmap` is called after the mapping was made. A size that exceeds all memory then fails as
    /// a mapping, with an error, before a bitmap of that size is allocated.
    pub(super) fn build_with<R: Bitmap>(
        self,
        bitmap: impl FnOnce(B) -> std::result::Result<R, TryReserveError>,
    ) -> Result<MmapRegion<R>> {
        let file_offset = self.file_offset.as_ref();
        let (mut mapping, attributes) = self.options.map(self.size, self.raw_ptr, file_offset)?;
        if self.blocks.is_some() {
            mapping.close();
        }
        let bitmap = bitmap(self.bitmap).map_err(no_memory_for_bitmap)?;
        check_bitmap(&bitmap, self.size)?;
        Ok(MmapRegion {
            mapping,
            bitmap,
            file_offset: self.file_offset,
            attributes,
            blocks: self.blocks,
            notifier: self.notifier,
            owner: self.owner,
        })
    }
}

/// Checks that a bitmap tracks all bytes of a region of `size` bytes.
pub(super) fn check_bitmap(bitmap: &impl Bitmap, size: usize) -> Result<()> {
    if bitmap.tracks_range(0, size) {
        return Ok(());
    }
    let problem =
        format!("bitmap does not track all {size:#x} bytes of the region; use a larger bitmap");
    let error = io::Error::new(io::ErrorKind::InvalidInput, problem);
    Err(system::error(error))
}

/// Returns the error of a region whose bitmap could not be allocated.
#[cold]
pub(super) fn no_memory_for_bitmap(error: TryReserveError) -> MmapRegionError {
    system::error(io::Error::new(io::ErrorKind::OutOfMemory, error))
}
