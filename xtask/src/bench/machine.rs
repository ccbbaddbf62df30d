//! The machine and the versions that a result depends on.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};

/// The machine and the versions that a result depends on.
pub(super) struct Machine {
    pub(super) processor: String,
    pub(super) kernel: String,
    pub(super) compiler: String,
    pub(super) commit: String,
    pub(super) date: String,
}

impl Machine {
    pub(super) fn ask(folder: &Path) -> Result<Self> {
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
            "../vm-memory-host",
            "../Cargo.toml",
            ".",
        ]))?
        .is_empty();
        let commit =
            said(
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

/// Returns the output of a command.
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
