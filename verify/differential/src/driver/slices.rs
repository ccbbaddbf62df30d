//! The methods of `VolatileMemory`, `VolatileSlice`, `VolatileRef` and `VolatileArrayRef`.
#![expect(unsafe_code, reason = "calls aligned_as_ref and aligned_as_mut")]

use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use super::asks::place;
use super::fault::{Hosts, IntoFault};
use super::streams::{Drain, Feed};
use super::touch::{touch, LARGEST_BUFFER};
use super::types::{bytes_of, value_of, values_of, with_atom, with_ty};
use super::vm::bitmap::BitmapSlice;
use super::vm::{
    AtomicAccess, AtomicInteger, ByteValued, ReadVolatile, VolatileArrayRef, VolatileMemory,
    VolatileMemoryError, VolatileRef, VolatileSlice, WriteVolatile,
};
use crate::op::{Access, Act, Path, Walk};
use crate::out::Out;

/// An operation on a slice with any type of bitmap.
pub trait SliceJob {
    /// Runs the operation. The slice is in one of `hosts`.
    fn run<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>, hosts: &Hosts) -> Out;
}

/// Follows `steps` from `slice`, and runs the job at their end.
pub fn walk<B: BitmapSlice>(
    slice: &VolatileSlice<'_, B>,
    steps: &[Walk],
    hosts: &Hosts,
    job: &mut impl SliceJob,
) -> Out {
    let Some((step, rest)) = steps.split_first() else {
        return job.run(slice, hosts);
    };
    let next: Result<VolatileSlice<'_, B>, VolatileMemoryError> = match *step {
        Walk::Offset(by) => slice.offset(by),
        Walk::Subslice { at, len } => slice.subslice(at, len),
        Walk::SplitLeft(at) => slice.split_at(at).map(|(left, _)| left),
        Walk::SplitRight(at) => slice.split_at(at).map(|(_, right)| right),
        Walk::Get { at, len } => VolatileMemory::get_slice(slice, at, len),
        Walk::ThroughRef { at, ty } => with_ty!(
            ty,
            T => slice.get_ref::<T>(at).map(|r| r.to_slice()),
            else return Out::NotApplicable
        ),
        Walk::ThroughArray { at, count, ty } => {
            with_ty!(
                ty,
                T => slice.get_array_ref::<T>(at, count).map(|r| r.to_slice()),
                else return Out::NotApplicable
            )
        }
        Walk::Whole2 => Ok(slice.as_volatile_slice()),
    };
    match next {
        Ok(next) => walk(&next, rest, hosts, job),
        Err(error) => Out::Failed(error.fault(hosts)),
    }
}

/// Finds the slice of a path, for acts with a second slice.
pub trait Paths {
    /// Runs the job with the slice of the path.
    fn with_slice(&self, path: &Path, job: &mut impl SliceJob) -> Out;
}

/// An act, as a job.
pub struct ActJob<'a, P> {
    pub paths: &'a P,
    pub act: &'a Act,
}

/// An access, as a job.
pub struct TouchJob<'a> {
    pub at: u64,
    pub access: &'a Access,
}

impl SliceJob for TouchJob<'_> {
    fn run<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>, hosts: &Hosts) -> Out {
        touch(slice, self.at as usize, self.access, hosts)
    }
}

/// The second half of a copy between slices.
struct CopySlice<'a, 'b, B: BitmapSlice>(&'a VolatileSlice<'b, B>);

impl<B: BitmapSlice> SliceJob for CopySlice<'_, '_, B> {
    fn run<S: BitmapSlice>(&mut self, to: &VolatileSlice<'_, S>, _: &Hosts) -> Out {
        self.0.copy_to_volatile_slice(to.clone());
        Out::Nothing
    }
}

/// The second half of a copy from an array to a slice.
struct CopyArray<'a, 'b, T: ByteValued, B: BitmapSlice>(&'a VolatileArrayRef<'b, T, B>);

impl<T: ByteValued, B: BitmapSlice> SliceJob for CopyArray<'_, '_, T, B> {
    fn run<S: BitmapSlice>(&mut self, to: &VolatileSlice<'_, S>, _: &Hosts) -> Out {
        self.0.copy_to_volatile_slice(to.clone());
        Out::Nothing
    }
}

