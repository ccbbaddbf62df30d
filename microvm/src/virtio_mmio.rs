//! The virtio-mmio transport (virtio 1.2, section 4.2) of the block device: registers, one queue,
//! and the requests of each notification.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryAtomic};
use vm_superio::Trigger;

use crate::block::{Block, Disk};
use crate::bus::{Interrupt, MmioDevice};
use crate::Error;

/// The guest address of the registers, in the 32-bit hole.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The length of the registers in bytes.
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;
/// The interrupt line of the device.
pub const VIRTIO_IRQ: u32 = 5;
/// The maximum number of descriptors in the queue.
pub const QUEUE_MAX: u16 = 64;
/// The value of the register `MagicValue`: "virt".
pub const MAGIC: u32 = 0x7472_6976;
/// The value of the register `Version`. The legacy interface is version 1.
pub const VERSION: u32 = 2;
const VENDOR: u32 = 0x6d76_6d6d;

/// A block device behind virtio-mmio registers.
#[derive(Debug)]
pub struct VirtioMmio<M: GuestMemory, D> {
    memory: GuestMemoryAtomic<M>,
    /// The block device.
    pub block: Block<D>,
    /// The interrupt line, to connect it to an interrupt controller.
    pub interrupt: Interrupt,
    queue: Queue,
    status: u32,
    interrupt_status: u32,
    queue_sel: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: [u32; 2],
    /// The number of notifications so far.
    pub notifications: u64,
    /// The error after which the device needs a reset.
    pub broken: Option<String>,
}

impl<M: GuestMemory + 'static, D: Disk> VirtioMmio<M, D> {
    /// Creates a device that accesses guest memory through `memory`, whose map may change while
    /// the device runs.
    ///
    /// # Errors
    ///
    /// Returns an error if the process has no free descriptor for the interrupt.
    pub fn new(memory: GuestMemoryAtomic<M>, block: Block<D>) -> Result<Self, Error> {
        Ok(Self {
            memory,
            block,
            interrupt: Interrupt::new()?,
            queue: Queue::new(QUEUE_MAX)?,
            status: 0,
            interrupt_status: 0,
            queue_sel: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: [0; 2],
            notifications: 0,
            broken: None,
        })
    }

    /// The offered feature bits, in two words.
    const FEATURES: [u32; 2] = [Block::<D>::FEATURES, 1 << (VIRTIO_F_VERSION_1 - 32)];

    fn register(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_BLOCK,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => {
                let features = Self::FEATURES.get(self.device_features_sel as usize);
                features.copied().unwrap_or(0)
            }
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX if self.queue_sel == 0 => QUEUE_MAX.into(),
            reg::VIRTIO_MMIO_QUEUE_READY if self.queue_sel == 0 => self.queue.ready().into(),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            reg::VIRTIO_MMIO_STATUS => self.status,
            // All ones: the device has no shared memory region (section 4.2.2.1).
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
                let features = self
                    .driver_features
                    .get_mut(self.driver_features_sel as usize);
                features.into_iter().for_each(|word| *word = value);
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt_status &= !value,
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => self.notify(),
            _ if self.queue_sel == 0 => self.set_queue_register(offset, value),
            _ => {}
        }
    }

    fn set_queue_register(&mut self, offset: u32, value: u32) {
        let queue = &mut self.queue;
        if offset == reg::VIRTIO_MMIO_QUEUE_READY {
            // The addresses are checked when they are used.
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
            (self.status, self.interrupt_status, self.driver_features) = (0, 0, [0; 2]);
            self.broken = None;
            return;
        }
        self.status = value | self.status & VIRTIO_CONFIG_S_NEEDS_RESET;
        // The driver may accept a part of the offered features. A driver without VERSION_1 is a
        // legacy driver.
        let ([low, high], [offered, version_1]) = (self.driver_features, Self::FEATURES);
        if low & !offered != 0 || high != version_1 {
            self.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
    }

    /// Completes the requests that are available. The driver notifies again for later ones, so the
    /// work for one notification is bounded.
    fn notify(&mut self) {
        self.notifications += 1;
        if !self.has(VIRTIO_CONFIG_S_DRIVER_OK) || self.has(VIRTIO_CONFIG_S_NEEDS_RESET) {
            return;
        }
        self.interrupt_status |= match self.complete_requests() {
            Ok(0) => 0,
            Ok(_) => reg::VIRTIO_MMIO_INT_VRING,
            Err(why) => {
                // Section 2.1.2: the device cannot continue until the driver resets it.
                self.broken = Some(why.to_string());
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                reg::VIRTIO_MMIO_INT_CONFIG
            }
        };
        if self.interrupt_status != 0 {
            // The counter of the event is full only if no thread reads it.
            let _ = self.interrupt.trigger();
        }
    }

    fn complete_requests(&mut self) -> Result<usize, virtio_queue::Error> {
        // One version of the memory map for all requests of this notification.
        let memory: Arc<M> = self.memory.memory().into_inner();
        if !self.queue.is_valid(&*memory) {
            return Err(virtio_queue::Error::QueueNotReady);
        }
        // The iterator returns an error if more chains are available than the queue has
        // descriptors.
        let chains: Vec<_> = self.queue.iter(&*memory)?.collect();
        let completed = self.block.process(&memory, chains);
        for &(head, written) in &completed {
            self.queue.add_used(&*memory, head, written)?;
        }
        Ok(completed.len())
    }
}

impl<M: GuestMemory + Send + Sync + 'static, D: Disk> MmioDevice for VirtioMmio<M, D> {
    /// A register that does not exist reads as 0.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(reg::VIRTIO_MMIO_CONFIG.into()) {
            let config = self.block.config(QUEUE_MAX);
            let config = usize::try_from(at).ok().and_then(|at| config.get(at..));
            for (to, from) in data.iter_mut().zip(config.unwrap_or_default()) {
                *to = *from;
            }
        } else if data.len() == 4 {
            data.copy_from_slice(&self.register(offset as u32).to_le_bytes());
        }
    }

    /// A write that is not four bytes wide, or to a register that cannot be written, has no effect.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Ok(value)) = (u32::try_from(offset), data.try_into()) {
            self.set_register(offset, u32::from_le_bytes(value));
        }
    }
}
