//! [`Refusal`]: the byte that an access cannot reach, and the reason.

use core::error::Error as StdError;
use core::fmt::{self, Display};

use super::backend::rest_of;
use super::{Error, GuestAddress, GuestMemoryBackend, MemoryRegionAddress, Permissions};
use crate::address::Address;
use crate::convert::to_u64;
use crate::region::GuestMemoryRegion;

/// The first byte of a range that an access cannot reach, and the reason.
///
/// [`GuestMemory::explain`](super::GuestMemory::explain) returns it.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::guest_memory::RefusalReason;
/// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let addr = GuestAddress(0xff0);
/// assert!(memory.read_slice(&mut [0; 0x20], addr).is_err());
///
/// let refusal = memory.explain(addr, 0x20, Permissions::Read).ok_or("the range is accessible")?;
/// assert_eq!(refusal.addr, GuestAddress(0x1000));
/// assert_eq!(refusal.reason, RefusalReason::Hole);
/// assert_eq!(
///     refusal.to_string(),
///     "byte 0x10 of the range, at 0x1000: no region of guest memory contains it"
/// );
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct Refusal {
    /// The number of bytes of the range before this one. An access can reach them.
    pub offset: usize,
    /// The address of the byte, as the access uses it. For [`RefusalReason::PastTheEnd`], the last
    /// address.
    pub addr: GuestAddress,
    /// The guest physical address, if an IOMMU maps `addr` to it.
    pub physical: Option<GuestAddress>,
    /// The reason.
    pub reason: RefusalReason,
}

/// The reason why an access cannot reach a byte.
///
/// # Examples
///
/// See [`Refusal`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum RefusalReason {
    /// No region contains the byte.
    Hole,
    /// The byte is in a block that is not plugged: see
    /// [`reachable_bytes`](GuestMemoryRegion::reachable_bytes).
    Unplugged,
    /// The region permits only these accesses: see
    /// [`allowed_access`](GuestMemoryRegion::allowed_access).
    RegionPermits(Permissions),
    /// The region has no memory in this process: it is not RAM, or it is not mapped.
    NoHostMemory,
    /// The IOMMU does not map the byte. An IOMMU that asks for missing mappings may get one later.
    NotMapped,
    /// The mapping in the IOMMU permits only these accesses.
    MappingPermits(Permissions),
    /// The dirty bitmap beside the IOMMU does not track the byte, so it must not be written.
    NotTracked,
    /// The byte is not in a range of the [`RestrictedMemory`](super::RestrictedMemory).
    NotInView,
    /// The range of the [`RestrictedMemory`](super::RestrictedMemory) permits only these accesses.
    ViewPermits(Permissions),
    /// The range passes the end of the address space, 2^64.
    PastTheEnd,
    /// The memory gives no reason: it only refuses the range, or needs side effects to find one.
    Unknown,
}

impl Refusal {
    /// Creates a refusal of the byte `offset` of a range at `addr`.
    pub(crate) fn new(addr: GuestAddress, offset: usize, reason: RefusalReason) -> Self {
        Self {
            offset,
            // A range that passes 2^64 has no address there.
            addr: addr
                .checked_add(to_u64(offset))
                .unwrap_or(GuestAddress(u64::MAX)),
            physical: None,
            reason,
        }
    }
}

impl Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {:#x} of the range", self.offset)?;
        if self.reason != RefusalReason::PastTheEnd {
            write!(f, ", at {:#x}", self.addr.0)?;
        }
        if let Some(physical) = self.physical {
            write!(f, ", which the IOMMU maps to {:#x}", physical.0)?;
        }
        write!(f, ": {}", self.reason)
    }
}

impl StdError for Refusal {}

