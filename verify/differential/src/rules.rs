//! The differences that are allowed: rows of behaviour.md, each as tight as it can be said.
//!
//! A rule has two halves. One says that the operation is of the kind that the row is about. The other says that what ours did
//! is what the row calls right: the [`model`](crate::model) is asked for that, or it is written here.

use std::io::ErrorKind;

use crate::context::{closed, Context, TOP};
use crate::host::whole_pages;
use crate::machine::{Machine, Placed, State};
use crate::model::{atom_size, found, size_of, Expected, Model, Prior};
use crate::op::{
    Access, Act, Arith, MapSpec, Op, Perm, Question, RegionQuestion, Sink, Span, Target, TlbAct, Ty,
};
use crate::out::{Fault, Out};
use crate::run::Apart;

/// A difference, with all that there is to judge it by.
pub struct Case<'a> {
    pub op: &'a Op,
    /// What the harness knew before the operation.
    pub before: &'a Context,
    pub reference: &'a Out,
    pub ours: &'a Out,
    /// How memory and dirty bits differ.
    pub apart: &'a Apart,
    pub(crate) facts: &'a dyn Facts,
}

/// What has to be looked up to judge.
pub(crate) trait Facts {
    /// The regions that the target reaches.
    fn reach(&self, on: &Target) -> Vec<Placed>;
    /// Memory and dirty bits before the operation; only for operations that [`wants_prior`].
    fn prior(&self) -> Option<&Prior>;
    /// Memory and dirty bits of ours, now.
    fn ours(&self) -> &State;
    /// See [`Machine::words_after`].
    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64>;
    /// Whether ours has exactly the mappings that the model has after this act.
    fn tlb_is_right(&self, alone: bool, act: &TlbAct) -> bool;
}

/// How to go on after an allowed difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Memory and dirty bits of the reference are made those of ours.
    Sync,
    /// Both IOTLBs are emptied.
    ForgetMappings { alone: bool },
    /// Both begin anew.
    Restart,
}

