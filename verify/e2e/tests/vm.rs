//! The virtual machine reports the failure of a guest, its dirty pages, and those of removed slots.
//! KVM stops a vCPU at memory that is not accessible.
#![cfg(target_arch = "x86_64")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use e2e::memory::pluggable;
use e2e::vcpu::{logged, PROGRAM};
use microvm::bus::{Bus, MmioDevice};
use microvm::kvm::{Entry, Stopped, Vm};
use microvm::memory::{build, build_with_bitmaps, pages, Backing, GuestRam, HIGH_START};
use microvm::serial;
use test_support::{error_chain, skipped};
use vm_memory::{Bytes, GuestAddress};
use vm_memory_host::{plug, unplug, MemoryBuilder, Region, Unplugged};

const SECOND: Duration = Duration::from_secs(1);

/// Creates a virtual machine whose guest is `program`.
fn vm(test: &str, program: &[u8]) -> Option<(Vm, Arc<GuestRam>)> {
    let vm = match Vm::new("/dev/kvm", false) {
        Ok(vm) => vm,
        Err(e) => {
            skipped(test, e);
            return None;
        }
    };
    let ram = Arc::new(build(16 << 20, &Backing::Anonymous).unwrap());
    ram.write_slice(program, GuestAddress(PROGRAM)).unwrap();
    vm.slots().add(&ram).unwrap();
    let arguments = [HIGH_START, 1 << 33];
    vm.set_entry(
        &ram,
        Entry::Long {
            rip: PROGRAM,
            rsp: 0,
            arguments,
        },
    )
    .unwrap();
    microvm::memory::harvest(&ram);
    Some((vm, ram))
}

fn bus() -> Bus {
    Bus::new(Arc::new(Mutex::new(serial::new(false).unwrap())))
}

#[test]
fn run_of_a_guest_that_fails_returns_the_reason() {
    let test = "run_of_a_guest_that_fails_returns_the_reason";
    for (program, limit, why) in [
        (&[0xeb, 0xfe][..], SECOND / 4, "time limit"), // jmp -2
        (&[0xf4], 120 * SECOND, "Hlt"),                // hlt
        (&[0x0f, 0x0b], 120 * SECOND, "Shutdown"),     // ud2
    ] {
        let Some((vm, _ram)) = vm(test, program) else {
            return;
        };
        let Stopped { bus, failure, .. } = vm.run(bus(), Some(limit)).unwrap();
        let failure = failure.unwrap();
        assert!(failure.contains(why), "{failure}");
        assert_eq!(bus.ended, None);
    }
}

#[test]
fn dirty_log_has_every_page_that_the_guest_wrote_once() {
    // mov [rdi], rdi; mov [rdi + 0x3000], rdi; mov edx, 0xf4; xor eax, eax; out dx, al
    let program = [
        0x48, 0x89, 0x3f, 0x48, 0x89, 0xbf, 0x00, 0x30, 0x00, 0x00, 0xba, 0xf4, 0x00, 0x00, 0x00,
        0x31, 0xc0, 0xee,
    ];
    let Some((vm, ram)) = vm(
        "dirty_log_has_every_page_that_the_guest_wrote_once",
        &program,
    ) else {
        return;
    };
    let Stopped { vm, bus, failure } = vm.run(bus(), Some(120 * SECOND)).unwrap();
    assert_eq!((bus.ended, failure), (Some(0), None));
    let log = logged(&ram, &vm.slots().dirty_log().unwrap());
    assert!(
        log.is_superset(&[HIGH_START, HIGH_START + 0x3000].into()),
        "{log:x?}"
    );
    assert!(!log.contains(&(HIGH_START + 0x1000)));
    // The log is separate from the bitmaps, and reading clears it.
    assert!(pages(&microvm::memory::harvest(&ram)).is_empty());
    assert!(logged(&ram, &vm.slots().dirty_log().unwrap()).is_empty());
}

#[test]
fn removed_slot_returns_its_log_and_its_memory() {
    // mov [rsi], rsi; mov edx, 0xf4; xor eax, eax; out dx, al
    let program = [
        0x48, 0x89, 0x36, 0xba, 0xf4, 0x00, 0x00, 0x00, 0x31, 0xc0, 0xee,
    ];
    let Some((vm, ram)) = vm("removed_slot_returns_its_log_and_its_memory", &program) else {
        return;
    };
    let block = std::num::NonZeroU64::new(2 << 20).unwrap();
    let one = Arc::new(pluggable(1 << 33, 4 << 20, block, &Backing::Anonymous).unwrap());
    vm_memory_host::plug(&*one, GuestAddress(1 << 33), 2 << 20).unwrap();
    vm.slots().add(&one).unwrap();
    let Stopped { vm, bus, failure } = vm.run(bus(), Some(120 * SECOND)).unwrap();
    assert_eq!((bus.ended, failure), (Some(0), None));
    assert_eq!(one.read_obj::<u64>(GuestAddress(1 << 33)).unwrap(), 1 << 33);
    let logs = vm.slots().remove(&one).unwrap();
    assert_eq!(logged(&one, &logs), [1 << 33].into());
    assert!(Arc::into_inner(one).is_some());
    assert_eq!(logs.len() + vm.slots().dirty_log().unwrap().len(), 3);
    drop(ram);
}

