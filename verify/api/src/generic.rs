//! Code that is generic over memory, as devices and loaders are. It uses the methods of its bounds
//! only.

use std::sync::atomic::Ordering;

use crate::everything::*;
use crate::{Outcome, PAGE};

fn with_backend<M: GuestMemoryBackend>(memory: &M) -> Outcome {
    // The bound makes these unambiguous, although `GuestMemory` has both names too.
    assert!(memory.check_range(GuestAddress(0), PAGE));
    assert_eq!(memory.get_slices(GuestAddress(0), 8).count(), 1);
    assert_eq!(
        memory
            .get_slices(GuestAddress(0), 8)
            .stop_on_error()?
            .count(),
        1
    );
    assert_eq!(
        memory.iter().map(GuestMemoryRegion::len).sum::<u64>(),
        PAGE as u64
    );
    let region = memory.find_region(GuestAddress(8)).ok_or("no region")?;
    assert_eq!(region.start_addr(), GuestAddress(0));
    assert_eq!(region.get_slice(MemoryRegionAddress(0), 8)?.len(), 8);
    region.write_obj(1u8, MemoryRegionAddress(8))?;
    memory.write_obj(2u8, GuestAddress(9))?;
    assert_eq!(
        memory
            .get_slice(GuestAddress(8), 2)?
            .read_obj::<[u8; 2]>(0)?,
        [1, 2]
    );
    assert!(!memory.get_host_address(GuestAddress(8))?.is_null());
    assert_eq!(memory.num_regions(), 1);
    assert!(memory.address_in_range(memory.last_addr()));
    assert!(
        memory.check_address(GuestAddress(8)).is_some()
            && memory.to_region_addr(GuestAddress(8)).is_some()
    );
    assert!(memory.checked_offset(GuestAddress(8), PAGE).is_none());
    assert!(memory.physical_memory().is_some());
    Ok(())
}

fn with_memory<M: GuestMemory + ?Sized>(memory: &M) -> Outcome {
    assert!(memory.check_range(GuestAddress(0), 8, Permissions::Write));
    let slices = memory.get_slices(GuestAddress(0), 8, Permissions::Read)?;
    assert_eq!(
        slices
            .stop_on_error()?
            .map(|slice| slice.len())
            .sum::<usize>(),
        8
    );
    let slice = memory
        .get_slices(GuestAddress(0), 8, Permissions::ReadWrite)?
        .next()
        .ok_or("no slice")??;
    slice.write_obj(1u32, 0)?;
    memory.store(2u32, GuestAddress(4), Ordering::Release)?;
    assert_eq!(memory.load::<u32>(GuestAddress(0), Ordering::Acquire)?, 1);
    assert!(memory
        .physical_memory()
        .is_some_and(|physical| physical.num_regions() == 1));
    Ok(())
}

fn with_bytes<A: Copy, M: Bytes<A>>(memory: &M, address: A) -> std::result::Result<u16, M::E> {
    memory.write_slice(&[1, 2], address)?;
    memory.write_obj(3u16, address)?;
    memory.read_exact_volatile_from(address, &mut &[4u8, 0][..], 2)?;
    memory.read_obj(address)
}

fn with_region<R: GuestMemoryRegionBytes>(region: &R) -> Outcome {
    assert!(region.len() > 0 && region.last_addr() >= region.start_addr());
    assert_eq!(region.as_volatile_slice()?.len() as u64, region.len());
    region.write_obj(1u8, MemoryRegionAddress(0))?;
    region.bitmap().mark_dirty(0, 1);
    assert!(region.to_region_addr(region.start_addr()).is_some());
    assert!(
        region.address_in_range(MemoryRegionAddress(0))
            && region.check_address(MemoryRegionAddress(0)).is_some()
    );
    assert_eq!(
        region.checked_offset(MemoryRegionAddress(0), 1),
        Some(MemoryRegionAddress(1))
    );
    assert!(region.file_offset().is_none());
    #[cfg(target_os = "linux")]
    assert!(region.is_hugetlbfs().is_none());
    assert!(!region.get_host_address(MemoryRegionAddress(0))?.is_null());
    Ok(())
}

fn with_volatile<V: VolatileMemory>(memory: &V) -> Outcome {
    assert!(!memory.is_empty() && memory.len() >= 8);
    memory.get_slice(0, 8)?.write_obj(1u8, 0)?;
    memory.get_ref::<u8>(1)?.store(2);
    assert_eq!(memory.get_array_ref::<u8>(0, 2)?.load(1), 2);
    assert_eq!(
        memory.as_volatile_slice().len(),
        memory.compute_end_offset(0, memory.len())?
    );
    assert!(memory
        .get_atomic_ref::<std::sync::atomic::AtomicU8>(0)
        .is_ok());
    Ok(())
}

/// Meets each bound with the library's type, and with a reference, as devices store it.
pub fn all() -> Outcome {
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), PAGE)])?;
    with_backend(&memory)?;
    with_memory(&memory)?;
    with_memory(&*memory.clone().memory_of())?;
    assert_eq!(with_bytes(&memory, GuestAddress(0))?, 4);
    let region = memory.iter().next().ok_or("no region")?;
    assert_eq!(with_bytes(region, MemoryRegionAddress(0))?, 4);
    assert_eq!(with_bytes(&region.as_volatile_slice()?, 0)?, 4);
    with_region(region)?;
    with_volatile(&**region)?;
    with_volatile(&region.as_volatile_slice()?)?;
    Ok(())
}

/// A user's method for every kind of shared memory.
trait Shared: GuestMemory + Sized {
    fn memory_of(self) -> std::sync::Arc<Self> {
        std::sync::Arc::new(self)
    }
}

impl<M: GuestMemory> Shared for M {}
