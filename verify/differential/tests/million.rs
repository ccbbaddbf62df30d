//! A million operations from a fresh seed have equal outcomes, and so have some from fixed seeds.
//!
//! `DIFF_SEED` and `DIFF_OPS` set the seed and the length. `DIFF_WITHOUT_RULE=B1,B2` leaves rules
//! out, which must make the run fail.

use std::time::Instant;

use vm_memory_differential::rules::REQUIRED_RULES;
use vm_memory_differential::run::{Fired, Soak};
use vm_memory_differential::shrink::{report, shrink};
use vm_memory_differential::{on_ours, on_reference};

type Reference = on_reference::driver::TestedCrate;
type Ours = on_ours::driver::TestedCrate;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|error| panic!("{name}={text}: {error}")),
    )
}

fn run(seed: u64, ops: u64) -> Fired {
    let without = std::env::var("DIFF_WITHOUT_RULE").unwrap_or_default();
    let without = without
        .split(',')
        .filter(|row| !row.is_empty())
        .map(String::from)
        .collect();
    let soak = Soak {
        seed,
        ops,
        without,
        deadline: None,
    };
    println!("seed {seed}, {ops} operations");
    let start = Instant::now();
    match soak.run::<Reference, Ours>() {
        Ok(seen) => {
            println!(
                "  {:.1} s; allowed differences: {:?}",
                start.elapsed().as_secs_f64(),
                seen.fired
            );
            seen.fired
        }
        Err((ops, difference)) => {
            let (ops, difference) = shrink::<Reference, Ours>(ops, difference, &soak.without);
            panic!(
                "seed {seed}: a difference that no rule allows\n{}",
                report(&ops, &difference)
            );
        }
    }
}

#[test]
fn replay_of_a_million_operations_has_equal_outcomes() {
    let seed = number("DIFF_SEED").unwrap_or_else(|| fastrand::u64(..));
    let ops = number("DIFF_OPS").unwrap_or(1_000_000);
    let fired = run(seed, ops);
    if ops < 1_000_000 {
        println!("SKIPPED: whether every rule is needed (fewer than a million operations)");
        return;
    }
    let idle: Vec<_> = REQUIRED_RULES
        .iter()
        .filter(|row| !fired.contains_key(*row))
        .collect();
    assert!(
        idle.is_empty(),
        "seed {seed}: these rules were never needed: {idle:?}"
    );
}

#[test]
fn operations_from_fixed_seeds_have_equal_outcomes() {
    for seed in [1, 2, 3, 0x18_0000, u64::MAX] {
        run(seed, 50_000);
    }
}
