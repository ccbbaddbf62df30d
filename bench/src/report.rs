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
    /// The number of rows that miss criterion 1.
    slower: usize,
    /// The number of rows that miss criterion 2.
    far: usize,
}

impl Report {
    pub fn new(build: Build, effort: Effort) -> Self {
        println!(
            "Build `{}`, medians of {} interleaved rounds, ns per operation.\n\
             Criterion 1: reference ÷ ours (ratio) is at least the figure, usually 0.97.\n\
             Criterion 2: ours is at most the figure × limit + 1 ns, usually 1.5.\n",
            build.name(),
            effort.rounds
        );
        println!(
            "{:<64} {:>11} {:>11} {:>11} {:>7} {:>12} {:>12}",
            "operation", "reference", "ours", "limit", "ratio", "1", "2"
        );
        Self {
            build,
            effort,
            tsv:
                "operation\treference\tours\tlimit\tratio\tleast_ratio\tlimit_factor\tlimit_holds\n"
                    .to_owned(),
            rows: 0,
            slower: 0,
            far: 0,
        }
    }

    /// Adds a row. Prints it at once, because the next one may take long.
    pub fn add(&mut self, row: &Row, outcome: Outcome) {
        let criteria = row.criteria();
        let (ratio_holds, limit_holds) = (
            criteria.ratio_holds(&outcome),
            criteria.limit_holds(&outcome),
        );
        let none = || "–".to_owned();
        println!(
            "{:<64} {:>11} {:>11} {:>11} {:>7} {:>12} {:>12}",
            row.name,
            digits(outcome.reference),
            digits(outcome.ours),
            outcome.limit.map_or_else(none, digits),
            digits(outcome.ratio),
            verdict(criteria.least_ratio, ratio_holds),
            criteria
                .limit_factor
                .zip(limit_holds)
                .map_or_else(none, |(factor, holds)| verdict(factor, holds)),
        );
        let limit = outcome.limit.map(|limit| format!("{limit:.4}"));
        let factor = criteria.limit_factor.filter(|_| limit_holds.is_some());
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.tsv,
            "{}\t{:.4}\t{:.4}\t{}\t{:.4}\t{}\t{}\t{}",
            row.name,
            outcome.reference,
            outcome.ours,
            limit.unwrap_or_default(),
            outcome.ratio,
            criteria.least_ratio,
            factor.map_or_else(String::new, |factor| factor.to_string()),
            limit_holds.map_or_else(String::new, |holds| holds.to_string()),
        );
        self.rows += 1;
        self.slower += usize::from(!ratio_holds);
        self.far += usize::from(limit_holds == Some(false));
    }

    /// Prints the summary, and writes the file.
    pub fn finish(self, tsv: Option<&Path>) -> Result<()> {
        println!(
            "\n{}: {} rows, {} miss criterion 1, {} miss criterion 2 ({} rounds)",
            self.build.name(),
            self.rows,
            self.slower,
            self.far,
            self.effort.rounds
        );
        if let Some(path) = tsv {
            fs::write(path, self.tsv)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

fn verdict(figure: f64, holds: bool) -> String {
    format!("{figure} {}", if holds { "holds" } else { "MISSED" })
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
