//! Guest accesses on x86_64.
//!
//! The guarantees of [`access`](crate::access) rest on the "Intel 64 and IA-32 Architectures
//! Software Developer's Manual", volume 3A:
//!
//! - A naturally aligned access of 1, 2, 4 or 8 bytes is atomic (section 9.1.1).
//! - Loads are not reordered with loads, nor stores with stores, nor a store with an older load
//!   (section 9.2.2). Each load is an acquire and each store a release; only a sequentially
//!   consistent store needs more than a `mov`.
//! - `xchg` with memory is locked (section 9.1.2.1). A locked instruction orders everything.
//! - The stores of a string instruction may become visible in any order, but before those of later
//!   instructions (section 9.2.4).
//!
//! A block of assembly without the options `nomem` and `readonly` is also a compiler barrier.
//!
//! The direction flag is clear on entry to each block and function (Rust reference, "Inline
//! assembly"; System V ABI, section 3.2.1), so `rep movsb` ascends.
//!
//! The handler puts the address of a fault into `rax` ([`fault_table`](super::fault_table)).

pub(super) mod routines;
mod select;

#[cfg(test)]
mod tests;

use core::arch::asm;
use core::arch::x86_64::__m128i;
use core::mem::transmute;
use core::sync::atomic::Ordering;

use super::{fault_result, Assembly, Operand};
use crate::access::routine_set::{FaultAddress, Fetch, Register, Word};

pub(super) use select::Detected;

