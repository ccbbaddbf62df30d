//! Values that own a map and slices of it, and that are passed by value.
//!
//! Miri checks that the call may free the map.

use std::num::NonZeroUsize;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Weak};

use super::*;
use crate::bitmap::{Bitmap, BS};
use crate::convert::{to_u64, to_usize};
#[cfg(all(unix, feature = "rawfd"))]
use crate::vectored::IoBuffer;
use crate::volatile_memory::VolatileSlice;
use crate::{GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection};

/// RAM on the heap, whose bitmap slices are references. Miri cannot map guest memory.
struct Heap {
    bytes: Box<[AtomicU8]>,
    bitmap: AtomicBitmap,
}

impl GuestMemoryRegion for Heap {
    type B = AtomicBitmap;
    fn len(&self) -> GuestUsize {
        to_u64(self.bytes.len())
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(0)
    }
    fn bitmap(&self) -> BS<'_, AtomicBitmap> {
        self.bitmap.slice_at(0)
    }
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>> {
        let addr = self.bytes.as_ptr().cast::<u8>().cast_mut();
        let (len, bitmap) = (self.bytes.len(), self.bitmap.slice_at(0));
        // SAFETY: the slice borrows `self`, which owns the bytes. All references to them are to
        // atomics, and only slices access them.
        let all = unsafe { VolatileSlice::with_bitmap(addr, len, bitmap, None) };
        Ok(all.subslice(to_usize(offset.0), count)?)
    }
}
impl GuestMemoryRegionBytes for Heap {}

type HeapMemory = GuestRegionCollection<Heap>;

fn heap_memory() -> (Arc<HeapMemory>, Weak<HeapMemory>) {
    let region = Heap {
        bytes: (0..0x1000).map(|_| AtomicU8::new(0)).collect(),
        bitmap: AtomicBitmap::new(0x1000, NonZeroUsize::new(0x1000).unwrap()),
    };
    let memory = Arc::new(HeapMemory::from_regions(vec![region]).unwrap());
    let weak = Arc::downgrade(&memory);
    (memory, weak)
}

/// Returns a window that owns the only share of its map.
fn window() -> (Window<'static, HeapMemory>, Weak<HeapMemory>) {
    let (memory, weak) = heap_memory();
    let window = Window::from_arc(memory, GuestAddress(0), 16, Permissions::ReadWrite);
    (window.unwrap(), weak)
}

#[test]
fn window_passed_by_value_frees_its_map() {
    let (window, map) = window();
    drop(window);
    assert_eq!(map.strong_count(), 0);
}

#[test]
fn window_moved_to_thread_frees_its_map() {
    let (window, map) = window();
    let device = std::thread::spawn(move || window.write_obj(7u64, 8));
    device.join().unwrap().unwrap();
    assert_eq!(map.strong_count(), 0);
}

#[cfg(all(unix, feature = "rawfd"))]
#[test]
fn io_buffer_passed_by_value_frees_its_map() {
    let (memory, map) = heap_memory();
    let mut buffer = IoBuffer::new(memory, Permissions::Write);
    buffer.push(GuestAddress(0), 16).unwrap();
    let rest = buffer.split_off(8).unwrap();
    rest.cancel();
    assert_eq!(map.strong_count(), 1);
    buffer.complete(8);
    assert_eq!(map.strong_count(), 0);
}
