//! An IOMMU with the crate's IOTLB, and the methods of the IOTLB.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::fault::{Hosts, IntoFault};
use super::types::perm;
use super::vm::iommu::{Error, Iotlb, IotlbIterator, IovaRange};
use super::vm::{GuestAddress, Iommu, Permissions};
use crate::context::Mapping;
use crate::op::{Perm, TlbAct};
use crate::out::Out;

/// The maximum number of mapped ranges that are compared. An iterator with more counts as endless.
const MOST_RANGES: usize = 1 << 12;

/// An IOMMU that never resolves a miss.
#[derive(Debug)]
pub struct Remapper {
    tlb: RwLock<Iotlb>,
}

impl Remapper {
    /// Creates one without mappings.
    pub fn new() -> Self {
        Remapper {
            tlb: RwLock::new(Iotlb::new()),
        }
    }

    /// Returns its IOTLB. A reported panic of the crate under test may have poisoned the lock.
    pub fn tlb_mut(&self) -> RwLockWriteGuard<'_, Iotlb> {
        self.tlb.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Iommu for Remapper {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let guard = self.tlb.read().unwrap_or_else(PoisonError::into_inner);
        Iotlb::lookup(guard, iova, length, access).map_err(|fails| Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason: format!(
                "{} misses, {} refusals",
                fails.misses.len(),
                fails.access_fails.len()
            ),
        })
    }
}

/// Runs the act on the IOTLB.
pub fn tlb(tlb: &mut Iotlb, act: &TlbAct, hosts: &Hosts) -> Out {
    match *act {
        TlbAct::SetMapping {
            iova,
            gpa,
            len,
            perm: granted,
        } => Out::of(
            tlb.set_mapping(GuestAddress(iova), GuestAddress(gpa), len, perm(granted))
                .map_err(|error| error.fault(hosts)),
        ),
        TlbAct::Invalidate { iova, len } => {
            tlb.invalidate_mapping(GuestAddress(iova), len);
            Out::Nothing
        }
        TlbAct::InvalidateAll => {
            tlb.invalidate_all();
            Out::Nothing
        }
        TlbAct::Lookup {
            iova,
            len,
            perm: wanted,
        } => match Iotlb::lookup(&*tlb, GuestAddress(iova), len, perm(wanted)) {
            Err(fails) => Out::Failed(fails.fault(hosts)),
            Ok(ranges) => ranges
                .take(MOST_RANGES)
                .map(|range| Out::All(vec![range.base.0.into(), range.length.into()]))
                .collect::<Vec<_>>()
                .into(),
        },
    }
}

/// Returns all mappings of the IOTLB by a lookup of everything.
pub fn mappings(tlb: &Iotlb) -> Vec<Mapping> {
    let mut found = Vec::new();
    // The last address is a separate lookup, because no length reaches it from 0.
    for (first, len) in [(0, usize::MAX), (u64::MAX, 1)] {
        let misses = match Iotlb::lookup(tlb, GuestAddress(first), len, Permissions::No) {
            Ok(_) => Vec::new(),
            Err(fails) => fails.misses,
        };
        let end = u128::from(first) + len as u128;
        let mut next = u128::from(first);
        let gaps = misses.iter().map(|gap| {
            (
                u128::from(gap.base.0),
                u128::from(gap.base.0) + gap.length as u128,
            )
        });
        for (gap, after) in gaps.chain([(end, end)]) {
            if next < gap {
                segments(tlb, next, gap, &mut found);
            }
            next = after;
        }
    }
    found
}

fn segments(tlb: &Iotlb, first: u128, end: u128, found: &mut Vec<Mapping>) {
    let (mut iova, len) = (first as u64, (end - first) as usize);
    let Ok(ranges) = Iotlb::lookup(tlb, GuestAddress(iova), len, Permissions::No) else {
        return;
    };
    for range in ranges {
        let allows = |access| Iotlb::lookup(tlb, GuestAddress(iova), range.length, access).is_ok();
        let perm = match (allows(Permissions::Read), allows(Permissions::Write)) {
            (false, false) => Perm::No,
            (true, false) => Perm::Read,
            (false, true) => Perm::Write,
            (true, true) => Perm::ReadWrite,
        };
        let last = iova.wrapping_add(range.length as u64 - 1);
        found.push(Mapping {
            first: iova,
            last,
            gpa: range.base.0,
            perm,
        });
        iova = last.wrapping_add(1);
    }
}
