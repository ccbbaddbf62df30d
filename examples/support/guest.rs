//! A guest with one vCPU under KVM.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_ioctls::Kvm;
use vm_memory_kvm::{KvmSlots, SlotLogs};

use crate::{vcpu, Memory, Result};

/// A virtual machine whose vCPU runs on a separate thread.
pub struct Guest {
    slots: KvmSlots,
    stop: Arc<AtomicBool>,
    vcpu: Option<JoinHandle<u64>>,
}

impl Guest {
    /// Starts the guest. KVM does not log its writes yet.
    ///
    /// # Errors
    ///
    /// Returns an error if this machine has no KVM, or if its processor is not an x86_64.
    #[expect(unsafe_code, reason = "KVM uses host memory by its address")]
    pub fn start(memory: &Arc<Memory>) -> Result<Self> {
        let vm = Arc::new(Kvm::new()?.create_vm()?);
        let builder = KvmSlots::builder(Arc::clone(&vm));
        // SAFETY: 1. All slots are regions of `memory`, which stays mapped while an `Arc` of it
        //    exists. Only `vcpu::run` uses the vCPU, and it has such an `Arc`.
        // 2. Other accesses to the memory are those of vm-memory.
        let slots = unsafe { builder.build() }?;
        slots.add_memory(&**memory)?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu::load(&vcpu, memory)?;
        let (memory, stop) = (Arc::clone(memory), Arc::<AtomicBool>::default());
        let stop_vcpu = Arc::clone(&stop);
        let vcpu = thread::spawn(move || vcpu::run(memory, vcpu, &stop_vcpu));
        Ok(Self {
            slots,
            stop,
            vcpu: Some(vcpu),
        })
    }

    /// Turns on KVM's log of the pages that the vCPU writes.
    ///
    /// # Errors
    ///
    /// Returns the error of KVM.
    pub fn start_log(&self) -> Result<()> {
        Ok(self.slots.set_tracking(true)?)
    }

    /// Takes KVM's log: the pages that the vCPU has written since the last call.
    ///
    /// # Errors
    ///
    /// Returns the error of KVM.
    pub fn take_log(&self) -> Result<SlotLogs> {
        Ok(self.slots.take_log()?)
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
}