impl Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = |permissions| match permissions {
            Permissions::No => "no access",
            Permissions::Read => "only read access",
            Permissions::Write => "only write access",
            Permissions::ReadWrite => "read and write access",
        };
        match self {
            Self::Hole => f.write_str("no region of guest memory contains it"),
            Self::Unplugged => f.write_str("it is in a block that is not plugged"),
            Self::RegionPermits(granted) => write!(f, "its region permits {}", access(*granted)),
            Self::NoHostMemory => {
                f.write_str("its region is not RAM, or is not mapped in this process")
            }
            Self::NotMapped => f.write_str("the IOMMU does not map it"),
            Self::MappingPermits(granted) => {
                write!(f, "its mapping in the IOMMU permits {}", access(*granted))
            }
            Self::NotTracked => {
                f.write_str("the dirty bitmap beside the IOMMU does not track it; use a larger one")
            }
            Self::NotInView => f.write_str("it is not in a range of the view of the memory"),
            Self::ViewPermits(granted) => {
                write!(f, "the view of the memory permits {}", access(*granted))
            }
            Self::PastTheEnd => f.write_str("it is past the end of the address space, 2^64"),
            Self::Unknown => f.write_str("the memory gives no reason"),
        }
    }
}

/// Returns the first of the `count` bytes at `addr` that an access to `memory` cannot reach.
pub(crate) fn explain<M: GuestMemoryBackend + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
) -> Option<Refusal> {
    let mut done = 0usize;
    while done < count {
        let refusal =
            |reached: usize, reason| Some(Refusal::new(addr, done.saturating_add(reached), reason));
        let Some(at) = addr.checked_add(to_u64(done)) else {
            return refusal(0, RefusalReason::PastTheEnd);
        };
        let Some((region, start)) = memory.to_region_addr(at) else {
            return refusal(0, RefusalReason::Hole);
        };
        let granted = region.allowed_access();
        if !granted.allow(access) {
            return refusal(0, RefusalReason::RegionPermits(granted));
        }
        let wanted = count.saturating_sub(done).min(rest_of(region, at, start));
        if let Some((reached, reason)) = refusal_of_region(region, start, wanted) {
            return refusal(reached, reason);
        }
        done = done.saturating_add(wanted);
    }
    None
}

/// Returns the number of accessible bytes at `start`, and the reason why the next one is not.
///
/// Returns `None` if all `count` bytes are accessible.
fn refusal_of_region<R: GuestMemoryRegion>(
    region: &R,
    start: MemoryRegionAddress,
    count: usize,
) -> Option<(usize, RefusalReason)> {
    let gives = |count| {
        let slice = region.get_slice(start, count);
        slice.is_ok_and(|slice| slice.len() == count)
    };
    if count == 0 {
        // The region claims an address that is past its end. Without this check, the walk would
        // not end.
        return Some((0, RefusalReason::Unknown));
    }
    if gives(count) {
        return None;
    }
    if let Some(part) = region.reachable_slice(start, count) {
        let reachable = part.len();
        return (reachable < count).then_some((reachable, RefusalReason::Unplugged));
    }
    let reachable = region.reachable_bytes(start, count);
    if reachable < count && (reachable == 0 || gives(reachable)) {
        return Some((reachable, RefusalReason::Unplugged));
    }
    let reached = longest(count, gives);
    match region.get_slice(start, reached.saturating_add(1)) {
        Err(Error::HostAddressNotAvailable) => Some((reached, RefusalReason::NoHostMemory)),
        // They became accessible meanwhile.
        _ if gives(count) => None,
        _ => Some((reached, RefusalReason::Unknown)),
    }
}

/// Returns the largest number below `count` that `fits`, or 0 if none does.
///
/// All smaller numbers also fit.
pub(crate) fn longest(count: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut fit, mut above) = (0usize, count);
    while above.saturating_sub(fit) > 1 {
        let middle = fit.midpoint(above);
        if fits(middle) {
            fit = middle;
        } else {
            above = middle;
        }
    }
    fit
}

#[cfg(test)]
mod tests {
    use super::longest;

    #[test]
    fn longest_below_count_is_the_largest_that_fits() {
        for count in 1..20 {
            for fitting in 0..count {
                assert_eq!(longest(count, |number| number <= fitting), fitting);
            }
        }
        assert_eq!(longest(0, |_| false), 0);
        assert_eq!(
            longest(usize::MAX, |number| number < usize::MAX),
            usize::MAX - 1
        );
    }
}
