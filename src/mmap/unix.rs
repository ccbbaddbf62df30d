//! Mappings by `mmap(2)`.

use std::any::Any;
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::ptr::null_mut;
use std::sync::Arc;

use super::blocks::PluggedBlocks;
use super::owner::Owner;
use crate::bitmap::{Bitmap, BitmapSlice, NewBitmap, BS};
use crate::guest_memory::{FileOffset, Permissions};
use crate::page_size::host_page_size;
use crate::volatile_memory::{self, VolatileMemory, VolatileSlice};

/// Why there is no mapping.
#[derive(Debug, thiserror::Error)]
pub enum MmapRegionError {
    /// Offset and length do not add up to a place in a file.
    #[error("offset and length of the mapping are past the greatest file size")]
    InvalidOffsetLength,
    /// The pointer to a mapping made elsewhere is not at the start of a page.
    #[error("the pointer to the mapping is not aligned to a page")]
    InvalidPointer,
    /// `MAP_FIXED` would replace whatever is mapped there.
    #[error("MAP_FIXED is refused: it would replace what is mapped there")]
    MapFixed,
    /// Two mappings have bytes of a file in common.
    #[error("the mappings overlap in their file")]
    MappingOverlap,
    /// The file lacks whole pages of the mapping.
    #[error("the file ends before the mapping does")]
    MappingPastEof,
    /// The system refused the mapping.
    #[error("the mapping failed: {0}")]
    Mmap(io::Error),
}

type Result<T> = std::result::Result<T, MmapRegionError>;

/// Makes an [`MmapRegion`], with everything about it to choose.
///
/// Unless told otherwise, the mapping can be read and written; it is private and of zeroes, or shared with the file if there is
/// one.
///
/// ```
/// use vm_memory::bitmap::Bitmap;
/// use vm_memory::mmap::MmapRegionBuilder;
/// use vm_memory::VolatileMemory;
///
/// let region = MmapRegionBuilder::<()>::new(0x1000).build()?;
/// region.get_ref::<u32>(0)?.store(1);
/// assert_eq!(region.prot(), libc::PROT_READ | libc::PROT_WRITE);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MmapRegionBuilder<B = ()> {
    size: usize,
    prot: i32,
    flags: Option<i32>,
    file_offset: Option<FileOffset>,
    raw_ptr: Option<*mut u8>,
    hugetlbfs: Option<bool>,
    owner: Option<Owner>,
    blocks: Option<Arc<PluggedBlocks>>,
    bitmap: B,
}

impl<B: Bitmap + Default> MmapRegionBuilder<B> {
    /// Begins with a mapping of `size` bytes. Its bitmap is the default one, which [`build`](Self::build) grows to the mapping's size.
    pub fn new(size: usize) -> Self {
        Self::new_with_bitmap(size, B::default())
    }
}

impl<B: Bitmap> MmapRegionBuilder<B> {
    /// Begins with a mapping of `size` bytes, whose writes are marked in `bitmap`.
    pub fn new_with_bitmap(size: usize, bitmap: B) -> Self {
        MmapRegionBuilder {
            size,
            prot: libc::PROT_READ | libc::PROT_WRITE,
            flags: None,
            file_offset: None,
            raw_ptr: None,
            hugetlbfs: None,
            owner: None,
            blocks: None,
            bitmap,
        }
    }

    /// Sets the protection: `PROT_READ`, `PROT_WRITE` and the like.
    pub fn with_mmap_prot(mut self, prot: i32) -> Self {
        self.prot = prot;
        self
    }

    /// Sets the flags: `MAP_SHARED`, `MAP_PRIVATE`, `MAP_ANONYMOUS` and the like.
    pub fn with_mmap_flags(mut self, flags: i32) -> Self {
        self.flags = Some(flags);
        self
    }

    /// Maps a file. Unless flags are given as well, the mapping is shared with it.
    pub fn with_file_offset(mut self, file_offset: FileOffset) -> Self {
        self.file_offset = Some(file_offset);
        self
    }

