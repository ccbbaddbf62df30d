//! The extension traits that VMMs bring into scope beside the library's.
//!
//! Each method returns a type that only it can return: a method of the library with the same name, on the same type, is either
//! ambiguous or fails to type-check at the call.

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    ReadVolatile, VolatileSlice,
};

/// Proof that the method of the user ran.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mine(pub &'static str);

/// A VMM's own methods on its guest memory: snapshots, migration, ballooning.
pub trait GuestMemoryExtension {
    /// Where the slice of a device lies.
    fn find_slice(&self) -> Mine;
    /// The layout, for a snapshot.
    fn describe(&self) -> Mine;
    /// All bytes, to a file.
    fn dump(&self) -> Mine;
    /// The bytes of dirty pages, to a file.
    fn dump_dirty(&self) -> Mine;
    /// Forgets what is dirty.
    fn reset_dirty(&self) -> Mine;
    /// Merges the hypervisor's log into the bitmap.
    fn store_dirty_bitmap(&self) -> Mine;
    /// Marks a range of guest memory.
    fn mark_dirty(&self, address: GuestAddress, length: usize) -> Mine;
    /// Gives the pages of a range back.
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

/// A VMM's own methods on one region: memory slots and hotplug.
pub trait GuestRegionExtension: GuestMemoryRegion {
    /// The hypervisor's slot of the region.
    fn slot(&self) -> Mine {
        Mine("slot")
    }

    /// Takes the region from the hypervisor.
    fn unplug(&self) -> Mine {
        Mine("unplug")
    }

    /// Gives the pages of a range back.
    fn discard_range(&self, _: usize, _: usize) -> Mine {
        Mine("discard_range")
    }
}

impl<R: GuestMemoryRegion> GuestRegionExtension for R {}

/// A VMM's own methods on a mapping.
pub trait MappingExtension {
    /// Advises the kernel.
    fn advise(&self) -> Mine {
        Mine("advise")
    }

    /// Changes what is permitted.
    fn protect(&self) -> Mine {
        Mine("protect")
    }
}

impl<B> MappingExtension for MmapRegion<B> {}

impl<B> MappingExtension for GuestRegionMmap<B> {}

/// Short forms that a device model has for everything that holds bytes.
pub trait BytesExtension<A>: Bytes<A> {
    /// Reads a string that ends in a zero byte.
    fn read_cstr(&self, _: A) -> Mine {
        Mine("read_cstr")
    }

    /// Clears a range.
    fn zero_range(&self, _: A, _: usize) -> Mine {
        Mine("zero_range")
    }
}

impl<A, T: Bytes<A> + ?Sized> BytesExtension<A> for T {}

/// What vectored I/O needs of a slice.
pub trait IovecExtension {
    /// The slice as the operating system takes it.
    fn as_iovec(&self) -> Mine;
}

impl<B: vm_memory::bitmap::BitmapSlice> IovecExtension for VolatileSlice<'_, B> {
    fn as_iovec(&self) -> Mine {
        Mine("as_iovec")
    }
}

/// What migration needs of a bitmap.
pub trait BitmapExtension {
    /// The bits of another log, added.
    fn merge_log(&self) -> Mine;
    /// How much is dirty.
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

/// A back end's own wrapper over a stream.
pub trait StreamExtension: ReadVolatile {
    /// Reads until the slice is full or the stream ends.
    fn fill_volatile(&mut self) -> Mine {
        Mine("fill_volatile")
    }
}

impl<T: ReadVolatile> StreamExtension for T {}
