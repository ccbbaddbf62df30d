//! `cargo xtask emulate`: the library on other targets.
//!
//! - Its tests on aarch64 Linux, under `qemu-aarch64-static`, with Debian's Rust, which has a
//!   standard library for arm64. The tests of the access routines run again with the atomic
//!   instructions of LSE.
//! - Its tests with musl, on this processor, with a standard library built from Debian's source.
//! - Objects for Windows and macOS. They must not have the section of the fault table, because it
//!   exists for ELF only.
//!
//! A target whose tools are missing is reported as `SKIPPED:`, and so is a test that cannot run.
//! `--install` installs the tools first.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};

use crate::compat::counts::Counts;
use crate::debian::{install, missing, tool, Tool, AARCH64_LINUX, CARGO, CROSS, RUSTC};
use crate::workspace::Workspace;

/// The options of `cargo xtask emulate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Install missing tools with apt-get first (as root)
    #[arg(long)]
    install: bool,

    /// Test this target only
    #[arg(long, value_enum)]
    only: Option<Target>,
}

/// A target, and the tests that run on it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Target {
    /// Tests on aarch64 Linux, emulated
    Aarch64,
    /// Tests of the access routines on aarch64 Linux with the instructions of LSE, emulated
    Aarch64Lse,
    /// Tests on x86_64 Linux with musl
    Musl,
    /// Objects for Windows and macOS
    Formats,
}

const RUST_SOURCE: Tool = tool(
    "/usr/lib/rustlib/src/rust/library/std/Cargo.toml",
    "rust-web-src",
);
/// An unwinder that works with musl: GCC's needs a function of glibc.
const UNWINDER: Tool = tool("/usr/lib/llvm-14/lib/libunwind.a", "libunwind-14-dev");

const QEMU: Tool = tool("/usr/bin/qemu-aarch64-static", "qemu-user-static");
const MUSL: &[Tool] = &[
    RUSTC,
    CARGO,
    RUST_SOURCE,
    tool("/usr/bin/musl-gcc", "musl-tools"),
    UNWINDER,
];
const FORMATS: &[Tool] = &[RUSTC, CARGO, RUST_SOURCE];

/// A processor with the base instruction set, and one with all instructions that qemu supports.
const BASE_PROCESSOR: &str = "cortex-a72";
const ANY_PROCESSOR: &str = "max";

/// The section of the fault table (`src/access/arch/fault_table.rs`).
const SECTION: &[u8] = b"vm_memory_faults_1";
/// The time limit of a run, in seconds. A run that takes longer is terminated.
const LIMIT_SECONDS: &str = "900";
/// The lines of a log that are printed when its run fails.
const TAIL_LINES: usize = 60;

impl Target {
    const ALL: [Self; 4] = [Self::Aarch64, Self::Aarch64Lse, Self::Musl, Self::Formats];

    fn name(self) -> &'static str {
        match self {
            Self::Aarch64 => "aarch64 Linux, emulated",
            Self::Aarch64Lse => "aarch64 Linux with LSE, emulated",
            Self::Musl => "x86_64 Linux with musl",
            Self::Formats => "objects for Windows and macOS",
        }
    }

    fn tools(self) -> Vec<&'static Tool> {
        match self {
            Self::Aarch64 | Self::Aarch64Lse => CROSS.iter().chain([&QEMU]).collect(),
            Self::Musl => MUSL.iter().collect(),
            Self::Formats => FORMATS.iter().collect(),
        }
    }

    /// Returns the packages that are not installed.
    fn missing(self) -> Vec<&'static str> {
        missing(self.tools())
    }
}

