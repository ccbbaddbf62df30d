//! [`MmapRange`]: the description of a region of a Xen guest.

use crate::guest_memory::{FileOffset, GuestAddress};

/// The description of a region of a Xen guest, for [`MmapRegion::from_range`].
///
/// A vhost-user front end sends these values with each region: guest address, size, descriptor of
/// the device, [flags](crate::MmapXenFlags), and ID of the guest's domain.
///
/// | memory | device | guest address |
/// |---|---|---|
/// | `FOREIGN` | `/dev/xen/privcmd` | `frame << 12`, plus an offset in the page |
/// | `GRANT` | `/dev/xen/gntdev` | `1 << 63`, plus `reference << 12`, plus an offset in the page |
///
/// Pages of Xen have 4 KiB. A range may begin and end inside a page. The references of a range are
/// consecutive, and the guest creates them for each buffer that it lends to a device. The program
/// `examples/xen_grants.rs` serves a request with such buffers.
///
/// [`MmapRegion::from_range`]: crate::MmapRegion::from_range
///
/// # Memory that is mapped for each access
///
/// A guest takes its pages back when a request is complete. If a page is still mapped then, the
/// guest's driver stops using the device. With [`NO_ADVANCE_MAP`], nothing is therefore mapped
/// before an access, and nothing stays mapped after it. The region may be as large as all
/// references, although few of its pages are granted at any time.
///
/// - An access maps the pages that it touches, no matter how large the region or the slice is. It
///   maps them for reading only, unless it writes. Transfers of more than 1 MiB map one piece after
///   the other.
/// - If a page cannot be mapped, the access returns [`IOError`] with the system's error number,
///   such as `EINVAL` for a page that is not granted. The bytes before it have been moved, and
///   count as they do before a [fault](crate::fault). A method without an error reads zeroes,
///   stops early, or does not write. [`fault::last`] then describes the page. In place of a host
///   address, it has the offset in the region, counted from the start of the region's first page.
/// - [`PtrGuard`] and [`PtrGuardMut`] keep the pages mapped until they are dropped, and so do
///   [`Window`], [`HeldMemory`], [`IoBuffer`] and [`io_vectors`]. Drop them before the request is
///   returned to the guest.
/// - There is no host address. [`MmapRegion::as_ptr`] is null, and `get_host_address`, `host_runs`,
///   [`get_atomic_ref`], `aligned_as_ref` and `aligned_as_mut` return errors.
/// - All mappings of one descriptor share a lock of the kernel, and removing one interrupts all
///   processors that run the process. [`set_grant_copy`](Self::set_grant_copy) avoids both for
///   transfers that need not be atomic.
///
/// [`NO_ADVANCE_MAP`]: crate::MmapXenFlags::NO_ADVANCE_MAP
/// [`GuestMemory::held`]: crate::GuestMemory::held
/// [`IOError`]: crate::VolatileMemoryError::IOError
/// [`PtrGuard`]: crate::volatile_memory::PtrGuard
/// [`PtrGuardMut`]: crate::volatile_memory::PtrGuardMut
/// [`IoBuffer`]: crate::vectored::IoBuffer
/// [`Window`]: crate::guest_memory::Window
/// [`HeldMemory`]: crate::guest_memory::HeldMemory
/// [`io_vectors`]: crate::vectored::io_vectors()
/// [`fault::last`]: crate::fault::last
/// [`get_atomic_ref`]: crate::VolatileMemory::get_atomic_ref
/// [`MmapRegion::as_ptr`]: crate::MmapRegion::as_ptr
///
/// # Limits
///
/// - A child process that is forked while pages are mapped keeps them mapped until it ends or calls
///   `execve(2)`. This does not apply in a PV domain. A leaked guard, [`IoBuffer`] or window also
///   keeps its pages mapped.
/// - `check_range` compares with the region. It does not know which pages are granted.
/// - Code that uses the pointer of a [`PtrGuard`] without checking its `error` gets SIGSEGV for a
///   page that is not granted. The `Reader` and `Writer` of virtio-queue 0.18 are such code, so a
///   guest can end its back end. Create them on the view that [`GuestMemory::held`] returns. Their
///   `new` then returns the error.
/// - A write that fails marks all its pages dirty, as after a [fault](crate::fault): bytes past
///   those that count may have been written.
/// - On a host whose pages do not have 4 KiB, each grant takes a page of the host. A region that is
///   mapped in advance must then be within one page, and so must an access that must be contiguous.
/// - A frame that disappears after a foreign region was created raises SIGBUS in a PV domain, where
///   [`fault`](crate::fault) turns it into an error. On Arm, it kills the process. A region with
///   frames that do not exist is refused.
/// - Regions of Xen memory have no [`PluggedBlocks`](crate::mmap::PluggedBlocks): unplug memory by
///   replacing the map. Dirty marks and [`IommuMemory`](crate::IommuMemory) work as for other
///   regions.
/// - System calls cannot pin the pages of a foreign region: `O_DIRECT` and `process_vm_readv(2)`
///   return `EFAULT`.
///
/// # System calls
///
/// | memory | created | dropped |
/// |---|---|---|
/// | `FOREIGN` | `mmap`, `ioctl` (`PRIVCMD_MMAPBATCH_V2`); `clock_nanosleep` and more of these, while frames are paged out, for a second | `munmap` |
/// | `GRANT` | `ioctl` (`GNTDEV_MAP_GRANT_REF`), `mmap` | `munmap`, `ioctl` (`GNTDEV_UNMAP_GRANT_REF`) |
/// | `GRANT` of more than 65536 pages | `mmap`, then the same for each 65536 | `munmap`, an `ioctl` for each 65536 |
/// | `GRANT \| NO_ADVANCE_MAP` | none | none |
///
/// An access to memory that is mapped for each access makes the four calls of `GRANT`. If pages
/// cannot be mapped together, it repeats some of these calls for as many pages as possible. A guard
/// of more than 256 pages makes `mmap`, and then the four calls for 256 pages, 256, 512, and so on
/// up to 65536. The reason is that a guest may state a long buffer, and grant little of it. A copy
/// by the hypervisor makes one `ioctl` (`GNTDEV_GRANT_COPY`) for each 64 pages. A guard whose
/// mapping failed makes `mmap` and `munmap`.
///
/// # Examples
///
/// A region that is not Xen memory, as in tests of a back end:
///
/// ```
/// use vm_memory::{GuestAddress, MmapRange, MmapRegion, MmapXenFlags};
///
/// let range = MmapRange::new_unix(0x4000, None, GuestAddress(0x1000));
/// let region: MmapRegion = MmapRegion::from_range(range)?;
/// assert_eq!(region.xen_mmap_flags(), MmapXenFlags::UNIX.bits());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Buffers that the domain `domain` grants, at any reference:
///
/// ```no_run
/// use vm_memory::{
///     Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRange, MmapRegion,
///     MmapXenFlags,
/// };
///
/// # let domain = 1;
/// let gntdev = std::fs::File::options().read(true).write(true).open("/dev/xen/gntdev")?;
/// let flags = MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP;
/// let start = GuestAddress(1 << 63);
/// let file = FileOffset::new(gntdev, 0);
/// let range = MmapRange::new(1 << 40, Some(file), start, flags.bits(), domain);
/// let region = GuestRegionMmap::new(MmapRegion::from_range(range)?, start).ok_or("no region")?;
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(vec![region])?;
///
/// // Grant 8 is mapped, read, and unmapped.
/// let header: u32 = memory.read_obj(GuestAddress(1 << 63 | 8 << 12 | 0x400))?;
/// # let _ = header;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MmapRange {
    pub(in crate::mmap) size: usize,
    pub(in crate::mmap) file_offset: Option<FileOffset>,
    pub(in crate::mmap) prot: Option<i32>,
    pub(in crate::mmap) flags: Option<i32>,
    pub(in crate::mmap) hugetlbfs: Option<bool>,
    pub(in crate::mmap) addr: GuestAddress,
    pub(in crate::mmap) xen_flags: u32,
    pub(in crate::mmap) xen_data: u32,
    pub(in crate::mmap) grant_copy: bool,
}