/// Implements [`Register`] and [`Word`] for an integer by the given instructions.
///
/// `$class` is the class of a register that the instructions can use for the integer. A load fills
/// the whole register as a `$loaded`: writing a part of it would wait for the previous value.
macro_rules! impl_word {
    ($integer:ty, $class:ident, loaded as $loaded:ty {
        load: $load:literal,
        store: $store:literal,
        exchange: $exchange:literal,
        add: $add:literal,
        compare_exchange: [$compare_exchange:literal, $take_previous:literal],
    }) => {
        impl<S> Register<Assembly<S>> for $integer {
            #[inline(always)]
            unsafe fn load(src: *const u8) -> Result<Self, FaultAddress> {
                let value: $loaded;
                // SAFETY: `src` is a guest operand of `size_of::<Self>()` bytes (contract of
                // `Register::load`). The instruction reads exactly these bytes, writes registers
                // only, and uses neither the stack nor the flags. After a fault, the handler
                // resumes after it.
                let fault = unsafe {
                    guest_asm!(
                        "rax",
                        options(nostack, preserves_flags, readonly),
                        [$load],
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
                        "rax",
                        options(nostack, preserves_flags),
                        [$store],
                        value = in($class) value,
                        dst = in(reg) dst
                    )
                };
                fault_result((), fault)
            }
        }

        impl<S> Word<Assembly<S>> for $integer {
            #[inline(always)]
            unsafe fn load_ordered(src: *const u8, order: Ordering) -> Result<Self, FaultAddress> {
                // SAFETY: `src` is a guest operand of this integer (contract of `load_ordered`).
                let value = unsafe { <Self as Register<Assembly<S>>>::load(src) }?;
                if order != Ordering::Relaxed {
                    compiler_barrier();
                }
                Ok(value)
            }

            #[inline(always)]
            unsafe fn store_ordered(
                dst: *mut u8,
                value: Self,
                order: Ordering,
            ) -> Result<(), FaultAddress> {
                if order == Ordering::SeqCst {
                    // SAFETY: `dst` is an aligned guest operand (contract of `store_ordered`).
                    return unsafe {
                        <Self as Word<Assembly<S>>>::fetch(dst, Fetch::Swap, value, order)
                    }
                    .map(drop);
                }
                // SAFETY: `dst` is a guest operand of this integer (contract of `store_ordered`).
                unsafe { <Self as Register<Assembly<S>>>::store(dst, value) }
            }

            // The instructions are locked, so they satisfy every ordering.
            #[inline(always)]
            unsafe fn fetch(
                dst: *mut u8,
                change: Fetch,
                operand: Self,
                order: Ordering,
            ) -> Result<Self, FaultAddress> {
                let previous: Self;
                let fault = match change {
                    // SAFETY: `dst` is an aligned guest operand of `size_of::<Self>()` bytes
                    // (contract of `Word::fetch`). The instruction reads and writes exactly these
                    // bytes, and does not use the stack. `xchg` changes no flags. After a fault,
                    // the handler resumes after it.
                    Fetch::Swap => unsafe {
                        guest_asm!(
                            "rax",
                            options(nostack, preserves_flags),
                            [$exchange],
                            value = inout($class) operand => previous,
                            dst = in(reg) dst
                        )
                    },
                    // SAFETY: `dst` is an aligned guest operand of `size_of::<Self>()` bytes
                    // (contract of `Word::fetch`). The instruction reads and writes exactly these
                    // bytes, and does not use the stack. `xadd` changes flags, so the block omits
                    // the option `preserves_flags`. After a fault, the handler resumes after it.
                    Fetch::Add => unsafe {
                        guest_asm!(
                            "rax",
                            options(nostack),
                            [$add],
                            value = inout($class) operand => previous,
                            dst = in(reg) dst
                        )
                    },
                    // `lock and` and `lock or` do not return the previous value. An attempt fails
                    // only because another processor has changed the bytes. A guest that changes
                    // them all the time can delay this thread, as it can with an atomic of the
                    // standard library.
                    Fetch::And | Fetch::Or => {
                        // SAFETY: `dst` is an aligned guest operand (contract of `fetch`).
                        let mut seen = unsafe { <Self as Register<Assembly<S>>>::load(dst) }?;
                        loop {
                            let new = match change {
                                Fetch::And => seen & operand,
                                _ => seen | operand,
                            };
                            // SAFETY: `dst` is an aligned guest operand (contract of `fetch`).
                            let found = unsafe {
                                <Self as Word<Assembly<S>>>::compare_exchange(
                                    dst, seen, new, order, Ordering::Relaxed,
                                )
                            }?;
                            if found == seen {
                                return Ok(seen);
                            }
                            seen = found;
                        }
                    }
                };
                fault_result(previous, fault)
            }

            // The instruction is locked, so it satisfies every ordering.
            #[inline(always)]
            unsafe fn compare_exchange(
                dst: *mut u8,
                current: Self,
                new: Self,
                _success: Ordering,
                _failure: Ordering,
            ) -> Result<Self, FaultAddress> {
                let previous: $integer;
                let fault: usize;
                // SAFETY: `dst` is an aligned guest operand of `size_of::<Self>()` bytes (contract
                // of `Word::compare_exchange`). `cmpxchg` reads and writes exactly these bytes, and
                // no instruction uses the stack. `cmpxchg` and `xor` change flags, so the block
                // omits the option `preserves_flags`. `rax` holds first the value to compare with
                // and then the previous one, which is moved away. At label 3, it is 0 or the
                // address that the handler put there.
                unsafe {
                    asm!(
                        "2:",
                        $compare_exchange,
                        $take_previous,
                        "xor eax, eax",
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        previous = out($class) previous,
                        new = in($class) new,
                        dst = in(reg) dst,
                        inout("rax") u64::from(current) => fault,
                        options(nostack),
                    );
                }
                fault_result(previous, fault)
            }
        }
    };
}

