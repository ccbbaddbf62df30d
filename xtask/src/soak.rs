//! `cargo xtask soak`: the differential test (`verify/differential`) for any length of time.

use anyhow::{Context, Result};

use crate::workspace::{cargo, Workspace};

/// The options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Options of the test, such as `--seconds 600` or `--ops 50000000`; `-- --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

/// Builds the differential test and runs it.
///
/// # Errors
///
/// Returns an error if cargo cannot be started.
pub fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let folder = workspace.root.join("verify/differential");
    let status = cargo(&folder)
        .args(["run", "--release", "--quiet", "--bin", "soak", "--"])
        .args(&args.options)
        .status()
        .with_context(|| format!("cannot run cargo in {}", folder.display()))?;
    Ok(status.success())
}
