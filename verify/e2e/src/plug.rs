//! Memory that is plugged and unplugged while the driver runs.
//!
//! A small device tells the driver where a region of blocks can be plugged. The region is added to
//! and removed from the memory map of the devices; its blocks are plugged and unplugged one by one.
//!
//! ```text
//!   register           read                                write
//!   0x00 MAGIC         "plug"
//!   0x04 STATUS        0 no region, 1 region present,
//!                      2 the last command failed
//!   0x08 COMMAND                                           1 add the region, 2 remove it
//!   0x0c BLOCKS        number of plugged blocks            number of blocks to be plugged
//!   0x10 ADDRESS       guest address of the region, two words
//!   0x18 SIZE          size of the region in bytes, two words
//!   0x20 BLOCK_SIZE    size of a block in bytes
//! ```
//!
//! Removal takes the region from the processors first ([`Processor`]), then from the map of the
//! devices. Then it waits for the last reader of the old map.

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm::bus::MmioDevice;
use microvm::memory::{harvest, pages, Backing, GuestRam, GuestRegion};
use vm_memory::atomic::{RetiredMap, UpdateError};
use vm_memory::iommu::SharedIotlb;
use vm_memory::{
    GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion,
    GuestRegionCollectionError,
};
use vm_memory_host::{describe, plug, residency, unplug, RegionDescription};

use crate::memory::{only_region, pluggable, second_mapping, DeviceRam};
use crate::Error;

/// The guest address of the registers.
pub const PLUG_MMIO: u64 = 0xd000_1000;
/// The length of the registers in bytes.
pub const PLUG_MMIO_LEN: u64 = 0x1000;
/// The value of the register `MAGIC`: "plug".
pub const MAGIC: u32 = 0x6775_6c70;

/// Offsets of the registers.
pub mod reg {
    /// [`super::MAGIC`].
    pub const MAGIC: u32 = 0;
    /// One of [`super::status`].
    pub const STATUS: u32 = 4;
    /// One of [`super::command`].
    pub const COMMAND: u32 = 8;
    /// The number of plugged blocks.
    pub const BLOCKS: u32 = 0xc;
    /// The guest address of the region, low word.
    pub const ADDRESS: u32 = 0x10;
    /// The size of the region, low word.
    pub const SIZE: u32 = 0x18;
    /// The size of a block.
    pub const BLOCK_SIZE: u32 = 0x20;
}

/// Commands.
pub mod command {
    /// Adds the region.
    pub const ADD: u32 = 1;
    /// Removes the region.
    pub const REMOVE: u32 = 2;
}

/// Values of the register `STATUS`.
pub mod status {
    /// There is no region.
    pub const NONE: u32 = 0;
    /// The region is present.
    pub const PRESENT: u32 = 1;
    /// The last command failed.
    pub const FAILED: u32 = 2;
}

/// The region begins at a multiple of this number of bytes, above all other memory.
const BOUNDARY: u64 = 8 << 30;
/// The size of the region in bytes.
pub const SIZE: u64 = 16 << 20;
/// The size of a block in bytes: a huge page.
const BLOCK: NonZeroU64 = NonZeroU64::MIN.saturating_add((2 << 20) - 1);
/// The time within which the last reader of an old map must finish.
const READER_TIMEOUT: Duration = Duration::from_secs(10);

/// The place of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The guest address of the region.
    pub start: u64,
}

impl Place {
    /// Returns the place above `ram`.
    pub fn above(ram: &GuestRam) -> Self {
        Self {
            start: (ram.last_addr().0 / BOUNDARY + 1) * BOUNDARY,
        }
    }

    /// Returns the bytes that the driver plugs first: half of the blocks.
    pub fn first(&self) -> u64 {
        SIZE / 2
    }

    /// Returns the bytes that the driver keeps until the end: a quarter of the blocks.
    pub fn kept(&self) -> u64 {
        SIZE / 4
    }
}

