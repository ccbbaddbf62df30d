//! [`Summary`]: the mappings of a leaf as one, so that a search of a long range skips the leaf.
//!
//! A device may look up a long range again after each mapping that arrives. Without summaries, each
//! lookup would read all mappings that the range has by then.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::mapping::IovaMapping;
use crate::guest_memory::Permissions;

/// The properties of all mappings of a leaf that a search needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    bits: u16,
    /// The last address of the last mapping.
    pub(super) last: u64,
}

/// The bits of a summary, which are never all 0. The two lowest are the permissions that all
/// mappings have.
const PERMISSIONS: u16 = 0b11;
/// There is no hole between the mappings.
const CONTIGUOUS: u16 = 1 << 2;
/// The lowest bit of the number of pieces, at least 1.
const PIECE: u16 = 1 << 3;

impl Summary {
    /// Creates the summary of at most 128 mappings.
    pub(super) fn of(mappings: &[IovaMapping]) -> Self {
        let mut bits = CONTIGUOUS | PERMISSIONS;
        let mut before: Option<&IovaMapping> = None;
        for mapping in mappings {
            bits &= !PERMISSIONS | u16::from(mapping.permission_bits());
            let follows = |before: &IovaMapping| before.last.checked_add(1) == Some(mapping.start);
            if !before.is_none_or(follows) {
                bits &= !CONTIGUOUS;
            }
            if !before.is_some_and(|before| before.continues(mapping)) {
                bits = bits.saturating_add(PIECE);
            }
            before = Some(mapping);
        }
        Self {
            bits,
            last: before.map_or(0, |before| before.last),
        }
    }

    /// Returns whether the mappings have no hole between them, and all permit an access.
    pub(super) fn covers(self, access: Permissions) -> bool {
        let wanted = CONTIGUOUS | u16::from(access.bits());
        wanted & !self.bits == 0
    }

    /// Returns the number of mappings that do not continue the one before.
    pub(super) fn pieces(self) -> usize {
        usize::from(self.bits / PIECE)
    }
}

/// The summary of the first mappings of an array, computed when it is first needed.
///
/// Threads that share a leaf compute the same summary, because the mappings do not change
/// meanwhile.
#[derive(Debug, Default)]
pub(super) struct Cached {
    /// The summary, and the number of mappings above it. 0 if the summary is not known.
    ///
    /// Stored after `last` (release), and loaded before it (acquire).
    bits: AtomicU32,
    last: AtomicU64,
}

/// The number of bits below the number of mappings.
const SUMMARY_BITS: u32 = u16::BITS;

impl Cached {
    /// Returns the summary that `make` returns for `len` mappings, at most 128.
    ///
    /// These must be the same until the next [`forget`](Self::forget).
    #[inline]
    pub(super) fn get(&self, len: usize, make: impl FnOnce() -> Summary) -> Summary {
        let bits = self.bits.load(Ordering::Acquire);
        let tag = u32::try_from(len).unwrap_or(0);
        match u16::try_from(bits ^ tag.wrapping_shl(SUMMARY_BITS)) {
            Ok(bits) if bits != 0 => Summary {
                bits,
                last: self.last.load(Ordering::Relaxed),
            },
            _ => {
                let summary = make();
                let bits = tag.wrapping_shl(SUMMARY_BITS) | u32::from(summary.bits);
                self.last.store(summary.last, Ordering::Relaxed);
                self.bits.store(bits, Ordering::Release);
                summary
            }
        }
    }

    /// Forgets the summary, because the mappings have changed.
    #[inline(always)]
    pub(super) fn forget(&mut self) {
        *self.bits.get_mut() = 0;
    }
}

impl Clone for Cached {
    #[inline]
    fn clone(&self) -> Self {
        let bits = self.bits.load(Ordering::Acquire);
        Self {
            bits: AtomicU32::new(bits),
            last: AtomicU64::new(self.last.load(Ordering::Relaxed)),
        }
    }
}
