//! Shared memory: [`GuestAddressSpace`], and [`GuestMemoryAtomic`], whose map is replaced.

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use crate::everything::*;
use crate::{Outcome, PAGE};

/// A device that is generic over the holder of its memory.
#[derive(Debug)]
pub struct Device<S: GuestAddressSpace> {
    space: S,
}

impl<S: GuestAddressSpace> Device<S> {
    fn byte(&self) -> GuestMemoryResult<u8> {
        let memory = self.space.memory();
        let direct: u8 = memory.read_obj(GuestAddress(1))?;
        let cloned = memory.clone();
        assert_eq!(cloned.read_obj::<u8>(GuestAddress(1))?, direct);
        assert!(cloned.check_range(GuestAddress(0), 2, Permissions::Read));
        Ok(self
            .space
            .clone()
            .memory()
            .physical_memory()
            .map_or(0, |_| direct))
    }
}

fn memory(value: u8) -> std::result::Result<GuestMemoryMmap, Box<dyn std::error::Error>> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGE)])?;
    memory.write_obj(value, GuestAddress(1))?;
    Ok(memory)
}

/// A map that can be changed, as VMMs wrote it before [`GuestMemoryAtomic`].
#[derive(Clone, Debug)]
pub struct Locked(Arc<Mutex<Arc<GuestMemoryMmap>>>);

impl GuestAddressSpace for Locked {
    type M = GuestMemoryMmap;
    type T = Arc<GuestMemoryMmap>;

    fn memory(&self) -> Self::T {
        self.0.lock().unwrap().clone()
    }
}

/// Runs one device on each holder.
pub fn address_spaces() -> Outcome {
    let plain = memory(3)?;
    assert_eq!(Device { space: &plain }.byte()?, 3);
    let reference = &plain;
    assert_eq!(reference.memory().num_regions(), 1);
    let (counted, shared) = (Rc::new(memory(4)?), Arc::new(memory(5)?));
    assert_eq!(counted.memory().num_regions(), 1);
    assert_eq!(shared.memory().num_regions(), 1);
    assert_eq!(Device { space: counted }.byte()?, 4);
    assert_eq!(
        Device {
            space: shared.clone()
        }
        .byte()?,
        5
    );
    let locked = Locked(Arc::new(Mutex::new(shared)));
    assert_eq!(locked.memory().read_obj::<u8>(GuestAddress(1))?, 5);
    assert_eq!(Device { space: locked }.byte()?, 5);
    Ok(())
}

/// Calls every method of [`GuestMemoryAtomic`] and its guards.
pub fn replaced() -> Outcome {
    let space = GuestMemoryAtomic::new(memory(1)?);
    let before: GuestMemoryLoadGuard<GuestMemoryMmap> = space.memory();
    space.lock().unwrap().replace(memory(2)?);
    assert_eq!(before.read_obj::<u8>(GuestAddress(1))?, 1);
    assert_eq!(space.memory().read_obj::<u8>(GuestAddress(1))?, 2);
    assert_eq!(before.clone().into_inner().num_regions(), 1);
    assert_eq!(
        Device {
            space: space.clone()
        }
        .byte()?,
        2
    );
    let larger = space
        .memory()
        .insert_region(Arc::new(GuestRegionMmap::from_range(
            GuestAddress(0x2000),
            PAGE,
            None,
        )?))?;
    let guard: GuestMemoryExclusiveGuard<'_, _> = space.lock().unwrap();
    guard.replace(larger);
    assert_eq!(space.memory().iter().count(), 2);
    let from = GuestMemoryAtomic::from(Arc::new(memory(6)?));
    assert_eq!(
        from.memory()
            .get_slice(GuestAddress(1), 1)?
            .read_obj::<u8>(0)?,
        6
    );
    Ok(())
}
