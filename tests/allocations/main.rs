//! The crate's structures allocate no more than they document.
//!
//! The allocator of this program counts the allocations of each thread.
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