    /// Notes whether the memory lies on huge pages of hugetlbfs. Nothing but
    /// [`is_hugetlbfs`](MmapRegion::is_hugetlbfs) goes by it.
    pub fn with_hugetlbfs(mut self, hugetlbfs: bool) -> Self {
        self.hugetlbfs = Some(hugetlbfs);
        self
    }

    /// Takes a mapping that was made elsewhere, and that stays when the region is dropped.
    ///
    /// Protection and flags should be the ones that it was made with; accesses are refused by them.
    ///
    /// # Safety
    ///
    /// `raw_ptr` must point to a mapping of at least the region's size, with the region's protection, which stays in place until the region
    /// and every slice of it are gone; it may go away with an [owner](Self::with_owner). No reference of Rust's may cover any of it.
    pub unsafe fn with_raw_mmap_pointer(mut self, raw_ptr: *mut u8) -> Self {
        self.raw_ptr = Some(raw_ptr);
        self
    }

    /// Keeps `owner` until the region is gone: what a mapping made elsewhere ([`with_raw_mmap_pointer`](Self::with_raw_mmap_pointer)) stays
    /// in place by, and what is to be known of it. [`MmapRegion::owner`] hands it out again.
    pub fn with_owner<T>(mut self, owner: Arc<T>) -> Self
    where
        T: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe,
    {
        self.owner = Some(Owner::new(owner));
        self
    }

    /// Lets accesses reach the plugged blocks of the mapping only.
    ///
    /// What is in no block (if `blocks` are of a smaller mapping) is not reached.
    pub fn with_plugged_blocks(mut self, blocks: Arc<PluggedBlocks>) -> Self {
        self.blocks = Some(blocks);
        self
    }

    /// Makes the region.
    ///
    /// The bitmap is grown, if it can grow, until it tracks the whole region.
    ///
    /// # Errors
    ///
    /// [`MmapRegionError::MapFixed`] if the flags have `MAP_FIXED` (for a mapping made here);
    /// [`MmapRegionError::MappingPastEof`] if the file lacks whole pages of the mapping; [`MmapRegionError::InvalidPointer`] if a
    /// mapping made elsewhere does not begin with a page; [`MmapRegionError::Mmap`] with what the system answered.
    pub fn build(self) -> Result<MmapRegion<B>> {
        let default_flags = match self.file_offset {
            Some(_) => libc::MAP_NORESERVE | libc::MAP_SHARED,
            None => libc::MAP_ANONYMOUS | libc::MAP_PRIVATE,
        };
        let flags = self.flags.unwrap_or(default_flags);
        let mut mapping = match self.raw_ptr {
            Some(addr) => Mapping::foreign(addr, self.size, self.prot)?,
            None => Mapping::new(self.size, self.prot, flags, self.file_offset.as_ref())?,
        };
        if self.blocks.is_some() {
            mapping.host.open = 0;
        }
        let mut bitmap = self.bitmap;
        bitmap.grow_to_track(self.size);
        Ok(MmapRegion {
            mapping,
            bitmap,
            file_offset: self.file_offset,
            prot: self.prot,
            flags,
            hugetlbfs: self.hugetlbfs,
            blocks: self.blocks,
            owner: self.owner,
        })
    }
}

/// What a mapping with this protection lets accesses do.
///
/// No processor that Linux runs on can write a page without reading it, so that `PROT_WRITE` grants both (mmap(2), "NOTES").
fn permissions_of(prot: i32) -> Permissions {
    let has = |bit: i32| prot & bit != 0;
    Permissions::of(
        has(libc::PROT_READ | libc::PROT_WRITE),
        has(libc::PROT_WRITE),
    )
}

