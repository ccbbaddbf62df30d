//! Operations by 1 to 16 threads, as far as the machine has processors for them.
//!
//! Threads slow each other even if they share no memory: they share a core, a cache, or the power
//! that limits the clock. So each operation has a control, which shares as much memory as the
//! operation must.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Context, Result};
use memmap2::{Advice, MmapMut};
use ours::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory, Permissions};
use vm_memory_host::{prefault, MemoryBuilder, Region, TransparentHugePages};

use crate::comparison::{median, Effort};
use crate::layout::Layout;
use crate::new_abilities::shared_iotlb;
use crate::ours_side::kinds::{memory, Plain};
use crate::report::{digits, Build};
use crate::shared_pages::SharedPages;
use crate::workload_shapes::{Mappings, PAGE};
use crate::{ours_side, reference_side};

/// The numbers of threads.
const THREADS: [usize; 5] = [1, 2, 4, 8, 16];
/// The distance between the pages of two threads that share no cache line of the bitmap.
const OWN: u64 = 16 << 20;
/// The distance between the pages of two threads that share a cache line of the bitmap. The line
/// covers 2 MiB.
const NEAR: u64 = 64 << 10;
/// The size of the guest's memory in bytes.
pub const GUEST: usize = 16 * OWN as usize;
/// The size of a copy in bytes.
pub const COPY: usize = 4096;
/// The number of operations between two readings of the clock.
const BATCH: u64 = 256;
/// The number of mappings in the IOTLB.
const MAPPINGS: u64 = 10_000;
/// The pause between changes: a guest maps a page for each of 20 000 requests per second.
const REST: Duration = Duration::from_micros(50);
/// The size in bytes of the memory to populate, and the number of rounds.
const POPULATED: u64 = 2 << 30;
const PREFAULTS: usize = 3;

/// An operation for several threads. The parameters are the number of the thread and the number of
/// the first operation of a batch. Returns whether all operations of the batch succeeded.
pub struct Work {
    run: Box<dyn Fn(u64, u64) -> bool + Sync>,
    /// A change that another thread makes again and again.
    change: Option<Box<dyn Fn(u64) -> bool + Sync>>,
}

impl Work {
    pub fn of(operation: impl Fn(u64, u64) -> bool + Sync + 'static) -> Self {
        Self {
            run: Box::new(move |thread, first| {
                (first..first + BATCH).all(|number| operation(thread, number))
            }),
            change: None,
        }
    }

    /// Adds a thread that makes a change after each pause. The parameter is the number of the
    /// change; the result is whether it succeeded.
    pub fn beside(mut self, change: impl Fn(u64) -> bool + Sync + 'static) -> Self {
        self.change = Some(Box::new(change));
        self
    }

    /// Returns the number of operations per microsecond by all threads.
    ///
    /// Each runs until the end, and at least once.
    fn rate(&self, threads: usize, time: Duration) -> Result<f64> {
        let (start, stop) = (Barrier::new(threads + 1), AtomicBool::new(false));
        let run = |thread: u64| -> Result<f64> {
            let (mut done, mut succeeded) = (0, true);
            start.wait();
            let began = Instant::now();
            loop {
                succeeded &= (self.run)(thread, done);
                done += BATCH;
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            ensure!(succeeded, "an operation failed");
            Ok(done as f64 / began.elapsed().as_secs_f64() / 1e6)
        };
        thread::scope(|scope| {
            if let Some(change) = &self.change {
                let stop = &stop;
                scope.spawn(move || {
                    for number in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        assert!(change(number), "change {number} failed");
                        thread::sleep(REST);
                    }
                });
            }
            let threads: Vec<_> = (0..threads as u64)
                .map(|thread| scope.spawn(move || run(thread)))
                .collect();
            start.wait();
            thread::sleep(time);
            stop.store(true, Ordering::Relaxed);
            let joined = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().map_err(|_| anyhow!("a thread panicked"))?
            };
            threads.into_iter().map(joined).sum()
        })
    }
}

/// A cache line.
#[repr(align(128))]
#[derive(Default)]
struct Padded(AtomicU64);

/// Sets bits by locked instructions, in a line of each thread or in one line.
fn locked_or(same: bool) -> Work {
    let lines: [Padded; 16] = Default::default();
    Work::of(move |thread, number| {
        let line = lines.get(if same { 0 } else { thread as usize });
        line.is_some_and(|line| {
            line.0.fetch_or(1 << (number % 64), Ordering::SeqCst);
            true
        })
    })
}

