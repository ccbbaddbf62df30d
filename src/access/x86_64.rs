//! Guest accesses on x86_64.
//!
//! "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 3A: a naturally aligned access of 1, 2, 4 or 8
//! bytes is atomic (section 9.1.1); loads are not reordered with loads, nor stores with stores, nor a store with an older load
//! (section 9.2.2), so that every load is an acquire and every store a release, and only a sequentially consistent store needs
//! more than a `mov`. `xchg` with memory is locked (section 9.1.2.1) and orders everything. The stores of a string instruction may
//! become visible in any order, but all of them before those of later instructions (section 9.2.4).
//!
//! A block without `options(nomem)` or `options(readonly)` is also a compiler barrier: that is what makes an acquire of a load.
//!
//! The direction flag is clear on entry to every block and every function (Rust reference, "Inline assembly"; System V ABI, section
//! 3.2.1), so `rep movsb` ascends.
//!
//! # Faults
//!
//! The handler puts the faulting address into `rax` (`fault_entry.rs`).

use core::arch::asm;
use core::arch::x86_64::__m128i;
use core::hint::select_unpredictable;
use core::mem::transmute;
use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

use super::Fetch;

/// A fault's address. (The page at 0 is never guest memory: no pointer is null.)
pub(super) type FaultAddress = NonZeroUsize;

#[macro_use]
#[path = "fault_entry.rs"]
mod fault_entry;

#[path = "x86_64_bulk.rs"]
mod bulk;
use bulk::{
    fill_ascending, fill_vectors, middle_avx, middle_avx512, middle_not_found_yet, middle_sse,
    rep_bytes, small_bytes, streaming_avx, vectors_avx, vectors_sse,
};

/// Tests choose for themselves which kernels run.
#[cfg(test)]
#[path = "x86_64_choice.rs"]
pub(super) mod choice;

#[path = "copies.rs"]
mod copies;
use copies::Operand;
pub(super) use copies::{
    copy_elements_from_guest, copy_elements_to_guest, copy_from_guest, copy_from_guest_ascending,
    copy_to_guest, copy_to_guest_ascending, copy_within_guest, copy_within_guest_ascending,
    fill_guest, fill_guest_ascending,
};

