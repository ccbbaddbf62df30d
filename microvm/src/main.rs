//! `microvm`: runs a guest on KVM and reports what it did. The virtual machine monitor is
//! [`microvm::vmm::run`]: start reading there.

#![cfg_attr(
    not(test),
    deny(
        missing_docs,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::multiple_unsafe_ops_per_block,
        clippy::panic,
        clippy::unwrap_used
    )
)]

use std::error::Error;
use std::io::{self, Write};
use std::iter::successors;
use std::process::ExitCode;

use clap::Parser;
use microvm::args::{Args, Format};
#[cfg(target_arch = "x86_64")]
use microvm::vmm::run;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(report) => {
            // A closed standard output is not a failure of the guest.
            let _ = match args.format {
                Format::Text => write!(io::stdout(), "{report}"),
                Format::Json => serde_json::to_writer(io::stdout(), &report).map_err(Into::into),
            };
            ExitCode::from(u8::from(!report.passed()))
        }
        Err(e) => {
            let causes = successors(Some(&e as &dyn Error), |&e| e.source());
            let messages: Vec<String> = causes.map(ToString::to_string).collect();
            let _ = writeln!(io::stderr(), "microvm: {}", messages.join(": "));
            ExitCode::from(2)
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run(_: &Args) -> Result<microvm::report::Report, microvm::Error> {
    Err(microvm::Error::Architecture)
}
