//! Guest accesses on x86_64.
//!
//! "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 3A: a naturally aligned access of 1, 2, 4 or 8
//! bytes is atomic (section 9.1.1); loads are not reordered with loads, nor stores with stores, nor a store with an older load
//! (section 9.2.2), so that every load is an acquire and every store a release, and only a sequentially consistent store needs
//! more than a `mov`. `xchg` with memory is locked (section 9.1.2.1) and orders everything.
//!
//! A block without `options(nomem)` or `options(readonly)` is also a compiler barrier: that is what makes an acquire of a load.
//!
//! The direction flag is clear on entry to every block and every function (Rust reference, "Inline assembly"; System V ABI, section
//! 3.2.1), so `rep movsb` ascends.

use core::arch::asm;
use core::sync::atomic::Ordering;

/// From this length on, `rep movsb` is used: the microcode moves whole cache lines from there on, if source and destination let it
/// ("Intel 64 and IA-32 Architectures Optimization Reference Manual", section 3.7.6).
const REP_MOVSB_MIN: usize = 512;

macro_rules! single_accesses {
    ($($load:ident, $store:ident, $exchange:ident, $integer:ty, $class:ident, $register:literal, $width:literal;)*) => {
        $(
            /// Reads an integer, aligned or not, with one instruction.
            ///
            /// # Safety
            ///
            /// `src` is a guest operand of the integer's size.
            #[inline(always)]
            pub(super) unsafe fn $load(src: *const u8) -> $integer {
                let value: $integer;
                // SAFETY: reads the bytes that the caller's contract covers, writes one register, and touches no flag and no stack.
                unsafe {
                    asm!(
                        concat!("mov {value", $register, "}, ", $width, " ptr [{src}]"),
                        value = lateout($class) value,
                        src = in(reg) src,
                        options(nostack, preserves_flags, readonly),
                    );
                }
                value
            }

            /// Writes an integer, aligned or not, with one instruction.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size.
            #[inline(always)]
            pub(super) unsafe fn $store(dst: *mut u8, value: $integer) {
                // SAFETY: writes the bytes that the caller's contract covers, and touches no flag and no stack.
                unsafe {
                    asm!(
                        concat!("mov ", $width, " ptr [{dst}], {value", $register, "}"),
                        value = in($class) value,
                        dst = in(reg) dst,
                        options(nostack, preserves_flags),
                    );
                }
            }

            /// Writes an integer with a locked instruction.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size, aligned to it.
            #[inline(always)]
            unsafe fn $exchange(dst: *mut u8, value: $integer) {
                // SAFETY: reads and writes the bytes that the caller's contract covers, and touches no flag and no stack.
                unsafe {
                    asm!(
                        concat!("xchg ", $width, " ptr [{dst}], {value", $register, "}"),
                        value = inout($class) value => _,
                        dst = in(reg) dst,
                        options(nostack, preserves_flags),
                    );
                }
            }
        )*
    };
}

single_accesses! {
    load_u8, store_u8, exchange_u8, u8, reg_byte, "", "byte";
    load_u16, store_u16, exchange_u16, u16, reg, ":x", "word";
    load_u32, store_u32, exchange_u32, u32, reg, ":e", "dword";
    load_u64, store_u64, exchange_u64, u64, reg, ":r", "qword";
}

/// Reads `size` bytes (1, 2, 4 or 8) in one piece, and extends them with zeroes.
///
/// # Safety
///
/// `src` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
pub(super) unsafe fn load_ordered(src: *const u8, size: usize, order: Ordering) -> u64 {
    let bits = match size {
        // SAFETY: the caller's contract, for each width.
        1 => u64::from(unsafe { load_u8(src) }),
        // SAFETY: as above.
        2 => u64::from(unsafe { load_u16(src) }),
        // SAFETY: as above.
        4 => u64::from(unsafe { load_u32(src) }),
        // SAFETY: as above.
        _ => unsafe { load_u64(src) },
    };
    if order != Ordering::Relaxed {
        compiler_barrier();
    }
    bits
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `bits` in one piece.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "the low bytes are what is wanted"
)]
pub(super) unsafe fn store_ordered(dst: *mut u8, bits: u64, size: usize, order: Ordering) {
    match (size, order) {
        // SAFETY: the caller's contract, for each width.
        (1, Ordering::SeqCst) => unsafe { exchange_u8(dst, bits as u8) },
        // SAFETY: as above.
        (2, Ordering::SeqCst) => unsafe { exchange_u16(dst, bits as u16) },
        // SAFETY: as above.
        (4, Ordering::SeqCst) => unsafe { exchange_u32(dst, bits as u32) },
        // SAFETY: as above.
        (_, Ordering::SeqCst) => unsafe { exchange_u64(dst, bits) },
        // SAFETY: as above.
        (1, _) => unsafe { store_u8(dst, bits as u8) },
        // SAFETY: as above.
        (2, _) => unsafe { store_u16(dst, bits as u16) },
        // SAFETY: as above.
        (4, _) => unsafe { store_u32(dst, bits as u32) },
        // SAFETY: as above.
        (_, _) => unsafe { store_u64(dst, bits) },
    }
}

