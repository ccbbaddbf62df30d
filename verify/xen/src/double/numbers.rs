//! The requests of gntdev and privcmd (Linux, `include/uapi/xen/gntdev.h` and `privcmd.h`).

/// `IOCTL_GNTDEV_MAP_GRANT_REF`.
pub const MAP_GRANT_REF: u32 = 0x0018_4700;
/// `IOCTL_GNTDEV_UNMAP_GRANT_REF`.
pub const UNMAP_GRANT_REF: u32 = 0x0010_4701;
/// `IOCTL_GNTDEV_GRANT_COPY`.
pub const GRANT_COPY: u32 = 0x0010_4708;
/// `IOCTL_PRIVCMD_MMAPBATCH_V2`.
pub const MMAPBATCH_V2: u32 = 0x0020_5004;
/// A request of the double, to find out whether the program calls the double.
pub const PROBE: u32 = 0x0000_47ff;
/// The result of [`PROBE`].
pub const PROBED: i32 = 0x0d0b1e;

/// The size of `struct ioctl_gntdev_map_grant_ref` with one reference. The driver writes
/// all of it back.
pub const MAP_GRANT_REF_SIZE: usize = 24;

/// `GNTCOPY_source_gref`.
pub const COPY_SOURCE_IS_GRANT: u16 = 1;
/// `GNTCOPY_dest_gref`.
pub const COPY_DEST_IS_GRANT: u16 = 2;
/// `GNTST_bad_domain`.
pub const STATUS_BAD_DOMAIN: i16 = -2;
/// `GNTST_bad_gntref`.
pub const STATUS_BAD_REFERENCE: i16 = -3;
/// `GNTST_permission_denied`.
pub const STATUS_PERMISSION: i16 = -8;
