//! The guest of the example `migration`: one vCPU under KVM. It increments a byte in each of eight
//! pages, again and again, until it is paused.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

const CODE: u64 = 0x1000;

/// 16-bit code at [`CODE`].
const PROGRAM: [u8; 19] = [
    0xbb, 0x00, 0x40, //       start: mov bx, 0x4000
    0xfe, 0x07, //             next:  inc byte [bx]
    0x81, 0xc3, 0x00, 0x10, //        add bx, 0x1000
    0x81, 0xfb, 0x00, 0xc0, //        cmp bx, 0xc000
    0x72, 0xf4, //                    jb next
    0xe6, 0x10, //                    out 0x10, al
    0xeb, 0xed, //                    jmp start
];

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The address of a slot, and the words of its dirty log.
pub type LogOfSlot = (GuestAddress, Vec<u64>);

/// A virtual machine with one vCPU.
pub struct Guest {
    vm: VmFd,
    memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
}

impl Guest {
    /// Creates a virtual machine that has `memory`, with the program in it.
    pub fn new(memory: &Arc<GuestMemoryMmap<AtomicBitmap>>) -> Result<Self> {
        let vm = Kvm::new()?.create_vm()?;
        memory.write_slice(&PROGRAM, GuestAddress(CODE))?;
        let memory = Arc::clone(memory);
        let guest = Self { vm, memory };
        guest.set_slots(0)?;
        Ok(guest)
    }

    /// Turns on KVM's log of the pages that the vCPU writes.
    pub fn start_log(&self) -> Result<()> {
        self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Reads and clears KVM's log: for each slot, its address and its words.
    pub fn take_log(&self) -> Result<Vec<LogOfSlot>> {
        let slots = self.memory.iter().zip(0..);
        slots
            .map(|(region, slot)| {
                let words = self.vm.get_dirty_log(slot, region.len() as usize)?;
                Ok((region.start_addr(), words))
            })
            .collect()
    }

    #[expect(unsafe_code, reason = "KVM takes host memory by its address")]
    fn set_slots(&self, flags: u32) -> Result<()> {
        for (region, slot) in self.memory.iter().zip(0..) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.get_host_address(MemoryRegionAddress(0))? as u64,
            };
            // SAFETY: the slot is one region of `self.memory`, mapped while that is held. A vCPU
            // exists only in a thread of `run`, which holds the memory, too, and drops the vCPU
            // first. Other accesses go through vm-memory, which expects races.
            unsafe { self.vm.set_user_memory_region(region)? };
        }
        Ok(())
    }

    /// Starts the vCPU on a thread of its own.
    pub fn run(&self) -> Result<Running> {
        let vcpu = self.vm.create_vcpu(0)?;
        set_registers(&vcpu)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, memory) = (Arc::clone(&stop), Arc::clone(&self.memory));
        let thread = thread::spawn(move || {
            let _memory = memory;
            run_until(vcpu, &stopped)
        });
        Ok(Running { thread, stop })
    }
}

/// A vCPU that runs.
pub struct Running {
    thread: JoinHandle<std::result::Result<u64, kvm_ioctls::Error>>,
    stop: Arc<AtomicBool>,
}

impl Running {
    /// Pauses the vCPU, and returns how often it wrote to its pages.
    pub fn pause(self) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        Ok(self
            .thread
            .join()
            .map_err(|_| "the vCPU's thread panicked")??)
    }
}

/// Runs the vCPU until `stop` is set; returns the number of passes over its pages.
fn run_until(mut vcpu: VcpuFd, stop: &AtomicBool) -> std::result::Result<u64, kvm_ioctls::Error> {
    let mut passes = 0;
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(0x10, _) => passes += 1,
            exit => panic!("unexpected exit {exit:?}"),
        }
        if stop.load(Ordering::Acquire) {
            return Ok(passes);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn set_registers(vcpu: &VcpuFd) -> Result<()> {
    let mut special = vcpu.get_sregs()?;
    (special.cs.base, special.cs.selector) = (0, 0);
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags) = (CODE, 2);
    Ok(vcpu.set_regs(&registers)?)
}

#[cfg(not(target_arch = "x86_64"))]
fn set_registers(_: &VcpuFd) -> Result<()> {
    Err("the guest's program is x86_64 code".into())
}
