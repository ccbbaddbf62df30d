//! Retired versions: versions of a shared value that were replaced, and their readers.
//!
//! Memory maps ([`atomic`](crate::atomic)) and IOTLBs ([`iommu`](crate::iommu)) are read without a
//! lock. A change makes a new version current and retires the old one, which lives as long as its
//! readers do. An object that the change removed is out of use when no older version has a reader.
//!
//! ```text
//!   new readers ──────► version 3    current
//!
//!   reader A ─────────► version 2 ┐
//!   reader B, reader C ► version 1 ├ retired: version 2 has one reader, version 1 has two,
//!                       version 0 ┘ and version 0 is forgotten
//! ```
//!
//! [`RetiredList`] counts the readers, and [`wait_until_unread`] waits for them. `verify/loom`
//! explores the list, and the snapshots of an IOTLB that are built on it, with the names in
//! [`sync`] replaced by loom's.

#[cfg(feature = "backend-atomic")]
mod handle;
mod list;
pub(crate) mod sync;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

#[cfg(feature = "backend-atomic")]
pub(crate) use handle::{RetiredHandle, WeakVersion};
pub(crate) use list::RetiredList;
#[cfg(feature = "iommu")]
pub(crate) use list::{Unread, Version};

/// The error of a wait for readers: at its deadline, a retired version still had readers.
///
/// A thread that holds a reader of that version gets this error at the deadline. Readers are
/// guards, iterators, snapshots, I/O buffers and windows. Drop the reader before waiting.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "iommu")] {
/// use std::time::Instant;
/// use vm_memory::iommu::{ReadersRemain, SharedIotlb};
///
/// let iotlb = SharedIotlb::new();
/// let snapshot = iotlb.snapshot();
/// let invalidation = iotlb.invalidate_all();
/// let remain: Result<(), ReadersRemain> = invalidation.wait(Instant::now());
/// assert_eq!(remain.unwrap_err().readers, 1);
/// drop(snapshot);
/// assert_eq!(invalidation.wait(Instant::now()), Ok(()));
/// # }
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[error(
    "a retired version is still in use (readers: {readers}); \
     drop any guard, iterator, snapshot, buffer or window that the waiting thread holds"
)]
pub struct ReadersRemain {
    /// The number of readers at the deadline.
    pub readers: usize,
}

/// The longest sleep between two checks.
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// Waits until `readers` returns 0, or until `deadline`.
///
/// Readers send no notification, so that reading costs nothing: this polls. It checks once before
/// it reads the clock, and doubles the sleep after each check, up to [`LONGEST_SLEEP`].
pub(crate) fn wait_until_unread(
    deadline: Instant,
    readers: impl Fn() -> usize,
) -> Result<(), ReadersRemain> {
    let mut sleep = Duration::from_micros(1);
    loop {
        let readers = readers();
        if readers == 0 {
            return Ok(());
        }
        let time = deadline.saturating_duration_since(Instant::now());
        if time.is_zero() {
            return Err(ReadersRemain { readers });
        }
        std::thread::sleep(sleep.min(time));
        sleep = sleep.saturating_mul(2).min(LONGEST_SLEEP);
    }
}
