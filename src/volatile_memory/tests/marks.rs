//! The order of write and mark, and the bytes that a stream marks.

use core::sync::atomic::AtomicU32;
use std::io::ErrorKind;

use super::*;
use crate::atomic_integer::AtomicInteger;
use crate::io::ReadVolatile;
use crate::value::AtomicAccess;

#[test]
fn write_by_any_method_marks_after_the_write() {
    /// A bitmap that records the current byte on each mark.
    #[derive(Clone, Debug)]
    struct Witness(Rc<RefCell<Vec<u8>>>, *const AtomicU64);
    impl WithBitmapSlice<'_> for Witness {
        type S = Self;
    }
    impl BitmapSlice for Witness {}
    impl Bitmap for Witness {
        fn mark_dirty(&self, _offset: usize, _len: usize) {
            // SAFETY: the test declares the word before the bitmap, so the word outlives it.
            let word = unsafe { &*self.1 };
            let now = word.load(Ordering::Relaxed).to_ne_bytes()[0];
            self.0.borrow_mut().push(now);
        }
        fn dirty_at(&self, _offset: usize) -> bool {
            false
        }
        fn slice_at(&self, _offset: usize) -> Self {
            self.clone()
        }
    }
    let word = AtomicU64::new(0);
    let seen = Rc::new(RefCell::new(vec![]));
    let witness = Witness(seen.clone(), &word);
    // SAFETY: the eight bytes are an atomic that outlives the slice.
    let slice = unsafe { VolatileSlice::with_bitmap(word.as_ptr().cast::<u8>(), 8, witness, None) };
    slice.write(&[1], 0).unwrap();
    slice.write_slice(&[2], 0).unwrap();
    slice.write_obj(3u8, 0).unwrap();
    slice.store(4u8, 0, Ordering::SeqCst).unwrap();
    slice.copy_from(&[5u8]);
    slice.get_ref::<u8>(0).unwrap().store(6);
    slice.get_array_ref::<u8>(0, 1).unwrap().copy_from(&[7]);
    slice
        .read_volatile_from(0, &mut [8u8].as_slice(), 1)
        .unwrap();
    VolatileSlice::from([9u8].as_mut_slice()).copy_to_volatile_slice(slice.clone());
    slice.fill_with_byte(10).unwrap();
    let order = Ordering::SeqCst;
    slice.atomic_swap(11u8, 0, order).unwrap();
    slice.atomic_fetch_add(1u8, 0, order).unwrap();
    slice.atomic_fetch_or(1u8, 0, order).unwrap();
    slice.atomic_fetch_and(0xfeu8, 0, order).unwrap();
    slice.atomic_fetch_or(3u8, 0, order).unwrap();
    slice
        .atomic_compare_exchange(15u8, 16, 0, order, order)
        .unwrap()
        .unwrap();
    assert_eq!(
        *seen.borrow(),
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 12, 15, 16]
    );
}

/// A source that is interrupted before each read, reads a few bytes, and fails at its end.
struct Halting {
    bytes: Vec<u8>,
    interrupted: bool,
}

impl ReadVolatile for Halting {
    fn read_volatile<B: BitmapSlice>(&mut self, buf: &mut VolatileSlice<B>) -> Result<usize> {
        self.interrupted = !self.interrupted;
        match self.bytes.len().min(3).min(buf.len()) {
            _ if self.interrupted => Err(Error::IOError(ErrorKind::Interrupted.into())),
            0 => Err(Error::IOError(ErrorKind::WouldBlock.into())),
            count => {
                buf.copy_from(&self.bytes[..count]);
                self.bytes.drain(..count);
                Ok(count)
            }
        }
    }
}

