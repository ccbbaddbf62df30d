//! Running the binary.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// The path of the binary under test.
pub const MICROVM: &str = env!("CARGO_BIN_EXE_microvm");

/// Runs microvm to its end.
pub fn microvm(args: &[&str]) -> Output {
    Command::new(MICROVM).args(args).output().unwrap()
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Whether KVM can be used; if not, says aloud that `test` is skipped.
pub fn has_kvm(test: &str) -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) if cfg!(target_arch = "x86_64") => true,
        other => {
            skipped(test, &format!("no usable /dev/kvm ({:?})", other.err()));
            false
        }
    }
}

/// Says aloud that `test` is skipped. Not by println, which is not shown when a test passes; and in one write, so that
/// nothing that others say at the same time comes between.
pub fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// A run that could not start: status 2, and one line of standard error with all of `words`.
pub fn assert_refused(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("microvm: ") && stderr.ends_with('\n'),
        "{stderr}"
    );
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

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
