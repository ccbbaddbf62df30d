//! A driver of the block device, and the oracle of the pages that it may write.

use std::collections::BTreeSet;
use std::sync::Arc;

use e2e::run::Storage;
use e2e::uring::{Ring, UringDisk};
use microvm::block::Block;
use microvm::bus::MmioDevice;
use microvm::disk::Image;
use microvm::memory::{harvest, pages, pages_of, GuestRam, HIGH_START, PAGE};
use microvm::virtio_mmio::VirtioMmio;
use test_support::skipped;
pub use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The length of each of the two regions.
pub const REGION: u64 = 0x2_0000;
pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x2000;
/// The elements of the used ring straddle a page boundary.
pub const USED: u64 = HIGH_START + 0x3ffc;
pub const HEADER: u64 = 0x4000;
pub const STATUS: u64 = 0x4100;
pub const DATA: u64 = HIGH_START + 0x5000;
pub const SIZE: u16 = 16;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// A status byte that the device did not write.
pub const UNTOUCHED: u8 = 0xaa;

/// The values of the register `STATUS`, in the order in which a driver sets them.
pub const RESET: u32 = 0;
pub const DRIVER: u32 = 3;
pub const FEATURES_OK: u32 = 11;
pub const DRIVER_OK: u32 = 15;
const NEEDS_RESET: u32 = 0x40;
/// The part of the feature `VERSION_1` in the upper half of the features.
pub const VERSION_1: u32 = 1;

/// The address, the length and the flags of a descriptor.
pub type Part = (u64, u32, u16);

/// The first and the last descriptor of a usual request.
pub const HEAD: Part = (HEADER, 16, 0);
pub const TAIL: Part = (STATUS, 1, WRITE);

