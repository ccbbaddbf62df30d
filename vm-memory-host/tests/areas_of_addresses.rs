//! A guest cannot use up the areas of addresses that the kernel keeps for a process. A program of its own: what is counted is the process's.
#![cfg(target_os = "linux")]

use std::fs;
use std::num::NonZeroU64;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{discard, Backing, MemoryBuilder, Region, Unplugged};

const PAGE: u64 = 4096;

fn build(region: Region) -> Result<GuestMemoryMmap, String> {
    let built = MemoryBuilder::new().region(region).build();
    built.map_err(|error| error.to_string())
}

#[test]
fn areas_are_counted_for_the_whole_process() {
    let most: u64 = fs::read_to_string("/proc/sys/vm/max_map_count")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let areas = || {
        fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count() as u64
    };

    // Protected blocks, each of which could be an area.
    let blocks = |count: u64| {
        let size = NonZeroU64::new(PAGE).unwrap();
        Region::new(GuestAddress(0), count * PAGE).blocks(size, Unplugged::Protected)
    };
    let error = build(blocks(most)).unwrap_err();
    let wanted = format!("its {most} protected blocks could need as many VMAs");
    assert!(error.contains(&wanted), "{error}");
    let half = build(blocks(most / 2)).unwrap();
    assert!(build(blocks(1)).is_err());
    drop(half);

    // A private file, of which every second page is given back: two areas each, and pages enough for all that there may be.
    let pages = most / 2 + 1000;
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..pages * PAGE)
        .map(|at| (at / PAGE % 255) as u8 + 1)
        .collect();
    std::io::Write::write_all(&mut &file, &bytes).unwrap();
    let memory =
        build(Region::new(GuestAddress(0), pages * PAGE).backing(Backing::private_file(file, 0)))
            .unwrap();
    let before = areas();
    let mut given_back = 0;
    for page in (0..pages).step_by(2) {
        given_back += discard(&memory, GuestAddress(page * PAGE), PAGE).unwrap();
    }
    assert!(
        given_back > 0 && given_back < pages / 2 * PAGE,
        "{given_back:#x}"
    );
    assert!(
        areas() - before < most / 2 + 100,
        "{} areas more",
        areas() - before
    );
    // It is zeroes all the same, and nothing else is.
    for page in 0..pages {
        let expected = if page % 2 == 0 {
            0
        } else {
            (page % 255) as u8 + 1
        };
        let mut seen = [0x55; PAGE as usize];
        memory
            .read_slice(&mut seen, GuestAddress(page * PAGE))
            .unwrap();
        assert!(seen.iter().all(|byte| *byte == expected), "page {page}");
    }
    // What joins two of them is given back again, and blocks have to wait for all of it to go.
    assert_eq!(discard(&memory, GuestAddress(PAGE), PAGE).unwrap(), PAGE);
    assert!(build(blocks(most / 2)).is_err());
    drop(memory);
    build(blocks(most / 2)).unwrap();
}
