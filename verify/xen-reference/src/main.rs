//! Runs the scenarios of `verify/xen` on vm-memory 0.18.0, and checks that they end as
//! `docs/xen-scenarios.md` lists.
//!
//! No other test runs them on 0.18.0. This one shows that the scenarios of ordinary use expect what
//! 0.18.0 does, and that those for a fault find it. Each scenario runs in a process of its own,
//! since a failure may be a signal.
//!
//! ```text
//! cargo run --manifest-path verify/xen-reference/Cargo.toml
//! ```

#[path = "../../xen/src/double/mod.rs"]
#[expect(dead_code, reason = "the tests of verify/xen use the rest")]
mod double;
#[path = "../../xen/src/environment.rs"]
#[expect(dead_code, reason = "the tests of verify/xen use the rest")]
mod environment;
#[path = "../../xen/src/outcome.rs"]
mod outcome;
#[path = "../../xen/src/scenarios/mod.rs"]
mod scenarios;

use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use double::Double;
use environment::Host;
use outcome::Stop;
use scenarios::Scenario;

crate::interpose!();

/// The outcomes with 0.18.0.
const DOCUMENT: &str = include_str!("../../../docs/xen-scenarios.md");

/// The time after which a scenario counts as hanging.
const LIMIT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match (args.next(), args.next()) {
        (Some(name), Some(host)) => run(&name, &host),
        _ => table(),
    }
}

/// Runs one scenario in this process, and prints what is wrong.
fn run(name: &str, host: &str) -> ExitCode {
    let host = match host {
        "pv" => Host::Pv,
        _ => Host::AutoTranslated,
    };
    let found = scenarios::all().find(|scenario| scenario.name == name);
    match found.map(|scenario| scenario.run(&mut Double::new(host))) {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(Stop::Skipped(reason))) => {
            println!("skipped: {reason}");
            ExitCode::SUCCESS
        }
        Some(Err(Stop::Error { text, .. })) => {
            println!("error: {text}");
            ExitCode::FAILURE
        }
        None => ExitCode::FAILURE,
    }
}

/// Runs each scenario in a child, and prints the table. Fails if it differs from the document.
fn table() -> ExitCode {
    println!("| group | scenario | PV | auto-translated |\n|---|---|---|---|");
    let mut differ = Vec::new();
    for scenario in scenarios::all() {
        let results = ["pv", "auto"].map(|host| verdict(scenario, host));
        let [pv, auto] = results.each_ref().map(|(outcome, reason)| {
            let reason: String = reason.chars().take(100).collect();
            format!("{outcome} {reason}").trim_end().to_owned()
        });
        println!(
            "| {} | `{}` | {pv} | {auto} |",
            scenario.group, scenario.name
        );
        let expected = documented(scenario.name);
        if results.iter().any(|(outcome, _)| *outcome != expected) {
            differ.push(format!("{}: the document has '{expected}'", scenario.name));
        }
    }
    if differ.is_empty() {
        println!("docs/xen-scenarios.md lists these outcomes");
        return ExitCode::SUCCESS;
    }
    eprintln!("docs/xen-scenarios.md differs:\n{}", differ.join("\n"));
    ExitCode::FAILURE
}

/// Returns the outcome on the double that the document lists, which follows the name.
fn documented(name: &str) -> &'static str {
    let name = format!("`{name}`");
    let outcome = |line: &'static str| {
        let mut cells = line.split('|').map(str::trim);
        cells.find(|cell| *cell == name).and_then(|_| cells.next())
    };
    DOCUMENT.lines().find_map(outcome).unwrap_or("no such row")
}

/// Runs a scenario in a child. Returns how it ended, in the words of the document, and why.
fn verdict(scenario: &Scenario, host: &str) -> (&'static str, String) {
    // A pipe that nobody reads would fill up.
    let mut log = double::memory::memfd("log").expect("cannot create a file");
    let program = std::env::current_exe().expect("the program has a path");
    let mut child = Command::new(program)
        .args([scenario.name, host])
        .env("RUST_BACKTRACE", "0")
        .stdout(log.try_clone().expect("a file can be shared"))
        .stderr(log.try_clone().expect("a file can be shared"))
        .spawn()
        .expect("cannot start a child");
    let started = Instant::now();
    while child.try_wait().expect("the child is ours").is_none() {
        if started.elapsed() > LIMIT {
            child.kill().expect("the child is ours");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = child.wait().expect("the child has ended");
    log.rewind().expect("a file has a start");
    let mut output = Vec::new();
    log.read_to_end(&mut output).expect("cannot read the log");
    let output = String::from_utf8_lossy(&output);
    // A panic has its place on a line, and its message on the next.
    let message = output
        .lines()
        .skip_while(|line| !line.contains("panicked at"))
        .nth(1);
    let reason = message.unwrap_or_else(|| output.trim()).to_owned();
    match (status.signal(), status.success()) {
        (Some(libc::SIGKILL), _) => ("hangs", reason),
        (Some(libc::SIGSEGV), _) => ("SIGSEGV", reason),
        (Some(libc::SIGABRT), _) => ("abort", reason),
        (Some(signal), _) => ("fails", format!("signal {signal}")),
        (None, true) if output.contains("skipped") => ("not run", String::new()),
        (None, true) => ("passes", String::new()),
        (None, false) if output.contains("/vm-memory-0.18.0/") => ("panic", reason),
        (None, false) => ("fails", reason),
    }
}
