//! `cargo xtask readme`: the tables of `README.md` with figures of `bench/rows.md`.
//!
//! `cargo xtask bench` writes both files. CI runs this command with `--check`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// The options of `cargo xtask readme`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fail if the tables differ from bench/rows.md, and write nothing
    #[arg(long)]
    check: bool,
}

/// The rows of the first table: their descriptions, and their names in `bench/rows.md`.
const CHOSEN: [(&str, &str); 10] = [
    ("`read_obj::<u64>`, one region", "read_obj.u64, n=1"),
    ("`read_obj::<u64>`, 1024 regions", "read_obj.u64, n=1024"),
    (
        "`write_obj::<u64>`, with a dirty bitmap",
        "write_obj.u64, n=1, AtomicBitmap",
    ),
    ("`write_slice` of 4 KiB", "write_slice, 04K, n=1"),
    (
        "marking 1 GiB that is dirty already",
        "mark_dirty, 1G, already",
    ),
    ("harvest of 1 TiB, 0.001 % dirty", "harvest, 1T, 0.001%"),
    (
        "IOTLB hit, 10 000 mappings",
        "Iotlb::lookup of 8 B hit, n=10000, fragmented",
    ),
    (
        "virtio-queue `add_used`",
        "virtio-queue 0.18: add_used, n=1",
    ),
    (
        "adding a used element by a `Window`, against `add_used` of 0.18.0",
        "Window: add_used",
    ),
    (
        "virtio-blk request of 4 KiB",
        "virtio-queue 0.18: blk4k(per req), n=1",
    ),
];

/// Descriptions of rows in the table of slower operations. Other rows have their names.
const SLOWER: [(&str, &str); 6] = [
    (
        "`get_and_reset` of 64 GiB, 10 % dirty",
        "get_and_reset, 64G, 10%",
    ),
    (
        "`get_and_reset` of 64 GiB, half of it dirty",
        "get_and_reset, 64G, half",
    ),
    (
        "remapping a page of a `SharedIotlb`",
        "SharedIotlb: remap a page, n=10000",
    ),
    (
        "remapping a page of a `SharedIotlb` while 4 snapshots are held",
        "SharedIotlb: remap a page, n=10000, 4 snapshots held",
    ),
    (
        "remapping a page of a `SharedIotlb` while 32 snapshots are held",
        "SharedIotlb: remap a page, n=10000, 32 snapshots held",
    ),
    (
        "a vectored read of 64 KiB over eight regions",
        "vectored: 64 KiB over eight regions, against preadv(2)",
    ),
];

/// The line after a table.
const END: &str = "<!-- end of the table -->";

/// Compares the tables, or writes them.
///
/// # Errors
///
/// Returns an error if a file cannot be read or written, `README.md` has no place for a table, or
/// `bench/rows.md` lacks a row of it.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let changed = update(&workspace.root, args.check)?;
    if changed && args.check {
        println!("README.md differs from bench/rows.md; run `cargo xtask readme`");
        return Ok(false);
    }
    Ok(true)
}

/// Writes the tables, unless this is only a check. Returns whether they differed.
///
/// # Errors
///
/// See [`run`].
pub fn update(root: &Path, check: bool) -> Result<bool> {
    let read = |file: &str| fs::read_to_string(root.join(file)).context(file.to_owned());
    let old = read("README.md")?;
    let new = with_tables(&old, &rows(&read("bench/rows.md")?)?)?;
    if new != old && !check {
        fs::write(root.join("README.md"), &new).context("cannot write README.md")?;
        println!("written: README.md");
    }
    Ok(new != old)
}

/// A row of `bench/rows.md`, with a figure for each of the builds fat, release and size.
struct Row<'text> {
    name: &'text str,
    reference: [&'text str; 3],
    ours: [&'text str; 3],
    ratio: [&'text str; 3],
}

impl Row<'_> {
    /// Returns whether this crate is slower in a build, by more than the noise.
    fn is_slower(&self) -> bool {
        let slower = |ratio: &&str| ratio.parse().is_ok_and(|ratio: f64| ratio < 0.97);
        self.ratio.iter().any(slower)
    }
}

/// Returns the rows of the first table of `bench/rows.md`.
fn rows(text: &str) -> Result<Vec<Row<'_>>> {
    let lines = text.lines().skip_while(|line| !line.starts_with("|---"));
    lines
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .map(|line| row(line).with_context(|| format!("bench/rows.md: '{line}' is not a row")))
        .collect()
}

fn row(line: &str) -> Option<Row<'_>> {
    let mut cells = line.strip_prefix("| ")?.split(" | ");
    let name = cells.next()?;
    let mut figures = || -> Option<[&str; 3]> {
        let parts = cells.next()?.split(" / ");
        let parts = parts.map(|part| part.trim_matches('*'));
        parts.collect::<Vec<_>>().try_into().ok()
    };
    let (reference, ours) = (figures()?, figures()?);
    let _limit = figures()?;
    Some(Row {
        name,
        reference,
        ours,
        ratio: figures()?,
    })
}

