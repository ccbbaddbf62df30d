//! [`Pin`]: keeps the pages of a range.

use core::fmt;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::turn::lock;
use super::{ListenerError, RegionNotifier};

/// Keeps the pages of a range from being discarded and unplugged, until it is dropped.
///
/// It does not keep the region in its map, or mapped. The owner of a pin that uses the memory keeps
/// the map as well.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::listeners::{ChangeKind, RegionNotifier};
///
/// // The notifier of a region, as `GuestMemoryRegion::notifier` returns it.
/// let notifier = Arc::new(RegionNotifier::new());
/// let pin = notifier.pin(0x1000, 0x1000)?;
/// let discard = |offset| notifier.begin()?.announce(ChangeKind::Discarded, &[(offset, 0x1000)]);
/// assert!(discard(0x1000).is_err());
/// assert!(discard(0x2000).is_ok());
/// drop(pin);
/// assert!(discard(0x1000).is_ok());
/// # Ok::<(), vm_memory::listeners::ListenerError>(())
/// ```
#[must_use = "the pages are pinned only as long as this exists"]
pub struct Pin {
    notifier: Arc<RegionNotifier>,
    offset: u64,
    len: u64,
}

impl Pin {
    /// Returns the first byte of the range, as an offset in the region in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the length of the range in bytes.
    #[expect(clippy::len_without_is_empty, reason = "an empty range pins no page")]
    pub fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.notifier.pins.remove(self.offset, self.len);
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin")
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// The range was still pinned at the deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range is still pinned")]
#[non_exhaustive]
pub struct StillPinned;

/// The pinned ranges of a region, and those whose pages go.
#[derive(Debug, Default)]
pub(super) struct Pins {
    ranges: Mutex<Ranges>,
    removed: Condvar,
}

#[derive(Debug, Default)]
struct Ranges {
    /// The number of pins of each range, by offset and length.
    pinned: BTreeMap<(u64, u64), usize>,
    /// At least the length of the longest pin.
    longest: u64,
    /// The number of threads that wait for the end of a pin.
    waiting: usize,
    /// The ranges whose pages are being discarded or unplugged. They cannot be pinned.
    going: Vec<(u64, u64)>,
}

impl RegionNotifier {
    /// Keeps the pages of `len` bytes at `offset` from being discarded and unplugged.
    ///
    /// The pages need not exist. The range can contain unplugged blocks, so check after the call
    /// that it is accessible. While they are pinned, `plug` of `vm-memory-host` refuses them.
    ///
    /// # Errors
    ///
    /// Returns [`ListenerError::BeingFreed`] if pages of the range are being discarded or
    /// unplugged.
    pub fn pin(self: &Arc<Self>, offset: u64, len: u64) -> Result<Pin, ListenerError> {
        let mut ranges = lock(&self.pins.ranges);
        if overlaps(&ranges.going, offset, len) {
            return Err(ListenerError::BeingFreed { offset, len });
        }
        Ok(ranges.pin(self, offset, len))
    }

    /// Pins a range even if its pages are being freed, since this cannot fail.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn pin_always(self: &Arc<Self>, offset: u64, len: u64) -> Pin {
        lock(&self.pins.ranges).pin(self, offset, len)
    }

    /// Waits until no byte of a range is pinned, or until `deadline`.
    ///
    /// Another pin can be taken at any time, so a discard after this call can fail nevertheless.
    ///
    /// # Errors
    ///
    /// Returns [`StillPinned`] at `deadline`.
    pub fn wait_until_unpinned(
        &self,
        offset: u64,
        len: u64,
        deadline: Instant,
    ) -> Result<(), StillPinned> {
        let mut ranges = lock(&self.pins.ranges);
        while ranges.is_pinned(offset, len) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StillPinned);
            }
            ranges.waiting = ranges.waiting.saturating_add(1);
            let waited = self.pins.removed.wait_timeout(ranges, left);
            ranges = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            ranges.waiting = ranges.waiting.saturating_sub(1);
        }
        Ok(())
    }
}

impl Ranges {
    fn pin(&mut self, notifier: &Arc<RegionNotifier>, offset: u64, len: u64) -> Pin {
        let count = self.pinned.entry((offset, len)).or_default();
        *count = count.saturating_add(1);
        self.longest = self.longest.max(len);
        Pin {
            notifier: Arc::clone(notifier),
            offset,
            len,
        }
    }
}

impl Ranges {
    /// Returns whether a byte of a range is pinned.
    ///
    /// The cost follows the pins that begin near the range, as far as the longest pin reaches.
    fn is_pinned(&self, offset: u64, len: u64) -> bool {
        let first = (offset.saturating_sub(self.longest), 0);
        let end = (offset.saturating_add(len), 0);
        let mut near = self.pinned.range(first..end.max(first));
        near.any(|((start, len), _)| start.saturating_add(*len) > offset)
    }

    fn pinned_run(&self, runs: &[(u64, u64)]) -> Option<(u64, u64)> {
        let mut runs = runs.iter().copied();
        runs.find(|(offset, len)| self.is_pinned(*offset, *len))
    }

    fn unpin(&mut self, offset: u64, len: u64) {
        if let Some(count) = self.pinned.get_mut(&(offset, len)) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.pinned.remove(&(offset, len));
            }
        }
        if self.pinned.is_empty() {
            self.longest = 0;
        }
    }
}

impl Pins {
    /// Returns a run that is pinned.
    pub(super) fn pinned_run(&self, runs: &[(u64, u64)]) -> Option<(u64, u64)> {
        lock(&self.ranges).pinned_run(runs)
    }

    /// Records that the pages of `runs` go, so that they cannot be pinned.
    ///
    /// Returns a run that is pinned. Then nothing is recorded.
    pub(super) fn withdraw(&self, runs: &[(u64, u64)]) -> Result<(), (u64, u64)> {
        let mut ranges = lock(&self.ranges);
        match ranges.pinned_run(runs) {
            Some(run) => Err(run),
            None => {
                ranges.going.extend_from_slice(runs);
                Ok(())
            }
        }
    }

    /// Records that no pages go any more.
    pub(super) fn end_withdrawals(&self) {
        lock(&self.ranges).going.clear();
    }

    fn remove(&self, offset: u64, len: u64) {
        let mut ranges = lock(&self.ranges);
        ranges.unpin(offset, len);
        if ranges.waiting != 0 {
            self.removed.notify_all();
        }
    }
}

/// Returns whether one of `ranges` has a byte of the range. A range may claim bytes past 2^64.
fn overlaps(ranges: &[(u64, u64)], offset: u64, len: u64) -> bool {
    let end = offset.saturating_add(len);
    ranges
        .iter()
        .any(|(other, other_len)| *other < end && offset < other.saturating_add(*other_len))
}
