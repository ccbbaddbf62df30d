//! Differences of addresses and lengths: B2, B3, B10 and B11.

use super::{as_modelled, is_translated, range_of, Case, Then};
use crate::context::{closed, TOP};
use crate::model::{found, size_of};
use crate::op::{Access, Act, Arith, Op, Perm, Question, RegionQuestion, Target, TlbAct, Ty};
use crate::out::{Fault, Out};

pub(super) fn b2(case: &Case<'_>) -> Option<Then> {
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
        return b02_tlb(case, *alone, act);
    }
    let (_, at, len, _) = range_of(case.op)?;
    let about = is_translated(case) && at_the_edge(at, len);
    (about && as_modelled(case)).then_some(Then::Sync)
}

/// Returns whether a range is empty, passes 2^64, or reaches the last page.
fn at_the_edge(at: u64, len: usize) -> bool {
    closed(at, len).is_none_or(|(_, last)| last > u64::MAX - 0x1000)
}

fn b02_tlb(case: &Case<'_>, alone: bool, act: &TlbAct) -> Option<Then> {
    let model = if alone {
        &case.before.alone
    } else {
        &case.before.tlb
    };
    let (iova, len, right) = match *act {
        TlbAct::SetMapping { iova, gpa, len, .. } => {
            let passes = |base: u64| len > 0 && closed(base, len).is_none();
            let right = if passes(iova) || passes(gpa) {
                Out::Failed(Fault::CannotResolve { base: iova, len })
            } else {
                Out::Nothing
            };
            // The target may also be at the edge.
            let edge = if passes(gpa) { gpa } else { iova };
            (edge, len, right)
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
    // A lookup changes nothing. A lookup that fails may report other ranges than the model.
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

pub(super) fn b3(case: &Case<'_>) -> Option<Then> {
    let Op::Volatile {
        act: Act::ArrayGuard { count, ty, .. },
        ..
    } = case.op
    else {
        return None;
    };
    // The outcome for `Root::OfLocal` includes the bytes.
    let told = |out: &Out| match out {
        Out::All(parts) => match &parts[..] {
            [Out::All(guard), Out::Bytes(bytes)] => Some((guard.clone(), bytes.clone())),
            _ => Some((parts.clone(), Vec::new())),
        },
        _ => None,
    };
    let ((reference, left), (ours, right)) = (told(case.reference)?, told(case.ours)?);
    let lengths = reference[1] == Out::from(*count) && ours[1] == Out::from(count * size_of(*ty));
    (lengths && reference[0] == ours[0] && left == right && case.diff.is_nothing())
        .then_some(Then::Sync)
}

/// Returns whether a region passes 2^64. Bytes past 2^64 do not exist.
fn wraps(base: u64, len: u64) -> bool {
    u128::from(base) + u128::from(len) > TOP
}

/// Returns whether one of the slices of the operation starts from guest memory.
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

/// Permits operations on a region that passes 2^64, other than those by an address range.
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
        // The reference does not find such a region; ours may return a slice of it.
        Op::Volatile { .. }
        | Op::Touch {
            on: Target::OneSlice(_),
            ..
        } if there && has_slice_of_memory(case.op) => {
            let not_found = format!("{:?}", case.reference).contains("InvalidGuestAddress");
            // Or the reference finds it and continues past 2^64, where ours ends the region.
            let cut = format!("{:?}", case.ours).contains("InvalidBackendAddress");
            ((not_found && !case.ours.panicked()) || cut).then_some(Then::Restart)
        }
        // An invalid ordering panics if the region is found; the reference does not find it.
        Op::Touch {
            access: Access::Load { .. } | Access::Store { .. },
            ..
        } if there => {
            let not_found = matches!(case.reference, Out::Failed(Fault::InvalidGuestAddress(_)));
            let ordering = format!("{:?}", case.ours).contains("cannot have the ordering");
            (not_found && ordering && case.diff.is_nothing()).then_some(Then::Sync)
        }
        _ => None,
    }
}

pub(super) fn b10(case: &Case<'_>) -> Option<Then> {
    if let Some(then) = b10_region(case) {
        return Some(then);
    }
    let (on, at, len, _) = range_of(case.op)?;
    let translated = is_translated(case);
    let passes = if translated {
        // The guest physical addresses of a mapping may pass 2^64.
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

pub(super) fn b11(case: &Case<'_>) -> Option<Then> {
    match case.op {
        // Whether empty regions may share an address is not compared. They must not panic.
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
                // A slice of memory that starts in an empty region.
                let refused = format!("{:?}", case.ours).contains("InvalidGuestAddress");
                return (case.reference.panicked() && refused).then_some(Then::Sync);
            }
            let (Act::CopyTo { ty, .. } | Act::CopyFrom { ty, .. } | Act::ArrayCopyTo { ty, .. }) =
                act
            else {
                return None;
            };
            let about = *ty == Ty::Empty && case.reference.panicked() && !case.ours.panicked();
            (about && case.diff.is_nothing()).then_some(Then::Sync)
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

/// Permits a success or an error of the collection, but no panic. Both machines restart.
fn settled(case: &Case<'_>) -> Option<Then> {
    let fine = matches!(
        case.ours,
        Out::Nothing | Out::Failed(Fault::Collection(_)) | Out::All(_)
    );
    fine.then_some(Then::Restart)
}
