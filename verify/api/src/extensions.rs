//! Extension traits like those of VMMs, in scope together with the library's traits.
//!
//! Each method returns a type of its own. A method of the library with the same name on the same
//! type makes the call ambiguous, or fails to type-check.

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    ReadVolatile, VolatileSlice,
};

/// The proof that the user's method ran.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mine(pub &'static str);

/// Methods of a VMM on its guest memory: snapshots, migration, ballooning.
pub trait GuestMemoryExtension {
    /// Returns the position of a device's slice.
    fn find_slice(&self) -> Mine;
    /// Describes the layout for a snapshot.
    fn describe(&self) -> Mine;
    /// Writes all bytes to a file.
    fn dump(&self) -> Mine;
    /// Writes the bytes of dirty pages to a file.
    fn dump_dirty(&self) -> Mine;
    /// Clears all dirty bits.
    fn reset_dirty(&self) -> Mine;
    /// Merges the hypervisor's log into the bitmap.
    fn store_dirty_bitmap(&self) -> Mine;
    /// Marks a range of guest memory.
    fn mark_dirty(&self, address: GuestAddress, length: usize) -> Mine;
    /// Discards the pages of a range.
    fn discard_range(&self, address: GuestAddress, length: usize) -> Mine;
}

impl<B: Bitmap> GuestMemoryExtension for GuestMemoryMmap<B> {
    fn find_slice(&self) -> Mine {
        Mine("find_slice")
    }

    fn describe(&self) -> Mine {
        Mine("describe")
    }

    fn dump(&self) -> Mine {
        Mine("dump")
    }

    fn dump_dirty(&self) -> Mine {
        Mine("dump_dirty")
    }

    fn reset_dirty(&self) -> Mine {
        Mine("reset_dirty")
    }

    fn store_dirty_bitmap(&self) -> Mine {
        Mine("store_dirty_bitmap")
    }

    fn mark_dirty(&self, _: GuestAddress, _: usize) -> Mine {
        Mine("mark_dirty")
    }

    fn discard_range(&self, _: GuestAddress, _: usize) -> Mine {
        Mine("discard_range")
    }
}

/// Methods of a VMM on one region: memory slots and hotplug.
pub trait GuestRegionExtension: GuestMemoryRegion {
    /// Returns the KVM slot of the region.
    fn slot(&self) -> Mine {
        Mine("slot")
    }

    /// Removes the KVM slot of the region.
    fn unplug(&self) -> Mine {
        Mine("unplug")
    }

    /// Discards the pages of a range.
    fn discard_range(&self, _: usize, _: usize) -> Mine {
        Mine("discard_range")
    }
}

impl<R: GuestMemoryRegion> GuestRegionExtension for R {}

/// Methods of a VMM on a mapping.
pub trait MappingExtension {
    /// Advises the kernel.
    fn advise(&self) -> Mine {
        Mine("advise")
    }

    /// Changes the protection.
    fn protect(&self) -> Mine {
        Mine("protect")
    }
}

impl<B> MappingExtension for MmapRegion<B> {}

impl<B> MappingExtension for GuestRegionMmap<B> {}

/// Shorthands of a device model for each type that implements [`Bytes`].
pub trait BytesExtension<A>: Bytes<A> {
    /// Reads a NUL-terminated string.
    fn read_cstr(&self, _: A) -> Mine {
        Mine("read_cstr")
    }

    /// Clears a range.
    fn zero_range(&self, _: A, _: usize) -> Mine {
        Mine("zero_range")
    }
}

impl<A, T: Bytes<A> + ?Sized> BytesExtension<A> for T {}

/// Methods for vectored I/O on a slice.
pub trait IovecExtension {
    /// Converts the slice to an `iovec`.
    fn as_iovec(&self) -> Mine;
}

impl<B: vm_memory::bitmap::BitmapSlice> IovecExtension for VolatileSlice<'_, B> {
    fn as_iovec(&self) -> Mine {
        Mine("as_iovec")
    }
}

/// Methods for migration on a bitmap.
pub trait BitmapExtension {
    /// Adds the bits of another log.
    fn merge_log(&self) -> Mine;
    /// Returns the number of dirty bytes.
    fn count_dirty(&self) -> Mine;
}

impl BitmapExtension for AtomicBitmap {
    fn merge_log(&self) -> Mine {
        Mine("merge_log")
    }

    fn count_dirty(&self) -> Mine {
        Mine("count_dirty")
    }
}

/// Methods of a back end on a stream.
pub trait StreamExtension: ReadVolatile {
    /// Reads until the slice is full or the stream ends.
    fn fill_volatile(&mut self) -> Mine {
        Mine("fill_volatile")
    }
}

impl<T: ReadVolatile> StreamExtension for T {}
