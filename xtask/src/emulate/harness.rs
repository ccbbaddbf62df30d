//! [`Harness`]: runs cargo for the target of a suite, and keeps the logs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{ensure, Context, Result};

use super::suites::{Compiler, Platform, Step, Suite};
use crate::compat::counts::Counts;
use crate::debian::{CARGO, RUSTC};
use crate::log::{tail, LINES};
use crate::workspace::{cargo_path, Workspace};

/// The time limit of a run, in seconds. A run that takes longer is terminated.
const LIMIT_SECONDS: &str = "1800";

/// The unit tests that CI runs on this machine only. Their code is the same for all targets, and
/// they take most of the time under emulation.
const COMMON_CODE: &[&str] = &["iommu::", "dirty::", "dirty_pages::", "::model::"];

/// The folder of the builds. It is separate because the compiler differs.
pub(super) struct Harness {
    pub(super) root: PathBuf,
    /// The features of vm-memory.
    pub(super) features: Vec<String>,
    pub(super) folder: PathBuf,
    /// Whether all tests run.
    whole: bool,
}

impl Harness {
    pub(super) fn new(workspace: &Workspace, whole: bool) -> Result<Self> {
        let folder = workspace.target.join("emulate");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let features = workspace.features()?;
        Ok(Self {
            root: workspace.root.clone(),
            features: features.split(',').map(str::to_owned).collect(),
            folder,
            whole,
        })
    }

    /// Runs a step of a suite, and returns what it has shown.
    pub(super) fn run(&self, suite: &Suite, step: &Step, log: &str) -> Result<String> {
        match step {
            Step::Tests(packages, selected) => {
                let mut command = self.test(&suite.platform, packages);
                command.args(*selected);
                let counts = self.count(log, command)?;
                Ok(format!("{}: {counts}", packages.join(", ")))
            }
            Step::Check(packages, selected) => {
                let mut command = self.cargo(&suite.platform, "check");
                self.select(&mut command, packages, &[]);
                self.log(log, command.args(*selected))?;
                Ok(format!("{}: type-checked", packages.join(", ")))
            }
            Step::Own(check) => check(self, suite),
        }
    }

    /// Returns cargo with the compiler and the target of a platform, without the settings of the
    /// cargo that runs this program.
    pub(super) fn cargo(&self, platform: &Platform, subcommand: &str) -> Command {
        let installed = platform.compiler == Compiler::Rustup && has_library(platform.target);
        let mut command = Command::new("timeout");
        for variable in [
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "RUSTDOCFLAGS",
            "CARGO_BUILD_TARGET",
        ] {
            command.env_remove(variable);
        }
        command
            .args(["--kill-after=10", LIMIT_SECONDS])
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.folder)
            .envs(platform.variables.iter().copied());
        if installed {
            command.arg(cargo_path()).arg(subcommand);
        } else {
            command
                .args([CARGO.file, subcommand])
                .env("RUSTC", RUSTC.file)
                .env("RUSTDOC", "/usr/bin/rustdoc");
        }
        if !installed && platform.compiler != Compiler::Debian {
            command
                .env("RUSTC_BOOTSTRAP", "1")
                .arg("-Zbuild-std=std,panic_abort,panic_unwind,test");
        }
        command.args(["--target", platform.target]);
        for (name, value) in [("LINKER", platform.linker), ("RUNNER", platform.runner)] {
            if let Some(value) = value {
                command.env(variable(platform.target, name), value);
            }
        }
        command
    }

    /// Selects packages, with all features of the library except those that the target lacks.
    pub(super) fn select(&self, command: &mut Command, packages: &[&str], lacking: &[&str]) {
        for package in packages {
            command.args(["-p", package]);
        }
        if !lacking.is_empty() {
            // One of them is a default.
            command.arg("--no-default-features");
        }
        let has = |feature: &&String| !lacking.contains(&feature.as_str());
        for feature in self.features.iter().filter(has) {
            command
                .arg("--features")
                .arg(format!("vm-memory/{feature}"));
        }
    }

    /// Returns the command for tests of packages.
    pub(super) fn test(&self, platform: &Platform, packages: &[&str]) -> Command {
        self.test_of(platform, packages, &[])
    }

    /// Returns the command for tests of packages, on a target that lacks features.
    pub(super) fn test_of(
        &self,
        platform: &Platform,
        packages: &[&str],
        lacking: &[&str],
    ) -> Command {
        let mut command = self.cargo(platform, "test");
        self.select(&mut command, packages, lacking);
        // Without optimisation: compiling the tests with it takes longer than it saves.
        command.arg("--no-fail-fast");
        command
    }

    /// Runs tests, prints the skipped ones, and returns the counts as text.
    pub(super) fn count(&self, log: &str, mut command: Command) -> Result<String> {
        command.args(["--", "--show-output"]);
        if !self.whole {
            command.args(COMMON_CODE.iter().flat_map(|name| ["--skip", name]));
        }
        let text = self.log(log, &mut command)?;
        for line in self.skipped(log)? {
            println!("{log}: {line}");
        }
        let counts = Counts::from_output(&text)?;
        ensure!(
            counts.programs > 0 && counts.passed > 0 && counts.failed == 0,
            "{} test programs, {} passed, {} failed",
            counts.programs,
            counts.passed,
            counts.failed
        );
        Ok(format!(
            "{} tests passed in {} programs",
            counts.passed, counts.programs
        ))
    }

    /// Runs a command that must succeed, and returns its output, which is also kept in a file.
    pub(super) fn log(&self, name: &str, command: &mut Command) -> Result<String> {
        let (status, text) = self.keep(name, command)?;
        if !status.success() {
            eprintln!("{}", what_failed(&text));
        }
        ensure!(
            status.success(),
            "cargo ended with {status}; the whole log is {}",
            self.log_file(name).display()
        );
        Ok(text)
    }

    /// Returns the lines of a log that say that a test was skipped.
    pub(super) fn skipped(&self, log: &str) -> Result<Vec<String>> {
        let text = fs::read(self.log_file(log))?;
        let text = String::from_utf8_lossy(&text);
        let lines = text.lines().filter(|line| line.contains("SKIPPED:"));
        Ok(lines.map(str::to_owned).collect())
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// Runs a command, and returns its status and its output, which is also kept in a file.
    pub(super) fn keep(&self, name: &str, command: &mut Command) -> Result<(ExitStatus, String)> {
        let path = self.log_file(name);
        let file =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let status = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .status()
            .context("cannot start timeout(1)")?;
        let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        Ok((status, text))
    }
}