impl<P: Paths> SliceJob for ActJob<'_, P> {
    fn run<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>, hosts: &Hosts) -> Out {
        let failed = |error: VolatileMemoryError| error.fault(hosts);
        match *self.act {
            Act::Extent2 => {
                let whole = slice.as_volatile_slice();
                Out::All(vec![
                    slice.len().into(),
                    slice.is_empty().into(),
                    VolatileMemory::len(slice).into(),
                    VolatileMemory::is_empty(slice).into(),
                    place(slice, hosts),
                    place(&whole, hosts),
                ])
            }
            Act::Guard { mutable: false } => place(slice, hosts),
            Act::Guard { mutable: true } => {
                let guard = slice.ptr_guard_mut();
                Out::All(vec![
                    hosts.place(guard.as_ptr() as usize),
                    Out::from(guard.len()),
                ])
            }
            Act::CopyToSlice { ref to } => self.paths.with_slice(to, &mut CopySlice(slice)),
            Act::EndOffset { base, by } => {
                Out::of(slice.compute_end_offset(base, by).map_err(failed))
            }
            Act::ArrayOfSlice => {
                let array = VolatileArrayRef::from(slice.clone());
                Out::All(vec![
                    array.len().into(),
                    array.element_size().into(),
                    place(&array.to_slice(), hosts),
                ])
            }
            Act::AtomicRefLoad { at, ty } => with_atom!(ty, T => {
                type A = <T as AtomicAccess>::A;
                Out::of(slice.get_atomic_ref::<A>(at).map_err(failed).map(|atom| {
                    T::from(AtomicInteger::load(atom, Ordering::Relaxed)).as_slice().to_vec()
                }))
            }),
            Act::AtomicRefStore { at, ty, value } => with_atom!(ty, T => {
                type A = <T as AtomicAccess>::A;
                Out::of(slice.get_atomic_ref::<A>(at).map_err(failed).map(|atom| {
                    AtomicInteger::store(atom, value as T, Ordering::Relaxed);
                }))
            }),
            Act::DirtyAt2(at) => slice.bitmap().dirty_at(at).into(),
            Act::DirectRead { ref source, exact } => {
                let mut feed = Feed::new(source);
                let mut into = slice.clone();
                let result = if exact {
                    Out::of(feed.read_exact_volatile(&mut into).map_err(failed))
                } else {
                    Out::of(feed.read_volatile(&mut into).map_err(failed))
                };
                Out::All(vec![result, feed.position().into()])
            }
            Act::DirectWrite { ref sink, all } => {
                let mut drain = Drain::new(sink);
                let result = if all {
                    Out::of(drain.write_all_volatile(slice).map_err(failed))
                } else {
                    Out::of(drain.write_volatile(slice).map_err(failed))
                };
                let (bytes, position) = drain.contents();
                Out::All(vec![result, bytes.into(), position.into()])
            }
            Act::CopyTo { ty, .. }
            | Act::CopyFrom { ty, .. }
            | Act::RefLoad { ty, .. }
            | Act::RefStore { ty, .. }
            | Act::RefExtent { ty, .. }
            | Act::ArrayExtent { ty, .. }
            | Act::ArrayGuard { ty, .. }
            | Act::ArrayLoad { ty, .. }
            | Act::ArrayStore { ty, .. }
            | Act::ArrayRefAt { ty, .. }
            | Act::ArrayCopyTo { ty, .. }
            | Act::ArrayCopyFrom { ty, .. }
            | Act::ArrayCopyToSlice { ty, .. }
            | Act::AlignedRef { ty, .. }
            | Act::AlignedMut { ty, .. } => {
                with_ty!(ty, T => typed::<T, B, P>(self, slice, hosts), else Out::NotApplicable)
            }
        }
    }
}

/// An action on a slice, with one type of values.
struct Typed<'a, B, T> {
    slice: &'a VolatileSlice<'a, B>,
    hosts: &'a Hosts,
    ty: PhantomData<T>,
}

fn typed<T: ByteValued, B: BitmapSlice, P: Paths>(
    job: &ActJob<'_, P>,
    slice: &VolatileSlice<'_, B>,
    hosts: &Hosts,
) -> Out {
    let on = Typed::<B, T> {
        slice,
        hosts,
        ty: PhantomData,
    };
    match *job.act {
        Act::CopyTo { count, .. } => on.copy_to(count),
        Act::CopyFrom { count, seed, .. } => on.copy_from(count, seed),
        Act::RefLoad { at, .. } => on.reference(at, |r| bytes_of(&[r.load()])),
        Act::RefStore { at, seed, .. } => on.reference(at, |r| r.store(value_of(seed))),
        Act::RefExtent { at, .. } => on.reference(at, |r| ref_extent(&r, hosts)),
        Act::ArrayExtent { at, count, .. } => on.array(at, count, |a| array_extent(&a, hosts)),
        Act::ArrayGuard {
            at, count, mutable, ..
        } => on.array(at, count, |a| array_guard(&a, mutable, hosts)),
        Act::ArrayLoad {
            at, count, index, ..
        } => on.array(at, count, |a| bytes_of(&[a.load(index)])),
        Act::ArrayStore {
            at,
            count,
            index,
            seed,
            ..
        } => on.array(at, count, |a| a.store(index, value_of(seed))),
        Act::ArrayRefAt {
            at, count, index, ..
        } => on.array(at, count, |a| place(&a.ref_at(index).to_slice(), hosts)),
        Act::ArrayCopyTo {
            at, count, room, ..
        } => on.array_copy_to(at, count, room),
        Act::ArrayCopyFrom {
            at,
            count,
            given,
            seed,
            ..
        } => on.array_copy_from(at, count, given, seed),
        Act::ArrayCopyToSlice {
            at, count, ref to, ..
        } => match slice.get_array_ref::<T>(at, count) {
            Ok(array) => job.paths.with_slice(to, &mut CopyArray(&array)),
            Err(error) => Out::Failed(error.fault(hosts)),
        },
        Act::AlignedRef { at, .. } => on.aligned_ref(at),
        Act::AlignedMut { at, seed, .. } => on.aligned_mut(at, seed),
        _ => Out::NotApplicable,
    }
}

