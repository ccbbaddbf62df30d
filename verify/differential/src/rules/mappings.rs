//! Differences of mappings: B7.

use super::{Case, Then};
use crate::host::whole_pages;
use crate::op::{MapHow, MapSpec, Op};
use crate::out::{Fault, Out};

pub(super) fn b7(case: &Case<'_>) -> Option<Then> {
    let Op::Map(MapSpec {
        how,
        size,
        file,
        prot,
        ..
    }) = case.op
    else {
        return None;
    };
    if *how == MapHow::MapBuilderBare {
        let (Out::All(reference), Out::All(ours)) = (case.reference, case.ours) else {
            return None;
        };
        let none_then_both = reference[1] == Out::Num(0) && ours[1] == Out::Num(3);
        let rest = reference[0] == ours[0] && reference[2..] == ours[2..];
        return (none_then_both && rest).then_some(Then::Sync);
    }
    let raw = matches!(how, MapHow::MapRaw | MapHow::MapRawBuilder);
    if raw && prot & 3 == 1 {
        return write_was_refused(case.reference, case.ours).then_some(Then::Sync);
    }
    let file = file.as_ref()?;
    let needed = u128::from(file.offset) + whole_pages(*size) as u128;
    let lacks = (whole_pages(file.len as usize) as u128) < needed;
    let past = Fault::Named("MappingPastEof");
    let refused = matches!(case.ours, Out::Failed(fault) if *fault == past || *fault == Fault::Mmap(Box::new(past.clone())));
    (lacks && refused && matches!(case.reference, Out::All(_))).then_some(Then::Sync)
}

/// Returns whether only the write differs: ours refused it, as the protection states.
fn write_was_refused(reference: &Out, ours: &Out) -> bool {
    let (Out::All(reference), Out::All(ours)) = (reference, ours) else {
        return false;
    };
    let ([facts, Out::All(reference)], [our_facts, Out::All(ours)]) = (&reference[..], &ours[..])
    else {
        return false;
    };
    let written = Out::Num(0x0102_0304_0506_0708);
    let refused = Out::Failed(Fault::HostAddressNotAvailable);
    facts == our_facts
        && reference[..] == [Out::Nothing, written.clone(), written]
        && ours[..] == [refused, Out::Num(0), Out::Num(0)]
}
