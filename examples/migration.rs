//! A migration source: copy the memory of a running guest, round by round, in an order that loses
//! no page. Writes of devices are in the dirty bitmaps, writes of vCPUs in KVM's log.
//!
//! `cargo run -p examples --example migration`

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use examples::device::Device;
use examples::guest::Guest;
use examples::{contents, Memory, Result};
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestAddress};

const RANGES: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];
/// The size of a message to the target.
const MESSAGE: NonZeroUsize = NonZeroUsize::new(64 << 10).unwrap();

/// Adds to `dirty` the pages that devices and vCPUs have written since the last harvest.
fn harvest(memory: &Memory, guest: &Guest, dirty: &mut DirtyMemory) -> Result<()> {
    guest.take_log()?.harvest_with(dirty, memory);
    Ok(())
}

/// Sends dirty pages. Here, the connection to the target is a copy.
fn send(from: &Memory, to: &Memory, dirty: &DirtyMemory) -> Result<()> {
    let mut message = vec![0; MESSAGE.get()];
    for (start, len) in dirty.chunks(MESSAGE) {
        from.read_slice(&mut message[..len], start)?;
        to.write_slice(&message[..len], start)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let memory = Arc::new(Memory::from_ranges(&RANGES)?);
    let target = Memory::from_ranges(&RANGES)?;
    // Writes are not marked while nobody needs the marks.
    DirtyMemory::set_tracking(&*memory, false);
    let mut guest = match Guest::start(&memory) {
        Ok(guest) => guest,
        Err(error) => {
            println!("SKIPPED: KVM is not available: {error}");
            return Ok(());
        }
    };
    let device = Device::start(&memory, GuestAddress(1 << 32));

    // 1. Track all writers, before the first byte is copied.
    DirtyMemory::set_tracking(&*memory, true);
    guest.start_log()?;

    // 2. Everything is dirty at first. The harvest clears earlier marks, and finds the regions.
    let mut dirty = DirtyMemory::new();
    harvest(&memory, &guest, &mut dirty)?;
    dirty.insert_all();

    // 3. Send, and harvest what the running guest has written meanwhile, in a few rounds.
    for round in 0..4 {
        println!("round {round}: {} KiB are dirty", dirty.total_bytes() >> 10);
        if round == 1 {
            println!("the connection is lost: mark the pages again");
            dirty.put_back(&*memory);
        } else {
            send(&memory, &target, &dirty)?;
        }
        dirty.clear();
        thread::sleep(Duration::from_millis(10));
        let marked = DirtyMemory::estimate(&*memory) >> 10;
        println!("about {marked} KiB are marked for the next round");
        harvest(&memory, &guest, &mut dirty)?;
    }

    // 4. Pause the vCPU, let the device finish its request, and harvest a last time.
    let passes = guest.stop()?;
    device.stop()?;
    harvest(&memory, &guest, &mut dirty)?;
    println!("stopped: {} KiB are dirty", dirty.total_bytes() >> 10);
    send(&memory, &target, &dirty)?;

    assert!(passes > 0, "the guest did not run");
    assert!(contents(&memory)? == contents(&target)?, "pages are lost");
    Ok(())
}
