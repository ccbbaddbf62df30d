//! `--plug`: memory that comes while the guest runs, and goes again.
//!
//! A small device tells the guest where memory may come. It is a region of blocks: the whole region comes and goes by a swap of the map that the devices
//! use, and of its blocks the guest has as many as it asks for.
//!
//! ```text
//!   register           read                                write
//!   0x00 MAGIC         "plug"
//!   0x04 STATUS        0 there is no region, 1 there is,
//!                      2 the last wish was not granted
//!   0x08 COMMAND                                           1 let the region come, 2 let it go
//!   0x0c BLOCKS        how many blocks the guest has       how many it wants, from the first one on
//!   0x10 ADDRESS       guest address of the region, two words
//!   0x18 SIZE          its size in bytes, two words
//!   0x20 BLOCK_SIZE    that of a block
//! ```
//!
//! When the region goes, nobody may be left who uses it: the guest's side is told first ([`GuestSide`]: a memory slot of KVM, or the mapping of the driver
//! thread), then the devices' map is swapped, then this waits until the last reader of the old map is gone.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::atomic::RetiredMap;
use vm_memory::iommu::SharedIotlb;
use vm_memory::{
    GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion,
    GuestRegionCollectionError,
};
use vm_memory_host::{plug, unplug};

use crate::iommu::DeviceRam;
use crate::memory::{self, GuestRam, GuestRegion, Source};
use crate::pages::PageMap;

/// Where the registers lie: behind those of the block device.
pub const PLUG_MMIO: u64 = 0xd000_1000;
/// How many bytes they take.
pub const PLUG_MMIO_LEN: u64 = 0x1000;
/// "plug".
pub const MAGIC: u32 = 0x6775_6c70;

/// Offsets of the registers.
pub mod reg {
    /// [`super::MAGIC`].
    pub const MAGIC: u32 = 0;
    /// One of [`super::status`].
    pub const STATUS: u32 = 4;
    /// One of [`super::command`].
    pub const COMMAND: u32 = 8;
    /// Blocks that the guest has.
    pub const BLOCKS: u32 = 0xc;
    /// Guest address of the region, low word.
    pub const ADDRESS: u32 = 0x10;
    /// Size of the region, low word.
    pub const SIZE: u32 = 0x18;
    /// Size of a block.
    pub const BLOCK_SIZE: u32 = 0x20;
}

/// What the guest wants.
pub mod command {
    /// The region.
    pub const PLUG: u32 = 1;
    /// To be rid of it.
    pub const UNPLUG: u32 = 2;
}

/// What there is.
pub mod status {
    /// No region.
    pub const NONE: u32 = 0;
    /// A region.
    pub const PLUGGED: u32 = 1;
    /// The last wish was not granted.
    pub const REFUSED: u32 = 2;
}

/// The region begins at a multiple of this above all other memory.
const BOUNDARY: u64 = 8 << 30;
/// How long the last reader of an old map may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where memory may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest address of the region.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
}

impl Place {
    /// The place above `ram`.
    pub fn above(ram: &GuestRam) -> Self {
        Self {
            start: (ram.last_addr().0 / BOUNDARY + 1) * BOUNDARY,
            size: SIZE,
            block: BLOCK.get(),
        }
    }

    /// Bytes of the blocks that the built-in guest has at first: every second one.
    pub fn first(&self) -> u64 {
        self.size / 2
    }

    /// Bytes of the blocks that it keeps until the end.
    pub fn kept(&self) -> u64 {
        self.size / 4
    }
}

/// Bytes of the region.
pub const SIZE: u64 = 16 << 20;
/// Bytes of a block: a huge page.
const BLOCK: NonZeroU64 = NonZeroU64::MIN.saturating_add((2 << 20) - 1);

/// What the guest reaches memory by, apart from the devices' map.
pub trait GuestSide: Send + std::fmt::Debug {
    /// Lets the guest have the region of `one`.
    ///
    /// # Errors
    ///
    /// Why it cannot, in words.
    fn insert(&mut self, one: &GuestRam) -> Result<(), String>;

