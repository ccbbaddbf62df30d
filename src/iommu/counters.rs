//! [`LookupCounters`]: the hits and misses of an IOTLB.
//!
//! Threads that count at the same time in one cache line slow each other: a count then takes about
//! as long as a hit. So each of the first 16 threads has a shard of its own.

use core::ops::Sub;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The number of shards. With more threads than this, several threads use one shard.
const SHARDS: usize = 16;

/// Counts of lookups, sharded so that counting threads do not contend for a cache line.
#[derive(Debug, Default)]
pub(super) struct LookupCounters {
    shards: [Shard; SHARDS],
}

/// The counts of a few threads, in two cache lines: processors prefetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    hits: AtomicU64,
    misses: AtomicU64,
}

/// The shard of the next thread that counts.
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    // Relaxed: any number does, and it protects no other memory.
    static SHARD: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
}

impl LookupCounters {
    /// Counts one lookup.
    #[inline(never)]
    pub(super) fn count(&self, hit: bool) {
        let shard = SHARD.try_with(|shard| *shard).unwrap_or(0);
        if let Some(shard) = self.shards.get(shard) {
            let counter = if hit { &shard.hits } else { &shard.misses };
            // Relaxed: a statistic, which protects no other memory.
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the numbers of hits and misses.
    pub(super) fn sums(&self) -> (u64, u64) {
        // Relaxed: a statistic, which protects no other memory.
        let sum = |of: fn(&Shard) -> &AtomicU64| {
            self.shards
                .iter()
                .map(|shard| of(shard).load(Ordering::Relaxed))
                .fold(0, u64::wrapping_add)
        };
        (sum(|shard| &shard.hits), sum(|shard| &shard.misses))
    }
}

/// Statistics of an [`Iotlb`](super::Iotlb) or a [`SharedIotlb`](super::SharedIotlb).
///
/// The difference of two readings has the lookups and evictions between them, and the mappings of
/// the later one.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, Iotlb, Permissions};
///
/// let mut iotlb = Iotlb::new();
/// iotlb.count_lookups();
/// let mut lookup = || Iotlb::lookup(&iotlb, GuestAddress(0), 1, Permissions::Read).is_ok();
/// lookup();
/// let before = iotlb.counters();
/// lookup();
/// let rate = iotlb.counters() - before;
/// assert_eq!((rate.hits, rate.misses), (0, 1));
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct IotlbCounters {
    /// The number of lookups that found all of their range; 0 unless lookups are counted.
    pub hits: u64,
    /// The number of lookups that failed; 0 unless lookups are counted.
    pub misses: u64,
    /// The number of mappings that were evicted because of the bound.
    pub evictions: u64,
    /// The current number of mappings.
    pub entries: usize,
}

/// The counts of lookups and evictions wrap, as the counters do.
impl Sub for IotlbCounters {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            hits: self.hits.wrapping_sub(earlier.hits),
            misses: self.misses.wrapping_sub(earlier.misses),
            evictions: self.evictions.wrapping_sub(earlier.evictions),
            entries: self.entries,
        }
    }
}
