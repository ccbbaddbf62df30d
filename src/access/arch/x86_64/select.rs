//! The choice of a routine by length and processor features.
//!
//! The functions that choose are pure. [`Detected`] applies them to this processor, whose features
//! it detects once.

use core::hint::select_unpredictable;
use core::mem::transmute;
use core::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

use super::routines::{
    fill_ascending, fill_vectors, middle_avx, middle_avx512, middle_sse, middle_undetected,
    rep_bytes, small_bytes, streaming_avx, vectors_avx, vectors_sse,
};
use super::Routine;
use crate::access::arch::Select;

/// Processor features that the choice depends on, as a set of bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Features(u8);

impl Features {
    /// SSE2, which each x86_64 processor has.
    pub(super) const BASE: Self = Self(1);
    pub(super) const AVX: Self = Self(2);
    /// `rep movsb` and `rep stosb` are fast (ERMSB).
    pub(super) const FAST_REP: Self = Self(4);
    /// Vectors of 64 bytes, which do not lower the clock.
    pub(super) const AVX512: Self = Self(8);

    /// Returns whether the processor has all of `features`.
    pub(super) const fn has(self, features: Self) -> bool {
        self.0 & features.0 == features.0
    }

    /// Returns the features that are in either set.
    pub(super) const fn with(self, features: Self) -> Self {
        Self(self.0 | features.0)
    }

    /// Returns the features that are in both sets.
    #[cfg(test)]
    pub(super) const fn and(self, features: Self) -> Self {
        Self(self.0 & features.0)
    }

    /// Returns the features of this processor.
    #[inline(always)]
    fn detected() -> Self {
        // Relaxed: each thread that finds 0 detects the same features.
        match DETECTED.load(Ordering::Relaxed) {
            0 => Self::detect(),
            features => Self(features),
        }
    }

    #[cold]
    pub(super) fn detect() -> Self {
        let mut features = Self::BASE;
        // Includes whether the system saves the registers.
        if std::arch::is_x86_feature_detected!("avx") {
            features = features.with(Self::AVX);
        }
        if std::arch::is_x86_feature_detected!("ermsb") {
            features = features.with(Self::FAST_REP);
        }
        // The first processors with AVX-512 lower their clock while such vectors are in use. Later
        // ones also have VBMI2 (Intel: since Ice Lake; AMD: since Zen 4).
        if std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512vbmi2")
        {
            features = features.with(Self::AVX512);
        }
        DETECTED.store(features.0, Ordering::Relaxed);
        features
    }
}

/// The features of this processor, or 0 before they are detected.
static DETECTED: AtomicU8 = AtomicU8::new(0);

/// The minimum lengths for which the routines for long copies are used, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// The shortest copy by `rep movsb`, where it is fast.
    pub(super) rep: usize,
    /// The shortest copy by stores that bypass the caches.
    pub(super) streaming: usize,
}

/// The limits in use, chosen by measurement.
pub(super) const LIMITS: Limits = Limits {
    rep: 1 << 14,
    streaming: 24 << 20,
};

/// The longest copy whose routine does not depend on the features.
const NARROW_MAX: usize = 32;

/// Returns the routine for copies of `len` bytes. [`Detected`] implements a faster form.
#[cfg(test)]
pub(super) fn copy(len: usize, features: Features, limits: Limits) -> Routine {
    if len >= limits.rep {
        long_copy(len, features, limits)
    } else if len <= NARROW_MAX {
        small_bytes
    } else {
        middle_copy(features)
    }
}

/// Returns the routine for copies of at least `limits.rep` bytes.
fn long_copy(len: usize, features: Features, limits: Limits) -> Routine {
    if !features.has(Features::FAST_REP) {
        middle_copy(features)
    } else if features.has(Features::AVX) && len >= limits.streaming {
        streaming_avx
    } else {
        rep_bytes
    }
}

/// Returns the routine for copies of more than [`NARROW_MAX`] bytes, without `rep movsb`.
fn middle_copy(features: Features) -> Routine {
    if features.has(Features::AVX512) {
        middle_avx512
    } else if features.has(Features::AVX) {
        middle_avx
    } else {
        middle_sse
    }
}

/// Returns the routine for fills of `len` bytes.
#[inline]
pub(super) fn fill(len: usize, features: Features, limits: Limits) -> Routine {
    if len >= limits.rep && features.has(Features::FAST_REP) {
        fill_ascending
    } else {
        fill_vectors
    }
}

/// Returns the routine for aligned blocks of 32 bytes, which moves them as vectors.
///
/// The manual allows an access of more than 8 bytes to be split (section 9.1.1). No known processor
/// splits an aligned vector within 8 aligned bytes, which would tear an element. A test looks for
/// torn elements.
pub(super) fn blocks(features: Features) -> Routine {
    if features.has(Features::AVX) {
        vectors_avx
    } else {
        vectors_sse
    }
}

/// The routines for this processor.
pub(crate) struct Detected;

// SAFETY: `Features::detected` returns features that this processor has.
//
// - `small_bytes` takes up to `SMALL_MAX` bytes, and is selected up to `NARROW_MAX`, which is less.
// - `middle_sse`, `middle_avx`, `middle_avx512` and `middle_undetected` take at least 32 bytes, and
//   are selected for more than `NARROW_MAX` bytes.
// - `rep_bytes` and `streaming_avx` take more than 128 bytes, and are selected for at least
//   `LIMITS.rep` bytes. `rep_bytes` may pass at least 66 bytes on to `middle_undetected`.
// - `fill_vectors` and `fill_ascending` take each length.
// - `vectors_sse` and `vectors_avx` take multiples of 32 bytes, as `blocks` requires.
unsafe impl Select for Detected {
    // The most common lengths take no branch: a mispredicted one would cost more than a short copy.
    #[inline(always)]
    fn copy(len: usize) -> Routine {
        if len >= LIMITS.rep {
            return detected_long_copy(len);
        }
        let (narrow, middle): (Routine, Routine) = (small_bytes, detected_middle_copy());
        select_unpredictable(len <= NARROW_MAX, narrow, middle)
    }

    #[inline]
    fn fill(len: usize) -> Routine {
        if len >= LIMITS.rep {
            fill(len, Features::detected(), LIMITS)
        } else {
            fill_vectors
        }
    }

    fn blocks() -> Routine {
        blocks(Features::detected())
    }
}

#[inline(never)]
fn detected_long_copy(len: usize) -> Routine {
    long_copy(len, Features::detected(), LIMITS)
}

/// The result of [`middle_copy`] for this processor. The initial value is a routine that detects
/// it.
#[expect(
    clippy::as_conversions,
    reason = "only a cast makes a pointer of a function"
)]
static MIDDLE: AtomicPtr<()> = AtomicPtr::new(middle_undetected as *mut ());

#[inline(always)]
fn detected_middle_copy() -> Routine {
    // Relaxed: each routine that is stored there is correct at any time.
    let routine = MIDDLE.load(Ordering::Relaxed);
    // SAFETY: `MIDDLE` holds only pointers to routines: its initial value, and what
    // `detect_middle_copy` stores.
    unsafe { transmute::<*mut (), Routine>(routine) }
}

/// Stores the result of [`middle_copy`] in [`MIDDLE`], and returns it.
///
/// [`middle_undetected`] calls it.
#[cold]
#[expect(
    clippy::as_conversions,
    reason = "only a cast makes a pointer of a function"
)]
pub(super) extern "sysv64" fn detect_middle_copy() -> Routine {
    let routine = middle_copy(Features::detected());
    MIDDLE.store(routine as *mut (), Ordering::Relaxed);
    routine
}
