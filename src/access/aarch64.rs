//! Guest accesses on aarch64, as every processor since ARMv8.0 runs them.
//!
//! "Arm Architecture Reference Manual for A-profile architecture" (DDI 0487), chapter B2 "The AArch64 Application Level Memory Model":
//!
//! - A naturally aligned load or store of one general-purpose register is single-copy atomic, and a load or store of a pair of them is two such
//!   accesses (section "Requirements for single-copy atomicity"). Unaligned ones are allowed in normal memory, which guest memory is; but not
//!   with the instructions below that order or exclude, whose operands are aligned by contract.
//! - Plain accesses have no order among each other for other processors, dependencies and fences apart. `ldar` is observed before everything
//!   that comes after it, `stlr` after everything that came before, and an `ldar` after every `stlr` that came before
//!   ("Load-Acquire, Load-AcquirePC, and Store-Release"). That makes `ldar` an acquire, `stlr` a release, and both together sequentially consistent; the
//!   compiler takes the same two instructions for atomics of the standard library, so that these and ours are in one order.
//! - A read-modify-write is a loop of `ldaxr` and `stlxr`, or one instruction where the target has `lse`. Both have all orderings, in the same
//!   sense as `ldar` and `stlr`; weaker ones are not worth another set.
//!
//! A loop of `ldaxr` and `stlxr` goes round again when the store finds that another processor has written meanwhile. Somebody has made progress then;
//! a guest that writes there all the time delays it for as long as it wins, as it does with any atomic of the standard library.
//!
//! A block without `options(nomem)` or `options(readonly)` is also a compiler barrier: that is what makes an acquire of a load.
//!
//! # Faults
//!
//! The handler puts the faulting address into `x16` (`fault_entry.rs`). That register belongs to nobody across calls ("Procedure Call Standard for the Arm
//! 64-bit Architecture", section 6.1.1), so that the code around has little in it. An instruction that moves several bytes reports an address
//! among them that has no page, not always the first; [`recover`](super::recover) needs no more.

use core::arch::asm;
use core::num::NonZeroUsize;
use core::sync::atomic::Ordering;

use super::Fetch;

/// A fault's address. (The page at 0 is never guest memory: no pointer is null.)
pub(super) type FaultAddress = NonZeroUsize;

#[macro_use]
#[path = "fault_entry.rs"]
mod fault_entry;

#[path = "aarch64_bulk.rs"]
mod bulk;
use bulk::{fill_vectors, large_vectors, pairs, small_bytes, SMALL_MAX};

#[path = "copies.rs"]
mod copies;
use copies::Operand;
pub(super) use copies::{
    copy_elements_from_guest, copy_elements_to_guest, copy_from_guest, copy_from_guest_ascending,
    copy_to_guest, copy_to_guest_ascending, copy_within_guest, copy_within_guest_ascending,
    fill_guest, fill_guest_ascending,
};