impl_word!(u8, reg_byte, loaded as u32 {
    load: "movzx {value:e}, byte ptr [{src}]",
    store: "mov byte ptr [{dst}], {value}",
    exchange: "xchg byte ptr [{dst}], {value}",
    add: "lock xadd byte ptr [{dst}], {value}",
    compare_exchange: ["lock cmpxchg byte ptr [{dst}], {new}", "mov {previous}, al"],
});
impl_word!(u16, reg, loaded as u32 {
    load: "movzx {value:e}, word ptr [{src}]",
    store: "mov word ptr [{dst}], {value:x}",
    exchange: "xchg word ptr [{dst}], {value:x}",
    add: "lock xadd word ptr [{dst}], {value:x}",
    compare_exchange: ["lock cmpxchg word ptr [{dst}], {new:x}", "mov {previous:x}, ax"],
});
impl_word!(u32, reg, loaded as u32 {
    load: "mov {value:e}, dword ptr [{src}]",
    store: "mov dword ptr [{dst}], {value:e}",
    exchange: "xchg dword ptr [{dst}], {value:e}",
    add: "lock xadd dword ptr [{dst}], {value:e}",
    compare_exchange: ["lock cmpxchg dword ptr [{dst}], {new:e}", "mov {previous:e}, eax"],
});
impl_word!(u64, reg, loaded as u64 {
    load: "mov {value:r}, qword ptr [{src}]",
    store: "mov qword ptr [{dst}], {value:r}",
    exchange: "xchg qword ptr [{dst}], {value:r}",
    add: "lock xadd qword ptr [{dst}], {value:r}",
    compare_exchange: ["lock cmpxchg qword ptr [{dst}], {new:r}", "mov {previous:r}, rax"],
});

/// 16 bytes, by one instruction, which may be several accesses.
impl<S> Register<Assembly<S>> for u128 {
    #[inline(always)]
    unsafe fn load(src: *const u8) -> Result<Self, FaultAddress> {
        let value: __m128i;
        // SAFETY: `src` is a guest operand of `size_of::<Self>()` bytes (contract of
        // `Register::load`). The instruction reads exactly these bytes, writes registers only, and
        // uses neither the stack nor the flags. After a fault, the handler resumes after it. Each
        // x86_64 processor has SSE.
        let fault = unsafe {
            guest_asm!(
                "rax",
                options(nostack, preserves_flags, readonly),
                ["movups {value}, xmmword ptr [{src}]"],
                value = lateout(xmm_reg) value,
                src = in(reg) src
            )
        };
        // SAFETY: both types have 16 bytes, and each bit pattern is a `u128`.
        fault_result(unsafe { transmute::<__m128i, u128>(value) }, fault)
    }

    #[inline(always)]
    unsafe fn store(dst: *mut u8, value: Self) -> Result<(), FaultAddress> {
        // SAFETY: both types have 16 bytes, and each bit pattern is a vector.
        let value = unsafe { transmute::<u128, __m128i>(value) };
        // SAFETY: `dst` is a guest operand of `size_of::<Self>()` bytes (contract of
        // `Register::store`). The instruction writes exactly these bytes, and uses neither the
        // stack nor the flags. After a fault, the handler resumes after it. Each x86_64 processor
        // has SSE.
        let fault = unsafe {
            guest_asm!(
                "rax",
                options(nostack, preserves_flags),
                ["movups xmmword ptr [{dst}], {value}"],
                value = in(xmm_reg) value,
                dst = in(reg) dst
            )
        };
        fault_result((), fault)
    }
}

/// Keeps the compiler from moving accesses across.
#[inline(always)]
fn compiler_barrier() {
    // SAFETY: the block has no instruction.
    unsafe { asm!("", options(nostack, preserves_flags)) }
}

/// A routine of [`routines`], which [`invoke`] calls.
pub(super) type Routine = unsafe extern "sysv64" fn();

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
            "call {routine}",
            routine = in(reg) routine,
            inout("rdi") dst => _,
            inout("rsi") src => _,
            inout("rcx") len => _,
            inout("r8") first.start => _,
            inout("r9") first.end => _,
            inout("r10") second.start => _,
            inout("r11") second.end => _,
            lateout("rax") fault,
            clobber_abi("sysv64"),
        );
    }
    fault_result((), fault)
}