/// Keeps the compiler from moving any access across.
#[inline(always)]
fn compiler_barrier() {
    // SAFETY: no instruction at all.
    unsafe { asm!("", options(nostack, preserves_flags)) }
}

/// Copies `len` bytes; ascending or by overlapping pieces, so the ranges must not overlap.
///
/// # Safety
///
/// As [`super::copy_from_guest`].
#[inline(always)]
pub(super) unsafe fn copy_from_guest(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the caller's contract.
    unsafe { copy_apart(dst, src, len) }
}

/// Copies `len` bytes; ascending or by overlapping pieces, so the ranges must not overlap.
///
/// # Safety
///
/// As [`super::copy_to_guest`].
#[inline(always)]
pub(super) unsafe fn copy_to_guest(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the caller's contract.
    unsafe { copy_apart(dst, src, len) }
}

/// Copies `len` bytes between ranges that may overlap.
///
/// # Safety
///
/// As [`super::copy_within_guest`].
pub(super) unsafe fn copy_within_guest(dst: *mut u8, src: *const u8, len: usize) {
    let dst_behind_src = dst.addr().wrapping_sub(src.addr());
    let src_behind_dst = src.addr().wrapping_sub(dst.addr());
    if dst_behind_src >= len && src_behind_dst >= len {
        // SAFETY: the caller's contract; neither range begins in the other (just checked), so they do not overlap.
        unsafe { copy_apart(dst, src, len) }
    } else if dst_behind_src < len {
        // SAFETY: the caller's contract. The destination begins in the source, so each byte is read before it is overwritten if the
        // highest go first.
        unsafe { copy_descending(dst, src, len) }
    } else {
        // SAFETY: the caller's contract. The source begins in the destination, so each byte is read before it is overwritten if the
        // lowest go first, one by one, as `rep movsb` is defined.
        unsafe { rep_movsb(dst, src, len) }
    }
}

/// Copies `count` elements of `size` bytes (2, 4 or 8) one by one, ascending.
///
/// # Safety
///
/// As [`super::copy_from_guest`] for `count * size` bytes; `src` is a multiple of `size`.
pub(super) unsafe fn copy_elements_from_guest(dst: *mut u8, src: *const u8, count: usize, size: usize) {
    // SAFETY: the caller's contract.
    unsafe { copy_elements(dst, src, count, size) }
}

/// Copies `count` elements of `size` bytes (2, 4 or 8) one by one, ascending.
///
/// # Safety
///
/// As [`super::copy_to_guest`] for `count * size` bytes; `dst` is a multiple of `size`.
pub(super) unsafe fn copy_elements_to_guest(dst: *mut u8, src: *const u8, count: usize, size: usize) {
    // SAFETY: the caller's contract.
    unsafe { copy_elements(dst, src, count, size) }
}

macro_rules! element_loop {
    ($dst:ident, $src:ident, $count:ident, $register:literal, $width:literal, $scale:literal) => {
        // SAFETY: reads `$count` elements at `$src` and writes as many at `$dst`, which the caller's contract covers; no stack.
        unsafe {
            asm!(
                "2:",
                concat!("mov {value", $register, "}, ", $width, " ptr [{src} + {index}*", $scale, "]"),
                concat!("mov ", $width, " ptr [{dst} + {index}*", $scale, "], {value", $register, "}"),
                "inc {index}",
                "cmp {index}, {count}",
                "jb 2b",
                index = inout(reg) 0usize => _,
                value = out(reg) _,
                src = in(reg) $src,
                dst = in(reg) $dst,
                count = in(reg) $count,
                options(nostack),
            )
        }
    };
}

/// # Safety
///
/// `src` and `dst` are valid for `count` elements of `size` bytes, one of them as a guest operand; `size` is 2, 4 or 8.
unsafe fn copy_elements(dst: *mut u8, src: *const u8, count: usize, size: usize) {
    if count == 0 {
        return;
    }
    match size {
        2 => element_loop!(dst, src, count, ":x", "word", "2"),
        4 => element_loop!(dst, src, count, ":e", "dword", "4"),
        _ => element_loop!(dst, src, count, ":r", "qword", "8"),
    }
}

macro_rules! move_once {
    ($dst:ident, $src:ident, $class:ident, $register:literal, $width:literal) => {
        // SAFETY: one load and one store of a width that is no greater than the length, which the caller's contract covers.
        unsafe {
            asm!(
                concat!("mov {value", $register, "}, ", $width, " ptr [{src}]"),
                concat!("mov ", $width, " ptr [{dst}], {value", $register, "}"),
                value = out($class) _,
                src = in(reg) $src,
                dst = in(reg) $dst,
                options(nostack, preserves_flags),
            )
        }
    };
}

