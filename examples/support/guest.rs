//! A guest with one vCPU under KVM.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::{vcpu, Memory, Result};

/// A virtual machine whose vCPU runs on a separate thread.
pub struct Guest {
    vm: VmFd,
    memory: Arc<Memory>,
    stop: Arc<AtomicBool>,
    vcpu: Option<JoinHandle<u64>>,
}

impl Guest {
    /// Starts the guest. KVM does not log its writes yet.
    ///
    /// # Errors
    ///
    /// Returns an error if this machine has no KVM, or if its processor is not an x86_64.
    pub fn start(memory: &Arc<Memory>) -> Result<Self> {
        let mut guest = Self {
            vm: Kvm::new()?.create_vm()?,
            memory: Arc::clone(memory),
            stop: Arc::default(),
            vcpu: None,
        };
        guest.set_slots(0)?;
        let vcpu = guest.vm.create_vcpu(0)?;
        vcpu::load(&vcpu, memory)?;
        let (memory, stop) = (Arc::clone(memory), Arc::clone(&guest.stop));
        guest.vcpu = Some(thread::spawn(move || vcpu::run(memory, vcpu, &stop)));
        Ok(guest)
    }

    /// Turns on KVM's log of the pages that the vCPU writes.
    ///
    /// # Errors
    ///
    /// Returns the error of KVM.
    pub fn start_log(&self) -> Result<()> {
        self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Reads and clears KVM's log. Returns the address of each slot, and the words of its log.
    ///
    /// # Errors
    ///
    /// Returns the error of KVM.
    pub fn take_log(&self) -> Result<Vec<(GuestAddress, Vec<u64>)>> {
        let mut logs = Vec::new();
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let words = self.vm.get_dirty_log(slot, region.len() as usize)?;
            logs.push((region.start_addr(), words));
        }
        Ok(logs)
    }

    /// Stops the vCPU. Returns how many times it wrote all its pages.
    ///
    /// # Errors
    ///
    /// Returns an error if the vCPU has already stopped, or if it ended with an error.
    pub fn stop(&mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        let vcpu = self.vcpu.take().ok_or("the vCPU has already stopped")?;
        Ok(vcpu.join().map_err(|_| "the vCPU ended with an error")?)
    }

    /// Registers each region as a slot of KVM.
    #[expect(unsafe_code, reason = "KVM takes host memory by its address")]
    fn set_slots(&self, flags: u32) -> Result<()> {
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.get_host_address(MemoryRegionAddress(0))? as u64,
            };
            // SAFETY: the slot is one region of `self.memory`, which stays mapped while an `Arc` of
            // the memory exists. Only `vcpu::run` can use the vCPU after `self` is dropped, and it
            // has such an `Arc`. Other accesses use vm-memory, which permits races.
            unsafe { self.vm.set_user_memory_region(slot)? };
        }
        Ok(())
    }
}
