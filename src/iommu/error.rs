//! Address ranges, and the errors of translations.

use std::fmt;
use std::iter::repeat_n;
use std::num::TryFromIntError;
use std::ops::Range;

use super::iotlb::TRIES;
use super::kind::{
    DOES_NOT_PERMIT, HAS_LOST, IS_NOT_MAPPED, NEEDS_MORE, NO_MAPPING, PASSES_THE_END,
};
use crate::convert::to_u64;
use crate::guest_memory::{GuestAddress, Permissions};

/// The reason why a range is not translated.
///
/// # Examples
///
/// See [`IotlbFails::into_error`], which creates the most common one, and [`kind`](Self::kind),
/// which tells refusals from failed requests.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The IOMMU has no mapping for the range, or none that permits the access.
    #[error("cannot translate IOVA range {iova_range}: {reason}")]
    CannotResolve {
        /// The range that was to be translated.
        iova_range: IovaRange,
        /// The reason, with the part of the range that failed.
        reason: String,
    },
    /// The access needs contiguous memory, and the range is scattered.
    #[error(
        "IOVA range {iova_range} is scattered: \
         only the first {continuous_length} bytes are contiguous"
    )]
    Fragmented {
        /// The range that was to be translated.
        iova_range: IovaRange,
        /// The number of contiguous bytes at its start.
        continuous_length: usize,
    },
    /// The IOMMU, or the bitmap beside it, is not set up for this access.
    #[error("translated memory is misconfigured: {reason}")]
    IommuMisconfigured {
        /// The reason.
        reason: String,
    },
}

/// A range of I/O virtual addresses.
///
/// # Examples
///
/// ```
/// use vm_memory::iommu::IovaRange;
///
/// let range = IovaRange::try_from(0x1000..0x3000)?;
/// assert_eq!((range.base.0, range.length), (0x1000, 0x2000));
/// assert_eq!(range.to_string(), "0x1000-0x2fff");
/// # Ok::<(), std::num::TryFromIntError>(())
/// ```
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct IovaRange {
    /// The first address.
    pub base: GuestAddress,
    /// The length in bytes.
    pub length: usize,
}

/// Prints the first and the last address.
impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.length.checked_sub(1) {
            None => write!(f, "0x{:x} (empty)", self.base.0),
            Some(more) => {
                // Wider than an address, to print a range that passes 2^64.
                let last =
                    u128::from(self.base.0).saturating_add(more.try_into().unwrap_or(u128::MAX));
                write!(f, "0x{:x}-0x{last:x}", self.base.0)
            }
        }
    }
}

/// Creates an empty range if the end is before the start.
impl TryFrom<Range<u64>> for IovaRange {
    type Error = TryFromIntError;

    fn try_from(range: Range<u64>) -> Result<Self, Self::Error> {
        Ok(IovaRange {
            base: GuestAddress(range.start),
            length: range.end.saturating_sub(range.start).try_into()?,
        })
    }
}

/// A range of guest physical addresses that a range of I/O virtual addresses is mapped to.
///
/// # Examples
///
/// See [`Iotlb`](super::Iotlb).
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct MappedRange {
    /// The first address.
    pub base: GuestAddress,
    /// The length in bytes.
    pub length: usize,
}

/// The parts of a range for which a lookup failed.
///
/// # Examples
///
/// See [`Iotlb`](super::Iotlb), and [`Iommu`](super::Iommu) for the use of
/// [`misses`](Self::misses).
#[derive(Clone, Debug)]
#[doc(alias = "IOTLB miss")]
pub struct IotlbFails {
    /// The parts that have no mapping. Ask for all of them, and then look up the range again.
    /// Lookups after each part take [quadratic time](super::Iotlb#time).
    ///
    /// In an IOTLB with a [bound](super::Iotlb::set_bound), this may be the whole range, if asking
    /// for its parts made no progress.
    pub misses: Vec<IovaRange>,
    /// The parts whose mapping does not permit the access, or that cannot have a mapping because
    /// they pass 2^64.
    ///
    /// If the [bound](super::Iotlb::set_bound) of the IOTLB prevents the access, the missing parts
    /// are also here: asking for them would never end. The last parts are then empty. One empty
    /// part: the range needs more mappings than the bound permits at a time. Two: its tries are
    /// spent. [`is_refused_by_bound`](Self::is_refused_by_bound) checks for them.
    pub access_fails: Vec<IovaRange>,
}

