//! Operations that several threads run at the same time.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::Result;

use super::iommu::translated;
use super::kinds::{Plain, Tracked};
use super::vm_memory::bitmap::NewBitmap;
use super::vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap,
};
use crate::layout::Layout;
use crate::scaling::{Work, COPY, GUEST};
use crate::shared_pages::SharedPages;
use crate::workload_shapes::Mappings;

fn memory<B: NewBitmap>() -> Result<GuestMemoryMmap<B>> {
    Ok(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), GUEST)])?)
}

/// Writes with marks. Each thread has its own pages, at multiples of `distance`.
pub fn write_marked(distance: u64) -> Result<Work> {
    let (memory, addresses) = (memory::<Tracked>()?, Layout::apart(1).addresses(8, 8));
    Ok(Work::of(move |thread, number| {
        let addr = GuestAddress(thread * distance + addresses.at(number));
        memory.write_obj(number, black_box(addr)).is_ok()
    }))
}

/// Takes the current map and reads from it.
pub fn read_of_map() -> Result<Work> {
    let atomic = GuestMemoryAtomic::new(memory::<Plain>()?);
    let addresses = Layout::apart(1).addresses(8, 8);
    Ok(Work::of(move |_, number| {
        let addr = black_box(GuestAddress(addresses.at(number)));
        atomic.memory().read_obj::<u64>(addr).is_ok()
    }))
}

/// Copies to pages of each thread.
pub fn copy(distance: u64) -> Result<Work> {
    let memory = memory::<Plain>()?;
    Ok(Work::of(move |thread, number| {
        let addr = GuestAddress(thread * distance + number % 4 * COPY as u64);
        memory.write_slice(black_box(&[1; COPY]), addr).is_ok()
    }))
}

/// Reads through an IOTLB behind a lock, which another thread may change meanwhile.
pub fn read_translated(shared: &SharedPages, mappings: Mappings, changes: bool) -> Result<Work> {
    let memory = translated(shared, mappings, true)?;
    let (addresses, pages) = (mappings.addresses(8), mappings.pages().collect::<Vec<_>>());
    let iommu = Arc::clone(memory.iommu());
    let work = Work::of(move |_, number| {
        let addr = black_box(GuestAddress(addresses.at(number)));
        black_box(memory.read_obj::<u64>(addr)).is_ok()
    });
    if !changes {
        return Ok(work);
    }
    Ok(work.beside(move |number| {
        let (iova, to) = pages[number as usize % pages.len()];
        iommu.remap(GuestAddress(iova), GuestAddress(to)).is_some()
    }))
}
