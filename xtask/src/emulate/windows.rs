//! The suite of Windows: programs of `x86_64-pc-windows-gnu` under Wine, and checks for
//! `x86_64-pc-windows-msvc`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::harness::{add_library, without_library, Harness};
use super::suites::{native, Compiler, Suite};
use crate::debian::succeed;

/// The linker, which also makes a library that Wine lacks.
pub(super) const LINKER: &str = "x86_64-w64-mingw32-gcc";
/// Wine without its wrapper, which needs a display.
pub(super) const WINE: &str = "/usr/lib/wine/wine64";

/// The comparison with vm-memory 0.18.0.
const DIFFERENTIAL: &str = "verify/windows-differential/Cargo.toml";

/// The features that do not exist on Windows. The first one is a default.
const NOT_ON_WINDOWS: &[&str] = &["rawfd"];

/// The tests that CI runs, beside those of the units: what differs between systems.
const CI_TESTS: &[&str] = &[
    "--lib",
    "--test=exceptions",
    "--test=fault_handler_alone",
    "--test=file_views_b13",
    "--test=libkrun_calls",
    "--test=plugged_blocks",
    "--test=threads",
];

/// A library of Windows that Wine 8 lacks. Rust's standard library gets random numbers from it.
const RANDOM_NUMBERS: &str = r"#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID buffer, ULONG len);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE buffer, SIZE_T len) {
    return SystemFunction036(buffer, (ULONG)len);
}
";

/// Runs the tests that the system can break.
pub(super) fn tests_of_ci(harness: &Harness, suite: &Suite) -> Result<String> {
    tests(harness, suite, CI_TESTS)
}

/// Runs all tests of the library, except those of its documentation.
pub(super) fn all_tests(harness: &Harness, suite: &Suite) -> Result<String> {
    tests(harness, suite, &["--lib", "--tests"])
}

fn tests(harness: &Harness, suite: &Suite, selected: &[&str]) -> Result<String> {
    let prefix = wine_prefix(&harness.folder)?;
    let mut command = harness.test_of(&suite.platform, &["vm-memory"], NOT_ON_WINDOWS);
    command.args(selected);
    in_prefix(&mut command, &prefix);
    harness.count(suite.name, command)
}

/// Compares mappings and accesses with those of vm-memory 0.18.0.
pub(super) fn differential(harness: &Harness, suite: &Suite) -> Result<String> {
    let prefix = wine_prefix(&harness.folder)?;
    let mut command = harness.cargo(&suite.platform, "test");
    command.args(["--manifest-path", DIFFERENTIAL]);
    in_prefix(&mut command, &prefix);
    let counts = harness.count("windows-differential", command)?;
    Ok(format!("compared with vm-memory 0.18.0: {counts}"))
}

/// Checks the library and its tests for the tools of Microsoft, without linking them.
pub(super) fn check_msvc(harness: &Harness, suite: &Suite) -> Result<String> {
    let target = "x86_64-pc-windows-msvc";
    if !add_library(target) {
        return Ok(without_library(suite.title, target));
    }
    let platform = native(target, Compiler::Rustup);
    let mut command = harness.cargo(&platform, "clippy");
    harness.select(&mut command, &["vm-memory"], NOT_ON_WINDOWS);
    command.args(["--lib", "--tests", "--", "-D", "warnings"]);
    harness.log(target, &mut command)?;
    Ok(format!(
        "the library and its tests pass clippy for {target}"
    ))
}

/// Makes the folder in which Wine keeps its files, with the library that it lacks.
fn wine_prefix(folder: &Path) -> Result<PathBuf> {
    let prefix = folder.join("wine");
    let system = prefix.join("drive_c/windows/system32");
    if !system.join("kernel32.dll").exists() {
        let mut boot = Command::new(WINE);
        boot.args(["wineboot", "--init"]).stderr(Stdio::null());
        in_prefix(&mut boot, &prefix);
        succeed(&mut boot)?;
    }
    let library = system.join("bcryptprimitives.dll");
    if !library.exists() {
        let source = folder.join("random_numbers.c");
        fs::write(&source, RANDOM_NUMBERS)
            .with_context(|| format!("cannot write {}", source.display()))?;
        let mut compile = Command::new(LINKER);
        compile.args(["-shared", "-O2", "-o"]);
        compile.arg(&library).arg(&source).arg("-ladvapi32");
        succeed(&mut compile)?;
    }
    Ok(prefix)
}

/// Makes a command run Wine with its files in `prefix`, without messages and without offering to
/// install programs.
fn in_prefix(command: &mut Command, prefix: &Path) {
    command
        .env("WINEPREFIX", prefix)
        .env("WINEDEBUG", "-all")
        .env("WINEDLLOVERRIDES", "mscoree,mshtml=");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_ci_are_those_of_existing_files() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
        for name in CI_TESTS
            .iter()
            .filter_map(|test| test.strip_prefix("--test="))
        {
            assert!(root.join(format!("{name}.rs")).exists(), "{name}");
        }
    }
}
