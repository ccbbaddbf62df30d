//! Runs the comparison for any length of time. See README.md.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use vm_memory_differential::run::Soak;
use vm_memory_differential::shrink::{report, shrink};
use vm_memory_differential::{on_ours, on_reference};

const USAGE: &str = "usage: soak [--seed N] [--ops N] [--seconds N] [--without-rule ROW]...";

fn main() -> ExitCode {
    let mut soak = Soak {
        seed: fastrand::u64(..),
        ops: 1_000_000,
        without: Vec::new(),
        deadline: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|text| text.parse::<u64>().ok());
        let known = match arg.as_str() {
            "--seed" => number().map(|n| soak.seed = n),
            "--ops" => number().map(|n| soak.ops = n),
            "--seconds" => number().map(|n| {
                soak.deadline = Some(Instant::now() + Duration::from_secs(n));
                soak.ops = u64::MAX;
            }),
            "--without-rule" => args.next().map(|row| soak.without.push(row)),
            _ => None,
        };
        if known.is_none() {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    println!("seed {}", soak.seed);
    let start = Instant::now();
    type Reference = on_reference::driver::TestedCrate;
    type Ours = on_ours::driver::TestedCrate;
    match soak.run::<Reference, Ours>() {
        Ok(seen) => {
            println!(
                "{} operations in {:.1} s; allowed differences: {:?}",
                seen.ops,
                start.elapsed().as_secs_f64(),
                seen.fired
            );
            ExitCode::SUCCESS
        }
        Err((ops, difference)) => {
            eprintln!(
                "found a difference after {:.1} s; shrinking {} operations",
                start.elapsed().as_secs_f64(),
                ops.len()
            );
            let (ops, difference) = shrink::<Reference, Ours>(ops, difference, &soak.without);
            eprintln!("{}", report(&ops, &difference));
            ExitCode::FAILURE
        }
    }
}
