//! `cargo xtask bench`: measures the published vm-memory, this crate and the limit in the three
//! builds that users ship.
//!
//! The program in `bench/` measures. This command runs it in each build. It writes a page to
//! `bench/RESULTS.md`, the rows of all builds to `bench/rows.md`, and some of them to `README.md`.
//! A run of some builds only, or in short rounds, writes these files to `target/bench/`.
//!
//! `--quick` is for developers: it measures the 15 rows that matter most, in the build `release`.
//! This build compiles fastest, and it is Cargo's default for a release. The run takes less than
//! two minutes with the compilation, about ten seconds of which are measurements.
//!
//! `--instructions` counts instructions with callgrind instead, and compares them with
//! `bench/instructions.tsv`. These counts have no noise.

mod instructions;
mod machine;
mod results;
mod rows;
mod throughput;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{ensure, Context, Result};
use clap::ValueEnum;

use crate::workspace::{cargo, Workspace};
use machine::Machine;
use results::{Curves, Run};
use rows::{lines, Line};
use throughput::{points, Throughput};

/// The options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Measure these builds only (separated by commas) [default: all, and `release` with --quick]
    #[arg(long = "build", value_enum, value_delimiter = ',')]
    builds: Vec<Build>,

    /// Measure only rows whose name contains this; does not write RESULTS.md
    #[arg(long, value_name = "SUBSTRING")]
    filter: Option<String>,

    /// Measure each row in N rounds
    #[arg(long, value_name = "N", default_value_t = 21)]
    rounds: u32,

    /// Measure only the 15 rows that matter most, with a verdict; does not write RESULTS.md
    #[arg(long, conflicts_with = "filter")]
    quick: bool,

    /// Run only five short rounds, to test that every row works; does not write RESULTS.md
    #[arg(long)]
    short: bool,

    /// Count the instructions of the hottest operations, and compare with bench/instructions.tsv
    #[arg(long)]
    instructions: bool,

    /// Write the counts to bench/instructions.tsv
    #[arg(long, requires = "instructions")]
    pin: bool,
}

/// The builds that users ship; each is a profile of bench/Cargo.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Build {
    /// Fat LTO, one codegen unit: Firecracker
    Fat,
    /// Cargo's default release profile
    Release,
    /// Fat LTO, optimized for size, abort on panic: Cloud Hypervisor
    Size,
}

const BUILDS: [Build; 3] = [Build::Fat, Build::Release, Build::Size];

impl Build {
    fn name(self) -> &'static str {
        match self {
            Self::Fat => "fat",
            Self::Release => "release",
            Self::Size => "size",
        }
    }
}

impl Args {
    /// Returns the builds to measure.
    fn builds(&self) -> Vec<Build> {
        let mut builds = match (self.builds.is_empty(), self.quick) {
            (false, _) => self.builds.clone(),
            (true, true) => vec![Build::Release],
            (true, false) => BUILDS.to_vec(),
        };
        builds.sort_unstable();
        builds.dedup();
        builds
    }

    /// Returns whether only rows are measured, and not the curves.
    fn rows_only(&self) -> bool {
        self.filter.is_some() || self.quick
    }
}

/// Builds the program, measures, and writes the results.
///
/// # Errors
///
/// Returns an error if a build or a measurement fails, or if a file cannot be written.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let bench = Bench {
        folder: workspace.root.join("bench"),
        target: workspace.target.join("bench"),
    };
    if args.instructions {
        return bench.instructions(args);
    }
    // A file that this command writes would make the checkout count as changed.
    let machine = Machine::ask(&bench.folder)?;
    let builds = args.builds();

    // All builds come first, so that the compilers affect heat and caches of all runs alike.
    let mut programs = Vec::new();
    for build in &builds {
        programs.push((*build, bench.build(*build)?));
    }
    let mut tables = Vec::new();
    for (build, program) in &programs {
        tables.push((*build, bench.measure(*build, program, args)?));
    }
    if args.rows_only() {
        return Ok(true);
    }
    let whole = !args.short && builds == BUILDS;
    let curves = bench.curves(&programs, args)?;
    let run = Run {
        machine: &machine,
        rounds: args.rounds,
        tables: &tables,
        curves: &curves,
    };
    let folder = if whole { &bench.folder } else { &bench.target };
    for (file, text) in [("RESULTS.md", run.results()?), ("rows.md", run.rows()?)] {
        let path = folder.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written: {}", path.display());
    }
    if whole {
        crate::readme::update(&workspace.root, false)?;
    } else {
        println!("bench/RESULTS.md is not written: it needs all builds, all rows and all rounds");
    }
    Ok(true)
}

