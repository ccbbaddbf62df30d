//! The methods of separate bitmaps.

use std::sync::Arc;

use super::kinds::{words_of, Bits};
use super::vm::bitmap::{ArcSlice, AtomicBitmap, Bitmap, NewBitmap, RefSlice};
use crate::op::{BitAct, View};
use crate::out::Out;

/// The largest bitmap of the harness, in bits.
const MOST_BITS: usize = 1 << 16;

/// Follows the offsets from one slice of a bitmap to the next, and calls `job` with the last one.
fn down<B: Bitmap>(bitmap: &B, skips: &[usize], job: &mut dyn FnMut(&dyn Marks)) {
    match skips.split_first() {
        None => job(&Seen(bitmap)),
        Some((&skip, rest)) => down(&bitmap.slice_at(skip), rest, job),
    }
}

/// Calls the two methods of a bitmap that do not name a type.
trait Marks {
    fn mark(&self, at: usize, len: usize);
    fn dirty(&self, at: usize) -> bool;
}

struct Seen<'a, B>(&'a B);

impl<B: Bitmap> Marks for Seen<'_, B> {
    fn mark(&self, at: usize, len: usize) {
        self.0.mark_dirty(at, len);
    }

    fn dirty(&self, at: usize) -> bool {
        self.0.dirty_at(at)
    }
}

fn viewed(bitmap: &mut AtomicBitmap, view: View, skips: &[usize], job: &mut dyn FnMut(&dyn Marks)) {
    // `slice_at` of a slice is a slice, so two levels cover all types.
    let skips = &skips[..skips.len().min(3)];
    match view {
        View::Direct => down(bitmap, skips, job),
        View::RefView => down(
            &RefSlice::new(bitmap, skips.first().copied().unwrap_or(0)),
            skips.get(1..).unwrap_or(&[]),
            job,
        ),
        View::SomeView => {
            let mut some = Some(std::mem::take(bitmap));
            down(&some, skips, job);
            *bitmap = some.take().unwrap_or_default();
        }
        View::NoneView => down(&None::<AtomicBitmap>, skips, job),
        View::ArcView => {
            let shared = Arc::new(std::mem::take(bitmap));
            let slice = ArcSlice::new(Arc::clone(&shared), skips.first().copied().unwrap_or(0));
            down(&slice, skips.get(1..).unwrap_or(&[]), job);
            drop(slice);
            *bitmap = Arc::into_inner(shared).unwrap_or_default();
        }
    }
}

/// Runs the act on the bitmap, and returns its bits afterwards.
pub fn bits(bitmap: &mut AtomicBitmap, act: &BitAct) -> Out {
    let result = match *act {
        BitAct::NewBitmap { bytes, page } => {
            if page == 0 || bytes / page > MOST_BITS {
                return Out::NotApplicable;
            }
            *bitmap = Bits::new(bytes, page);
            Out::Nothing
        }
        BitAct::BitmapWithLen(bytes) => {
            if bytes / 4096 > MOST_BITS {
                return Out::NotApplicable;
            }
            *bitmap = AtomicBitmap::with_len(bytes);
            Out::Nothing
        }
        BitAct::DefaultBitmap => {
            *bitmap = AtomicBitmap::default();
            Out::Nothing
        }
        BitAct::Enlarge(by) => {
            if by > MOST_BITS || bitmap.len() > MOST_BITS {
                return Out::NotApplicable;
            }
            bitmap.enlarge(by);
            Out::Nothing
        }
        BitAct::SetRange { at, len } => {
            bitmap.set_addr_range(at, len);
            Out::Nothing
        }
        BitAct::ResetRange { at, len } => {
            bitmap.reset_addr_range(at, len);
            Out::Nothing
        }
        BitAct::SetBit(index) => {
            bitmap.set_bit(index);
            Out::Nothing
        }
        BitAct::ResetBit(index) => {
            bitmap.reset_bit(index);
            Out::Nothing
        }
        BitAct::ReadBit(index) => bitmap.is_bit_set(index).into(),
        BitAct::ReadAddr(at) => bitmap.is_addr_set(at).into(),
        BitAct::Harvest => Out::Words(bitmap.get_and_reset()),
        BitAct::ResetAll => {
            bitmap.reset();
            Out::Nothing
        }
        BitAct::CloneOver => {
            *bitmap = bitmap.clone();
            Out::Nothing
        }
        BitAct::MarkDirty {
            view,
            ref skips,
            at,
            len,
        } => {
            viewed(bitmap, view, skips, &mut |marks| marks.mark(at, len));
            Out::Nothing
        }
        BitAct::ReadDirty {
            view,
            ref skips,
            at,
        } => {
            let mut seen = false;
            viewed(bitmap, view, skips, &mut |marks| seen = marks.dirty(at));
            Out::Bool(seen)
        }
    };
    Out::All(vec![
        result,
        bitmap.len().into(),
        bitmap.byte_size().into(),
        Out::Words(words_of(Some(bitmap))),
    ])
}
