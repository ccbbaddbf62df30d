//! [`Changes`]: tells a window that its map or its IOTLB has moved on.

use core::sync::atomic::{fence, AtomicU64, Ordering};
use std::sync::Arc;

/// The number of changes of a map or of an IOTLB. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes(Arc<AtomicU64>);

impl Changes {
    /// Publishes the number of the last change. Call it after the change took effect.
    pub(crate) fn publish(&self, number: u64) {
        // Two writers may publish in any order. Release: see `now`.
        self.0.fetch_max(number, Ordering::Release);
    }

    /// Returns the state after the last published change. Call it before loading the value.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn now(&self) -> Seen {
        // Acquire: a value that is loaded after this includes the change of that number.
        self.at(self.0.load(Ordering::Acquire))
    }

    /// Returns the state after the change `number`.
    pub(crate) fn at(&self, number: u64) -> Seen {
        let changes = self.clone();
        Seen { changes, number }
    }
}

/// The state of a map or of an IOTLB after a change.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    changes: Changes,
    number: u64,
}

impl Seen {
    /// Returns whether no later change was published.
    #[inline(always)]
    pub(crate) fn is_current(&self) -> bool {
        // Relaxed: `true` protects no data. Coherence suffices to find a change that was published
        // before this call, by any synchronisation of the two threads.
        let current = self.changes.0.load(Ordering::Relaxed) <= self.number;
        if !current {
            // With the release of `publish`: the number that was loaded belongs to a change that
            // took effect before, so a refresh after this call sees that change.
            fence(Ordering::Acquire);
        }
        current
    }
}

#[cfg(test)]
mod tests {
    use super::Changes;

    #[test]
    fn seen_is_current_until_a_later_change_is_published() {
        let changes = Changes::default();
        let (first, third) = (changes.at(0), changes.at(3));
        assert!(first.is_current() && third.is_current());
        changes.clone().publish(3);
        assert!(!first.is_current() && third.is_current());
        // A writer that is late does not hide the later change.
        changes.publish(2);
        assert!(!first.is_current() && !changes.at(2).is_current());
        changes.publish(4);
        assert!(!third.is_current() && changes.at(4).is_current());
    }
}
