//! Copies, compared with `memcpy`: by class for RESULTS.md, and the slow ones for rows.md.

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

/// The classes of lengths: the name, and the length at which it ends.
const CLASSES: [(&str, u64); 5] = [
    ("1 to 32 B", 48),
    ("48 to 512 B", 768),
    ("768 B to 16 KiB", 24 << 10),
    ("24 KiB to 1 MiB", 3 << 19),
    ("1.5 to 16 MiB", u64::MAX),
];

/// The classes of alignments, by whether the guest's and the host's bytes begin at a cache line.
const ALIGNMENTS: [(&str, bool, bool); 4] = [
    ("both aligned", true, true),
    ("guest misaligned", false, true),
    ("host misaligned", true, false),
    ("both misaligned", false, false),
];

/// Returns the medians of all builds by class of length and alignment.
pub(super) fn copies_by_class(builds: &[(Build, Throughput)]) -> Result<String> {
    let mut text = String::new();
    for (build, throughput) in builds {
        let verdict = &throughput.verdict;
        writeln!(
            text,
            "- `{}`: copies of 1 B to 16 MiB, {verdict}",
            build.name()
        )?;
    }
    let names: Vec<_> = builds.iter().map(|(build, _)| build.name()).collect();
    write!(
        text,
        "\nThe speed as a share of `memcpy`'s, medians of each class, in the builds {}.\n\
         **Bold** medians are below {FLOOR}. Misaligned bytes begin 3 or 5 bytes after a cache line.\n\n\
         | length |",
        names.join(" / ")
    )?;
    for (name, ..) in ALIGNMENTS {
        write!(text, " {name} |")?;
    }
    writeln!(text, "\n|---|{}", "---|".repeat(ALIGNMENTS.len()))?;
    let mut start = 0;
    for (name, end) in CLASSES {
        write!(text, "| {name} |")?;
        for (_, guest, host) in ALIGNMENTS {
            let cells: Vec<_> = builds
                .iter()
                .map(|(_, throughput)| {
                    let parts = throughput.points.iter().filter(|(place, _)| {
                        (start..end).contains(&place.bytes)
                            && (place.guest == 0) == guest
                            && (place.host == 0) == host
                    });
                    share(median(parts.map(|(_, part)| *part).collect()))
                })
                .collect();
            write!(text, " {} |", cells.join(" / "))?;
        }
        text.push('\n');
        start = end;
    }
    Ok(text)
}

/// Formats a share of `memcpy`'s speed, in bold if it is below the floor.
fn share(part: Option<f64>) -> String {
    match part {
        None => "–".to_owned(),
        Some(part) if part < FLOOR => format!("**{part:.2}**"),
        Some(part) => format!("{part:.2}"),
    }
}

/// Returns the median, or the higher of the two in the middle.
fn median(mut parts: Vec<f64>) -> Option<f64> {
    parts.sort_by(f64::total_cmp);
    parts.get(parts.len() / 2).copied()
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
        let cells: Vec<_> = parts.into_iter().map(share).collect();
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
    use super::{copies_by_class, points, short_copies, Build, Throughput};

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
    fn copies_by_class_has_medians_of_builds_and_alignments() {
        let head = "bytes\tguest\thost\tpart\n";
        let fat = throughput(&format!(
            "{head}32\t0\t0\t0.9\n1\t0\t0\t0.5\n2\t0\t0\t0.8\n48\t3\t5\t1.1\n16777216\t0\t3\t1.0\n"
        ));
        let size = throughput(&format!("{head}8\t0\t0\t0.95\n48\t3\t0\t0.7\n"));
        let text = copies_by_class(&[(Build::Fat, fat), (Build::Size, size)]).unwrap();
        assert!(text.starts_with("- `fat`: copies of 1 B to 16 MiB, median 1.0\n- `size`:"));
        let rows: Vec<_> = text.lines().rev().take(5).collect();
        assert_eq!(
            rows[4],
            "| 1 to 32 B | **0.80** / 0.95 | – / – | – / – | – / – |"
        );
        assert_eq!(
            rows[3],
            "| 48 to 512 B | – / – | – / **0.70** | – / – | 1.10 / – |"
        );
        assert_eq!(
            rows[0],
            "| 1.5 to 16 MiB | – / – | – / – | 1.00 / – | – / – |"
        );
    }

    #[test]
    fn points_of_malformed_table_returns_error() {
        assert!(points("head\n").is_err());
        assert!(points("head\n1\t2\t3\n").is_err());
        assert!(points("head\n1\t2\t3\tfast\n").is_err());
        assert!(points("head\n-1\t2\t3\t0.5\n").is_err());
    }
}