/// A device with a queue that is ready.
pub struct Rig {
    pub ram: Arc<GuestRam>,
    pub device: VirtioMmio<GuestRam, Storage>,
    pub next: u16,
    before: Vec<Vec<u8>>,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(Storage::Plain(Image::temporary(2048).unwrap()))
    }

    /// Returns a device with synchronous I/O, and one on io_uring if the kernel permits it.
    pub fn both(test: &str) -> Vec<Self> {
        let mut rigs = vec![Self::new()];
        match Ring::new() {
            Ok(ring) => {
                let image = Image::temporary(2048).unwrap();
                rigs.push(Self::with(Storage::Uring(UringDisk { image, ring })));
            }
            Err(e) => skipped(test, format!("io_uring: {e}")),
        }
        rigs
    }

    fn with(storage: Storage) -> Self {
        let ranges = [0, HIGH_START].map(|start| (GuestAddress(start), REGION as usize));
        let ram = Arc::new(GuestRam::from_ranges(&ranges).unwrap());
        let device = VirtioMmio::new(Arc::clone(&ram).into(), Block::new(storage)).unwrap();
        let mut rig = Self {
            device,
            ram,
            next: 0,
            before: Vec::new(),
        };
        rig.start([DESC, AVAIL, USED]);
        rig
    }

    /// Resets the device and starts it with the given rings.
    pub fn start(&mut self, addresses: [u64; 3]) {
        self.negotiate(1, VERSION_1);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
        let registers = [
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            reg::VIRTIO_MMIO_QUEUE_USED_LOW,
        ];
        for (reg, address) in registers.into_iter().zip(addresses) {
            self.write(reg, address as u32);
            self.write(reg + 4, (address >> 32) as u32);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        self.write(reg::VIRTIO_MMIO_STATUS, DRIVER_OK);
        self.next = 0;
        self.store(AVAIL, 0_u32);
        self.forget();
    }

    /// Resets the device, and accepts features of one half. Half 0 has bits 0 to 31, and half 1 has
    /// bits 32 to 63.
    pub fn negotiate(&mut self, half: u32, features: u32) {
        self.write(reg::VIRTIO_MMIO_STATUS, RESET);
        self.write(reg::VIRTIO_MMIO_STATUS, DRIVER);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, features);
        self.write(reg::VIRTIO_MMIO_STATUS, FEATURES_OK);
    }

    pub fn write(&mut self, reg: u32, value: u32) {
        self.device.write(reg.into(), &value.to_le_bytes());
    }

    pub fn read(&mut self, reg: u32) -> u32 {
        let mut data = [0; 4];
        self.device.read(reg.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn store<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn load<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn header(&self, kind: u32, sector: u64) {
        self.store(HEADER, u64::from(kind));
        self.store(HEADER + 8, sector);
        self.store(STATUS, UNTOUCHED);
    }

    pub fn descriptor(&self, nth: u64, at: u64, len: u32, flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.store(DESC + 16 * nth, at);
        self.store(DESC + 16 * nth + 8, rest);
    }

    /// Links the descriptors to one chain, whose head is the descriptor 0.
    pub fn chain(&self, parts: &[Part]) {
        for (nth, &(at, len, flags)) in parts.iter().enumerate() {
            let flags = flags | if nth + 1 == parts.len() { 0 } else { NEXT };
            self.descriptor(nth as u64, at, len, flags, nth as u16 + 1);
        }
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        let read = |region: &microvm::memory::GuestRegion| {
            let mut bytes = vec![0; region.len() as usize];
            region
                .read_slice(&mut bytes, vm_memory::MemoryRegionAddress(0))
                .unwrap();
            bytes
        };
        self.ram.iter().map(read).collect()
    }

    /// Clears the dirty pages of the driver, so that only later writes count.
    pub fn forget(&mut self) {
        harvest(&self.ram);
        self.before = self.contents();
    }

    /// Makes the chain with head `head` available, and notifies the device.
    pub fn notify(&mut self, head: u16) {
        self.store(AVAIL + 4 + 2 * u64::from(self.next % SIZE), head);
        self.next = self.next.wrapping_add(1);
        self.store(AVAIL + 2, self.next);
        self.forget();
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }

    /// Returns the dirty pages. Every page that has changed must be dirty.
    pub fn dirty(&mut self) -> BTreeSet<u64> {
        let dirty = pages(&harvest(&self.ram));
        for ((before, now), start) in self.before.iter().zip(self.contents()).zip([0, HIGH_START]) {
            for (nth, (before, now)) in before.chunks(4096).zip(now.chunks(4096)).enumerate() {
                let page = start + nth as u64 * PAGE;
                assert!(
                    before == now || dirty.contains(&page),
                    "{page:#x} changed without a mark"
                );
            }
        }
        dirty
    }

    /// Returns the pages of the last used element.
    pub fn used_pages(&self) -> impl Iterator<Item = u64> {
        let entry = u64::from(self.next.wrapping_sub(1) % SIZE);
        pages_of(USED + 4 + 8 * entry, 8).chain(pages_of(USED + 2, 2))
    }

    /// Sends the descriptors as one chain. Returns the status and the number of bytes in the used
    /// element. The dirty pages must be those of these bytes.
    pub fn send(&mut self, parts: &[Part]) -> (u8, u32) {
        self.chain(parts);
        self.notify(0);
        assert_eq!(self.load::<u16>(USED + 2), self.next);
        let element = USED + 4 + 8 * u64::from((self.next - 1) % SIZE);
        let written: u32 = self.load(element + 4);
        let writable = parts.iter().filter(|part| part.2 & WRITE != 0);
        let bytes = writable.flat_map(|&(at, len, _)| {
            (0..len.min(0x2_0000)).map(move |n| at.wrapping_add(n.into()))
        });
        let bytes: Vec<u64> = bytes.collect();
        // A read writes all bytes, any other request the last one: the status.
        let first = if written > 1 {
            0
        } else {
            bytes.len().saturating_sub(written as usize)
        };
        let expected = bytes[first..].iter().flat_map(|at| pages_of(*at, 1));
        let expected: BTreeSet<_> = expected.chain(self.used_pages()).collect();
        assert_eq!(self.dirty(), expected);
        (self.load(STATUS), written)
    }

    pub fn image(&mut self) -> &Image {
        self.device.block.disk().image()
    }

    pub fn status(&mut self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    pub fn interrupt_status(&mut self) -> u32 {
        self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    pub fn needs_reset(&mut self) -> bool {
        self.status() & NEEDS_RESET != 0
    }
}