/// A row of behaviour.md.
pub struct Rule {
    pub row: &'static str,
    pub text: &'static str,
    pub allows: fn(&Case<'_>) -> Option<Then>,
}

/// All rules.
pub const RULES: &[Rule] = &[
    Rule {
        row: "B1",
        text: "a volatile transfer that is short or fails: one contiguous count, before the error; exact forms loop",
        allows: b1,
    },
    Rule {
        row: "B2",
        text: "IOVA ranges that are empty, reach the last page or pass 2^64",
        allows: b2,
    },
    Rule {
        row: "B3",
        text: "the guards of a VolatileArrayRef have a length in bytes",
        allows: b3,
    },
    Rule {
        row: "B7",
        text: "a file that lacks whole pages is not mapped; a builder's default is readable and writable",
        allows: b7,
    },
    Rule {
        row: "B8",
        text: "no mark is lost: a builder's bitmap grows, an IommuMemory refuses what it cannot mark",
        allows: b8,
    },
    Rule {
        row: "B10",
        text: "a range ends at 2^64, or fails there",
        allows: b10,
    },
    Rule {
        row: "B11",
        text: "regions of length zero and types of size zero do not panic",
        allows: b11,
    },
    Rule {
        row: "B14",
        text: "a read that finds nothing yet marks nothing",
        allows: b14,
    },
];

/// The rows that must be seen in every run of a million operations.
pub const MUST_FIRE: &[&str] = &["B1", "B2", "B8", "B10", "B11", "B14"];

/// Whether memory and dirty bits must be kept from before the operation, to judge it.
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

/// How many bytes an access is about, and what it must be permitted.
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

/// The target, range and permission of an operation by guest address.
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

/// Whether the operation goes through an IOTLB.
fn is_translated(case: &Case<'_>) -> bool {
    range_of(case.op).is_some_and(|(on, ..)| *on == Target::Iommu) && case.before.iommu_enabled
}

/// Whether ours did what the model says, to the last byte and dirty bit.
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

/// Whether ours is in the state that the model expects.
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
    /// A copy of the state.
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

fn b1(case: &Case<'_>) -> Option<Then> {
    // Writes lose their count to an error in the same way; the row names reads, what is right is said of both.
    let Op::Touch {
        access: Access::ReadFrom { count, .. } | Access::WriteTo { count, .. },
        ..
    } = case.op
    else {
        return None;
    };
    if lost_count_of_a_pipe(case) {
        return Some(Then::Sync);
    }
    // Where only marks differ, it is B14's.
    let about = *count > 0
        && (case.reference != case.ours || case.apart.regions.iter().any(|r| !r.bytes.is_empty()));
    (about && as_modelled(case)).then_some(Then::Sync)
}

/// How much goes into a pipe that is nearly full is the kernel's business, and the model does not say. But both wrote the same bytes, and
/// nothing else is apart: the reference tells the error, ours the count before it.
fn lost_count_of_a_pipe(case: &Case<'_>) -> bool {
    let Op::Touch {
        access:
            Access::WriteTo {
                sink: Sink::PipeSink { .. },
                all,
                ..
            },
        ..
    } = case.op
    else {
        return false;
    };
    let (Out::All(reference), Out::All(ours)) = (case.reference, case.ours) else {
        return false;
    };
    let ([Out::Failed(Fault::Io(..)), theirs @ ..], [count, same @ ..]) =
        (&reference[..], &ours[..])
    else {
        return false;
    };
    let counted = match count {
        Out::Num(moved) => !all && *moved > 0,
        Out::Failed(Fault::PartialBuffer { completed, .. }) => *all && *completed > 0,
        _ => false,
    };
    counted && theirs == same && case.apart.is_nothing()
}

fn b2(case: &Case<'_>) -> Option<Then> {
    if let Op::Calculate {
        what: Arith::IovaRangeOf,
        a,
        b,
    } = *case.op
    {
        let right = a > b && *case.ours == Out::All(vec![a.into(), Out::Num(0)]);
        return right.then_some(Then::Sync);
    }
    if let Op::Tlb { alone, act } = case.op {
        return b2_tlb(case, *alone, act);
    }
    let (_, at, len, _) = range_of(case.op)?;
    let about = is_translated(case) && at_the_edge(at, len);
    (about && as_modelled(case)).then_some(Then::Sync)
}

/// Whether a range is empty, passes 2^64, or reaches the last page before it.
fn at_the_edge(at: u64, len: usize) -> bool {
    closed(at, len).is_none_or(|(_, last)| last > u64::MAX - 0x1000)
}

fn b2_tlb(case: &Case<'_>, alone: bool, act: &TlbAct) -> Option<Then> {
    let model = if alone {
        &case.before.alone
    } else {
        &case.before.tlb
    };
    let (iova, len, right) = match *act {
        TlbAct::SetMapping { iova, len, .. } => {
            let right = match closed(iova, len) {
                None if len > 0 => Out::Failed(Fault::CannotResolve { base: iova, len }),
                _ => Out::Nothing,
            };
            (iova, len, right)
        }
        TlbAct::Invalidate { iova, len } => (iova, len, Out::Nothing),
        TlbAct::InvalidateAll => return None,
        TlbAct::Lookup { iova, len, perm } => {
            let right = match closed(iova, len) {
                None if len == 0 => Out::All(Vec::new()),
                None => Out::Failed(Fault::Unmapped {
                    misses: Vec::new(),
                    access_fails: vec![(iova, len)],
                }),
                Some((first, last)) => match found(&model.mappings, first, last, perm) {
                    Some(ranges) => ranges
                        .iter()
                        .map(|m| Out::All(vec![m.gpa.into(), (m.last - m.first + 1).into()]))
                        .collect::<Vec<_>>()
                        .into(),
                    None => Out::Failed(model.fails(first, last, perm)),
                },
            };
            (iova, len, right)
        }
    };
    // A lookup changes nothing; of one that fails, the parts may be told in other cuts than the model's.
    let right = match (act, case.ours, &right) {
        (
            TlbAct::Lookup { .. },
            Out::Failed(Fault::Unmapped { .. }),
            Out::Failed(Fault::Unmapped { .. }),
        ) => true,
        _ => *case.ours == right && case.facts.tlb_is_right(alone, act),
    };
    let right = at_the_edge(iova, len) && right;
    right.then_some(Then::ForgetMappings { alone })
}

fn b3(case: &Case<'_>) -> Option<Then> {
    let Op::Volatile {
        act: Act::ArrayGuard { count, ty, .. },
        ..
    } = case.op
    else {
        return None;
    };
    // A slice of the stack frame is told with its bytes.
    let told = |out: &Out| match out {
        Out::All(parts) => match &parts[..] {
            [Out::All(guard), Out::Bytes(bytes)] => Some((guard.clone(), bytes.clone())),
            _ => Some((parts.clone(), Vec::new())),
        },
        _ => None,
    };
    let ((reference, left), (ours, right)) = (told(case.reference)?, told(case.ours)?);
    let lengths = reference[1] == Out::from(*count) && ours[1] == Out::from(count * size_of(*ty));
    (lengths && reference[0] == ours[0] && left == right && case.apart.is_nothing())
        .then_some(Then::Sync)
}

fn b7(case: &Case<'_>) -> Option<Then> {
    let Op::Map(MapSpec {
        how, size, file, ..
    }) = case.op
    else {
        return None;
    };
    if *how == crate::op::MapHow::MapBuilderBare {
        let (Out::All(reference), Out::All(ours)) = (case.reference, case.ours) else {
            return None;
        };
        let none_then_both = reference[1] == Out::Num(0) && ours[1] == Out::Num(3);
        let rest = reference[0] == ours[0] && reference[2..] == ours[2..];
        return (none_then_both && rest).then_some(Then::Sync);
    }
    let file = file.as_ref()?;
    let needed = u128::from(file.offset) + whole_pages(*size) as u128;
    let lacks = (whole_pages(file.len as usize) as u128) < needed;
    let past = Fault::Named("MappingPastEof");
    let refused = matches!(case.ours, Out::Failed(fault) if *fault == past || *fault == Fault::Mmap(Box::new(past.clone())));
    (lacks && refused && matches!(case.reference, Out::All(_))).then_some(Then::Sync)
}

fn b8(case: &Case<'_>) -> Option<Then> {
    if let Op::BuilderMarks { size, writes } = case.op {
        return b8_builder(case, *size, writes);
    }
    let (_, at, len, perm) = range_of(case.op)?;
    let writes = matches!(perm, Perm::Write | Perm::ReadWrite);
    let about = is_translated(case) && writes && !case.before.iommu_tracks(at, len);
    (about && as_modelled(case)).then_some(Then::Sync)
}

fn b8_builder(case: &Case<'_>, size: usize, writes: &[Span]) -> Option<Then> {
    let (Out::All(reference), Out::All(ours)) = (case.reference, case.ours) else {
        return None;
    };
    let mut dirty = vec![false; size.div_ceil(4096)];
    for span in writes.iter().filter(|span| span.at < size && span.len > 0) {
        let last = (span.at + span.len - 1).min(size - 1);
        dirty[span.at / 4096..=last / 4096].fill(true);
    }
    let pages = (0..dirty.len())
        .filter(|page| dirty[*page])
        .map(Out::from)
        .collect();
    let right = reference[0] == ours[0]
        && reference[1] == Out::All(Vec::new())
        && ours[1] == Out::All(pages);
    right.then_some(Then::Sync)
}

/// Whether a region itself passes 2^64. What lies above does not exist.
fn wraps(base: u64, len: u64) -> bool {
    u128::from(base) + u128::from(len) > TOP
}

/// Operations that meet a region which itself passes 2^64, other than by an address range.
/// Whether one of the slices that the operation is about is one of the whole memory.
fn has_slice_of_memory(op: &Op) -> bool {
    match op {
        Op::Volatile {
            act: Act::CopyToSlice { to } | Act::ArrayCopyToSlice { to, .. },
            path,
        } => path.root_is_memory() || to.root_is_memory(),
        Op::Volatile { path, .. }
        | Op::Touch {
            on: Target::OneSlice(path),
            ..
        } => path.root_is_memory(),
        _ => false,
    }
}

fn b10_region(case: &Case<'_>) -> Option<Then> {
    let there = case.before.extents.iter().any(|e| wraps(e.base, e.len));
    match case.op {
        Op::Build(layout) if layout.regions.iter().any(|r| wraps(r.base, r.len)) => settled(case),
        Op::InsertRegion(spec) if wraps(spec.base, spec.len) || there => settled(case),
        Op::AskRegion {
            region,
            question: RegionQuestion::Extent,
        } => {
            let extent = case
                .before
                .extents
                .get(*region)
                .filter(|e| wraps(e.base, e.len))?;
            let right = Out::All(vec![extent.len.into(), extent.base.into(), u64::MAX.into()]);
            (*case.ours == right).then_some(Then::Sync)
        }
        Op::Ask {
            on,
            question: Question::HostAddress(at),
        } => {
            let regions = case.facts.reach(on);
            regions
                .iter()
                .find(|r| wraps(r.base, r.len) && *at >= r.base)?;
            let not_found = *case.reference == Out::Failed(Fault::InvalidGuestAddress(*at));
            let told = matches!(
                case.ours,
                Out::Host(_) | Out::Failed(Fault::HostAddressNotAvailable)
            );
            (not_found && told).then_some(Then::Sync)
        }
        // The reference does not find such a region: ours may give a slice of it, as the one that is copied from or to.
        Op::Volatile { .. }
        | Op::Touch {
            on: Target::OneSlice(_),
            ..
        } if there && has_slice_of_memory(case.op) => {
            let not_found = format!("{:?}", case.reference).contains("InvalidGuestAddress");
            // Or it finds it, and goes past 2^64, where ours ends it.
            let cut = format!("{:?}", case.ours).contains("InvalidBackendAddress");
            ((not_found && !case.ours.panicked()) || cut).then_some(Then::Restart)
        }
        // An ordering that a load or a store cannot have panics where there is memory, which the reference does not find.
        Op::Touch {
            access: Access::Load { .. } | Access::Store { .. },
            ..
        } if there => {
            let not_found = matches!(case.reference, Out::Failed(Fault::InvalidGuestAddress(_)));
            let ordering = format!("{:?}", case.ours).contains("cannot have the ordering");
            (not_found && ordering && case.apart.is_nothing()).then_some(Then::Sync)
        }
        _ => None,
    }
}

fn b10(case: &Case<'_>) -> Option<Then> {
    if let Some(then) = b10_region(case) {
        return Some(then);
    }
    let (on, at, len, _) = range_of(case.op)?;
    let translated = is_translated(case);
    let passes = if translated {
        // A mapping may lead past 2^64 in guest physical addresses.
        let ranges = closed(at, len)
            .and_then(|(first, last)| found(&case.before.tlb.mappings, first, last, Perm::No));
        ranges.is_some_and(|ranges| {
            ranges
                .iter()
                .any(|m| m.gpa.checked_add(m.last - m.first).is_none())
        })
    } else {
        u128::from(at) + len as u128 > TOP
    };
    let about = passes || case.facts.reach(on).iter().any(|r| wraps(r.base, r.len));
    (about && as_modelled(case)).then_some(Then::Sync)
}

fn b11(case: &Case<'_>) -> Option<Then> {
    match case.op {
        // Whether empty regions may share an address with others is nobody's business; that it does not panic is.
        Op::Build(layout) if layout.regions.iter().any(|r| r.len == 0) => settled(case),
        Op::InsertRegion(spec)
            if spec.len == 0 || case.before.extents.iter().any(|e| e.len == 0) =>
        {
            settled(case)
        }
        Op::RemoveRegion { .. } if case.before.extents.iter().any(|e| e.len == 0) => settled(case),
        Op::AskRegion { region, question } => {
            let extent = case
                .before
                .extents
                .get(*region)
                .filter(|extent| extent.len == 0)?;
            let right = match question {
                RegionQuestion::Extent => {
                    *case.ours
                        == Out::All(vec![Out::Num(0), extent.base.into(), extent.base.into()])
                }
                RegionQuestion::RegionFromGuest(_) => *case.ours == Out::Absent,
                _ => false,
            };
            right.then_some(Then::Sync)
        }
        Op::Volatile { act, .. } => {
            if has_slice_of_memory(case.op) && case.before.extents.iter().any(|e| e.len == 0) {
                // A slice of memory that begins in an empty region.
                let refused = format!("{:?}", case.ours).contains("InvalidGuestAddress");
                return (case.reference.panicked() && refused).then_some(Then::Sync);
            }
            let (Act::CopyTo { ty, .. } | Act::CopyFrom { ty, .. } | Act::ArrayCopyTo { ty, .. }) =
                act
            else {
                return None;
            };
            let about = *ty == Ty::Empty && case.reference.panicked() && !case.ours.panicked();
            (about && case.apart.is_nothing()).then_some(Then::Sync)
        }
        Op::Touch {
            on: Target::OneSlice(path),
            ..
        } => {
            let about = path.root_is_memory() && case.before.extents.iter().any(|e| e.len == 0);
            let right = matches!(case.ours, Out::Failed(Fault::InvalidGuestAddress(_)));
            (about && case.reference.panicked() && right).then_some(Then::Sync)
        }
        op => {
            let (on, ..) = range_of(op)?;
            let about = case.facts.reach(on).iter().any(|r| r.len == 0);
            (about && as_modelled(case)).then_some(Then::Sync)
        }
    }
}

/// Ours has not panicked; both begin anew.
fn settled(case: &Case<'_>) -> Option<Then> {
    let fine = matches!(
        case.ours,
        Out::Nothing | Out::Failed(Fault::Collection(_)) | Out::All(_)
    );
    fine.then_some(Then::Restart)
}

fn b14(case: &Case<'_>) -> Option<Then> {
    match case.op {
        Op::Touch {
            access: Access::ReadFrom { .. },
            ..
        }
        | Op::Volatile {
            act: Act::DirectRead { .. },
            ..
        } => {}
        _ => return None,
    }
    let result = match case.ours {
        Out::All(parts) => match &parts[0] {
            Out::All(inner) => inner.first()?,
            first => first,
        },
        _ => return None,
    };
    let blocked = *result == Out::Failed(Fault::Io(ErrorKind::WouldBlock, Some(libc::EAGAIN)));
    let apart = case.apart;
    let only_marks = apart.shape.is_none()
        && apart
            .regions
            .iter()
            .all(|r| r.bytes.is_empty() && r.bits.iter().all(|bit| !bit.in_ours))
        && apart.iommu.iter().all(|bit| !bit.in_ours);
    (blocked && only_marks && case.reference == case.ours).then_some(Then::Sync)
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
            TlbAct::SetMapping { iova, len, .. } if closed(*iova, *len).is_none() => Out::Absent,
            _ => Out::Nothing,
        };
        model.note(act, &done);
        model.same_as(&self.ours.borrow_mut().mappings(alone))
    }
}
