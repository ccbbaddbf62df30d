//! The interface of the access routines: [`RoutineSet`], [`Register`] and [`Word`].
//!
//! [`arch`] implements it in assembly, and `portable` with relaxed atomics. The contract of each
//! operation is written here, once.

use core::num::NonZeroUsize;
use core::sync::atomic::Ordering;
use std::io;

use super::arch;
use super::fault::Direction;
use super::Plain;

/// The address that faulted. After a memory error, it may be the start of the page, before the
/// operand. It is not 0, as no operand is null.
pub(super) type FaultAddress = NonZeroUsize;

/// The result of a routine whose fault has no address. No operand begins there.
///
/// The fault may be at any byte of any operand that is guest memory.
pub(super) const NO_ADDRESS: FaultAddress = NonZeroUsize::MIN;

/// The guest operands of a copy. Any other operand is host memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum GuestSide {
    Source,
    Destination,
    Both,
}

impl GuestSide {
    /// Returns the guest operand that contains `address`, and how the copy accesses it.
    ///
    /// If both operands are guest memory and the fault has no address, it is the destination.
    pub(super) fn operand_at(
        self,
        address: FaultAddress,
        dst: *const u8,
        src: *const u8,
        len: usize,
    ) -> (*const u8, Direction) {
        let in_source = match self {
            GuestSide::Source => true,
            GuestSide::Destination => false,
            GuestSide::Both => address.get().wrapping_sub(src.addr()) < len,
        };
        if in_source {
            (src, Direction::Read)
        } else {
            (dst, Direction::Write)
        }
    }
}

/// The copy and fill routines for one kind of processor.
///
/// Each routine returns the address of a fault, or [`NO_ADDRESS`], if there was one. It does not
/// count the bytes that it moved.
///
/// A *guest operand* is a range of guest memory that meets the contract in the documentation of
/// [`access`](super). If only one of two operands is guest memory, the other one is host memory
/// that is valid for the access.
///
/// # Safety
///
/// A routine accesses only the bytes of its operands. If it returns `Ok`, it has written all bytes
/// of its destination.
pub(in crate::access) unsafe trait RoutineSet {
    /// Installs the signal handler that makes faults return. `None` if this set cannot recover.
    const INSTALL_FAULT_HANDLER: Option<fn() -> io::Result<()>> = None;

    /// Copies `len` bytes, in any order.
    ///
    /// A copy of 1, 2, 4 or 8 bytes to or from naturally aligned guest memory is not torn.
    ///
    /// # Safety
    ///
    /// `src` and `dst` are operands of `len` bytes, which do not overlap. `side` says which of them
    /// are guest operands.
    unsafe fn copy(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress>;

    /// Copies `len` bytes in ascending order.
    ///
    /// After a fault with an address, all bytes below it have been moved.
    ///
    /// # Safety
    ///
    /// `src` and `dst` are operands of `len` bytes, which do not overlap. `side` says which of them
    /// are guest operands.
    unsafe fn copy_ascending(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress>;

    /// Copies `len` bytes between ranges of guest memory that may overlap.
    ///
    /// # Safety
    ///
    /// `src` and `dst` are guest operands of `len` bytes.
    unsafe fn copy_overlapping(
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress>;

    /// Sets `len` bytes to `value`, in any order.
    ///
    /// # Safety
    ///
    /// `dst` is a guest operand of `len` bytes.
    unsafe fn fill(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress>;

    /// Sets `len` bytes to `value`, in ascending order.
    ///
    /// After a fault with an address, all bytes below it have been set.
    ///
    /// # Safety
    ///
    /// `dst` is a guest operand of `len` bytes.
    unsafe fn fill_ascending(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress>;

    /// Copies `count` elements of `size` bytes, each without tearing, in ascending order.
    ///
    /// Elements in the same aligned 32 bytes of guest memory may move together.
    ///
    /// # Safety
    ///
    /// `size` is 2, 4 or 8. `src` and `dst` are operands of `count * size` bytes, which do not
    /// overlap and whose length does not overflow. `side` names one guest operand, which is aligned
    /// to `size`.
    unsafe fn copy_elements(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        count: usize,
        size: usize,
    ) -> Result<(), FaultAddress>;
}

/// An unsigned integer that one instruction moves between guest memory and registers.
///
/// The instruction is from the routine set `R`: the one in use, unless a test names another.
pub(crate) trait Register<R = arch::Routines>: Copy {
    /// Reads an integer, aligned or not. If it is aligned and has at most 8 bytes, it is not torn.
    ///
    /// # Safety
    ///
    /// `src` is a guest operand of `size_of::<Self>()` bytes.
    unsafe fn load(src: *const u8) -> Result<Self, FaultAddress>;

    /// Writes an integer, aligned or not. If it is aligned and has at most 8 bytes, it is not torn.
    ///
    /// # Safety
    ///
    /// `dst` is a guest operand of `size_of::<Self>()` bytes.
    unsafe fn store(dst: *mut u8, value: Self) -> Result<(), FaultAddress>;
}

/// An unsigned integer of 1, 2, 4 or 8 bytes, which the processor accesses atomically.
pub(crate) trait Word<R = arch::Routines>: Register<R> + Plain + Eq {
    /// Reads an integer with the ordering `order`: relaxed, acquire or sequentially consistent.
    ///
    /// # Safety
    ///
    /// `src` is a guest operand of `size_of::<Self>()` bytes, aligned to that size.
    unsafe fn load_ordered(src: *const u8, order: Ordering) -> Result<Self, FaultAddress>;

    /// Writes an integer with the ordering `order`: relaxed, release or sequentially consistent.
    ///
    /// # Safety
    ///
    /// `dst` is a guest operand of `size_of::<Self>()` bytes, aligned to that size.
    unsafe fn store_ordered(dst: *mut u8, value: Self, order: Ordering)
        -> Result<(), FaultAddress>;

    /// Applies `change` with at least the ordering `order`, and returns the previous value.
    ///
    /// # Safety
    ///
    /// `dst` is a guest operand of `size_of::<Self>()` bytes, aligned to that size.
    unsafe fn fetch(
        dst: *mut u8,
        change: Fetch,
        operand: Self,
        order: Ordering,
    ) -> Result<Self, FaultAddress>;

    /// Writes `new` if the value is `current`, and returns the previous value.
    ///
    /// The orderings are at least `success` and `failure`.
    ///
    /// # Safety
    ///
    /// `dst` is a guest operand of `size_of::<Self>()` bytes, aligned to that size.
    unsafe fn compare_exchange(
        dst: *mut u8,
        current: Self,
        new: Self,
        success: Ordering,
        failure: Ordering,
    ) -> Result<Self, FaultAddress>;
}

/// The change that a read-modify-write operation makes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fetch {
    /// Replaces the value with the operand.
    Swap,
    /// Adds the operand; the sum wraps.
    Add,
    /// Combines value and operand by a bitwise AND.
    And,
    /// Combines value and operand by a bitwise OR.
    Or,
}