/// Two moves, of the first and of the last bytes, which meet or overlap: the length lies between one width and two.
macro_rules! move_both_ends {
    ($dst:ident, $src:ident, $len:ident, $mov:literal, $class:ident, $register:literal, $width:literal, $size:literal) => {
        // SAFETY: the length is at least `$size` (the arm that this is in), so that `[0, $size)` and `[len - $size, len)` lie within
        // the operands, which the caller's contract covers. No flag, no stack.
        unsafe {
            asm!(
                concat!($mov, " {first", $register, "}, ", $width, " ptr [{src}]"),
                concat!($mov, " {last", $register, "}, ", $width, " ptr [{src} + {len} - ", $size, "]"),
                concat!($mov, " ", $width, " ptr [{dst}], {first", $register, "}"),
                concat!($mov, " ", $width, " ptr [{dst} + {len} - ", $size, "], {last", $register, "}"),
                first = out($class) _,
                last = out($class) _,
                src = in(reg) $src,
                dst = in(reg) $dst,
                len = in(reg) $len,
                options(nostack, preserves_flags),
            )
        }
    };
}

/// Copies `len` bytes between ranges that do not overlap.
///
/// Copies of 1, 2, 4 and 8 bytes are one load and one store, so that they stay whole where they are aligned.
///
/// # Safety
///
/// `src` is valid for reads and `dst` for writes of `len` bytes, one of them or both as guest operands, and they do not overlap.
unsafe fn copy_apart(dst: *mut u8, src: *const u8, len: usize) {
    match len {
        0 => {}
        1 => move_once!(dst, src, reg_byte, "", "byte"),
        2 => move_once!(dst, src, reg, ":x", "word"),
        4 => move_once!(dst, src, reg, ":e", "dword"),
        8 => move_once!(dst, src, reg, ":r", "qword"),
        3 => move_both_ends!(dst, src, len, "mov", reg, ":x", "word", 2),
        5..=7 => move_both_ends!(dst, src, len, "mov", reg, ":e", "dword", 4),
        9..=16 => move_both_ends!(dst, src, len, "mov", reg, ":r", "qword", 8),
        17..=32 => move_both_ends!(dst, src, len, "movups", xmm_reg, "", "xmmword", 16),
        // SAFETY: the caller's contract, and more than 32 bytes.
        33..REP_MOVSB_MIN => unsafe { copy_vectors(dst, src, len) },
        // SAFETY: the caller's contract.
        _ => unsafe { rep_movsb(dst, src, len) },
    }
}

/// Copies in steps of 32 bytes, and the last 32 once more.
///
/// # Safety
///
/// As [`copy_apart`], and `len` is at least 32.
unsafe fn copy_vectors(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: `offset` ascends in steps of 32 while below `len - 32`, and ends with `len - 32` itself: every access is within `[0, len)`,
    // which the caller's contract covers. No stack.
    unsafe {
        asm!(
            "2:",
            "movups {a}, xmmword ptr [{src} + {offset}]",
            "movups {b}, xmmword ptr [{src} + {offset} + 16]",
            "movups xmmword ptr [{dst} + {offset}], {a}",
            "movups xmmword ptr [{dst} + {offset} + 16], {b}",
            "add {offset}, 32",
            "cmp {offset}, {last}",
            "jb 2b",
            "movups {a}, xmmword ptr [{src} + {last}]",
            "movups {b}, xmmword ptr [{src} + {last} + 16]",
            "movups xmmword ptr [{dst} + {last}], {a}",
            "movups xmmword ptr [{dst} + {last} + 16], {b}",
            offset = inout(reg) 0usize => _,
            last = in(reg) len.wrapping_sub(32),
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            src = in(reg) src,
            dst = in(reg) dst,
            options(nostack),
        );
    }
}

/// Copies ascending, as if byte by byte.
///
/// The stores of a string instruction may become visible in any order, but all of them before those of later instructions (Intel
/// manual, volume 3A, section 9.2.4).
///
/// # Safety
///
/// `src` is valid for reads and `dst` for writes of `len` bytes, one of them or both as guest operands.
unsafe fn rep_movsb(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: reads `len` bytes at `src` and writes as many at `dst`, which the caller's contract covers; the direction flag is clear.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") src => _,
            inout("rdi") dst => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies from the highest byte down, eight at a time: a step reads all its bytes before it writes, and writes none that a later
/// step reads, since `dst` is above `src`.
///
/// # Safety
///
/// `src` is valid for reads and `dst` for writes of `len` bytes, one of them or both as guest operands.
unsafe fn copy_descending(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: `left` is the number of bytes still to be moved: a step of 8 is taken only while it is at least 8, a step of 1 while it is
    // not 0, so every access is within `[0, len)`, which the caller's contract covers. No stack.
    unsafe {
        asm!(
            "2:",
            "cmp {left}, 8",
            "jb 3f",
            "mov {value}, qword ptr [{src} + {left} - 8]",
            "mov qword ptr [{dst} + {left} - 8], {value}",
            "sub {left}, 8",
            "jmp 2b",
            "3:",
            "test {left}, {left}",
            "jz 4f",
            "mov {value:l}, byte ptr [{src} + {left} - 1]",
            "mov byte ptr [{dst} + {left} - 1], {value:l}",
            "dec {left}",
            "jmp 3b",
            "4:",
            left = inout(reg) len => _,
            value = out(reg) _,
            src = in(reg) src,
            dst = in(reg) dst,
            options(nostack),
        );
    }
}
