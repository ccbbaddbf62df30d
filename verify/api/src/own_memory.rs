//! User-defined memory and regions, from a window that is not RAM to a whole address space.

use std::sync::atomic::Ordering;

use crate::everything::*;
use crate::{Outcome, PAGE};

type MemoryResult<T> = std::result::Result<T, GuestMemoryError>;

/// A window of registers: a region without host memory, which handles each access itself.
#[derive(Debug)]
pub struct Registers {
    base: GuestAddress,
}

/// Returns the error of an access that the registers do not support.
fn refused<T>() -> MemoryResult<T> {
    Err(GuestMemoryError::HostAddressNotAvailable)
}

impl Bytes<MemoryRegionAddress> for Registers {
    type E = GuestMemoryError;

    fn write(&self, buffer: &[u8], _: MemoryRegionAddress) -> MemoryResult<usize> {
        Ok(buffer.len())
    }

    fn read(&self, buffer: &mut [u8], address: MemoryRegionAddress) -> MemoryResult<usize> {
        for (byte, offset) in buffer.iter_mut().zip(address.0..) {
            *byte = offset as u8;
        }
        Ok(buffer.len())
    }

    fn write_slice(&self, buffer: &[u8], address: MemoryRegionAddress) -> MemoryResult<()> {
        self.write(buffer, address).map(drop)
    }

