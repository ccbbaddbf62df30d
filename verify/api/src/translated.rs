//! The IOTLB, and memory behind an IOMMU.

use std::ops::Deref;
use std::sync::{Arc, RwLock, RwLockReadGuard};

use crate::everything::*;
use crate::{Outcome, PAGE};

/// An IOMMU with its IOTLB in a lock. It maps misses to the same address.
#[derive(Debug, Default)]
pub struct Identity(RwLock<Iotlb>);

impl Iommu for Identity {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> std::result::Result<IotlbIterator<Self::IotlbGuard<'_>>, vm_memory::iommu::Error> {
        match Iotlb::lookup(self.0.read().unwrap(), iova, length, access) {
            Ok(iterator) => return Ok(iterator),
            Err(IotlbFails {
                misses,
                access_fails: _,
            }) => {
                let mut iotlb = self.0.write().unwrap();
                for IovaRange { base, length } in misses {
                    iotlb.set_mapping(base, base, length, Permissions::ReadWrite)?;
                }
            }
        }
        Iotlb::lookup(self.0.read().unwrap(), iova, length, access).map_err(|fails| {
            vm_memory::iommu::Error::CannotResolve {
                iova_range: IovaRange { base: iova, length },
                reason: format!(
                    "{} misses, {} refused",
                    fails.misses.len(),
                    fails.access_fails.len()
                ),
            }
        })
    }
}

type Memory = IommuMemory<GuestMemoryMmap<AtomicBitmap>, Identity>;

fn memory(enabled: bool) -> std::result::Result<Memory, FromRangesError> {
    let backend = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 * PAGE)])?;
    Ok(IommuMemory::new(
        backend,
        Identity::default(),
        enabled,
        AtomicBitmap::with_len(4 * PAGE),
    ))
}

/// Calls every method of [`Iotlb`] and of the types it returns.
pub fn iotlb() -> Outcome {
    let mut iotlb = Iotlb::new();
    iotlb.set_mapping(
        GuestAddress(0x1000),
        GuestAddress(0x8000),
        PAGE,
        Permissions::Read,
    )?;
    iotlb.set_mapping(
        GuestAddress(0x2000),
        GuestAddress(0x4000),
        PAGE,
        Permissions::ReadWrite,
    )?;
    let found: IotlbIterator<&Iotlb> =
        Iotlb::lookup(&iotlb, GuestAddress(0x1800), PAGE, Permissions::Read)
            .map_err(|_| "a miss")?;
    let ranges: Vec<MappedRange> = found.collect();
    assert_eq!(
        ranges
            .iter()
            .map(|range| (range.base.0, range.length))
            .collect::<Vec<_>>(),
        [(0x8800, 0x800), (0x4000, 0x800)]
    );
    let fails = Iotlb::lookup(
        Arc::new(Iotlb::default()),
        GuestAddress(0),
        1,
        Permissions::Read,
    )
    .err()
    .ok_or("a hit")?;
    assert_eq!((fails.misses.len(), fails.access_fails.len()), (1, 0));
    let fails = Iotlb::lookup(&iotlb, GuestAddress(0x1000), 1, Permissions::Write)
        .err()
        .ok_or("a hit")?;
    assert_eq!((fails.misses.len(), fails.access_fails.len()), (0, 1));
    iotlb.invalidate_mapping(GuestAddress(0x1000), PAGE);
    iotlb.invalidate_all();
    let range: IovaRange = (0x1000u64..0x3000).try_into()?;
    assert_eq!((range.base, range.length), (GuestAddress(0x1000), 2 * PAGE));
    Ok(())
}

/// Calls every method of [`IommuMemory`], and those of [`GuestMemory`] and [`Bytes`] on it, without
/// naming the trait.
pub fn iommu_memory() -> Outcome {
    let mut memory = memory(true)?;
    assert!(memory.get_iommu_enabled());
    memory.set_iommu_enabled(false);
    memory.set_iommu_enabled(true);
    assert!(memory.check_range(GuestAddress(0), 2 * PAGE, Permissions::ReadWrite));
    memory.write_obj(7u32, GuestAddress(0x1ffe))?;
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1ffe))?, 7);
    memory.store(
        8u32,
        GuestAddress(0x2000),
        std::sync::atomic::Ordering::Release,
    )?;
    assert_eq!(
        memory.load::<u32>(GuestAddress(0x2000), std::sync::atomic::Ordering::Acquire)?,
        8
    );
    assert_eq!(memory.write(&[1, 2], GuestAddress(0))?, 2);
    memory.write_slice(&[1, 2], GuestAddress(0))?;
    let mut buffer = [0; 2];
    assert_eq!(memory.read(&mut buffer, GuestAddress(0))?, 2);
    memory.read_slice(&mut buffer, GuestAddress(0))?;
    memory.read_exact_volatile_from(GuestAddress(0), &mut &[5u8, 6][..], 2)?;
    memory.write_all_volatile_to(GuestAddress(0), &mut Vec::new(), 2)?;
    let lengths = memory
        .get_slices(GuestAddress(0), 16, Permissions::Read)?
        .stop_on_error()?
        .map(|slice| slice.len())
        .sum::<usize>();
    assert_eq!(lengths, 16);
    assert_eq!(
        memory
            .get_slices(GuestAddress(0), 16, Permissions::Read)?
            .by_ref()
            .flatten()
            .count(),
        1
    );
    assert!(memory.physical_memory().is_none());
    assert_eq!(memory.get_backend().num_regions(), 1);
    assert!(memory.bitmap().dirty_at(0x1ffe));
    assert!(memory
        .iommu()
        .translate(GuestAddress(0), 1, Permissions::Read)?
        .next()
        .is_some());
    assert_eq!(
        Deref::deref(memory.iommu()).0.read().unwrap().deref() as *const Iotlb,
        {
            let guard = memory.iommu().0.read().unwrap();
            &raw const *guard
        }
    );
    let other = memory.with_replaced_backend(GuestMemoryMmap::new());
    assert!(!other.check_range(GuestAddress(0), 1, Permissions::Read));
    assert_eq!(memory.clone().read_obj::<u8>(GuestAddress(0))?, 5);
    let answers: [Mine; 2] = [
        memory.read_cstr(GuestAddress(0)),
        memory.zero_range(GuestAddress(0), 1),
    ];
    assert_eq!(answers[1], Mine("zero_range"));
    assert!(IommuMemory::<GuestMemoryMmap, Identity>::default()
        .physical_memory()
        .is_some());
    Ok(())
}

/// Accesses translated memory through a map that is swapped, as vhost-user back ends do.
pub fn iommu_memory_swapped() -> Outcome {
    let space = GuestMemoryAtomic::new(memory(true)?);
    space.memory().write_obj(1u8, GuestAddress(0))?;
    let replaced = space
        .memory()
        .with_replaced_backend(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGE)])?);
    space.lock().unwrap().replace(replaced);
    assert_eq!(space.memory().read_obj::<u8>(GuestAddress(0))?, 0);
    Ok(())
}