impl IovaRange {
    /// Returns whether the last address is past the end of the address space.
    pub(super) fn passes_the_end(&self) -> bool {
        let more = to_u64(self.length.saturating_sub(1));
        self.base.0.checked_add(more).is_none()
    }
}

/// The reason why the bound of an IOTLB prevents an access.
///
/// Users of 0.18.0 construct [`IotlbFails`], so it cannot have a field for the reason. The number
/// of empty parts at the end of `access_fails` stands for the reason. No other part is empty,
/// because an empty range is always found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum BoundRefusal {
    /// The range needs more mappings than the bound permits at a time.
    NeedsMore,
    /// The tries of the range are spent.
    TriesSpent,
}

impl BoundRefusal {
    /// Returns the number of empty parts.
    fn parts(self) -> usize {
        match self {
            Self::NeedsMore => 1,
            Self::TriesSpent => 2,
        }
    }
}

impl IotlbFails {
    /// Creates the outcome of a lookup whose missing parts must not be requested any more.
    pub(super) fn refused(
        reason: BoundRefusal,
        mut misses: Vec<IovaRange>,
        mut access_fails: Vec<IovaRange>,
    ) -> Self {
        access_fails.append(&mut misses);
        access_fails.sort_by_key(|range| range.base);
        if let Some(base) = access_fails.first().map(|range| range.base) {
            let empty = IovaRange { base, length: 0 };
            access_fails.extend(repeat_n(empty, reason.parts()));
        }
        IotlbFails {
            misses,
            access_fails,
        }
    }

    /// Returns the reason why the bound prevents the access, if it does.
    fn refusal(&self) -> Option<BoundRefusal> {
        let parts = self.access_fails.iter().rev();
        match parts.take_while(|part| part.length == 0).count() {
            0 => None,
            1 => Some(BoundRefusal::NeedsMore),
            _ => Some(BoundRefusal::TriesSpent),
        }
    }

    /// Returns whether the [bound](super::Iotlb::set_bound) of the IOTLB prevents the access.
    ///
    /// The range needs more mappings than the bound permits at a time, or its 32 tries are spent.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.set_bound(std::num::NonZeroUsize::new(1));
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0x7000), 0x1000, Permissions::Read)?;
    /// iotlb.set_mapping(GuestAddress(0x2000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// let iova = GuestAddress(0x1000);
    /// let lookup = |length| Iotlb::lookup(&iotlb, iova, length, Permissions::Read);
    /// assert!(lookup(0x2000).unwrap_err().is_refused_by_bound());
    ///
    /// // The first of the two pages is a plain miss.
    /// assert!(!lookup(0x1000).unwrap_err().is_refused_by_bound());
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn is_refused_by_bound(&self) -> bool {
        self.refusal().is_some()
    }

    /// Converts the outcome of a failed lookup of `length` bytes at `iova` into an error.
    ///
    /// The error names the requested access, and the first part that does not permit it. If there
    /// is none, it names the first part that is missing. A range that passes 2^64, or that the
    /// bound prevents, is an error that says so.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// let (iova, access) = (GuestAddress(0x1800), Permissions::Write);
    /// let fails = Iotlb::lookup(&iotlb, iova, 0x10, access).unwrap_err();
    /// assert_eq!(
    ///     fails.into_error(iova, 0x10, access).to_string(),
    ///     "cannot translate IOVA range 0x1800-0x180f: \
    ///      0x1800-0x180f does not permit write access"
    /// );
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    #[cold]
    pub fn into_error(self, iova: GuestAddress, length: usize, access: Permissions) -> Error {
        let wanted = match access {
            Permissions::No => "any",
            Permissions::Read => "read",
            Permissions::Write => "write",
            Permissions::ReadWrite => "read and write",
        };
        let reason = match (self.access_fails.first(), self.misses.first()) {
            _ if self.refusal() == Some(BoundRefusal::TriesSpent) => format!(
                "{HAS_LOST} in {TRIES} tries; \
                 raise the bound of the IOTLB, or access less at a time"
            ),
            _ if self.refusal() == Some(BoundRefusal::NeedsMore) => NEEDS_MORE.into(),
            (Some(refused), _) if refused.passes_the_end() => PASSES_THE_END.into(),
            (Some(refused), _) => format!("{refused} {DOES_NOT_PERMIT} {wanted} access"),
            (None, Some(missing)) => format!("{missing} {IS_NOT_MAPPED} {wanted} access"),
            (None, None) => format!("{NO_MAPPING} {wanted} access"),
        };
        Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason,
        }
    }
}
