//! `bench/RESULTS.md`: the tables of the builds side by side.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};

use super::throughput::{short_copies, Throughput};
use super::Build;

/// The measurements besides the rows, as text for RESULTS.md.
pub(super) struct Curves {
    /// Copies in each build.
    pub(super) throughput: Vec<(Build, Throughput)>,
    pub(super) growth: String,
    pub(super) threads: String,
    /// The time to provision guest memory, and the time that it saves.
    pub(super) provision: String,
}

/// A row of one build.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    operation: String,
    reference: f64,
    ours: f64,
    limit: Option<f64>,
    ratio: f64,
    /// The minimum of `ratio`.
    least_ratio: f64,
    /// The maximum of `ours`, as a factor of the limit, and whether it holds.
    near_limit: Option<(f64, bool)>,
}

impl Line {
    /// Returns whether this crate is slower than the reference, by more than the noise.
    fn is_slower(&self) -> bool {
        self.ratio < 0.97
    }

    /// Returns whether the ratio is below the figure of the row.
    fn misses_ratio(&self) -> bool {
        self.ratio < self.least_ratio
    }

    fn is_far(&self) -> bool {
        matches!(self.near_limit, Some((_, false)))
    }
}

/// Reads the file that the program writes for `--tsv`.
pub(super) fn lines(text: &str) -> Result<Vec<Line>> {
    let number = |field: &str| -> Result<f64> {
        field
            .parse()
            .with_context(|| format!("'{field}' is not a number"))
    };
    let mut lines = Vec::new();
    for line in text.lines().skip(1) {
        let fields: Vec<_> = line.split('\t').collect();
        let &[operation, reference, ours, limit, ratio, least_ratio, factor, holds] =
            fields.as_slice()
        else {
            bail!("'{line}' does not have eight fields");
        };
        let optional = |field: &str| -> Result<Option<f64>> {
            (!field.is_empty()).then(|| number(field)).transpose()
        };
        lines.push(Line {
            operation: operation.to_owned(),
            reference: number(reference)?,
            ours: number(ours)?,
            limit: optional(limit)?,
            ratio: number(ratio)?,
            least_ratio: number(least_ratio)?,
            near_limit: optional(factor)?.map(|factor| (factor, holds == "true")),
        });
    }
    ensure!(!lines.is_empty(), "no rows");
    Ok(lines)
}

/// The machine and the versions that a result depends on.
pub(super) struct Machine {
    processor: String,
    kernel: String,
    compiler: String,
    commit: String,
    date: String,
}

impl Machine {
    pub(super) fn ask(folder: &Path) -> Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let models: Vec<_> = processors
            .lines()
            .filter(|line| line.starts_with("model name"))
            .filter_map(|line| line.split_once(':').map(|(_, model)| model.trim()))
            .collect();
        let changed = !said(Command::new("git").current_dir(folder).args([
            "status",
            "--porcelain",
            "--",
            "../src",
            "../vm-memory-host",
            "../Cargo.toml",
            ".",
        ]))?
        .is_empty();
        let commit =
            said(
                Command::new("git")
                    .current_dir(folder)
                    .args(["rev-parse", "--short", "HEAD"]),
            )?;
        Ok(Self {
            processor: format!(
                "{}× {}",
                models.len(),
                models.first().unwrap_or(&"unknown processor")
            ),
            kernel: said(Command::new("uname").args(["-s", "-r", "-m"]))?,
            compiler: said(Command::new("rustc").arg("--version").current_dir(folder))?,
            commit: if changed {
                format!("{commit}, changed")
            } else {
                commit
            },
            date: said(Command::new("date").args(["-u", "+%F"]))?,
        })
    }
}

