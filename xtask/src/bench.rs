//! `cargo xtask bench`: the published vm-memory, this crate and the limit, measured in the three builds that users ship.
//!
//! The measuring is done by the program in `bench/`, once for each build. Here they are built and run, their tables are put side by
//! side in `bench/RESULTS.md`, and copy throughput and what an IOTLB costs as it grows are drawn in `bench/*.svg`.
//!
//! `--instructions` counts instructions with callgrind instead, and compares them with `bench/instructions.tsv`: no clock, so no
//! noise.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{bail, ensure, Context, Result};
use clap::ValueEnum;

use crate::workspace::{cargo, Workspace};

/// How often an operation is run under callgrind; the difference of the two leaves out what happens once.
const FEW: u64 = 1_000;
const MANY: u64 = 11_000;

/// How far a count may exceed its pin: another version of glibc or of the compiler moves a few instructions.
const TOLERANCE: f64 = 1.02;

/// The operations whose instructions are counted: what devices do for each request.
const HOT: [&str; 15] = [
    "get_slice64, n=1",
    "read_obj.u16, n=1",
    "read_obj.u64, n=1",
    "read_obj.s16, n=1",
    "write_obj.u64, n=1",
    "write_obj.u64, n=1, AtomicBitmap",
    "load.u16, n=1",
    "store.u64, n=1",
    "read_slice, 64, n=1",
    "virtio-queue 0.18: add_used, n=1",
    "mark_dirty, 1B, already",
    "GuestMemoryReader: memory()",
    "Iotlb::lookup of 8 B hit, n=10000, fragmented",
    "IommuMemory: read_obj.u64 behind an RwLock, n=1, fragmented",
    "IommuMemory: read_obj.u64 behind a SharedIotlb, n=10000",
];

/// What `bench` can be told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only these builds, with commas between them
    #[arg(long = "build", value_enum, value_delimiter = ',', default_values_t = BUILDS)]
    builds: Vec<Build>,

    /// Only rows whose name contains this; RESULTS.md stays as it is
    #[arg(long, value_name = "SUBSTRING")]
    filter: Option<String>,

    /// Rounds of each row
    #[arg(long, value_name = "N", default_value_t = 21)]
    rounds: u32,

    /// Five short rounds, to see that everything runs; RESULTS.md stays as it is
    #[arg(long)]
    quick: bool,

    /// Count the instructions of the hottest operations instead, and compare them with bench/instructions.tsv
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
    /// Cargo's own default
    Release,
    /// Fat, for size, abort on panic: Cloud Hypervisor
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

/// Builds, measures, and writes what was measured.
pub fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let bench = Bench {
        folder: workspace.root.join("bench"),
        target: workspace.target.join("bench"),
    };
    if args.instructions {
        return bench.instructions(args);
    }
    let mut builds = args.builds.clone();
    builds.sort_unstable();
    builds.dedup();

    // All are built before any is run, so that what the compiler leaves behind in caches and clocks meets them alike.
    let mut programs = Vec::new();
    for build in &builds {
        programs.push((*build, bench.build(*build)?));
    }
    let mut tables = Vec::new();
    for (build, program) in &programs {
        tables.push((*build, bench.measure(*build, program, args)?));
    }
    let whole = args.filter.is_none() && !args.quick && builds == BUILDS;
    let curves = if args.filter.is_none() {
        Some(bench.curves(&programs, args, whole)?)
    } else {
        None
    };
    if whole {
        let results = bench.folder.join("RESULTS.md");
        let text = results_text(
            &Machine::ask(&bench.folder)?,
            args.rounds,
            &tables,
            curves.as_ref(),
        )?;
        fs::write(&results, text).with_context(|| format!("cannot write {}", results.display()))?;
        println!("written: {}", results.display());
    } else {
        println!("bench/RESULTS.md stays as it is: that takes all builds, all rows and all rounds");
    }
    Ok(ExitCode::SUCCESS)
}

