//! What [`marks`](super::marks) is made of: atomics, and barriers. `verify/loom/` has the same names for what it explores.

pub(crate) use core::sync::atomic::{AtomicU64, Ordering};

/// The writer's half of a pair of barriers, the other half of which is `membarrier(2)`: it keeps the compiler from moving anything.
#[inline(always)]
pub(crate) fn light_barrier() {
    core::sync::atomic::compiler_fence(Ordering::SeqCst);
}
