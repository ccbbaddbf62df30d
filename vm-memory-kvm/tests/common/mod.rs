//! A virtual machine whose vCPU runs one instruction at a time.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_segment;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_kvm::{KvmSlots, KvmSlotsBuilder, SlotError};

pub const PAGE: usize = test_support::PAGE;
/// The first address of the region that the program needs.
pub const RAM: u64 = 0;
/// The guest address of the program.
const PROGRAM: u64 = 0x1000;
/// 32-bit code: `mov [ebx], al; hlt`.
const CODE: [u8; 3] = [0x88, 0x03, 0xf4];
/// The types of segments: code that can be read and data that can be written, both accessed.
const CODE_SEGMENT: u8 = 11;
const DATA_SEGMENT: u8 = 3;
const KVM_EXIT_DIRTY_RING_FULL: u32 = 31;

/// The result of a write of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The guest has written.
    Done,
    /// There is no memory that can be written at this address.
    Mmio(u64),
    /// The dirty ring is full.
    RingFull,
    /// KVM cannot access the page, whose address it may tell.
    Fault(Option<GuestAddress>),
}

/// A virtual machine with one vCPU.
pub struct Machine {
    // Dropped before the memory: fields are dropped in this order, and tests drop their memory
    // after the machine.
    pub vcpu: VcpuFd,
    pub slots: KvmSlots,
    vm: Arc<VmFd>,
}

/// Makes slots. The tests keep their memory until the vCPU has stopped.
#[expect(unsafe_code, reason = "the guest uses the memory of the tests")]
fn build(builder: KvmSlotsBuilder) -> Result<KvmSlots, SlotError> {
    // SAFETY: 1. A test creates its memory before the machine, or does not run the vCPU after it
    //    has dropped the memory. All of it is mapped by vm-memory.
    // 2. The tests access it by vm-memory only.
    unsafe { builder.build() }
}

impl Machine {
    /// Creates a virtual machine with a program in `memory`, but without slots.
    ///
    /// Returns `None` if this machine has no KVM, or if it lacks what the options need.
    pub fn new<B: vm_memory::bitmap::Bitmap>(
        test: &str,
        memory: &GuestMemoryMmap<B>,
        options: impl FnOnce(KvmSlotsBuilder) -> KvmSlotsBuilder,
    ) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                test_support::skipped(test, format!("/dev/kvm: {error}"));
                return None;
            }
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let slots = match build(options(KvmSlots::builder(Arc::clone(&vm)))) {
            Ok(slots) => slots,
            Err(SlotError::Unsupported(what)) => {
                test_support::skipped(test, format!("KVM lacks {what}"));
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        memory.write_slice(&CODE, GuestAddress(PROGRAM)).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        match slots.add_vcpu(&vcpu) {
            Ok(()) | Err(SlotError::NoRing) => {}
            Err(error) => panic!("{error}"),
        }
        Some(Self { vcpu, slots, vm })
    }

    /// Makes other slots of the same virtual machine.
    pub fn build(
        &self,
        options: impl FnOnce(KvmSlotsBuilder) -> KvmSlotsBuilder,
    ) -> Result<KvmSlots, SlotError> {
        build(options(KvmSlots::builder(Arc::clone(&self.vm))))
    }

    /// Lets the guest write a byte.
    pub fn write(&mut self, addr: u64, value: u8) -> Access {
        // Protected mode without paging, so that the processor executes the program.
        let mut special = self.vcpu.get_sregs().unwrap();
        special.cr0 |= 1;
        special.cs = segment(CODE_SEGMENT);
        let data = segment(DATA_SEGMENT);
        (special.ds, special.es, special.ss) = (data, data, data);
        self.vcpu.set_sregs(&special).unwrap();
        let mut registers = self.vcpu.get_regs().unwrap();
        (registers.rip, registers.rflags) = (PROGRAM, 2);
        (registers.rax, registers.rbx) = (value.into(), addr);
        self.vcpu.set_regs(&registers).unwrap();
        match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => Access::Done,
            Ok(VcpuExit::MmioWrite(addr, _)) => Access::Mmio(addr),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Access::RingFull,
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Access::Fault(Some(GuestAddress(gpa))),
            Err(error) if io::Error::from(error).raw_os_error() == Some(14) => Access::Fault(None),
            other => panic!("the vCPU ended: {other:?}"),
        }
    }
}

/// Returns a segment of 4 GiB.
fn segment(type_: u8) -> kvm_segment {
    kvm_segment {
        selector: 8,
        limit: u32::MAX,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Returns the dirty pages of a set that are not those of the program.
pub fn pages(dirty: &DirtyMemory) -> Vec<u64> {
    let pages = dirty.pages().map(|(addr, _)| addr.0);
    pages.filter(|addr| *addr >= 0x10_0000).collect()
}