/// The access of a processor to the region, separate from the devices' map.
pub trait Processor: Send {
    /// Makes the region of `one` accessible to the processor.
    ///
    /// # Errors
    ///
    /// Returns an error if the region cannot be mapped.
    fn add(&mut self, one: &GuestRam) -> Result<(), Error>;

    /// Plugs or unplugs blocks. Before unplugging, adds the pages that the processor wrote to
    /// `dirty`.
    ///
    /// # Errors
    ///
    /// Returns an error if the blocks cannot be changed.
    fn set_blocks(
        &mut self,
        at: u64,
        len: u64,
        plugged: bool,
        dirty: &mut BTreeSet<u64>,
    ) -> Result<(), Error>;

    /// Takes the region from the processor, and adds the pages that the processor wrote to `dirty`.
    ///
    /// # Errors
    ///
    /// Returns an error if the processor still uses it.
    fn remove(&mut self, dirty: &mut BTreeSet<u64>) -> Result<(), Error>;
}

/// The history of the region.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The pages that the devices wrote.
    pub device: BTreeSet<u64>,
    /// The pages that the processors wrote.
    pub driver: BTreeSet<u64>,
    /// The numbers of commands that succeeded: additions, changes of blocks, removals.
    pub succeeded: [u64; 3],
    /// The description of the region when most blocks were plugged.
    pub description: Option<RegionDescription>,
    /// The resident bytes of the region when most blocks were plugged, and after some were
    /// unplugged.
    pub resident: [u64; 2],
    /// The resident bytes of this process: before the region, when most blocks were plugged, and
    /// after.
    pub process: [u64; 3],
    /// The time until the old map had no reader.
    pub waited: Duration,
    /// The first error.
    pub error: Option<String>,
}

/// The device.
pub struct Plug {
    place: Place,
    backing: Backing,
    devices: GuestMemoryAtomic<DeviceRam>,
    processors: Vec<Box<dyn Processor>>,
    /// The region, as a memory of its own.
    one: Option<GuestRam>,
    blocks: u64,
    status: u32,
    /// The time within which the last reader of an old map must finish.
    pub reader_timeout: Duration,
    /// The history of the region.
    pub history: History,
}

impl Plug {
    /// Creates a device that adds a region at `place` to the map of `devices`.
    pub fn new(
        place: Place,
        backing: Backing,
        devices: GuestMemoryAtomic<DeviceRam>,
        processors: Vec<Box<dyn Processor>>,
    ) -> Self {
        Self {
            place,
            backing,
            devices,
            processors,
            one: None,
            blocks: 0,
            status: status::NONE,
            reader_timeout: READER_TIMEOUT,
            history: History::default(),
        }
    }

    /// Returns the place of the region.
    pub fn place(&self) -> Place {
        self.place
    }

    fn add(&mut self) -> Result<(), Error> {
        if self.one.is_some() {
            return Err(Error::other("the region is present"));
        }
        self.history.process[0] = process_memory()?;
        let one = pluggable(self.place.start, SIZE, BLOCK, &self.backing)?;
        let region = only_region(&one)?;
        self.replace_map(|ram| ram.insert_region(Arc::clone(&region)))?;
        if let Err(e) = self
            .processors
            .iter_mut()
            .try_for_each(|side| side.add(&one))
        {
            self.replace_map(|ram| without(ram, &region))?;
            return Err(e);
        }
        (self.one, self.blocks) = (Some(one), 0);
        Ok(())
    }