/// A mapping of this process, with a bitmap that marks its written pages.
///
/// It is unmapped when it is dropped, unless it was made elsewhere ([`build_raw`](Self::build_raw)); then its
/// [owner](MmapRegionBuilder::with_owner) is dropped, if it has one.
///
/// ```
/// use vm_memory::{Bytes, MmapRegion, VolatileMemory};
///
/// let region: MmapRegion = MmapRegion::new(0x1000)?;
/// region.as_volatile_slice().write_slice(b"boot", 0x10)?;
/// region.unmap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MmapRegion<B = ()> {
    mapping: Mapping,
    bitmap: B,
    file_offset: Option<FileOffset>,
    prot: i32,
    flags: i32,
    hugetlbfs: Option<bool>,
    /// Which blocks can be reached; all of the mapping, if there are none.
    blocks: Option<Arc<PluggedBlocks>>,
    owner: Option<Owner>,
}

impl<B: NewBitmap> MmapRegion<B> {
    /// Maps `size` bytes of zeroes, private to this process.
    ///
    /// # Errors
    ///
    /// What the system answered; `EINVAL` for 0 bytes.
    pub fn new(size: usize) -> Result<Self> {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE;
        Self::build(None, size, libc::PROT_READ | libc::PROT_WRITE, flags)
    }

    /// Maps `size` bytes of a file, shared with everybody who maps it.
    ///
    /// # Errors
    ///
    /// [`MmapRegionError::MappingPastEof`] if the file lacks whole pages of that; [`MmapRegionError::Mmap`] with what the
    /// system answered.
    pub fn from_file(file_offset: FileOffset, size: usize) -> Result<Self> {
        let flags = libc::MAP_NORESERVE | libc::MAP_SHARED;
        Self::build(
            Some(file_offset),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
        )
    }

    /// Maps `size` bytes, of a file or not, with a protection and flags of `mmap(2)`.
    ///
    /// # Errors
    ///
    /// As [`MmapRegionBuilder::build`].
    pub fn build(
        file_offset: Option<FileOffset>,
        size: usize,
        prot: i32,
        flags: i32,
    ) -> Result<Self> {
        let mapping = Mapping::new(size, prot, flags, file_offset.as_ref())?;
        // Only now that the mapping is there: a size beyond all memory fails there, and with an error.
        let bitmap = B::with_len(size);
        Ok(MmapRegion {
            mapping,
            bitmap,
            file_offset,
            prot,
            flags,
            hugetlbfs: None,
            blocks: None,
            owner: None,
        })
    }

    /// Takes a mapping that was made elsewhere, and that stays when the region is dropped.
    ///
    /// # Errors
    ///
    /// [`MmapRegionError::InvalidPointer`] if `addr` is not the start of a page.
    ///
    /// # Safety
    ///
    /// `addr` must point to a mapping of at least `size` bytes, made with `prot` and `flags`, which stays in place until the region and every
    /// slice of it are gone. No reference of Rust's may cover any of it.
    pub unsafe fn build_raw(addr: *mut u8, size: usize, prot: i32, flags: i32) -> Result<Self> {
        let mapping = Mapping::foreign(addr, size, prot)?;
        let bitmap = B::with_len(size);
        Ok(MmapRegion {
            mapping,
            bitmap,
            file_offset: None,
            prot,
            flags,
            hugetlbfs: None,
            blocks: None,
            owner: None,
        })
    }
}

impl<B> MmapRegion<B> {
    /// Unmaps the region, and reports what dropping it could not.
    ///
    /// # Errors
    ///
    /// What the system answered. The region then stays mapped, for good.
    pub fn unmap(mut self) -> io::Result<()> {
        self.mapping.unmap()
    }

    /// Where the bytes are.
    pub(super) fn host_range(&self) -> HostRange {
        self.mapping.host
    }
}

