//! Region lookup, range checks, and access by guest address.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use anyhow::Result;

use super::kinds::{memory, Plain};
use super::vm_memory::bitmap::NewBitmap;
use super::vm_memory::{AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemoryBackend};
use crate::comparison::{timed, Batch};
use crate::layout::Layout;
use crate::shared_pages::SharedPages;

pub fn find_region(shared: &SharedPages, regions: usize) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<Plain>(shared, layout)?;
    let addresses = layout.addresses(1, 1);
    Ok(Batch::of(move |number| {
        memory
            .find_region(black_box(GuestAddress(addresses.at(number))))
            .map(core::ptr::from_ref)
    }))
}

pub fn get_slice64(shared: &SharedPages, regions: usize) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<Plain>(shared, layout)?;
    let addresses = layout.addresses(64, 8);
    Ok(Batch::of(move |number| {
        memory
            .get_slice(black_box(GuestAddress(addresses.at(number))), 64)
            .map(|slice| slice.ptr_guard().as_ptr())
    }))
}

pub fn check_range4k(shared: &SharedPages, regions: usize) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<Plain>(shared, layout)?;
    let addresses = layout.addresses(4096, 64);
    Ok(Batch::of(move |number| {
        GuestMemoryBackend::check_range(
            &memory,
            black_box(GuestAddress(addresses.at(number))),
            4096,
        )
    }))
}

pub fn get_slices64_next(shared: &SharedPages, regions: usize) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<Plain>(shared, layout)?;
    let addresses = layout.addresses(64, 8);
    Ok(Batch::of(
        move |number| match GuestMemoryBackend::get_slices(
            &memory,
            black_box(GuestAddress(addresses.at(number))),
            64,
        )
        .next()
        {
            Some(Ok(slice)) => Some(slice.ptr_guard().as_ptr()),
            _ => None,
        },
    ))
}

pub fn read_obj<T: ByteValued, B: NewBitmap + 'static>(
    shared: &SharedPages,
    regions: usize,
) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<B>(shared, layout)?;
    let addresses = layout.addresses(size_of::<T>(), size_of::<T>());
    Ok(Batch::of(move |number| {
        memory.read_obj::<T>(black_box(GuestAddress(addresses.at(number))))
    }))
}

pub fn write_obj<T: ByteValued + Default, B: NewBitmap + 'static>(
    shared: &SharedPages,
    regions: usize,
) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<B>(shared, layout)?;
    let addresses = layout.addresses(size_of::<T>(), size_of::<T>());
    Ok(Batch::of(move |number| {
        memory.write_obj::<T>(
            black_box(T::default()),
            black_box(GuestAddress(addresses.at(number))),
        )
    }))
}

pub fn load<T: AtomicAccess, B: NewBitmap + 'static>(
    shared: &SharedPages,
    regions: usize,
) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<B>(shared, layout)?;
    let addresses = layout.addresses(size_of::<T>(), size_of::<T>());
    Ok(Batch::of(move |number| {
        memory.load::<T>(
            black_box(GuestAddress(addresses.at(number))),
            Ordering::Acquire,
        )
    }))
}

pub fn store<T: AtomicAccess + Default, B: NewBitmap + 'static>(
    shared: &SharedPages,
    regions: usize,
) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let memory = memory::<B>(shared, layout)?;
    let addresses = layout.addresses(size_of::<T>(), size_of::<T>());
    Ok(Batch::of(move |number| {
        memory.store::<T>(
            black_box(T::default()),
            black_box(GuestAddress(addresses.at(number))),
            Ordering::Release,
        )
    }))
}

/// Returns the alignment of buffers of `len` bytes in the guest.
fn alignment(len: usize) -> usize {
    len.min(64)
}

pub fn read_slice<B: NewBitmap + 'static>(shared: &SharedPages, len: usize) -> Result<Batch> {
    let layout = Layout::apart(1);
    let memory = memory::<B>(shared, layout)?;
    let addresses = layout.addresses(len, alignment(len));
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        host.with(len, |buffer| {
            timed(iterations, |number| {
                memory.read_slice(
                    black_box(&mut *buffer),
                    black_box(GuestAddress(addresses.at(number))),
                )
            })
        })
    }))
}

pub fn write_slice<B: NewBitmap + 'static>(shared: &SharedPages, len: usize) -> Result<Batch> {
    let layout = Layout::apart(1);
    let memory = memory::<B>(shared, layout)?;
    let addresses = layout.addresses(len, alignment(len));
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        host.with(len, |buffer| {
            timed(iterations, |number| {
                memory.write_slice(
                    black_box(&*buffer),
                    black_box(GuestAddress(addresses.at(number))),
                )
            })
        })
    }))
}

/// Reads that are half in one region and half in the next.
pub fn read_slice_cross(shared: &SharedPages, len: usize, regions: usize) -> Result<Batch> {
    let layout = Layout::adjacent(regions);
    let memory = memory::<Plain>(shared, layout)?;
    let addresses = layout.crossings(len);
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        host.with(len, |buffer| {
            timed(iterations, |number| {
                memory.read_slice(
                    black_box(&mut *buffer),
                    black_box(GuestAddress(addresses.at(number))),
                )
            })
        })
    }))
}
