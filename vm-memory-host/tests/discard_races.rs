//! Discards of pages that the guest uses at the same time.
//!
//! The test counts the VMAs of its process, so it is a separate program.
#![cfg(target_os = "linux")]

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use test_support::{skipped, temp_file_of_len, PAGE_U64 as PAGE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{discard, Backing, Lock, MemoryBuilder, NumaPolicy, Region};

const PAGES: u64 = 3000;

fn vmas() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().count()
}

/// Discards each page of a private file while another thread writes to it.
///
/// Returns the number of VMAs that this adds.
fn added_vmas(options: impl Fn(Region) -> Region) -> Result<usize, String> {
    let file = temp_file_of_len(PAGES * PAGE);
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
        let before = vmas();
        for page in 0..PAGES {
            current.store(page, Ordering::Relaxed);
            let page = GuestAddress(page * PAGE);
            memory.write_obj(1u8, page).unwrap();
            assert_eq!(discard(&memory, page, PAGE).unwrap(), PAGE);
        }
        over.store(true, Ordering::Relaxed);
        // The stack of the previous call's thread may have gone since `before`.
        Ok(vmas().saturating_sub(before))
    })
}

#[test]
fn discard_of_pages_in_use_adds_no_vmas() {
    let kinds: [(&str, &dyn Fn(Region) -> Region); 4] = [
        ("no options", &|region| region),
        ("advice", &|region| region.core_dump(false).forked(false)),
        ("a node", &|region| {
            region.core_dump(false).numa(NumaPolicy::Preferred(0))
        }),
        ("a lock", &|region| region.lock(Lock::OnFault)),
    ];
    for (what, options) in kinds {
        match added_vmas(options) {
            Ok(added) => assert!(added < 50, "{what}: {added} VMAs added"),
            Err(why) => skipped(
                &format!("discard_of_pages_in_use_adds_no_vmas ({what})"),
                why,
            ),
        }
    }
}
