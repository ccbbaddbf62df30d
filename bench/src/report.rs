//! The table of results, as text and as a file with tabs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::contest::{Effort, Outcome};
use crate::rows::Row;

/// The builds that users ship: the profiles of Cargo.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Build {
    /// Fat LTO, one codegen unit
    Fat,
    /// Cargo's own default
    Release,
    /// Fat, for size, abort on panic
    Size,
}

impl Build {
    /// Returns the build, from the name of the folder that contains this program.
    pub fn of_this_program() -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        program
            .parent()
            .and_then(Path::file_name)
            .and_then(|folder| Self::from_str(&folder.to_string_lossy(), false).ok())
            .with_context(|| {
                format!(
                    "{} is not in a folder named fat, release or size; use --build",
                    program.display()
                )
            })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Fat => "fat",
            Self::Release => "release",
            Self::Size => "size",
        }
    }
}

/// The rows that were measured.
pub struct Report {
    build: Build,
    effort: Effort,
    tsv: String,
    rows: usize,
    missed: Vec<String>,
}

impl Report {
    pub fn new(build: Build, effort: Effort) -> Self {
        println!(
            "Build `{}`, medians of {} interleaved rounds, ns per operation; ratio: reference ÷ ours.\n",
            build.name(),
            effort.rounds
        );
        println!(
            "{:<64} {:>11} {:>11} {:>11} {:>7} {:>6}",
            "operation", "reference", "ours", "limit", "ratio", "target"
        );
        Self {
            build,
            effort,
            tsv: "operation\treference\tours\tlimit\tratio\tof_limit\ttarget\n".to_owned(),
            rows: 0,
            missed: Vec::new(),
        }
    }

    /// Prints a row at once, because the next one may take a while.
    pub fn add(&mut self, row: &Row, outcome: Outcome) {
        let target = row.target(self.build);
        let Outcome {
            reference,
            ours,
            limit,
            ratio,
            of_limit,
        } = outcome;
        let missed = ratio < target;
        println!(
            "{:<64} {:>11} {:>11} {:>11} {:>7} {:>6} {}",
            row.name,
            digits(reference),
            digits(ours),
            limit.map_or("–".to_owned(), digits),
            digits(ratio),
            target,
            if missed { "MISSED" } else { "" }
        );
        let optional =
            |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.4}"));
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.tsv,
            "{}\t{reference:.4}\t{ours:.4}\t{}\t{ratio:.4}\t{}\t{target}",
            row.name,
            optional(limit),
            optional(of_limit)
        );
        self.rows += 1;
        if missed {
            self.missed.push(row.name.to_owned());
        }
    }

    /// Prints the summary, and writes the file.
    pub fn finish(self, tsv: Option<&Path>) -> Result<()> {
        println!(
            "\n{}: {} rows, {} miss their target ({} rounds)",
            self.build.name(),
            self.rows,
            self.missed.len(),
            self.effort.rounds
        );
        if let Some(path) = tsv {
            fs::write(path, self.tsv)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Formats three digits, or all digits before the point.
pub fn digits(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::digits;

    #[test]
    fn digits_rounds_to_three() {
        assert_eq!(digits(1.2345), "1.23");
        assert_eq!(digits(45.67), "45.7");
        assert_eq!(digits(2_500_000.4), "2500000");
    }
}
