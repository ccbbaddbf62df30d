//! The slots of a real virtual machine, whose vCPU runs single instructions.
#![cfg(target_arch = "x86_64")]

mod common;

use std::num::NonZeroU64;
use std::sync::Arc;

use test_support::error_chain;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestRegionMmap, MemoryRegionAddress,
};
use vm_memory_host::{plug, unplug, MemoryBuilder, Region, Unplugged};
use vm_memory_kvm::{locate, DirtyLog, KvmSlots, SlotError};

use common::{pages, Access, Machine, PAGE, RAM};

type Memory = GuestMemoryMmap<AtomicBitmap>;

fn memory(ranges: &[(u64, usize)]) -> Memory {
    let ranges = ranges
        .iter()
        .map(|(start, len)| (GuestAddress(*start), *len));
    Memory::from_ranges(&ranges.collect::<Vec<_>>()).unwrap()
}

/// Returns the dirty pages of the harvest of a memory.
fn harvest(slots: &KvmSlots, memory: &Memory) -> Vec<u64> {
    let mut dirty = DirtyMemory::new();
    slots.take_log().unwrap().harvest_with(&mut dirty, memory);
    pages(&dirty)
}

#[test]
fn add_memory_lets_the_guest_write_each_region() {
    let memory = memory(&[(RAM, 0x10_000), (0x10_0000, 0x4000)]);
    let name = "add_memory_lets_the_guest_write_each_region";
    let Some(mut machine) = Machine::new(name, &memory, |builder| builder) else {
        return;
    };
    machine.slots.add_memory(&memory).unwrap();
    assert_eq!(machine.write(0x10_3000, 7), Access::Done);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_3000)).unwrap(), 7);
    // Past the region, and in a range without a slot, the access exits.
    assert_eq!(machine.write(0x10_4000, 7), Access::Mmio(0x10_4000));
    machine
        .slots
        .remove(GuestAddress(0x10_2000), 0x1000)
        .unwrap();
    assert_eq!(machine.write(0x10_2000, 7), Access::Mmio(0x10_2000));
    for page in [0x10_0000, 0x10_1000, 0x10_3000] {
        assert_eq!(machine.write(page, 9), Access::Done);
    }
    assert_eq!(machine.slots.slots().len(), 3);
}

#[test]
fn take_log_returns_exactly_the_pages_of_the_guest() {
    let logs = [
        DirtyLog::Bitmap,
        DirtyLog::Manual { max_pages: 64 },
        DirtyLog::Ring { entries: 1024 },
    ];
    for log in logs {
        let memory = memory(&[(RAM, 0x10_000), (0x10_0000, 0x10_0000)]);
        let name = format!("take_log_returns_exactly_the_pages_of_the_guest ({log:?})");
        let Some(mut machine) = Machine::new(&name, &memory, |builder| builder.dirty_log(log))
        else {
            continue;
        };
        machine.slots.add_memory(&memory).unwrap();
        machine.write(0x10_0000, 1);
        machine.slots.set_tracking(true).unwrap();
        let mut dirty = DirtyMemory::new();
        dirty.harvest(&memory);
        for page in [0x10_1000, 0x15_0000, 0x1f_f000] {
            assert_eq!(machine.write(page, 1), Access::Done);
        }
        assert_eq!(
            harvest(&machine.slots, &memory),
            [0x10_1000, 0x15_0000, 0x1f_f000]
        );
        // KVM logs a page again after the harvest.
        machine.write(0x15_0000, 2);
        assert_eq!(harvest(&machine.slots, &memory), [0x15_0000]);
        machine.write(0x16_0000, 2);
        machine.slots.set_tracking(false).unwrap();
        machine.write(0x17_0000, 2);
        assert_eq!(harvest(&machine.slots, &memory), [0x16_0000], "{log:?}");
    }
}

#[test]
fn remove_while_tracking_reports_the_whole_slot_once() {
    let memory = memory(&[(RAM, 0x10_000), (0x10_0000, 0x4000)]);
    let name = "remove_while_tracking_reports_the_whole_slot_once";
    let Some(mut machine) = Machine::new(name, &memory, |builder| builder) else {
        return;
    };
    machine.slots.add_memory(&memory).unwrap();
    machine.slots.set_tracking(true).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    machine.write(0x10_3000, 1);
    machine
        .slots
        .remove(GuestAddress(0x10_0000), 0x1000)
        .unwrap();
    let all = [0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000];
    assert_eq!(harvest(&machine.slots, &memory), all);
    machine.write(0x10_2000, 1);
    assert_eq!(harvest(&machine.slots, &memory), [0x10_2000]);
}

