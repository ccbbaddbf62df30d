//! `cargo xtask xen`: the scenarios of `verify/xen` on real Xen, under emulation.
//!
//! For each environment, QEMU boots Debian's hypervisor with Debian's kernel as domain 0. The only
//! program of that domain is `on-real-xen` of `verify/xen`. It creates a second domain, runs each
//! scenario on the kernel's devices, and then queries the hypervisor for grants that are mapped.
//!
//! The packages are downloaded with apt-get and unpacked below the target folder. They are not
//! installed, and the repository contains no part of Xen. An environment whose packages or tools
//! are missing is reported as `SKIPPED:`. `--install` installs the tools first.

mod emulator;
mod initramfs;
mod packages;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{bail, Context, Result};

use crate::debian::{self, missing, succeed, tool, Tool, AARCH64_LINUX, CARGO, CROSS, RUSTC};
use crate::log::tail;
use crate::workspace::{cargo, Workspace};
use packages::Boot;
use report::Report;

/// The options of `cargo xtask xen`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Install missing tools with apt-get first (as root)
    #[arg(long)]
    install: bool,

    /// Boot this environment only
    #[arg(long, value_enum)]
    only: Option<Environment>,

    /// Print everything that the machine's console shows
    #[arg(long)]
    verbose: bool,

    /// Run the scenarios on vm-memory 0.18.0, and print a table of their outcomes
    #[arg(long)]
    reference: bool,
}

/// A machine with Xen.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Environment {
    /// Arm, where domain 0 maps grants into pages of its own
    Arm64,
    /// x86 with a paravirtualized domain 0
    X86Pv,
    /// x86 with a PVH domain 0, which maps grants into pages of its own
    X86Pvh,
}

/// The maximum number of attempts to boot an environment. A PVH domain 0 sometimes hangs before its
/// first program.
const BOOTS: usize = 2;
/// The program that domain 0 runs.
const PROGRAM: &str = "on-real-xen";
const X86_LINUX: &str = "x86_64-unknown-linux-gnu";
/// The package whose program is linked with vm-memory 0.18.0. It is a workspace of its own.
const REFERENCE: &str = "verify/xen-reference";

impl Environment {
    const ALL: [Self; 3] = [Self::Arm64, Self::X86Pv, Self::X86Pvh];

    fn name(self) -> &'static str {
        match self {
            Self::Arm64 => "arm64",
            Self::X86Pv => "x86-pv",
            Self::X86Pvh => "x86-pvh",
        }
    }

    /// Returns Debian's name of the processor.
    fn architecture(self) -> &'static str {
        match self {
            Self::Arm64 => "arm64",
            Self::X86Pv | Self::X86Pvh => "amd64",
        }
    }

    fn tools(self) -> Vec<&'static Tool> {
        const QEMU_ARM: Tool = tool("/usr/bin/qemu-system-aarch64", "qemu-system-arm");
        const QEMU_X86: Tool = tool("/usr/bin/qemu-system-x86_64", "qemu-system-x86");
        match self {
            Self::Arm64 => CROSS.iter().chain([&QEMU_ARM]).collect(),
            Self::X86Pv | Self::X86Pvh => vec![&QEMU_X86],
        }
    }
}

/// Runs the requested environments.
///
/// # Errors
///
/// Returns an error if a folder below the target folder cannot be written.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let folder = workspace.target.join("xen");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut passed = true;
    for env in Environment::ALL {
        if args.only.is_some_and(|only| only != env) {
            continue;
        }
        let boot = match prepare(env, &folder, args.install) {
            Ok(boot) => boot,
            Err(error) => {
                println!("SKIPPED: {}: {error:#}", env.name());
                continue;
            }
        };
        let started = Instant::now();
        let outcome = build(workspace, env, &folder, args.reference)
            .and_then(|program| run_in(env, &folder, &boot, &program, args));
        let seconds = started.elapsed().as_secs();
        match outcome {
            Ok(report) => println!("{}: {} ({seconds} s)", env.name(), report.summary()),
            Err(error) => {
                println!("{}: FAILED: {error:#} ({seconds} s)", env.name());
                passed = false;
            }
        }
    }
    Ok(passed)
}

/// Returns the files that boot an environment. An error is a reason to skip it.
fn prepare(env: Environment, folder: &Path, install: bool) -> Result<Boot> {
    let mut lacking = missing(env.tools());
    if install && !lacking.is_empty() {
        debian::install(&lacking)?;
        lacking = missing(env.tools());
    }
    if !lacking.is_empty() {
        bail!("not installed: {}", lacking.join(", "));
    }
    packages::unpack(env.architecture(), folder, install)
}

/// Builds the program of domain 0, linked statically.
fn build(
    workspace: &Workspace,
    env: Environment,
    folder: &Path,
    reference: bool,
) -> Result<PathBuf> {
    let (root, folder, package): (_, _, &[&str]) = if reference {
        let root = workspace.root.join(REFERENCE);
        (root, folder.join("reference"), &[])
    } else {
        let package = &["-p", "verify-xen", "--features", "xen"];
        (workspace.root.clone(), folder.to_owned(), package)
    };
    let (mut command, target) = match env {
        Environment::Arm64 => {
            let mut command = Command::new(CARGO.file);
            command.current_dir(&root).env("RUSTC", RUSTC.file);
            command.env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
                "aarch64-linux-gnu-gcc",
            );
            (command, AARCH64_LINUX)
        }
        Environment::X86Pv | Environment::X86Pvh => (cargo(&root), X86_LINUX),
    };
    command
        .args(["build", "-q", "--release"])
        .args(package)
        .args(["--bin", PROGRAM, "--target", target])
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true")
        .env("CARGO_TARGET_DIR", &folder);
    succeed(&mut command)?;
    Ok(folder.join(target).join("release").join(PROGRAM))
}

/// Boots an environment, waits until its domain 0 has turned it off, and reads the report on its
/// console.
fn run_in(
    env: Environment,
    folder: &Path,
    boot: &Boot,
    program: &Path,
    args: &Args,
) -> Result<Report> {
    let image = folder.join(format!("{}.cpio", env.name()));
    initramfs::write(&image, program, &boot.modules)?;
    let log = folder.join(format!("{}.log", env.name()));
    for _ in 1..BOOTS {
        let console = emulator::run(env, boot, &image, &log)?;
        let report = Report::read(&console);
        if report.begun {
            return finish(env, report, &console, &log, args);
        }
        println!("{}: domain 0 did not start; booting again", env.name());
    }
    let console = emulator::run(env, boot, &image, &log)?;
    finish(env, Report::read(&console), &console, &log, args)
}

/// Prints the skipped scenarios and the notes of a report, and returns it if it has no faults.
///
/// With `--reference`, scenarios may fail, but all must have been run.
fn finish(
    env: Environment,
    report: Report,
    console: &str,
    log: &Path,
    args: &Args,
) -> Result<Report> {
    if args.reference {
        report.print_outcomes();
    }
    for line in report.skipped.iter().chain(&report.notes) {
        println!("{}: {line}", env.name());
    }
    let faults = if args.reference {
        report.interruptions()
    } else {
        report.faults()
    };
    if args.verbose {
        eprintln!("{console}");
    } else if !faults.is_empty() {
        eprintln!("{}", tail(console));
    }
    if faults.is_empty() {
        return Ok(report);
    }
    bail!(
        "{}; the whole console is in {}",
        faults.join("; "),
        log.display()
    )
}
