//! `cargo xtask compat`: the tests of published crates that use vm-memory, on this crate.
//!
//! Cargo fetches the source of each crate, which is copied to `target/compat` with its lock file.
//! Its tests run there with this checkout patched in for `vm-memory`. A row passes if:
//!
//! - the test programs contain no other `vm-memory`, according to cargo;
//! - no test fails;
//! - at least as many tests pass as on the published vm-memory.

pub mod counts;
mod table;
mod vmm;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use cargo_metadata::{Message, MetadataCommand, TargetKind};
use clap::builder::PossibleValuesParser;

use crate::workspace::{cargo, cargo_path, Workspace};
use counts::Counts;
use table::{User, USERS};

/// The time limit of a test program. A program that runs longer is terminated.
const TEST_PROGRAM_LIMIT_SECONDS: u32 = 300;

/// The options of `cargo xtask compat`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run the tests of this crate only
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(table::names()))]
    only: Option<String>,

    /// Run on vm-memory from the registry, to see which tests fail for other reasons
    #[arg(long)]
    published: bool,

    /// Run the unit tests of a virtual machine monitor instead, in a copy of the checkout `--path`
    #[arg(long, value_enum, requires = "path", conflicts_with = "only")]
    vmm: Option<vmm::Monitor>,

    /// The checkout of the monitor
    #[arg(long, value_name = "DIR", requires = "vmm")]
    path: Option<PathBuf>,

    /// A checkout of micro-http, which the monitors take from GitHub; without it, cargo fetches it
    #[arg(long, value_name = "DIR", requires = "vmm")]
    micro_http: Option<PathBuf>,
}

/// The result of one row.
struct Row {
    user: &'static User,
    counts: Counts,
    took: Duration,
    /// The reason, if the row failed.
    failure: Option<String>,
}

/// Runs the requested rows and prints a line for each.
///
/// # Errors
///
/// Returns an error if a crate cannot be fetched or copied.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let harness = Harness::new(workspace, args.published)?;
    if let (Some(monitor), Some(path)) = (args.vmm, &args.path) {
        return vmm::run(&harness, monitor, path, args.micro_http.as_deref());
    }
    let users: Vec<_> = USERS
        .iter()
        .filter(|user| args.only.as_deref().is_none_or(|only| only == user.name))
        .collect();
    harness.unpack(&users)?;

    let mut rows = Vec::new();
    for user in users {
        println!("{}: {}", user.label(), features(user));
        let started = Instant::now();
        let mut row = Row {
            user,
            counts: Counts::default(),
            took: Duration::ZERO,
            failure: None,
        };
        row.failure = harness
            .test(user, &mut row.counts)
            .err()
            .map(|error| format!("{error:#}"));
        row.took = started.elapsed();
        if let Some(failure) = &row.failure {
            let log = harness.log(user);
            eprintln!("{}: FAILED: {failure}\n{}", user.label(), tail(&log));
            eprintln!("{}: the whole log is {}", user.label(), log.display());
        }
        rows.push(row);
    }
    let whose = if args.published {
        "the vm-memory of the registry"
    } else {
        "this crate"
    };
    println!("\nOn {whose}:");
    for row in &rows {
        println!("{}", row.report());
    }
    Ok(rows.iter().all(|row| row.failure.is_none()))
}

impl Row {
    /// Returns the counts, and the verdict.
    fn report(&self) -> String {
        let Self { user, counts, .. } = self;
        let reason = match user.reason {
            "" => String::new(),
            reason => format!(" ({reason})"),
        };
        let verdict = match &self.failure {
            Some(why) => format!("FAILED: {why}"),
            None => "ok".to_owned(),
        };
        format!(
            "{} {}, {}: {} passed, {} expected, {} ignored, {} left out{reason}, {} s: {verdict}",
            user.label(),
            user.version,
            features(user),
            counts.passed,
            user.expected,
            counts.ignored,
            counts.left_out,
            self.took.as_secs()
        )
    }
}

/// Returns the features of a row.
fn features(user: &User) -> String {
    if user.features.is_empty() {
        "(default)".to_owned()
    } else {
        user.features.replace(',', ", ")
    }
}

/// The folder in which the crates are unpacked, built and run.
struct Harness {
    folder: PathBuf,
    /// The manifest of `vm-memory` in this checkout.
    ours: PathBuf,
    root: PathBuf,
    published: bool,
}

