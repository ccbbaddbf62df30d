//! The atomics and the barrier that [`marks`](super::marks) is made of.
//!
//! `verify/loom` compiles `marks.rs` with a module of the same names instead of this one.

pub(crate) use core::sync::atomic::{AtomicU64, Ordering};

/// Issues the light half of an asymmetric pair of barriers, whose heavy half is
/// `process_wide_barrier`.
///
/// It is a compiler fence: the heavy half issues the processor's barrier on behalf of this thread.
#[inline(always)]
pub(crate) fn asymmetric_light_barrier() {
    core::sync::atomic::compiler_fence(Ordering::SeqCst);
}
