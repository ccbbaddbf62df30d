//! The effect of provisioning: the time that huge pages save a device that reads at random
//! addresses.

use std::fs;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{anyhow, Context, Result};
use ours::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{
    huge_page_pools, prefault, residency, Backing, MemoryBuilder, Region, TransparentHugePages,
};

use crate::comparison::{median, Effort};
use crate::report::{digits, Build};

/// The size of the guest's memory in bytes.
const SIZE: u64 = 4 << 30;
/// The size of a huge page in bytes.
const HUGE: u64 = 2 << 20;
/// The number of reads in a round.
const READS: u64 = 1 << 20;

/// Additional huge pages in the pool. Dropping this restores the previous size.
struct HugePages {
    before: String,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Grows the pool to hold the guest's memory, or returns the reason why it cannot.
    fn reserve() -> Result<Self> {
        let before = fs::read_to_string(POOL)?;
        let wanted = SIZE / HUGE + before.trim().parse::<u64>()?;
        fs::write(POOL, wanted.to_string()).context("cannot resize the pool of huge pages")?;
        let pages = Self { before };
        let free = huge_page_pools()
            .iter()
            .find(|pool| pool.page_size == HUGE)
            .map_or(0, |pool| pool.free);
        if free < SIZE / HUGE {
            return Err(anyhow!(
                "{} huge pages were requested, but only {free} are free",
                SIZE / HUGE
            ));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // The kernel frees the unused pages.
        let _ = fs::write(POOL, self.before.trim());
    }
}

fn build(backing: Backing, huge: TransparentHugePages) -> Result<GuestMemoryMmap> {
    let region = Region::new(GuestAddress(0), SIZE)
        .backing(backing)
        .transparent_huge_pages(huge);
    Ok(MemoryBuilder::new().region(region).build()?)
}

fn populate(memory: &GuestMemoryMmap) -> Result<()> {
    let threads = NonZeroUsize::new(2).context("no threads")?;
    Ok(prefault(memory, threads, |_| ControlFlow::Continue(()))?)
}

/// Returns the nanoseconds for a read of 8 bytes at a random address that depends on the previous
/// read.
fn read_all_over(memory: &GuestMemoryMmap, seed: u64) -> Result<f64> {
    let mut state = seed;
    let start = Instant::now();
    for _ in 0..READS {
        // A linear congruential generator with Knuth's MMIX multiplier. Its high bits are random.
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let addr = (state >> 16) % (SIZE / 8) * 8;
        let value: u64 = memory.read_obj(GuestAddress(black_box(addr)))?;
        // The value is 0, but the processor has to wait for it.
        state ^= value;
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / READS as f64)
}

/// Measures provisioning and prints the results.
pub fn run(effort: Effort, build_of_this: Build) -> Result<()> {
    println!(
        "Build `{}`, {} GiB of guest memory by `vm-memory-host`, wall-clock time, medians.\n",
        build_of_this.name(),
        SIZE >> 30
    );
    let small = build(Backing::Anonymous, TransparentHugePages::Off)?;
    populate(&small)?;
    println!(
        "| a read of 8 bytes at a random address, after the previous one | ns | factor |\n|---|---|---|"
    );
    let pages = HugePages::reserve();
    let mut others: Vec<(&str, Result<GuestMemoryMmap>)> = vec![(
        "2 MiB pages of hugetlb",
        pages
            .as_ref()
            .map_err(|error| anyhow!("{error}"))
            .and_then(|_| {
                build(
                    Backing::Hugetlb { page_size: HUGE },
                    TransparentHugePages::Leave,
                )
            }),
    )];
    others.push((
        "transparent huge pages",
        build(Backing::Anonymous, TransparentHugePages::On),
    ));
    let mut sides: Vec<(&str, GuestMemoryMmap, Vec<f64>, Vec<f64>)> = Vec::new();
    for (name, memory) in others {
        match memory.and_then(|memory| populate(&memory).map(|()| memory)) {
            Ok(memory) => {
                let huge: u64 = residency(&memory)?
                    .iter()
                    .map(|(_, takes)| takes.huge)
                    .sum();
                if huge < SIZE {
                    println!(
                        "| {name}: SKIPPED: {} of {} MiB are huge | | |",
                        huge >> 20,
                        SIZE >> 20
                    );
                } else {
                    sides.push((name, memory, Vec::new(), Vec::new()));
                }
            }
            Err(why) => println!("| {name}: SKIPPED: {why} | | |"),
        }
    }
    let mut alone = Vec::new();
    for round in 0..effort.rounds as u64 {
        let by_small = read_all_over(&small, round)?;
        alone.push(by_small);
        for (_, memory, times, factors) in &mut sides {
            let by_huge = read_all_over(memory, round)?;
            times.push(by_huge);
            factors.push(by_small / by_huge);
        }
    }
    println!(
        "| pages of 4 KiB | {} | |",
        digits(median(alone).context("no rounds")?)
    );
    for (name, _, times, factors) in sides {
        let (time, factor) = (median(times), median(factors));
        println!(
            "| {name} | {} | {} |",
            digits(time.context("no rounds")?),
            digits(factor.context("no rounds")?)
        );
    }
    Ok(())
}
