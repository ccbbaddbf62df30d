//! Guest memory as the tests need it: mapped twice, with pluggable blocks, or with a region whose
//! file can be truncated.

use std::num::NonZeroU64;
use std::sync::Arc;

use microvm::memory::{build_with_bitmaps, Backing, GuestRam, GuestRegion};
use vm_memory::iommu::{MarkedIommuMemory, SharedIotlb};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};
use vm_memory_host::{describe, MemoryBuilder, Region, Unplugged};

use crate::Error;

/// Guest memory as devices access it. Without an IOMMU, translation is off.
pub type DeviceRam = MarkedIommuMemory<GuestRam, SharedIotlb>;

/// Returns the memory map of the devices, behind an IOMMU if there is an IOTLB.
pub fn for_devices(ram: &GuestRam, iotlb: Option<SharedIotlb>) -> GuestMemoryAtomic<DeviceRam> {
    let enabled = iotlb.is_some();
    let iotlb = iotlb.unwrap_or_default();
    GuestMemoryAtomic::new(DeviceRam::by_guest_address(ram.clone(), iotlb, enabled))
}

/// Maps the same memory a second time, with bitmaps of its own. A driver that uses this mapping has
/// a dirty log apart from the devices', as a vCPU has.
///
/// # Errors
///
/// Returns an error if the memory is anonymous, or cannot be mapped again.
pub fn second_mapping(ram: &GuestRam) -> Result<GuestRam, Error> {
    let (description, files) = describe(ram).map_err(Error::other)?;
    if files.is_empty() {
        return Err(Error::other("anonymous memory cannot be mapped twice"));
    }
    let builder = description.builder(files).map_err(Error::other)?;
    build_with_bitmaps(builder).map_err(Error::other)
}

/// Maps a region of `len` bytes whose blocks are not plugged.
///
/// # Errors
///
/// Returns an error if the system cannot provide it.
pub fn pluggable(
    start: u64,
    len: u64,
    block: NonZeroU64,
    backing: &Backing,
) -> Result<GuestRam, Error> {
    let backing = match backing {
        Backing::Anonymous => vm_memory_host::Backing::Anonymous,
        // Blocks of a file cannot be unplugged.
        Backing::Memfd | Backing::File(_) => vm_memory_host::Backing::Memfd,
        Backing::Hugetlb => vm_memory_host::Backing::Hugetlb {
            page_size: block.get(),
        },
    };
    let region = Region::new(GuestAddress(start), len).backing(backing);
    let region = region.blocks(block, Unplugged::Mapped);
    // Blocks of huge pages require the fault handler: an access may find the pool empty.
    vm_memory::fault::install()?;
    build_with_bitmaps(MemoryBuilder::new().region(region)).map_err(Error::other)
}

/// Adds a region of `len` bytes at `start`, backed by a memfd without seals: it can be truncated.
///
/// # Errors
///
/// Returns an error if the system cannot provide it, or the range is in use.
pub fn with_truncatable_region(ram: &GuestRam, start: u64, len: u64) -> Result<GuestRam, Error> {
    let fd = rustix::fs::memfd_create("e2e-truncated", rustix::fs::MemfdFlags::CLOEXEC);
    let fd = fd.map_err(std::io::Error::from)?;
    rustix::fs::ftruncate(&fd, len).map_err(std::io::Error::from)?;
    let region = Region::new(GuestAddress(start), len);
    let region = region.backing(vm_memory_host::Backing::shared_file(fd, 0));
    let one = build_with_bitmaps(MemoryBuilder::new().region(region)).map_err(Error::other)?;
    ram.insert_region(only_region(&one)?).map_err(Error::other)
}

/// Returns the only region of a memory.
///
/// # Errors
///
/// Returns an error if the memory is empty.
pub fn only_region(one: &GuestRam) -> Result<Arc<GuestRegion>, Error> {
    let region = one.iter().next().ok_or_else(|| Error::other("no region"))?;
    let removed = one.remove_region(region.start_addr(), region.len());
    removed.map(|(_, region)| region).map_err(Error::other)
}

#[cfg(test)]
mod tests {
    use microvm::memory::{build, harvest, pages, HIGH_START, PAGE};
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn second_mapping_shares_bytes_but_not_bitmaps() {
        let ram = build(16 << 20, &Backing::Memfd).unwrap();
        let view = second_mapping(&ram).unwrap();
        let at = GuestAddress(HIGH_START + 5 * PAGE);
        view.write_obj(0x1234_u64, at).unwrap();
        assert_eq!(ram.read_obj::<u64>(at).unwrap(), 0x1234);
        assert!(pages(&harvest(&ram)).is_empty());
        assert_eq!(pages(&harvest(&view)), [at.0].into());
        assert!(pages(&harvest(&view)).is_empty());
    }

    #[test]
    fn second_mapping_of_anonymous_memory_returns_error() {
        let ram = build(16 << 20, &Backing::Anonymous).unwrap();
        let error = second_mapping(&ram).unwrap_err().to_string();
        assert!(error.contains("anonymous"), "{error}");
    }
}