#[test]
fn drain_rings_lets_a_guest_with_a_full_ring_continue() {
    let memory = memory(&[(RAM, 0x10_000), (0x10_0000, 0x100_0000)]);
    let name = "drain_rings_lets_a_guest_with_a_full_ring_continue";
    let ring = DirtyLog::Ring { entries: 1024 };
    let Some(mut machine) = Machine::new(name, &memory, |builder| builder.dirty_log(ring)) else {
        return;
    };
    machine.slots.add_memory(&memory).unwrap();
    machine.slots.set_tracking(true).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    let all: Vec<u64> = (0x10_0000..0x110_0000).step_by(PAGE).collect();
    let mut full = 0;
    for page in &all {
        while machine.write(*page, 1) == Access::RingFull {
            full += 1;
            machine.slots.drain_rings().unwrap();
        }
    }
    assert!(
        full >= 3,
        "{} pages filled the ring {full} times",
        all.len()
    );
    assert_eq!(harvest(&machine.slots, &memory), all);
}

#[test]
fn build_with_a_ring_after_a_vcpu_returns_an_error() {
    let memory = memory(&[(RAM, 0x10_000)]);
    let name = "build_with_a_ring_after_a_vcpu_returns_an_error";
    let Some(machine) = Machine::new(name, &memory, |builder| builder) else {
        return;
    };
    let ring = |entries| machine.build(|builder| builder.dirty_log(DirtyLog::Ring { entries }));
    match ring(1024).unwrap_err() {
        SlotError::Vm { action, .. } => assert!(action.contains("before the first vCPU")),
        SlotError::Unsupported(what) => test_support::skipped(name, format!("KVM lacks {what}")),
        other => panic!("{other}"),
    }
    for entries in [0, 1, 1000, 1 << 31] {
        let error = ring(entries).unwrap_err();
        let is_expected = matches!(
            error,
            SlotError::RingSize { .. } | SlotError::Unsupported(_)
        );
        assert!(is_expected, "{entries}: {error}");
    }
    let error = machine
        .build(|builder| builder.slot_size(0x800))
        .unwrap_err();
    assert!(matches!(error, SlotError::SlotSize { .. }), "{error}");
    assert!(matches!(
        machine.slots.add_vcpu(&machine.vcpu),
        Err(SlotError::NoRing)
    ));
}

#[test]
fn slots_at_the_limit_of_kvm_return_an_error_before_any_call() {
    let memory = memory(&[(RAM, 0x10_000), (1 << 32, 1 << 30)]);
    let name = "slots_at_the_limit_of_kvm_return_an_error_before_any_call";
    let Some(machine) = Machine::new(name, &memory, |builder| builder.slot_size(0x1000)) else {
        return;
    };
    let error = machine.slots.add_memory(&memory).unwrap_err();
    let SlotError::TooManySlots {
        needed,
        available,
        limit,
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((needed, available), (16 + (1 << 18), limit));
    assert!(machine.slots.slots().is_empty());
    // KVM has this many slots.
    let one = machine
        .build(|builder| builder.numbers(limit as u32 - 1..u32::MAX))
        .unwrap();
    let small = self::memory(&[(0x100_0000, 0x1000)]);
    one.add_memory(&small).unwrap();
    assert_eq!(u64::from(one.slots()[0].number), limit - 1);
}

#[test]
fn locate_finds_the_page_of_a_truncated_file() {
    let memory = memory(&[(RAM, 0x10_000)]);
    let name = "locate_finds_the_page_of_a_truncated_file";
    let Some(mut machine) = Machine::new(name, &memory, |builder| builder) else {
        return;
    };
    machine.slots.add_memory(&memory).unwrap();
    let file = test_support::temp_file_of_len(0x3000);
    let offset = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0x10_0000), 0x3000, Some(offset))];
    let of_file = Memory::from_ranges_with_files(ranges).unwrap();
    machine.slots.add_memory(&of_file).unwrap();
    assert_eq!(machine.write(0x10_2000, 1), Access::Done);
    file.set_len(0x2000).unwrap();
    assert_eq!(machine.write(0x10_1000, 1), Access::Done);
    let addr = match machine.write(0x10_2000, 1) {
        // Many kernels do not tell the address.
        Access::Fault(addr) => addr.unwrap_or(GuestAddress(0x10_2000)),
        // A KVM that emulates the instruction.
        Access::Mmio(addr) => GuestAddress(addr),
        other => panic!("the page does not exist: {other:?}"),
    };
    let place = locate(&of_file, addr, 0x2000).unwrap();
    assert_eq!(
        (place.offset, place.len),
        (MemoryRegionAddress(0x2000), 0x1000)
    );
    assert!(place.is_accessible);
    assert!(locate(&of_file, GuestAddress(0x10_3000), 1).is_none());
}

#[test]
fn listener_adds_and_removes_the_slots_of_regions() {
    let map = memory(&[(RAM, 0x10_000)]);
    let name = "listener_adds_and_removes_the_slots_of_regions";
    let Some(mut machine) = Machine::new(name, &map, |builder| builder) else {
        return;
    };
    let memory = GuestMemoryAtomic::new(map);
    let slots = machine.slots.clone();
    memory.add_listener(Box::new(slots)).unwrap();
    assert_eq!(machine.write(0x10_0000, 7), Access::Mmio(0x10_0000));

    let start = GuestAddress(0x10_0000);
    let dimm = GuestRegionMmap::from_range(start, 0x4000, None).unwrap();
    memory.update(|map| map.insert_region(dimm.into())).unwrap();
    assert_eq!(machine.write(0x10_0000, 7), Access::Done);
    assert_eq!(memory.memory().read_obj::<u8>(start).unwrap(), 7);

    let without = |map: &Memory| map.remove_region(start, 0x4000).map(|(map, _)| map);
    memory.update(without).unwrap();
    assert_eq!(machine.write(0x10_0000, 7), Access::Mmio(0x10_0000));
    assert_eq!(machine.slots.slots().len(), 1);
    // The last handle to the memory goes, and with it all slots.
    drop(memory);
    assert!(machine.slots.slots().is_empty());
}

