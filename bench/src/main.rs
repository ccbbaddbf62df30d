//! The published vm-memory 0.18.0 ("reference"), this crate ("ours") and accesses to a flat
//! array ("limit"), measured in one binary.
//!
//! The workloads are written once, in `workloads/`, and compiled for both crates. Rounds are
//! interleaved (reference, ours, limit; limit, ours, reference; …), so that other load affects all
//! three equally. A figure is the median of all rounds. A ratio is the median of the ratios of the
//! rounds.
//!
//! `cargo xtask bench` runs this program in three builds, and writes RESULTS.md.

mod comparison;
mod growth;
mod layout;
mod limit;
mod new_abilities;
mod provision;
mod report;
mod ring_windows;
mod rows;
mod scaling;
mod shared_pages;
mod throughput;
mod values;
mod workload_shapes;

/// The workloads on the published crate.
#[path = "workloads"]
mod reference_side {
    use reference as vm_memory;
    use virtio_queue_reference as virtio_queue;

    pub mod access;
    pub mod bitmaps;
    pub mod contexts;
    pub mod copies;
    pub mod iommu;
    pub mod kinds;
    pub mod maps;
    pub mod queues;
    pub mod scaling;
}

/// The workloads on this crate.
#[path = "workloads"]
#[expect(
    clippy::duplicate_mod,
    reason = "both sides compile the same source, which makes them comparable"
)]
mod ours_side {
    use ours as vm_memory;
    use virtio_queue_ours as virtio_queue;

    pub mod access;
    pub mod bitmaps;
    pub mod contexts;
    pub mod copies;
    pub mod iommu;
    pub mod kinds;
    pub mod maps;
    pub mod queues;
    pub mod scaling;
}

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::{Parser, ValueEnum};

use comparison::{Comparison, Effort};
use report::Build;
use rows::{Row, ROWS};
use shared_pages::SharedPages;

/// The command line.
#[derive(Debug, Parser)]
#[command(about = "vm-memory 0.18.0, this crate and the limit, measured in one binary")]
struct Cli {
    /// Run only the rows whose names contain SUBSTRING
    #[arg(long, value_name = "SUBSTRING", default_value = "")]
    filter: String,
    /// The number of rounds of each row
    #[arg(long, value_name = "N", default_value_t = 21)]
    rounds: usize,
    /// Run only the 15 rows that matter most
    #[arg(long, conflicts_with = "filter")]
    quick: bool,
    /// Run only five short rounds, to test that every row works; the times mean nothing
    #[arg(long)]
    short: bool,
    /// The build of this program; by default the name of its folder
    #[arg(long, value_enum)]
    build: Option<Build>,
    /// Also write the rows, or the copies of --throughput, to this file, separated by tabs
    #[arg(long, value_name = "FILE")]
    tsv: Option<PathBuf>,
    /// List the names of the rows
    #[arg(long)]
    list: bool,
    /// Measure copies of 1 B to 16 MiB instead
    #[arg(long)]
    throughput: bool,
    /// Measure IOTLBs of 1 to 1 000 000 mappings instead
    #[arg(long)]
    growth: bool,
    /// Measure operations by 1 to 16 threads instead
    #[arg(long)]
    threads: bool,
    /// Measure random reads with and without huge pages instead
    #[arg(long)]
    provision: bool,
    /// Run only the operation of this row, without a clock, for callgrind
    #[arg(long, value_name = "ROW")]
    count: Option<String>,
    /// The number of iterations of `--count`
    #[arg(long, value_name = "N", default_value_t = 1000)]
    iterations: u64,
    /// The side that `--count` runs
    #[arg(long, value_enum, default_value = "ours")]
    side: Side,
}

/// The side of a row: a crate, or the flat array.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Side {
    /// vm-memory 0.18.0 from the registry
    Reference,
    /// This crate
    Ours,
    /// A flat array
    Limit,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let effort = if cli.short {
        Effort {
            rounds: 5,
            batch: Duration::from_micros(500),
        }
    } else {
        Effort {
            rounds: cli.rounds.max(1),
            batch: Duration::from_millis(2),
        }
    };
    let shared = SharedPages::new()?;

    if cli.list {
        for row in ROWS {
            println!("{}", row.name);
        }
        return Ok(());
    }
    if let Some(name) = &cli.count {
        return count(&shared, name, cli.side, cli.iterations);
    }
    let build = match cli.build {
        Some(build) => build,
        None => Build::of_this_program()?,
    };
    if cli.throughput {
        return throughput::run(&shared, effort, build, cli.tsv.as_deref());
    }
    if cli.growth {
        return growth::run(effort, build);
    }
    if cli.threads {
        return scaling::run(&shared, effort, build);
    }
    if cli.provision {
        return provision::run(effort, build);
    }

    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|row| row.name.contains(&cli.filter) && (!cli.quick || row.is_quick()))
        .collect();
    if rows.is_empty() {
        bail!("no row contains '{}'; --list prints the names", cli.filter);
    }
    let mut report = report::Report::new(build, effort, cli.short);
    for row in rows {
        let comparison =
            (row.comparison)(&shared).with_context(|| format!("{}: cannot set up", row.name))?;
        let outcome = comparison
            .run(effort)
            .with_context(|| format!("{}: failed", row.name))?;
        report.add(row, outcome);
    }
    report.finish(cli.tsv.as_deref())
}

/// Runs one operation `iterations` times.
fn count(shared: &SharedPages, name: &str, side: Side, iterations: u64) -> Result<()> {
    let row = ROWS
        .iter()
        .find(|row| row.name == name)
        .with_context(|| format!("no row has the name '{name}'; --list prints the names"))?;
    let Comparison {
        mut reference,
        mut ours,
        limit,
    } = (row.comparison)(shared)?;
    let batch = match side {
        Side::Reference => &mut reference,
        Side::Ours => &mut ours,
        Side::Limit => &mut limit.with_context(|| format!("the row {name} has no limit"))?,
    };
    black_box((batch.run)(iterations)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::any::TypeId;

    /// If cargo unified the two sources, this program would compare a crate with itself.
    #[test]
    fn sides_use_two_different_crates() {
        assert_ne!(
            TypeId::of::<ours::GuestAddress>(),
            TypeId::of::<reference::GuestAddress>()
        );
        // This compiles only if each virtio-queue takes the memory of its side.
        fn queue_works_on_ours<M: ours::GuestMemory>(
            queue: &virtio_queue_ours::Queue,
            memory: &M,
        ) -> bool {
            virtio_queue_ours::QueueT::is_valid(queue, memory)
        }
        fn queue_works_on_reference<M: reference::GuestMemory>(
            queue: &virtio_queue_reference::Queue,
            memory: &M,
        ) -> bool {
            virtio_queue_reference::QueueT::is_valid(queue, memory)
        }
        let ours = ours::GuestMemoryMmap::<()>::from_ranges(&[(ours::GuestAddress(0), 4096)])
            .expect("ours");
        let reference =
            reference::GuestMemoryMmap::<()>::from_ranges(&[(reference::GuestAddress(0), 4096)])
                .expect("reference");
        let queue = virtio_queue_ours::QueueT::new(16).expect("a queue");
        assert!(!queue_works_on_ours(&queue, &ours));
        let queue = virtio_queue_reference::QueueT::new(16).expect("a queue");
        assert!(!queue_works_on_reference(&queue, &reference));
    }
}