/// Reads an array.
fn read_array() -> Work {
    let array = vec![1u64; 2048];
    let addresses = Layout::apart(1).addresses(8, 8);
    Work::of(move |_, number| {
        let index = black_box(addresses.at(number)) as usize / 8;
        array
            .get(index)
            .copied()
            .is_some_and(|value| black_box(value) == 1)
    })
}

/// Copies on the stack of each thread.
fn copy_array() -> Work {
    Work::of(|_, _| {
        let mut to = [0; COPY];
        black_box(&mut to).copy_from_slice(black_box(&[1; COPY]));
        black_box(&to).first() == Some(&1)
    })
}

/// Reads through an IOTLB that takes no lock.
fn read_shared(shared: &SharedPages, mappings: Mappings, changes: bool) -> Result<Work> {
    let physical = memory::<Plain>(shared, Layout::apart(1))?;
    let memory = IommuMemory::new(physical, shared_iotlb(mappings)?, true, ());
    let (addresses, pages) = (mappings.addresses(8), mappings.pages().collect::<Vec<_>>());
    let iotlb = Arc::clone(memory.iommu());
    let work = Work::of(move |_, number| {
        let addr = black_box(GuestAddress(addresses.at(number)));
        // A read during a change may find the page unmapped.
        black_box(memory.read_obj::<u64>(addr)).is_ok() || changes
    });
    if !changes {
        return Ok(work);
    }
    Ok(work.beside(move |number| {
        let (iova, to) = pages[number as usize % pages.len()];
        let (iova, to) = (GuestAddress(iova), GuestAddress(to));
        black_box(iotlb.invalidate_mapping(iova, PAGE));
        black_box(iotlb.set_mapping(iova, to, PAGE, Permissions::ReadWrite)).is_ok()
    }))
}

/// An operation, its control, and the sides: control, reference, ours.
struct Row {
    name: &'static str,
    control: &'static str,
    sides: [Work; 3],
}

fn rows(shared: &SharedPages) -> Result<Vec<Row>> {
    let mappings = Mappings::fragmented(MAPPINGS);
    Ok(vec![
        Row {
            name: "marked `write_obj` u64, each thread in its own 16 MiB",
            control: "locked OR on own line",
            sides: [
                locked_or(false),
                reference_side::scaling::write_marked(OWN)?,
                ours_side::scaling::write_marked(OWN)?,
            ],
        },
        Row {
            name: "marked `write_obj` u64, all threads in the same 2 MiB",
            control: "locked OR on one line",
            sides: [
                locked_or(true),
                reference_side::scaling::write_marked(NEAR)?,
                ours_side::scaling::write_marked(NEAR)?,
            ],
        },
        Row {
            name: "`memory().read_obj` u64",
            control: "read of an array",
            sides: [
                read_array(),
                reference_side::scaling::read_of_map()?,
                ours_side::scaling::read_of_map()?,
            ],
        },
        Row {
            name: "`IommuMemory::read_obj` u64, 10 000 mappings, RwLock / SharedIotlb",
            control: "read of an array",
            sides: [
                read_array(),
                reference_side::scaling::read_translated(shared, mappings, false)?,
                read_shared(shared, mappings, false)?,
            ],
        },
        Row {
            name: "the same, in an RwLock in both crates",
            control: "read of an array",
            sides: [
                read_array(),
                reference_side::scaling::read_translated(shared, mappings, false)?,
                ours_side::scaling::read_translated(shared, mappings, false)?,
            ],
        },
        Row {
            name: "RwLock / SharedIotlb, while another thread remaps pages",
            control: "read of an array",
            sides: [
                read_array(),
                reference_side::scaling::read_translated(shared, mappings, true)?,
                read_shared(shared, mappings, true)?,
            ],
        },
        Row {
            name: "`write_slice` of 4 KiB, each thread in its own 16 MiB",
            control: "`memcpy` of 4 KiB on the stack",
            sides: [
                copy_array(),
                reference_side::scaling::copy(OWN)?,
                ours_side::scaling::copy(OWN)?,
            ],
        },
    ])
}