macro_rules! single_accesses {
    ($($load:ident, $store:ident, $exchange:ident, $add:ident, $compare_exchange:ident, $integer:ty, $class:ident, $register:literal,
       $width:literal, $accumulator:literal, $mov:literal, $whole:literal, $loaded:ty;)*) => {
        $(
            /// Reads an integer, aligned or not, with one instruction, which fills the register: to write a part of it would wait for the rest.
            ///
            /// # Safety
            ///
            /// `src` is a guest operand of the integer's size.
            #[inline(always)]
            pub(super) unsafe fn $load(src: *const u8) -> Result<$integer, FaultAddress> {
                let value: $loaded;
                let fault: usize;
                // SAFETY: reads the bytes that the caller's contract covers, writes two registers, and touches no flag and no stack. After a
                // fault the handler goes on behind the instruction, with `rax` set.
                unsafe {
                    asm!(
                        concat!("2: ", $mov, " {value", $whole, "}, ", $width, " ptr [{src}]"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = lateout(reg) value,
                        src = in(reg) src,
                        inout("rax") 0usize => fault,
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
                        concat!("2: mov ", $width, " ptr [{dst}], {value", $register, "}"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = in($class) value,
                        dst = in(reg) dst,
                        inout("rax") 0usize => fault,
                        options(nostack, preserves_flags),
                    );
                }
                done((), fault)
            }

            /// Writes an integer with a locked instruction, and returns what was there.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size, aligned to it.
            #[inline(always)]
            unsafe fn $exchange(dst: *mut u8, value: $integer) -> Result<$integer, FaultAddress> {
                let previous: $integer;
                let fault: usize;
                // SAFETY: reads and writes the bytes that the caller's contract covers, and touches no flag and no stack. Faults as above.
                unsafe {
                    asm!(
                        concat!("2: xchg ", $width, " ptr [{dst}], {value", $register, "}"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = inout($class) value => previous,
                        dst = in(reg) dst,
                        inout("rax") 0usize => fault,
                        options(nostack, preserves_flags),
                    );
                }
                done(previous, fault)
            }

            /// Adds to an integer with a locked instruction, and returns what was there.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size, aligned to it.
            #[inline(always)]
            unsafe fn $add(dst: *mut u8, value: $integer) -> Result<$integer, FaultAddress> {
                let previous: $integer;
                let fault: usize;
                // SAFETY: reads and writes the bytes that the caller's contract covers, and touches no stack. Faults as above.
                unsafe {
                    asm!(
                        concat!("2: lock xadd ", $width, " ptr [{dst}], {value", $register, "}"),
                        "3:",
                        fault_entry!("2b", "3b", "3b", "0"),
                        value = inout($class) value => previous,
                        dst = in(reg) dst,
                        inout("rax") 0usize => fault,
                        options(nostack),
                    );
                }
                done(previous, fault)
            }

            /// Writes `new` if `current` is there, with a locked instruction, and returns what was there.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size, aligned to it.
            #[inline(always)]
            unsafe fn $compare_exchange(
                dst: *mut u8,
                current: $integer,
                new: $integer,
            ) -> Result<$integer, FaultAddress> {
                let previous: $integer;
                let fault: usize;
                // SAFETY: reads and writes the bytes that the caller's contract covers, and touches no stack. `rax` is what is compared with and
                // what was there; it has been moved and is 0 at the place where a fault goes on.
                unsafe {
                    asm!(
                        concat!("2: lock cmpxchg ", $width, " ptr [{dst}], {new", $register, "}"),
                        concat!("mov {previous", $register, "}, ", $accumulator),
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
                done(previous, fault)
            }
        )*
    };
}

single_accesses! {
    load_u8, store_u8, exchange_u8, add_u8, compare_exchange_u8, u8, reg_byte, "", "byte", "al", "movzx", ":e", u32;
    load_u16, store_u16, exchange_u16, add_u16, compare_exchange_u16, u16, reg, ":x", "word", "ax", "movzx", ":e", u32;
    load_u32, store_u32, exchange_u32, add_u32, compare_exchange_u32, u32, reg, ":e", "dword", "eax", "mov", ":e", u32;
    load_u64, store_u64, exchange_u64, add_u64, compare_exchange_u64, u64, reg, ":r", "qword", "rax", "mov", ":r", u64;
}

/// Reads 16 bytes, aligned or not, with one instruction, which may be several accesses.
///
/// # Safety
///
/// `src` is a guest operand of 16 bytes.
#[inline(always)]
pub(super) unsafe fn load_u128(src: *const u8) -> Result<u128, FaultAddress> {
    let value: __m128i;
    let fault: usize;
    // SAFETY: as in `load_u8` and its kin, for 16 bytes; every x86_64 processor has SSE.
    unsafe {
        asm!(
            "2: movups {value}, xmmword ptr [{src}]",
            "3:",
            fault_entry!("2b", "3b", "3b", "0"),
            value = lateout(xmm_reg) value,
            src = in(reg) src,
            inout("rax") 0usize => fault,
            options(nostack, preserves_flags, readonly),
        );
    }
    // SAFETY: both are 16 bytes, and any bytes are a number.
    done(unsafe { transmute::<__m128i, u128>(value) }, fault)
}

/// Writes 16 bytes, aligned or not, with one instruction, which may be several accesses.
///
/// # Safety
///
/// `dst` is a guest operand of 16 bytes.
#[inline(always)]
pub(super) unsafe fn store_u128(dst: *mut u8, value: u128) -> Result<(), FaultAddress> {
    // SAFETY: both are 16 bytes, and any bytes are a vector.
    let value = unsafe { transmute::<u128, __m128i>(value) };
    let fault: usize;
    // SAFETY: as in `store_u8` and its kin, for 16 bytes; every x86_64 processor has SSE.
    unsafe {
        asm!(
            "2: movups xmmword ptr [{dst}], {value}",
            "3:",
            fault_entry!("2b", "3b", "3b", "0"),
            value = in(xmm_reg) value,
            dst = in(reg) dst,
            inout("rax") 0usize => fault,
            options(nostack, preserves_flags),
        );
    }
    done((), fault)
}

/// The answer of a kernel that leaves 0 or a fault's address in `rax`.
#[inline(always)]
fn done<T>(value: T, fault: usize) -> Result<T, FaultAddress> {
    match NonZeroUsize::new(fault) {
        None => Ok(value),
        Some(address) => Err(address),
    }
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
    let bits = match size {
        // SAFETY: the caller's contract, for each width.
        1 => u64::from(unsafe { load_u8(src) }?),
        // SAFETY: as above.
        2 => u64::from(unsafe { load_u16(src) }?),
        // SAFETY: as above.
        4 => u64::from(unsafe { load_u32(src) }?),
        // SAFETY: as above.
        _ => unsafe { load_u64(src) }?,
    };
    if order != Ordering::Relaxed {
        compiler_barrier();
    }
    Ok(bits)
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
    if order == Ordering::SeqCst {
        // SAFETY: the caller's contract.
        return unsafe { fetch(dst, Fetch::Swap, bits, size, order) }.map(drop);
    }
    match size {
        // SAFETY: the caller's contract, for each width.
        1 => unsafe { store_u8(dst, bits as u8) },
        // SAFETY: as above.
        2 => unsafe { store_u16(dst, bits as u16) },
        // SAFETY: as above.
        4 => unsafe { store_u32(dst, bits as u32) },
        // SAFETY: as above.
        _ => unsafe { store_u64(dst, bits) },
    }
}

/// Changes `size` bytes (1, 2, 4 or 8) in one piece, and returns what was there, extended with zeroes. Locked instructions have every ordering.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
#[expect(clippy::as_conversions, reason = "the low bytes are what is wanted")]
pub(super) unsafe fn fetch(
    dst: *mut u8,
    change: Fetch,
    operand: u64,
    size: usize,
    order: Ordering,
) -> Result<u64, FaultAddress> {
    Ok(match (change, size) {
        // SAFETY: the caller's contract, for each width.
        (Fetch::Swap, 1) => u64::from(unsafe { exchange_u8(dst, operand as u8) }?),
        // SAFETY: as above.
        (Fetch::Swap, 2) => u64::from(unsafe { exchange_u16(dst, operand as u16) }?),
        // SAFETY: as above.
        (Fetch::Swap, 4) => u64::from(unsafe { exchange_u32(dst, operand as u32) }?),
        // SAFETY: as above.
        (Fetch::Swap, _) => unsafe { exchange_u64(dst, operand) }?,
        // SAFETY: as above.
        (Fetch::Add, 1) => u64::from(unsafe { add_u8(dst, operand as u8) }?),
        // SAFETY: as above.
        (Fetch::Add, 2) => u64::from(unsafe { add_u16(dst, operand as u16) }?),
        // SAFETY: as above.
        (Fetch::Add, 4) => u64::from(unsafe { add_u32(dst, operand as u32) }?),
        // SAFETY: as above.
        (Fetch::Add, _) => unsafe { add_u64(dst, operand) }?,
        // No instruction returns what was there. Whoever makes an attempt fail has changed the bytes; a guest that does so all the time keeps
        // this thread for as long as it wins each time, as it could with any atomic of the standard library.
        (Fetch::And | Fetch::Or, _) => {
            let is_and = change == Fetch::And;
            // SAFETY: the caller's contract.
            let mut seen = unsafe { load_ordered(dst, size, Ordering::Relaxed) }?;
            loop {
                let wanted = if is_and {
                    seen & operand
                } else {
                    seen | operand
                };
                // SAFETY: the caller's contract.
                match unsafe {
                    compare_exchange(dst, seen, wanted, size, order, Ordering::Relaxed)
                }? {
                    previous if previous == seen => break seen,
                    previous => seen = previous,
                }
            }
        }
    })
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `new` in one piece if those of `current` are there, and returns what was there, extended with
/// zeroes. A locked instruction has every ordering.
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
    Ok(match size {
        // SAFETY: the caller's contract, for each width.
        1 => u64::from(unsafe { compare_exchange_u8(dst, current as u8, new as u8) }?),
        // SAFETY: as above.
        2 => u64::from(unsafe { compare_exchange_u16(dst, current as u16, new as u16) }?),
        // SAFETY: as above.
        4 => u64::from(unsafe { compare_exchange_u32(dst, current as u32, new as u32) }?),
        // SAFETY: as above.
        _ => unsafe { compare_exchange_u64(dst, current, new) }?,
    })
}

/// Keeps the compiler from moving any access across.
#[inline(always)]
fn compiler_barrier() {
    // SAFETY: no instruction at all.
    unsafe { asm!("", options(nostack, preserves_flags)) }
}

/// What all kernels look like to [`call`]; `x86_64_bulk.rs` says how they take their operands.
type Kernel = unsafe extern "sysv64" fn();

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
            "call {kernel}",
            kernel = in(reg) kernel,
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
    done((), fault)
}

/// Up to here, what the processor has makes no difference.
const NARROW_MAX: usize = 32;

/// From here on `rep movsb`, where it is fast. Shorter copies are faster with vectors (bench, "copy_to_vs, 4096B": 0.53 of 0.18.0's speed with
/// `rep movsb`, 1.18 with vectors).
const REP_MIN: usize = 1 << 14;

/// From here on stores that go past the caches (DESIGN.md, "Copies").
const STREAMING_MIN: usize = 24 << 20;

#[inline(always)]
fn rep_min() -> usize {
    #[cfg(test)]
    if let Some(choice) = choice::current() {
        return choice.rep_min;
    }
    REP_MIN
}

#[inline(always)]
fn streaming_min() -> usize {
    #[cfg(test)]
    if let Some(choice) = choice::current() {
        return choice.streaming_min;
    }
    STREAMING_MIN
}

/// The kernel for copies of this length. A copy of 64 bytes takes 2 ns, and each branch that is taken a tenth of that: the most common have none, and
/// the processor foresees where the call goes.
#[inline(always)]
fn copy_kernel(len: usize) -> Kernel {
    if len >= rep_min() {
        return long_copy_kernel(len);
    }
    let (narrow, middle): (Kernel, Kernel) = (small_bytes, middle_kernel());
    select_unpredictable(len <= NARROW_MAX, narrow, middle)
}

/// The kernel for [`REP_MIN`] bytes or more.
#[inline(never)]
fn long_copy_kernel(len: usize) -> Kernel {
    let features = features();
    if features & FAST_REP == 0 {
        middle_kernel()
    } else if features & AVX != 0 && len >= streaming_min() {
        streaming_avx
    } else {
        rep_bytes
    }
}

/// The kernel for copies of more than [`NARROW_MAX`] bytes without `rep movsb`.
#[expect(
    clippy::as_conversions,
    reason = "nothing else makes a pointer of a function"
)]
static MIDDLE: AtomicPtr<()> = AtomicPtr::new(middle_not_found_yet as *mut ());

#[inline(always)]
fn middle_kernel() -> Kernel {
    #[cfg(test)]
    if let Some(choice) = choice::current() {
        return middle_kernel_of(choice.features);
    }
    // Relaxed: whatever a thread finds there is right.
    let kernel = MIDDLE.load(Ordering::Relaxed);
    // SAFETY: `MIDDLE` holds nothing but kernels.
    unsafe { transmute::<*mut (), Kernel>(kernel) }
}

fn middle_kernel_of(features: u8) -> Kernel {
    if features & AVX512 != 0 {
        middle_avx512
    } else if features & AVX != 0 {
        middle_avx
    } else {
        middle_sse
    }
}

/// The way from [`middle_not_found_yet`] to the kernel, which is taken until the first thread has gone it.
#[cold]
#[expect(
    clippy::as_conversions,
    reason = "nothing else makes a pointer of a function"
)]
extern "sysv64" fn find_middle_kernel() -> Kernel {
    let kernel = middle_kernel_of(features());
    MIDDLE.store(kernel as *mut (), Ordering::Relaxed);
    kernel
}