impl Harness {
    fn new(workspace: &Workspace, published: bool) -> Result<Self> {
        let folder = workspace.target.join("compat");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self {
            folder,
            ours: workspace.manifest(),
            root: workspace.root.clone(),
            published,
        })
    }

    fn log(&self, user: &User) -> PathBuf {
        let suffix = if self.published { ".published" } else { "" };
        self.folder.join(format!("{}{suffix}.log", user.label()))
    }

    /// Fetches the source of each crate that is missing.
    fn unpack(&self, users: &[&'static User]) -> Result<()> {
        let missing: BTreeSet<_> = users
            .iter()
            .filter(|user| !self.folder.join(user.folder()).exists())
            .map(|user| (user.name, user.version))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let fetch = self.folder.join("fetch");
        fs::create_dir_all(fetch.join("src"))?;
        fs::write(fetch.join("src/lib.rs"), "")?;
        fs::write(fetch.join("Cargo.toml"), fetch_manifest(&missing)?)?;
        // Cargo downloads and checks the packages, and reports the folder of each.
        let metadata = MetadataCommand::new()
            .cargo_path(cargo_path())
            .manifest_path(fetch.join("Cargo.toml"))
            .exec()
            .context("cargo cannot fetch the crates from the registry")?;
        for (name, version) in missing {
            let package = metadata
                .packages
                .iter()
                .find(|package| {
                    package.name.as_str() == name
                        && package.version.to_string() == version
                        && package.source.is_some()
                })
                .with_context(|| format!("cargo did not fetch {name} {version}"))?;
            let source = package
                .manifest_path
                .parent()
                .with_context(|| format!("{name} has no source folder"))?;
            let copy = self.folder.join(format!("{name}-{version}"));
            copy_crate(source.as_std_path(), &copy)
                .with_context(|| format!("cannot copy {source} to {}", copy.display()))?;
        }
        Ok(())
    }

    /// Builds and runs the tests of one row. Returns an error if the row fails.
    fn test(&self, user: &User, counts: &mut Counts) -> Result<()> {
        let log = self.log(user);
        File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let found = build(self.cargo_test(user), &log).with_context(|| match user.needs {
            "" => "cannot build the test programs".to_owned(),
            needs => format!("cannot build the test programs, which need {needs}"),
        })?;
        let mut command = self.cargo_test(user);
        command.args(["--no-fail-fast", "--"]);
        for skip in user.skips {
            command.args(["--skip", skip]);
        }
        let status = self.run_tests(user.name, &found, command, &log, user.expected, counts)?;
        ensure!(status.success(), "cargo test ended with {status}");
        Ok(())
    }

    /// Runs test programs that are built, checks what they report, and returns cargo's status.
    fn run_tests(
        &self,
        name: &str,
        found: &BTreeSet<PathBuf>,
        mut cargo_test: Command,
        log: &Path,
        expected: u64,
        counts: &mut Counts,
    ) -> Result<ExitStatus> {
        self.check_source(name, found)?;
        let output = append(log)?;
        let status = cargo_test
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .status()
            .context("cannot start cargo")?;
        *counts = Counts::from_output(&String::from_utf8_lossy(&fs::read(log)?))?;
        check_counts(expected, counts)?;
        Ok(status)
    }

    /// Checks that the only `vm-memory` in the build is the expected one.
    fn check_source(&self, user: &str, found: &BTreeSet<PathBuf>) -> Result<()> {
        let ours = self.ours.canonicalize()?;
        let mut wrong = Vec::new();
        for manifest in found {
            if (manifest.canonicalize()? == ours) == self.published {
                wrong.push(manifest.display().to_string());
            }
        }
        ensure!(!found.is_empty(), "{user} was built without vm-memory");
        ensure!(
            wrong.is_empty(),
            "the wrong vm-memory was built: {}",
            wrong.join(", ")
        );
        Ok(())
    }

    /// Returns a cargo command that patches vm-memory with this checkout, unless the published
    /// crate is requested.
    fn patched_cargo(&self, folder: &Path) -> Command {
        let mut command = cargo(folder);
        if !self.published {
            // A Rust string literal of a path is a TOML string too.
            command.arg("--config").arg(format!(
                "patch.crates-io.vm-memory.path={:?}",
                self.root.display().to_string()
            ));
        }
        command
    }

    /// Returns a `cargo test` that terminates a test program after a time.
    fn cargo_test_in(&self, folder: &Path, seconds: u32, target: &str) -> Command {
        let mut command = self.patched_cargo(folder);
        command
            .args(["--config", "profile.dev.debug=0"])
            .arg("--config")
            .arg(format!(
                "target.'cfg(all())'.runner=[\"timeout\", \"--foreground\", \"{seconds}\"]"
            ))
            .arg("test")
            .arg("--target-dir")
            .arg(self.folder.join(target));
        command
    }

    fn cargo_test(&self, user: &User) -> Command {
        let folder = self.folder.join(user.folder());
        let mut command = self.cargo_test_in(&folder, TEST_PROGRAM_LIMIT_SECONDS, "target");
        if !user.features.is_empty() {
            command.args(["--features", user.features]);
        }
        command
    }
}

