//! The steps that are more than one run of cargo.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};

use super::harness::{variable, Harness};
use super::objects::compare_routines;
use super::suites::{native, Compiler, Platform, Suite};
use crate::debian::AARCH64_LINUX;

/// A processor with the base instruction set, and one with all instructions that qemu supports.
pub(super) const BASE_PROCESSOR: &str = "cortex-a72";
const ANY_PROCESSOR: &str = "max";

/// The error of a target whose pointers have 32 bits (`src/lib.rs`).
const REFUSED: &str = "error: vm-memory: only targets with pointers of 64 bits are supported";

/// The section of the fault table (`src/access/arch/fault_table.rs`).
const SECTION: &[u8] = b"vm_memory_faults_1";

/// Checks that the library that was tested has a fault table.
///
/// It shows that the tests ran on the assembly.
pub(super) fn has_fault_table(harness: &Harness, suite: &Suite) -> Result<String> {
    let built = harness
        .folder
        .join(suite.platform.target)
        .join("debug/deps");
    for entry in fs::read_dir(&built).with_context(|| format!("cannot read {}", built.display()))? {
        let file = entry?.path();
        let library = file
            .extension()
            .is_some_and(|extension| extension == "rlib");
        if library && file.to_string_lossy().contains("libvm_memory-") && contains(&file, SECTION)?
        {
            return Ok("with a fault table".to_owned());
        }
    }
    bail!("no library in {} has a fault table", built.display())
}

/// Tests the access routines with the instructions of LSE instead of loops. They must not run on a
/// processor without LSE, which proves that the build contains these instructions.
pub(super) fn aarch64_lse(harness: &Harness, suite: &Suite) -> Result<String> {
    let platform = &suite.platform;
    let with_lse = |processor| {
        let mut command = harness.test(platform, &["vm-memory"]);
        command
            .env("QEMU_CPU", processor)
            .env(
                variable(platform.target, "RUSTFLAGS"),
                "-Ctarget-feature=+lse",
            )
            // A separate folder, so that the other suite is not rebuilt on the next run.
            .env("CARGO_TARGET_DIR", harness.folder.join("lse"));
        command
    };
    let mut refused = with_lse(BASE_PROCESSOR);
    refused.args(["--lib", "access::tests::chosen::fetch"]);
    let (status, _) = harness.keep("aarch64-lse-refused", &mut refused)?;
    ensure!(
        !status.success(),
        "the build for LSE runs on a processor without LSE"
    );
    let mut routines = with_lse(ANY_PROCESSOR);
    routines.args(["--lib", "access::"]);
    let counts = harness.count("aarch64-lse", routines)?;
    Ok(format!("access routines: {counts}"))
}

/// Builds an object of the library for macOS, and compares its access routines with those of Linux,
/// which other suites test. It must not have a fault table.
pub(super) fn same_routines(harness: &Harness, suite: &Suite) -> Result<String> {
    let processor = suite.platform.target.split('-').next().unwrap_or_default();
    let linux = match processor {
        "aarch64" => native(AARCH64_LINUX, Compiler::Debian),
        _ => native("x86_64-unknown-linux-gnu", Compiler::Debian),
    };
    let (elf, macho) = (object(harness, &linux)?, object(harness, &suite.platform)?);
    ensure!(
        contains(&elf, SECTION)? && !contains(&macho, SECTION)?,
        "only the object for Linux has a fault table"
    );
    let routines = compare_routines(&elf, &macho)?;
    ensure!(routines >= 8, "only {routines} routines");
    Ok(format!(
        "{routines} routines are those of {processor} Linux"
    ))
}

/// Builds an object of the library without features.
fn object(harness: &Harness, platform: &Platform) -> Result<PathBuf> {
    let name = format!("object-{}", platform.target);
    let object = harness.folder.join(format!("{name}.o"));
    let mut command = harness.cargo(platform, "rustc");
    command
        .args(["-p", "vm-memory", "--lib", "--no-default-features", "--"])
        .arg(format!("--emit=obj={}", object.display()));
    harness.log(&name, &mut command)?;
    Ok(object)
}

/// Checks that the library refuses a target with pointers of 32 bits, with four sets of features.
/// The message must be the first error.
pub(super) fn refused(harness: &Harness, suite: &Suite) -> Result<String> {
    let all = harness.features.join(",");
    let sets = ["", "backend-mmap", "xen", &all];
    for features in sets {
        let mut command = harness.cargo(&suite.platform, "check");
        command.args([
            "-p",
            "vm-memory",
            "--no-default-features",
            "--features",
            features,
        ]);
        let (status, text) = harness.keep(suite.name, &mut command)?;
        let first = text.lines().find(|line| line.starts_with("error"));
        ensure!(
            !status.success() && first.is_some_and(|first| first.starts_with(REFUSED)),
            "with the features {features:?}, the first error is {first:?}"
        );
    }
    Ok(format!("refused with {} sets of features", sets.len()))
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
}