impl<B: Bitmap> MmapRegion<B> {
    /// Returns the address of the first byte in this process. What is done with it is outside the crate's promises.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.host.addr
    }

    /// Returns the size in bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.mapping.host.size
    }

    /// Returns the place in the file that is mapped, if there is one.
    pub fn file_offset(&self) -> Option<&FileOffset> {
        self.file_offset.as_ref()
    }

    /// Returns the protection that the mapping was made with.
    pub fn prot(&self) -> i32 {
        self.prot
    }

    /// Returns the flags that the mapping was made with.
    pub fn flags(&self) -> i32 {
        self.flags
    }

    /// Returns whether the mapping goes away with this region.
    pub fn owned(&self) -> bool {
        self.mapping.owned
    }

    /// Returns whether this region and `other` have bytes of the same file in common.
    ///
    /// Files are the same if their descriptors are the same number: two descriptors of one file are not noticed.
    pub fn fds_overlap<T: Bitmap>(&self, other: &MmapRegion<T>) -> bool {
        let (Some(mine), Some(others)) = (self.file_offset(), other.file_offset()) else {
            return false;
        };
        let end = |place: &FileOffset, size: usize| {
            place
                .start()
                .saturating_add(u64::try_from(size).unwrap_or(u64::MAX))
        };
        mine.file().as_raw_fd() == others.file().as_raw_fd()
            && mine.start() < end(others, other.size())
            && others.start() < end(mine, self.size())
    }

    /// Notes whether the memory lies on huge pages of hugetlbfs.
    pub fn set_hugetlbfs(&mut self, hugetlbfs: bool) {
        self.hugetlbfs = Some(hugetlbfs);
    }

    /// Returns whether the memory lies on huge pages of hugetlbfs, if that was noted.
    pub fn is_hugetlbfs(&self) -> Option<bool> {
        self.hugetlbfs
    }

    /// Returns the object that the region was told to keep ([`MmapRegionBuilder::with_owner`]), if that is a `T`.
    pub fn owner<T: Any>(&self) -> Option<&T> {
        self.owner.as_ref()?.get()
    }

    /// Returns the blocks that decide what can be reached, if there are some.
    pub fn plugged_blocks(&self) -> Option<&Arc<PluggedBlocks>> {
        self.blocks.as_ref()
    }

    /// The range of a mapping whose blocks decide, if all that it touches are plugged. For `get_slice`s that have found [`HostRange::slice`] closed.
    #[cold]
    #[inline(never)]
    pub(super) fn plugged_slice(
        &self,
        offset: usize,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        let blocks = self.blocks.as_ref()?;
        if !blocks.is_plugged(offset, count) {
            return None;
        }
        let host = self.host_range().opened();
        // SAFETY: the mapping stays as long as `self` is borrowed, as for `get_slice`.
        unsafe { host.slice(offset, count, || self.bitmap.slice_at(offset)) }
    }

    /// Returns the bitmap that writes are marked in.
    #[inline]
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }
}

/// Offsets count from the start of the mapping.
impl<B: Bitmap> VolatileMemory for MmapRegion<B> {
    type B = B;

    #[inline]
    fn len(&self) -> usize {
        self.mapping.host.size
    }

    #[inline]
    fn get_slice(
        &self,
        offset: usize,
        count: usize,
    ) -> volatile_memory::Result<VolatileSlice<'_, BS<'_, B>>> {
        // SAFETY: the mapping stays as long as `self` is borrowed: it is this region's own, or its maker promised so (`build_raw`,
        // `with_raw_mmap_pointer`).
        let slice = unsafe {
            self.host_range()
                .slice(offset, count, || self.bitmap.slice_at(offset))
        };
        match slice.or_else(|| self.plugged_slice(offset, count)) {
            Some(slice) => Ok(slice),
            // There is no such end, then; or it is in a block that is not plugged.
            None => {
                let addr = self.compute_end_offset(offset, count)?;
                Err(volatile_memory::Error::OutOfBounds { addr })
            }
        }
    }

