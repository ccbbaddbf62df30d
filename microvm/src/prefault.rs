//! `--prefault`: all of guest memory is there before the guest asks for it.

use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_memory_host::{prefault, PrefaultError};

use crate::args::human;
use crate::error::Error;
use crate::memory::{residency, GuestRam};

/// As many as the work is worth on a small machine.
const THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);

/// What was brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefaulted {
    /// Bytes that the threads brought in, as they said when they were done.
    pub bytes: u64,
    /// Bytes that were in memory right after it; swapped ones count.
    pub resident: u64,
    /// How long it took.
    pub took: Duration,
    /// How many threads there were.
    pub threads: usize,
}

/// Brings in all of `ram`, with a progress bar where standard error is a terminal, and a line of text at the end.
///
/// # Errors
///
/// [`Error::Prefault`].
pub fn run(ram: &GuestRam) -> Result<Prefaulted, Error> {
    let total = ram.iter().map(GuestMemoryRegion::len).sum();
    // Hides itself where it is not a terminal.
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    if let Ok(style) =
        ProgressStyle::with_template("prefault {bar:40} {bytes} of {total_bytes}, {elapsed}")
    {
        bar.set_style(style);
    }
    let start = Instant::now();
    let outcome = bring_in(ram, |done| bar.set_position(done));
    let took = start.elapsed();
    bar.finish_and_clear();
    let bytes = outcome?;
    let prefaulted = Prefaulted {
        bytes,
        resident: residency(ram).map_or(0, |regions| {
            regions
                .iter()
                .map(|takes| takes.resident + takes.swapped)
                .sum()
        }),
        took,
        threads: THREADS.get(),
    };
    // A standard error that is closed is nobody's error.
    let _ = writeln!(std::io::stderr(), "microvm: {}", prefaulted.describe());
    Ok(prefaulted)
}

/// Brings in all of `ram`, and returns how many bytes that were.
fn bring_in(ram: &GuestRam, mut progress: impl FnMut(u64) + Send) -> Result<u64, PrefaultError> {
    let mut bytes = 0;
    prefault(ram, THREADS, |now| {
        bytes = now.done;
        progress(now.done);
        ControlFlow::Continue(())
    })?;
    Ok(bytes)
}

impl Prefaulted {
    /// A line for the report.
    pub fn describe(&self) -> String {
        let (size, ms) = (human(self.bytes), self.took.as_secs_f64() * 1e3);
        format!("prefault: {size} in {ms:.1} ms by {} threads", self.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{harvest, map, Backing, MIN_MEM};

    #[test]
    fn every_page_is_there_and_none_is_dirty() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let ram = map(MIN_MEM, backing).unwrap();
            assert!(residency(&ram).unwrap()[0].resident < MIN_MEM / 2);
            let mut calls = Vec::new();
            assert_eq!(bring_in(&ram, |done| calls.push(done)).unwrap(), MIN_MEM);
            assert_eq!(calls, [MIN_MEM / 2, MIN_MEM]);
            let prefaulted = run(&ram).unwrap();
            assert_eq!((prefaulted.bytes, prefaulted.resident), (MIN_MEM, MIN_MEM));
            assert!(prefaulted.describe().starts_with("prefault: 16 MiB in "));
            assert_eq!(harvest(&ram).count(), 0);
        }
    }
}
