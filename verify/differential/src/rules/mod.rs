//! The permitted differences, by the codes of docs/differences.md. Each rule is as narrow as
//! possible.
//!
//! The first half of a rule recognises the operations that the difference affects. The second half
//! checks that this crate returned the documented result, with the [`model`](crate::model) or with
//! a check of its own.
//!
//! | module | codes |
//! |---|---|
//! | `streams` | B1, B14 |
//! | `addresses` | B2, B3, B10, B11 |
//! | `mappings` | B7 |
//! | `dirty` | B8 |

mod addresses;
mod dirty;
mod mappings;
mod streams;

use crate::context::{closed, Context, TOP};
use crate::machine::{Machine, Placed, State};
use crate::model::{atom_size, size_of, Expected, Model, Prior};
use crate::op::{Access, Op, Perm, Question, Target, TlbAct};
use crate::out::Out;
use crate::run::StateDiff;

/// A difference, and the facts by which a rule decides whether it allows the difference.
pub struct Case<'a> {
    pub op: &'a Op,
    /// The tracked state before the operation.
    pub before: &'a Context,
    pub reference: &'a Out,
    pub ours: &'a Out,
    /// The differences in memory and dirty bits.
    pub diff: &'a StateDiff,
    pub(crate) facts: &'a dyn Facts,
}

/// Facts that a rule looks up.
pub(crate) trait Facts {
    /// Returns the regions that the target reaches.
    fn reach(&self, on: &Target) -> Vec<Placed>;
    /// Returns memory and dirty bits before the operation, for operations of [`wants_prior`].
    fn prior(&self) -> Option<&Prior>;
    /// Returns the current memory and dirty bits of ours.
    fn ours(&self) -> &State;
    /// See [`Machine::words_after`].
    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64>;
    /// Returns whether ours has exactly the mappings of the model after this act.
    fn tlb_is_right(&self, alone: bool, act: &TlbAct) -> bool;
}

/// The way to continue after a permitted difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The reference gets memory and dirty bits of ours.
    Sync,
    /// Both IOTLBs are emptied.
    ForgetMappings { alone: bool },
    /// Both machines restart.
    Restart,
}