fn with_tables(readme: &str, rows: &[Row<'_>]) -> Result<String> {
    let readme = replace(readme, "chosen rows", &chosen(rows)?)?;
    replace(&readme, "slower rows", &slower(rows)?)
}

/// Replaces the table after the comment that names it.
fn replace(readme: &str, name: &str, table: &str) -> Result<String> {
    let start = format!("<!-- {name} of bench/rows.md, by `cargo xtask readme` -->");
    let missing = || format!("README.md has no table between '{start}' and '{END}'");
    let (before, rest) = readme.split_once(&start).with_context(missing)?;
    let (_, after) = rest.split_once(END).with_context(missing)?;
    Ok(format!("{before}{start}\n\n{table}\n{END}{after}"))
}

fn chosen(rows: &[Row<'_>]) -> Result<String> {
    let mut table = String::from(
        "| operation | `fat`: 0.18.0 | this crate | `release`: 0.18.0 | this crate |\n\
         |---|---|---|---|---|\n",
    );
    for (description, name) in CHOSEN {
        let Row {
            reference, ours, ..
        } = rows
            .iter()
            .find(|row| row.name == name)
            .with_context(|| format!("bench/rows.md has no row '{name}'"))?;
        let ([fat, release, _], [our_fat, our_release, _]) = (reference, ours);
        let cells = with_units([fat, our_fat, release, our_release]);
        writeln!(table, "| {description} | {} |", cells.join(" | "))?;
    }
    Ok(table)
}

/// Adds `ns` to the cells without a unit if another cell has one.
fn with_units(cells: [&str; 4]) -> [String; 4] {
    let has_unit = |cell: &str| cell.contains(' ');
    let is_mixed = cells.into_iter().any(has_unit);
    cells.map(|cell| {
        if is_mixed && cell.parse::<f64>().is_ok() {
            format!("{cell} ns")
        } else {
            cell.to_owned()
        }
    })
}

fn slower(rows: &[Row<'_>]) -> Result<String> {
    let mut table = String::from("| operation | `fat` | `release` | `size` |\n|---|---|---|---|\n");
    for Row { name, ratio, .. } in rows.iter().filter(|row| row.is_slower()) {
        let description = match SLOWER.iter().find(|(_, slower)| slower == name) {
            Some((description, _)) => (*description).to_owned(),
            None => format!("`{name}`"),
        };
        writeln!(table, "| {description} | {} |", ratio.join(" | "))?;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "# Rows\n\n| operation | reference, ns | ours, ns | limit, ns | ratio | 1 | 2 |\n\
                        |---|---|---|---|---|---|---|\n";

    /// Returns `bench/rows.md` with the rows of the first table, and `others`.
    fn rows_with(others: &str) -> String {
        let row = |(_, name)| {
            format!("| {name} | 9 / 10 µs / 11 | 1 / **2** / 3 | – / – / – | 9.00 / 5.00 / **3.66** | 4 | – |\n")
        };
        let chosen: String = CHOSEN.into_iter().map(row).collect();
        format!("{HEAD}{chosen}{others}\n| other | table |\n|---|---|\n| a | b |\n")
    }

    fn readme(chosen: &str, slower: &str) -> String {
        let start = |name| format!("<!-- {name} of bench/rows.md, by `cargo xtask readme` -->");
        format!(
            "# Name\n\n{}{chosen}{END}\n\nText\n\n{}{slower}{END}\n\nEnd\n",
            start("chosen rows"),
            start("slower rows")
        )
    }

    #[test]
    fn with_tables_replaces_both_tables_and_keeps_the_rest() {
        let text = rows_with(
            "| get_and_reset, 64G, half | 1 / 1 / 1 | 1 / 1 / 1 | – / – / – | 1.00 / **0.96** / 1.10 | 1 | 2 |\n\
             | unknown | 1 / 1 / 1 | 1 / 1 / 1 | – / – / – | 0.97 / 0.97 / 0.50 | 1 | 2 |\n\
             | equal | 1 / 1 / 1 | 1 / 1 / 1 | – / – / – | 0.97 / 0.97 / 0.97 | 1 | 2 |\n",
        );
        let rows = rows(&text).unwrap();
        assert_eq!(rows.len(), CHOSEN.len() + 3);
        let new = with_tables(&readme("old", "old"), &rows).unwrap();
        let first = "| `read_obj::<u64>`, one region | 9 ns | 1 ns | 10 µs | 2 ns |\n";
        assert!(new.contains(first), "{new}");
        let slower = "\n\n| operation | `fat` | `release` | `size` |\n|---|---|---|---|\n\
                      | `get_and_reset` of 64 GiB, half of it dirty | 1.00 | 0.96 | 1.10 |\n\
                      | `unknown` | 0.97 | 0.97 | 0.50 |\n\n";
        assert!(new.contains(&format!("-->{slower}{END}")), "{new}");
        assert!(
            new.starts_with("# Name\n\n<!--") && new.ends_with("\n\nEnd\n"),
            "{new}"
        );
        assert!(!new.contains("old"));
        assert_eq!(with_tables(&new, &rows).unwrap(), new);
    }

    #[test]
    fn with_units_without_any_unit_changes_no_cell() {
        assert_eq!(with_units(["9", "1", "8", "–"]), ["9", "1", "8", "–"]);
        assert_eq!(
            with_units(["9 µs", "1", "8", "–"]),
            ["9 µs", "1 ns", "8 ns", "–"]
        );
    }

    #[test]
    fn with_tables_without_row_or_place_returns_error() {
        let text = rows_with("");
        let all = rows(&text).unwrap();
        assert!(with_tables("# Name\n", &all).is_err());
        assert!(with_tables(&readme("", ""), &all[1..]).is_err());
        assert!(rows(&format!("{HEAD}| name | 1 / 2 |\n")).is_err());
    }

    #[test]
    fn update_of_this_checkout_changes_nothing() {
        let root = Workspace::find().unwrap().root;
        assert!(!update(&root, true).unwrap());
    }
}