/// Runs a program, prints its output, and returns the lines.
fn output_of(command: &mut Command) -> Result<Vec<String>> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let output = child.stdout.take().context("the program has no output")?;
    let mut said = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        said.push(line);
    }
    let status = child.wait()?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(said)
}

/// The folder of the program, and the folder of its builds.
struct Bench {
    folder: PathBuf,
    target: PathBuf,
}

impl Bench {
    /// Builds the program and returns its path.
    fn build(&self, build: Build) -> Result<PathBuf> {
        println!("building `{}`", build.name());
        let status = cargo(&self.folder)
            .args([
                "build",
                "--quiet",
                "--profile",
                build.name(),
                "--target-dir",
            ])
            .arg(&self.target)
            .status()
            .context("cannot start cargo")?;
        ensure!(
            status.success(),
            "the build `{}` ended with {status}",
            build.name()
        );
        Ok(self.target.join(build.name()).join("vm-memory-bench"))
    }

    fn program(&self, build: Build, program: &Path, args: &Args) -> Command {
        let mut command = Command::new(program);
        command.args([
            "--build",
            build.name(),
            "--rounds",
            &args.rounds.to_string(),
        ]);
        if args.short {
            command.arg("--short");
        }
        command
    }

    /// Runs all rows of one build.
    fn measure(&self, build: Build, program: &Path, args: &Args) -> Result<Vec<Line>> {
        let tsv = self.target.join(format!("{}.tsv", build.name()));
        let mut command = self.program(build, program, args);
        command.arg("--tsv").arg(&tsv);
        if let Some(filter) = &args.filter {
            command.args(["--filter", filter]);
        }
        if args.quick {
            command.arg("--quick");
        }
        let status = command
            .status()
            .with_context(|| format!("cannot start {}", program.display()))?;
        ensure!(
            status.success(),
            "{} ended with {status}",
            program.display()
        );
        let text =
            fs::read_to_string(&tsv).with_context(|| format!("cannot read {}", tsv.display()))?;
        lines(&text)
            .with_context(|| format!("{} is not a file that the program wrote", tsv.display()))
    }

    /// Measures copies in each build. In the first build, also measures an IOTLB that grows,
    /// operations by several threads, and provisioning.
    fn curves(&self, programs: &[(Build, PathBuf)], args: &Args) -> Result<Curves> {
        let (build, program) = programs.first().context("no build")?;
        let mut throughput = Vec::new();
        for (build, program) in programs {
            let tsv = self.target.join(format!("copies-{}.tsv", build.name()));
            let mut command = self.program(*build, program, args);
            command.arg("--throughput").arg("--tsv").arg(&tsv);
            let verdict = output_of(&mut command)?
                .last()
                .cloned()
                .context("the program printed nothing")?;
            let text = fs::read_to_string(&tsv)
                .with_context(|| format!("cannot read {}", tsv.display()))?;
            let points = points(&text).with_context(|| {
                format!("{} is not a file that the program wrote", tsv.display())
            })?;
            throughput.push((*build, Throughput { verdict, points }));
        }
        let table = |option: &str| -> Result<String> {
            let said = output_of(self.program(*build, program, args).arg(option))?;
            Ok(said.join("\n"))
        };
        Ok(Curves {
            throughput,
            growth: table("--growth")?,
            threads: table("--threads")?,
            provision: table("--provision")?,
        })
    }
}
