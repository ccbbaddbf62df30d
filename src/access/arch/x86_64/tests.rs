//! The routines that x86_64 processors with fewer or more features use, and their selection.

use std::marker::PhantomData;

use super::select::{self, Detected, Features, Limits};
use super::{routines, Routine};
use crate::access::arch::{Assembly, Select};
use crate::access::routine_set::{GuestSide, RoutineSet};
use test_support::skipped;

/// The shortest copies that take routines for long copies.
const SHORTEST: usize = routines::SMALL_MAX + 1;

/// A kind of processor.
trait Kind {
    const FEATURES: Features;
    /// The shortest copy whose stores bypass the caches.
    const STREAMING: usize;

    fn limits() -> Limits {
        Limits {
            rep: SHORTEST,
            streaming: Self::STREAMING,
        }
    }

    /// Returns the features of the kind that this processor has as well. Each processor can run
    /// `rep movsb`.
    fn features() -> Features {
        Self::FEATURES.and(Features::detect().with(Features::FAST_REP))
    }
}

/// The routines for a kind of processor.
struct Selected<K>(PhantomData<K>);

// SAFETY: `Kind::features` returns features that this processor has, and `select` chooses by
// length.
unsafe impl<K: Kind> Select for Selected<K> {
    fn copy(len: usize) -> Routine {
        select::copy(len, K::features(), K::limits())
    }

    fn fill(len: usize) -> Routine {
        select::fill(len, K::features(), K::limits())
    }

    fn blocks() -> Routine {
        select::blocks(K::features())
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $features:expr, streaming from $streaming:expr;)*) => {
        $(
            $(#[$doc])*
            mod $name {
                use super::*;

                pub(super) struct This;
                impl Kind for This {
                    const FEATURES: Features = Features::BASE.with($features);
                    const STREAMING: usize = $streaming;
                }
                // Single accesses are the same on each x86_64 processor.
                type Routines = Assembly<Selected<This>>;
                bulk_tests!(Routines);
                guard_page_tests!(Routines);
                order_tests!(Routines);
                fault_tests!(Routines);
            }
        )*
    };
}

kinds! {
    /// Only the features that each x86_64 processor has.
    sse: Features::BASE, streaming from usize::MAX;
    /// Vectors of 32 bytes.
    avx: Features::AVX, streaming from usize::MAX;
    /// Vectors of 64 bytes.
    avx512: Features::AVX.with(Features::AVX512), streaming from usize::MAX;
    /// `rep movsb` and `rep stosb`, and vectors of 16 bytes.
    rep: Features::FAST_REP, streaming from usize::MAX;
    /// Stores that bypass the caches.
    streaming: Features::AVX.with(Features::FAST_REP), streaming from SHORTEST;
}

fn names(selected: [Routine; 3]) -> [usize; 3] {
    selected.map(|routine| routine as usize)
}

#[test]
fn select_with_features_returns_their_routines() {
    use routines::*;

    let check = |features: Features, streaming, expected: [Routine; 3]| {
        let features = Features::BASE.with(features);
        let limits = Limits {
            rep: SHORTEST,
            streaming,
        };
        let selected = [
            select::copy(SHORTEST, features, limits),
            select::fill(SHORTEST, features, limits),
            select::blocks(features),
        ];
        assert_eq!(names(selected), names(expected), "{features:?}");
        for (len, expected) in [(0, small_bytes as Routine), (32, small_bytes)] {
            let selected = select::copy(len, features, limits);
            assert_eq!(selected as usize, expected as usize, "{len}");
        }
        let (shorter, fill) = (SHORTEST - 1, fill_vectors as Routine);
        let selected = select::fill(shorter, features, limits);
        assert_eq!(selected as usize, fill as usize);
    };
    let (never, always) = (usize::MAX, SHORTEST);
    let (avx, rep) = (Features::AVX, Features::FAST_REP);
    let avx512 = avx.with(Features::AVX512);
    check(
        Features::BASE,
        never,
        [middle_sse, fill_vectors, vectors_sse],
    );
    check(avx, never, [middle_avx, fill_vectors, vectors_avx]);
    check(avx512, never, [middle_avx512, fill_vectors, vectors_avx]);
    check(rep, never, [rep_bytes, fill_ascending, vectors_sse]);
    check(rep, always, [rep_bytes, fill_ascending, vectors_sse]);
    check(
        avx.with(rep),
        never,
        [rep_bytes, fill_ascending, vectors_avx],
    );
    check(
        avx.with(rep),
        always,
        [streaming_avx, fill_ascending, vectors_avx],
    );
}

#[test]
fn detected_selects_as_select_with_detected_features() {
    let features = Features::detect();
    for len in [
        0,
        1,
        32,
        33,
        128,
        129,
        (1 << 14) - 1,
        1 << 14,
        (24 << 20) - 1,
        24 << 20,
    ] {
        let expected = [
            select::copy(len, features, select::LIMITS),
            select::fill(len, features, select::LIMITS),
            select::blocks(features),
        ];
        select::detect_middle_copy();
        let selected = [Detected::copy(len), Detected::fill(len), Detected::blocks()];
        assert_eq!(names(selected), names(expected), "{len}");
    }
}

#[test]
fn kinds_with_missing_features_are_reported() {
    let test = "kinds_with_missing_features_are_reported";
    let present = Features::detect();
    if !present.has(Features::AVX) {
        return skipped(
            test,
            "this processor has no AVX: routines that need it did not run",
        );
    }
    if !present.has(Features::AVX512) {
        skipped(
            test,
            "this processor has no AVX-512: routines that need it did not run",
        );
    }
}

#[test]
fn middle_undetected_passes_operands_on() {
    /// The choice of a thread that copies before the features are detected.
    struct Undetected;
    // SAFETY: the lengths below are at least 32.
    unsafe impl Select for Undetected {
        fn copy(_len: usize) -> Routine {
            routines::middle_undetected
        }
        fn fill(_len: usize) -> Routine {
            routines::fill_vectors
        }
        fn blocks() -> Routine {
            routines::vectors_sse
        }
    }
    let source: Vec<u8> = (0..2000usize).map(|i| (i % 251) as u8).collect();
    for len in [33, 64, 100, 300, 2000] {
        let mut target = vec![0u8; 2001];
        let (dst, src) = (target.as_mut_ptr(), source.as_ptr());
        // SAFETY: both vectors have at least `len` bytes.
        unsafe { Assembly::<Undetected>::copy(GuestSide::Source, dst, src, len) }.unwrap();
        assert!(target[..len] == source[..len] && target[len..].iter().all(|b| *b == 0));
    }
}
