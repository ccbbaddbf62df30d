//! Guest accesses on aarch64, with the instructions of ARMv8.0, or of LSE where the target has it.
//!
//! The guarantees of [`access`](crate::access) rest on the "Arm Architecture Reference Manual for
//! A-profile architecture" (DDI 0487), chapter B2, "The AArch64 Application Level Memory Model":
//!
//! - A naturally aligned load or store of one general-purpose register is single-copy atomic. A
//!   load or store of a pair of registers is two such accesses ("Requirements for single-copy
//!   atomicity"). Unaligned plain accesses are allowed in normal memory, which guest memory is.
//!   Ordered and exclusive accesses must be aligned, as the contract of [`Word`] requires.
//! - Other processors see plain accesses in any order, except for dependencies and fences. `ldar`
//!   is observed before everything after it, and `stlr` after everything before it. An `ldar` is
//!   observed after each earlier `stlr` ("Load-Acquire, Load-AcquirePC, and Store-Release"). So
//!   `ldar` is an acquire, `stlr` a release, and both together are sequentially consistent. The
//!   compiler uses the same instructions for the atomics of the standard library, so these and ours
//!   have one order.
//! - A read-modify-write is one instruction of LSE, or a loop of `ldaxr` and `stlxr`. Both satisfy
//!   every ordering; weaker forms are not worth a second set.
//!
//! A loop of `ldaxr` and `stlxr` repeats if another processor has written in between: that
//! processor has made progress. A guest that writes all the time can delay this thread, as it can
//! with an atomic of the standard library.
//!
//! A block of assembly without the options `nomem` and `readonly` is also a compiler barrier.
//!
//! The handler puts the address of a fault into `x16` ([`fault_table`](super::fault_table)). Calls
//! do not preserve that register ("Procedure Call Standard for the Arm 64-bit Architecture",
//! section 6.1.1), so surrounding code rarely uses it. An instruction that accesses several bytes
//! may report any inaccessible byte among them; [`recount`](crate::access::recount) does not need
//! the first.

pub(super) mod routines;

use core::arch::asm;
use core::sync::atomic::Ordering;

use super::{fault_result, Assembly, Operand, Select};
use crate::access::routine_set::{FaultAddress, Fetch, Register, Word};
use routines::{fill_vectors, large_vectors, pairs, small_bytes, SMALL_MAX};

/// Assembles one read-modify-write. Evaluates to `(previous, fault)`.
///
/// `$single` is the LSE instruction without its suffixes. `$compute` computes `{new}` in the loop;
/// it works on whole registers, as bits above the width are not stored.
macro_rules! fetch_asm {
    (
        $dst:ident, $operand:expr, $suffix:literal, $register:literal,
        $single:literal, $compute:literal
    ) => {{
        let previous: u64;
        let operand: u64 = $operand;
        // SAFETY: `$dst` is an aligned guest operand of `size_of::<Self>()` bytes (contract of
        // `Word::fetch`). The instruction of LSE reads and writes exactly these bytes, and uses
        // neither the stack nor the flags. After a fault, the handler resumes after it.
        #[cfg(target_feature = "lse")]
        let fault = unsafe {
            guest_asm!(
                "x16",
                options(nostack, preserves_flags),
                [concat!(
                    $single, "al", $suffix,
                    " {operand", $register, "}, {previous", $register, "}, [{dst}]"
                )],
                previous = lateout(reg) previous,
                operand = in(reg) operand,
                dst = in(reg) $dst
            )
        };
        // SAFETY: `$dst` is an aligned guest operand of `size_of::<Self>()` bytes (contract of
        // `Word::fetch`). The loop reads and writes exactly these bytes, and uses neither the stack
        // nor the flags. After a fault, the handler resumes after the loop. A fault at the second
        // access leaves the exclusive monitor set, which the exception return clears.
        #[cfg(not(target_feature = "lse"))]
        let fault = unsafe {
            guest_asm!(
                "x16",
                options(nostack, preserves_flags),
                [
                    concat!("ldaxr", $suffix, " {previous", $register, "}, [{dst}]"),
                    $compute,
                    concat!("stlxr", $suffix, " {failed:w}, {new", $register, "}, [{dst}]"),
                    "cbnz {failed:w}, 2b"
                ],
                previous = out(reg) previous,
                new = out(reg) _,
                failed = out(reg) _,
                operand = in(reg) operand,
                dst = in(reg) $dst
            )
        };
        (previous, fault)
    }};
}

