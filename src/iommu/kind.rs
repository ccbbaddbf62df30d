//! [`ErrorKind`]: the kinds of failed translations, for code that handles them differently.
//!
//! [`Error::CannotResolve`] is a variant of 0.18.0, whose users match and construct it: it cannot
//! have another field. So the kind is found in the text of its reason. The texts that decide are
//! constants of this module, and the code that creates the reasons uses them. `tests/kinds.rs`
//! makes each error as a user meets it, and checks its kind.

use super::Error;

/// The reason for a range that passes the end of the address space.
pub(super) const PASSES_THE_END: &str = "the range passes the end of the address space";
/// The reason for a mapping whose target passes the end of the address space, before the target.
pub(super) const ITS_TARGET: &str = "its target at guest address";
/// The reason for a range that lost its mappings in each try, before the number of tries.
pub(super) const HAS_LOST: &str = "the range has lost its mappings";
/// The reason for a range that needs too many mappings.
pub(super) const NEEDS_MORE: &str =
    "the range needs more mappings than the bound of the IOTLB permits at a time";
/// The reason if no mapping permits an access, and no part is known, before the access.
pub(super) const NO_MAPPING: &str = "no mapping for";

// These follow the part of the range that failed.

/// Before the access.
pub(super) const IS_NOT_MAPPED: &str = "is not mapped, for";
/// Before the access.
pub(super) const DOES_NOT_PERMIT: &str = "does not permit";
pub(super) const SOURCE_IS_CLOSED: &str = "is not mapped, and the source of mappings is closed";
/// Before the timeout.
pub(super) const NONE_ARRIVED: &str = "is not mapped, and no mapping arrived within";
/// Before the error.
pub(super) const REQUEST_FAILED: &str = "is not mapped, and its request failed:";

/// The kind of an [`Error`], which [`Error::kind`] returns.
///
/// # Examples
///
/// A device tells a missing reply from an access that a mapping does not permit:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::time::Duration;
/// use vm_memory::iommu::{AskingIommu, ErrorKind, IommuMemory, IovaRange, SharedIotlb};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, Permissions};
///
/// // A front end that never replies.
/// let source = |_: &IovaRange, _: Permissions| Ok(());
/// let iommu = AskingIommu::new(SharedIotlb::new(), Duration::from_millis(1), source);
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let memory = IommuMemory::new(physical, iommu, true, ());
/// match memory.read_obj::<u64>(GuestAddress(0x8000)) {
///     Err(GuestMemoryError::IommuError(error)) => match error.kind() {
///         // The front end is slow, or the guest has not mapped the address: vhost-user has no
///         // message for this, so a front end may not reply.
///         ErrorKind::TimedOut => println!("{error}"),
///         ErrorKind::RequestFailed | ErrorKind::Closed => panic!("no front end: {error}"),
///         _ => panic!("the guest does not permit the access: {error}"),
///     },
///     other => panic!("{other:?}"),
/// }
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A part of the range is not mapped. It was not requested.
    NotMapped,
    /// A mapping of the range does not permit the access.
    NotPermitted,
    /// No mapping arrived before the timeout of the [`AskingIommu`](super::AskingIommu).
    TimedOut,
    /// A part of the range is not mapped, and the [`AskingIommu`](super::AskingIommu) is
    /// [closed](super::AskingIommu::close).
    Closed,
    /// The [`MappingSource`](super::MappingSource) returned an error for the request of a mapping.
    RequestFailed,
    /// The [bound](super::Iotlb::set_bound) of the IOTLB prevents the access.
    RefusedByBound,
    /// The range, or the target of a mapping, passes 2^64.
    PastTheEnd,
    /// The access needs contiguous memory, and the range is scattered.
    Scattered,
    /// The IOMMU, or the bitmap beside it, is not set up for this access.
    Misconfigured,
    /// None of these. The reason of the error has the details.
    Other,
}

/// The reasons that begin with one of these texts.
const BEGINNINGS: [(&str, ErrorKind); 5] = [
    (PASSES_THE_END, ErrorKind::PastTheEnd),
    (ITS_TARGET, ErrorKind::PastTheEnd),
    (HAS_LOST, ErrorKind::RefusedByBound),
    (NEEDS_MORE, ErrorKind::RefusedByBound),
    (NO_MAPPING, ErrorKind::NotMapped),
];

/// The reasons that have one of these texts after the part of the range.
const AFTER_PART: [(&str, ErrorKind); 5] = [
    (IS_NOT_MAPPED, ErrorKind::NotMapped),
    (DOES_NOT_PERMIT, ErrorKind::NotPermitted),
    (SOURCE_IS_CLOSED, ErrorKind::Closed),
    (NONE_ARRIVED, ErrorKind::TimedOut),
    (REQUEST_FAILED, ErrorKind::RequestFailed),
];

/// Returns the kind of the text that `reason` begins with.
fn find(reason: &str, kinds: &[(&str, ErrorKind)]) -> Option<ErrorKind> {
    let found = kinds.iter().find(|(text, _)| reason.starts_with(text))?;
    Some(found.1)
}

impl Error {
    /// Returns the kind of the error.
    ///
    /// It is that of the errors of this crate. The error of another [`Iommu`](super::Iommu) has it
    /// if it was created by [`IotlbFails::into_error`](super::IotlbFails::into_error), and
    /// otherwise [`ErrorKind::Other`].
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::iommu::{ErrorKind, Iommu, SharedIotlb};
    /// use vm_memory::{GuestAddress, Permissions};
    ///
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// let kind = |iova, access| {
    ///     iotlb.translate(GuestAddress(iova), 8, access).unwrap_err().kind()
    /// };
    /// assert_eq!(kind(0x1000, Permissions::Write), ErrorKind::NotPermitted);
    /// assert_eq!(kind(0x2000, Permissions::Write), ErrorKind::NotMapped);
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Fragmented { .. } => ErrorKind::Scattered,
            Self::IommuMisconfigured { .. } => ErrorKind::Misconfigured,
            Self::CannotResolve { reason, .. } => {
                // The part has no space. The text of an error comes later, so it cannot mislead.
                let after_part = reason.split_once(' ').map(|(_, rest)| rest);
                find(reason, &BEGINNINGS)
                    .or_else(|| find(after_part?, &AFTER_PART))
                    .unwrap_or(ErrorKind::Other)
            }
        }
    }
}
