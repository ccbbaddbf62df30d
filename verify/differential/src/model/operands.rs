//! The sizes of values, the permissions, and the mappings of a range.

use crate::context::Mapping;
use crate::op::{AtomTy, Perm, Ty};

/// Returns the mapped ranges of `first..=last`, with adjacent ranges joined; `None` if there is a
/// gap, or a range that does not permit the access.
pub fn found(mappings: &[Mapping], first: u64, last: u64, perm: Perm) -> Option<Vec<Mapping>> {
    let mut ranges: Vec<Mapping> = Vec::new();
    let mut next = Some(first);
    for m in mappings
        .iter()
        .filter(|m| m.last >= first && m.first <= last)
    {
        let (from, to) = (m.first.max(first), m.last.min(last));
        if next != Some(from) || !allows(m.perm, perm) {
            return None;
        }
        next = to.checked_add(1);
        let gpa = m.gpa.wrapping_add(from - m.first);
        match ranges.last_mut() {
            Some(before)
                if before.perm == m.perm && before.gpa.wrapping_add(from - before.first) == gpa =>
            {
                before.last = to;
            }
            _ => ranges.push(Mapping {
                first: from,
                last: to,
                gpa,
                perm: m.perm,
            }),
        }
    }
    (next == last.checked_add(1)).then_some(ranges)
}

/// Returns whether a permission includes another.
pub fn allows(granted: Perm, wanted: Perm) -> bool {
    match (granted, wanted) {
        (_, Perm::No) | (Perm::ReadWrite, _) => true,
        (granted, wanted) => granted == wanted,
    }
}

/// Returns the size of a value of the type.
pub fn size_of(ty: Ty) -> usize {
    match ty {
        Ty::U8 | Ty::I8 => 1,
        Ty::U16 | Ty::I16 | Ty::Be16 | Ty::Le16 => 2,
        Ty::U32 | Ty::I32 | Ty::Be32 | Ty::Le32 => 4,
        Ty::U64
        | Ty::I64
        | Ty::Usize
        | Ty::Isize
        | Ty::Be64
        | Ty::Le64
        | Ty::BeSize
        | Ty::LeSize => 8,
        Ty::U128 | Ty::I128 => 16,
        Ty::Bytes3 => 3,
        Ty::Bytes40 => 40,
        Ty::Empty => 0,
    }
}

/// Returns the size of a value of the atomic type.
pub fn atom_size(ty: AtomTy) -> usize {
    use AtomTy as A;
    match ty {
        A::AtomU8 | A::AtomI8 => 1,
        A::AtomU16 | A::AtomI16 => 2,
        A::AtomU32 | A::AtomI32 => 4,
        A::AtomU64 | A::AtomI64 | A::AtomUsize | A::AtomIsize => 8,
    }
}