/// Returns GiB/s of writes to one byte of each new page.
fn touch(threads: usize) -> Result<f64> {
    let len = usize::try_from(POPULATED)?;
    let mut memory = MmapMut::map_anon(len).context("cannot map memory")?;
    memory.advise(Advice::NoHugePage)?;
    let start = Instant::now();
    thread::scope(|scope| {
        for part in memory.chunks_mut(len.div_ceil(threads)) {
            scope.spawn(|| {
                for byte in part.iter_mut().step_by(PAGE) {
                    *byte = 1;
                }
            });
        }
    });
    Ok(gibibytes_per_second(start))
}

/// Returns GiB/s of `prefault`.
fn populate(threads: usize) -> Result<f64> {
    let region =
        Region::new(GuestAddress(0), POPULATED).transparent_huge_pages(TransparentHugePages::Off);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    let threads = NonZeroUsize::new(threads).context("no threads")?;
    let start = Instant::now();
    prefault(&memory, threads, |_| ControlFlow::Continue(()))?;
    Ok(gibibytes_per_second(start))
}

fn gibibytes_per_second(start: Instant) -> f64 {
    (POPULATED >> 30) as f64 / start.elapsed().as_secs_f64()
}

/// Returns the medians of rounds in which all sides take turns.
fn medians<const N: usize>(
    rounds: usize,
    mut round: impl FnMut(usize) -> Result<f64>,
) -> Result<[f64; N]> {
    let mut sides: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
    for _ in 0..rounds {
        for (number, times) in sides.iter_mut().enumerate() {
            times.push(round(number)?);
        }
    }
    let medians: Option<Vec<_>> = sides.into_iter().map(median).collect();
    let medians = medians.context("no rounds")?;
    medians.try_into().map_err(|_| anyhow!("a side is missing"))
}

/// Measures the operations and prints the table.
pub fn run(shared: &SharedPages, effort: Effort, build: Build) -> Result<()> {
    let processors = thread::available_parallelism()?.get();
    let counts: Vec<_> = THREADS
        .into_iter()
        .filter(|count| *count <= processors)
        .collect();
    println!(
        "Build `{}`, by the number of threads: the control / 0.18.0 / this crate, all threads together,\n\
         in wall-clock time, medians of {} rounds. Operations are in millions per second.\n",
        build.name(),
        effort.rounds
    );
    let heads: Vec<_> = counts.iter().map(usize::to_string).collect();
    println!(
        "| operation | control | {} |\n|---|---|{}",
        heads.join(" | "),
        "---|".repeat(counts.len())
    );
    for row in rows(shared)? {
        let mut cells = Vec::new();
        for &count in &counts {
            let side = |number: usize| -> Result<f64> {
                let work = row.sides.get(number).context("no such side")?;
                work.rate(count, effort.batch * 5)
            };
            let medians: [f64; 3] =
                medians(effort.rounds, side).with_context(|| row.name.to_owned())?;
            cells.push(medians.map(digits).join(" / "));
        }
        println!("| {} | {} | {} |", row.name, row.control, cells.join(" | "));
    }
    let mut cells = Vec::new();
    for &count in &counts {
        let side = |number| match number {
            0 => touch(count),
            _ => populate(count),
        };
        let [touched, populated] = medians(PREFAULTS.min(effort.rounds), side)?;
        cells.push(format!("{} / – / {}", digits(touched), digits(populated)));
    }
    println!(
        "| `vm_memory_host::prefault` of {} GiB, 4 KiB pages, GiB/s | write to each page | {} |",
        POPULATED >> 30,
        cells.join(" | ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{medians, rows, Work};
    use crate::shared_pages::SharedPages;

    #[test]
    fn rows_succeed_with_two_threads_on_every_side() {
        let shared = SharedPages::new().expect("shared pages");
        for row in rows(&shared).expect("the rows") {
            for work in &row.sides {
                let rate = work.rate(2, Duration::ZERO);
                assert!(rate.is_ok_and(|rate| rate >= 0.0), "{}", row.name);
            }
        }
    }

    #[test]
    fn rate_of_failing_operation_is_an_error() {
        // The second thread fails.
        let work = Work::of(|thread, _| thread == 0);
        assert!(work.rate(1, Duration::from_millis(1)).is_ok());
        assert!(work.rate(2, Duration::from_millis(1)).is_err());
    }

    #[test]
    fn medians_of_several_sides_take_turns() {
        let mut turns = Vec::new();
        let medians: [f64; 2] = medians(3, |side| {
            turns.push(side);
            Ok(turns.len() as f64)
        })
        .expect("medians");
        assert_eq!(turns, [0, 1, 0, 1, 0, 1]);
        assert_eq!(medians, [3.0, 4.0]);
    }
}
