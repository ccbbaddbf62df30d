//! [`LookupCounters`]: how often an IOTLB had what it was asked for.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Threads that count in places of their own; more share them.
const SHARDS: usize = 16;

/// Counts of lookups, in places that threads do not share, so that counting does not make them wait for each other.
#[derive(Debug, Default)]
pub(super) struct LookupCounters {
    shards: [Shard; SHARDS],
}

/// Lines of cache of its own: two, since processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    hits: AtomicU64,
    misses: AtomicU64,
}

/// The next thread's place.
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static PLACE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
}

impl LookupCounters {
    /// Counts one lookup.
    #[inline(never)]
    pub(super) fn count(&self, hit: bool) {
        let place = PLACE.try_with(|place| *place).unwrap_or(0);
        if let Some(shard) = self.shards.get(place) {
            let counter = if hit { &shard.hits } else { &shard.misses };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The sums: hits and misses.
    pub(super) fn sums(&self) -> (u64, u64) {
        let sum = |of: fn(&Shard) -> &AtomicU64| {
            self.shards
                .iter()
                .map(|shard| of(shard).load(Ordering::Relaxed))
                .fold(0, u64::wrapping_add)
        };
        (sum(|shard| &shard.hits), sum(|shard| &shard.misses))
    }
}

/// What an [`Iotlb`](super::Iotlb) or a [`SharedIotlb`](super::SharedIotlb) has done since it was made, or since its lookups are counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IotlbCounters {
    /// Lookups that found everything; 0 unless they are counted.
    pub hits: u64,
    /// Lookups that failed; 0 unless they are counted.
    pub misses: u64,
    /// Mappings that had to go for others, because of the bound.
    pub evictions: u64,
    /// Mappings that there are now.
    pub entries: usize,
}
