//! Runs the comparison for any length of time. See README.md.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use vm_memory_differential::machine::Machine;
use vm_memory_differential::op::Op;
use vm_memory_differential::run::{guarded, literal, Failure, Soak, StateDiff};
use vm_memory_differential::shrink::{report, shrink};
use vm_memory_differential::{on_ours, on_reference};

const USAGE: &str = "usage: soak [--seed N] [--ops N] [--seconds N] [--without-rule ROW]... [--self] [--census] [--survey] | soak --outcomes FILE";

fn main() -> ExitCode {
    let mut soak = Soak {
        seed: fastrand::u64(..),
        ops: 1_000_000,
        without: Vec::new(),
        deadline: None,
        census: false,
    };
    let (mut itself, mut all) = (false, false);
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
            "--outcomes" => {
                return args
                    .next()
                    .map_or(ExitCode::from(2), |path| outcomes(&path))
            }
            "--census" => {
                soak.census = true;
                Some(())
            }
            "--survey" => {
                all = true;
                Some(())
            }
            "--self" => {
                itself = true;
                Some(())
            }
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
    if all {
        return survey::<Reference, Ours>(&soak);
    }
    let result = if itself {
        soak.run::<Reference, Reference>()
    } else {
        soak.run::<Reference, Ours>()
    };
    match result {
        Ok(seen) => {
            for (what, times) in &seen.census {
                println!("{times:8} {what}");
            }
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
            let (ops, difference) = if itself {
                shrink::<Reference, Reference>(ops, difference, &soak.without)
            } else {
                shrink::<Reference, Ours>(ops, difference, &soak.without)
            };
            eprintln!("{}", report(&ops, &difference));
            ExitCode::FAILURE
        }
    }
}

/// Continues after differences, and prints one of each kind.
fn survey<A: Machine, B: Machine>(soak: &Soak) -> ExitCode {
    let mut kinds: BTreeMap<String, (u64, Failure)> = BTreeMap::new();
    let seen = soak.run_on::<A, B>(&mut |ops, difference| {
        let kind = difference.kind();
        match kinds.get_mut(&kind) {
            Some((times, first)) => {
                *times += 1;
                if ops.len() < first.0.len() {
                    *first = (ops, difference);
                }
            }
            None => {
                kinds.insert(kind, (1, (ops, difference)));
            }
        }
        true
    });
    for (kind, (times, (ops, difference))) in kinds {
        println!("=== {times} times: {kind}");
        let (ops, difference) = shrink::<A, B>(ops, difference, &soak.without);
        println!("{}", report(&ops, &difference));
    }
    println!(
        "{} operations; allowed differences: {:?}",
        seen.ops, seen.fired
    );
    ExitCode::SUCCESS
}

/// Prints the outcome of each operation of a JSON list.
fn outcomes(path: &str) -> ExitCode {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::from(2);
        }
    };
    let ops: Vec<Op> = match serde_json::from_str(&text) {
        Ok(ops) => ops,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::from(2);
        }
    };
    let mut reference = on_reference::driver::TestedCrate::fresh();
    let mut ours = on_ours::driver::TestedCrate::fresh();
    for op in &ops {
        println!("{}", literal(op));
        println!("  reference: {}", literal(&guarded(&mut reference, op)));
        println!("  ours:      {}", literal(&guarded(&mut ours, op)));
        print!("{}", StateDiff::of(&reference.state(), &ours.state()));
    }
    ExitCode::SUCCESS
}