    /// Blocks have been plugged (`come`), or are about to be unplugged: then the pages that the guest wrote so far may be added to `dirtied`.
    ///
    /// # Errors
    ///
    /// Why it cannot be so for the guest, in words.
    fn blocks(
        &mut self,
        at: u64,
        len: u64,
        come: bool,
        dirtied: &mut PageMap,
    ) -> Result<(), String>;

    /// Takes the region from the guest, and adds the pages that it wrote to `dirtied`.
    ///
    /// # Errors
    ///
    /// Why it cannot, in words.
    fn remove(&mut self, dirtied: &mut PageMap) -> Result<(), String>;
}

/// What came and went, in numbers.
#[derive(Clone, Debug)]
pub struct Story {
    /// Pages of the region that the devices wrote, by its bitmap.
    pub device: PageMap,
    /// Pages of it that the guest wrote.
    pub guest: PageMap,
    /// Wishes that were granted: regions, changes of blocks, regions that went.
    pub granted: [u64; 3],
    /// What the region was when it had most blocks, as `describe()` shows it.
    pub described: String,
    /// Whether it was kept in what `--backing` says.
    pub as_asked: bool,
    /// Bytes of the region in memory: with most blocks, and with fewer.
    pub resident: [u64; 2],
    /// Bytes of this process in memory: before, with most blocks, and after.
    pub process: [u64; 3],
    /// How long it took until nobody read the old map.
    pub waited: Duration,
    /// Why the first wish that was not granted was not.
    pub refused: Option<String>,
}

/// The device.
#[derive(Debug)]
pub struct Plug {
    place: Place,
    source: Source,
    devices: GuestMemoryAtomic<DeviceRam>,
    guest: Box<dyn GuestSide>,
    /// The region, as a memory of its own.
    one: Option<GuestRam>,
    blocks: u64,
    status: u32,
    /// How long the last reader of the devices' old map may take.
    patience: Duration,
    /// What happened so far.
    pub story: Story,
}

impl Plug {
    /// A device that lets memory of `source` come at `place`; `no_pages` is an empty set over guest memory and that place.
    pub fn new(
        place: Place,
        source: Source,
        devices: GuestMemoryAtomic<DeviceRam>,
        guest: Box<dyn GuestSide>,
        no_pages: PageMap,
    ) -> Self {
        let story = Story {
            device: no_pages.clone(),
            guest: no_pages,
            granted: [0; 3],
            described: String::new(),
            as_asked: false,
            resident: [0; 2],
            process: [0; 3],
            waited: Duration::ZERO,
            refused: None,
        };
        Self {
            place,
            source,
            devices,
            guest,
            one: None,
            blocks: 0,
            status: status::NONE,
            patience: PATIENCE,
            story,
        }
    }

    /// Where the region comes.
    pub fn place(&self) -> Place {
        self.place
    }

