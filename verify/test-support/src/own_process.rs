//! [`in_own_process`]: runs a test in a process of its own. [`run_again`]: starts that process.

use std::io::Write;
use std::process::Command;

/// The environment variable that is set in the process of a test.
const ALONE: &str = "TEST_SUPPORT_ALONE";

/// Runs `body` in a separate process that runs no other test. `body` receives the test's name.
///
/// A test calls this once, with its own name. The test program starts itself again for that test.
/// `body` may change state of the whole process: limits, capabilities, mappings.
///
/// # Panics
///
/// Panics if `body` panics, or if `test` is not the name of a test of this program.
#[track_caller]
pub fn in_own_process(test: &str, body: impl FnOnce(&str)) {
    if std::env::var_os(ALONE).is_some() {
        return body(test);
    }
    let mut program = Command::new(std::env::current_exe().expect("this program has a path"));
    run_again(program.env(ALONE, ""), test);
}

/// Runs `test` alone with a command that starts this program, and checks that it passes.
///
/// Forwards the reports of skipped tests.
///
/// # Panics
///
/// Panics if the command fails, or if it runs no test.
#[track_caller]
pub fn run_again(command: &mut Command, test: &str) {
    let output = command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        // A test at a memory limit cannot allocate a backtrace.
        .env("RUST_BACKTRACE", "0")
        .output()
        .expect("this program can be started");
    let stderr = String::from_utf8_lossy(&output.stderr);
    for line in stderr.lines().filter(|line| line.starts_with("SKIPPED")) {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    assert!(output.status.success(), "{}: {stderr}", output.status);
    // With a wrong name, no test runs.
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "this program has no test {test}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_own_process_runs_body_in_another_process() {
        let test = "own_process::tests::in_own_process_runs_body_in_another_process";
        let parent = "TEST_SUPPORT_PARENT";
        if std::env::var_os(ALONE).is_none() {
            std::env::set_var(parent, std::process::id().to_string());
        }
        in_own_process(test, |name| {
            assert_eq!(name, test);
            let started_by = std::env::var(parent).expect("the parent sets it");
            assert_ne!(started_by, std::process::id().to_string());
        });
    }

    #[test]
    #[should_panic(expected = "exit status: 7")]
    fn in_own_process_that_fails_panics() {
        // In that process, a panic would pass the test.
        let test = "own_process::tests::in_own_process_that_fails_panics";
        in_own_process(test, |_| std::process::exit(7));
    }

    #[test]
    #[should_panic(expected = "has no test of_no_such_name")]
    fn in_own_process_of_unknown_test_panics() {
        in_own_process("of_no_such_name", |_| ());
    }
}
