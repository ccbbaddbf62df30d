//! The table of copies that are slower than `memcpy`, for RESULTS.md.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{bail, Context, Result};

use super::Build;

/// The share of `memcpy`'s speed that each copy should reach.
const FLOOR: f64 = 0.85;

/// The copies in one build.
pub(super) struct Throughput {
    /// The last line of the program's output.
    pub(super) verdict: String,
    pub(super) points: Vec<Point>,
}

/// The length of a copy, and the offsets of the guest's and the host's bytes from a cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    bytes: u64,
    guest: u64,
    host: u64,
}

/// A copy, and its speed as a share of `memcpy`'s.
pub(super) type Point = (Place, f64);

/// Reads the file that the program writes for `--throughput` and `--tsv`.
pub(super) fn points(text: &str) -> Result<Vec<Point>> {
    let number = |field: &str| -> Result<u64> {
        field
            .parse()
            .with_context(|| format!("'{field}' is not a number"))
    };
    let mut points = Vec::new();
    for line in text.lines().skip(1) {
        let fields: Vec<_> = line.split('\t').collect();
        let &[bytes, guest, host, part] = fields.as_slice() else {
            bail!("'{line}' does not have four fields");
        };
        let place = Place {
            bytes: number(bytes)?,
            guest: number(guest)?,
            host: number(host)?,
        };
        let part = part
            .parse()
            .with_context(|| format!("'{part}' is not a number"))?;
        points.push((place, part));
    }
    if points.is_empty() {
        bail!("no copies");
    }
    Ok(points)
}

/// Returns a table of all builds with the copies that are below the floor in one of them.
pub(super) fn short_copies(builds: &[(Build, Throughput)]) -> Result<String> {
    let mut places: BTreeMap<Place, Vec<Option<f64>>> = BTreeMap::new();
    for (column, (_, throughput)) in builds.iter().enumerate() {
        for (place, part) in &throughput.points {
            let parts = places
                .entry(*place)
                .or_insert_with(|| vec![None; builds.len()]);
            *parts.get_mut(column).context("no such column")? = Some(*part);
        }
    }
    places.retain(|_, parts| parts.iter().flatten().any(|part| *part < FLOOR));
    if places.is_empty() {
        return Ok(format!(
            "No copy is below {FLOOR} of the speed of `memcpy`.\n"
        ));
    }
    let names: Vec<_> = builds.iter().map(|(build, _)| build.name()).collect();
    let mut text = format!(
        "Copies below {FLOOR} of the speed of `memcpy` (**bold**) in one of the builds. The columns guest\n\
         and host are offsets from a cache line in bytes.\n\n\
         | bytes | guest | host | {} |\n|---|---|---|{}\n",
        names.join(" | "),
        "---|".repeat(names.len())
    );
    for (place, parts) in places {
        let cells: Vec<_> = parts
            .into_iter()
            .map(|part| match part {
                None => "–".to_owned(),
                Some(part) if part < FLOOR => format!("**{part:.2}**"),
                Some(part) => format!("{part:.2}"),
            })
            .collect();
        let Place { bytes, guest, host } = place;
        writeln!(
            text,
            "| {bytes} | {guest} | {host} | {} |",
            cells.join(" | ")
        )?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::{points, short_copies, Build, Throughput};

    fn throughput(tsv: &str) -> Throughput {
        Throughput {
            verdict: "median 1.0".to_owned(),
            points: points(tsv).unwrap(),
        }
    }

    #[test]
    fn short_copies_lists_all_builds_of_a_slow_copy() {
        let head = "bytes\tguest\thost\tpart\n";
        let fat = throughput(&format!(
            "{head}64\t0\t0\t0.8449\n128\t0\t3\t0.99\n48\t0\t0\t0.95\n"
        ));
        let size = throughput(&format!(
            "{head}64\t0\t0\t1.01\n128\t0\t3\t0.9\n48\t0\t0\t0.5\n"
        ));
        let text = short_copies(&[(Build::Fat, fat), (Build::Size, size)]).unwrap();
        let rows: Vec<_> = text.lines().skip(3).collect();
        assert_eq!(
            rows,
            [
                "| bytes | guest | host | fat | size |",
                "|---|---|---|---|---|",
                "| 48 | 0 | 0 | 0.95 | **0.50** |",
                "| 64 | 0 | 0 | **0.84** | 1.01 |",
            ]
        );
        let good = throughput(&format!("{head}64\t0\t0\t0.85\n"));
        let text = short_copies(&[(Build::Fat, good)]).unwrap();
        assert_eq!(text, "No copy is below 0.85 of the speed of `memcpy`.\n");
    }

    #[test]
    fn points_of_malformed_table_returns_error() {
        assert!(points("head\n").is_err());
        assert!(points("head\n1\t2\t3\n").is_err());
        assert!(points("head\n1\t2\t3\tfast\n").is_err());
        assert!(points("head\n-1\t2\t3\t0.5\n").is_err());
    }
}
