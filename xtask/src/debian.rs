//! Debian's packages: which ones are installed, and their installation.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{ensure, Context, Result};

/// A Debian package, and a file that exists if it is installed.
#[derive(Debug)]
pub struct Tool {
    /// The file.
    pub file: &'static str,
    /// The package.
    pub package: &'static str,
}

/// Returns the tool that consists of `file`, in `package`.
pub const fn tool(file: &'static str, package: &'static str) -> Tool {
    Tool { file, package }
}

/// Debian's compiler. It has a standard library for arm64, and the library's source for other
/// targets.
pub const RUSTC: Tool = tool("/usr/bin/rustc", "rustc-web");
/// The cargo of that compiler.
pub const CARGO: Tool = tool("/usr/bin/cargo", "cargo-web");
/// The target of [`CROSS`].
pub const AARCH64_LINUX: &str = "aarch64-unknown-linux-gnu";
/// The tools that build programs for arm64.
pub const CROSS: [Tool; 5] = [
    RUSTC,
    CARGO,
    tool(
        "/usr/lib/rustlib/aarch64-unknown-linux-gnu/lib",
        "libstd-rust-web-dev:arm64",
    ),
    tool("/usr/bin/aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    tool(
        "/usr/aarch64-linux-gnu/lib/libc.so.6",
        "libc6-dev-arm64-cross",
    ),
];

/// Returns the packages that are not installed.
pub fn missing<'a>(tools: impl IntoIterator<Item = &'a Tool>) -> Vec<&'static str> {
    let missing = tools
        .into_iter()
        .filter(|tool| !Path::new(tool.file).exists());
    missing.map(|tool| tool.package).collect()
}

/// Installs packages.
///
/// # Errors
///
/// Returns an error if dpkg or apt-get fails, for example without root.
pub fn install(packages: &[&str]) -> Result<()> {
    if packages.iter().any(|package| package.ends_with(":arm64")) {
        add_arm64()?;
    }
    update()?;
    let install = ["install", "-y", "-qq", "--no-install-recommends"];
    succeed(
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(install)
            .args(packages),
    )
}

/// Adds the architecture arm64 to dpkg.
///
/// # Errors
///
/// Returns an error if dpkg fails, for example without root.
pub fn add_arm64() -> Result<()> {
    succeed(Command::new("dpkg").args(["--add-architecture", "arm64"]))
}

/// Updates the lists of packages.
///
/// # Errors
///
/// Returns an error if apt-get fails, for example without a network.
pub fn update() -> Result<()> {
    succeed(Command::new("apt-get").args(["update", "-qq"]))
}

/// Runs a command that must succeed, and discards its output.
///
/// # Errors
///
/// Returns an error if it does not start, or does not succeed.
pub fn succeed(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}