macro_rules! single_accesses {
    ($($load:ident, $store:ident, $integer:ty, $suffix:literal, $register:literal;)*) => {
        $(
            /// Reads an integer, aligned or not, with one instruction.
            ///
            /// # Safety
            ///
            /// `src` is a guest operand of the integer's size.
            #[inline(always)]
            pub(super) unsafe fn $load(src: *const u8) -> Result<$integer, FaultAddress> {
                let value: u64;
                let fault: usize;
                // SAFETY: reads the bytes that the caller's contract covers, writes two registers, and touches no flag and no stack. After a
                // fault the handler goes on behind the instruction, with `x16` set.
                unsafe {
                    asm!(
                        concat!("2: ldr", $suffix, " {value", $register, "}, [{src}]"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = lateout(reg) value,
                        src = in(reg) src,
                        inout("x16") 0usize => fault,
                        options(nostack, preserves_flags, readonly),
                    );
                }
                done(value as $integer, fault)
            }

            /// Writes an integer, aligned or not, with one instruction.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size.
            #[inline(always)]
            pub(super) unsafe fn $store(dst: *mut u8, value: $integer) -> Result<(), FaultAddress> {
                let fault: usize;
                // SAFETY: writes the bytes that the caller's contract covers, and touches no flag and no stack. Faults as above.
                unsafe {
                    asm!(
                        concat!("2: str", $suffix, " {value", $register, "}, [{dst}]"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = in(reg) u64::from(value),
                        dst = in(reg) dst,
                        inout("x16") 0usize => fault,
                        options(nostack, preserves_flags),
                    );
                }
                done((), fault)
            }
        )*
    };
}

single_accesses! {
    load_u8, store_u8, u8, "b", ":w";
    load_u16, store_u16, u16, "h", ":w";
    load_u32, store_u32, u32, "", ":w";
    load_u64, store_u64, u64, "", ":x";
}

/// Reads 16 bytes, aligned or not, with one instruction, which is two accesses of 8 bytes.
///
/// # Safety
///
/// `src` is a guest operand of 16 bytes.
#[inline(always)]
pub(super) unsafe fn load_u128(src: *const u8) -> Result<u128, FaultAddress> {
    let (low, high): (u64, u64);
    let fault: usize;
    // SAFETY: as in `load_u8` and its kin, for 16 bytes.
    unsafe {
        asm!(
            "2: ldp {low}, {high}, [{src}]",
            "3:",
            fault_entry!("2b", "3b", "3b", "0"),
            low = lateout(reg) low,
            high = lateout(reg) high,
            src = in(reg) src,
            inout("x16") 0usize => fault,
            options(nostack, preserves_flags, readonly),
        );
    }
    done(u128::from(low) | u128::from(high) << 64, fault)
}

/// Writes 16 bytes, aligned or not, with one instruction, which is two accesses of 8 bytes.
///
/// # Safety
///
/// `dst` is a guest operand of 16 bytes.
#[inline(always)]
#[expect(clippy::as_conversions, reason = "the low bytes are what is wanted")]
pub(super) unsafe fn store_u128(dst: *mut u8, value: u128) -> Result<(), FaultAddress> {
    let fault: usize;
    // SAFETY: as in `store_u8` and its kin, for 16 bytes.
    unsafe {
        asm!(
            "2: stp {low}, {high}, [{dst}]",
            "3:",
            fault_entry!("2b", "3b", "3b", "0"),
            low = in(reg) value as u64,
            high = in(reg) (value >> 64) as u64,
            dst = in(reg) dst,
            inout("x16") 0usize => fault,
            options(nostack, preserves_flags),
        );
    }
    done((), fault)
}

/// The answer of a kernel that leaves 0 or a fault's address in `x16`.
#[inline(always)]
fn done<T>(value: T, fault: usize) -> Result<T, FaultAddress> {
    match NonZeroUsize::new(fault) {
        None => Ok(value),
        Some(address) => Err(address),
    }
}

macro_rules! ordered_accesses {
    ($($load:ident, $store:ident, $suffix:literal, $register:literal;)*) => {
        $(
            /// Reads an integer, sequentially consistent, and extends it with zeroes.
            ///
            /// # Safety
            ///
            /// `src` is a guest operand of the integer's size, aligned to it.
            #[inline(always)]
            unsafe fn $load(src: *const u8) -> Result<u64, FaultAddress> {
                let value: u64;
                let fault: usize;
                // SAFETY: as in `load_u8` and its kin. A compiler barrier: not `readonly`.
                unsafe {
                    asm!(
                        concat!("2: ldar", $suffix, " {value", $register, "}, [{src}]"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = lateout(reg) value,
                        src = in(reg) src,
                        inout("x16") 0usize => fault,
                        options(nostack, preserves_flags),
                    );
                }
                done(value, fault)
            }

            /// Writes the low bytes of a number, sequentially consistent.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size, aligned to it.
            #[inline(always)]
            unsafe fn $store(dst: *mut u8, value: u64) -> Result<(), FaultAddress> {
                let fault: usize;
                // SAFETY: as in `store_u8` and its kin.
                unsafe {
                    asm!(
                        concat!("2: stlr", $suffix, " {value", $register, "}, [{dst}]"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = in(reg) value,
                        dst = in(reg) dst,
                        inout("x16") 0usize => fault,
                        options(nostack, preserves_flags),
                    );
                }
                done((), fault)
            }
        )*
    };
}

ordered_accesses! {
    load_ordered_u8, store_ordered_u8, "b", ":w";
    load_ordered_u16, store_ordered_u16, "h", ":w";
    load_ordered_u32, store_ordered_u32, "", ":w";
    load_ordered_u64, store_ordered_u64, "", ":x";
}

/// Reads `size` bytes (1, 2, 4 or 8) in one piece, and extends them with zeroes.
///
/// # Safety
///
/// `src` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
pub(super) unsafe fn load_ordered(
    src: *const u8,
    size: usize,
    order: Ordering,
) -> Result<u64, FaultAddress> {
    if order == Ordering::Relaxed {
        return Ok(match size {
            // SAFETY: the caller's contract, for each width.
            1 => u64::from(unsafe { load_u8(src) }?),
            // SAFETY: as above.
            2 => u64::from(unsafe { load_u16(src) }?),
            // SAFETY: as above.
            4 => u64::from(unsafe { load_u32(src) }?),
            // SAFETY: as above.
            _ => unsafe { load_u64(src) }?,
        });
    }
    match size {
        // SAFETY: the caller's contract, for each width.
        1 => unsafe { load_ordered_u8(src) },
        // SAFETY: as above.
        2 => unsafe { load_ordered_u16(src) },
        // SAFETY: as above.
        4 => unsafe { load_ordered_u32(src) },
        // SAFETY: as above.
        _ => unsafe { load_ordered_u64(src) },
    }
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `bits` in one piece.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
#[expect(clippy::as_conversions, reason = "the low bytes are what is wanted")]
pub(super) unsafe fn store_ordered(
    dst: *mut u8,
    bits: u64,
    size: usize,
    order: Ordering,
) -> Result<(), FaultAddress> {
    if order == Ordering::Relaxed {
        return match size {
            // SAFETY: the caller's contract, for each width.
            1 => unsafe { store_u8(dst, bits as u8) },
            // SAFETY: as above.
            2 => unsafe { store_u16(dst, bits as u16) },
            // SAFETY: as above.
            4 => unsafe { store_u32(dst, bits as u32) },
            // SAFETY: as above.
            _ => unsafe { store_u64(dst, bits) },
        };
    }
    match size {
        // SAFETY: the caller's contract, for each width.
        1 => unsafe { store_ordered_u8(dst, bits) },
        // SAFETY: as above.
        2 => unsafe { store_ordered_u16(dst, bits) },
        // SAFETY: as above.
        4 => unsafe { store_ordered_u32(dst, bits) },
        // SAFETY: as above.
        _ => unsafe { store_ordered_u64(dst, bits) },
    }
}

/// Makes a read-modify-write of one width: one instruction of LSE, or a loop around one of the base set.
macro_rules! change {
    ($name:ident, $single:literal, $compute:literal, $suffix:literal, $register:literal) => {
        /// Changes an integer, sequentially consistent, and returns what was there, extended with zeroes.
        ///
        /// # Safety
        ///
        /// `dst` is a guest operand of the integer's size, aligned to it.
        #[inline(always)]
        unsafe fn $name(dst: *mut u8, operand: u64) -> Result<u64, FaultAddress> {
            let previous: u64;
            let fault: usize;
            // SAFETY: reads and writes the bytes that the caller's contract covers, and touches no flag and no stack. Faults as above.
            #[cfg(target_feature = "lse")]
            unsafe {
                asm!(
                    concat!("2: ", $single, "al", $suffix, " {operand", $register, "}, {previous", $register, "}, [{dst}]"),
                    "3:",
                    fault_entry!("2b", "3b", "3b", "0"),
                    previous = lateout(reg) previous,
                    operand = in(reg) operand,
                    dst = in(reg) dst,
                    inout("x16") 0usize => fault,
                    options(nostack, preserves_flags),
                );
            }
            // SAFETY: as above. All accesses between the two exclusive ones are to registers; a fault at the second leaves nothing behind but the
            // processor's note of the first, which the way through the kernel clears.
            #[cfg(not(target_feature = "lse"))]
            unsafe {
                asm!(
                    concat!("2: ldaxr", $suffix, " {previous", $register, "}, [{dst}]"),
                    $compute,
                    concat!("stlxr", $suffix, " {failed:w}, {new", $register, "}, [{dst}]"),
                    "cbnz {failed:w}, 2b",
                    "3:",
                    fault_entry!("2b", "3b", "3b", "0"),
                    previous = out(reg) previous,
                    new = out(reg) _,
                    failed = out(reg) _,
                    operand = in(reg) operand,
                    dst = in(reg) dst,
                    inout("x16") 0usize => fault,
                    options(nostack, preserves_flags),
                );
            }
            done(previous, fault)
        }
    };
}

/// Makes the read-modify-writes of one kind, for each width. What the loop computes, it computes with whole registers: the bits above the width are
/// not stored.
macro_rules! changes {
    ($single:literal, $compute:literal: $u8:ident, $u16:ident, $u32:ident, $u64:ident) => {
        change!($u8, $single, $compute, "b", ":w");
        change!($u16, $single, $compute, "h", ":w");
        change!($u32, $single, $compute, "", ":w");
        change!($u64, $single, $compute, "", ":x");
    };
}

changes!("swp", "mov {new}, {operand}": swap_u8, swap_u16, swap_u32, swap_u64);
changes!("ldadd", "add {new}, {previous}, {operand}": add_u8, add_u16, add_u32, add_u64);
changes!("ldclr", "bic {new}, {previous}, {operand}": clear_u8, clear_u16, clear_u32, clear_u64);
changes!("ldset", "orr {new}, {previous}, {operand}": set_u8, set_u16, set_u32, set_u64);

/// Changes `size` bytes (1, 2, 4 or 8) in one piece, with every ordering, and returns what was there, extended with zeroes.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
pub(super) unsafe fn fetch(
    dst: *mut u8,
    change: Fetch,
    operand: u64,
    size: usize,
    _order: Ordering,
) -> Result<u64, FaultAddress> {
    match (change, size) {
        // SAFETY: the caller's contract, for each width.
        (Fetch::Swap, 1) => unsafe { swap_u8(dst, operand) },
        // SAFETY: as above.
        (Fetch::Swap, 2) => unsafe { swap_u16(dst, operand) },
        // SAFETY: as above.
        (Fetch::Swap, 4) => unsafe { swap_u32(dst, operand) },
        // SAFETY: as above.
        (Fetch::Swap, _) => unsafe { swap_u64(dst, operand) },
        // SAFETY: as above.
        (Fetch::Add, 1) => unsafe { add_u8(dst, operand) },
        // SAFETY: as above.
        (Fetch::Add, 2) => unsafe { add_u16(dst, operand) },
        // SAFETY: as above.
        (Fetch::Add, 4) => unsafe { add_u32(dst, operand) },
        // SAFETY: as above.
        (Fetch::Add, _) => unsafe { add_u64(dst, operand) },
        // SAFETY: as above.
        (Fetch::And, 1) => unsafe { clear_u8(dst, !operand) },
        // SAFETY: as above.
        (Fetch::And, 2) => unsafe { clear_u16(dst, !operand) },
        // SAFETY: as above.
        (Fetch::And, 4) => unsafe { clear_u32(dst, !operand) },
        // SAFETY: as above.
        (Fetch::And, _) => unsafe { clear_u64(dst, !operand) },
        // SAFETY: as above.
        (Fetch::Or, 1) => unsafe { set_u8(dst, operand) },
        // SAFETY: as above.
        (Fetch::Or, 2) => unsafe { set_u16(dst, operand) },
        // SAFETY: as above.
        (Fetch::Or, 4) => unsafe { set_u32(dst, operand) },
        // SAFETY: as above.
        (Fetch::Or, _) => unsafe { set_u64(dst, operand) },
    }
}

macro_rules! compare_exchanges {
    ($($name:ident, $suffix:literal, $register:literal;)*) => {
        $(
            /// Writes `new` if `current` is there, sequentially consistent in either case, and returns what was there, extended with zeroes.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size, aligned to it; `current` has no bits above that size.
            #[inline(always)]
            unsafe fn $name(dst: *mut u8, current: u64, new: u64) -> Result<u64, FaultAddress> {
                let previous: u64;
                let fault: usize;
                // SAFETY: reads and writes the bytes that the caller's contract covers, and touches no flag and no stack. Faults as above.
                #[cfg(target_feature = "lse")]
                unsafe {
                    asm!(
                        concat!("2: casal", $suffix, " {previous", $register, "}, {new", $register, "}, [{dst}]"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        previous = inout(reg) current => previous,
                        new = in(reg) new,
                        dst = in(reg) dst,
                        inout("x16") 0usize => fault,
                        options(nostack, preserves_flags),
                    );
                }
                // SAFETY: as for the loops above; touches no stack.
                #[cfg(not(target_feature = "lse"))]
                unsafe {
                    asm!(
                        concat!("2: ldaxr", $suffix, " {previous", $register, "}, [{dst}]"),
                        "cmp {previous}, {current}",
                        "b.ne 3f",
                        concat!("stlxr", $suffix, " {failed:w}, {new", $register, "}, [{dst}]"),
                        "cbnz {failed:w}, 2b",
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        previous = out(reg) previous,
                        failed = out(reg) _,
                        current = in(reg) current,
                        new = in(reg) new,
                        dst = in(reg) dst,
                        inout("x16") 0usize => fault,
                        options(nostack),
                    );
                }
                done(previous, fault)
            }
        )*
    };
}

compare_exchanges! {
    compare_exchange_u8, "b", ":w";
    compare_exchange_u16, "h", ":w";
    compare_exchange_u32, "", ":w";
    compare_exchange_u64, "", ":x";
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `new` in one piece if those of `current` are there, with every ordering, and returns what was there,
/// extended with zeroes.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
#[expect(clippy::as_conversions, reason = "the low bytes are what is wanted")]
pub(super) unsafe fn compare_exchange(
    dst: *mut u8,
    current: u64,
    new: u64,
    size: usize,
    _success: Ordering,
    _failure: Ordering,
) -> Result<u64, FaultAddress> {
    match size {
        // SAFETY: the caller's contract, for each width.
        1 => unsafe { compare_exchange_u8(dst, u64::from(current as u8), new) },
        // SAFETY: as above.
        2 => unsafe { compare_exchange_u16(dst, u64::from(current as u16), new) },
        // SAFETY: as above.
        4 => unsafe { compare_exchange_u32(dst, u64::from(current as u32), new) },
        // SAFETY: as above.
        _ => unsafe { compare_exchange_u64(dst, current, new) },
    }
}

/// What all kernels look like to [`call`]; `aarch64_bulk.rs` says how they take their operands.
type Kernel = unsafe extern "C" fn();

/// Calls one of the kernels.
///
/// # Safety
///
/// What the kernel's own comment asks for; `first` and `second` are the guest operands.
#[inline(always)]
unsafe fn call(
    kernel: Kernel,
    dst: *mut u8,
    src: *const u8,
    len: usize,
    first: Operand,
    second: Operand,
) -> Result<(), FaultAddress> {
    let fault: usize;
    // SAFETY: a kernel changes no register but those that `clobber_abi` names, and reads and writes what the caller's contract covers.
    unsafe {
        asm!(
            "blr {kernel}",
            kernel = in(reg) kernel,
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
    done((), fault)
}

/// The kernel for copies of this length.
#[inline(always)]
fn copy_kernel(len: usize) -> Kernel {
    if len <= SMALL_MAX {
        small_bytes
    } else {
        large_vectors
    }
}

/// The kernel for fills.
#[inline(always)]
fn fill_kernel(_len: usize) -> Kernel {
    fill_vectors
}

/// The kernel for whole aligned blocks of 32 bytes. Pairs of general-purpose registers are two whole accesses of 8 bytes each (see the top), which vectors
/// need not be.
#[inline(always)]
fn blocks_kernel() -> Kernel {
    pairs
}