#[test]
fn memory_past_the_physical_address_space_is_refused() {
    let Some((vm, _ram)) = vm("memory_past_the_physical_address_space_is_refused", &[0xf4]) else {
        return;
    };
    let block = std::num::NonZeroU64::new(2 << 20).unwrap();
    let one = Arc::new(pluggable(1 << 52, 2 << 20, block, &Backing::Anonymous).unwrap());
    let error = error_chain(&vm.slots().add(&one).unwrap_err());
    assert!(error.contains("physical address space"), "{error}");
}

/// The addresses of MMIO exits, relative to a region.
#[derive(Default)]
struct Exits(Vec<u64>);

impl MmioDevice for Exits {
    fn read(&mut self, offset: u64, _: &mut [u8]) {
        self.0.push(offset);
    }

    fn write(&mut self, offset: u64, _: &[u8]) {
        self.0.push(offset);
    }
}

#[test]
fn vcpu_access_to_protected_block_ends_as_documented() {
    let test = "vcpu_access_to_protected_block_ends_as_documented";
    const START: u64 = 1 << 33;
    const BLOCK: u64 = 2 << 20;
    let accesses: [&[u8]; 4] = [
        &[0x48, 0x8b, 0x86, 0, 0, 0x20, 0],       // mov rax, [rsi + BLOCK]
        &[0x48, 0x89, 0xbe, 0, 0, 0x20, 0],       // mov [rsi + BLOCK], rdi
        &[0xf0, 0x48, 0x01, 0xbe, 0, 0, 0x20, 0], // lock add [rsi + BLOCK], rdi
        &[0x48, 0x8d, 0x86, 0, 0, 0x20, 0, 0xff, 0xe0], // lea rax, [rsi + BLOCK]; jmp rax
    ];
    vm_memory::fault::install().unwrap();
    for (number, was_used) in (0..8).map(|n| (n / 2, n % 2 == 1)) {
        // mov [rsi], rdi; the access; mov edx, 0xf4; xor eax, eax; out dx, al
        let store = [0x48, 0x89, 0x3e];
        let exit = [0xba, 0xf4, 0, 0, 0, 0x31, 0xc0, 0xee];
        let program = [&store, accesses[number], &exit].concat();
        let Some((vm, _ram)) = vm(test, &program) else {
            return;
        };
        let region = Region::new(GuestAddress(START), 2 * BLOCK);
        let block = std::num::NonZeroU64::new(BLOCK).unwrap();
        let region = region.blocks(block, Unplugged::Protected);
        let one = Arc::new(build_with_bitmaps(MemoryBuilder::new().region(region)).unwrap());
        let second = GuestAddress(START + BLOCK);
        plug(&*one, GuestAddress(START), BLOCK).unwrap();
        vm.slots().add(&one).unwrap();
        if was_used {
            plug(&*one, second, BLOCK).unwrap();
            one.write_obj(7u64, second).unwrap();
            unplug(&*one, second, BLOCK).unwrap();
        }
        let (exits, mut bus) = (Arc::new(Mutex::new(Exits::default())), bus());
        bus.map(START..START + 2 * BLOCK, exits.clone());
        let Stopped { bus, failure, .. } = vm.run(bus, Some(120 * SECOND)).unwrap();
        let exits = std::mem::take(&mut exits.lock().unwrap().0);
        // The plugged block is accessible.
        let first = one.read_obj::<u64>(GuestAddress(START)).unwrap();
        assert_eq!(first, HIGH_START);
        let what = format!("access {number}, {failure:?}, {exits:x?}");
        assert!(exits.iter().all(|at| *at == BLOCK), "{what}");
        match failure {
            Some(why) => assert!(
                why.contains("KVM_RUN: Bad address") || why.contains("InternalError"),
                "{what}"
            ),
            None => assert!(bus.ended == Some(0) && !exits.is_empty(), "{what}"),
        }
        plug(&*one, second, BLOCK).unwrap();
        assert_eq!(one.read_obj::<u64>(second).unwrap(), 0, "{what}");
    }
}
