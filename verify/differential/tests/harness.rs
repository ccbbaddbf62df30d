//! The harness compares two different crates, finds and shrinks a planted difference, and needs
//! each of its rules.

use std::any::TypeId;

use vm_memory_differential::context::Mapping;
use vm_memory_differential::machine::{Extent, Machine, Placed, State};
use vm_memory_differential::op::{Op, Question, Target};
use vm_memory_differential::out::Out;
use vm_memory_differential::rules::{REQUIRED_RULES, RULES};
use vm_memory_differential::run::{replay_on, Soak};
use vm_memory_differential::shrink::{report, shrink};
use vm_memory_differential::{on_ours, on_reference};

type Reference = on_reference::driver::TestedCrate;
type Ours = on_ours::driver::TestedCrate;

fn soak(seed: u64, ops: u64) -> Soak {
    Soak {
        seed,
        ops,
        without: Vec::new(),
        deadline: None,
    }
}

#[test]
fn drivers_use_two_different_crates() {
    let (reference, ours): (TypeId, TypeId) = (
        on_reference::driver::crate_type_id(),
        on_ours::driver::crate_type_id(),
    );
    assert_ne!(reference, ours);

    let lock = include_str!("../Cargo.lock");
    let packages: Vec<&str> = lock
        .split("[[package]]")
        .filter(|p| p.contains("\nname = \"vm-memory\"\n"))
        .collect();
    assert_eq!(packages.len(), 2, "{packages:?}");
    let published = packages
        .iter()
        .filter(|p| p.contains("source = \"registry+"))
        .count();
    assert_eq!(
        published, 1,
        "one from the registry, one from this repository: {packages:?}"
    );
}

#[test]
fn reference_compared_with_itself_has_no_difference() {
    let seed = fastrand::u64(..);
    match soak(seed, 200_000).run::<Reference, Reference>() {
        Ok(seen) => assert!(seen.fired.is_empty(), "seed {seed}: {:?}", seen.fired),
        Err((ops, difference)) => panic!("seed {seed}:\n{}", report(&ops, &difference)),
    }
}

/// 0.18.0 with a bug: `checked_offset` is off by one.
struct OffByOne(Reference);

impl Machine for OffByOne {
    fn fresh() -> Self {
        OffByOne(Reference::fresh())
    }

    fn apply(&mut self, op: &Op) -> Out {
        let out = self.0.apply(op);
        match (op, out) {
            (
                Op::Ask {
                    question: Question::CheckedOffset { .. },
                    ..
                },
                Out::Num(n),
            ) => Out::Num(n.wrapping_add(1)),
            (_, out) => out,
        }
    }

    fn extents(&self) -> Vec<Extent> {
        self.0.extents()
    }

    fn reach(&self, on: &Target) -> Vec<Placed> {
        self.0.reach(on)
    }

    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64> {
        self.0.words_after(place, before, marks)
    }

    fn mappings(&mut self, alone: bool) -> Vec<Mapping> {
        self.0.mappings(alone)
    }

    fn state(&self) -> State {
        self.0.state()
    }

    fn set_bits(&mut self, region: usize, words: &[u64]) {
        self.0.set_bits(region, words);
    }

    fn set_iommu_bits(&mut self, words: &[u64]) {
        self.0.set_iommu_bits(words);
    }

    fn forget_mappings(&mut self, alone: bool) {
        self.0.forget_mappings(alone);
    }
}

#[test]
fn off_by_one_is_found_and_shrunk() {
    let soak = soak(7, 100_000);
    let (ops, difference) = soak
        .run::<Reference, OffByOne>()
        .expect_err("the bug must be found");
    let (ops, difference) = shrink::<Reference, OffByOne>(ops, difference, &[]);
    let text = report(&ops, &difference);
    assert!(ops.len() <= 2, "one builds a region, one fails:\n{text}");
    assert!(
        text.contains("CheckedOffset") && text.contains("replay(&["),
        "{text}"
    );
}

#[test]
fn run_without_a_rule_fails() {
    assert!(REQUIRED_RULES
        .iter()
        .all(|row| RULES.iter().any(|rule| rule.row == *row)));
    for row in REQUIRED_RULES {
        let without = vec![row.to_string()];
        let soak = Soak {
            without: without.clone(),
            ..soak(11, 1_000_000)
        };
        let (ops, difference) = match soak.run::<Reference, Ours>() {
            Err(failure) => failure,
            Ok(seen) => panic!("without {row}, {} operations found nothing", seen.ops),
        };
        // With the rule that was missing, the same sequence passes.
        if let Err(other) = replay_on::<Reference, Ours>(&ops, &[]) {
            panic!("without {row}: {difference}\nwith it: {other}");
        }
    }
}
