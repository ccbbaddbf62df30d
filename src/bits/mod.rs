//! Arithmetic on sets of bits in 64-bit words.
//!
//! Bit `i` of word `w` is number `64 * w + i`, as in the log of `KVM_GET_DIRTY_LOG`. This module
//! stores no bits.
//!
//! ```text
//!   summary   │ 0 1 0 0 … │              one bit per line: the line may have bits
//!                 │
//!   words     │ 8 words │ 8 words │ …    a line: one cache line, 512 bits
//! ```

mod runs;
#[cfg(feature = "backend-bitmap")]
mod single;
#[cfg(feature = "backend-bitmap")]
mod summary;
mod words;

pub(crate) use runs::bit_runs;
#[cfg(feature = "backend-bitmap")]
pub(crate) use runs::BitRuns;
#[cfg(feature = "backend-bitmap")]
pub(crate) use single::{bits_between, each_bit, position};
#[cfg(feature = "backend-bitmap")]
pub(crate) use summary::{summary_slot, LINE_BITS, LINE_WORDS, SUMMARY_BITS, SUMMARY_WORDS};
pub use words::{bit_number, words_of, WORD_BITS};
#[cfg(feature = "backend-bitmap")]
pub(crate) use words::{for_each_word, mask};
