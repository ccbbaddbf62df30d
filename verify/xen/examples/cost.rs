//! The cost of an access to memory that is mapped at each access, and of its four calls by hand.
//!
//! ```text
//! cargo run --release -p verify-xen --features xen --example cost
//! ```
//!
//! It measures both in turns, and counts their instructions if callgrind is installed. Both include
//! the cost of the double, which is the same.

#![expect(unsafe_code, reason = "makes the system calls by hand")]

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Instant;

use verify_xen::double::{Call, Double};
use verify_xen::environment::{Access, Environment, Host, PAGE};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRange, MmapRegion,
};

verify_xen::interpose!();

/// The grant reference of the page.
const REFERENCE: u32 = 32;

/// The number of accesses in a turn.
const TURN: u32 = 2_000;

/// The number of turns of each kind of access.
const TURNS: usize = 41;

/// The numbers of accesses under callgrind. The difference of the counts excludes the set-up.
const FEW: u32 = 1_000;
const MANY: u32 = 11_000;

struct Stage {
    env: Double,
    device: File,
    memory: GuestMemoryMmap,
    at: GuestAddress,
}

impl Stage {
    fn new() -> Self {
        let mut env = Double::new(Host::AutoTranslated);
        env.grant(REFERENCE, 0, Access::ReadWrite);
        let device = env.gntdev().unwrap();
        let at = GuestAddress(1 << 63 | u64::from(REFERENCE) << 12);
        let file = FileOffset::new(device.try_clone().unwrap(), 0);
        let range = MmapRange::new(PAGE, Some(file), at, 10, env.domain());
        let region = GuestRegionMmap::new(MmapRegion::from_range(range).unwrap(), at).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        Self {
            env,
            device,
            memory,
            at,
        }
    }

    fn library(&mut self, times: u32) {
        for _ in 0..times {
            let value: u32 = self.memory.read_obj(black_box(self.at)).unwrap();
            black_box(value);
        }
        self.env.forget_calls();
    }

    fn by_hand(&mut self, times: u32) {
        for _ in 0..times {
            black_box(read_by_hand(
                &self.device,
                self.env.domain(),
                black_box(REFERENCE),
            ));
        }
        self.env.forget_calls();
    }
}

/// Maps a page, reads from it, and unmaps it.
fn read_by_hand(device: &File, domain: u32, reference: u32) -> u32 {
    let fd = device.as_raw_fd();
    let mut map = [1u32, 0, 0, 0, domain, reference];
    // SAFETY: the request reads and writes the 24 bytes of `map`.
    let done = unsafe { libc::ioctl(fd, 0x0018_4700, map.as_mut_ptr()) };
    assert_eq!(done, 0);
    let index = i64::from(map[2]) | i64::from(map[3]) << 32;
    // SAFETY: the kernel chooses the address, so no memory is replaced.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            fd,
            index,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    #[expect(clippy::disallowed_methods, reason = "the page is of the double")]
    // SAFETY: the page is mapped for reading.
    let value = unsafe { page.cast::<u32>().read_volatile() };
    // SAFETY: the page was mapped by this function, and nothing refers to it.
    assert_eq!(unsafe { libc::munmap(page, PAGE) }, 0);
    let mut unmap = [map[2], map[3], 1, 0];
    // SAFETY: the request reads the 16 bytes of `unmap`.
    let done = unsafe { libc::ioctl(fd, 0x0010_4701, unmap.as_mut_ptr()) };
    assert_eq!(done, 0);
    value
}

/// Checks that both make the same four calls.
fn compare_calls(stage: &mut Stage) -> Vec<Call> {
    stage.env.forget_calls();
    let _: u32 = stage.memory.read_obj(stage.at).unwrap();
    let library = stage.env.calls();
    stage.env.forget_calls();
    read_by_hand(&stage.device, stage.env.domain(), REFERENCE);
    assert_eq!(library, stage.env.calls());
    library
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Returns the instructions of a mode per access, by callgrind.
fn instructions(mode: &str) -> Option<f64> {
    let count = |times: u32| -> Option<f64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().ok()?)
            .args([mode, &times.to_string()])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find(|line| line.contains("Collected"))?;
        line.rsplit(' ').next()?.replace(',', "").parse().ok()
    };
    Some((count(MANY)? - count(FEW)?) / f64::from(MANY - FEW))
}

fn main() {
    let mut stage = Stage::new();
    let mut args = std::env::args().skip(1);
    if let (Some(mode), Some(times)) = (args.next(), args.next()) {
        let times = times.parse().unwrap();
        match mode.as_str() {
            "library" => stage.library(times),
            _ => stage.by_hand(times),
        }
        return;
    }
    println!("calls of an access: {:?}", compare_calls(&mut stage));
    let mut ratios = Vec::new();
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        let started = Instant::now();
        stage.by_hand(TURN);
        let by_hand = started.elapsed().as_secs_f64() / f64::from(TURN) * 1e9;
        let started = Instant::now();
        stage.library(TURN);
        let library = started.elapsed().as_secs_f64() / f64::from(TURN) * 1e9;
        ratios.push(library / by_hand);
        times[0].push(by_hand);
        times[1].push(library);
    }
    let [by_hand, library] = times.map(median);
    println!(
        "time: {by_hand:.0} ns by hand, {library:.0} ns by read_obj, ratio {:.3}",
        median(ratios)
    );
    match (instructions("by-hand"), instructions("library")) {
        (Some(by_hand), Some(library)) => println!(
            "instructions: {by_hand:.0} by hand, {library:.0} by read_obj, {:.0} more",
            library - by_hand
        ),
        _ => println!("SKIPPED: instructions: valgrind is not installed"),
    }
}