/// A difference of docs/differences.md.
pub struct Rule {
    pub row: &'static str,
    pub text: &'static str,
    pub allows: fn(&Case<'_>) -> Option<Then>,
}

/// All rules.
pub const RULES: &[Rule] = &[
    Rule {
        row: "B1",
        text: "a short or failed volatile transfer returns one contiguous count first; exact forms loop",
        allows: streams::b1,
    },
    Rule {
        row: "B2",
        text: "IOVA ranges that are empty, reach the last page or pass 2^64",
        allows: addresses::b2,
    },
    Rule {
        row: "B3",
        text: "the guards of a VolatileArrayRef have a length in bytes",
        allows: addresses::b3,
    },
    Rule {
        row: "B7",
        text: "a file that lacks whole pages is not mapped; a builder maps readable and writable memory",
        allows: mappings::b7,
    },
    Rule {
        row: "B8",
        text: "no mark is lost: a builder's bitmap grows, and an IommuMemory refuses writes it cannot mark",
        allows: dirty::b8,
    },
    Rule {
        row: "B10",
        text: "a range ends at 2^64 or fails there",
        allows: addresses::b10,
    },
    Rule {
        row: "B11",
        text: "regions of length zero and types of size zero do not panic",
        allows: addresses::b11,
    },
    Rule {
        row: "B14",
        text: "EAGAIN marks nothing, a short read its whole buffer; 0 bytes make no call",
        allows: streams::b14,
    },
];

/// The rules that every run of a million operations must use.
pub const REQUIRED_RULES: &[&str] = &["B1", "B2", "B8", "B10", "B11", "B14"];

/// Returns whether the rules need memory and dirty bits from before the operation.
pub fn wants_prior(op: &Op, before: &Context) -> bool {
    let Op::Touch { on, at, access } = op else {
        return false;
    };
    if matches!(on, Target::OneRegion(_) | Target::OneSlice(_)) {
        return false;
    }
    let (count, _) = extent_of(access);
    matches!(access, Access::ReadFrom { .. })
        || (*on == Target::Iommu && before.iommu_enabled)
        || u128::from(*at) + count as u128 > TOP
        || before.has_odd_regions
}

/// Returns the number of bytes of an access, and the permission that it needs.
fn extent_of(access: &Access) -> (usize, Perm) {
    match *access {
        Access::WriteBytes { len, .. } | Access::WriteSlice { len, .. } => (len, Perm::Write),
        Access::ReadBytes { len } | Access::ReadSlice { len } => (len, Perm::Read),
        Access::WriteObj { ty, .. } => (size_of(ty), Perm::Write),
        Access::ReadObj { ty } => (size_of(ty), Perm::Read),
        Access::Store { ty, .. } => (atom_size(ty), Perm::Write),
        Access::Load { ty, .. } => (atom_size(ty), Perm::Read),
        Access::ReadFrom { count, .. } => (count, Perm::Write),
        Access::WriteTo { count, .. } => (count, Perm::Read),
    }
}

/// Returns the target, range and permission of an operation by guest address.
fn range_of(op: &Op) -> Option<(&Target, u64, usize, Perm)> {
    match op {
        Op::Touch {
            on: Target::OneRegion(_) | Target::OneSlice(_),
            ..
        } => None,
        Op::Touch { on, at, access } => {
            let (count, perm) = extent_of(access);
            Some((on, *at, count, perm))
        }
        Op::Ask { on, question } => match *question {
            Question::CheckRangeFor { at, len, perm }
            | Question::GetSlicesFor { at, len, perm, .. } => Some((on, at, len, perm)),
            Question::CheckRange { at, len }
            | Question::GetSlice { at, len }
            | Question::GetSlices { at, len, .. } => Some((on, at, len, Perm::No)),
            Question::CheckedOffset { at, by } => Some((on, at, by.saturating_add(1), Perm::No)),
            Question::TryAccess { at, count, .. } => Some((on, at, count, Perm::No)),
            Question::FindRegion(at)
            | Question::ToRegionAddr(at)
            | Question::AddressInRange(at)
            | Question::CheckAddress(at)
            | Question::HostAddress(at) => Some((on, at, 1, Perm::No)),
            Question::LastAddr => Some((on, u64::MAX, 1, Perm::No)),
            Question::NumRegions | Question::IterRegions | Question::HasPhysical => None,
        },
        _ => None,
    }
}

/// Returns whether the operation uses an IOTLB.
fn is_translated(case: &Case<'_>) -> bool {
    range_of(case.op).is_some_and(|(on, ..)| *on == Target::Iommu) && case.before.iommu_enabled
}

/// Returns whether ours has the expected outcome, bytes and dirty bits of the model.
fn as_modelled(case: &Case<'_>) -> bool {
    let Some((on, ..)) = range_of(case.op) else {
        return false;
    };
    let regions = case.facts.reach(on);
    let now;
    let prior = match case.facts.prior() {
        Some(prior) => prior,
        None => {
            now = Prior::of(case.facts.ours());
            &now
        }
    };
    let Some(model) = Model::new(case.before, on, &regions, prior) else {
        return false;
    };
    let expected = match case.op {
        Op::Touch { at, access, .. } => model.touch(*at, access),
        Op::Ask { question, .. } => model.answer(question).map(|out| Expected {
            out,
            writes: Vec::new(),
            marks: Vec::new(),
        }),
        _ => None,
    };
    expected.is_some_and(|expected| expected.out == *case.ours && is_state(case, prior, &expected))
}

/// Returns whether ours is in the state that the model expects.
fn is_state(case: &Case<'_>, prior: &Prior, expected: &Expected) -> bool {
    let ours = case.facts.ours();
    let mut memory = prior.memory.clone();
    for (place, offset, bytes) in &expected.writes {
        memory[*place][*offset..*offset + bytes.len()].copy_from_slice(bytes);
    }
    let marks_of = |place: Option<usize>| -> Vec<(usize, usize)> {
        expected
            .marks
            .iter()
            .filter(|m| m.0 == place)
            .map(|m| (m.1, m.2))
            .collect()
    };
    let same_memory = ours
        .regions
        .iter()
        .zip(&memory)
        .all(|(region, bytes)| region.memory.holds(bytes));
    let same_bits = ours.regions.iter().enumerate().all(|(place, region)| {
        let marks = marks_of(Some(place));
        let before = &prior.bits[place];
        region.bits
            == if marks.is_empty() {
                before.clone()
            } else {
                case.facts.words_after(Some(place), before, &marks)
            }
    });
    same_memory
        && same_bits
        && ours.iommu == case.facts.words_after(None, &prior.iommu, &marks_of(None))
}

impl Prior {
    /// Copies the state.
    pub fn of(state: &State) -> Prior {
        Prior {
            memory: state
                .regions
                .iter()
                .map(|region| region.memory.to_vec())
                .collect(),
            bits: state
                .regions
                .iter()
                .map(|region| region.bits.clone())
                .collect(),
            iommu: state.iommu.clone(),
        }
    }
}

/// The facts of two machines.
pub(crate) struct Facing<'a, A, B> {
    pub reference: &'a A,
    pub ours: std::cell::RefCell<&'a mut B>,
    pub prior: Option<Prior>,
    pub state: &'a State,
    pub before: &'a Context,
}

impl<A: Machine, B: Machine> Facts for Facing<'_, A, B> {
    fn reach(&self, on: &Target) -> Vec<Placed> {
        self.reference.reach(on)
    }

    fn prior(&self) -> Option<&Prior> {
        self.prior.as_ref()
    }

    fn ours(&self) -> &State {
        self.state
    }

    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64> {
        self.reference.words_after(place, before, marks)
    }

    fn tlb_is_right(&self, alone: bool, act: &TlbAct) -> bool {
        let mut model = if alone {
            self.before.alone.clone()
        } else {
            self.before.tlb.clone()
        };
        let done = match act {
            TlbAct::SetMapping { iova, gpa, len, .. }
                if closed(*iova, *len).is_none() || closed(*gpa, *len).is_none() =>
            {
                Out::Absent
            }
            _ => Out::Nothing,
        };
        model.note(act, &done);
        model.same_as(&self.ours.borrow_mut().mappings(alone))
    }
}
