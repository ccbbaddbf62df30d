//! `bench/RESULTS.md`: one page about the last run. `bench/rows.md` has its rows.

use std::fmt::Write as _;

use anyhow::Result;

use super::machine::Machine;
use super::rows::{all_rows, misses, operations, quick_rows, Line, Tables};
use super::throughput::{copies_by_class, short_copies, Throughput};
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

/// A whole run.
pub(super) struct Run<'a> {
    pub(super) machine: &'a Machine,
    pub(super) rounds: u32,
    pub(super) tables: &'a Tables,
    pub(super) curves: &'a Curves,
}

/// The part of RESULTS.md that explains the criteria.
const CRITERIA: &str = "\
The reference is 0.18.0. The limit is a bounds check on a flat array and one access, or `memcpy`.
With several regions, it is also a binary search for the region. Each row has two criteria, in every
build. Its calling contexts are a plain loop, a boxed closure, or a device that is generic over its
handle to the memory. A row misses a criterion if it does so in any of them. A plain loop and a
boxed closure have a limit in the same context.

1. The ratio, reference ÷ ours, is at least 0.97, or the figure of the row. A figure above 1 keeps
   the gain of a design: a row can miss it and still be faster than the reference.
2. The time of this crate is at most 1.5 × limit + 1 ns, or another factor for the row. A row
   without a limit has only criterion 1.

[rows.md](rows.md) has each row in each context with its figures, and the slow copies.
`bench/src/rows.rs` gives the reasons for the figures.

";

impl Run<'_> {
    /// Returns the text of RESULTS.md.
    pub(super) fn results(&self) -> Result<String> {
        let Self {
            machine,
            rounds,
            tables,
            curves,
        } = self;
        let mut text = String::from("# The last run of `cargo xtask bench`\n\n");
        writeln!(text, "- Machine: {}, {}", machine.processor, machine.kernel)?;
        writeln!(text, "- Compiler: {}", machine.compiler)?;
        writeln!(text, "- Commit: {}", machine.commit)?;
        writeln!(text, "- Date: {}", machine.date)?;
        writeln!(
            text,
            "- {rounds} rounds, interleaved (reference, ours, limit) in one binary; medians. The time is the\n  \
             processor time of the thread; that of harvests is wall-clock time. The ratio is the median of\n  \
             reference ÷ ours in each round.\n"
        )?;
        text.push_str(CRITERIA);
        text.push_str(
            "| build | rows | slower than the other side (ratio below 0.97) | miss criterion 1 | miss criterion 2 |\n\
             |---|---|---|---|---|\n",
        );
        for (build, lines) in *tables {
            let count = |test| operations(lines, test).len();
            writeln!(
                text,
                "| `{}` | {} | {} | {} | {} |",
                build.name(),
                count(|_| true),
                count(Line::is_slower),
                count(Line::misses_ratio),
                count(Line::is_far),
            )?;
        }
        write!(
            text,
            "\n## Rows that miss a criterion\n\nThe number of rows in each build, by reason. The decisions are in\n\
             [docs/decisions](../docs/decisions/README.md).\n\n{}",
            misses(tables)?
        )?;
        write!(
            text,
            "\n## The rows of `--quick`\n\n\
             Times are ns per operation in a plain loop unless a cell has a unit, in the builds\n\
             fat / release / size. The last columns have the worst calling context; **bold** figures miss\n\
             their criterion. \"× limit\" is the time of this crate without 1 ns, divided by the limit.\n\n{}",
            quick_rows(tables)?
        )?;
        write!(
            text,
            "\n## Threads\n\n{}\n\n\
             [many-cores.md](many-cores.md) has this table for a machine with 16 processors.\n",
            curves.threads.trim()
        )?;
        write!(text, "\n## Provisioning\n\n{}\n", curves.provision.trim())?;
        write!(text, "\n## IOTLB\n\n{}\n", curves.growth.trim())?;
        write!(
            text,
            "\n## Copies\n\n{}",
            copies_by_class(&curves.throughput)?
        )?;
        Ok(text)
    }

    /// Returns the text of rows.md.
    pub(super) fn rows(&self) -> Result<String> {
        let mut text = format!(
            "# The rows of the last run of `cargo xtask bench`\n\n\
             [RESULTS.md](RESULTS.md) describes the run, at commit {}. Times are ns per operation unless a\n\
             cell has a unit, in the builds fat / release / size. **Bold** ratios miss criterion 1, **bold**\n\
             times of this crate miss criterion 2.\n\n",
            self.machine.commit
        );
        text.push_str(&all_rows(self.tables)?);
        text.push_str("\n## Slow copies\n\n");
        text.push_str(&short_copies(&self.curves.throughput)?);
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::lines;
    use super::super::rows::tests::TSV;
    use super::super::throughput::{points, Throughput};
    use super::{Build, Curves, Machine, Run};

    #[test]
    fn results_are_one_page_and_rows_are_beside_it() {
        let machine = Machine {
            processor: "2× somebody's".to_owned(),
            kernel: "Linux".to_owned(),
            compiler: "rustc".to_owned(),
            commit: "abc".to_owned(),
            date: "2025-01-01".to_owned(),
        };
        let tables = [Build::Fat, Build::Size].map(|build| (build, lines(TSV).unwrap()));
        let throughput = Throughput {
            verdict: "median 1.0".to_owned(),
            points: points("head\n64\t0\t0\t0.5\n").unwrap(),
        };
        let curves = Curves {
            throughput: vec![(Build::Fat, throughput)],
            growth: "a million: 2 ns".into(),
            threads: "| by | a | b |".into(),
            provision: "two threads: 1 s".into(),
        };
        let run = Run {
            machine: &machine,
            rounds: 21,
            tables: &tables,
            curves: &curves,
        };
        let text = run.results().unwrap();
        for part in [
            "|---|---|---|---|---|\n| `fat` | 4 | 2 | 2 | 1 |\n| `size` | 4 | 2 | 2 | 1 |\n\n",
            "| boxes | 2 | 2 | fast; slow |\n| not explained | 1 | 1 | lost by half |\n",
            "| fast | 50.0 / 50.0 | 2.00 / 2.00 | 1.00 / 1.00 | 5.60 / 5.60 | **8.00** / **8.00** |",
            "a million: 2 ns",
            "| by | a | b |",
            "two threads: 1 s",
            "median 1.0",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(!text.contains("never shown"), "{text}");
        let rows = run.rows().unwrap();
        assert!(rows.contains("| slow | 25.0 µs / 25.0 µs |"), "{rows}");
        assert!(rows.contains("| 64 | 0 | 0 | **0.50** |"), "{rows}");
    }
}
