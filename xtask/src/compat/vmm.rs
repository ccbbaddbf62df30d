//! `cargo xtask compat --vmm`: the unit tests of a virtual machine monitor, on this crate.
//!
//! The checkout is copied to `target/compat/vmm`, and this checkout is patched in for `vm-memory`
//! there. The monitor's own code does not change. Both monitors take the crate `micro_http` from
//! GitHub; a machine without access to it needs a checkout of
//! `https://github.com/firecracker-microvm/micro-http`, named by `--micro-http`.
//!
//! The compiler is the one that runs this command. A monitor that needs a newer one is run with
//! `cargo +1.97.0 xtask compat --vmm …`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use clap::ValueEnum;

use super::counts::Counts;
use super::{build, copy_all, tail, Harness};

/// The time limit of a test program. Firecracker's takes minutes.
const TEST_PROGRAM_LIMIT_SECONDS: u32 = 1800;

/// The dependency that both monitors take from GitHub.
const MICRO_HTTP: &str = "git = \"https://github.com/firecracker-microvm/micro-http\"";

/// The history and the folders of build output, which are not copied.
const NOT_COPIED: [&str; 3] = [".git", "build", "target"];

/// A virtual machine monitor that uses vm-memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Monitor {
    /// Firecracker: the library tests of its crate `vmm`, one after another
    Firecracker,
    /// Cloud Hypervisor: the tests of its workspace
    CloudHypervisor,
}

impl Monitor {
    fn name(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// Returns the arguments of `cargo test`.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Firecracker => &["-p", "vmm", "--lib"],
            Self::CloudHypervisor => &[
                "--workspace",
                "--exclude",
                "performance-metrics",
                "--exclude",
                "test_infra",
            ],
        }
    }

    /// Returns the arguments of the test programs.
    fn test_arguments(self) -> &'static [&'static str] {
        match self {
            // The first one maps more regions than a small machine allows; the second one expects
            // KVM to refuse a frequency that nested KVM accepts.
            Self::Firecracker => &[
                "--test-threads=1",
                "--skip",
                "test_too_many_regions",
                "--skip",
                "test_set_tsc",
            ],
            // These documentation tests read and write state that nested KVM does not have.
            Self::CloudHypervisor => &["--skip", "KvmVcpu::state", "--skip", "KvmVcpu::set_state"],
        }
    }

    /// Returns the number of tests that pass on vm-memory 0.18.0, and the date of the counted
    /// commit.
    fn expected(self) -> (u64, &'static str) {
        match self {
            Self::Firecracker => (781, "2026-08-21"),
            Self::CloudHypervisor => (829, "2026-08-22"),
        }
    }
}

/// Copies the checkout, runs its tests there, and prints the counts.
///
/// # Errors
///
/// Returns an error if the checkout cannot be copied, or if cargo cannot resolve its dependencies.
pub fn run(
    harness: &Harness,
    monitor: Monitor,
    checkout: &Path,
    micro_http: Option<&Path>,
) -> Result<bool> {
    let name = monitor.name();
    let folder = harness.folder.join("vmm");
    let copy = folder.join(name);
    copy_checkout(checkout, &copy, micro_http)
        .with_context(|| format!("cannot copy {} to {}", checkout.display(), copy.display()))?;
    let dependents = update_arc_swap(harness, &copy)
        .and_then(|()| dependents(harness, &copy))
        .context(match micro_http {
            Some(_) => "cargo cannot resolve the dependencies",
            None => {
                "cargo cannot resolve the dependencies; without access to GitHub, use --micro-http"
            }
        })?;
    println!("{name}: {dependents} crates depend on vm-memory");

    let suffix = if harness.published { ".published" } else { "" };
    let log = folder.join(format!("{name}{suffix}.log"));
    File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let started = Instant::now();
    let mut counts = Counts::default();
    println!("{name}: building and testing; the log is {}", log.display());
    let outcome = test(harness, monitor, &copy, &log, &mut counts);
    let (expected, day) = monitor.expected();
    println!(
        "{name}: {} passed, {} failed, {} ignored, {} left out in {} s; {expected} passed on \
         vm-memory 0.18.0 at the commit of {day}",
        counts.passed,
        counts.failed,
        counts.ignored,
        counts.left_out,
        started.elapsed().as_secs()
    );
    if let Err(failure) = &outcome {
        eprintln!("{name}: FAILED: {failure:#}\n{}", tail(&log));
    }
    Ok(outcome.is_ok())
}

