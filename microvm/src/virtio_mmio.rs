//! The virtio-mmio transport (virtio 1.2, section 4.2) in front of the block device: registers, one
//! queue, and what the guest's notifications set off.
//!
//! MMIO exits of a vCPU and calls of the driver thread end here alike.

use crate::block::Block;
use crate::iommu::DeviceMemory;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard};

/// Descriptors of the queue, at most.
pub const QUEUE_MAX: u16 = 64;
/// "virt".
pub const MAGIC: u32 = 0x7472_6976;
/// The version of section 4.2, as opposed to the legacy 1.
pub const VERSION: u32 = 2;
const VENDOR: u32 = 0x6d76_6d6d;

/// A block device behind virtio-mmio registers.
#[derive(Debug)]
pub struct VirtioMmio<M: DeviceMemory> {
    mem: GuestMemoryAtomic<M>,
    /// The device.
    pub block: Block,
    queue: Queue,
    queue_sel: u32,
    status: u32,
    interrupt: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    /// Notifications so far.
    pub kicks: u64,
    /// Why the device asked for a reset, if it did.
    pub broken: Option<String>,
}

impl<M: DeviceMemory + 'static> VirtioMmio<M> {
    /// A device that reaches guest memory through `mem`.
    ///
    /// # Errors
    ///
    /// That of the queue, if it does not like [`QUEUE_MAX`].
    pub fn new(mem: GuestMemoryAtomic<M>, block: Block) -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            mem,
            block,
            queue: Queue::new(QUEUE_MAX)?,
            queue_sel: 0,
            status: 0,
            interrupt: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            kicks: 0,
            broken: None,
        })
    }

    /// What it sees of guest memory for now.
    pub fn mem(&self) -> GuestMemoryLoadGuard<M> {
        self.mem.memory()
    }

    /// Its handle of guest memory, for those who change the map.
    #[cfg(test)]
    pub fn handle(&self) -> GuestMemoryAtomic<M> {
        self.mem.clone()
    }

    /// Whether the device asserts its interrupt.
    pub fn interrupt_line(&self) -> bool {
        self.interrupt != 0
    }

    /// A read of the register or the configuration at `offset`. What is not there reads as zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            let config = self.block.config(QUEUE_MAX);
            let from = usize::try_from(at).ok().and_then(|at| config.get(at..));
            for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
                *to = *from;
            }
        } else if data.len() == 4 {
            data.copy_from_slice(&self.register(offset as u32).to_le_bytes());
        }
    }

    /// A write to the register at `offset`. What is not there, not writable, not four bytes wide or
    /// out of its turn is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Ok(value)) = (u32::try_from(offset), data.try_into()) {
            self.set_register(offset, u32::from_le_bytes(value));
        }
    }

    fn features() -> u64 {
        1 << VIRTIO_F_VERSION_1 | Block::features()
    }

    fn register(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_BLOCK,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => Self::features() as u32,
                1 => (Self::features() >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX if self.queue_sel == 0 => u32::from(QUEUE_MAX),
            reg::VIRTIO_MMIO_QUEUE_READY if self.queue_sel == 0 => u32::from(self.queue.ready()),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt,
            reg::VIRTIO_MMIO_STATUS => self.status,
            // No shared memory region: all ones (section 4.2.2.1).
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_STATUS => self.set_status(value),
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) => {
                let shift = match self.driver_features_sel {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                self.driver_features &= !(u64::from(u32::MAX) << shift);
                self.driver_features |= u64::from(value) << shift;
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt &= !value,
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => self.notified(),
            _ if self.queue_sel == 0 => self.set_queue_register(offset, value),
            _ => {}
        }
    }

    fn set_queue_register(&mut self, offset: u32, value: u32) {
        let queue = &mut self.queue;
        if offset == reg::VIRTIO_MMIO_QUEUE_READY {
            // Whether the addresses are any good is looked at when they are used.
            queue.set_ready(value == 1);
        }
        if queue.ready() {
            return;
        }
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn has(&self, status: u32) -> bool {
        self.status & status == status
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.queue.reset();
            self.status = 0;
            self.interrupt = 0;
            self.driver_features = 0;
            self.broken = None;
            return;
        }
        let mut value = value | self.status & VIRTIO_CONFIG_S_NEEDS_RESET;
        // Features are settled once: an offer taken up in part is fine, without VERSION_1 it is the
        // legacy interface, which this is not.
        let acceptable = self.driver_features & !Self::features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable {
            value &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        self.status = value;
    }

    /// Serves the requests that were in the available ring when the notification came. The guest
    /// notifies again for what it adds later, so one notification is a bounded amount of work.
    fn notified(&mut self) {
        self.kicks += 1;
        if !self.has(VIRTIO_CONFIG_S_DRIVER_OK) || self.has(VIRTIO_CONFIG_S_NEEDS_RESET) {
            return;
        }
        match self.serve() {
            Ok(0) => {}
            Ok(_) => self.interrupt |= reg::VIRTIO_MMIO_INT_VRING,
            Err(why) => {
                // Section 2.1.2: the device cannot go on, and says so.
                self.broken = Some(why);
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                self.interrupt |= reg::VIRTIO_MMIO_INT_CONFIG;
            }
        }
    }

    fn serve(&mut self) -> Result<usize, String> {
        // The map of this moment, for all requests of this notification.
        let mem = self.mem.memory().into_inner();
        if !self.queue.is_valid(&*mem) {
            return Err("the queue does not lie in guest memory".to_owned());
        }
        // At most as many as the queue has descriptors: the iterator refuses more.
        let chains: Vec<_> = self.queue.iter(&*mem).map_err(|e| e.to_string())?.collect();
        let (queue, count) = (&mut self.queue, chains.len());
        let mut used = |block: &mut Block, head: u16, written: u32| {
            let at = queue.next_used() % queue.size();
            queue
                .add_used(&*mem, head, written)
                .map_err(|e| e.to_string())?;
            // The element, and the index behind the flags.
            let used = queue.used_ring();
            block.wrote(&*mem, used.saturating_add(4 + 8 * u64::from(at)), 8);
            block.wrote(&*mem, used.saturating_add(2), 2);
            Ok::<(), String>(())
        };
        let mut outcome = Ok(());
        for chain in chains {
            let head = chain.head_index();
            if let Some(written) = self.block.process(&*mem, head, chain) {
                outcome = used(&mut self.block, head, written);
                if outcome.is_err() {
                    break;
                }
            }
        }
        // What the device has begun it ends, whatever became of the queue.
        outcome.and(self.block.finish(&mem, used)).map(|()| count)
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
