//! The comparison with 0.18.0 (`verify/differential`), for as long as one likes.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace::{cargo, Workspace};

/// What is handed on to the comparison.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Options of the comparison: `--seconds 600`, `--ops 50000000`, `--seed 1`, `--survey`; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

/// Builds the comparison and runs it.
pub fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let folder = workspace.root.join("verify/differential");
    let status = cargo(&folder)
        .args(["run", "--release", "--quiet", "--bin", "soak", "--"])
        .args(&args.options)
        .status()
        .with_context(|| format!("cannot run cargo in {}", folder.display()))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