impl<B: BitmapSlice, T: ByteValued> Typed<'_, B, T> {
    fn out<O>(&self, result: Result<O, VolatileMemoryError>) -> Out
    where
        Out: From<O>,
    {
        Out::of(result.map_err(|error| error.fault(self.hosts)))
    }

    fn too_many(count: usize) -> bool {
        count.saturating_mul(size_of::<T>().max(1)) > LARGEST_BUFFER
    }

    fn reference<O>(&self, at: usize, act: impl FnOnce(VolatileRef<'_, T, B>) -> O) -> Out
    where
        Out: From<O>,
    {
        self.out(self.slice.get_ref::<T>(at).map(act))
    }

    fn array<O>(
        &self,
        at: usize,
        count: usize,
        act: impl FnOnce(VolatileArrayRef<'_, T, B>) -> O,
    ) -> Out
    where
        Out: From<O>,
    {
        self.out(self.slice.get_array_ref::<T>(at, count).map(act))
    }

    fn copy_to(&self, count: usize) -> Out {
        if Self::too_many(count) {
            return Out::NotApplicable;
        }
        let mut values = values_of::<T>(0xEE, count);
        let copied = self.slice.copy_to(&mut values);
        Out::All(vec![Out::from(copied), bytes_of(&values).into()])
    }

    fn copy_from(&self, count: usize, seed: u8) -> Out {
        if Self::too_many(count) {
            return Out::NotApplicable;
        }
        self.slice.copy_from(&values_of::<T>(seed, count));
        Out::Nothing
    }

    fn array_copy_to(&self, at: usize, count: usize, room: usize) -> Out {
        if Self::too_many(room) {
            return Out::NotApplicable;
        }
        self.array(at, count, |array| {
            let mut values = values_of::<T>(0xEE, room);
            let copied = array.copy_to(&mut values);
            vec![Out::from(copied), bytes_of(&values).into()]
        })
    }

    fn array_copy_from(&self, at: usize, count: usize, given: usize, seed: u8) -> Out {
        if Self::too_many(given) {
            return Out::NotApplicable;
        }
        self.array(at, count, |array| {
            array.copy_from(&values_of::<T>(seed, given))
        })
    }

    fn aligned_ref(&self, at: usize) -> Out {
        // SAFETY: one thread uses this memory, and only through the reference while it lives.
        let result = unsafe { self.slice.aligned_as_ref::<T>(at) };
        self.out(result.map(|value| bytes_of(&[*value])))
    }

    fn aligned_mut(&self, at: usize, seed: u8) -> Out {
        // SAFETY: one thread uses this memory, and only through the reference while it lives.
        let result = unsafe { self.slice.aligned_as_mut::<T>(at) };
        self.out(result.map(|value| *value = value_of(seed)))
    }
}

fn ref_extent<T: ByteValued, B: BitmapSlice>(r: &VolatileRef<'_, T, B>, hosts: &Hosts) -> Vec<Out> {
    let (shared, mutable) = (r.ptr_guard(), r.ptr_guard_mut());
    vec![
        Out::from(r.len()),
        r.bitmap().dirty_at(0).into(),
        place(&r.to_slice(), hosts),
        hosts.place(shared.as_ptr() as usize),
        shared.len().into(),
        hosts.place(mutable.as_ptr() as usize),
        mutable.len().into(),
    ]
}

fn array_extent<T: ByteValued, B: BitmapSlice>(
    array: &VolatileArrayRef<'_, T, B>,
    hosts: &Hosts,
) -> Vec<Out> {
    vec![
        Out::from(array.len()),
        array.is_empty().into(),
        array.element_size().into(),
        array.bitmap().dirty_at(0).into(),
        place(&array.to_slice(), hosts),
    ]
}

fn array_guard<T: ByteValued, B: BitmapSlice>(
    array: &VolatileArrayRef<'_, T, B>,
    mutable: bool,
    hosts: &Hosts,
) -> Vec<Out> {
    if mutable {
        let guard = array.ptr_guard_mut();
        vec![hosts.place(guard.as_ptr() as usize), Out::from(guard.len())]
    } else {
        let guard = array.ptr_guard();
        vec![hosts.place(guard.as_ptr() as usize), Out::from(guard.len())]
    }
}