    fn read_slice(&self, buffer: &mut [u8], address: MemoryRegionAddress) -> MemoryResult<()> {
        self.read(buffer, address).map(drop)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> MemoryResult<usize> {
        refused()
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> MemoryResult<()> {
        refused()
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> MemoryResult<usize> {
        refused()
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> MemoryResult<()> {
        refused()
    }

    fn store<T: AtomicAccess>(
        &self,
        _: T,
        _: MemoryRegionAddress,
        _: Ordering,
    ) -> MemoryResult<()> {
        refused()
    }

    fn load<T: AtomicAccess>(&self, _: MemoryRegionAddress, _: Ordering) -> MemoryResult<T> {
        refused()
    }
}

impl GuestMemoryRegion for Registers {
    type B = ();

    fn len(&self) -> GuestUsize {
        0x100
    }

    fn start_addr(&self) -> GuestAddress {
        self.base
    }

    fn bitmap(&self) {}
}

/// A wrapper of the library's region with the data that a VMM keeps for it.
#[derive(Debug)]
pub struct Slotted {
    inner: GuestRegionMmap<AtomicBitmap>,
    plugged: bool,
}

impl Slotted {
    fn new(base: GuestAddress, size: usize) -> std::result::Result<Self, FromRangesError> {
        Ok(Self {
            inner: GuestRegionMmap::from_range(base, size, None)?,
            plugged: true,
        })
    }
}

impl GuestMemoryRegion for Slotted {
    type B = AtomicBitmap;

    fn len(&self) -> GuestUsize {
        self.inner.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.inner.start_addr()
    }

    fn bitmap(&self) -> BS<'_, AtomicBitmap> {
        GuestMemoryRegion::bitmap(&self.inner)
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> MemoryResult<*mut u8> {
        self.inner.get_host_address(address)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.inner.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> MemoryResult<VolatileSlice<'_, BS<'_, AtomicBitmap>>> {
        if !self.plugged {
            return refused();
        }
        self.inner.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Slotted {}

/// An address space of a VMM with its own lookup.
#[derive(Debug)]
pub struct Slots(Vec<Slotted>);

impl GuestMemoryBackend for Slots {
    type R = Slotted;

    fn num_regions(&self) -> usize {
        self.0.len()
    }

    fn find_region(&self, address: GuestAddress) -> Option<&Slotted> {
        self.0
            .iter()
            .find(|region| region.to_region_addr(address).is_some())
    }

    fn iter(&self) -> impl Iterator<Item = &Slotted> {
        self.0.iter()
    }
}

/// A device's view of memory at an offset: a [`GuestMemory`] that is not a backend.
#[derive(Clone, Debug)]
pub struct Shifted<'m> {
    memory: &'m GuestMemoryMmap,
    by: u64,
}

impl GuestMemory for Shifted<'_> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        let shifted = address.checked_add(self.by);
        shifted.is_some_and(|address| GuestMemory::check_range(self.memory, address, count, access))
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> MemoryResult<impl GuestMemorySliceIterator<'a, ()>> {
        let shifted = address
            .checked_add(self.by)
            .ok_or(GuestMemoryError::GuestAddressOverflow)?;
        GuestMemory::get_slices(self.memory, shifted, count, access)
    }

    fn physical_memory(&self) -> Option<&GuestMemoryMmap> {
        None
    }
}

/// An iterator over a list of slices, for a [`GuestMemory`] that gathers them.
#[derive(Debug)]
pub struct Gathered<'a, B: BitmapSlice>(std::vec::IntoIter<VolatileSlice<'a, B>>);

impl<'a, B: BitmapSlice> Iterator for Gathered<'a, B> {
    type Item = MemoryResult<VolatileSlice<'a, B>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(Ok)
    }
}

impl<B: BitmapSlice> std::iter::FusedIterator for Gathered<'_, B> {}

impl<'a, B: BitmapSlice> GuestMemorySliceIterator<'a, B> for Gathered<'a, B> {}

/// Uses the region that is not RAM, alone and in a collection.
pub fn registers() -> Outcome {
    let registers = Registers {
        base: GuestAddress(0xfee0_0000),
    };
    assert_eq!(registers.last_addr(), GuestAddress(0xfee0_00ff));
    assert_eq!(registers.read_obj::<u8>(MemoryRegionAddress(5))?, 5);
    registers.write_obj(5u8, MemoryRegionAddress(5))?;
    assert!(
        registers.as_volatile_slice().is_err()
            && registers.get_slice(MemoryRegionAddress(0), 1).is_err()
    );
    assert!(registers.get_host_address(MemoryRegionAddress(0)).is_err());
    let () = registers.bitmap();
    let answer: Mine = registers.slot();
    assert_eq!(answer, Mine("slot"));
    let map = GuestRegionCollection::from_regions(vec![registers])?;
    assert!(map.address_in_range(GuestAddress(0xfee0_0010)));
    assert!(map.read_obj::<u8>(GuestAddress(0xfee0_0010)).is_err());
    let (region, offset) = map
        .to_region_addr(GuestAddress(0xfee0_0010))
        .ok_or("no region")?;
    assert_eq!(region.read_obj::<u8>(offset)?, 0x10);
    Ok(())
}

/// Uses the wrapper in the library's collection and in the VMM's.
pub fn slots() -> Outcome {
    let two = || -> std::result::Result<_, FromRangesError> {
        Ok(vec![
            Slotted::new(GuestAddress(0), PAGE)?,
            Slotted::new(GuestAddress(PAGE as u64), PAGE)?,
        ])
    };
    let collection = GuestRegionCollection::from_regions(two()?)?;
    collection.write_obj(0x0102_0304u32, GuestAddress(0xffe))?;
    assert_eq!(
        collection.read_obj::<u32>(GuestAddress(0xffe))?,
        0x0102_0304
    );
    assert_eq!(
        collection
            .iter()
            .filter(|region| region.bitmap().dirty_at(0))
            .count(),
        2
    );

    let mut slots = Slots(two()?);
    slots.write_obj(0x0102_0304u32, GuestAddress(0xffe))?;
    assert_eq!(slots.read_obj::<u32>(GuestAddress(0xffe))?, 0x0102_0304);
    assert_eq!(slots.get_slice(GuestAddress(8), 8)?.len(), 8);
    assert_eq!(slots.num_regions(), 2);
    assert_eq!(slots.last_addr(), GuestAddress(0x1fff));
    assert_eq!(
        slots.iter().map(|region| region.len()).sum::<u64>(),
        2 * PAGE as u64
    );
    assert!(GuestMemoryBackend::check_range(
        &slots,
        GuestAddress(0),
        2 * PAGE
    ));
    assert_eq!(
        slots.physical_memory().map(|memory| memory.0.len()),
        Some(2)
    );
    let region = slots.find_region(GuestAddress(0)).ok_or("no region")?;
    region.store(1u32, MemoryRegionAddress(0), Ordering::Release)?;
    assert_eq!(
        region.load::<u32>(MemoryRegionAddress(0), Ordering::Acquire)?,
        1
    );
    slots.0[1].plugged = false;
    assert!(slots.write_obj(0u8, GuestAddress(PAGE as u64)).is_err());
    Ok(())
}

/// Uses the memory that is not a backend.
pub fn shifted() -> Outcome {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 * PAGE)])?;
    let view = Shifted {
        memory: &memory,
        by: PAGE as u64,
    };
    view.write_obj(5u32, GuestAddress(8))?;
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1008))?, 5);
    assert!(view.check_range(GuestAddress(0), PAGE, Permissions::Read));
    assert!(!view.check_range(GuestAddress(1), PAGE, Permissions::Read));
    assert_eq!(
        view.get_slices(GuestAddress(0), 8, Permissions::Read)?
            .count(),
        1
    );
    assert!(view.physical_memory().is_none());
    assert!(view.read_obj::<u8>(GuestAddress(u64::MAX)).is_err());
    let holder = &view;
    assert_eq!(holder.memory().read_obj::<u32>(GuestAddress(8))?, 5);

    let slices = vec![
        memory.get_slice(GuestAddress(0), 4)?,
        memory.get_slice(GuestAddress(8), 8)?,
    ];
    let lengths = Gathered(slices.into_iter())
        .stop_on_error()?
        .map(|slice| slice.len());
    assert_eq!(lengths.collect::<Vec<_>>(), [4, 8]);
    Ok(())
}