/// Builds and runs the tests.
fn test(
    harness: &Harness,
    monitor: Monitor,
    copy: &Path,
    log: &Path,
    counts: &mut Counts,
) -> Result<()> {
    let command = || {
        let mut command = harness.cargo_test_in(copy, TEST_PROGRAM_LIMIT_SECONDS, "vmm/target");
        command.args(monitor.arguments());
        command
    };
    let found = build(command(), log).context("cannot build the test programs")?;
    let mut command = command();
    command
        .args(["--no-fail-fast", "--"])
        .args(monitor.test_arguments());
    let (expected, _) = monitor.expected();
    harness.run_tests(monitor.name(), &found, command, log, expected, counts)?;
    Ok(())
}

/// Copies a checkout without its choice of compiler. Its manifests take the crate `micro_http` from
/// the folder `micro_http`, if there is one.
fn copy_checkout(checkout: &Path, copy: &Path, micro_http: Option<&Path>) -> Result<()> {
    if copy.exists() {
        fs::remove_dir_all(copy)?;
    }
    fs::create_dir_all(copy)?;
    let micro_http = micro_http.map(Path::canonicalize).transpose()?;
    for entry in fs::read_dir(checkout)? {
        let entry = entry?;
        if NOT_COPIED.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        copy_all(&entry.path(), &copy.join(entry.file_name()))?;
    }
    for name in ["rust-toolchain", "rust-toolchain.toml"] {
        let toolchain = copy.join(name);
        if toolchain.exists() {
            fs::remove_file(toolchain)?;
        }
    }
    if let Some(micro_http) = micro_http {
        for manifest in manifests(copy)? {
            let text = fs::read_to_string(&manifest)?;
            let local = format!("path = {:?}", micro_http.display().to_string());
            let changed = text
                .replace(&format!("{MICRO_HTTP}, branch = \"main\""), &local)
                .replace(MICRO_HTTP, &local);
            if changed != text {
                fs::write(&manifest, changed)?;
            }
        }
    }
    Ok(())
}

/// Returns the manifests in a folder.
fn manifests(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(manifests(&entry.path())?);
        } else if entry.file_name() == "Cargo.toml" {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Updates arc-swap in the lock file, if it has one: this crate needs 1.9.5 or later.
fn update_arc_swap(harness: &Harness, copy: &Path) -> Result<()> {
    let lock = fs::read_to_string(copy.join("Cargo.lock")).unwrap_or_default();
    if harness.published || !lock.contains("name = \"arc-swap\"") {
        return Ok(());
    }
    let status = harness
        .patched_cargo(copy)
        .args(["update", "--quiet", "--package", "arc-swap"])
        .status()
        .context("cannot start cargo")?;
    ensure!(
        status.success(),
        "cargo update --package arc-swap ended with {status}"
    );
    Ok(())
}

/// Returns the number of packages that depend on vm-memory, directly or indirectly.
fn dependents(harness: &Harness, copy: &Path) -> Result<usize> {
    let output = harness
        .patched_cargo(copy)
        .args(["tree", "--workspace", "--invert", "vm-memory"])
        .args(["--prefix", "none", "--edges", "normal,build,dev"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(
        output.status.success(),
        "cargo tree --invert vm-memory ended with {}",
        output.status
    );
    Ok(count_dependents(&String::from_utf8_lossy(&output.stdout)))
}

fn count_dependents(tree: &str) -> usize {
    let packages: BTreeSet<_> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "vm-memory" && !name.starts_with('['))
        .collect();
    packages.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_dependents_counts_each_package_once() {
        let tree = "vm-memory v0.18.0 (/here)\nvirtio-queue v0.18.0\nvmm v0.1.0 (/there)\n\
                    vmm v0.1.0 (/there) (*)\n[dev-dependencies]\nblock v0.1.0\n";
        assert_eq!(count_dependents(tree), 3);
    }

    #[test]
    fn copy_checkout_replaces_micro_http_and_leaves_out_history() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let http = folder.path().join("micro-http");
        for made in [from.join(".git"), from.join("vmm"), http.clone()] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(from.join("rust-toolchain.toml"), "").unwrap();
        let dependency = format!("micro_http = {{ {MICRO_HTTP}, branch = \"main\" }}\n");
        fs::write(from.join("vmm/Cargo.toml"), dependency).unwrap();
        copy_checkout(&from, &to, Some(&http)).unwrap();
        assert!(!to.join(".git").exists() && !to.join("rust-toolchain.toml").exists());
        assert_eq!(
            fs::read_to_string(to.join("vmm/Cargo.toml")).unwrap(),
            format!(
                "micro_http = {{ path = {:?} }}\n",
                http.canonicalize().unwrap().display().to_string()
            )
        );
    }
}