    /// As for any memory; but of a region whose blocks come and go, it is nothing unless all of them are there: a guest decides that, and must not make
    /// this panic.
    fn as_volatile_slice(&self) -> VolatileSlice<'_, BS<'_, B>> {
        match self.get_slice(0, self.len()) {
            Ok(slice) => slice,
            // SAFETY: the slice has no bytes, so that nothing is accessed through it.
            Err(_) => unsafe {
                VolatileSlice::with_bitmap(self.as_ptr(), 0, self.bitmap.slice_at(0), None)
            },
        }
    }
}

/// Where the bytes of a mapping are, and what accesses may do to them. A region of guest memory keeps a copy, so that an access finds what it needs
/// beside the guest address.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostRange {
    addr: *mut u8,
    size: usize,
    /// How many bytes can be reached without looking further: all, or none where [`PluggedBlocks`] decide.
    open: usize,
    permissions: Permissions,
}

// SAFETY: the pointer is to memory that belongs to no thread, and `HostRange` hands it out by value only; what is done with it goes through
// `access`, which is made for many threads.
unsafe impl Send for HostRange {}
// SAFETY: as above; nothing can be changed through `&HostRange`.
unsafe impl Sync for HostRange {}

impl HostRange {
    fn new(addr: *mut u8, size: usize, prot: i32) -> Self {
        let permissions = permissions_of(prot);
        Self {
            addr,
            size,
            open: size,
            permissions,
        }
    }

    #[inline(always)]
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// What accesses may do here.
    #[inline(always)]
    pub(super) fn permissions(&self) -> Permissions {
        self.permissions
    }

    /// The same range, with all of it to be reached.
    fn opened(self) -> Self {
        Self {
            open: self.size,
            ..self
        }
    }

    /// The `count` bytes at `offset`; `None` if they do not all lie in the mapping, or its blocks decide. `bitmap` makes their bitmap.
    ///
    /// # Safety
    ///
    /// The mapping stays in place for `'a`.
    #[inline(always)]
    pub(super) unsafe fn slice<'a, S: BitmapSlice>(
        &self,
        offset: usize,
        count: usize,
        bitmap: impl FnOnce() -> S,
    ) -> Option<VolatileSlice<'a, S>> {
        if offset.checked_add(count)? > self.open {
            return None;
        }
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: 1. `[offset, offset + count)` lies in the mapping (just checked: `open` is at most its size). An access that its protection
        // refuses is one that faults. 2. The mapping stays for `'a`, by the caller's contract.
        // 3. Nothing in this crate makes references to it; code that makes some through pointers or `aligned_as_mut` has promised to keep
        // them apart from other accesses.
        Some(unsafe { VolatileSlice::with_bitmap(addr, count, bitmap(), None) })
    }
}

/// A mapping of this process, and whether it is ours to give back.
#[derive(Debug)]
struct Mapping {
    host: HostRange,
    owned: bool,
}

impl Mapping {
    /// Maps `size` bytes.
    fn new(size: usize, prot: i32, flags: i32, file_offset: Option<&FileOffset>) -> Result<Self> {
        if flags & libc::MAP_FIXED != 0 {
            return Err(MmapRegionError::MapFixed);
        }
        let (fd, offset) = match file_offset {
            // An offset past the greatest one is negative here, and refused by the system.
            Some(place) => (place.file().as_raw_fd(), place.start().cast_signed()),
            None => (-1, 0),
        };
        // SAFETY: without MAP_FIXED, a new mapping replaces none that is there, so this cannot invalidate memory that anybody uses.
        let addr = unsafe { libc::mmap(null_mut(), size, prot, flags, fd, offset) };
        if addr == libc::MAP_FAILED {
            return Err(MmapRegionError::Mmap(io::Error::last_os_error()));
        }
        if addr.is_null() {
            // Who may map page 0 (CAP_SYS_RAWIO) gets it for `MAP_FIXED_NOREPLACE`. No reference of Rust's may be to it, and pointers are not null
            // all over this crate.
            // SAFETY: the mapping was just made, and nobody knows of it.
            let _ = unsafe { libc::munmap(addr, size) };
            return Err(MmapRegionError::Mmap(io::Error::from_raw_os_error(
                libc::EINVAL,
            )));
        }
        // From here on the mapping is given back whatever happens.
        let mapping = Self {
            host: HostRange::new(addr.cast(), size, prot),
            owned: true,
        };
        if let Some(place) = file_offset.filter(|_| flags & libc::MAP_ANONYMOUS == 0) {
            check_file_end(place, size)?;
        }
        Ok(mapping)
    }

