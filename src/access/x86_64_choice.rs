//! Sets of kernels as other processors pick them, for tests: the choice is the thread's for as long as one call lasts.

use std::cell::Cell;

use super::{find_features, FaultAddress, AVX, AVX512, FAST_REP, KNOWN};
use test_support::skipped;

/// What kernels are chosen by.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    pub(super) features: u8,
    pub(super) rep_min: usize,
    pub(super) streaming_min: usize,
}

thread_local! {
    static CHOICE: Cell<Option<Choice>> = const { Cell::new(None) };
}

/// The choice of this thread, if it has one.
pub(super) fn current() -> Option<Choice> {
    CHOICE.get()
}

/// Takes away what this processor cannot run; `rep movsb` runs on all of them.
fn with<R>(choice: Choice, call: impl FnOnce() -> R) -> R {
    let here = find_features() | FAST_REP;
    CHOICE.set(Some(Choice {
        features: choice.features & here,
        ..choice
    }));
    let answer = call();
    CHOICE.set(None);
    answer
}

/// The shortest that the kernels for long copies take.
const SHORTEST: usize = super::bulk::SMALL_MAX + 1;

macro_rules! choices {
    ($($(#[$doc:meta])* $name:ident = $features:expr, streaming from $streaming_min:expr;)*) => {
        $(
            $(#[$doc])*
            pub(in crate::access) mod $name {
                use super::*;
                pub(in crate::access) use super::super::{load_ordered, store_ordered};

                pub(super) const CHOICE: Choice = Choice {
                    features: KNOWN | $features,
                    rep_min: SHORTEST,
                    streaming_min: $streaming_min,
                };

                choices! { @forward
                    copy_from_guest(dst: *mut u8, src: *const u8, len: usize);
                    copy_from_guest_ascending(dst: *mut u8, src: *const u8, len: usize);
                    copy_to_guest(dst: *mut u8, src: *const u8, len: usize);
                    copy_to_guest_ascending(dst: *mut u8, src: *const u8, len: usize);
                    copy_within_guest(dst: *mut u8, src: *const u8, len: usize);
                    copy_within_guest_ascending(dst: *mut u8, src: *const u8, len: usize);
                    fill_guest(dst: *mut u8, value: u8, len: usize);
                    fill_guest_ascending(dst: *mut u8, value: u8, len: usize);
                    copy_elements_from_guest(dst: *mut u8, src: *const u8, count: usize, size: usize);
                    copy_elements_to_guest(dst: *mut u8, src: *const u8, count: usize, size: usize);
                }
            }
        )*
    };
    (@forward $($function:ident($($parameter:ident: $type:ty),*);)*) => {
        $(
            /// # Safety
            ///
            /// As the function of the same name.
            pub(in crate::access) unsafe fn $function($($parameter: $type),*) -> Result<(), FaultAddress> {
                // SAFETY: the caller's contract.
                with(CHOICE, || unsafe { super::super::$function($($parameter),*) })
            }
        )*
    };
}

choices! {
    /// What every x86_64 processor has.
    sse = 0, streaming from usize::MAX;
    /// Vectors of 32 bytes.
    avx = AVX, streaming from usize::MAX;
    /// Vectors of 64 bytes.
    avx512 = AVX | AVX512, streaming from usize::MAX;
    /// `rep movsb` and `rep stosb`, and vectors of 16 bytes.
    rep = FAST_REP, streaming from usize::MAX;
    /// Stores that go past the caches.
    streaming = AVX | FAST_REP, streaming from SHORTEST;
}

#[test]
fn each_choice_picks_its_kernels() {
    use super::bulk::{
        fill_ascending, fill_vectors, middle_avx, middle_avx512, middle_sse, rep_bytes,
        streaming_avx, vectors_avx, vectors_sse,
    };
    use super::{blocks_kernel, copy_kernel, fill_kernel, Kernel};

    let test = "each_choice_picks_its_kernels";
    let picks = |choice, wanted: [Kernel; 3]| {
        let picked = with(choice, || {
            [
                copy_kernel(SHORTEST),
                fill_kernel(SHORTEST),
                blocks_kernel(),
            ]
        });
        let addresses = |kernels: [Kernel; 3]| kernels.map(|kernel| kernel as usize);
        assert_eq!(addresses(picked), addresses(wanted));
    };
    picks(sse::CHOICE, [middle_sse, fill_vectors, vectors_sse]);
    picks(rep::CHOICE, [rep_bytes, fill_ascending, vectors_sse]);
    if find_features() & AVX == 0 {
        return skipped(
            test,
            "this processor has no AVX: the kernels that need it were not run",
        );
    }
    picks(avx::CHOICE, [middle_avx, fill_vectors, vectors_avx]);
    picks(
        streaming::CHOICE,
        [streaming_avx, fill_ascending, vectors_avx],
    );
    if find_features() & AVX512 == 0 {
        return skipped(
            test,
            "this processor has no AVX-512: the kernels that need it were not run",
        );
    }
    picks(avx512::CHOICE, [middle_avx512, fill_vectors, vectors_avx]);
}

/// Until a thread has asked what the processor has, a kernel that stands for the others finds it, and hands all operands on.
#[test]
fn a_kernel_that_is_not_found_yet_goes_on_as_the_one_that_is() {
    use super::bulk::middle_not_found_yet;
    use super::{call, Operand};

    let source: Vec<u8> = (0..2000usize).map(|i| (i % 251) as u8).collect();
    for len in [33, 64, 100, 300, 2000] {
        let mut target = vec![0u8; 2001];
        let operand = Operand { start: 0, end: 0 };
        let (dst, src) = (target.as_mut_ptr(), source.as_ptr());
        // SAFETY: both vectors have at least `len` bytes, and neither is a guest operand.
        unsafe { call(middle_not_found_yet, dst, src, len, operand, operand) }.unwrap();
        assert!(target[..len] == source[..len] && target[len..].iter().all(|b| *b == 0));
    }
}
