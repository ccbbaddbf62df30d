//! A third-party memory that has only the required methods.

use std::sync::atomic::Ordering;

use super::*;

/// A third-party memory with only the required methods. It swaps pages of 16 bytes.
struct Swapped(Memory);

impl GuestMemory for Swapped {
    type PhysicalMemory = Memory;
    type Bitmap = AtomicBitmap;
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::get_slices(self, addr, count, access).is_ok_and(|mut s| s.all(|s| s.is_ok()))
    }
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>>> {
        if addr.0 == 0x666 {
            return Err(Error::HostAddressNotAvailable);
        }
        Ok(SwappedSlices {
            memory: &self.0,
            addr: addr.0,
            left: count,
        })
    }
}

struct SwappedSlices<'a> {
    memory: &'a Memory,
    addr: u64,
    left: usize,
}

impl<'a> Iterator for SwappedSlices<'a> {
    type Item = Result<VolatileSlice<'a, BS<'a, AtomicBitmap>>>;
    fn next(&mut self) -> Option<Self::Item> {
        let count = self.left.min(0x10 - (self.addr % 0x10) as usize);
        if count == 0 {
            return None;
        }
        let slice = self.memory.get_slice(GuestAddress(self.addr ^ 0x10), count);
        self.left = if slice.is_ok() { self.left - count } else { 0 };
        self.addr += count as u64;
        Some(slice)
    }
}
impl core::iter::FusedIterator for SwappedSlices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>> for SwappedSlices<'a> {}

#[test]
fn bytes_of_memory_with_only_required_methods_work() {
    let memory = Swapped(memory(&[(0, 0x40)]));
    assert!(memory
        .contiguous_slice(GuestAddress(4), 8, Permissions::Read)
        .is_none());
    assert!(memory.physical_memory().is_none());
    let bytes: Vec<u8> = (0..0x40).collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    let mut all = [0; 0x40];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    assert_eq!(all, *bytes);
    memory.0.read_slice(&mut all, GuestAddress(0)).unwrap();
    assert_eq!(
        [all[0], all[0xf], all[0x10], all[0x3f]],
        [0x10, 0x1f, 0, 0x2f]
    );
    let (at, order) = (GuestAddress(4), Ordering::SeqCst);
    memory.store(u32::MAX, at, order).unwrap();
    assert_eq!(memory.load::<u32>(at, order).unwrap(), u32::MAX);
    assert_eq!(
        memory.0.read_obj::<u32>(GuestAddress(0x14)).unwrap(),
        u32::MAX
    );
    let across: [u8; 4] = memory.read_obj(GuestAddress(0xe)).unwrap();
    assert_eq!(across, [14, 15, 16, 17]);
    assert!(matches!(
        memory.load::<u64>(GuestAddress(0x666), Ordering::SeqCst),
        Err(Error::HostAddressNotAvailable)
    ));
    assert!(matches!(
        memory.write_obj(1u64, GuestAddress(0x3c)),
        Err(Error::PartialBuffer {
            expected: 8,
            completed: 4
        })
    ));
    assert!(memory.check_range(GuestAddress(0), 0x40, Permissions::Read));
    assert!(!memory.check_range(GuestAddress(0), 0x41, Permissions::Read));
    let mut source: &[u8] = &[9; 0x20];
    let moved = memory.read_volatile_from(GuestAddress(8), &mut source, 0x20);
    assert_eq!(moved.unwrap(), 0x20);
    memory
        .write_all_volatile_to(GuestAddress(8), &mut Vec::new(), 0x20)
        .unwrap();
}
