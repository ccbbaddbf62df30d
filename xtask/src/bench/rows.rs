//! `bench/rows.md`: each row in each calling context and build; and the misses, for RESULTS.md.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{bail, ensure, Context, Result};

use super::Build;

/// A row of one build: an operation in one calling context.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    /// The operation and the context.
    name: String,
    operation: String,
    /// Whether `--quick` measures it.
    pub(super) quick: bool,
    reference: f64,
    ours: f64,
    limit: Option<f64>,
    ratio: f64,
    /// The minimum of `ratio`.
    least_ratio: f64,
    /// The maximum of `ours`, as a factor of the limit, and whether it holds.
    near_limit: Option<(f64, bool)>,
    /// The reason if the row misses a criterion.
    reason: String,
}

impl Line {
    /// Returns whether this crate is slower than the reference, by more than the noise. README.md
    /// lists these rows, by the two digits of rows.md.
    pub(super) fn is_slower(&self) -> bool {
        (self.ratio * 100.0).round() < 97.0
    }

    /// Returns whether the ratio is below the figure of the row.
    pub(super) fn misses_ratio(&self) -> bool {
        self.ratio < self.least_ratio
    }

    pub(super) fn is_far(&self) -> bool {
        matches!(self.near_limit, Some((_, false)))
    }

    fn reason(&self) -> &str {
        if self.reason.is_empty() {
            NOT_EXPLAINED
        } else {
            &self.reason
        }
    }

    /// Returns the factor that criterion 2 compares, if the row has it: the time without 1 ns,
    /// divided by the limit.
    fn factor(&self) -> Option<f64> {
        self.near_limit?;
        self.limit.map(|limit| (self.ours - 1.0).max(0.0) / limit)
    }
}

/// The reason of a row that misses a criterion without one.
pub(super) const NOT_EXPLAINED: &str = "not explained";

/// The rows of each build.
pub(super) type Tables = [(Build, Vec<Line>)];

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
        let &[name, operation, quick, reference, ours, limit, ref criteria @ ..] =
            fields.as_slice()
        else {
            bail!("'{line}' does not have six fields");
        };
        let &[ratio, least_ratio, factor, holds, reason] = criteria else {
            bail!("'{line}' does not have five fields for the criteria");
        };
        let optional = |field: &str| -> Result<Option<f64>> {
            (!field.is_empty()).then(|| number(field)).transpose()
        };
        lines.push(Line {
            name: name.to_owned(),
            operation: operation.to_owned(),
            quick: quick == "true",
            reference: number(reference)?,
            ours: number(ours)?,
            limit: optional(limit)?,
            ratio: number(ratio)?,
            least_ratio: number(least_ratio)?,
            near_limit: optional(factor)?.map(|factor| (factor, holds == "true")),
            reason: reason.to_owned(),
        });
    }
    ensure!(!lines.is_empty(), "no rows");
    Ok(lines)
}

/// Returns the operations with a context that passes `test`, and all operations if it always does.
pub(super) fn operations(lines: &[Line], test: fn(&Line) -> bool) -> BTreeSet<&str> {
    lines
        .iter()
        .filter(|line| test(line))
        .map(|line| line.operation.as_str())
        .collect()
}

