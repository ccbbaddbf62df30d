//! The suite of Windows: programs of `x86_64-pc-windows-gnu` under Wine, and checks for
//! `x86_64-pc-windows-msvc`.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{ensure, Context, Result};

use super::harness::{add_library, without_library, Harness};
use super::suites::{native, Compiler, Suite};
use super::wine::Wine;
use crate::changelog::{describe_in_json, public_names, MARK, NAMES};

/// The comparison with vm-memory 0.18.0.
const DIFFERENTIAL: &str = "verify/windows-differential/Cargo.toml";

/// The packages whose tests run.
const PACKAGES: &[&str] = &["vm-memory", "vm-memory-host"];

/// The features that do not exist on Windows. The first one is a default.
const NOT_ON_WINDOWS: &[&str] = &["rawfd"];

/// The tests that CI runs: those of the units, and those of what differs between systems.
const CI_TESTS: &[&str] = &[
    "--lib",
    "--test=exceptions",
    "--test=fault_handler_alone",
    "--test=file_views_b13",
    "--test=libkrun_calls",
    "--test=plugged_blocks",
    "--test=threads",
    "--test=windows",
    "--test=windows_arena",
    "--test=windows_without_fault_handler",
];

/// The tests of Wine 10, by package: those of placeholders, mappings and faults, and the units of
/// `vm-memory-host`.
const WINE_10_TESTS: &[(&str, &[&str])] = &[
    (
        "vm-memory",
        &[
            "--test=exceptions",
            "--test=fault_handler_alone",
            "--test=file_views_b13",
            "--test=placeholders",
            "--test=plugged_blocks",
        ],
    ),
    ("vm-memory-host", &["--lib", "--test=windows_arena"]),
];

/// Runs the tests that the system can break.
pub(super) fn tests_of_ci(harness: &Harness, suite: &Suite) -> Result<String> {
    tests(harness, suite, PACKAGES, CI_TESTS)
}

/// Runs all tests of the packages.
pub(super) fn all_tests(harness: &Harness, suite: &Suite) -> Result<String> {
    tests(harness, suite, PACKAGES, &["--lib", "--tests"])
}

/// Runs the tests of the library's documentation.
pub(super) fn doc_tests(harness: &Harness, suite: &Suite) -> Result<String> {
    tests(harness, suite, &["vm-memory"], &["--doc"])
}

fn tests(harness: &Harness, suite: &Suite, packages: &[&str], selected: &[&str]) -> Result<String> {
    let wine = Wine::installed(&harness.folder)?;
    let mut command = harness.test_of(&suite.platform, packages, NOT_ON_WINDOWS);
    command.args(selected);
    wine.runs(&mut command, suite.platform.target);
    harness.count(suite.name, command)
}

/// Runs the tests that need a newer system than Wine 8. None of them may be skipped.
pub(super) fn tests_of_wine_10(harness: &Harness, suite: &Suite) -> Result<String> {
    let wine = match Wine::of_debian_13(&harness.root, &harness.folder) {
        Ok(wine) => wine,
        // Without root or a network.
        Err(error) => return Ok(format!("SKIPPED: {}: no Wine 10: {error:#}", suite.title)),
    };
    let mut results = Vec::new();
    for (package, selected) in WINE_10_TESTS {
        let mut command = harness.test_of(&suite.platform, &[package], NOT_ON_WINDOWS);
        command.args(*selected);
        wine.runs(&mut command, suite.platform.target);
        let log = format!("{}-{package}", suite.name);
        let counts = harness.count(&log, command)?;
        let skipped = harness.skipped(&log)?;
        ensure!(skipped.is_empty(), "skipped under Wine 10: {skipped:?}");
        results.push(format!("{package}: {counts}"));
    }
    Ok(results.join("; "))
}

/// Compares mappings and accesses with those of vm-memory 0.18.0.
pub(super) fn differential(harness: &Harness, suite: &Suite) -> Result<String> {
    let wine = Wine::installed(&harness.folder)?;
    let mut command = harness.cargo(&suite.platform, "test");
    command.args(["--manifest-path", DIFFERENTIAL]);
    wine.runs(&mut command, suite.platform.target);
    let counts = harness.count("windows-differential", command)?;
    Ok(format!("compared with vm-memory 0.18.0: {counts}"))
}

/// Checks that each public name of 0.18.0 on Windows exists, and calls what has these names.
pub(super) fn interface(harness: &Harness, suite: &Suite) -> Result<String> {
    let file = harness.root.join(NAMES);
    let known =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut command = harness.cargo(&suite.platform, "rustdoc");
    harness.select(&mut command, &["vm-memory"], NOT_ON_WINDOWS);
    harness.log(
        "windows-names",
        describe_in_json(&mut command, &harness.root),
    )?;
    let described = harness
        .folder
        .join(suite.platform.target)
        .join("doc/vm_memory.json");
    let names = public_names(&described)?;
    let known: BTreeSet<_> = known.lines().filter(|line| !line.ends_with(MARK)).collect();
    let missing: Vec<_> = known
        .iter()
        .filter(|name| !names.contains(**name))
        .collect();
    ensure!(
        missing.is_empty(),
        "names of 0.18.0 are missing: {missing:?}"
    );

    let wine = Wine::installed(&harness.folder)?;
    let mut command = harness.cargo(&suite.platform, "test");
    command.args(["-p", "verify-api"]);
    wine.runs(&mut command, suite.platform.target);
    let counts = harness.count("windows-api", command)?;
    Ok(format!(
        "{} names of vm-memory 0.18.0 exist; calls of them: {counts}",
        known.len()
    ))
}

/// Checks the libraries and their tests for the tools of Microsoft, without linking them.
pub(super) fn check_msvc(harness: &Harness, suite: &Suite) -> Result<String> {
    let target = "x86_64-pc-windows-msvc";
    if !add_library(target) {
        return Ok(without_library(suite.title, target));
    }
    let platform = native(target, Compiler::Rustup);
    for package in ["vm-memory", "vm-memory-host", "verify-api"] {
        let mut command = harness.cargo(&platform, "clippy");
        harness.select(&mut command, &[package], NOT_ON_WINDOWS);
        command.args(["--lib", "--tests", "--", "-D", "warnings"]);
        harness.log(&format!("{package}-{target}"), &mut command)?;
    }
    Ok(format!(
        "the libraries, their tests and the calls of the interface pass clippy for {target}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn tests_of_both_lists_are_those_of_existing_files() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let folders = ["tests", "vm-memory-host/tests"].map(|folder| root.join(folder));
        let of_wine_10 = WINE_10_TESTS.iter().flat_map(|(_, tests)| *tests);
        for name in CI_TESTS
            .iter()
            .chain(of_wine_10)
            .filter_map(|test| test.strip_prefix("--test="))
        {
            let file = format!("{name}.rs");
            assert!(
                folders.iter().any(|folder| folder.join(&file).exists()),
                "{name}"
            );
        }
    }
}
