//! Allocations of the crate's structures. A program of its own, with an allocator that counts per
//! thread.
#![cfg(all(
    unix,
    feature = "rawfd",
    feature = "backend-mmap",
    feature = "backend-bitmap",
    feature = "iommu"
))]
#![expect(unsafe_code, reason = "a global allocator is unsafe to implement")]

mod bitmap;
mod counting_allocator;
mod io_buffer;
mod iotlb;

#[global_allocator]
static ALLOCATOR: counting_allocator::Counting = counting_allocator::Counting;