/// The kernel for fills.
#[inline]
fn fill_kernel(len: usize) -> Kernel {
    if len >= rep_min() && features() & FAST_REP != 0 {
        fill_ascending
    } else {
        fill_vectors
    }
}

/// The kernel for whole aligned blocks of 32 bytes, which moves them as vectors.
///
/// The manual says of an access of more than 8 bytes only that it may be several (section 9.1.1; the promise for 16 bytes is for other
/// instructions). No processor is known to split an aligned one other than at multiples of 8 bytes, which leaves every element whole; a test
/// looks for torn ones. Within one vector there is no order.
fn blocks_kernel() -> Kernel {
    if features() & AVX != 0 {
        vectors_avx
    } else {
        vectors_sse
    }
}

/// What this processor has, or 0 as long as nobody asked.
static FEATURES: AtomicU8 = AtomicU8::new(0);
const KNOWN: u8 = 1;
const AVX: u8 = 2;
const FAST_REP: u8 = 4;
/// Vectors of 64 bytes, and no slower clock because of them.
const AVX512: u8 = 8;

#[inline(always)]
fn features() -> u8 {
    #[cfg(test)]
    if let Some(choice) = choice::current() {
        return choice.features;
    }
    // Relaxed: every thread that finds 0 comes to the same answer.
    match FEATURES.load(Ordering::Relaxed) {
        0 => find_features(),
        features => features,
    }
}

#[cold]
fn find_features() -> u8 {
    let mut features = KNOWN;
    // Includes whether the system saves the registers.
    if std::arch::is_x86_feature_detected!("avx") {
        features |= AVX;
    }
    if std::arch::is_x86_feature_detected!("ermsb") {
        features |= FAST_REP;
    }
    // The first processors with AVX-512 lower their clock for a while where such vectors are used. The ones since then that do not have VBMI2 too
    // (Intel: Ice Lake; AMD: Zen 4).
    if std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512vbmi2")
    {
        features |= AVX512;
    }
    FEATURES.store(features, Ordering::Relaxed);
    features
}