    fn set_blocks(&mut self, wanted: u64) -> Result<(), Error> {
        let one = self.one.clone().ok_or_else(|| Error::other("no region"))?;
        let most = SIZE / BLOCK;
        if wanted > most {
            return Err(Error::other(format!(
                "cannot plug {wanted} blocks: the region has {most}"
            )));
        }
        let (first, end) = (self.blocks.min(wanted), self.blocks.max(wanted));
        let at = self.place.start + first * BLOCK.get();
        let len = (end - first) * BLOCK.get();
        let history = &mut self.history;
        if wanted > self.blocks {
            plug(&one, GuestAddress(at), len).map_err(Error::other)?;
            for side in &mut self.processors {
                side.set_blocks(at, len, true, &mut history.driver)?;
            }
            let (description, _) = describe(&one).map_err(Error::other)?;
            history.description = description.regions.into_iter().next();
        } else if wanted < self.blocks {
            if history.resident[0] == 0 {
                history.resident[0] = resident(&one)?;
                history.process[1] = process_memory()?;
            }
            // Unplugging marks whole blocks. Only the marks before it are writes.
            history.device.extend(pages(&harvest(&one)));
            for side in &mut self.processors {
                side.set_blocks(at, len, false, &mut history.driver)?;
            }
            unplug(&one, GuestAddress(at), len).map_err(Error::other)?;
            harvest(&one);
            history.resident[1] = resident(&one)?;
        }
        self.blocks = wanted;
        Ok(())
    }

    fn remove(&mut self) -> Result<(), Error> {
        let one = self.one.take().ok_or_else(|| Error::other("no region"))?;
        if let Err(e) = self.remove_everywhere(&one) {
            // A reader may still use the region.
            self.one = Some(one);
            return Err(e);
        }
        self.blocks = 0;
        let region = only_region(&one)?;
        drop(one);
        // The last reference: this unmaps the region.
        let last = Arc::into_inner(region);
        drop(last.ok_or_else(|| Error::other("the region is still referenced"))?);
        self.history.process[2] = process_memory()?;
        Ok(())
    }

    fn remove_everywhere(&mut self, one: &GuestRam) -> Result<(), Error> {
        self.history.device.extend(pages(&harvest(one)));
        for side in &mut self.processors {
            side.remove(&mut self.history.driver)?;
        }
        let region = only_region(one)?;
        let old = self.replace_map(|ram| without(ram, &region))?;
        let start = Instant::now();
        old.wait(start + self.reader_timeout)
            .map_err(Error::other)?;
        self.history.waited = start.elapsed();
        let map = old.into_map();
        drop(map.map_err(|_| Error::other("the old map has a new reader"))?);
        Ok(())
    }

    fn replace_map(
        &self,
        change: impl FnOnce(&GuestRam) -> Result<GuestRam, GuestRegionCollectionError>,
    ) -> Result<RetiredMap<DeviceRam>, Error> {
        let changed = self.devices.update(|now| {
            let ram = change(now.get_backend())?;
            let iotlb = SharedIotlb::clone(now.iommu());
            Ok(DeviceRam::by_guest_address(
                ram,
                iotlb,
                now.get_iommu_enabled(),
            ))
        });
        changed.map_err(|e: UpdateError<GuestRegionCollectionError>| Error::other(e))
    }
}

impl MmioDevice for Plug {
    /// A register that does not exist reads as 0.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match u32::try_from(offset) {
            Ok(reg::MAGIC) => MAGIC,
            Ok(reg::STATUS) => self.status,
            Ok(reg::BLOCKS) => self.blocks as u32,
            Ok(reg::ADDRESS) => self.place.start as u32,
            Ok(0x14) => (self.place.start >> 32) as u32,
            Ok(reg::SIZE) => SIZE as u32,
            Ok(reg::BLOCK_SIZE) => BLOCK.get() as u32,
            _ => 0,
        };
        if data.len() == 4 {
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// A write that is not four bytes wide, or to a register that cannot be written, has no effect.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), Ok(value)) = (u32::try_from(offset), data.try_into()) else {
            return;
        };
        let (outcome, nth) = match (offset, u32::from_le_bytes(value)) {
            (reg::COMMAND, command::ADD) => (self.add(), 0),
            (reg::BLOCKS, blocks) => (self.set_blocks(blocks.into()), 1),
            (reg::COMMAND, command::REMOVE) => (self.remove(), 2),
            _ => return,
        };
        self.status = match (&outcome, &self.one) {
            (Err(_), _) => status::FAILED,
            (Ok(()), Some(_)) => status::PRESENT,
            (Ok(()), None) => status::NONE,
        };
        match outcome {
            Ok(()) => self.history.succeeded[nth] += 1,
            Err(e) => _ = self.history.error.get_or_insert(e.to_string()),
        }
    }
}

