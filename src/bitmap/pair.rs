//! [`swap_pair`]: reads and clears two adjacent words at once.
//!
//! One locked instruction for 16 bytes takes less time than two for 8, but more than one. The
//! harvest of a full bitmap executes one for each pair.

use core::sync::atomic::{AtomicU64, Ordering};

/// Reads and clears the words of a pair that were not 0 when they were loaded as `seen`.
///
/// This is one sequentially consistent `swap` for each of them, or one operation on both.
#[inline(always)]
pub(crate) fn swap_pair(pair: &[AtomicU64; 2], seen: [u64; 2]) -> [u64; 2] {
    #[cfg(all(target_arch = "x86_64", not(miri), not(vm_memory_portable)))]
    if !seen.contains(&0) && clear_if(pair, seen) {
        return seen;
    }
    let swap = |word: &AtomicU64, seen| match seen {
        0 => 0,
        _ => word.swap(0, Ordering::SeqCst),
    };
    let ([low, high], [seen_low, seen_high]) = (pair, seen);
    [swap(low, seen_low), swap(high, seen_high)]
}

/// Clears both words if they are `expected`. Returns whether they were.
///
/// Returns `false` as well if the processor has no `cmpxchg16b`, or if the pair is not aligned to
/// 16 bytes, which depends on the allocator.
#[cfg(all(target_arch = "x86_64", not(miri), not(vm_memory_portable)))]
#[inline(always)]
fn clear_if(pair: &[AtomicU64; 2], expected: [u64; 2]) -> bool {
    let at = pair.as_ptr();
    if !at.addr().is_multiple_of(16) || !std::arch::is_x86_feature_detected!("cmpxchg16b") {
        return false;
    }
    let [low, high] = expected;
    let cleared: u8;
    #[expect(unsafe_code, reason = "one instruction that the language lacks")]
    // SAFETY: `at` is valid for both words, which `pair` borrows. They are atomics, so they may
    // change while they are borrowed. The processor has the instruction, and the address is a
    // multiple of 16; both were checked above. If both words are `expected`, the block is a
    // sequentially consistent `compare_exchange` of each word, without an operation of another
    // thread between the two. Otherwise it is a load of each. It restores `rbx`, which cannot be an
    // operand, and does not use the stack.
    unsafe {
        core::arch::asm!(
            "xchg {zero}, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, {zero}",
            "sete {cleared}",
            zero = inout(reg) 0u64 => _,
            cleared = out(reg_byte) cleared,
            in("rdi") at,
            in("rcx") 0u64,
            inout("rax") low => _,
            inout("rdx") high => _,
            options(nostack),
        );
    }
    cleared != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An array whose first pair is aligned to 16 bytes, and whose second one is not.
    #[repr(align(16))]
    struct Words([AtomicU64; 4]);

    #[test]
    fn swap_of_pair_with_any_alignment_reads_and_clears_it() {
        for first in [0, 1] {
            let words = Words([1, 2, 3, 4].map(AtomicU64::new));
            let pair = words.0[first..].first_chunk().unwrap();
            let values = [1, 2, 3, 4][first..first + 2].try_into().unwrap();
            assert_eq!(swap_pair(pair, values), values);
            let rest = words.0.map(AtomicU64::into_inner);
            assert_eq!(rest, [[0, 0, 3, 4], [1, 0, 0, 4]][first]);
        }
    }

    #[test]
    fn swap_of_pair_that_changed_returns_its_present_values() {
        let words = Words([1, 2, 3, 4].map(AtomicU64::new));
        let [low, high, ..] = &words.0;
        let swap = |seen| swap_pair(words.0.first_chunk().unwrap(), seen);
        assert_eq!(swap([1, 3]), [1, 2]);
        low.store(5, Ordering::Relaxed);
        assert_eq!(swap([5, 0]), [5, 0]);
        high.store(7, Ordering::Relaxed);
        low.store(6, Ordering::Relaxed);
        // A word that was 0 may keep a mark that was set in the meantime.
        assert_eq!(swap([6, 0]), [6, 0]);
        assert_eq!((swap([0, 7]), low.load(Ordering::Relaxed)), ([0, 7], 0));
    }
}