#[test]
fn stream_methods_mark_only_moved_bytes() {
    let memory = Memory::new(20, 0);
    let slice = memory.slice();
    let stream = |count| Halting {
        bytes: numbered(count, 201),
        interrupted: false,
    };
    assert_eq!(slice.read_volatile_from(4, &mut stream(10), 8).unwrap(), 3);
    assert_eq!(memory.take_marks(), [4, 5, 6]);
    assert_eq!(slice.read_volatile_from(18, &mut stream(10), 8).unwrap(), 2);
    assert_eq!(memory.take_marks(), [18, 19]);
    slice
        .read_exact_volatile_from(0, &mut stream(10), 10)
        .unwrap();
    assert_eq!(memory.bytes()[..10], numbered(10, 201));
    assert_eq!(memory.take_marks(), (0..10).collect::<Vec<_>>());
    let would_block = shown(Error::IOError(ErrorKind::WouldBlock.into()));
    let nothing = slice.read_volatile_from(0, &mut stream(0), 8);
    assert_eq!(failed(nothing), would_block);
    assert!(memory.take_marks().is_empty());
    let some = slice.read_exact_volatile_from(0, &mut stream(4), 8);
    assert_eq!(failed(some), would_block);
    assert_eq!(memory.take_marks(), [0, 1, 2, 3]);

    // An access out of bounds does not touch the stream.
    let (mut source, mut target) = (stream(10), vec![]);
    let past_end = out_of_bounds(memory.ptr() as usize + 21);
    assert_eq!(
        failed(slice.read_volatile_from(21, &mut source, 1)),
        past_end
    );
    assert_eq!(
        failed(slice.write_volatile_to(21, &mut target, 1)),
        past_end
    );
    let past_end = out_of_bounds(21);
    assert_eq!(
        failed(slice.read_exact_volatile_from(13, &mut source, 8)),
        past_end
    );
    assert_eq!(
        failed(slice.write_all_volatile_to(13, &mut target, 8)),
        past_end
    );
    assert!(source.bytes.len() == 10 && !source.interrupted && target.is_empty());
}

/// A value whose atomic integer panics after it has written the first part.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Triple([u32; 3]);
// SAFETY: three integers of four bytes, without padding.
unsafe impl ByteValued for Triple {}
#[repr(C)]
struct AtomicTriple([AtomicU32; 3]);
// SAFETY: consists of atomic integers only.
unsafe impl AtomicInteger for AtomicTriple {
    type V = Triple;
    fn new(value: Triple) -> Self {
        Self(value.0.map(AtomicU32::new))
    }
    fn load(&self, order: Ordering) -> Triple {
        Triple([0, 1, 2].map(|i| self.0[i].load(order)))
    }
    fn store(&self, value: Triple, order: Ordering) {
        self.0[0].store(value.0[0], order);
        panic!("the store panics");
    }
}
impl AtomicAccess for Triple {
    type A = AtomicTriple;
}

#[test]
fn store_with_panicking_atomic_marks_its_bytes() {
    let memory = Memory::new(24, 0);
    let slice = memory.slice();
    let store = || slice.store(Triple([1; 3]), 4, Ordering::SeqCst);
    let stored = std::panic::catch_unwind(core::panic::AssertUnwindSafe(store));
    assert!(stored.is_err());
    assert_eq!(slice.read_obj::<u32>(4).unwrap(), 1);
    assert_eq!(memory.take_marks(), (4..16).collect::<Vec<_>>());
}

#[test]
#[cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]
fn store_to_window_with_panicking_atomic_marks_its_bytes() {
    use crate::bitmap::AtomicBitmap;
    use crate::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, Permissions};

    let ranges = [(GuestAddress(0), 0x4000)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
    let at = GuestAddress(0x1000);
    let window = memory.window(at, 0x1000, Permissions::ReadWrite).unwrap();
    let store = || window.store(Triple([1; 3]), 4, Ordering::SeqCst);
    let stored = std::panic::catch_unwind(core::panic::AssertUnwindSafe(store));
    assert!(stored.is_err());
    assert_eq!(window.read_obj::<u32>(4).unwrap(), 1);
    let slice = memory.get_slice(at, 0x1000).unwrap();
    assert!(slice.bitmap().dirty_at(4));
}