    /// Takes a mapping that was made elsewhere.
    fn foreign(addr: *mut u8, size: usize, prot: i32) -> Result<Self> {
        if !addr.addr().is_multiple_of(host_page_size().get()) {
            return Err(MmapRegionError::InvalidPointer);
        }
        Ok(Self {
            host: HostRange::new(addr, size, prot),
            owned: false,
        })
    }

    /// Gives the mapping back.
    fn unmap(&mut self) -> io::Result<()> {
        if !core::mem::take(&mut self.owned) {
            return Ok(());
        }
        let HostRange {
            addr, size: wanted, ..
        } = self.host;
        let mut size = wanted;
        let mut page = host_page_size().get();
        loop {
            // SAFETY: `[addr, addr + size)` is this mapping and no more (see below), and it is given up: no slice of it is left, since slices
            // borrow the region.
            let answer = unsafe { libc::munmap(addr.cast(), size) };
            if answer == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // Huge pages are mapped whole, and a length that is no multiple of theirs is refused (mmap(2), "Huge page (Huge TLB)
            // mappings"). Ascending, the first length that is accepted is the one that was mapped: until then, the end lies inside the last
            // huge page.
            let larger = page
                .checked_mul(2)
                .and_then(|p| wanted.checked_next_multiple_of(p).map(|s| (p, s)));
            match larger {
                Some((larger_page, rounded))
                    if error.raw_os_error() == Some(libc::EINVAL)
                        && larger_page <= LARGEST_PAGE =>
                {
                    (page, size) = (larger_page, rounded);
                }
                _ => return Err(error),
            }
        }
    }
}

/// The largest page of any architecture that Linux runs on (16 GiB, on aarch64 and powerpc; Linux, "HugeTLB Pages"), or the largest
/// power of two that this machine can count.
const LARGEST_PAGE: usize = if usize::BITS > 34 { 1 << 34 } else { 1 << 30 };

impl Drop for Mapping {
    fn drop(&mut self) {
        // Nobody to tell; `MmapRegion::unmap` is for those who want to know.
        let _ = self.unmap();
    }
}

/// Fails if a regular file lacks whole pages of a mapping that was just made of it.
///
/// To be called after mapping it: mapping a file of hugetlbfs makes it as long as that takes.
fn check_file_end(place: &FileOffset, size: usize) -> Result<()> {
    let Some(file_size) = regular_file_size(place.file()).map_err(MmapRegionError::Mmap)? else {
        return Ok(());
    };
    let page = u64::try_from(host_page_size().get()).unwrap_or(1);
    let end = u64::try_from(size)
        .ok()
        .and_then(|size| place.start().checked_add(size));
    let end = end.ok_or(MmapRegionError::InvalidOffsetLength)?;
    if file_size.div_ceil(page) < end.div_ceil(page) {
        return Err(MmapRegionError::MappingPastEof);
    }
    Ok(())
}

/// The size of a file in bytes; `None` for what is no regular file, such as a device.
///
/// Not by [`File::metadata`], which makes another system call (`statx`) that seccomp filters may kill on.
fn regular_file_size(file: &File) -> io::Result<Option<u64>> {
    let mut stat = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: `stat` has room for what fstat(2) writes.
    if unsafe { libc::fstat(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroes are a valid `stat`, and the call has succeeded in filling it.
    let stat = unsafe { stat.assume_init() };
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(None);
    }
    Ok(u64::try_from(stat.st_size).ok())
}
