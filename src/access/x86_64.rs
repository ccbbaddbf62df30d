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
//! Every instruction that touches guest memory is listed in the section `vm_memory_faults_1` of the program: where it begins and ends, where to go on
//! after a fault, and how to tell that the fault was the guest operand's. The handler in `fault.rs` looks there, puts the faulting
//! address into `rax`, and goes on at that place; `rax` is otherwise 0 there. An access that does not fault pays for clearing and testing
//! one register.
//!
//! The section is marked to be retained (`R`), so that no linker drops entries of code that is in the program; entries hold distances, not
//! addresses, so that nothing is relocated when the program is loaded.

use core::arch::asm;
use core::arch::x86_64::__m128i;
use core::mem::transmute;
use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicU8, Ordering};

use super::Fetch;

/// A fault's address. (The page at 0 is never guest memory: no pointer is null.)
pub(super) type FaultAddress = NonZeroUsize;

/// An entry for the instructions between two labels; after a fault, go on at a third. The last number tells the guest operand: 0, the only memory
/// operand they have; 1, `r8` and `r9` hold the start and the end of one, and `r10` and `r11` those of another (or nothing).
#[cfg(target_os = "linux")]
macro_rules! fault_entry {
    ($start:literal, $end:literal, $resume:literal, $operand:literal) => {
        concat!(
            ".pushsection vm_memory_faults_1, \"aR\", @progbits\n",
            ".balign 4\n",
            ".long ",
            $start,
            " - .\n",
            ".long ",
            $end,
            " - .\n",
            ".long ",
            $resume,
            " - .\n",
            ".long ",
            $operand,
            "\n",
            ".popsection"
        )
    };
}
/// Where there is no handler there is no table: other object formats have other sections.
#[cfg(not(target_os = "linux"))]
macro_rules! fault_entry {
    ($($part:literal),*) => {
        ""
    };
}

