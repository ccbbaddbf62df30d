//! A guest that uses the pages that it gives back, while it gives them back. A program of its own: it counts the areas of addresses of the process.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{discard, Backing, Lock, MemoryBuilder, NumaPolicy, Region};

const PAGE: u64 = 4096;
const PAGES: u64 = 3000;

fn areas() -> usize {
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

/// Gives back page after page of a private file, each of which a vCPU writes to all the time. How many areas there are more then.
fn more_areas(options: impl Fn(Region) -> Region) -> Result<usize, String> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGES * PAGE).unwrap();
    let region = Region::new(GuestAddress(0), PAGES * PAGE).backing(Backing::private_file(file, 0));
    let memory: GuestMemoryMmap = MemoryBuilder::new()
        .region(options(region))
        .build()
        .map_err(|error| error.to_string())?;
    let (current, over, ready) = (
        AtomicU64::new(0),
        AtomicBool::new(false),
        AtomicBool::new(false),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let page = GuestAddress(current.load(Ordering::Relaxed) * PAGE);
                memory.write_obj(1u8, page).unwrap();
                ready.store(true, Ordering::Relaxed);
            }
        });
        while !ready.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let before = areas();
        for page in 0..PAGES {
            current.store(page, Ordering::Relaxed);
            let page = GuestAddress(page * PAGE);
            memory.write_obj(1u8, page).unwrap();
            assert_eq!(discard(&memory, page, PAGE).unwrap(), PAGE);
        }
        over.store(true, Ordering::Relaxed);
        // The stack of the vCPU of the test before may have gone meanwhile.
        Ok(areas().saturating_sub(before))
    })
}

/// Each page that was in use before it had its options was an area for good, and nobody counted it.
#[test]
fn a_guest_that_uses_what_it_gives_back_makes_no_areas() {
    let kinds: [(&str, &dyn Fn(Region) -> Region); 4] = [
        ("no options", &|region| region),
        ("advice", &|region| region.core_dump(false).forked(false)),
        ("a node", &|region| {
            region.core_dump(false).numa(NumaPolicy::Preferred(0))
        }),
        ("a lock", &|region| region.lock(Lock::OnFault)),
    ];
    for (what, options) in kinds {
        match more_areas(options) {
            Ok(more) => assert!(more < 50, "{what}: {more} areas more"),
            Err(why) => {
                let _ = writeln!(std::io::stderr(), "SKIPPED: areas with {what}: {why}");
            }
        }
    }
}