/// Returns a table of the operations that miss a criterion, by reason.
pub(super) fn misses(tables: &Tables) -> Result<String> {
    let mut reasons: BTreeMap<&str, (BTreeSet<&str>, Vec<BTreeSet<&str>>)> = BTreeMap::new();
    for (column, (_, lines)) in tables.iter().enumerate() {
        for line in lines
            .iter()
            .filter(|line| line.misses_ratio() || line.is_far())
        {
            let (all, builds) = reasons
                .entry(line.reason())
                .or_insert_with(|| (BTreeSet::new(), vec![BTreeSet::new(); tables.len()]));
            all.insert(&line.operation);
            builds
                .get_mut(column)
                .context("no such build")?
                .insert(&line.operation);
        }
    }
    if reasons.is_empty() {
        return Ok("No row misses a criterion.\n".to_owned());
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    // Stable: reasons for the same number of rows stay in order.
    reasons.sort_by_key(|(reason, (all, _))| (*reason == NOT_EXPLAINED, Reverse(all.len())));
    let names: Vec<_> = tables.iter().map(|(build, _)| build.name()).collect();
    let mut text = format!(
        "| the reason | {} | the rows |\n|---|{}---|\n",
        names.join(" | "),
        "---|".repeat(names.len())
    );
    for (reason, (all, builds)) in reasons {
        let counts: Vec<_> = builds.iter().map(|rows| rows.len().to_string()).collect();
        let all: Vec<_> = all.into_iter().collect();
        writeln!(
            text,
            "| {reason} | {} | {} |",
            counts.join(" | "),
            all.join("; ")
        )?;
    }
    Ok(text)
}

/// Returns a table of the rows of `--quick`: the times of the first context, and the worst figures
/// of all contexts.
pub(super) fn quick_rows(tables: &Tables) -> Result<String> {
    let mut text = String::from(
        "| operation | reference, ns | ours, ns | limit, ns | ratio, at least | \
         × limit, at most |\n\
         |---|---|---|---|---|---|\n",
    );
    let (_, first) = tables.first().context("no build")?;
    let mut done = BTreeSet::new();
    for row in first.iter().filter(|line| line.quick) {
        if !done.insert(&row.operation) {
            continue;
        }
        let mut cells: [Vec<String>; 5] = Default::default();
        for (build, lines) in tables {
            let contexts = || lines.iter().filter(|line| line.operation == row.operation);
            let plain = contexts()
                .find(|line| line.name == row.name)
                .with_context(|| missing(*build, &row.name))?;
            let ratio = contexts().map(|line| line.ratio).fold(f64::MAX, f64::min);
            let factor = contexts().filter_map(Line::factor).reduce(f64::max);
            let values = [
                time(plain.reference),
                time(plain.ours),
                plain.limit.map_or_else(dash, time),
                bold_if(contexts().any(Line::misses_ratio), digits(ratio)),
                bold_if(
                    contexts().any(Line::is_far),
                    factor.map_or_else(dash, digits),
                ),
            ];
            for (cell, value) in cells.iter_mut().zip(values) {
                cell.push(value);
            }
        }
        let cells = cells.map(|cell| cell.join(" / "));
        writeln!(text, "| {} | {} |", row.operation, cells.join(" | "))?;
    }
    Ok(text)
}

/// Returns the table of all rows, in each context.
pub(super) fn all_rows(tables: &Tables) -> Result<String> {
    let mut text = String::from(
        "| operation | reference, ns | ours, ns | limit, ns | ratio | 1: at least | 2: at most |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let (_, first) = tables.first().context("no build")?;
    for row in first {
        let mut cells: [Vec<String>; 4] = Default::default();
        for (build, lines) in tables {
            let line = lines
                .iter()
                .find(|line| line.name == row.name)
                .with_context(|| missing(*build, &row.name))?;
            let values = [
                time(line.reference),
                bold_if(line.is_far(), time(line.ours)),
                line.limit.map_or_else(dash, time),
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
            row.name,
            cells.join(" | "),
            row.least_ratio,
            factor.as_deref().unwrap_or("–")
        )?;
    }
    Ok(text)
}

fn missing(build: Build, name: &str) -> String {
    format!("the build `{}` has no row '{name}'", build.name())
}

fn dash() -> String {
    "–".to_owned()
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
pub(super) mod tests {
    use super::{all_rows, lines, misses, operations, quick_rows, time, Build, Line};

    pub(in super::super) const TSV: &str =
        "name\toperation\tquick\treference\tours\tlimit\tratio\tleast_ratio\tlimit_factor\tlimit_holds\treason\n\
         fast\tfast\ttrue\t50.0\t2.0\t1.0\t25.0\t20\t1.5\ttrue\tnever shown\n\
         fast, boxed closure\tfast\ttrue\t50.0\t9.0\t1.0\t5.6\t0.97\t1.5\tfalse\tboxes\n\
         slow\tslow\tfalse\t25000.0\t20000.0\t\t1.25\t2\t\t\tboxes\n\
         lost\tlost\tfalse\t50.0\t60.0\t\t0.83\t0.8\t\t\t\n\
         lost by half\tlost by half\tfalse\t50.0\t99.0\t\t0.5\t0.6\t\t\t\n";

    #[test]
    fn lines_of_table_have_all_fields() {
        let lines = lines(TSV).unwrap();
        assert_eq!(lines.len(), 5);
        assert_eq!((lines[0].ours, lines[0].limit), (2.0, Some(1.0)));
        assert_eq!(lines[0].near_limit, Some((1.5, true)));
        assert_eq!(lines[1].operation, "fast");
        assert!(!lines[0].misses_ratio() && !lines[0].is_far());
        assert!(!lines[1].misses_ratio() && lines[1].is_far());
        assert_eq!((lines[2].limit, lines[2].near_limit), (None, None));
        assert!(lines[2].misses_ratio() && !lines[2].is_far());
        let slower: Vec<_> = lines.iter().map(Line::is_slower).collect();
        assert_eq!(slower, [false, false, false, true, true]);
        assert_eq!(operations(&lines, |_| true).len(), 4);
    }

    #[test]
    fn lines_of_malformed_table_returns_error() {
        assert!(lines("name\n").is_err());
        assert!(lines("head\nname\t1\t2\n").is_err());
        assert!(lines("head\nname\tname\ttrue\tx\t2\t3\t4\t5\t6\ttrue\t\n").is_err());
    }

    #[test]
    fn misses_are_counted_by_reason_and_unexplained_ones_are_last() {
        let mut tables = [Build::Fat, Build::Size].map(|build| (build, lines(TSV).unwrap()));
        let slow = tables[1].1.iter_mut().find(|line| line.name == "slow");
        slow.unwrap().ratio = 3.0;
        let text = misses(&tables).unwrap();
        let rows: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| boxes | 2 | 1 | fast; slow |",
                "| not explained | 1 | 1 | lost by half |"
            ]
        );
    }

    #[test]
    fn quick_rows_have_times_of_the_loop_and_worst_figures() {
        let tables = [(Build::Fat, lines(TSV).unwrap())];
        let text = quick_rows(&tables).unwrap();
        let rows: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(rows, ["| fast | 50.0 | 2.00 | 1.00 | 5.60 | **8.00** |"]);
    }

    #[test]
    fn all_rows_has_builds_side_by_side() {
        let tables = [Build::Fat, Build::Size].map(|build| (build, lines(TSV).unwrap()));
        let text = all_rows(&tables).unwrap();
        assert!(text.contains(
            "| fast | 50.0 / 50.0 | 2.00 / 2.00 | 1.00 / 1.00 | 25.0 / 25.0 | 20 | 1.5 |"
        ));
        assert!(text.contains("| fast, boxed closure | 50.0 / 50.0 | **9.00** / **9.00** |"));
        assert!(text.contains(
            "| slow | 25.0 µs / 25.0 µs | 20.0 µs / 20.0 µs | – / – | **1.25** / **1.25** | 2 | – |"
        ));
        let mut torn = tables;
        torn[1].1.pop();
        assert!(all_rows(&torn).is_err());
    }

    #[test]
    fn time_has_unit_by_magnitude() {
        assert_eq!(time(9999.0), "9999");
        assert_eq!(time(54_321.0), "54.3 µs");
        assert_eq!(time(2_500_000.0), "2.50 ms");
    }
}
