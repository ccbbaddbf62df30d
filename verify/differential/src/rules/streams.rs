//! Differences of streams: B1 and B14.

use std::io::ErrorKind;

use super::{as_modelled, range_of, Case, Then};
use crate::op::{Access, Act, Op, Sink, Target};
use crate::out::{Fault, Out};

pub(super) fn b1(case: &Case<'_>) -> Option<Then> {
    // Reads and writes have this difference: in the reference, an error replaces the count.
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
    // A difference only in marks belongs to B14.
    let about = *count > 0
        && (case.reference != case.ours || case.diff.regions.iter().any(|r| !r.bytes.is_empty()));
    (about && as_modelled(case)).then_some(Then::Sync)
}

/// Returns whether a write to a pipe differs only in its result: the error in the reference, and
/// the count before it in ours. The kernel decides how many bytes fit into a nearly full pipe, so
/// the model does not know the count. Both wrote the same bytes.
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
    counted && theirs == same && case.diff.is_nothing()
}

pub(super) fn b14(case: &Case<'_>) -> Option<Then> {
    if is_error_for_no_bytes(case) {
        return Some(Then::Sync);
    }
    let source = match case.op {
        Op::Touch {
            access: Access::ReadFrom { source, .. },
            ..
        }
        | Op::Volatile {
            act: Act::DirectRead { source, .. },
            ..
        } => source,
        _ => return None,
    };
    let result = match case.ours {
        Out::All(parts) => match &parts[0] {
            Out::All(inner) => inner.first()?,
            first => first,
        },
        _ => return None,
    };
    if case.reference != case.ours {
        return None;
    }
    let blocked = *result == Out::Failed(Fault::Io(ErrorKind::WouldBlock, Some(libc::EAGAIN)));
    if blocked && differs_in_marks_of(false, case) {
        return Some(Then::Sync);
    }
    // After a short count, the whole buffer of the system call is marked.
    let short = match result {
        Out::Num(moved) => *moved > 0,
        Out::Failed(Fault::PartialBuffer { completed, .. }) => *completed > 0,
        Out::Failed(Fault::Io(ErrorKind::UnexpectedEof, _)) => true,
        _ => false,
    };
    let as_modelled = range_of(case.op).is_none() || as_modelled(case);
    (source.is_descriptor() && short && differs_in_marks_of(true, case) && as_modelled)
        .then_some(Then::Sync)
}

/// Returns whether only the reference makes a call for 0 bytes, which fails.
///
/// The descriptor is open for the other direction, its peer is closed, or its device is full.
fn is_error_for_no_bytes(case: &Case<'_>) -> bool {
    let may_have_no_bytes = match case.op {
        // A region and a slice transfer only the bytes up to their end.
        Op::Touch {
            on,
            access: Access::ReadFrom { count, .. } | Access::WriteTo { count, .. },
            ..
        } => *count == 0 || matches!(on, Target::OneRegion(_) | Target::OneSlice(_)),
        // The length depends on the path of the slice.
        Op::Volatile {
            act: Act::DirectRead { .. } | Act::DirectWrite { .. },
            ..
        } => true,
        _ => false,
    };
    may_have_no_bytes && case.diff.is_nothing() && turns_error_to_none(case.reference, case.ours)
}

/// Returns whether two results differ only in one transfer: an error of the system, and 0 bytes.
fn turns_error_to_none(reference: &Out, ours: &Out) -> bool {
    match (reference, ours) {
        (Out::Failed(Fault::Io(_, Some(_))), Out::Num(0)) => true,
        (Out::All(reference), Out::All(ours)) => {
            let (Some((first, theirs)), Some((count, same))) =
                (reference.split_first(), ours.split_first())
            else {
                return false;
            };
            theirs == same && turns_error_to_none(first, count)
        }
        _ => false,
    }
}

/// Returns whether all differences are marks that only ours has, or only the reference.
fn differs_in_marks_of(ours: bool, case: &Case<'_>) -> bool {
    let diff = case.diff;
    diff.shape.is_none()
        && diff
            .regions
            .iter()
            .all(|r| r.bytes.is_empty() && r.bits.iter().all(|bit| bit.in_ours == ours))
        && diff.iommu.iter().all(|bit| bit.in_ours == ours)
}
