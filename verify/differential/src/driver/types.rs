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

/// Evaluates the expression with `$T` as the type that stands beside the name `$name`.
macro_rules! with_type {
    ($name:expr, $T:ident => $body:expr, $names:ident {
        $($variant:ident: $real:ty,)*
    } $(, $others:pat => $other:expr)?) => {
        match $name {
            $(
                $crate::op::$names::$variant => {
                    type $T = $real;
                    $body
                }
            )*
            $($others => $other,)?
        }
    };
}

/// Evaluates the expression with `$T` as the type named by `$ty`.
macro_rules! with_any_ty {
    ($ty:expr, $T:ident => $body:expr) => {
        super::types::with_type!($ty, $T => $body, Ty {
            I8: i8, I16: i16, I64: i64, I128: i128, Usize: usize, Isize: isize,
            Be32: super::vm::Be32, BeSize: super::vm::BeSize,
            Le16: super::vm::Le16, Le64: super::vm::Le64,
        }, other => super::types::with_ty!(
            other,
            $T => $body,
            else unreachable!("each type has an arm")
        ))
    };
}

/// Evaluates the expression with `$T` as the type named by `$ty`, for the types of accesses to
/// memory only. Every other type has the size and alignment of one of them, and would take time to
/// compile.
macro_rules! with_ty {
    ($ty:expr, $T:ident => $body:expr, else $other:expr) => {
        super::types::with_type!($ty, $T => $body, Ty {
            U8: u8, U16: u16, U32: u32, U64: u64, U128: u128, I32: i32,
            Be16: super::vm::Be16, Be64: super::vm::Be64,
            Le32: super::vm::Le32, LeSize: super::vm::LeSize,
            Bytes3: super::types::Bytes3, Bytes40: super::types::Bytes40,
            Empty: super::types::Empty,
        }, _ => $other)
    };
}

/// Evaluates the expression with `$T` as the type named by `$ty`.
macro_rules! with_atom {
    ($ty:expr, $T:ident => $body:expr) => {
        super::types::with_type!($ty, $T => $body, AtomTy {
            AtomU8: u8, AtomI8: i8, AtomU16: u16, AtomI16: i16, AtomU32: u32, AtomI32: i32,
            AtomU64: u64, AtomI64: i64, AtomUsize: usize, AtomIsize: isize,
        })
    };
}

pub(super) use {with_any_ty, with_atom, with_ty, with_type};

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
