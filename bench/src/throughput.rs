//! Copies of 1 B to 16 MiB by the reference, ours and glibc's `memcpy`, as a table and as a plot.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::comparison::{median, Comparison, Effort};
use crate::plot::{Curve, Plot, BLUE, GREY, ORANGE};
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

/// One copy.
struct Point {
    len: usize,
    /// GB/s.
    reference: f64,
    ours: f64,
    memcpy: f64,
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

/// Measures the grid, prints it, writes it to `tsv`, and draws the aligned copies.
pub fn run(
    shared: &SharedPages,
    effort: Effort,
    build: Build,
    path: &Path,
    tsv: Option<&Path>,
) -> Result<()> {
    println!(
        "Build `{}`, VolatileSlice::copy_to::<u8>, GB/s, medians of {} interleaved rounds.\n",
        build.name(),
        effort.rounds
    );
    println!(
        "{:>9} {:>5} {:>5} {:>10} {:>10} {:>10} {:>12}",
        "bytes", "guest", "host", "reference", "ours", "memcpy", "of memcpy"
    );
    let mut aligned = Vec::new();
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
            let point = Point {
                len,
                reference: len as f64 / outcome.reference,
                ours: len as f64 / outcome.ours,
                memcpy: len as f64 / limit,
            };
            println!(
                "{len:>9} {:>5} {:>5} {:>10} {:>10} {:>10} {part:>12.2} {}",
                shift.guest,
                shift.host,
                digits(point.reference),
                digits(point.ours),
                digits(point.memcpy),
                if part < FLOOR { "SHORT" } else { "" }
            );
            parts.push(part);
            // Writing to a String cannot fail.
            let _ = writeln!(lines, "{len}\t{}\t{}\t{part:.4}", shift.guest, shift.host);
            if shift == SHIFTS[0] {
                aligned.push(point);
            }
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
    draw(&aligned, build, path)
}

/// Formats a length with its unit.
fn size(len: f64) -> String {
    let len = len.round() as u64;
    match len {
        0..1024 => format!("{len} B"),
        1024..1_048_576 => format!("{} KiB", len >> 10),
        _ => format!("{} MiB", len >> 20),
    }
}

/// The coordinates of each point.
type Line = (&'static str, plotters::style::RGBColor, fn(&Point) -> f64);

const LINES: [Line; 3] = [
    ("memcpy (glibc)", GREY, |point| point.memcpy),
    ("vm-memory 0.18.0", ORANGE, |point| point.reference),
    ("this crate", BLUE, |point| point.ours),
];

fn draw(points: &[Point], build: Build, path: &Path) -> Result<()> {
    let curves = LINES.into_iter().map(|(name, color, value)| Curve {
        name,
        color,
        points: points
            .iter()
            .map(|point| (point.len as f64, value(point)))
            .collect(),
    });
    let plot = Plot {
        caption: format!(
            "Copy from guest memory to a buffer, build `{}`",
            build.name()
        ),
        x: "bytes in one copy",
        y: "GB/s",
        x_labels: 13,
        x_label: size,
        base: 2.0,
        curves: curves.collect(),
    };
    plot.draw(path)
}

#[cfg(test)]
mod tests {
    use super::{draw, grid, size, Point};
    use crate::report::Build;

    #[test]
    fn grid_ascends_from_1_byte_to_16_mib() {
        let grid = grid();
        assert!(grid.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(grid.first(), Some(&1));
        assert_eq!(grid.last(), Some(&(16 << 20)));
    }

    #[test]
    fn size_has_binary_unit() {
        assert_eq!(size(512.0), "512 B");
        assert_eq!(size(65536.0), "64 KiB");
        assert_eq!(size(16777216.0), "16 MiB");
    }

    #[test]
    fn draw_of_points_writes_a_line_for_each_side() {
        let path = std::env::temp_dir().join(format!("vm-memory-bench-{}.svg", std::process::id()));
        let points: Vec<_> = grid()
            .into_iter()
            .map(|len| Point {
                len,
                reference: 1.0,
                ours: 3.0,
                memcpy: 2.0,
            })
            .collect();
        draw(&points, Build::Fat, &path).expect("a plot");
        let svg = std::fs::read_to_string(&path).expect("the file");
        std::fs::remove_file(&path).expect("removed");
        assert!(svg.starts_with("<svg"));
        assert!(svg.matches("<polyline").count() >= 3);
        assert!(svg.contains("memcpy (glibc)"));
    }
}