impl MmapRange {
    /// Creates a range of `size` bytes at the guest address `addr`.
    ///
    /// `mmap_flags` are [`MmapXenFlags`](crate::MmapXenFlags). `mmap_data` is the ID of the
    /// domain that owns the memory; a range that is not Xen memory ignores it.
    ///
    /// The file of Xen memory must be the device of the table above. Another file causes an error,
    /// such as `ENOTTY`. For memory that is not mapped in advance, the first access returns it. A
    /// device that interprets the requests of Xen differently could do harm: reject such
    /// descriptors.
    ///
    /// Unless they are set, the protection is `PROT_READ | PROT_WRITE` and the flags of `mmap(2)`
    /// are `MAP_NORESERVE | MAP_SHARED`.
    pub fn new(
        size: usize,
        file_offset: Option<FileOffset>,
        addr: GuestAddress,
        mmap_flags: u32,
        mmap_data: u32,
    ) -> Self {
        Self {
            size,
            file_offset,
            prot: None,
            flags: None,
            hugetlbfs: None,
            addr,
            xen_flags: mmap_flags,
            xen_data: mmap_data,
            grant_copy: false,
        }
    }

    /// Creates a range of `size` bytes that is not Xen memory.
    ///
    /// With a file, it is shared with the file. Without one, it is private and filled with zeroes.
    pub fn new_unix(size: usize, file_offset: Option<FileOffset>, addr: GuestAddress) -> Self {
        let flags = match file_offset {
            Some(_) => libc::MAP_NORESERVE | libc::MAP_SHARED,
            None => libc::MAP_ANONYMOUS | libc::MAP_PRIVATE,
        };
        Self {
            flags: Some(flags),
            ..Self::new(size, file_offset, addr, 0, 0)
        }
    }

