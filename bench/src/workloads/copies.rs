//! Copies from, to and between `VolatileSlice`s.

use std::hint::black_box;

use anyhow::Result;

use super::kinds::{memory, Plain};
use super::vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};
use crate::comparison::{timed, Batch};
use crate::layout::Layout;
use crate::shared_pages::SharedPages;
use crate::throughput::Shift;
use crate::values::HostArray;

/// Copies N elements from the guest to the host.
pub fn copy_to<T: ByteValued + Default + 'static, const N: usize>(
    shared: &SharedPages,
) -> Result<Batch> {
    let memory = memory::<Plain>(shared, Layout::apart(1))?;
    let mut host = HostArray::<T, N>::boxed();
    Ok(Batch::around(move |iterations| {
        let slice = memory.get_slice(GuestAddress(0), N * size_of::<T>())?;
        Ok(timed(iterations, |_| {
            let copied = black_box(&slice).copy_to(black_box(host.values.as_mut_slice()));
            copied == N
        }))
    }))
}

/// Copies N elements from the host to the guest.
pub fn copy_from<T: ByteValued + Default + 'static, const N: usize>(
    shared: &SharedPages,
) -> Result<Batch> {
    let memory = memory::<Plain>(shared, Layout::apart(1))?;
    let host = HostArray::<T, N>::boxed();
    Ok(Batch::around(move |iterations| {
        let slice = memory.get_slice(GuestAddress(0), N * size_of::<T>())?;
        Ok(timed(iterations, |_| {
            black_box(&slice).copy_from(black_box(host.values.as_slice()));
        }))
    }))
}

/// Copies bytes within the guest.
pub fn copy_to_volatile_slice(shared: &SharedPages, len: usize) -> Result<Batch> {
    let memory = memory::<Plain>(shared, Layout::apart(1))?;
    Ok(Batch::around(move |iterations| {
        let from = memory.get_slice(GuestAddress(0), len)?;
        let to = memory.get_slice(
            GuestAddress(crate::workload_shapes::SECOND_SLICE as u64),
            len,
        )?;
        Ok(timed(iterations, |_| {
            black_box(&from).copy_to_volatile_slice(*black_box(&to));
        }))
    }))
}

/// Copies bytes from the guest to the host, for `--throughput`.
pub fn copy_bytes(shared: &SharedPages, len: usize, shift: Shift) -> Result<Batch> {
    let memory = memory::<Plain>(shared, Layout::apart(1))?;
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        let slice = memory.get_slice(GuestAddress(shift.guest as u64), len)?;
        host.with(shift.host + len, |buffer| {
            let buffer = buffer.get_mut(shift.host..).unwrap_or_default();
            timed(iterations, |_| {
                black_box(&slice).copy_to(black_box(&mut *buffer)) == len
            })
        })
    }))
}