    /// A read of the register at `offset`. What is not there reads as zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let word = |value: u64, high: bool| (value >> if high { 32 } else { 0 }) as u32;
        let value = match u32::try_from(offset) {
            Ok(reg::MAGIC) => MAGIC,
            Ok(reg::STATUS) => self.status,
            Ok(reg::BLOCKS) => self.blocks as u32,
            Ok(at @ (reg::ADDRESS | 0x14)) => word(self.place.start, at != reg::ADDRESS),
            Ok(at @ (reg::SIZE | 0x1c)) => word(self.place.size, at != reg::SIZE),
            Ok(reg::BLOCK_SIZE) => self.place.block as u32,
            _ => 0,
        };
        if data.len() == 4 {
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// A write to the register at `offset`. What is not there, not writable or not four bytes wide is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), Ok(value)) = (u32::try_from(offset), data.try_into()) else {
            return;
        };
        let (outcome, nth) = match (offset, u32::from_le_bytes(value)) {
            (reg::COMMAND, command::PLUG) => (self.plug(), 0),
            (reg::BLOCKS, blocks) => (self.set_blocks(u64::from(blocks)), 1),
            (reg::COMMAND, command::UNPLUG) => (self.unplug(), 2),
            _ => return,
        };
        match outcome {
            Ok(()) => {
                if let Some(granted) = self.story.granted.get_mut(nth) {
                    *granted += 1;
                }
                self.status = match self.one {
                    Some(_) => status::PLUGGED,
                    None => status::NONE,
                };
            }
            Err(why) => {
                self.status = status::REFUSED;
                self.story.refused.get_or_insert(why);
            }
        }
    }

    /// The region comes, with none of its blocks.
    fn plug(&mut self) -> Result<(), String> {
        if self.one.is_some() {
            return Err("it is there already".to_owned());
        }
        self.story.process[0] = process_memory()?;
        let Place { start, size, .. } = self.place;
        let one = self.source.map_blocks(start, size, BLOCK);
        let one = one.map_err(|e| e.to_string())?;
        let region = memory::only_region(&one).ok_or("it was not built")?;
        self.swap(|ram| ram.insert_region(Arc::clone(&region)))?;
        if let Err(why) = self.guest.insert(&one) {
            // Nobody has used it.
            self.swap(|ram| without(ram, &region))?;
            return Err(why);
        }
        (self.one, self.blocks) = (Some(one), 0);
        Ok(())
    }

    /// The guest has `wanted` blocks from now on.
    fn set_blocks(&mut self, wanted: u64) -> Result<(), String> {
        let one = self.one.clone().ok_or("blocks of no region")?;
        let Place { start, size, block } = self.place;
        if wanted > size / block {
            return Err(format!("{wanted} blocks, and there are {}", size / block));
        }
        let (least, most) = (self.blocks.min(wanted), self.blocks.max(wanted));
        let (at, len) = (start + least * block, (most - least) * block);
        if wanted > self.blocks {
            plug(&one, GuestAddress(at), len).map_err(|e| e.to_string())?;
            if let Err(why) = self.guest.blocks(at, len, true, &mut self.story.guest) {
                unplug(&one, GuestAddress(at), len).map_err(|e| e.to_string())?;
                return Err(why);
            }
            self.note_description(&one);
        } else if wanted < self.blocks {
            // The most that there was.
            if self.story.resident[0] == 0 {
                self.story.resident[0] = resident(&one)?;
                self.story.process[1] = process_memory()?;
            }
            // Blocks that go are marked whole: what devices wrote is taken before, and that mark after.
            memory::harvest_into(&one, &mut self.story.device);
            self.guest.blocks(at, len, false, &mut self.story.guest)?;
            unplug(&one, GuestAddress(at), len).map_err(|e| e.to_string())?;
            memory::harvest(&one);
            self.story.resident[1] = resident(&one)?;
        }
        self.blocks = wanted;
        Ok(())
    }

    /// The region goes, with all of its blocks.
    fn unplug(&mut self) -> Result<(), String> {
        let one = self.one.take().ok_or("there is no region")?;
        let outcome = self.remove(&one);
        if outcome.is_err() {
            // Whoever still has it may go on using it.
            self.one = Some(one);
            return outcome;
        }
        self.blocks = 0;
        let region = memory::only_region(&one).ok_or("it has no region")?;
        drop(one);
        // This is the last that anybody has of it, and takes it from the process.
        let last = Arc::into_inner(region).ok_or("somebody still has the region")?;
        drop(last);
        self.story.process[2] = process_memory()?;
        Ok(())
    }

    /// Takes the region from everybody, waits until they are done with it, and gives its pages back.
    fn remove(&mut self, one: &GuestRam) -> Result<(), String> {
        memory::harvest_into(one, &mut self.story.device);
        self.guest.remove(&mut self.story.guest)?;
        let region = memory::only_region(one).ok_or("it has no region")?;
        let old = self.swap(|ram| without(ram, &region))?;
        let start = Instant::now();
        old.wait(start + self.patience).map_err(|e| e.to_string())?;
        self.story.waited = start.elapsed();
        drop(
            old.into_map()
                .map_err(|_| "the old map has readers again")?,
        );
        Ok(())
    }

    /// Swaps the devices' map.
    fn swap(
        &self,
        change: impl FnOnce(&GuestRam) -> Result<GuestRam, GuestRegionCollectionError>,
    ) -> Result<RetiredMap<DeviceRam>, String> {
        let changed = self.devices.update(|now| {
            let ram = change(now.get_backend())?;
            // A handle to the same IOTLB.
            let iotlb = SharedIotlb::clone(now.iommu());
            Ok::<_, GuestRegionCollectionError>(DeviceRam::by_guest_address(
                ram,
                iotlb,
                now.get_iommu_enabled(),
            ))
        });
        changed.map_err(|e| e.to_string())
    }

    fn note_description(&mut self, one: &GuestRam) {
        for region in memory::described(one) {
            self.story.as_asked = self.source.plugged().is(&region.backing);
            self.story.described = region.to_string();
        }
    }
}