    /// Sets the protection: a combination of `PROT_READ`, `PROT_WRITE` and the other `PROT_` flags.
    ///
    /// The region refuses accesses that it does not permit.
    pub fn set_prot(&mut self, prot: i32) {
        self.prot = Some(prot);
    }

    /// Sets the flags of `mmap(2)`: a combination of `MAP_SHARED` and the other `MAP_` flags.
    pub fn set_flags(&mut self, flags: i32) {
        self.flags = Some(flags);
    }

    /// Lets the hypervisor copy the bytes of accesses to pages that are not mapped in advance.
    ///
    /// Reads and writes of bytes and objects then make one `ioctl(2)` (`GNTDEV_GRANT_COPY`) instead
    /// of four system calls. It maps nothing, and reports which page failed. It is not atomic for
    /// any size. So naturally aligned values of 1, 2, 4 and 8 bytes, atomic accesses, typed copies,
    /// and streams of files and sockets still map the pages.
    ///
    /// The default is `false`: 0.18.0 does not make this request. Ranges that are mapped in advance
    /// ignore it. A device that does not know the request returns its error: there is no fallback.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use vm_memory::{FileOffset, GuestAddress, MmapRange, MmapRegion, MmapXenFlags};
    ///
    /// let gntdev = std::fs::File::options().read(true).write(true).open("/dev/xen/gntdev")?;
    /// let flags = MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP;
    /// let (addr, domain) = (GuestAddress(1 << 63), 1);
    /// let file = FileOffset::new(gntdev, 0);
    /// let mut range = MmapRange::new(1 << 30, Some(file), addr, flags.bits(), domain);
    /// range.set_grant_copy(true);
    /// let region: MmapRegion = MmapRegion::from_range(range)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "GNTDEV_GRANT_COPY")]
    pub fn set_grant_copy(&mut self, grant_copy: bool) {
        self.grant_copy = grant_copy;
    }

    /// Records whether the memory consists of huge pages of hugetlbfs.
    pub fn set_hugetlbfs(&mut self, hugetlbfs: bool) {
        self.hugetlbfs = Some(hugetlbfs);
    }
}