#[path = "x86_64_bulk.rs"]
mod bulk;
use bulk::*;

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
pub(super) unsafe fn load_ordered(src: *const u8, size: usize, order: Ordering) -> Result<u64, FaultAddress> {
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
            // SAFETY: the caller's contract.
            let mut seen = unsafe { load_ordered(dst, size, Ordering::Relaxed) }?;
            loop {
                let wanted = change.apply(seen, operand);
                // SAFETY: the caller's contract.
                match unsafe { compare_exchange(dst, seen, wanted, size, order, Ordering::Relaxed) }? {
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

/// The two ends of a guest operand, as the kernels keep them for the handler.
#[derive(Clone, Copy)]
struct Operand {
    start: usize,
    end: usize,
}

impl Operand {
    /// No operand: no address lies in it.
    const NONE: Operand = Operand { start: 0, end: 0 };

    fn new(ptr: *const u8, len: usize) -> Self {
        Operand {
            start: ptr.addr(),
            end: ptr.addr().wrapping_add(len),
        }
    }
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

/// Copies `len` bytes between ranges that do not overlap.
///
/// # Safety
///
/// As [`super::copy_from_guest`].
#[inline(always)]
pub(super) unsafe fn copy_from_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe { copy_apart(dst, src, len, Operand::new(src, len), Operand::NONE) }
}

/// Copies `len` bytes between ranges that do not overlap.
///
/// # Safety
///
/// As [`super::copy_to_guest`].
#[inline(always)]
pub(super) unsafe fn copy_to_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe { copy_apart(dst, src, len, Operand::new(dst, len), Operand::NONE) }
}

/// Copies `len` bytes between ranges that may overlap.
///
/// # Safety
///
/// As [`super::copy_within_guest`].
pub(super) unsafe fn copy_within_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), FaultAddress> {
    let (first, second) = (Operand::new(src, len), Operand::new(dst, len));
    if len <= SMALL_MAX {
        // SAFETY: the caller's contract, and short enough; that kernel reads everything before it writes, so that the ranges may overlap.
        return unsafe { call(small_bytes, dst, src, len, first, second) };
    }
    if !super::overlap(dst, src, len) {
        // SAFETY: the caller's contract, and the ranges do not overlap.
        return unsafe { copy_apart(dst, src, len, first, second) };
    }
    // If the destination begins in the source, each byte is read before it is overwritten if the highest go first; else, if the lowest do.
    let descending = dst.addr().wrapping_sub(src.addr()) < len;
    let kernel: Kernel = if descending {
        descending_bytes
    } else {
        ascending_bytes
    };
    // SAFETY: the caller's contract.
    unsafe { call(kernel, dst, src, len, first, second) }
}

/// As [`copy_from_guest`], the lowest byte first: a fault is at the first byte that is not there, and all bytes before it have been moved.
///
/// # Safety
///
/// As [`super::copy_from_guest`].
pub(super) unsafe fn copy_from_guest_ascending(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe {
        call(
            ascending_bytes,
            dst,
            src,
            len,
            Operand::new(src, len),
            Operand::NONE,
        )
    }
}

/// As [`copy_to_guest`], the lowest byte first: a fault is at the first byte that is not there, and all bytes before it have been moved.
///
/// # Safety
///
/// As [`super::copy_to_guest`].
pub(super) unsafe fn copy_to_guest_ascending(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe {
        call(
            ascending_bytes,
            dst,
            src,
            len,
            Operand::new(dst, len),
            Operand::NONE,
        )
    }
}

/// As [`copy_within_guest`] for ranges that do not overlap, the lowest byte first: a fault is at the first byte that is not there, and all
/// bytes before it have been moved.
///
/// # Safety
///
/// As [`super::copy_within_guest`], and the ranges do not overlap.
pub(super) unsafe fn copy_within_guest_ascending(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    let (first, second) = (Operand::new(src, len), Operand::new(dst, len));
    // SAFETY: the caller's contract.
    unsafe { call(ascending_bytes, dst, src, len, first, second) }
}

/// From here on `rep movsb`, where it is fast. Shorter copies are faster with vectors (bench, "copy_to_vs, 4096B": 0.53 of 0.18.0's speed with
/// `rep movsb`, 1.18 with vectors). Non-temporal stores were no faster at 16 MiB, and are not here.
const REP_MIN: usize = 1 << 14;

/// Copies `len` bytes between ranges that do not overlap, with the kernel for that length.
///
/// # Safety
///
/// `src` is valid for reads and `dst` for writes of `len` bytes; `first` and `second` are those of the two that are guest operands.
#[inline(always)]
unsafe fn copy_apart(
    dst: *mut u8,
    src: *const u8,
    len: usize,
    first: Operand,
    second: Operand,
) -> Result<(), FaultAddress> {
    let kernel: Kernel = if len <= SMALL_MAX {
        small_bytes
    } else {
        kernel_for(len)
    };
    // SAFETY: the caller's contract; the kernel is one for this length.
    unsafe { call(kernel, dst, src, len, first, second) }
}

/// The kernel for more than [`SMALL_MAX`] bytes.
#[inline]
fn kernel_for(len: usize) -> Kernel {
    let features = features();
    match (features & AVX != 0, features & FAST_REP != 0) {
        (_, true) if len >= REP_MIN => rep_bytes,
        (true, _) => large_avx,
        (false, _) => large_sse,
    }
}

/// Writes `len` times the byte `value`, in no particular order.
///
/// # Safety
///
/// `dst` is a guest operand of `len` bytes.
#[inline]
pub(super) unsafe fn fill_guest(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
    let kernel: Kernel = if len >= REP_MIN && features() & FAST_REP != 0 {
        fill_ascending
    } else {
        fill_vectors
    };
    // SAFETY: the caller's contract.
    unsafe { call_fill(kernel, dst, value, len) }
}

/// As [`fill_guest`], the lowest byte first: a fault is at the first byte that is not there.
///
/// # Safety
///
/// As [`fill_guest`].
pub(super) unsafe fn fill_guest_ascending(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe { call_fill(fill_ascending, dst, value, len) }
}

/// Calls one of the kernels that fill.
///
/// # Safety
///
/// As [`fill_guest`].
#[inline]
unsafe fn call_fill(kernel: Kernel, dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
    // These kernels have no source: its register holds the byte, eight times over, which is no address that anybody follows.
    let pattern = usize::from(value).wrapping_mul(usize::from_ne_bytes([1; 8]));
    let pattern = core::ptr::without_provenance(pattern);
    // SAFETY: the caller's contract for the destination.
    unsafe { call(kernel, dst, pattern, len, Operand::new(dst, len), Operand::NONE) }
}

/// Copies `count` elements of `size` bytes (2, 4 or 8) in one piece each, ascending.
///
/// # Safety
///
/// As [`super::copy_from_guest`] for `count * size` bytes; `src` is a multiple of `size`.
pub(super) unsafe fn copy_elements_from_guest(
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
) -> Result<(), FaultAddress> {
    let operand = Operand::new(src, count.wrapping_mul(size));
    // SAFETY: the caller's contract.
    unsafe { copy_elements(dst, src, count, size, operand) }
}

/// Copies `count` elements of `size` bytes (2, 4 or 8) in one piece each, ascending.
///
/// # Safety
///
/// As [`super::copy_to_guest`] for `count * size` bytes; `dst` is a multiple of `size`.
pub(super) unsafe fn copy_elements_to_guest(
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
) -> Result<(), FaultAddress> {
    let operand = Operand::new(dst, count.wrapping_mul(size));
    // SAFETY: the caller's contract.
    unsafe { copy_elements(dst, src, count, size, operand) }
}

/// The vectors that elements are moved in, in bytes.
///
/// They are aligned on the guest's side. The manual says of an access of more than 8 bytes only that it may be several (section 9.1.1; the promise
/// for 16 bytes is for other instructions). No processor is known to split an aligned one other than at multiples of 8 bytes, which
/// leaves every element whole; a test looks for torn ones. Within one vector there is no order.
const VECTOR: usize = 32;

/// # Safety
///
/// `src` and `dst` are valid for `count` elements of `size` bytes; `operand` is the guest's of the two, a multiple of `size`, which is 2, 4
/// or 8.
unsafe fn copy_elements(
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
    operand: Operand,
) -> Result<(), FaultAddress> {
    let bytes = count.wrapping_mul(size);
    let one_by_one: Kernel = match size {
        2 => elements_of_2,
        4 => elements_of_4,
        _ => elements_of_8,
    };
    let vectors: Kernel = if features() & AVX != 0 {
        vectors_avx
    } else {
        vectors_sse
    };
    // Elements up to where the guest operand is aligned to a vector; vectors; the elements that are left.
    let head = (operand.start.wrapping_neg() & (VECTOR - 1)).min(bytes);
    let body = bytes.wrapping_sub(head) & !(VECTOR - 1);
    let parts = [
        (one_by_one, head),
        (vectors, body),
        (one_by_one, bytes.wrapping_sub(head).wrapping_sub(body)),
    ];
    let mut offset = 0usize;
    for (kernel, len) in parts {
        if len != 0 {
            let (dst, src) = (dst.wrapping_add(offset), src.wrapping_add(offset));
            // SAFETY: the parts together are the operands, and each is a multiple of what its kernel moves.
            unsafe { call(kernel, dst, src, len, operand, Operand::NONE) }?;
        }
        offset = offset.wrapping_add(len);
    }
    Ok(())
}

/// What this processor has, or 0 as long as nobody asked.
static FEATURES: AtomicU8 = AtomicU8::new(0);
const KNOWN: u8 = 1;
const AVX: u8 = 2;
const FAST_REP: u8 = 4;

#[inline(always)]
fn features() -> u8 {
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
    FEATURES.store(features, Ordering::Relaxed);
    features
}
