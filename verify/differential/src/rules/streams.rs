//! Differences of streams: B1 and B14.

use std::io::ErrorKind;

use super::{as_modelled, Case, Then};
use crate::op::{Access, Act, Op, Sink};
use crate::out::{Fault, Out};

pub(super) fn b1(case: &Case<'_>) -> Option<Then> {
    // The row names reads. Writes have the same bug: an error replaces their count.
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
    let diff = case.diff;
    let only_marks = diff.shape.is_none()
        && diff
            .regions
            .iter()
            .all(|r| r.bytes.is_empty() && r.bits.iter().all(|bit| !bit.in_ours))
        && diff.iommu.iter().all(|bit| !bit.in_ours);
    (blocked && only_marks && case.reference == case.ours).then_some(Then::Sync)
}