/// Returns the messages of the tests that failed, and the end of the log.
fn what_failed(log: &str) -> String {
    let mut shown = String::new();
    let mut left = 0;
    let before = log.lines().count().saturating_sub(LINES);
    for line in log.lines().take(before) {
        match line {
            "failures:" => left = LINES,
            _ if line.contains("test result: ") => left = 0,
            _ => {}
        }
        if left > 0 {
            left = left.saturating_sub(1);
            shown.push_str(line);
            shown.push('\n');
        }
    }
    shown + &tail(log)
}

/// Returns the name of cargo's variable for a setting of a target.
pub(super) fn variable(target: &str, setting: &str) -> String {
    let target = target.to_uppercase().replace('-', "_");
    format!("CARGO_TARGET_{target}_{setting}")
}

/// Returns whether the compiler of this checkout has a standard library for a target.
pub(super) fn has_library(target: &str) -> bool {
    let output = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", target])
        .output();
    output.is_ok_and(|output| {
        output.status.success()
            && Path::new(String::from_utf8_lossy(&output.stdout).trim()).exists()
    })
}

/// Installs the standard library of rustup for a target. Returns whether it exists.
pub(super) fn add_library(target: &str) -> bool {
    if !has_library(target) {
        // Fails without rustup or a network.
        let _ = Command::new("rustup")
            .args(["target", "add", target])
            .stdin(Stdio::null())
            .output();
    }
    has_library(target)
}

/// Returns the message for a run that is skipped because rustup has no library for its target.
pub(super) fn without_library(title: &str, target: &str) -> String {
    format!("SKIPPED: {title}: rustup has no standard library for {target}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_of_a_target_is_the_one_that_cargo_reads() {
        assert_eq!(
            variable("riscv64gc-unknown-linux-gnu", "RUNNER"),
            "CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_RUNNER"
        );
    }

    #[test]
    fn what_failed_shows_messages_of_failed_tests_only() {
        let passed = "test result: ok\n".repeat(LINES);
        let log = format!(
            "test a ... FAILED\n\nsuccesses:\nfine\n\nfailures:\n\n---- a stdout ----\nwhy\n\n\
             test result: FAILED. 0 passed; 1 failed\nother program\n{passed}"
        );
        let shown = what_failed(&log);
        assert_eq!(
            shown,
            format!(
                "failures:\n\n---- a stdout ----\nwhy\n\n{}",
                passed.trim_end()
            )
        );
        assert_eq!(
            what_failed("error: no such target\n"),
            "error: no such target"
        );
    }

    #[test]
    fn has_library_finds_that_of_this_machine_only() {
        assert!(has_library("x86_64-unknown-linux-gnu"));
        assert!(!has_library("no-such-target"));
    }
}