/// Implements [`Register`] and [`Word`] for an integer.
///
/// `$suffix` is the suffix of the instructions for its width, and `$register` the form of a
/// register.
macro_rules! impl_word {
    ($integer:ty, $suffix:literal, $register:literal) => {
        impl<S> Register<Assembly<S>> for $integer {
            #[inline(always)]
            unsafe fn load(src: *const u8) -> Result<Self, FaultAddress> {
                let value: u64;
                // SAFETY: `src` is a guest operand of `size_of::<Self>()` bytes (contract of
                // `Register::load`). The instruction reads exactly these bytes, writes registers
                // only, and uses neither the stack nor the flags. After a fault, the handler
                // resumes after it.
                let fault = unsafe {
                    guest_asm!(
                        "x16",
                        options(nostack, preserves_flags, readonly),
                        [concat!("ldr", $suffix, " {value", $register, "}, [{src}]")],
                        value = lateout(reg) value,
                        src = in(reg) src
                    )
                };
                fault_result(value as $integer, fault)
            }

            #[inline(always)]
            unsafe fn store(dst: *mut u8, value: Self) -> Result<(), FaultAddress> {
                // SAFETY: `dst` is a guest operand of `size_of::<Self>()` bytes (contract of
                // `Register::store`). The instruction writes exactly these bytes, and uses neither
                // the stack nor the flags. After a fault, the handler resumes after it.
                let fault = unsafe {
                    guest_asm!(
                        "x16",
                        options(nostack, preserves_flags),
                        [concat!("str", $suffix, " {value", $register, "}, [{dst}]")],
                        value = in(reg) u64::from(value),
                        dst = in(reg) dst
                    )
                };
                fault_result((), fault)
            }
        }

        impl<S> Word<Assembly<S>> for $integer {
            // Sequentially consistent, unless relaxed.
            #[inline(always)]
            unsafe fn load_ordered(src: *const u8, order: Ordering) -> Result<Self, FaultAddress> {
                if order == Ordering::Relaxed {
                    // SAFETY: `src` is a guest operand of this integer (contract of
                    // `load_ordered`).
                    return unsafe { <Self as Register<Assembly<S>>>::load(src) };
                }
                let value: u64;
                // SAFETY: `src` is an aligned guest operand of `size_of::<Self>()` bytes (contract
                // of `Word::load_ordered`). The instruction reads exactly these bytes, and uses
                // neither the stack nor the flags. After a fault, the handler resumes after it. The
                // block is a compiler barrier, because it lacks the option `readonly`.
                let fault = unsafe {
                    guest_asm!(
                        "x16",
                        options(nostack, preserves_flags),
                        [concat!("ldar", $suffix, " {value", $register, "}, [{src}]")],
                        value = lateout(reg) value,
                        src = in(reg) src
                    )
                };
                fault_result(value as $integer, fault)
            }

            // Sequentially consistent, unless relaxed.
            #[inline(always)]
            unsafe fn store_ordered(
                dst: *mut u8,
                value: Self,
                order: Ordering,
            ) -> Result<(), FaultAddress> {
                if order == Ordering::Relaxed {
                    // SAFETY: `dst` is a guest operand of this integer (contract of
                    // `store_ordered`).
                    return unsafe { <Self as Register<Assembly<S>>>::store(dst, value) };
                }
                // SAFETY: `dst` is an aligned guest operand of `size_of::<Self>()` bytes (contract
                // of `Word::store_ordered`). The instruction writes exactly these bytes, and uses
                // neither the stack nor the flags. After a fault, the handler resumes after it.
                let fault = unsafe {
                    guest_asm!(
                        "x16",
                        options(nostack, preserves_flags),
                        [concat!("stlr", $suffix, " {value", $register, "}, [{dst}]")],
                        value = in(reg) u64::from(value),
                        dst = in(reg) dst
                    )
                };
                fault_result((), fault)
            }

            // Sequentially consistent.
            #[inline(always)]
            unsafe fn fetch(
                dst: *mut u8,
                change: Fetch,
                operand: Self,
                _order: Ordering,
            ) -> Result<Self, FaultAddress> {
                let operand = u64::from(operand);
                macro_rules! fetch {
                    ($operand:expr, $single:literal, $compute:literal) => {
                        fetch_asm!(dst, $operand, $suffix, $register, $single, $compute)
                    };
                }
                let (previous, fault) = match change {
                    Fetch::Swap => fetch!(operand, "swp", "mov {new}, {operand}"),
                    Fetch::Add => fetch!(operand, "ldadd", "add {new}, {previous}, {operand}"),
                    Fetch::And => fetch!(!operand, "ldclr", "bic {new}, {previous}, {operand}"),
                    Fetch::Or => fetch!(operand, "ldset", "orr {new}, {previous}, {operand}"),
                };
                fault_result(previous as $integer, fault)
            }

            // Sequentially consistent in either case.
            #[inline(always)]
            unsafe fn compare_exchange(
                dst: *mut u8,
                current: Self,
                new: Self,
                _success: Ordering,
                _failure: Ordering,
            ) -> Result<Self, FaultAddress> {
                let (current, new) = (u64::from(current), u64::from(new));
                let previous: u64;
                // SAFETY: `dst` is an aligned guest operand of `size_of::<Self>()` bytes (contract
                // of `Word::compare_exchange`). `casal` reads and writes exactly these bytes, and
                // uses neither the stack nor the flags. After a fault, the handler resumes after
                // it.
                #[cfg(target_feature = "lse")]
                let fault = unsafe {
                    guest_asm!(
                        "x16",
                        options(nostack, preserves_flags),
                        [concat!(
                            "casal", $suffix,
                            " {previous", $register, "}, {new", $register, "}, [{dst}]"
                        )],
                        previous = inout(reg) current => previous,
                        new = in(reg) new,
                        dst = in(reg) dst
                    )
                };
                // SAFETY: `dst` is an aligned guest operand of `size_of::<Self>()` bytes (contract
                // of `Word::compare_exchange`). The loop reads and writes exactly these bytes, and
                // does not use the stack. `cmp` changes flags, so the block omits the option
                // `preserves_flags`. `ldaxr` extends with zeroes, as `current` is, so whole
                // registers are compared. After a fault, the handler resumes after the loop. The
                // exception return clears an exclusive monitor that is set.
                #[cfg(not(target_feature = "lse"))]
                let fault = unsafe {
                    guest_asm!(
                        "x16",
                        options(nostack),
                        [
                            concat!("ldaxr", $suffix, " {previous", $register, "}, [{dst}]"),
                            "cmp {previous}, {current}",
                            "b.ne 3f",
                            concat!("stlxr", $suffix, " {failed:w}, {new", $register, "}, [{dst}]"),
                            "cbnz {failed:w}, 2b"
                        ],
                        previous = out(reg) previous,
                        failed = out(reg) _,
                        current = in(reg) current,
                        new = in(reg) new,
                        dst = in(reg) dst
                    )
                };
                fault_result(previous as $integer, fault)
            }
        }
    };
}

