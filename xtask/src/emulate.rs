//! `cargo xtask emulate`: the library on other targets.
//!
//! [`suites`] is the table of the targets: the tools that each one needs, what CI runs there, and
//! what `--all` runs. A new target is a row of it.
//!
//! A suite whose tools are missing is reported as `SKIPPED:`, and so is a test that cannot run.
//! `--install` installs the tools first. If rustup cannot install a standard library, CI skips the
//! suites that need it. A suite that is named on the command line builds the library instead, which
//! works for targets whose linker is one of its tools.

mod harness;
mod objects;
mod own;
mod suites;
mod windows;
mod wine;

use std::fs;
use std::time::Instant;

use anyhow::Result;
use clap::builder::{PossibleValue, PossibleValuesParser};

use crate::debian::install;
use crate::workspace::Workspace;
use harness::{add_library, has_library, without_library, Harness};
use suites::{Compiler, Step, Suite, SUITES};

/// The options of `cargo xtask emulate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The suites to run, instead of all suites
    #[arg(value_name = "SUITE", value_parser = names())]
    suites: Vec<String>,

    /// Run whole suites. CI runs the parts that the target can break
    #[arg(long)]
    all: bool,

    /// Install missing tools first: with apt-get, as root, and with rustup
    #[arg(long)]
    install: bool,
}

fn names() -> PossibleValuesParser {
    let name = |suite: &Suite| PossibleValue::new(suite.name).help(suite.title);
    PossibleValuesParser::new(SUITES.iter().map(name))
}

/// Runs the requested suites.
///
/// # Errors
///
/// Returns an error if the target folder cannot be created.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let harness = Harness::new(workspace, args.all)?;
    let mut passed = true;
    for suite in SUITES {
        let named = args.suites.iter().any(|name| name == suite.name);
        // A suite without steps in CI runs if it is named.
        let steps = if args.all || (named && suite.ci.is_empty()) {
            suite.all
        } else {
            suite.ci
        };
        if steps.is_empty() || !(named || args.suites.is_empty()) {
            continue;
        }
        let library = has_standard_library(suite, args.install);
        if !library && !named {
            println!("{}", without_library(suite.title, suite.platform.target));
            continue;
        }
        let missing = missing(suite, steps, library, args.install);
        if !missing.is_empty() {
            println!(
                "SKIPPED: {}: not installed: {}",
                suite.title,
                missing.join(", ")
            );
            continue;
        }
        for (number, step) in steps.iter().enumerate() {
            let (started, used) = (Instant::now(), processor_seconds());
            let log = format!("{}-{number}", suite.name);
            match harness.run(suite, step, &log) {
                Ok(shown) => println!(
                    "{}: {shown} ({} s, processor {} s)",
                    suite.title,
                    started.elapsed().as_secs(),
                    processor_seconds().saturating_sub(used)
                ),
                Err(error) => {
                    println!("{}: FAILED: {error:#}", suite.title);
                    passed = false;
                }
            }
        }
    }
    println!("processor {} s in all", processor_seconds());
    Ok(passed)
}

/// Returns the processor time of all children of this process that have ended, in seconds.
fn processor_seconds() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    ended_children_seconds(&stat).unwrap_or_default()
}

/// Returns the sum of `cutime` and `cstime` of proc_pid_stat(5), whose unit is 10 ms.
fn ended_children_seconds(stat: &str) -> Option<u64> {
    // The name of the program may contain spaces. The field after it is the third one.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(13);
    let mut next = || fields.next()?.parse::<u64>().ok();
    let (user, system) = (next()?, next()?);
    Some(user.saturating_add(system) / 100)
}

/// Returns whether there is a standard library for a suite, after installing it if requested.
fn has_standard_library(suite: &Suite, with_install: bool) -> bool {
    match suite.platform.compiler {
        Compiler::Rustup if with_install => add_library(suite.platform.target),
        Compiler::Rustup => has_library(suite.platform.target),
        Compiler::Debian => true,
    }
}

/// Returns the packages that the steps of a suite lack, after installing them if requested.
fn missing(suite: &Suite, steps: &[Step], library: bool, with_install: bool) -> Vec<&'static str> {
    let missing = suite.missing(steps, library);
    if missing.is_empty() || !with_install {
        return missing;
    }
    if let Err(error) = install(&missing) {
        println!("{}: cannot install: {error:#}", suite.title);
    }
    suite.missing(steps, library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ended_children_seconds_are_those_of_user_and_system() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194304 1 2 3 4 500 600 12345 755 20 0 1 0";
        assert_eq!(ended_children_seconds(stat), Some(131));
        assert_eq!(ended_children_seconds("7 (a) S 1"), None);
        assert!(ended_children_seconds(&fs::read_to_string("/proc/self/stat").unwrap()).is_some());
    }

    #[test]
    fn suites_have_distinct_names_and_whole_runs() {
        for (at, suite) in SUITES.iter().enumerate() {
            assert!(!suite.all.is_empty(), "{}", suite.name);
            assert!(SUITES
                .iter()
                .skip(at + 1)
                .all(|other| other.name != suite.name));
        }
    }

    #[test]
    fn tools_of_each_suite_include_a_compiler() {
        for suite in SUITES {
            let needs_rustup = suite.platform.compiler == Compiler::Rustup;
            let has_cargo = suite
                .tools
                .iter()
                .flat_map(|tools| tools.iter())
                .any(|tool| tool.package == "cargo-web");
            assert!(needs_rustup || has_cargo, "{}", suite.name);
        }
    }
}
