//! [`MmapRange`].

use crate::guest_memory::{FileOffset, GuestAddress};

/// The description of a region of a Xen guest, for [`MmapRegion::from_range`].
///
/// A vhost-user front end sends the parts of it with each region.
///
/// [`MmapRegion::from_range`]: crate::MmapRegion::from_range
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
    /// Makes a range of `size` bytes at the guest address `addr`.
    ///
    /// `mmap_flags` are [`MmapXenFlags`](crate::MmapXenFlags). `mmap_data` is the number of the
    /// domain whose memory it is; a range that is not Xen memory ignores it.
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

    /// Makes a range of `size` bytes that is not Xen memory.
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
    /// The region refuses accesses that it does not permit, and maps no page for more than it.
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
    /// of four system calls. It maps nothing, and tells which page failed. It is not atomic in any
    /// unit, so values of 1, 2, 4 and 8 bytes that are naturally aligned, atomic accesses, typed
    /// copies and streams still map the pages.
    ///
    /// The default is `false`: 0.18.0 does not make this request.
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