/// What is measured besides the rows, as RESULTS.md says it.
struct Curves {
    throughput: String,
    growth: String,
    threads: String,
}

/// Runs a program, shows what it says, and returns that line by line.
fn said_by(command: &mut Command) -> Result<Vec<String>> {
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

/// Where the program is, and where it is built.
struct Bench {
    folder: PathBuf,
    target: PathBuf,
}

impl Bench {
    /// Builds the program and returns where it is.
    fn build(&self, build: Build) -> Result<PathBuf> {
        println!("building `{}`", build.name());
        let status = cargo(&self.folder)
            .args(["build", "--quiet", "--profile", build.name(), "--target-dir"])
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
        command.args(["--build", build.name(), "--rounds", &args.rounds.to_string()]);
        if args.quick {
            command.arg("--quick");
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
        let status = command
            .status()
            .with_context(|| format!("cannot start {}", program.display()))?;
        ensure!(status.success(), "{} ended with {status}", program.display());
        let text = fs::read_to_string(&tsv).with_context(|| format!("cannot read {}", tsv.display()))?;
        lines(&text).with_context(|| format!("{}: not what the program writes", tsv.display()))
    }

    /// Draws copy throughput and an IOTLB that grows, measures threads that share one, all of the first build, and returns what RESULTS.md says of
    /// them. Only a whole run replaces the plots of the last one.
    fn curves(&self, programs: &[(Build, PathBuf)], args: &Args, whole: bool) -> Result<Curves> {
        let (build, program) = programs.first().context("no build")?;
        let folder = if whole { &self.folder } else { &self.target };
        let draw = |option: &str, file: &str| -> Result<String> {
            let plot = folder.join(file);
            let mut command = self.program(*build, program, args);
            let said = said_by(command.arg(option).arg(&plot))?;
            println!("written: {}", plot.display());
            said.last().cloned().context("the program said nothing")
        };
        let throughput = draw("--throughput", "copy-throughput.svg")?;
        let growth = draw("--growth", "iotlb-growth.svg")?;
        let threads = said_by(self.program(*build, program, args).arg("--threads"))?.join("\n");
        Ok(Curves {
            throughput,
            growth,
            threads,
        })
    }

    /// Counts the instructions of the hottest operations, and compares or pins them.
    fn instructions(&self, args: &Args) -> Result<ExitCode> {
        let asked = Command::new("valgrind").arg("--version").output();
        if !asked.is_ok_and(|output| output.status.success()) {
            println!("SKIPPED: instruction counts: valgrind is not installed");
            return Ok(ExitCode::SUCCESS);
        }
        let file = self.folder.join("instructions.tsv");
        let mut pins = match fs::read_to_string(&file) {
            Ok(text) => pins(&text).with_context(|| format!("{}: not what --pin writes", file.display()))?,
            Err(_) if args.pin => Pins::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        let mut more = 0u32;
        println!(
            "{:<8} {:<60} {:>9} {:>9}",
            "build", "operation", "counted", "pinned"
        );
        for build in &args.builds {
            let program = self.build(*build)?;
            for operation in HOT {
                let counted = self.count(&program, operation)?;
                let key = (build.name().to_owned(), operation.to_owned());
                let pinned = pins.get(&key).copied();
                let verdict = verdict(counted, pinned);
                let pinned = pinned.map_or_else(|| "–".to_owned(), |pinned| format!("{pinned:.1}"));
                println!(
                    "{:<8} {operation:<60} {counted:>9.1} {pinned:>9} {verdict}",
                    build.name()
                );
                if verdict == MORE || verdict == NOT_PINNED {
                    more = more.saturating_add(1);
                }
                if args.pin {
                    pins.insert(key, counted);
                }
            }
        }
        if args.pin {
            fs::write(&file, pins_text(&pins)).with_context(|| format!("cannot write {}", file.display()))?;
            println!("written: {}", file.display());
            return Ok(ExitCode::SUCCESS);
        }
        if more > 0 {
            println!("{more} operations take more instructions than pinned, or have no pin");
            return Ok(ExitCode::FAILURE);
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Instructions of one run of an operation.
    fn count(&self, program: &Path, operation: &str) -> Result<f64> {
        let few = self.callgrind(program, operation, FEW)?;
        let many = self.callgrind(program, operation, MANY)?;
        let difference = u32::try_from(
            many.checked_sub(few)
                .context("more runs take fewer instructions")?,
        )
        .context("more than 2^32 instructions")?;
        let runs = u32::try_from(MANY.saturating_sub(FEW))?;
        Ok(f64::from(difference) / f64::from(runs))
    }

    /// Instructions of the whole program, when it runs an operation so many times.
    fn callgrind(&self, program: &Path, operation: &str, iterations: u64) -> Result<u64> {
        let profile = self.target.join("callgrind.out");
        let output = Command::new("valgrind")
            .arg("--tool=callgrind")
            .arg(format!("--callgrind-out-file={}", profile.display()))
            .arg(program)
            .args(["--count", operation, "--iterations", &iterations.to_string()])
            .output()
            .context("cannot start valgrind")?;
        ensure!(
            output.status.success(),
            "{operation}: valgrind ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let text = fs::read_to_string(&profile)?;
        total(&text).with_context(|| format!("{}: has no total", profile.display()))
    }
}

const MORE: &str = "MORE";
const NOT_PINNED: &str = "NOT PINNED";

fn verdict(counted: f64, pinned: Option<f64>) -> &'static str {
    match pinned {
        None => NOT_PINNED,
        Some(pinned) if counted > pinned * TOLERANCE + 0.5 => MORE,
        Some(pinned) if counted < pinned / TOLERANCE - 0.5 => "fewer: pin it",
        Some(_) => "",
    }
}

/// The total of a profile that callgrind wrote.
fn total(profile: &str) -> Option<u64> {
    profile
        .lines()
        .find_map(|line| {
            line.strip_prefix("summary:")
                .or_else(|| line.strip_prefix("totals:"))
        })
        .and_then(|total| total.trim().parse().ok())
}

/// Build and operation, and how many instructions.
type Pins = BTreeMap<(String, String), f64>;

fn pins(text: &str) -> Result<Pins> {
    let mut pins = Pins::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut fields = line.split('\t');
        let (Some(build), Some(operation), Some(count), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            bail!("'{line}' has not three fields");
        };
        let count = count
            .parse()
            .with_context(|| format!("'{count}' is not a number"))?;
        pins.insert((build.to_owned(), operation.to_owned()), count);
    }
    Ok(pins)
}

fn pins_text(pins: &Pins) -> String {
    let mut text = String::from(
        "# Instructions of one operation, counted by `cargo xtask bench --instructions --pin` (rustc 1.95, x86_64).\n",
    );
    for ((build, operation), count) in pins {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{build}\t{operation}\t{count:.1}");
    }
    text
}

/// A row of one build.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    operation: String,
    reference: f64,
    ours: f64,
    limit: Option<f64>,
    ratio: f64,
    aim: f64,
}

impl Line {
    fn falls_short(&self) -> bool {
        self.ratio < self.aim
    }
}

/// Reads what the program wrote with `--tsv`.
fn lines(text: &str) -> Result<Vec<Line>> {
    let number = |field: &str| -> Result<f64> {
        field
            .parse()
            .with_context(|| format!("'{field}' is not a number"))
    };
    let mut lines = Vec::new();
    for line in text.lines().skip(1) {
        let fields: Vec<_> = line.split('\t').collect();
        let &[operation, reference, ours, limit, ratio, _of_limit, aim] = fields.as_slice() else {
            bail!("'{line}' has not seven fields");
        };
        lines.push(Line {
            operation: operation.to_owned(),
            reference: number(reference)?,
            ours: number(ours)?,
            limit: if limit.is_empty() {
                None
            } else {
                Some(number(limit)?)
            },
            ratio: number(ratio)?,
            aim: number(aim)?,
        });
    }
    ensure!(!lines.is_empty(), "no rows");
    Ok(lines)
}

/// What a result depends on.
struct Machine {
    processor: String,
    kernel: String,
    compiler: String,
    commit: String,
    date: String,
}

impl Machine {
    fn ask(folder: &Path) -> Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let models: Vec<_> = processors
            .lines()
            .filter(|line| line.starts_with("model name"))
            .filter_map(|line| line.split_once(':').map(|(_, model)| model.trim()))
            .collect();
        let changed = !said(Command::new("git").current_dir(folder).args([
            "status",
            "--porcelain",
            "--",
            "../src",
            "../Cargo.toml",
            ".",
        ]))?
        .is_empty();
        let commit = said(
            Command::new("git")
                .current_dir(folder)
                .args(["rev-parse", "--short", "HEAD"]),
        )?;
        Ok(Self {
            processor: format!(
                "{}× {}",
                models.len(),
                models.first().unwrap_or(&"unknown processor")
            ),
            kernel: said(Command::new("uname").args(["-s", "-r", "-m"]))?,
            compiler: said(Command::new("rustc").arg("--version").current_dir(folder))?,
            commit: if changed {
                format!("{commit}, changed")
            } else {
                commit
            },
            date: said(Command::new("date").args(["-u", "+%F"]))?,
        })
    }
}

/// What a command prints.
fn said(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// RESULTS.md.
fn results_text(
    machine: &Machine,
    rounds: u32,
    tables: &[(Build, Vec<Line>)],
    curves: Option<&Curves>,
) -> Result<String> {
    let mut text = String::from("# The last run of `cargo xtask bench`\n\n");
    writeln!(text, "- Machine: {}, {}", machine.processor, machine.kernel)?;
    writeln!(text, "- Compiler: {}", machine.compiler)?;
    writeln!(text, "- Commit: {}", machine.commit)?;
    writeln!(text, "- Date: {}", machine.date)?;
    writeln!(
        text,
        "- {rounds} rounds, interleaved (reference, ours, limit) in one binary; medians; the ratio is reference ÷ ours, pair by \
         pair. Processor time of the thread, not of the clock on the wall.\n"
    )?;
    for (build, lines) in tables {
        let short = lines.iter().filter(|line| line.falls_short()).count();
        writeln!(
            text,
            "- `{}`: {} rows, {short} short of their aim",
            build.name(),
            lines.len()
        )?;
    }
    if let Some(curves) = curves {
        writeln!(
            text,
            "- Copies of 1 B to 16 MiB, {}\n- {}\n\n![Copy throughput](copy-throughput.svg)\n\n![An IOTLB as it grows](iotlb-growth.svg)\n\n\
             {}",
            curves.throughput, curves.growth, curves.threads
        )?;
    }
    text.push_str(
        "\nns an operation unless it says otherwise; fat / release / size. **Bold**: short of the aim.\n\n",
    );
    text.push_str("| operation | reference | ours | limit | ratio | aim |\n|---|---|---|---|---|---|\n");

    let (_, first) = tables.first().context("no build")?;
    for row in first {
        let mut cells: [Vec<String>; 5] = Default::default();
        for (build, lines) in tables {
            let line = lines
                .iter()
                .find(|line| line.operation == row.operation)
                .with_context(|| format!("`{}` has no row '{}'", build.name(), row.operation))?;
            let ratio = digits(line.ratio);
            let ratio = if line.falls_short() {
                format!("**{ratio}**")
            } else {
                ratio
            };
            let limit = line.limit.map_or_else(|| "–".to_owned(), time);
            let values = [
                time(line.reference),
                time(line.ours),
                limit,
                ratio,
                line.aim.to_string(),
            ];
            for (cell, value) in cells.iter_mut().zip(values) {
                cell.push(value);
            }
        }
        let cells = cells.map(|cell| cell.join(" / "));
        writeln!(text, "| {} | {} |", row.operation, cells.join(" | "))?;
    }
    Ok(text)
}

/// A time as people read it; without a unit: nanoseconds.
fn time(nanoseconds: f64) -> String {
    if nanoseconds >= 1e6 {
        format!("{} ms", digits(nanoseconds / 1e6))
    } else if nanoseconds >= 1e4 {
        format!("{} µs", digits(nanoseconds / 1e3))
    } else {
        digits(nanoseconds)
    }
}

/// Three digits, or all of those before the point.
fn digits(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::{
        lines, pins, pins_text, results_text, time, total, verdict, Build, Machine, MORE, NOT_PINNED,
    };

    const TSV: &str = "operation\treference\tours\tlimit\tratio\tof_limit\taim\n\
                       fast\t50.0\t2.0\t1.0\t25.0\t0.5\t20\n\
                       slow\t25000.0\t20000.0\t\t1.25\t\t2\n";

    #[test]
    fn rows_are_read() {
        let lines = lines(TSV).unwrap();
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].ours, lines[0].limit), (2.0, Some(1.0)));
        assert!(!lines[0].falls_short());
        assert_eq!(lines[1].limit, None);
        assert!(lines[1].falls_short());
    }

    #[test]
    fn what_is_not_a_table_is_refused() {
        assert!(lines("operation\n").is_err());
        assert!(lines("head\nname\t1\t2\n").is_err());
        assert!(lines("head\nname\tx\t2\t3\t4\t5\t6\n").is_err());
    }

    #[test]
    fn builds_stand_side_by_side() {
        let machine = Machine {
            processor: "2× somebody's".to_owned(),
            kernel: "Linux".to_owned(),
            compiler: "rustc".to_owned(),
            commit: "abc".to_owned(),
            date: "2025-01-01".to_owned(),
        };
        let tables = [Build::Fat, Build::Size].map(|build| (build, lines(TSV).unwrap()));
        let curves = super::Curves {
            throughput: "median 1.0".into(),
            growth: "a million: 2 ns".into(),
            threads: "| by | a | b |".into(),
        };
        let text = results_text(&machine, 21, &tables, Some(&curves)).unwrap();
        assert!(text.contains("a million: 2 ns") && text.contains("| by | a | b |"));
        assert!(text.contains("| fast | 50.0 / 50.0 | 2.00 / 2.00 | 1.00 / 1.00 | 25.0 / 25.0 | 20 / 20 |"));
        assert!(text.contains(
            "| slow | 25.0 µs / 25.0 µs | 20.0 µs / 20.0 µs | – / – | **1.25** / **1.25** | 2 / 2 |"
        ));
        assert!(text.contains("`size`: 2 rows, 1 short"));

        let mut torn = tables;
        torn[1].1.pop();
        assert!(results_text(&machine, 21, &torn, None).is_err());
    }

    #[test]
    fn times() {
        assert_eq!(time(9999.0), "9999");
        assert_eq!(time(54_321.0), "54.3 µs");
        assert_eq!(time(2_500_000.0), "2.50 ms");
    }

    #[test]
    fn pins_are_read_as_written() {
        let text = "# head\nfat\tread, n=1\t41.0\nsize\tread, n=1\t44.5\n";
        let read = pins(text).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(pins(&pins_text(&read)).unwrap(), read);
        assert!(pins("fat\tread\n").is_err());
        assert!(pins("fat\tread\tmany\n").is_err());
    }

    #[test]
    fn a_regression_is_seen() {
        assert_eq!(verdict(41.0, Some(41.0)), "");
        assert_eq!(verdict(43.0, Some(41.0)), MORE);
        assert_eq!(verdict(30.0, Some(41.0)), "fewer: pin it");
        assert_eq!(verdict(30.0, None), NOT_PINNED);
    }

    #[test]
    fn totals_of_callgrind() {
        assert_eq!(total("version: 1\nsummary: 1234\n"), Some(1234));
        assert_eq!(total("fn=x\ntotals: 99\n"), Some(99));
        assert_eq!(total("fn=x\n"), None);
    }
}
