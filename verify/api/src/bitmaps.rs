//! Dirty tracking: the library's bitmaps, and a user's bitmap that is replaced while it is in use.

use std::num::NonZeroUsize;
use std::sync::{Arc, RwLock};

use crate::everything::*;
use crate::{Outcome, PAGE};

const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(PAGE).unwrap();

/// Calls every method of [`AtomicBitmap`].
pub fn atomic_bitmap() {
    let mut bitmap = AtomicBitmap::new(4 * PAGE, PAGE_SIZE);
    assert_eq!((bitmap.len(), bitmap.byte_size()), (4, 4 * PAGE));
    bitmap.mark_dirty(PAGE, 1);
    assert!(bitmap.dirty_at(PAGE + 5));
    bitmap.set_addr_range(2 * PAGE, PAGE);
    bitmap.set_bit(0);
    assert!(bitmap.is_bit_set(0) && bitmap.is_addr_set(2 * PAGE));
    bitmap.reset_bit(0);
    bitmap.reset_addr_range(PAGE, 1);
    let copy = bitmap.clone();
    assert_eq!(bitmap.get_and_reset(), [0b100]);
    assert!(copy.is_bit_set(2) && !bitmap.is_bit_set(2));
    bitmap.enlarge(PAGE);
    assert_eq!(bitmap.len(), 5);
    bitmap.reset();
    let empty = AtomicBitmap::default();
    assert_eq!(empty.len(), 0);
    let fitting = AtomicBitmap::with_len(8 * PAGE);
    assert!(!fitting.dirty_at(0));
    let answers: [Mine; 2] = [bitmap.merge_log(), bitmap.count_dirty()];
    assert_eq!(answers[0], Mine("merge_log"));
}

/// Calls [`Bitmap`] on all types that implement it.
pub fn slices() {
    let bitmap = Arc::new(AtomicBitmap::new(4 * PAGE, PAGE_SIZE));
    let from_one: RefSlice<'_, AtomicBitmap> = bitmap.slice_at(PAGE);
    from_one.mark_dirty(0, 1);
    assert!(bitmap.dirty_at(PAGE) && from_one.dirty_at(0) && !from_one.slice_at(PAGE).dirty_at(0));
    let owned: ArcSlice<AtomicBitmap> = ArcSlice::new(bitmap.clone(), 2 * PAGE);
    owned.slice_at(PAGE).mark_dirty(0, 1);
    assert!(bitmap.is_bit_set(3) && owned.clone().dirty_at(PAGE));

    let optional = Some(AtomicBitmap::new(PAGE, PAGE_SIZE));
    optional.mark_dirty(0, 1);
    assert!(optional.dirty_at(0) && optional.slice_at(0).dirty_at(0));
    let none: Option<AtomicBitmap> = None;
    none.mark_dirty(0, 1);
    assert!(!none.dirty_at(0));
    ().mark_dirty(0, 1);
    assert!(!().dirty_at(0));
    let () = ().slice_at(1);
    let () = NewBitmap::with_len(1);
}

/// Calls the methods of the bounds on a generic bitmap.
fn mark_all<B: NewBitmap>(size: usize) -> bool {
    let bitmap = B::with_len(size);
    bitmap.mark_dirty(0, size);
    let slice = bitmap.slice_at(0);
    let dirty = slice.clone().dirty_at(0);
    dirty && bitmap.dirty_at(size - 1)
}

/// A log that is switched on for a migration, as in vhost-user back ends. Slices follow the switch.
#[derive(Clone, Debug, Default)]
pub struct SwitchedLog {
    log: Arc<RwLock<Option<Arc<AtomicBitmap>>>>,
    base: usize,
}

impl SwitchedLog {
    /// Replaces the current log with another one, or removes it.
    pub fn switch(&self, log: Option<Arc<AtomicBitmap>>) {
        *self.log.write().unwrap() = log;
    }
}

impl WithBitmapSlice<'_> for SwitchedLog {
    type S = Self;
}

impl BitmapSlice for SwitchedLog {}

impl Bitmap for SwitchedLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(log) = self.log.read().unwrap().as_ref() {
            log.mark_dirty(self.base + offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log
            .read()
            .unwrap()
            .as_ref()
            .is_some_and(|log| log.dirty_at(self.base + offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log.clone(),
            base: self.base + offset,
        }
    }
}

impl NewBitmap for SwitchedLog {
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}

/// Uses the library's memory with a user's bitmap.
pub fn own_bitmap() -> Outcome {
    assert!(mark_all::<AtomicBitmap>(PAGE));
    assert!(!mark_all::<()>(PAGE));
    assert!(!mark_all::<SwitchedLog>(PAGE));
    let memory = GuestMemoryMmap::<SwitchedLog>::from_ranges(&[(GuestAddress(0), 2 * PAGE)])?;
    let region = memory.find_region(GuestAddress(0)).ok_or("no region")?;
    memory.write_obj(1u8, GuestAddress(0))?;
    assert!(!region.bitmap().dirty_at(0));
    let log = Arc::new(AtomicBitmap::new(2 * PAGE, PAGE_SIZE));
    region.bitmap().switch(Some(log.clone()));
    memory.write_obj(1u8, GuestAddress(PAGE as u64))?;
    memory
        .get_slice(GuestAddress(PAGE as u64), 8)?
        .offset(4)?
        .write_obj(1u8, 0)?;
    assert_eq!(log.get_and_reset(), [0b10]);
    Ok(())
}
