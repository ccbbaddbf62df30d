//! Runs the program.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use test_support::skipped;

/// The path of the program.
pub const MICROVM: &str = env!("CARGO_BIN_EXE_microvm");

/// Runs microvm to its end.
pub fn microvm(args: &[&str]) -> Output {
    Command::new(MICROVM).args(args).output().unwrap()
}

/// Runs microvm with a report in JSON, which every check must pass.
pub fn report(args: &[&str]) -> Value {
    let output = microvm(&[&["--format", "json"], args].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {text}{errors}");
    let report: Value = serde_json::from_str(&text).unwrap();
    let checks = report["checks"].as_array().unwrap();
    assert!(
        checks.iter().all(|check| check["passed"] == true),
        "{report:#}"
    );
    report
}

/// Returns whether this machine has KVM. Otherwise reports `test` as skipped.
pub fn has_kvm(test: &str) -> bool {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match kvm {
        Ok(_) if cfg!(target_arch = "x86_64") => return true,
        Ok(_) => skipped(test, "a vCPU needs x86_64"),
        Err(e) => skipped(test, format!("/dev/kvm: {e}")),
    }
    false
}

/// Asserts that microvm could not run: status 2, and an error that contains all of `words`.
pub fn assert_refused(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in {stderr}");
    }
}

/// Writes a file into `dir`.
pub fn file(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Returns a path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
