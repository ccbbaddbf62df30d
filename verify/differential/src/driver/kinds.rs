//! The types of the regions of a collection.

use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;

use super::fault::{Hosts, IntoFault};
use super::streams::file_of_len;
use super::vm;
use super::vm::bitmap::{AtomicBitmap, Bitmap, BS};
use super::vm::mmap::MmapRegionBuilder;
use super::vm::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestMemoryResult, GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress,
    MmapRegion, ReadVolatile, VolatileMemory, VolatileSlice, WriteVolatile,
};
use crate::host::whole_pages;
use crate::op::{Flavour, RegionSpec};
use crate::out::Fault;

/// The largest region with memory.
pub const LARGEST_REGION: u64 = 1 << 18;

/// A type of region.
pub trait Kind: 'static {
    type B: Bits;
    type R: GuestMemoryRegion<B = Self::B> + 'static;

    /// Creates the specified region.
    fn region(spec: &RegionSpec) -> Result<Self::R, Fault>;

    /// Creates a collection by `from_ranges` or `from_ranges_with_files`, if the kind has them.
    fn from_ranges(
        _: &[RegionSpec],
        _files: bool,
    ) -> Option<Result<GuestRegionCollection<Self::R>, Fault>> {
        None
    }

    /// Returns the host address and the length of the region's memory, in whole pages.
    fn host(region: &Self::R) -> (usize, usize);

    /// Returns whether the region has host memory.
    fn is_ram(_: &Self::R) -> bool {
        true
    }

    /// Returns the bitmap of the region.
    fn region_bits(region: &Self::R) -> Option<&AtomicBitmap>;

    /// Returns the mapping of the region, if it is a type of the crate.
    fn mapping(_: &Self::R) -> Option<&MmapRegion<Self::B>> {
        None
    }
}

/// A bitmap of a region, or of an `IommuMemory`.
pub trait Bits: Bitmap + Sized + 'static {
    /// Creates a bitmap of pages of `page` bytes.
    fn new(bytes: usize, page: usize) -> Self;

    /// Returns the `AtomicBitmap`, if there is one.
    fn atomic(&self) -> Option<&AtomicBitmap>;

    /// Creates a collection by `from_ranges` or `from_ranges_with_files`, if regions with this
    /// bitmap have them.
    fn from_ranges(_: &[RegionSpec], _files: bool) -> Option<Made<Self>> {
        None
    }
}

type Made<B> = Result<GuestRegionCollection<GuestRegionMmap<B>>, Fault>;

impl Bits for () {
    fn new(_: usize, _: usize) -> Self {}

    fn atomic(&self) -> Option<&AtomicBitmap> {
        None
    }

    fn from_ranges(specs: &[RegionSpec], files: bool) -> Option<Made<Self>> {
        mapped_ranges(specs, files)
    }
}

impl Bits for AtomicBitmap {
    fn new(bytes: usize, page: usize) -> Self {
        AtomicBitmap::new(bytes, NonZeroUsize::new(page).unwrap_or(NonZeroUsize::MIN))
    }

    fn atomic(&self) -> Option<&AtomicBitmap> {
        Some(self)
    }

    fn from_ranges(specs: &[RegionSpec], files: bool) -> Option<Made<Self>> {
        mapped_ranges(specs, files)
    }
}

impl Bits for Option<AtomicBitmap> {
    fn new(bytes: usize, page: usize) -> Self {
        (page > 0).then(|| Bits::new(bytes, page))
    }

    fn atomic(&self) -> Option<&AtomicBitmap> {
        self.as_ref()
    }
}

/// Returns the words of a bitmap, and the number of its bits.
pub fn words_of(bitmap: Option<&AtomicBitmap>) -> Vec<u64> {
    let Some(bitmap) = bitmap else {
        return Vec::new();
    };
    let mut words = bitmap.clone().get_and_reset();
    words.push(bitmap.len() as u64);
    words
}

/// Sets and clears bits so that [`words_of`] returns `words`.
pub fn set_words(bitmap: Option<&AtomicBitmap>, words: &[u64]) {
    let Some(bitmap) = bitmap else { return };
    bitmap.reset();
    let Some((_, words)) = words.split_last() else {
        return;
    };
    for index in (0..words.len() * 64).filter(|i| words[i / 64] >> (i % 64) & 1 == 1) {
        bitmap.set_bit(index);
    }
}