impl_word!(u8, "b", ":w");
impl_word!(u16, "h", ":w");
impl_word!(u32, "", ":w");
impl_word!(u64, "", ":x");

/// 16 bytes, by one instruction, which is two accesses of 8 bytes.
impl<S> Register<Assembly<S>> for u128 {
    #[inline(always)]
    unsafe fn load(src: *const u8) -> Result<Self, FaultAddress> {
        let (low, high): (u64, u64);
        // SAFETY: `src` is a guest operand of `size_of::<Self>()` bytes (contract of
        // `Register::load`). The instruction reads exactly these bytes, writes registers only, and
        // uses neither the stack nor the flags. After a fault, the handler resumes after it.
        let fault = unsafe {
            guest_asm!(
                "x16",
                options(nostack, preserves_flags, readonly),
                ["ldp {low}, {high}, [{src}]"],
                low = lateout(reg) low,
                high = lateout(reg) high,
                src = in(reg) src
            )
        };
        fault_result(u128::from(low) | u128::from(high) << 64, fault)
    }

    #[inline(always)]
    #[expect(clippy::as_conversions, reason = "takes the two halves of the value")]
    unsafe fn store(dst: *mut u8, value: Self) -> Result<(), FaultAddress> {
        // SAFETY: `dst` is a guest operand of `size_of::<Self>()` bytes (contract of
        // `Register::store`). The instruction writes exactly these bytes, and uses neither the
        // stack nor the flags. After a fault, the handler resumes after it.
        let fault = unsafe {
            guest_asm!(
                "x16",
                options(nostack, preserves_flags),
                ["stp {low}, {high}, [{dst}]"],
                low = in(reg) value as u64,
                high = in(reg) (value >> 64) as u64,
                dst = in(reg) dst
            )
        };
        fault_result((), fault)
    }
}

/// A routine of [`routines`], which [`invoke`] calls.
pub(super) type Routine = unsafe extern "C" fn();

/// Invokes a routine.
///
/// # Safety
///
/// `dst`, `src` and `len` meet the contract of the routine. `operands` are its guest operands.
#[inline(always)]
pub(super) unsafe fn invoke(
    routine: Routine,
    dst: *mut u8,
    src: *const u8,
    len: usize,
    [first, second]: [Operand; 2],
) -> Result<(), FaultAddress> {
    let fault: usize;
    // SAFETY: the routine accesses only the bytes of its contract, which this function's contract
    // covers. It changes only registers that `clobber_abi` names.
    unsafe {
        asm!(
            "blr {routine}",
            routine = in(reg) routine,
            inout("x0") dst => _,
            inout("x1") src => _,
            inout("x2") len => _,
            inout("x3") first.start => _,
            inout("x4") first.end => _,
            inout("x5") second.start => _,
            inout("x6") second.end => _,
            lateout("x16") fault,
            clobber_abi("C"),
        );
    }
    fault_result((), fault)
}

/// The routines for this processor. They are the same on each aarch64 processor.
pub(crate) struct Detected;

// SAFETY: `small_bytes` is for at most `SMALL_MAX` bytes, `large_vectors` for more, and the others
// for each length. Each aarch64 processor has the instructions.
unsafe impl Select for Detected {
    #[inline(always)]
    fn copy(len: usize) -> Routine {
        if len <= SMALL_MAX {
            small_bytes
        } else {
            large_vectors
        }
    }

    #[inline(always)]
    fn fill(_len: usize) -> Routine {
        fill_vectors
    }

    // A pair of general-purpose registers is two accesses of 8 bytes; a vector need not be.
    #[inline(always)]
    fn blocks() -> Routine {
        pairs
    }
}
