//! The memory slots of a virtual machine, and KVM's dirty log.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::failed;
use crate::bus::lock;
use crate::dirty::SlotLog;
use crate::memory::GuestRam;
use crate::Error;

/// The guest address and the memory of a slot.
type Slot = (GuestAddress, Arc<GuestRam>);

/// The memory slots of a virtual machine. Memory can be added and removed while the vCPU runs.
#[derive(Debug)]
pub struct Slots {
    // Dropped before the memory.
    vm: Arc<VmFd>,
    slots: Mutex<Vec<Option<Slot>>>,
    address_bits: u32,
}

impl Slots {
    pub(super) fn new(vm: Arc<VmFd>, address_bits: u32) -> Self {
        let slots = Mutex::default();
        Self {
            vm,
            slots,
            address_bits,
        }
    }

    /// Adds a slot with a dirty log for each region of `ram`.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM refuses a slot, or the memory ends past the guest's physical address
    /// space.
    pub fn add(&self, ram: &Arc<GuestRam>) -> Result<(), Error> {
        if (ram.last_addr().0 as u128) >> self.address_bits != 0 {
            let source = io::Error::other("past the physical address space; try a smaller --mem");
            return Err(failed("add memory")(source));
        }
        let mut slots = lock(&self.slots);
        for region in ram.iter() {
            let (start, len) = (region.start_addr(), region.len());
            let free = slots.iter().position(Option::is_none).unwrap_or_else(|| {
                slots.push(None);
                slots.len() - 1
            });
            self.set(free, start, len, ram)?;
            if let Some(slot) = slots.get_mut(free) {
                *slot = Some((start, Arc::clone(ram)));
            }
        }
        Ok(())
    }

    /// Removes the slots of `ram`. Returns the last dirty log of each.
    ///
    /// The guest must have stopped using the memory: the log misses writes during the removal.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM refuses.
    pub fn remove(&self, ram: &Arc<GuestRam>) -> Result<Vec<SlotLog>, Error> {
        let mut logs = Vec::new();
        for (n, slot) in lock(&self.slots).iter_mut().enumerate() {
            if let Some((start, memory)) = slot.as_ref().filter(|slot| Arc::ptr_eq(&slot.1, ram)) {
                logs.push(self.log(n, *start, memory)?);
                self.set(n, *start, 0, memory)?;
                *slot = None;
            }
        }
        Ok(logs)
    }

    /// Reads and clears KVM's dirty log of every slot.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM refuses.
    pub fn dirty_log(&self) -> Result<Vec<SlotLog>, Error> {
        let slots = lock(&self.slots);
        let used = slots
            .iter()
            .enumerate()
            .filter_map(|(n, slot)| Some((n, slot.as_ref()?)));
        used.map(|(n, (start, ram))| self.log(n, *start, ram))
            .collect()
    }

    fn log(&self, slot: usize, start: GuestAddress, ram: &GuestRam) -> Result<SlotLog, Error> {
        let len = ram.find_region(start).map_or(0, |region| region.len());
        let words = self.vm.get_dirty_log(slot as u32, len as usize);
        let words = words.map_err(failed("read the dirty log"))?;
        Ok(SlotLog { start, words })
    }

    #[expect(unsafe_code, reason = "KVM takes the memory by its host address")]
    fn set(&self, slot: usize, start: GuestAddress, len: u64, ram: &GuestRam) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: start.0,
            memory_size: len,
            userspace_addr: ram.get_host_address(start)? as u64,
        };
        // SAFETY: 1. The range is one region of `ram`: mapped, readable and writable for as long as
        //    `ram` exists. A length of 0 deletes the slot.
        // 2. `slots` keeps `ram` until KVM has deleted the slot (`remove`), or until the descriptor
        //    of the virtual machine is closed: `Vm` drops its reference to the descriptor before
        //    the one to `Slots`, and `Slots` drops `vm` before `slots`.
        // 3. vm-memory makes only volatile accesses to guest memory, so the guest may race with it.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(failed("set a memory slot"))
    }
}
