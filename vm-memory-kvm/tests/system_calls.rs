//! The table of system calls in the crate documentation lists the calls that are made.
//!
//! The allocator of this program makes no system calls, so it is a program of its own.
#![cfg(target_arch = "x86_64")]

use std::io;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use test_support::{documented_calls, skipped, CallRecorder, StaticAllocator};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, Permissions};
use vm_memory_kvm::{DirtyLog, KvmSlots, SlotError};

#[global_allocator]
static ALLOCATOR: StaticAllocator = StaticAllocator::new();

type Memory = GuestMemoryMmap<()>;

#[expect(unsafe_code, reason = "no vCPU runs")]
fn build(vm: &Arc<VmFd>, log: DirtyLog) -> Result<KvmSlots, SlotError> {
    // SAFETY: no vCPU of the virtual machine runs.
    unsafe { KvmSlots::builder(Arc::clone(vm)).dirty_log(log).build() }
}

#[expect(unsafe_code, reason = "no vCPU runs")]
fn add(slots: &KvmSlots, memory: &Memory) {
    let host = memory.get_host_address(GuestAddress(0)).unwrap();
    let start = GuestAddress(0x10_0000);
    // SAFETY: no vCPU of the virtual machine runs.
    unsafe { slots.add(start, 0x1000, host, Permissions::ReadWrite) }.unwrap();
}

fn use_slots(recorder: &mut CallRecorder, kvm: &Kvm, log: DirtyLog) -> io::Result<()> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    let vm = Arc::new(kvm.create_vm().unwrap());
    let slots = match recorder.run("KvmSlotsBuilder::build", || build(&vm, log))? {
        Err(SlotError::Unsupported(what)) => return Err(io::Error::other(what)),
        slots => slots.unwrap(),
    };
    let vcpu = vm.create_vcpu(0).unwrap();
    if let DirtyLog::Ring { .. } = log {
        recorder.run("KvmSlots::add_vcpu", || slots.add_vcpu(&vcpu).unwrap())?;
    }
    recorder.run("KvmSlots::add_memory", || {
        slots.add_memory(&memory).unwrap()
    })?;
    recorder.run("KvmSlots::add", || add(&slots, &memory))?;
    recorder.run("KvmSlots::set_tracking", || {
        slots.set_tracking(true).unwrap()
    })?;
    recorder.run("KvmSlots::take_log", || slots.take_log().map(drop).unwrap())?;
    if let DirtyLog::Ring { .. } = log {
        recorder.run("KvmSlots::drain_rings", || slots.drain_rings().unwrap())?;
    }
    let removed = recorder.run("KvmSlots::remove", || slots.remove(GuestAddress(0), 0x1000))?;
    removed.unwrap();
    recorder.run("KvmSlots::slots", || slots.slots())?;
    drop(vm);
    recorder.run("KvmSlots", || drop(slots))?;
    Ok(())
}

#[test]
fn system_calls_are_those_of_the_documentation() {
    let name = "system_calls_are_those_of_the_documentation";
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return skipped(name, format!("/dev/kvm: {error}")),
    };
    let mut recorder = CallRecorder::default();
    let logs = [
        DirtyLog::Bitmap,
        DirtyLog::Manual { max_pages: 64 },
        DirtyLog::Ring { entries: 1024 },
    ];
    for log in logs {
        if let Err(error) = use_slots(&mut recorder, &kvm, log) {
            return skipped(name, format!("KVM with {log:?}: {error}"));
        }
    }
    let table = documented_calls(include_str!("../src/lib.rs"));
    assert_eq!(recorder.undocumented(&table), Vec::<String>::new());
    assert_eq!(recorder.unused(&table), Vec::<String>::new());
}
