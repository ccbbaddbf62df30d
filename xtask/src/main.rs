//! Maintenance tasks: `cargo xtask --help` lists them.
//!
//! Each command is a module with an `Args` and a `run`, which returns whether the command has
//! passed. A new command needs a module, a variant of [`Command`], and an arm in [`main`].
//!
//! # Layers
//!
//! ```text
//! debian, lexer, log, workspace
//! source
//! bench, changelog, compat, emulate, layers, prose, readme, soak, xen
//! ```

#![cfg_attr(
    not(test),
    deny(
        missing_docs,
        missing_debug_implementations,
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

mod bench;
mod changelog;
mod compat;
mod debian;
mod emulate;
mod layers;
mod lexer;
mod log;
mod prose;
mod readme;
mod soak;
mod source;
mod workspace;
mod xen;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use workspace::Workspace;

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    about = "Maintenance tasks: compatibility runs, benchmarks, cross-target tests, checks of the sources"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
enum Command {
    /// Run the tests of crates and VMMs that use vm-memory against this crate
    Compat(compat::Args),
    /// Measure 0.18.0, this crate and the limit side by side
    Bench(bench::Args),
    /// Check that CHANGELOG.md names each public item that 0.18.0 does not have
    Changelog,
    /// Test the library on other targets, most of them under emulation
    Emulate(emulate::Args),
    /// Check that modules import only from the layers that their crate allows
    Layers(layers::Args),
    /// Report forbidden phrases, long lines and long sentences in comments and documentation
    Prose(prose::Args),
    /// Write the tables of README.md that have figures of bench/rows.md
    Readme(readme::Args),
    /// Run the same random operations on 0.18.0 and on this crate, for any length of time
    Soak(soak::Args),
    /// Run the scenarios of the feature `xen` on real Xen, under emulation
    Xen(xen::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = Workspace::find().and_then(|workspace| match cli.command {
        Command::Compat(args) => compat::run(&workspace, &args),
        Command::Bench(args) => bench::run(&workspace, &args),
        Command::Changelog => changelog::run(&workspace),
        Command::Emulate(args) => emulate::run(&workspace, &args),
        Command::Layers(args) => layers::run(&workspace, &args),
        Command::Prose(args) => prose::run(&workspace, &args),
        Command::Readme(args) => readme::run(&workspace, &args),
        Command::Soak(args) => soak::run(&workspace, &args),
        Command::Xen(args) => xen::run(&workspace, &args),
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