fn mapped<B: Bitmap>(spec: &RegionSpec, bitmap: B) -> Result<GuestRegionMmap<B>, Fault> {
    if spec.len > LARGEST_REGION {
        return Err(Fault::Named("too large for the harness"));
    }
    let mapping = MmapRegionBuilder::new_with_bitmap(spec.len as usize, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
        .build()
        .map_err(|error| error.fault(&Hosts::default()))?;
    GuestRegionMmap::new(mapping, GuestAddress(spec.base)).ok_or(Fault::Named("InvalidGuestRegion"))
}

fn mapped_ranges<B: vm::bitmap::NewBitmap>(specs: &[RegionSpec], files: bool) -> Option<Made<B>> {
    if specs.iter().any(|spec| spec.len > LARGEST_REGION) {
        return Some(Err(Fault::Named("too large for the harness")));
    }
    let made = if files {
        GuestRegionCollection::from_ranges_with_files(specs.iter().enumerate().map(
            |(index, spec)| {
                // Three of four regions have a file. Their bytes start at page 0, 1 or 2 of it.
                let offset = (index as u64 % 3) * 4096;
                let file = (index % 4 != 3).then(|| {
                    vm::FileOffset::new(
                        file_of_len(offset + whole_pages(spec.len as usize) as u64),
                        offset,
                    )
                });
                (GuestAddress(spec.base), spec.len as usize, file)
            },
        ))
    } else {
        let ranges: Vec<_> = specs
            .iter()
            .map(|spec| (GuestAddress(spec.base), spec.len as usize))
            .collect();
        GuestRegionCollection::from_ranges(&ranges)
    };
    Some(made.map_err(|error| error.fault(&Hosts::default())))
}

/// The crate's regions with a bitmap `B`.
pub struct Mapped<B>(PhantomData<B>);

impl<B: Bits> Kind for Mapped<B> {
    type B = B;
    type R = GuestRegionMmap<B>;

    fn region(spec: &RegionSpec) -> Result<Self::R, Fault> {
        let bytes = spec.len.min(LARGEST_REGION) as usize;
        mapped(spec, B::new(bytes, spec.page))
    }

    fn from_ranges(specs: &[RegionSpec], files: bool) -> Option<Made<B>> {
        B::from_ranges(specs, files)
    }

    fn host(region: &Self::R) -> (usize, usize) {
        (region.as_ptr() as usize, whole_pages(region.size()))
    }

    fn region_bits(region: &Self::R) -> Option<&AtomicBitmap> {
        MmapRegion::bitmap(region).atomic()
    }

    fn mapping(region: &Self::R) -> Option<&MmapRegion<B>> {
        Some(region)
    }
}

/// A user-defined region: at any address, of any length, with or without memory.
pub struct OwnRegion {
    base: u64,
    len: u64,
    flavour: Flavour,
    ram: MmapRegion<AtomicBitmap>,
}

impl GuestMemoryRegion for OwnRegion {
    type B = AtomicBitmap;

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.base)
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.ram.bitmap().slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        if self.flavour == Flavour::RamWithHostAddress && addr.0 < self.len {
            return Ok(self.ram.as_ptr().wrapping_add(addr.0 as usize));
        }
        Err(GuestMemoryError::HostAddressNotAvailable)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, Self::B>>> {
        if self.flavour == Flavour::NotRam {
            return Err(GuestMemoryError::HostAddressNotAvailable);
        }
        match offset.0.checked_add(count as u64) {
            Some(end) if end <= self.len => Ok(VolatileMemory::get_slice(
                &self.ram,
                offset.0 as usize,
                count,
            )?),
            _ => Err(GuestMemoryError::InvalidBackendAddress),
        }
    }
}

impl GuestMemoryRegionBytes for OwnRegion {}

/// The harness's regions.
pub enum Own {}

impl Kind for Own {
    type B = AtomicBitmap;
    type R = OwnRegion;

