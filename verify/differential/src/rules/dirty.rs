//! Differences of dirty tracking: B8.

use super::{as_modelled, is_translated, range_of, Case, Then};
use crate::op::{Op, Perm, Span};
use crate::out::Out;

pub(super) fn b8(case: &Case<'_>) -> Option<Then> {
    if let Op::BuilderMarks { size, writes } = case.op {
        return b08_builder(case, *size, writes);
    }
    let (_, at, len, perm) = range_of(case.op)?;
    let writes = matches!(perm, Perm::Write | Perm::ReadWrite);
    let about = is_translated(case) && writes && !case.before.iommu_tracks(at, len);
    (about && as_modelled(case)).then_some(Then::Sync)
}

fn b08_builder(case: &Case<'_>, size: usize, writes: &[Span]) -> Option<Then> {
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