#[test]
fn listener_without_free_slots_refuses_a_region_and_keeps_the_map() {
    let map = memory(&[(RAM, 0x10_000)]);
    let name = "listener_without_free_slots_refuses_a_region_and_keeps_the_map";
    let Some(machine) = Machine::new(name, &map, |builder| builder.numbers(0..1)) else {
        return;
    };
    let memory = GuestMemoryAtomic::new(map);
    memory
        .add_listener(Box::new(machine.slots.clone()))
        .unwrap();
    let start = GuestAddress(0x10_0000);
    let dimm = Arc::new(GuestRegionMmap::from_range(start, 0x4000, None).unwrap());
    let error = memory.update(|map| map.insert_region(dimm)).unwrap_err();
    let message = error_chain(&error);
    assert!(message.contains("KVM memory slots"), "{message}");
    assert!(message.contains("0 of 1 are available"), "{message}");
    assert_eq!(memory.memory().num_regions(), 1);
    assert_eq!(machine.slots.slots().len(), 1);
}

#[test]
fn listener_follows_blocks_that_are_plugged_and_unplugged() {
    const BLOCK: u64 = 2 << 20;
    const START: u64 = 16 << 20;
    let blocks = Region::new(GuestAddress(START), 4 * BLOCK)
        .blocks(NonZeroU64::new(BLOCK).unwrap(), Unplugged::Mapped);
    let ram = Region::new(GuestAddress(RAM), 0x10_000);
    let map: Memory = MemoryBuilder::new()
        .region(ram)
        .region(blocks)
        .build()
        .unwrap();
    let name = "listener_follows_blocks_that_are_plugged_and_unplugged";
    let Some(mut machine) = Machine::new(name, &map, |builder| builder.slot_size(BLOCK)) else {
        return;
    };
    let memory = GuestMemoryAtomic::new(map);
    memory
        .add_listener(Box::new(machine.slots.clone()))
        .unwrap();
    assert_eq!(machine.slots.slots().len(), 1);

    plug(&*memory.memory(), GuestAddress(START), 3 * BLOCK).unwrap();
    assert_eq!(machine.slots.slots().len(), 4);
    unplug(&*memory.memory(), GuestAddress(START + BLOCK), BLOCK).unwrap();
    for (block, expected) in [
        (0, Access::Done),
        (1, Access::Mmio(START + BLOCK)),
        (2, Access::Done),
        (3, Access::Mmio(START + 3 * BLOCK)),
    ] {
        assert_eq!(machine.write(START + block * BLOCK, 1), expected);
    }
    assert_eq!(machine.slots.slots().len(), 3);
}

#[test]
fn listener_logs_writes_while_the_memory_tracks_them() {
    let map = memory(&[(RAM, 0x10_000)]);
    let name = "listener_logs_writes_while_the_memory_tracks_them";
    let Some(mut machine) = Machine::new(name, &map, |builder| builder) else {
        return;
    };
    let memory = GuestMemoryAtomic::new(map);
    let listener = Box::new(machine.slots.clone());
    memory.add_listener(listener).unwrap();
    let start = GuestAddress(0x10_0000);
    let dimm = GuestRegionMmap::from_range(start, 0x4000, None).unwrap();
    memory.update(|map| map.insert_region(dimm.into())).unwrap();
    memory.track_writes(true).unwrap();
    // All slots, once.
    assert_eq!(harvest(&machine.slots, &memory.memory()).len(), 4);
    assert_eq!(machine.write(0x10_1000, 7), Access::Done);
    let dirty = harvest(&machine.slots, &memory.memory());
    assert_eq!(dirty, [0x10_1000]);

    // The region goes, and the rest is still logged.
    let without = |map: &Memory| map.remove_region(start, 0x4000).map(|(map, _)| map);
    memory.update(without).unwrap();
    let insert = |map: &Memory| {
        let dimm = GuestRegionMmap::from_range(start, 0x4000, None).unwrap();
        map.insert_region(dimm.into())
    };
    memory.update(insert).unwrap();
    harvest(&machine.slots, &memory.memory());
    assert_eq!(machine.write(0x10_2000, 7), Access::Done);
    assert_eq!(harvest(&machine.slots, &memory.memory()), [0x10_2000]);

    memory.track_writes(false).unwrap();
    harvest(&machine.slots, &memory.memory());
    assert_eq!(machine.write(0x10_3000, 7), Access::Done);
    assert_eq!(harvest(&machine.slots, &memory.memory()), [0; 0]);
}
