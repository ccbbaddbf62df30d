//! A migration source: copy the memory of a running guest, round by round, in the one order that
//! loses no page. Writes of devices are in the dirty bitmaps, writes of vCPUs in KVM's log.
//!
//! `cargo run -p examples --example migration`

mod guest;

use std::num::NonZeroUsize;
use std::sync::mpsc::{channel, TryRecvError};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Adds to `dirty` the pages that devices and vCPUs have written since the last harvest.
fn harvest(memory: &Memory, guest: &guest::Guest, dirty: &mut DirtyMemory) -> guest::Result<()> {
    let logs = guest.take_log()?;
    let page_size = NonZeroUsize::new(4096).ok_or("no page size")?;
    #[rustfmt::skip]
    let logs = logs.iter().map(|&(start, ref words)| LogWords { start, words, page_size });
    dirty.harvest_with(memory, &logs.collect::<Vec<_>>());
    Ok(())
}

/// Sends ranges of memory. Here, the connection to the destination is a copy.
fn send<I>(source: &Memory, target: &Memory, ranges: I) -> Result<(), GuestMemoryError>
where
    I: IntoIterator<Item = (GuestAddress, usize)>,
{
    ranges.into_iter().try_for_each(|(start, len)| {
        let mut bytes = vec![0; len];
        source.read_slice(&mut bytes, start)?;
        target.write_slice(&bytes, start)
    })
}

fn main() -> guest::Result<()> {
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];
    let memory = Arc::new(Memory::from_ranges(&ranges)?);
    let target = Memory::from_ranges(&ranges)?;
    DirtyMemory::set_tracking(&*memory, false); // no marks while nobody needs them
    let (vcpu, guest) = match guest::Guest::new(&memory).and_then(|guest| Ok((guest.run()?, guest)))
    {
        Ok(guest) => guest,
        Err(error) => {
            println!("SKIPPED: KVM is not available: {error}");
            return Ok(());
        }
    };
    let (stop, stopped) = channel::<()>();
    let device_memory = Arc::clone(&memory);
    let device = thread::spawn(move || {
        let pages = (0u64..).map(|count| GuestAddress((1 << 32) + count % 64 * 0x1000));
        let mut running = pages.take_while(|_| stopped.try_recv() == Err(TryRecvError::Empty));
        running.try_for_each(|page| device_memory.write_obj(page.0, page))
    });

    // 1. Track all writers, before the first byte is copied.
    DirtyMemory::set_tracking(&*memory, true);
    guest.start_log()?;
    // 2. Forget earlier marks: everything is copied next.
    let mut dirty = DirtyMemory::new();
    harvest(&memory, &guest, &mut dirty)?;
    dirty.clear();
    // 3. Copy everything.
    send(&memory, &target, ranges)?;
    // 4. Copy the pages that the running guest has written meanwhile. Round 1 loses the connection.
    for round in 0..4 {
        thread::sleep(Duration::from_millis(10));
        harvest(&memory, &guest, &mut dirty)?;
        println!("round {round}: {} KiB are dirty", dirty.total_bytes() >> 10);
        if round == 1 {
            println!("connection lost: the pages are marked again");
            dirty.put_back(&*memory);
        } else {
            send(&memory, &target, dirty.runs())?;
        }
        dirty.clear();
    }
    // 5. Pause the vCPUs, let devices finish the requests in flight, and harvest a last time.
    assert!(vcpu.pause()? > 0, "the guest did not run");
    drop(stop);
    device.join().map_err(|_| "the device panicked")??;
    harvest(&memory, &guest, &mut dirty)?;
    send(&memory, &target, dirty.runs())?;
    println!("paused: {} KiB are dirty", dirty.total_bytes() >> 10);

    for (start, len) in ranges {
        let (mut source, mut copy) = (vec![0; len], vec![0; len]);
        memory.read_slice(&mut source, start)?;
        target.read_slice(&mut copy, start)?;
        assert!(source == copy, "the destination differs");
    }
    Ok(())
}