fn without(ram: &GuestRam, region: &GuestRegion) -> Result<GuestRam, GuestRegionCollectionError> {
    let removed = ram.remove_region(region.start_addr(), region.len());
    removed.map(|(ram, _)| ram)
}

/// The side of the driver thread: its own mapping of everything, with bitmaps of its own.
#[derive(Debug)]
pub struct ThreadSide {
    view: GuestMemoryAtomic<GuestRam>,
    /// The region, mapped once more.
    one: Option<GuestRam>,
}

impl ThreadSide {
    /// The side of a driver that uses `view`.
    pub fn new(view: GuestMemoryAtomic<GuestRam>) -> Self {
        Self { view, one: None }
    }
}

impl GuestSide for ThreadSide {
    fn insert(&mut self, one: &GuestRam) -> Result<(), String> {
        let mine = memory::second_view(one).map_err(|e| e.to_string())?;
        let region = memory::only_region(&mine).ok_or("it was not built")?;
        let changed = self.view.update(|ram| ram.insert_region(region));
        changed.map_err(|e| e.to_string())?;
        self.one = Some(mine);
        Ok(())
    }

    fn blocks(
        &mut self,
        at: u64,
        len: u64,
        come: bool,
        dirtied: &mut PageMap,
    ) -> Result<(), String> {
        let one = self.one.as_ref().ok_or("the driver has no region")?;
        if come {
            return plug(one, GuestAddress(at), len).map_err(|e| e.to_string());
        }
        memory::harvest_into(one, dirtied);
        let outcome = unplug(one, GuestAddress(at), len);
        memory::harvest(one);
        outcome.map_err(|e| e.to_string())
    }

    fn remove(&mut self, dirtied: &mut PageMap) -> Result<(), String> {
        let one = self.one.take().ok_or("the driver has no region")?;
        let region = memory::only_region(&one).ok_or("it has no region")?;
        memory::harvest_into(&one, dirtied);
        let old = self.view.update(|ram| without(ram, &region));
        let old = old.map_err(|e| e.to_string())?;
        old.wait(Instant::now() + PATIENCE)
            .map_err(|e| e.to_string())
    }
}

/// Bytes of a memory of one region that are there, or swapped out.
fn resident(one: &GuestRam) -> Result<u64, String> {
    Ok(memory::residency(one)?
        .iter()
        .map(|takes| takes.resident + takes.swapped)
        .sum())
}

/// Bytes of this process that are in memory: `Rss` of /proc/self/smaps_rollup, and huge pages, which it leaves out.
fn process_memory() -> Result<u64, String> {
    let path = "/proc/self/smaps_rollup";
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    Ok(rollup(&text))
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
#[path = "plug_tests.rs"]
mod tests;
