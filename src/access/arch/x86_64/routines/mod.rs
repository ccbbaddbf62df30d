//! The routines for x86_64: functions that consist of assembly.
//!
//! | register | content |
//! |---|---|
//! | `rdi` | the destination |
//! | `rsi` | the source, or eight copies of the byte of a fill |
//! | `rcx` | the length in bytes |
//! | `r8` to `r11` | start and end of two guest operands; no routine changes them |
//! | `rax` | the result: 0, or the address of a fault |
//!
//! A routine does not use the stack between labels 2 and 3, so `ret` at label 3 ends it after a
//! fault anywhere. It changes only registers that are volatile in the System V calling convention.

mod copies;
mod elements;
mod fills;

pub(in crate::access::arch) use copies::{
    ascending_bytes, descending_bytes, middle_avx, middle_avx512, middle_sse, middle_undetected,
    rep_bytes, small_bytes, streaming_avx, SMALL_MAX,
};
pub(in crate::access::arch) use elements::{
    elements_of_2, elements_of_4, elements_of_8, vectors_avx, vectors_sse,
};
pub(in crate::access::arch) use fills::{fill_ascending, fill_vectors};
