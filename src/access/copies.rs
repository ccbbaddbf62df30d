//! Copies and fills by kernels of assembly: which kernel takes which part. The processor's module (`x86_64.rs`, `aarch64.rs`) has the kernels, and says
//! which of them is for which length.

use super::bulk::{
    ascending_bytes, descending_bytes, elements_of_2, elements_of_4, elements_of_8, fill_ascending,
    small_bytes, SMALL_MAX,
};
use super::{blocks_kernel, call, copy_kernel, fill_kernel, FaultAddress, Kernel};

/// The two ends of a guest operand, as the kernels keep them for the handler.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) start: usize,
    pub(super) end: usize,
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

/// Copies `len` bytes between ranges that do not overlap.
///
/// # Safety
///
/// As [`super::super::copy_from_guest`].
#[inline(always)]
pub(in crate::access) unsafe fn copy_from_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe { copy_apart(dst, src, len, Operand::new(src, len), Operand::NONE) }
}

/// Copies `len` bytes between ranges that do not overlap.
///
/// # Safety
///
/// As [`super::super::copy_to_guest`].
#[inline(always)]
pub(in crate::access) unsafe fn copy_to_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe { copy_apart(dst, src, len, Operand::new(dst, len), Operand::NONE) }
}

/// Copies `len` bytes between ranges that may overlap.
///
/// # Safety
///
/// As [`super::super::copy_within_guest`].
pub(in crate::access) unsafe fn copy_within_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    let (first, second) = (Operand::new(src, len), Operand::new(dst, len));
    if len <= SMALL_MAX {
        // SAFETY: the caller's contract, and short enough; that kernel reads everything before it writes, so that the ranges may overlap.
        return unsafe { call(small_bytes, dst, src, len, first, second) };
    }
    if !super::super::overlap(dst, src, len) {
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
/// As [`super::super::copy_from_guest`].
pub(in crate::access) unsafe fn copy_from_guest_ascending(
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
/// As [`super::super::copy_to_guest`].
pub(in crate::access) unsafe fn copy_to_guest_ascending(
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
/// As [`super::super::copy_within_guest`], and the ranges do not overlap.
pub(in crate::access) unsafe fn copy_within_guest_ascending(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    let (first, second) = (Operand::new(src, len), Operand::new(dst, len));
    // SAFETY: the caller's contract.
    unsafe { call(ascending_bytes, dst, src, len, first, second) }
}

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
    // SAFETY: the caller's contract; the kernel is one for this length.
    unsafe { call(copy_kernel(len), dst, src, len, first, second) }
}

/// Writes `len` times the byte `value`, in no particular order.
///
/// # Safety
///
/// `dst` is a guest operand of `len` bytes.
#[inline]
pub(in crate::access) unsafe fn fill_guest(
    dst: *mut u8,
    value: u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe { call_fill(fill_kernel(len), dst, value, len) }
}

/// As [`fill_guest`], the lowest byte first: a fault is at the first byte that is not there.
///
/// # Safety
///
/// As [`fill_guest`].
pub(in crate::access) unsafe fn fill_guest_ascending(
    dst: *mut u8,
    value: u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // SAFETY: the caller's contract.
    unsafe { call_fill(fill_ascending, dst, value, len) }
}

/// Calls one of the kernels that fill.
///
/// # Safety
///
/// As [`fill_guest`].
#[inline]
unsafe fn call_fill(
    kernel: Kernel,
    dst: *mut u8,
    value: u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // These kernels have no source: its register holds the byte, eight times over, which is no address that anybody follows.
    let pattern = usize::from(value).wrapping_mul(usize::from_ne_bytes([1; 8]));
    let pattern = core::ptr::without_provenance(pattern);
    // SAFETY: the caller's contract for the destination.
    unsafe {
        call(
            kernel,
            dst,
            pattern,
            len,
            Operand::new(dst, len),
            Operand::NONE,
        )
    }
}

/// Copies `count` elements of `size` bytes (2, 4 or 8) in one piece each, ascending.
///
/// # Safety
///
/// As [`super::super::copy_from_guest`] for `count * size` bytes; `src` is a multiple of `size`.
pub(in crate::access) unsafe fn copy_elements_from_guest(
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
/// As [`super::super::copy_to_guest`] for `count * size` bytes; `dst` is a multiple of `size`.
pub(in crate::access) unsafe fn copy_elements_to_guest(
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
) -> Result<(), FaultAddress> {
    let operand = Operand::new(dst, count.wrapping_mul(size));
    // SAFETY: the caller's contract.
    unsafe { copy_elements(dst, src, count, size, operand) }
}

/// The blocks that elements are moved in, in bytes: aligned on the guest's side, and without an order within one. `blocks_kernel` says why they leave
/// elements whole.
const BLOCK: usize = 32;

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
    // Elements up to where the guest operand is aligned to a block; blocks; the elements that are left.
    let head = (operand.start.wrapping_neg() & (BLOCK - 1)).min(bytes);
    let body = bytes.wrapping_sub(head) & !(BLOCK - 1);
    let parts = [
        (one_by_one, head),
        (blocks_kernel(), body),
        (one_by_one, bytes.wrapping_sub(head).wrapping_sub(body)),
    ];
    let mut offset = 0usize;
    for (kernel, len) in parts {
        if len != 0 {
            let (dst, src) = (dst.wrapping_add(offset), src.wrapping_add(offset));
            // SAFETY: the parts together are the operands, and each is a multiple of what its kernel moves, and not empty.
            unsafe { call(kernel, dst, src, len, operand, Operand::NONE) }?;
        }
        offset = offset.wrapping_add(len);
    }
    Ok(())
}
