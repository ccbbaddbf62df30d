//! Copies of 1 B to 16 MiB by the reference, ours and glibc's `memcpy`, as a table.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::comparison::{median, Comparison, Effort};
use crate::report::{digits, Build};
use crate::shared_pages::{SharedPages, HOST_OFFSET};
use crate::{limit, ours_side, reference_side};

/// The share of the speed of `memcpy` that the median copy must reach.
const MEDIAN_TARGET: f64 = 0.97;
/// The share of the speed of `memcpy` that each copy must reach.
const FLOOR: f64 = 0.85;

/// The offsets of the guest's and the host's buffer from a cache line: neither, one, or both
/// misaligned.
const SHIFTS: [Shift; 4] = [
    Shift { guest: 0, host: 0 },
    Shift { guest: 3, host: 0 },
    Shift { guest: 0, host: 3 },
    Shift { guest: 3, host: 5 },
];

/// The offsets of two buffers from a cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift {
    pub guest: usize,
    pub host: usize,
}

impl Shift {
    /// The host buffer begins 12 bytes above the guest's, modulo 4096: the size of a header of a
    /// virtio network packet.
    pub const ABOVE_SOURCE: Self = Self {
        guest: 0,
        host: 4096 - HOST_OFFSET + 12,
    };
}

/// Returns the lengths: powers of two, and the middle between each two.
fn grid() -> Vec<usize> {
    let mut grid = Vec::new();
    for power in 0..=24u32 {
        let len = 1usize << power;
        grid.push(len);
        if (1..24).contains(&power) {
            grid.push(len + len / 2);
        }
    }
    grid
}

/// Measures the grid, prints it, and writes it to `tsv`.
pub fn run(shared: &SharedPages, effort: Effort, build: Build, tsv: Option<&Path>) -> Result<()> {
    println!(
        "Build `{}`, VolatileSlice::copy_to::<u8>, GB/s, medians of {} interleaved rounds.\n",
        build.name(),
        effort.rounds
    );
    println!(
        "{:>9} {:>5} {:>5} {:>10} {:>10} {:>10} {:>12}",
        "bytes", "guest", "host", "reference", "ours", "memcpy", "of memcpy"
    );
    let mut parts = Vec::new();
    let mut lines = String::from("bytes\tguest\thost\tpart\n");
    for shift in SHIFTS {
        for len in grid() {
            let comparison = Comparison {
                reference: reference_side::copies::copy_bytes(shared, len, shift)?,
                ours: ours_side::copies::copy_bytes(shared, len, shift)?,
                limit: Some(limit::copy_bytes(shared, len, shift)?),
            };
            let outcome = comparison
                .run(effort)
                .with_context(|| format!("{len} bytes"))?;
            let limit = outcome.limit.context("memcpy was not measured")?;
            let part = outcome.of_limit.context("memcpy was not measured")?;
            let speed = |time: f64| digits(len as f64 / time);
            println!(
                "{len:>9} {:>5} {:>5} {:>10} {:>10} {:>10} {part:>12.2} {}",
                shift.guest,
                shift.host,
                speed(outcome.reference),
                speed(outcome.ours),
                speed(limit),
                if part < FLOOR { "SHORT" } else { "" }
            );
            parts.push(part);
            // Writing to a String cannot fail.
            let _ = writeln!(lines, "{len}\t{}\t{}\t{part:.4}", shift.guest, shift.host);
        }
    }
    let below = parts.iter().filter(|part| **part < FLOOR).count();
    let middle = median(parts).context("nothing was measured")?;
    println!(
        "\nof memcpy: median {middle:.3} (target {MEDIAN_TARGET}){}, {below} below {FLOOR}",
        if middle < MEDIAN_TARGET {
            " MISSED"
        } else {
            ""
        }
    );
    if let Some(tsv) = tsv {
        fs::write(tsv, lines).with_context(|| format!("cannot write {}", tsv.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::grid;

    #[test]
    fn grid_ascends_from_1_byte_to_16_mib() {
        let grid = grid();
        assert!(grid.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(grid.first(), Some(&1));
        assert_eq!(grid.last(), Some(&(16 << 20)));
    }
}