    fn region(spec: &RegionSpec) -> Result<Self::R, Fault> {
        let bytes = match spec.flavour {
            Flavour::NotRam => 1,
            _ if spec.len > LARGEST_REGION => {
                return Err(Fault::Named("too large for the harness"))
            }
            _ => spec.len.max(1) as usize,
        };
        let ram = MmapRegionBuilder::new_with_bitmap(bytes, Bits::new(bytes, spec.page))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
            .build()
            .map_err(|error| error.fault(&Hosts::default()))?;
        Ok(OwnRegion {
            base: spec.base,
            len: spec.len,
            flavour: spec.flavour,
            ram,
        })
    }

    fn host(region: &Self::R) -> (usize, usize) {
        (region.ram.as_ptr() as usize, whole_pages(region.ram.size()))
    }

    fn is_ram(region: &Self::R) -> bool {
        region.flavour != Flavour::NotRam
    }

    fn region_bits(region: &Self::R) -> Option<&AtomicBitmap> {
        Some(region.ram.bitmap())
    }
}

/// A region that handles each access itself, without host memory.
pub struct DeviceRegion {
    base: u64,
    len: u64,
    /// The number of accesses, which is compared.
    asked: MmapRegion<()>,
}

impl DeviceRegion {
    fn count(&self) {
        let _ = Bytes::store(
            &self.asked.as_volatile_slice(),
            self.times().wrapping_add(1),
            0,
            Ordering::Relaxed,
        );
    }

    fn times(&self) -> u64 {
        Bytes::load(&self.asked.as_volatile_slice(), 0, Ordering::Relaxed).unwrap_or(0)
    }

    fn reach(&self, addr: MemoryRegionAddress, count: usize) -> GuestMemoryResult<usize> {
        self.count();
        match self.len.checked_sub(addr.0) {
            Some(left) if left > 0 => Ok(count.min(left as usize)),
            _ => Err(GuestMemoryError::InvalidBackendAddress),
        }
    }
}

/// Defines methods that count a call and fail.
macro_rules! refuses_streams {
    ($($method:ident($stream:ident) -> $moved:ty;)*) => {
        $(
            fn $method<F: $stream>(
                &self,
                _: MemoryRegionAddress,
                _: &mut F,
                _: usize,
            ) -> GuestMemoryResult<$moved> {
                self.count();
                Err(GuestMemoryError::HostAddressNotAvailable)
            }
        )*
    };
}

impl Bytes<MemoryRegionAddress> for DeviceRegion {
    type E = GuestMemoryError;

    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> GuestMemoryResult<usize> {
        self.reach(addr, buf.len())
    }

    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> GuestMemoryResult<usize> {
        let count = self.reach(addr, buf.len())?;
        buf[..count].fill(0x5A);
        Ok(count)
    }

    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> GuestMemoryResult<()> {
        self.reach(addr, buf.len()).map(|_| ())
    }

    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> GuestMemoryResult<()> {
        self.read(buf, addr).map(|_| ())
    }

    refuses_streams! {
        read_volatile_from(ReadVolatile) -> usize;
        read_exact_volatile_from(ReadVolatile) -> ();
        write_volatile_to(WriteVolatile) -> usize;
        write_all_volatile_to(WriteVolatile) -> ();
    }

    fn store<T: AtomicAccess>(
        &self,
        _: T,
        addr: MemoryRegionAddress,
        _: Ordering,
    ) -> GuestMemoryResult<()> {
        self.reach(addr, size_of::<T>()).map(|_| ())
    }

    fn load<T: AtomicAccess>(
        &self,
        addr: MemoryRegionAddress,
        _: Ordering,
    ) -> GuestMemoryResult<T> {
        self.reach(addr, size_of::<T>()).map(|_| T::zeroed())
    }
}

impl GuestMemoryRegion for DeviceRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.base)
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}
}

/// The regions that handle each access themselves.
pub enum Device {}

impl Kind for Device {
    type B = ();
    type R = DeviceRegion;

    fn region(spec: &RegionSpec) -> Result<Self::R, Fault> {
        let asked = MmapRegion::new(8).map_err(|error| error.fault(&Hosts::default()))?;
        Ok(DeviceRegion {
            base: spec.base,
            len: spec.len,
            asked,
        })
    }

    fn host(region: &Self::R) -> (usize, usize) {
        (
            region.asked.as_ptr() as usize,
            whole_pages(region.asked.size()),
        )
    }

    fn is_ram(_: &Self::R) -> bool {
        false
    }

    fn region_bits(_: &Self::R) -> Option<&AtomicBitmap> {
        None
    }
}
