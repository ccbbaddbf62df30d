//! A migration source: copy the memory of a running guest, round by round, in the one order that
//! loses no page. Writes of devices are in the dirty bitmaps, writes of vCPUs in KVM's log.
//!
//! `cargo run -p examples --example migration`

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use examples::device::Device;
use examples::guest::Guest;
use examples::{contents, Memory, Result};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::{Bytes, GuestAddress};

type Range = (GuestAddress, usize);
const RANGES: [Range; 2] = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];

/// Adds to `dirty` the pages that devices and vCPUs have written since the last harvest.
fn harvest(memory: &Memory, guest: &Guest, dirty: &mut DirtyMemory) -> Result<()> {
    let logs = guest.take_log()?;
    let logs = logs
        .iter()
        .map(|(start, words)| LogWords::kvm(*start, words));
    dirty.harvest_with(memory, &logs.collect::<Vec<_>>());
    Ok(())
}

/// Sends ranges of memory. Here, the connection to the target is a copy.
fn send<I: IntoIterator<Item = Range>>(from: &Memory, to: &Memory, ranges: I) -> Result<()> {
    for (start, len) in ranges {
        let mut bytes = vec![0; len];
        from.read_slice(&mut bytes, start)?;
        to.write_slice(&bytes, start)?;
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

    // 2. Forget earlier marks, because everything is copied next.
    let mut dirty = DirtyMemory::new();
    harvest(&memory, &guest, &mut dirty)?;
    dirty.clear();

    // 3. Copy everything.
    send(&memory, &target, RANGES)?;

    // 4. Copy the pages that the running guest has written meanwhile, in a few rounds.
    for round in 0..4 {
        thread::sleep(Duration::from_millis(10));
        harvest(&memory, &guest, &mut dirty)?;
        println!("round {round}: {} KiB are dirty", dirty.total_bytes() >> 10);
        if round == 1 {
            println!("the connection is lost: mark the pages again");
            dirty.put_back(&*memory);
        } else {
            send(&memory, &target, dirty.runs())?;
        }
        dirty.clear();
    }

    // 5. Pause the vCPU, let the device finish its request, and harvest a last time.
    let passes = guest.pause()?;
    device.stop()?;
    harvest(&memory, &guest, &mut dirty)?;
    println!("paused: {} KiB are dirty", dirty.total_bytes() >> 10);
    send(&memory, &target, dirty.runs())?;

    assert!(passes > 0, "the guest did not run");
    assert!(contents(&memory)? == contents(&target)?, "pages are lost");
    Ok(())
}