fn without(ram: &GuestRam, region: &GuestRegion) -> Result<GuestRam, GuestRegionCollectionError> {
    ram.remove_region(region.start_addr(), region.len())
        .map(|(ram, _)| ram)
}

/// A thread with a mapping of its own.
pub struct ThreadProcessor {
    view: GuestMemoryAtomic<GuestRam>,
    one: Option<GuestRam>,
}

impl ThreadProcessor {
    /// Creates the processor of a thread that uses `view`.
    pub fn new(view: GuestMemoryAtomic<GuestRam>) -> Self {
        Self { view, one: None }
    }
}

impl Processor for ThreadProcessor {
    fn add(&mut self, one: &GuestRam) -> Result<(), Error> {
        let mapping = second_mapping(one)?;
        let region = only_region(&mapping)?;
        self.view
            .update(|ram| ram.insert_region(region))
            .map_err(Error::other)?;
        self.one = Some(mapping);
        Ok(())
    }

    fn set_blocks(
        &mut self,
        at: u64,
        len: u64,
        plugged: bool,
        dirty: &mut BTreeSet<u64>,
    ) -> Result<(), Error> {
        let one = self.one.as_ref().ok_or_else(|| Error::other("no region"))?;
        if plugged {
            let plugged = plug(one, GuestAddress(at), len);
            return plugged.map(drop).map_err(Error::other);
        }
        dirty.extend(pages(&harvest(one)));
        let outcome = unplug(one, GuestAddress(at), len);
        harvest(one);
        outcome.map(drop).map_err(Error::other)
    }

    fn remove(&mut self, dirty: &mut BTreeSet<u64>) -> Result<(), Error> {
        let one = self.one.take().ok_or_else(|| Error::other("no region"))?;
        let region = only_region(&one)?;
        dirty.extend(pages(&harvest(&one)));
        let old = self
            .view
            .update(|ram| without(ram, &region))
            .map_err(Error::other)?;
        old.wait(Instant::now() + READER_TIMEOUT)
            .map_err(Error::other)
    }
}

/// Returns the resident bytes of a memory, including swapped ones.
fn resident(one: &GuestRam) -> Result<u64, Error> {
    let regions = residency(one).map_err(Error::other)?;
    Ok(regions
        .iter()
        .map(|(_, now)| now.resident + now.swapped)
        .sum())
}

/// Returns the resident bytes of this process: `Rss` of /proc/self/smaps_rollup, and huge pages,
/// which `Rss` does not include.
fn process_memory() -> Result<u64, Error> {
    Ok(rollup(&std::fs::read_to_string("/proc/self/smaps_rollup")?))
}

fn rollup(text: &str) -> u64 {
    let kib = text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let counts = matches!(name, "Rss" | "Shared_Hugetlb" | "Private_Hugetlb");
        let number = rest.split_whitespace().next()?.parse::<u64>().ok()?;
        counts.then_some(number)
    });
    kib.sum::<u64>() * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rollup_includes_huge_pages() {
        let text = "7f00-7fff ---p 00000000 00:00 0  [rollup]\nRss:  1000 kB\nPss: 5 kB\n\
            AnonHugePages:  2048 kB\nShared_Hugetlb:  4096 kB\nPrivate_Hugetlb:     4 kB\nnonsense\n";
        assert_eq!(rollup(text), 5100 * 1024);
        assert_eq!(rollup(""), 0);
        assert!(process_memory().unwrap() > 1 << 20);
    }
}
