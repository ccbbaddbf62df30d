//! The names of `src/bitmap/sync.rs`, as loom has them.

pub(crate) use loom::sync::atomic::{fence, AtomicU64, Ordering};

/// Of a pair of barriers, one of which is forced on all threads, loom knows the sum: both are full.
pub(crate) fn light_barrier() {
    fence(Ordering::SeqCst);
}
