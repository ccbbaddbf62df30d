//! The routines for aarch64: functions that consist of assembly.
//!
//! | register | content |
//! |---|---|
//! | `x0` | the destination |
//! | `x1` | the source, or eight copies of the byte of a fill |
//! | `x2` | the length in bytes |
//! | `x3` to `x6` | start and end of two guest operands; no routine changes them |
//! | `x16` | the result: 0, or the address of a fault |
//!
//! A fault may resume at label 3, which returns, because no routine uses the stack. A routine
//! changes only `x0` to `x2`, `x7` to `x17` and `v0` to `v7`. Each function may change them
//! ("Procedure Call Standard for the Arm 64-bit Architecture", section 6.1).
//!
//! Each routine begins with `hint 34`, which is `bti c`. Processors that check branch targets
//! require it at the target of a call through a register; others ignore it.

use core::arch::naked_asm;

/// The longest copy that [`small_bytes`] takes.
pub(in crate::access::arch) const SMALL_MAX: usize = 128;

/// Copies at most 128 bytes, and reads all of them before it writes any.
///
/// 1, 2, 4 and 8 bytes take one load and one store, so they are not torn if they are aligned. Other
/// lengths take moves that are adjacent or overlap.
///
/// # Safety
///
/// `x1` is valid for reads and `x0` for writes of `x2` bytes. `x2` is at most 128.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "C" fn small_bytes() {
    naked_asm!(
        "hint 34",
        "2:",
        "add x10, x1, x2",
        "add x11, x0, x2",
        "cmp x2, 16",
        "b.hi 20f",
        "cmp x2, 8",
        "b.hi 13f",
        "b.eq 18f",
        "cmp x2, 4",
        "b.hi 12f",
        "b.eq 14f",
        "cmp x2, 2",
        "b.hi 16f",
        "b.eq 15f",
        "cbz x2, 19f",
        "ldrb w7, [x1]",
        "strb w7, [x0]",
        "b 19f",
        "15:",
        "ldrh w7, [x1]",
        "strh w7, [x0]",
        "b 19f",
        "14:",
        "ldr w7, [x1]",
        "str w7, [x0]",
        "b 19f",
        "18:",
        "ldr x7, [x1]",
        "str x7, [x0]",
        "b 19f",
        "16:", // 3
        "ldrh w7, [x1]",
        "ldrb w8, [x1, 2]",
        "strh w7, [x0]",
        "strb w8, [x0, 2]",
        "b 19f",
        "12:", // 5 to 7
        "ldr w7, [x1]",
        "ldur w8, [x10, -4]",
        "str w7, [x0]",
        "stur w8, [x11, -4]",
        "b 19f",
        "13:", // 9 to 16
        "ldr x7, [x1]",
        "ldur x8, [x10, -8]",
        "str x7, [x0]",
        "stur x8, [x11, -8]",
        "b 19f",
        "20:", // 17 to 128
        "ldr q0, [x1]",
        "ldur q1, [x10, -16]",
        "cmp x2, 32",
        "b.ls 17f",
        "ldr q2, [x1, 16]",
        "ldur q3, [x10, -32]",
        "cmp x2, 64",
        "b.ls 21f",
        "ldp q4, q5, [x1, 32]",
        "ldp q6, q7, [x10, -64]",
        "stp q4, q5, [x0, 32]",
        "stp q6, q7, [x11, -64]",
        "21:",
        "str q2, [x0, 16]",
        "stur q3, [x11, -32]",
        "17:",
        "str q0, [x0]",
        "stur q1, [x11, -16]",
        "19:",
        "mov x16, 0",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies more than 128 bytes with vectors of 16 bytes.
///
/// Copies one vector to the unaligned destination, and then 64 bytes at a time to aligned
/// addresses. It copies the last 64 bytes separately, some of them for the second time.
///
/// # Safety
///
/// `x1` is valid for reads and `x0` for writes of `x2` bytes, which do not overlap. `x2` is more
/// than 128.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "C" fn large_vectors() {
    naked_asm!(
        "hint 34",
        "2:",
        "add x10, x1, x2",
        "add x11, x0, x2",
        "sub x11, x11, 64",
        "ldr q0, [x1]",
        "str q0, [x0]",
        "neg x7, x0",
        "and x7, x7, 15",
        "add x0, x0, x7",
        "add x1, x1, x7",
        "4:",
        "ldp q0, q1, [x1]",
        "ldp q2, q3, [x1, 32]",
        "stp q0, q1, [x0]",
        "stp q2, q3, [x0, 32]",
        "add x1, x1, 64",
        "add x0, x0, 64",
        "cmp x0, x11",
        "b.lo 4b",
        "ldp q0, q1, [x10, -64]",
        "ldp q2, q3, [x10, -32]",
        "stp q0, q1, [x11]",
        "stp q2, q3, [x11, 32]",
        "mov x16, 0",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies in ascending order, for ranges that do not overlap or a destination below the source.
///
/// It copies 16 bytes at a time and reads them before it writes them. As the destination is lower,
/// no step overwrites bytes that a later step reads. The rest takes at most one move each of 8, 4,
/// 2 and 1 bytes.
///
/// # Safety
///
/// `x1` is valid for reads and `x0` for writes of `x2` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "C" fn ascending_bytes() {
    naked_asm!(
        "hint 34",
        "2:",
        "subs x2, x2, 16",
        "b.lo 5f",
        "4:",
        "ldp x7, x8, [x1], 16",
        "stp x7, x8, [x0], 16",
        "subs x2, x2, 16",
        "b.hs 4b",
        // `x2` is the rest minus 16, which has the same lowest four bits.
        "5:",
        "tbz x2, 3, 6f",
        "ldr x7, [x1], 8",
        "str x7, [x0], 8",
        "6:",
        "tbz x2, 2, 7f",
        "ldr w7, [x1], 4",
        "str w7, [x0], 4",
        "7:",
        "tbz x2, 1, 8f",
        "ldrh w7, [x1], 2",
        "strh w7, [x0], 2",
        "8:",
        "tbz x2, 0, 9f",
        "ldrb w7, [x1]",
        "strb w7, [x0]",
        "9:",
        "mov x16, 0",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies in descending order, for a destination above the source that may overlap it.
///
/// It copies 16 bytes at a time and reads them before it writes them. As the destination is higher,
/// no step overwrites bytes that a later step reads. The rest takes at most one move each of 8, 4,
/// 2 and 1 bytes.
///
/// # Safety
///
/// `x1` is valid for reads and `x0` for writes of `x2` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "C" fn descending_bytes() {
    naked_asm!(
        "hint 34",
        "2:",
        "add x1, x1, x2",
        "add x0, x0, x2",
        "subs x2, x2, 16",
        "b.lo 5f",
        "4:",
        "ldp x7, x8, [x1, -16]!",
        "stp x7, x8, [x0, -16]!",
        "subs x2, x2, 16",
        "b.hs 4b",
        // `x2` is the rest minus 16, which has the same lowest four bits.
        "5:",
        "tbz x2, 3, 6f",
        "ldr x7, [x1, -8]!",
        "str x7, [x0, -8]!",
        "6:",
        "tbz x2, 2, 7f",
        "ldr w7, [x1, -4]!",
        "str w7, [x0, -4]!",
        "7:",
        "tbz x2, 1, 8f",
        "ldrh w7, [x1, -2]!",
        "strh w7, [x0, -2]!",
        "8:",
        "tbz x2, 0, 9f",
        "ldurb w7, [x1, -1]",
        "sturb w7, [x0, -1]",
        "9:",
        "mov x16, 0",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Fills with stores that overlap. For 64 bytes or more, two such stores follow a loop.
///
/// # Safety
///
/// `x0` is valid for writes of `x2` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "C" fn fill_vectors() {
    naked_asm!(
        "hint 34",
        "2:",
        "add x11, x0, x2",
        "cmp x2, 16",
        "b.lo 5f",
        "dup v0.2d, x1",
        "cmp x2, 64",
        "b.lo 4f",
        "sub x8, x11, 64",
        "6:",
        "stp q0, q0, [x0]",
        "stp q0, q0, [x0, 32]",
        "add x0, x0, 64",
        "cmp x0, x8",
        "b.lo 6b",
        "stp q0, q0, [x8]",
        "stp q0, q0, [x8, 32]",
        "b 19f",
        "4:", // 16 to 63
        "str q0, [x0]",
        "stur q0, [x11, -16]",
        "cmp x2, 32",
        "b.ls 19f",
        "str q0, [x0, 16]",
        "stur q0, [x11, -32]",
        "b 19f",
        "5:",
        "tbz x2, 3, 7f",
        "str x1, [x0]",
        "stur x1, [x11, -8]",
        "b 19f",
        "7:",
        "tbz x2, 2, 8f",
        "str w1, [x0]",
        "stur w1, [x11, -4]",
        "b 19f",
        "8:",
        "cbz x2, 19f",
        "strb w1, [x0]",
        "sturb w1, [x11, -1]",
        "lsr x2, x2, 1",
        "strb w1, [x0, x2]",
        "19:",
        "mov x16, 0",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Fills in ascending order.
///
/// # Safety
///
/// `x0` is valid for writes of `x2` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "C" fn fill_ascending() {
    naked_asm!(
        "hint 34",
        "2:",
        "subs x2, x2, 16",
        "b.lo 5f",
        "4:",
        "stp x1, x1, [x0], 16",
        "subs x2, x2, 16",
        "b.hs 4b",
        // `x2` is the rest minus 16, which has the same lowest four bits.
        "5:",
        "tbz x2, 3, 6f",
        "str x1, [x0], 8",
        "6:",
        "tbz x2, 2, 7f",
        "str w1, [x0], 4",
        "7:",
        "tbz x2, 1, 8f",
        "strh w1, [x0], 2",
        "8:",
        "tbz x2, 0, 9f",
        "strb w1, [x0]",
        "9:",
        "mov x16, 0",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Defines the routine that copies elements of one size.
macro_rules! element_routine {
    ($name:ident, $load:literal, $store:literal, $next:literal) => {
        /// Copies elements one by one, in ascending order.
        ///
        /// # Safety
        ///
        /// `x1` is valid for reads and `x0` for writes of `x2` bytes, which do not overlap. `x2` is
        /// a multiple of the size of an element, and not 0.
        #[unsafe(naked)]
        pub(in crate::access::arch) unsafe extern "C" fn $name() {
            naked_asm!(
                "hint 34",
                "2:",
                $load,
                $store,
                $next,
                "b.ne 2b",
                "mov x16, 0",
                "3:",
                "ret",
                fault_entry!("2b", "3b", "3b", "1"),
            )
        }
    };
}

element_routine!(
    elements_of_2,
    "ldrh w7, [x1], 2",
    "strh w7, [x0], 2",
    "subs x2, x2, 2"
);
element_routine!(
    elements_of_4,
    "ldr w7, [x1], 4",
    "str w7, [x0], 4",
    "subs x2, x2, 4"
);
element_routine!(
    elements_of_8,
    "ldr x7, [x1], 8",
    "str x7, [x0], 8",
    "subs x2, x2, 8"
);

/// Copies blocks of 32 bytes as pairs of 8 bytes, in ascending order.
///
/// # Safety
///
/// `x1` is valid for reads and `x0` for writes of `x2` bytes, which do not overlap. `x2` is a
/// multiple of 32, and not 0.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "C" fn pairs() {
    naked_asm!(
        "hint 34",
        "2:",
        "ldp x7, x8, [x1], 16",
        "ldp x9, x10, [x1], 16",
        "stp x7, x8, [x0], 16",
        "stp x9, x10, [x0], 16",
        "subs x2, x2, 32",
        "b.ne 2b",
        "mov x16, 0",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}
