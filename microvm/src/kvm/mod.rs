//! The virtual machine on KVM: memory slots with a dirty log, one vCPU, and the loop that handles
//! its exits.

mod registers;
mod slots;

use std::ffi::CString;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kvm_bindings::{kvm_pit_config, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use crate::bus::{Bus, Interrupt};
use crate::Error;

pub use registers::Entry;
pub use slots::Slots;

/// The guest physical address of the three-page TSS that KVM needs on Intel processors. It is below
/// the BIOS, and not in RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A virtual machine that has stopped.
pub struct Stopped {
    /// The virtual machine.
    pub vm: Vm,
    /// The bus, with its devices and the exit code.
    pub bus: Bus,
    /// The reason for a failure of the run.
    pub failure: Option<String>,
}

/// A virtual machine with one vCPU.
#[derive(Debug)]
pub struct Vm {
    vcpu: VcpuFd,
    // Dropped before the slots, which own the guest memory.
    fd: Arc<VmFd>,
    slots: Arc<Slots>,
    has_irqchip: bool,
}

impl Vm {
    /// Creates a virtual machine without memory. `with_irqchip` adds the interrupt controllers and
    /// the timer that a guest kernel needs.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM is not available or refuses a step.
    pub fn new(device: &str, with_irqchip: bool) -> Result<Self, Error> {
        let unusable = |source| Error::KvmDevice {
            device: device.to_owned(),
            source,
        };
        let path = CString::new(device).map_err(|e| unusable(e.into()))?;
        let kvm = Kvm::new_with_path(&path).map_err(|e| unusable(e.into()))?;
        if kvm.get_api_version() != 12 {
            return Err(unusable(io::Error::other("not a KVM device")));
        }
        let vm = kvm
            .create_vm()
            .map_err(failed("create a virtual machine"))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(failed("set the address of the TSS"))?;
        if with_irqchip {
            vm.create_irq_chip()
                .map_err(failed("create interrupt controllers"))?;
            vm.create_pit2(kvm_pit_config::default())
                .map_err(failed("create a timer"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("read CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("set CPUID"))?;
        let mut leaves = cpuid.as_slice().iter();
        let sizes = leaves.find(|leaf| leaf.function == 0x8000_0008);
        let address_bits = sizes.map_or(36, |leaf| leaf.eax & 0xff);
        let fd = Arc::new(vm);
        Ok(Self {
            vcpu,
            slots: Arc::new(Slots::new(Arc::clone(&fd), address_bits)),
            fd,
            has_irqchip: with_irqchip,
        })
    }

    /// Returns the memory slots.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Connects an interrupt line to the interrupt controllers.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM rejects the irqfd, for example without an interrupt controller.
    pub fn connect(&self, interrupt: &Interrupt, line: u32) -> Result<(), Error> {
        let connected = self.fd.register_irqfd(&interrupt.0, line);
        connected.map_err(failed("connect an interrupt"))
    }

    /// Runs the vCPU in a thread until the guest ends the run, fails, or exceeds the time limit.
    ///
    /// # Errors
    ///
    /// Returns an error if the thread cannot be started or panics.
    pub fn run(self, mut bus: Bus, limit: Option<Duration>) -> Result<Stopped, Error> {
        // The signal interrupts KVM_RUN. Its handler does nothing.
        let signal = SIGRTMIN();
        register_signal_handler(signal, on_kick).map_err(io::Error::from)?;
        let (stop, (ended, end)) = (Arc::new(AtomicBool::new(false)), channel::<()>());
        let (mut vm, stopped) = (self, Arc::clone(&stop));
        let vcpu = thread::Builder::new().name("vcpu".into()).spawn(move || {
            let failure = vm.run_vcpu(&mut bus, &stopped).err();
            drop(ended);
            Stopped { vm, bus, failure }
        })?;
        let _ = end.recv_timeout(limit.unwrap_or(Duration::MAX));
        stop.store(true, Ordering::Release);
        // A signal that arrives just before KVM_RUN does not interrupt it, so send it repeatedly.
        while end.recv_timeout(Duration::from_millis(1)) == Err(RecvTimeoutError::Timeout) {
            let _ = vcpu.kill(signal);
        }
        vcpu.join()
            .map_err(|_| io::Error::other("the vCPU thread panicked").into())
    }

    fn run_vcpu(&mut self, bus: &mut Bus, stop: &AtomicBool) -> Result<(), String> {
        while bus.ended.is_none() {
            if stop.load(Ordering::Acquire) {
                return Err(self.failure("the guest exceeded its time limit"));
            }
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => bus.port_out(port, data),
                Ok(VcpuExit::IoIn(port, data)) => bus.port_in(port, data),
                Ok(VcpuExit::MmioRead(addr, data)) => bus.mmio_read(addr, data),
                Ok(VcpuExit::MmioWrite(addr, data)) => bus.mmio_write(addr, data),
                // A guest kernel may reset the machine with a triple fault.
                Ok(VcpuExit::Shutdown) if self.has_irqchip => bus.ended = Some(0),
                Ok(exit) => {
                    let exit = format!("the guest stopped with {exit:?}");
                    return Err(self.failure(&exit));
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(e) => return Err(self.failure(&format!("KVM_RUN: {e}"))),
            }
        }
        Ok(())
    }

    fn failure(&self, why: &str) -> String {
        let rip = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
        format!("{why}, at RIP {rip:#x}")
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn failed<E: Into<io::Error> + fmt::Debug>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::Kvm {
        action,
        source: e.into(),
    }
}