/// Builds test programs and returns the manifest of each `vm-memory` in them. Cargo also lists
/// artifacts that it does not rebuild, so a second run proves as much as the first.
fn build(mut cargo_test: Command, log: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut output = append(log)?;
    let mut child = cargo_test
        .args(["--no-run", "--message-format=json-render-diagnostics"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(output.try_clone()?)
        .spawn()
        .context("cannot start cargo")?;
    let messages = child.stdout.take().context("cargo has no output")?;
    let mut found = BTreeSet::new();
    for message in Message::parse_stream(BufReader::new(messages)) {
        if let Message::CompilerArtifact(artifact) =
            message.context("cannot read cargo's messages")?
        {
            let library = artifact.target.kind.contains(&TargetKind::Lib);
            if library && artifact.target.name == "vm_memory" {
                let state = if artifact.fresh {
                    "fresh"
                } else {
                    "compiled now"
                };
                writeln!(output, "   vm-memory is {} ({state})", artifact.package_id)?;
                found.insert(artifact.manifest_path.into_std_path_buf());
            }
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo test --no-run ended with {status}");
    Ok(found)
}

/// Returns an error if the counts of a run do not permit the row to pass.
fn check_counts(expected: u64, counts: &Counts) -> Result<()> {
    ensure!(counts.programs > 0, "no test program reported a result");
    ensure!(counts.failed == 0, "{} failed", counts.failed);
    ensure!(
        counts.passed >= expected,
        "{} passed, but {expected} pass on vm-memory 0.18.0",
        counts.passed
    );
    Ok(())
}

/// Returns a manifest that makes cargo fetch exactly these versions.
fn fetch_manifest(crates: &BTreeSet<(&str, &str)>) -> Result<String> {
    let mut manifest = String::from(
        "[package]\nname = \"fetch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[workspace]\n\n[dependencies]\n",
    );
    for (name, version) in crates {
        writeln!(manifest, "{name} = \"={version}\"")?;
    }
    Ok(manifest)
}

/// Copies a crate's source completely or not at all, and makes the copy a separate workspace.
/// Otherwise cargo would consider it a member of this one.
fn copy_crate(source: &Path, copy: &Path) -> Result<()> {
    let mut partial = copy.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    copy_all(source, &partial)?;
    let manifest = partial.join("Cargo.toml");
    if fs::read_to_string(&manifest)?
        .lines()
        .any(|line| line.trim_start().starts_with("[workspace"))
    {
        bail!("the published manifest has a workspace, which cargo should have removed");
    }
    append(&manifest)?.write_all(b"\n[workspace]\n")?;
    fs::rename(&partial, copy)?;
    Ok(())
}

/// Copies a file, a folder, or a link.
fn copy_all(from: &Path, to: &Path) -> Result<()> {
    let kind = fs::symlink_metadata(from)?.file_type();
    if kind.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
    } else if kind.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy_all(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else {
        fs::copy(from, to)?;
    }
    Ok(())
}

fn append(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Returns the last lines of a log.
fn tail(log: &Path) -> String {
    match fs::read(log) {
        Ok(text) => crate::log::tail(&String::from_utf8_lossy(&text)),
        Err(error) => format!("cannot read {}: {error}", log.display()),
    }
}

#[cfg(test)]
mod tests;
