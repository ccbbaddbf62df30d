//! [`Generation`]: shows a window that its map or its IOTLB has changed.

use core::sync::atomic::{fence, AtomicU64, Ordering};
use std::sync::Arc;

/// The generation of a map or of an IOTLB: the number of its changes. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Generation(Arc<AtomicU64>);

impl Generation {
    /// Publishes the number of the last change. Call it after the change took effect.
    pub(crate) fn publish(&self, number: u64) {
        // Two writers may publish in any order. Release: see `now`.
        self.0.fetch_max(number, Ordering::Release);
    }

    /// Returns the state after the last published change. Call it before loading the value.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn now(&self) -> SeenGeneration {
        // Acquire: a value that is loaded after this includes the change of that number.
        self.at(self.0.load(Ordering::Acquire))
    }

    /// Returns the state after the change `number`.
    pub(crate) fn at(&self, number: u64) -> SeenGeneration {
        let generation = self.clone();
        SeenGeneration { generation, number }
    }
}

/// The state of a map or of an IOTLB after a change.
#[derive(Clone, Debug)]
pub(crate) struct SeenGeneration {
    generation: Generation,
    number: u64,
}

impl SeenGeneration {
    /// Returns whether no later change was published.
    #[inline(always)]
    pub(crate) fn is_current(&self) -> bool {
        // Relaxed: `true` protects no data. Coherence suffices to find a change that was published
        // before this call, by any synchronisation of the two threads.
        let current = self.generation.0.load(Ordering::Relaxed) <= self.number;
        if !current {
            // With the release of `publish`: the number that was loaded belongs to a change that
            // took effect before. So a refresh after this call sees that change.
            fence(Ordering::Acquire);
        }
        current
    }
}

#[cfg(test)]
mod tests {
    use super::Generation;

    #[test]
    fn seen_is_current_until_a_later_change_is_published() {
        let generation = Generation::default();
        let (first, third) = (generation.at(0), generation.at(3));
        assert!(first.is_current() && third.is_current());
        generation.clone().publish(3);
        assert!(!first.is_current() && third.is_current());
        // A writer that is late does not hide the later change.
        generation.publish(2);
        assert!(!first.is_current() && !generation.at(2).is_current());
        generation.publish(4);
        assert!(!third.is_current() && generation.at(4).is_current());
    }
}
