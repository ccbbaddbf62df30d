//! The types of operands, and their values.
#![expect(unsafe_code, reason = "ByteValued is an unsafe trait")]

use std::sync::atomic::Ordering;

use super::vm;
use crate::host::stream;
use crate::op::{Order, Perm};

/// Three bytes: a size that is not a power of two.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Bytes3([u8; 3]);

/// A value that is larger than any register.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Bytes40([u8; 40]);

/// A value without bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Empty([u8; 0]);

// SAFETY: an array of bytes has no padding and no invalid value.
unsafe impl vm::ByteValued for Bytes3 {}

// SAFETY: an array of bytes has no padding and no invalid value.
unsafe impl vm::ByteValued for Bytes40 {}

// SAFETY: without bytes, there is no padding and no invalid value.
unsafe impl vm::ByteValued for Empty {}

/// Evaluates the expression with `$T` standing for the type named by `$ty`.
macro_rules! with_any_ty {
    ($ty:expr, $T:ident => $body:expr) => {{
        use $crate::op::Ty;
        macro_rules! arm {
            ($real:ty) => {{
                type $T = $real;
                $body
            }};
        }
        match $ty {
            Ty::I8 => arm!(i8),
            Ty::I16 => arm!(i16),
            Ty::I64 => arm!(i64),
            Ty::I128 => arm!(i128),
            Ty::Usize => arm!(usize),
            Ty::Isize => arm!(isize),
            Ty::Be32 => arm!(super::vm::Be32),
            Ty::BeSize => arm!(super::vm::BeSize),
            Ty::Le16 => arm!(super::vm::Le16),
            Ty::Le64 => arm!(super::vm::Le64),
            other => super::types::with_ty!(other, $T => $body, else unreachable!("each type has an arm")),
        }
    }};
}

/// Evaluates the expression with `$T` as the type named by `$ty`, for the types of accesses to
/// memory only. Every other type has the size and alignment of one of them, and would take time to
/// compile.
macro_rules! with_ty {
    ($ty:expr, $T:ident => $body:expr, else $other:expr) => {{
        use $crate::op::Ty;
        macro_rules! arm {
            ($real:ty) => {{
                type $T = $real;
                $body
            }};
        }
        match $ty {
            Ty::U8 => arm!(u8),
            Ty::U16 => arm!(u16),
            Ty::U32 => arm!(u32),
            Ty::U64 => arm!(u64),
            Ty::U128 => arm!(u128),
            Ty::I32 => arm!(i32),
            Ty::Be16 => arm!(super::vm::Be16),
            Ty::Be64 => arm!(super::vm::Be64),
            Ty::Le32 => arm!(super::vm::Le32),
            Ty::LeSize => arm!(super::vm::LeSize),
            Ty::Bytes3 => arm!(super::types::Bytes3),
            Ty::Bytes40 => arm!(super::types::Bytes40),
            Ty::Empty => arm!(super::types::Empty),
            _ => $other,
        }
    }};
}

/// Evaluates the expression with `$T` standing for the type named by `$ty`.
macro_rules! with_atom {
    ($ty:expr, $T:ident => $body:expr) => {{
        use $crate::op::AtomTy;
        macro_rules! arm {
            ($real:ty) => {{
                type $T = $real;
                $body
            }};
        }
        match $ty {
            AtomTy::AtomU8 => arm!(u8),
            AtomTy::AtomI8 => arm!(i8),
            AtomTy::AtomU16 => arm!(u16),
            AtomTy::AtomI16 => arm!(i16),
            AtomTy::AtomU32 => arm!(u32),
            AtomTy::AtomI32 => arm!(i32),
            AtomTy::AtomU64 => arm!(u64),
            AtomTy::AtomI64 => arm!(i64),
            AtomTy::AtomUsize => arm!(usize),
            AtomTy::AtomIsize => arm!(isize),
        }
    }};
}

pub(super) use {with_any_ty, with_atom, with_ty};

/// Returns the value whose bytes are the stream `seed`.
pub fn value_of<T: vm::ByteValued>(seed: u8) -> T {
    values_of(seed, 1)[0]
}

/// Returns `count` values whose bytes are the stream `seed`.
pub fn values_of<T: vm::ByteValued>(seed: u8, count: usize) -> Vec<T> {
    let size = size_of::<T>();
    (0..count)
        .map(|i| {
            let mut value = T::zeroed();
            value
                .as_mut_slice()
                .copy_from_slice(&stream(seed, i * size, size));
            value
        })
        .collect()
}

/// Returns the bytes of the values.
pub fn bytes_of<T: vm::ByteValued>(values: &[T]) -> Vec<u8> {
    values.iter().flat_map(|v| v.as_slice().to_vec()).collect()
}

/// Converts to the standard library's type.
pub fn order(order: Order) -> Ordering {
    match order {
        Order::Relaxed => Ordering::Relaxed,
        Order::Release => Ordering::Release,
        Order::Acquire => Ordering::Acquire,
        Order::AcqRel => Ordering::AcqRel,
        Order::SeqCst => Ordering::SeqCst,
    }
}

/// Converts to the crate's type.
pub fn perm(perm: Perm) -> vm::Permissions {
    match perm {
        Perm::No => vm::Permissions::No,
        Perm::Read => vm::Permissions::Read,
        Perm::Write => vm::Permissions::Write,
        Perm::ReadWrite => vm::Permissions::ReadWrite,
    }
}

/// Converts to the harness's number.
pub fn perm_number(perm: vm::Permissions) -> u64 {
    match perm {
        vm::Permissions::No => 0,
        vm::Permissions::Read => 1,
        vm::Permissions::Write => 2,
        vm::Permissions::ReadWrite => 3,
    }
}