/// Returns the output of a command.
fn said(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The part of RESULTS.md that explains the criteria.
const CRITERIA: &str = "\
The reference is 0.18.0. The limit is a bounds check on a flat array and one access, or `memcpy`.
Each row has two criteria, in every build. The last columns of the table have their figures:

1. The ratio, reference ÷ ours, is at least the figure of the row. It is 0.97 unless the row says
   otherwise. A figure above 1 keeps the gain of a design: a row can miss it and still be faster
   than the reference.
2. The time of this crate is at most limit × the figure of the row + 1 ns. The figure is 1.5 unless
   the row says otherwise. A row without a limit has only criterion 1.

`bench/src/rows.rs` gives the reasons for the other figures. Rows of each build:

| build | rows | slower than 0.18.0 (ratio below 0.97) | miss criterion 1 | miss criterion 2 |
|---|---|---|---|---|
";

/// Returns the text of RESULTS.md.
pub(super) fn results_text(
    machine: &Machine,
    rounds: u32,
    tables: &[(Build, Vec<Line>)],
    curves: Option<&Curves>,
) -> Result<String> {
    let mut text = String::from("# The last run of `cargo xtask bench`\n\n");
    writeln!(text, "- Machine: {}, {}", machine.processor, machine.kernel)?;
    writeln!(text, "- Compiler: {}", machine.compiler)?;
    writeln!(text, "- Commit: {}", machine.commit)?;
    writeln!(text, "- Date: {}", machine.date)?;
    writeln!(
        text,
        "- {rounds} rounds, interleaved (reference, ours, limit) in one binary; medians. The time is the\n  \
         processor time of the thread. The ratio is the median of reference ÷ ours in each round.\n"
    )?;
    text.push_str(CRITERIA);
    for (build, lines) in tables {
        let count = |test: fn(&Line) -> bool| lines.iter().filter(|line| test(line)).count();
        writeln!(
            text,
            "| `{}` | {} | {} | {} | {} |",
            build.name(),
            lines.len(),
            count(Line::is_slower),
            count(Line::misses_ratio),
            count(Line::is_far),
        )?;
    }
    if let Some(curves) = curves {
        text.push('\n');
        for (build, throughput) in &curves.throughput {
            writeln!(
                text,
                "- `{}`: copies of 1 B to 16 MiB, {}",
                build.name(),
                throughput.verdict
            )?;
        }
        writeln!(
            text,
            "- {}\n\n![Copy throughput](copy-throughput.svg)\n\n![An IOTLB as it grows](iotlb-growth.svg)\n\n{}\n\n{}\n",
            curves.growth, curves.threads, curves.provision
        )?;
        text.push_str(&short_copies(&curves.throughput)?);
    }
    text.push_str(
        "\nTimes are ns per operation unless a cell has a unit, in the builds fat / release / size.\n\
         **Bold** ratios miss criterion 1, **bold** times of this crate miss criterion 2.\n\n\
         | operation | reference | ours | limit | ratio | 1: at least | 2: at most |\n\
         |---|---|---|---|---|---|---|\n",
    );

    let (_, first) = tables.first().context("no build")?;
    for row in first {
        let mut cells: [Vec<String>; 4] = Default::default();
        for (build, lines) in tables {
            let line = lines
                .iter()
                .find(|line| line.operation == row.operation)
                .with_context(|| {
                    format!(
                        "the build `{}` has no row '{}'",
                        build.name(),
                        row.operation
                    )
                })?;
            let values = [
                time(line.reference),
                bold_if(line.is_far(), time(line.ours)),
                line.limit.map_or_else(|| "–".to_owned(), time),
                bold_if(line.misses_ratio(), digits(line.ratio)),
            ];
            for (cell, value) in cells.iter_mut().zip(values) {
                cell.push(value);
            }
        }
        let cells = cells.map(|cell| cell.join(" / "));
        let factor = row.near_limit.map(|(factor, _)| factor.to_string());
        writeln!(
            text,
            "| {} | {} | {} | {} |",
            row.operation,
            cells.join(" | "),
            row.least_ratio,
            factor.as_deref().unwrap_or("–")
        )?;
    }
    Ok(text)
}

fn bold_if(bold: bool, text: String) -> String {
    if bold {
        format!("**{text}**")
    } else {
        text
    }
}

/// Formats a time, in nanoseconds if it has no unit.
fn time(nanoseconds: f64) -> String {
    if nanoseconds >= 1e6 {
        format!("{} ms", digits(nanoseconds / 1e6))
    } else if nanoseconds >= 1e4 {
        format!("{} µs", digits(nanoseconds / 1e3))
    } else {
        digits(nanoseconds)
    }
}

/// Formats three digits, or all digits before the point.
fn digits(value: f64) -> String {
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
    use super::{lines, results_text, time, Build, Machine};

    const TSV: &str =
        "operation\treference\tours\tlimit\tratio\tleast_ratio\tlimit_factor\tlimit_holds\n\
                       fast\t50.0\t2.0\t1.0\t25.0\t20\t1.5\ttrue\n\
                       far\t50.0\t9.0\t1.0\t5.6\t0.97\t1.5\tfalse\n\
                       slow\t25000.0\t20000.0\t\t1.25\t2\t\t\n\
                       lost\t50.0\t60.0\t\t0.83\t0.8\t\t\n\
                       lost by half\t50.0\t99.0\t\t0.5\t0.4\t\t\n";

    #[test]
    fn lines_of_table_have_all_fields() {
        let lines = lines(TSV).unwrap();
        assert_eq!(lines.len(), 5);
        assert_eq!((lines[0].ours, lines[0].limit), (2.0, Some(1.0)));
        assert_eq!(lines[0].near_limit, Some((1.5, true)));
        assert!(!lines[0].misses_ratio() && !lines[0].is_far());
        assert!(!lines[1].misses_ratio() && lines[1].is_far());
        assert_eq!((lines[2].limit, lines[2].near_limit), (None, None));
        assert!(lines[2].misses_ratio() && !lines[2].is_far());
        let slower: Vec<_> = lines.iter().map(|line| line.is_slower()).collect();
        assert_eq!(slower, [false, false, false, true, true]);
    }

    #[test]
    fn lines_of_malformed_table_returns_error() {
        assert!(lines("operation\n").is_err());
        assert!(lines("head\nname\t1\t2\n").is_err());
        assert!(lines("head\nname\tx\t2\t3\t4\t5\t6\ttrue\n").is_err());
    }

    #[test]
    fn results_text_has_builds_side_by_side() {
        let machine = Machine {
            processor: "2× somebody's".to_owned(),
            kernel: "Linux".to_owned(),
            compiler: "rustc".to_owned(),
            commit: "abc".to_owned(),
            date: "2025-01-01".to_owned(),
        };
        let tables = [Build::Fat, Build::Size].map(|build| (build, lines(TSV).unwrap()));
        let curves = super::Curves {
            throughput: Vec::new(),
            growth: "a million: 2 ns".into(),
            threads: "| by | a | b |".into(),
            provision: "two threads: 1 s".into(),
        };
        let text = results_text(&machine, 21, &tables, Some(&curves)).unwrap();
        assert!(
            text.contains("a million: 2 ns") && text.contains("| by | a | b |\n\ntwo threads: 1 s")
        );
        assert!(text.contains(
            "| fast | 50.0 / 50.0 | 2.00 / 2.00 | 1.00 / 1.00 | 25.0 / 25.0 | 20 | 1.5 |"
        ));
        assert!(text.contains("| far | 50.0 / 50.0 | **9.00** / **9.00** | 1.00 / 1.00 | 5.60"));
        assert!(text.contains(
            "| slow | 25.0 µs / 25.0 µs | 20.0 µs / 20.0 µs | – / – | **1.25** / **1.25** | 2 | – |"
        ));
        let counts =
            "|---|---|---|---|---|\n| `fat` | 5 | 2 | 1 | 1 |\n| `size` | 5 | 2 | 1 | 1 |\n\n";
        assert!(text.contains(counts));

        let mut torn = tables;
        torn[1].1.pop();
        assert!(results_text(&machine, 21, &torn, None).is_err());
    }

    #[test]
    fn time_has_unit_by_magnitude() {
        assert_eq!(time(9999.0), "9999");
        assert_eq!(time(54_321.0), "54.3 µs");
        assert_eq!(time(2_500_000.0), "2.50 ms");
    }
}
