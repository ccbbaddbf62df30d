//! The memory slots of a virtual machine, and KVM's dirty log.

use std::collections::BTreeMap;
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

/// The memory slots of a virtual machine. Memory can be added and removed while the vCPU runs.
#[derive(Debug)]
pub struct Slots {
    // Dropped before the memory.
    vm: Arc<VmFd>,
    /// The guest address and the memory of each slot, by its number.
    slots: Mutex<BTreeMap<u32, (GuestAddress, Arc<GuestRam>)>>,
    address_bits: u32,
}

impl Slots {
    pub(super) fn new(vm: Arc<VmFd>, address_bits: u32) -> Self {
        Self {
            vm,
            slots: Mutex::default(),
            address_bits,
        }
    }

    /// Adds a slot with a dirty log for each region of `ram`.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM refuses a slot, or if the memory ends past the guest's physical
    /// address space.
    pub fn add(&self, ram: &Arc<GuestRam>) -> Result<(), Error> {
        if (ram.last_addr().0 as u128) >> self.address_bits != 0 {
            let source = io::Error::other(
                "RAM ends past the guest's physical address space; use a smaller --mem",
            );
            return Err(failed("add memory")(source));
        }
        let mut slots = lock(&self.slots);
        for region in ram.iter() {
            let (start, len) = (region.start_addr(), region.len());
            let is_free = |slot: &u32| !slots.contains_key(slot);
            let free = (0..).find(is_free).unwrap_or(u32::MAX);
            self.set(free, start, len, ram)?;
            slots.insert(free, (start, Arc::clone(ram)));
        }
        Ok(())
    }

    /// Removes the slots of `ram`. Returns the last dirty log of each.
    ///
    /// The guest must have stopped using the memory: the log misses writes during the removal.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM refuses the call.
    pub fn remove(&self, ram: &Arc<GuestRam>) -> Result<Vec<SlotLog>, Error> {
        let (mut slots, mut logs) = (lock(&self.slots), Vec::new());
        let own = slots.iter().filter(|(_, slot)| Arc::ptr_eq(&slot.1, ram));
        let own: Vec<_> = own.map(|(n, slot)| (*n, slot.0)).collect();
        for (n, start) in own {
            logs.push(self.log(n, start, ram)?);
            self.set(n, start, 0, ram)?;
            slots.remove(&n);
        }
        Ok(logs)
    }

    /// Reads and clears KVM's dirty log of every slot.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM refuses the call.
    pub fn dirty_log(&self) -> Result<Vec<SlotLog>, Error> {
        let slots = lock(&self.slots);
        let logs = slots
            .iter()
            .map(|(n, (start, ram))| self.log(*n, *start, ram));
        logs.collect()
    }

    fn log(&self, slot: u32, start: GuestAddress, ram: &GuestRam) -> Result<SlotLog, Error> {
        let len = ram.find_region(start).map_or(0, |region| region.len());
        let words = self.vm.get_dirty_log(slot, len as usize);
        let words = words.map_err(failed("read the dirty log"))?;
        Ok(SlotLog { start, words })
    }

    #[expect(unsafe_code, reason = "KVM takes the memory by its host address")]
    fn set(&self, slot: u32, start: GuestAddress, len: u64, ram: &GuestRam) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: start.0,
            memory_size: len,
            userspace_addr: ram.get_host_address(start)? as u64,
        };
        // SAFETY: 1. The range is one region of `ram`: mapped, readable and writable for as long as
        //    `ram` exists. A length of 0 deletes the slot.
        // 2. `slots` keeps `ram` until KVM has deleted the slot (`remove`), or until the descriptor
        //    of the virtual machine is closed. `Vm` drops its reference to the descriptor before
        //    the one to `Slots`, and `Slots` drops `vm` before `slots`.
        // 3. vm-memory makes only volatile accesses to guest memory, so the guest may race with it.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(failed("set a memory slot"))
    }
}
