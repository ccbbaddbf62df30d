//! The table of results, as text and as a file with tabs.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::comparison::{Effort, Outcome};
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

/// The columns of the tab-separated file.
const COLUMNS: [&str; 11] = [
    "name",
    "operation",
    "quick",
    "reference",
    "ours",
    "limit",
    "ratio",
    "least_ratio",
    "limit_factor",
    "limit_holds",
    "reason",
];

/// The rows that were measured.
pub struct Report {
    build: Build,
    effort: Effort,
    /// Whether the rounds are too short for a verdict.
    short: bool,
    tsv: String,
    rows: BTreeSet<&'static str>,
    /// The rows that miss criterion 1. A row misses it if one of its contexts does.
    slower: BTreeSet<&'static str>,
    /// The rows that miss criterion 2.
    far: BTreeSet<&'static str>,
}

impl Report {
    pub fn new(build: Build, effort: Effort, short: bool) -> Self {
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
            short,
            tsv: COLUMNS.join("\t") + "\n",
            rows: BTreeSet::new(),
            slower: BTreeSet::new(),
            far: BTreeSet::new(),
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
            "{}\t{}\t{}\t{:.4}\t{:.4}\t{}\t{:.4}\t{}\t{}\t{}\t{}",
            row.name,
            row.operation(),
            row.is_quick(),
            outcome.reference,
            outcome.ours,
            limit.unwrap_or_default(),
            outcome.ratio,
            criteria.least_ratio,
            factor.map_or_else(String::new, |factor| factor.to_string()),
            limit_holds.map_or_else(String::new, |holds| holds.to_string()),
            row.reason().unwrap_or_default(),
        );
        self.rows.insert(row.operation());
        if !ratio_holds {
            self.slower.insert(row.operation());
        }
        if limit_holds == Some(false) {
            self.far.insert(row.operation());
        }
    }

    /// Returns the last line: the rows that miss a criterion.
    fn verdict(&self) -> String {
        if self.short {
            return "no verdict: the rounds are too short".to_owned();
        }
        let missed: Vec<_> = self.slower.union(&self.far).copied().collect();
        if missed.is_empty() {
            return "verdict: every row meets its criteria".to_owned();
        }
        format!(
            "verdict: {} rows MISSED: {}",
            missed.len(),
            missed.join("; ")
        )
    }

    /// Prints the summary, and writes the file.
    pub fn finish(self, tsv: Option<&Path>) -> Result<()> {
        println!(
            "\n{}: {} rows, {} miss criterion 1, {} miss criterion 2 ({} rounds)\n{}",
            self.build.name(),
            self.rows.len(),
            self.slower.len(),
            self.far.len(),
            self.effort.rounds,
            self.verdict()
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
    use std::time::Duration;

    use super::{digits, Build, Report, COLUMNS};
    use crate::comparison::{Effort, Outcome};
    use crate::rows::ROWS;

    #[test]
    fn verdict_names_operation_of_missed_context_once() {
        let effort = Effort {
            rounds: 1,
            batch: Duration::ZERO,
        };
        let outcome = |ours| Outcome {
            reference: 100.0,
            ours,
            limit: None,
            ratio: 100.0 / ours,
            of_limit: None,
        };
        let contexts: Vec<_> = ROWS
            .iter()
            .filter(|row| row.operation() == "read_obj.s16, n=1")
            .collect();
        assert_eq!(contexts.len(), 3);
        let mut report = Report::new(Build::Release, effort, false);
        report.add(contexts[0], outcome(50.0));
        assert!(report.verdict().contains("every row meets"));
        report.add(contexts[1], outcome(150.0));
        report.add(contexts[2], outcome(200.0));
        let verdict = report.verdict();
        assert_eq!(verdict, "verdict: 1 rows MISSED: read_obj.s16, n=1");
        assert_eq!((report.rows.len(), report.slower.len()), (1, 1));
        for line in report.tsv.lines() {
            assert_eq!(line.split('\t').count(), COLUMNS.len(), "{line}");
        }
        report.short = true;
        assert!(report.verdict().starts_with("no verdict"));
    }

    #[test]
    fn digits_rounds_to_three() {
        assert_eq!(digits(1.2345), "1.23");
        assert_eq!(digits(45.67), "45.7");
        assert_eq!(digits(2_500_000.4), "2500000");
    }
}
