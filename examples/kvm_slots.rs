//! KVM's memory slots follow guest memory: a module that is plugged, and blocks of virtio-mem.
//!
//! `cargo run -p examples --example kvm_slots`

use std::num::NonZeroU64;
use std::sync::Arc;

use examples::Result;
use kvm_ioctls::Kvm;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vm_memory_host::{plug, unplug, MemoryBuilder, Region, Unplugged};
use vm_memory_kvm::KvmSlots;

type Memory = GuestMemoryMmap<AtomicBitmap>;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
/// The region of a virtio-mem device.
const DEVICE: GuestAddress = GuestAddress(1 << 32);
/// A memory module.
const MODULE: GuestAddress = GuestAddress(2 << 32);

/// Prints the slots, and checks how many MiB the guest has.
fn show(slots: &KvmSlots, change: &str, expected: u64) {
    println!("{change}");
    let slots = slots.slots();
    for slot in &slots {
        println!(
            "  slot {}: {} MiB at {:#x}",
            slot.number,
            slot.len / MIB,
            slot.start.0
        );
    }
    assert_eq!(
        slots.iter().map(|slot| slot.len).sum::<u64>(),
        expected * MIB
    );
}

#[expect(unsafe_code, reason = "KVM uses host memory by its address")]
fn main() -> Result<()> {
    let vm = match Kvm::new() {
        Ok(kvm) => Arc::new(kvm.create_vm()?),
        Err(error) => {
            println!("SKIPPED: KVM is not available: {error}");
            return Ok(());
        }
    };
    // With slots of this size, a block is unplugged without touching its neighbours.
    let builder = KvmSlots::builder(vm).slot_size(BLOCK);
    // SAFETY: 1. The regions are mappings of vm-memory, and the listener deletes their slots before
    //    they are unmapped.
    // 2. Other accesses to the memory are those of vm-memory.
    let slots = unsafe { builder.build() }?;

    let block = NonZeroU64::new(BLOCK).ok_or("a block has bytes")?;
    let device = Region::new(DEVICE, 8 * BLOCK).blocks(block, Unplugged::Mapped);
    let ram = Region::new(GuestAddress(0), BLOCK);
    let map: Memory = MemoryBuilder::new().region(ram).region(device).build()?;
    let memory = GuestMemoryAtomic::new(map);
    memory.add_listener(Box::new(slots.clone()))?;
    show(&slots, "the guest starts", 2);

    plug(&*memory.memory(), DEVICE, 3 * BLOCK)?;
    show(&slots, "three blocks are plugged", 8);
    unplug(&*memory.memory(), GuestAddress(DEVICE.0 + BLOCK), BLOCK)?;
    show(&slots, "the second block is unplugged", 6);

    let module = Arc::new(Region::new(MODULE, BLOCK).build()?);
    memory.update(|map| map.insert_region(module))?;
    show(&slots, "a module is plugged", 8);
    memory.update(|map| map.remove_region(MODULE, BLOCK).map(|(map, _)| map))?;
    show(&slots, "the module is unplugged", 6);

    drop(memory);
    show(&slots, "the memory is dropped", 0);
    Ok(())
}