/// Runs the requested targets.
///
/// # Errors
///
/// Returns an error if the target folder cannot be created.
pub fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let harness = Harness::new(workspace)?;
    let wanted = Target::ALL
        .into_iter()
        .filter(|target| args.only.is_none_or(|only| only == *target));
    let mut failed = false;
    for target in wanted {
        if args.install && !target.missing().is_empty() {
            if let Err(error) = install(&target.missing()) {
                println!("{}: cannot install: {error:#}", target.name());
            }
        }
        let missing = target.missing();
        if !missing.is_empty() {
            println!(
                "SKIPPED: {}: not installed: {}",
                target.name(),
                missing.join(", ")
            );
            continue;
        }
        let started = Instant::now();
        let outcome = match target {
            Target::Aarch64 => harness.aarch64(),
            Target::Aarch64Lse => harness.aarch64_lse(),
            Target::Musl => harness.musl(),
            Target::Formats => harness.formats(),
        };
        match outcome {
            Ok(what) => println!(
                "{}: {what} ({} s)",
                target.name(),
                started.elapsed().as_secs()
            ),
            Err(error) => {
                println!("{}: FAILED: {error:#}", target.name());
                failed = true;
            }
        }
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The folder of the builds. It is separate because the compiler differs.
struct Harness {
    root: PathBuf,
    features: String,
    folder: PathBuf,
}

impl Harness {
    fn new(workspace: &Workspace) -> Result<Self> {
        let folder = workspace.target.join("emulate");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self {
            root: workspace.root.clone(),
            features: workspace.features()?,
            folder,
        })
    }

    /// Returns Debian's cargo and rustc, without the settings of the cargo that runs this program.
    fn cargo(&self, subcommand: &str) -> Command {
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
            .args(["--kill-after=10", LIMIT_SECONDS, CARGO.file, subcommand])
            .args(["-p", "vm-memory"])
            .current_dir(&self.root)
            .env("RUSTC", RUSTC.file)
            .env("RUSTDOC", "/usr/bin/rustdoc")
            .env("CARGO_TARGET_DIR", &self.folder);
        command
    }

    fn test(&self, target: &str) -> Command {
        let mut command = self.cargo("test");
        // Without optimisation, the loops over all alignments and lengths take minutes under qemu.
        command.env("CARGO_PROFILE_TEST_OPT_LEVEL", "1").args([
            "--no-fail-fast",
            "--features",
            &self.features,
            "--target",
            target,
        ]);
        command
    }

    /// Returns the command for tests on aarch64, on the processor with this name in qemu.
    fn test_aarch64(&self, processor: &str) -> Command {
        let mut command = self.test(AARCH64_LINUX);
        command
            .env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
                "aarch64-linux-gnu-gcc",
            )
            // Tests that start themselves again read this variable; qemu reads QEMU_CPU.
            .env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
                "qemu-aarch64-static",
            )
            .env("QEMU_CPU", processor);
        command
    }

    fn aarch64(&self) -> Result<String> {
        let counts = self.count("aarch64", self.test_aarch64(BASE_PROCESSOR))?;
        // The section shows that the tests ran on the assembly, and that `formats` looks for the
        // right name.
        let built = self.folder.join(AARCH64_LINUX).join("debug/deps");
        for entry in
            fs::read_dir(&built).with_context(|| format!("cannot read {}", built.display()))?
        {
            let file = entry?.path();
            let library = file
                .extension()
                .is_some_and(|extension| extension == "rlib");
            if library
                && file.to_string_lossy().contains("libvm_memory-")
                && contains(&file, SECTION)?
            {
                return Ok(counts);
            }
        }
        bail!("no library in {} has a fault table", built.display())
    }

    /// Tests the access routines with the instructions of LSE instead of loops. They must not run
    /// on a processor without LSE, which proves that the build contains these instructions.
    fn aarch64_lse(&self) -> Result<String> {
        let with_lse = |processor| {
            let mut command = self.test_aarch64(processor);
            command.env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
                "-Ctarget-feature=+lse",
            );
            // A separate folder, so that the other target is not rebuilt on the next run.
            command.env("CARGO_TARGET_DIR", self.folder.join("lse"));
            command
        };
        let mut refused = with_lse(BASE_PROCESSOR);
        refused.args(["--lib", "access::tests::chosen::fetch"]);
        let (status, _) = self.keep("aarch64-lse-refused", &mut refused)?;
        ensure!(
            !status.success(),
            "the build for LSE runs on a processor without LSE"
        );
        let mut routines = with_lse(ANY_PROCESSOR);
        routines.args(["--lib", "access::"]);
        let routines = self.count("aarch64-lse", routines)?;
        let mut faults = with_lse(ANY_PROCESSOR);
        faults.args(["--test", "fault*", "--test", "threads"]);
        let faults = self.count("aarch64-lse-faults", faults)?;
        Ok(format!(
            "access routines: {routines}; faults and threads: {faults}"
        ))
    }

    fn musl(&self) -> Result<String> {
        let libraries = self.folder.join("musl-libraries");
        fs::create_dir_all(&libraries)?;
        let unwinder = libraries.join("libunwind.a");
        if unwinder.symlink_metadata().is_err() {
            symlink(UNWINDER.file, &unwinder)
                .with_context(|| format!("cannot create {}", unwinder.display()))?;
        }
        // The unwinder was compiled with glibc's headers, which rename `fprintf`. It is called only
        // before `abort`.
        let flags = format!(
            "-Clink-self-contained=no -Clinker=musl-gcc -Lnative={} -Clink-arg=-Wl,--defsym=__fprintf_chk=abort",
            libraries.display()
        );
        let mut command = self.test("x86_64-unknown-linux-musl");
        command
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTDOCFLAGS", &flags)
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUSTFLAGS", &flags)
            .arg("-Zbuild-std=std,panic_abort,panic_unwind,test");
        self.count("musl", command)
    }

    /// Runs tests, prints the skipped ones, and returns the counts as text.
    fn count(&self, name: &str, mut command: Command) -> Result<String> {
        command.args(["--", "--show-output"]);
        let text = self.log(name, &mut command)?;
        for line in text.lines().filter(|line| line.contains("SKIPPED:")) {
            println!("{name}: {line}");
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

    fn formats(&self) -> Result<String> {
        for target in ["x86_64-pc-windows-msvc", "aarch64-apple-darwin"] {
            let object = self.folder.join(format!("{target}.o"));
            let mut command = self.cargo("rustc");
            command
                .env("RUSTC_BOOTSTRAP", "1")
                .args([
                    "--lib",
                    "--no-default-features",
                    "-Zbuild-std=std,panic_abort",
                    "--target",
                    target,
                ])
                .arg("--")
                .arg(format!("--emit=obj={}", object.display()));
            self.log(target, &mut command)?;
            ensure!(
                !contains(&object, SECTION)?,
                "{} has a fault table",
                object.display()
            );
        }
        Ok("built, without a fault table".to_owned())
    }

    /// Runs a command that must succeed, and returns its output, which is also kept in a file.
    fn log(&self, name: &str, command: &mut Command) -> Result<String> {
        let (status, text) = self.keep(name, command)?;
        if !status.success() {
            let lines: Vec<_> = text.lines().collect();
            let tail = lines
                .get(lines.len().saturating_sub(TAIL_LINES)..)
                .unwrap_or_default();
            eprintln!("{}", tail.join("\n"));
        }
        ensure!(
            status.success(),
            "cargo ended with {status}; the whole log is {}",
            self.log_file(name).display()
        );
        Ok(text)
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// Runs a command, and returns its status and its output, which is also kept in a file.
    fn keep(&self, name: &str, command: &mut Command) -> Result<(ExitStatus, String)> {
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

/// Returns whether a file contains these bytes.
fn contains(file: &Path, bytes: &[u8]) -> Result<bool> {
    let all = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(all.windows(bytes.len()).any(|window| window == bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contains_finds_bytes_at_any_offset() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("object");
        for (content, expected) in [
            (&b"..vm_memory_faults_1"[..], true),
            (b"vm_memory_faults_2..", false),
            (b"", false),
        ] {
            fs::write(&file, content).unwrap();
            assert_eq!(contains(&file, SECTION).unwrap(), expected);
        }
    }

    #[test]
    fn tools_of_each_target_include_the_compiler() {
        for target in Target::ALL {
            let packages: Vec<_> = target.tools().iter().map(|tool| tool.package).collect();
            assert!(
                packages.contains(&"rustc-web") && packages.contains(&"cargo-web"),
                "{target:?}"
            );
        }
    }
}
