//! [`Location`]: the location of the bytes of a slice, with all accesses to them.

use core::fmt::{self, Debug};
use core::marker::PhantomData;

use super::on_demand;
use crate::access::fault::Direction;
use crate::access::{self, Fault};
use crate::value::ByteValued;
use crate::xen::{self, MmapInfo, OnDemand};

/// The location of the first byte of a slice, a value or an array.
///
/// It is a host address. With the feature `xen`, it may also be an offset in memory that has no
/// host address, because it is mapped for each access.
///
/// Each access to the bytes is a method of this type. It passes the address on, or maps the bytes,
/// accesses them, and unmaps them. The memory is not mapped between two accesses.
#[derive(Clone, Copy)]
pub(super) struct Location<'a> {
    /// The host address, or the [offset](crate::xen::MmapXen::offset_from_first_page) in
    /// `on_demand`, which has the alignment of the byte.
    addr: *mut u8,
    /// Without the feature `xen`, it takes no space.
    on_demand: Option<OnDemand<'a>>,
    phantom: PhantomData<&'a u8>,
}

impl<'a> Location<'a> {
    #[inline(always)]
    pub(super) fn new(addr: *mut u8, mmap: Option<&'a MmapInfo>) -> Self {
        Self {
            addr,
            on_demand: xen::memory_of(mmap),
            phantom: PhantomData,
        }
    }

    /// Returns the host address, or `None` if the memory has none.
    #[inline(always)]
    pub(super) fn host(self) -> Option<*mut u8> {
        match self.on_demand {
            Some(_) => None,
            None => Some(self.addr),
        }
    }

    /// Returns the address for checks of alignment, and for reports of errors and faults.
    #[inline(always)]
    pub(super) fn addr(self) -> usize {
        self.addr.addr()
    }

    /// Returns the memory that is mapped for each access, if it is such memory.
    #[inline(always)]
    pub(super) fn on_demand(self) -> Option<OnDemand<'a>> {
        self.on_demand
    }

    /// Returns the last argument of [`new`](Self::new).
    #[inline(always)]
    pub(super) fn mmap_info(self) -> Option<&'a MmapInfo> {
        xen::info_of(self.on_demand)
    }

    /// Returns the address as it was passed to [`new`](Self::new).
    #[inline(always)]
    pub(super) fn as_ptr(self) -> *mut u8 {
        self.addr
    }

    /// Returns the location `offset` bytes after this one.
    #[inline(always)]
    pub(super) fn wrapping_add(self, offset: usize) -> Self {
        Self {
            addr: self.addr.wrapping_add(offset),
            ..self
        }
    }

    /// Runs `access` on the `len` bytes at this location.
    #[inline(always)]
    pub(super) fn with<T>(
        self,
        len: usize,
        direction: Direction,
        access: impl FnOnce(*mut u8) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        if let Some(memory) = self.on_demand {
            return on_demand::with(memory, self.addr(), len, direction, access);
        }
        access(self.addr)
    }

    /// Copies `count` bytes to the beginning of `buf`.
    ///
    /// # Safety
    ///
    /// The bytes are a guest operand (see [`access`]), and `buf` has as many.
    #[inline(always)]
    pub(super) unsafe fn read(self, buf: &mut [u8], count: usize) -> Result<(), Fault> {
        if let Some(memory) = self.on_demand {
            debug_assert!(count <= buf.len());
            let buf = buf.get_mut(..count).unwrap_or_default();
            return on_demand::read(memory, self.addr(), buf);
        }
        // SAFETY: the `count` bytes are a guest operand, and `buf` has as many (this function's
        // contract). The two do not overlap: no Rust reference to bytes covers a guest operand.
        unsafe { access::copy_from_guest(buf.as_mut_ptr(), self.addr, count) }
    }

    /// Copies the first `count` bytes of `buf`.
    ///
    /// # Safety
    ///
    /// The bytes are a guest operand (see [`access`]), and `buf` has as many.
    #[inline(always)]
    pub(super) unsafe fn write(self, buf: &[u8], count: usize) -> Result<(), Fault> {
        if let Some(memory) = self.on_demand {
            debug_assert!(count <= buf.len());
            let buf = buf.get(..count).unwrap_or_default();
            return on_demand::write(memory, self.addr(), buf);
        }
        // SAFETY: the `count` bytes are a guest operand, and `buf` has as many (this function's
        // contract). The two do not overlap: no Rust reference to bytes covers a guest operand.
        unsafe { access::copy_to_guest(self.addr, buf.as_ptr(), count) }
    }

    /// Copies `count` elements to the beginning of `buf`.
    ///
    /// # Safety
    ///
    /// The elements are a guest operand (see [`access`]) whose size does not overflow, and `buf`
    /// has as many.
    #[inline(always)]
    pub(super) unsafe fn read_elements<T: ByteValued>(
        self,
        buf: &mut [T],
        count: usize,
    ) -> Result<(), Fault> {
        if let Some(memory) = self.on_demand {
            // SAFETY: `buf` has `count` elements, whose size does not overflow (this function's
            // contract).
            return unsafe {
                on_demand::read_elements(memory, self.addr(), buf.as_mut_ptr(), count)
            };
        }
        // SAFETY: the `count` elements are a guest operand whose size does not overflow, and `buf`
        // has as many (this function's contract). The two do not overlap: no Rust reference to
        // bytes covers a guest operand.
        unsafe { access::copy_elements_from_guest(buf.as_mut_ptr(), self.addr, count) }
    }

    /// Copies the first `count` elements of `buf`.
    ///
    /// # Safety
    ///
    /// The elements are a guest operand (see [`access`]) whose size does not overflow, and `buf`
    /// has as many.
    #[inline(always)]
    pub(super) unsafe fn write_elements<T: ByteValued>(
        self,
        buf: &[T],
        count: usize,
    ) -> Result<(), Fault> {
        if let Some(memory) = self.on_demand {
            // SAFETY: `buf` has `count` elements, whose size does not overflow (this function's
            // contract).
            return unsafe { on_demand::write_elements(memory, self.addr(), buf.as_ptr(), count) };
        }
        // SAFETY: the `count` elements are a guest operand whose size does not overflow, and `buf`
        // has as many (this function's contract). The two do not overlap: no Rust reference to
        // bytes covers a guest operand.
        unsafe { access::copy_elements_to_guest(self.addr, buf.as_ptr(), count) }
    }

    /// Sets `count` bytes to `value`.
    ///
    /// # Safety
    ///
    /// The bytes are a guest operand (see [`access`]).
    #[inline(always)]
    pub(super) unsafe fn fill(self, value: u8, count: usize) -> Result<(), Fault> {
        if let Some(memory) = self.on_demand {
            let fill = |dst, _, len| {
                // SAFETY: `dst` is a guest operand of `len` bytes: a new mapping, which only this
                // function and the guest access.
                unsafe { access::fill_guest(dst, value, len) }
            };
            return on_demand::pieces(memory, self.addr(), count, Direction::Write, fill);
        }
        // SAFETY: the `count` bytes are a guest operand (this function's contract).
        unsafe { access::fill_guest(self.addr, value, count) }
    }

    /// Copies `count` bytes to `target`. The ranges may overlap.
    ///
    /// # Safety
    ///
    /// Both ranges are guest operands (see [`access`]).
    #[inline(always)]
    pub(super) unsafe fn copy_to(self, target: Location<'_>, count: usize) -> Result<(), Fault> {
        if self.on_demand.is_some() || target.on_demand.is_some() {
            // SAFETY: both ranges are guest operands (this function's contract).
            return unsafe { self.copy_in_pieces(target, count) };
        }
        // SAFETY: both ranges are guest operands of `count` bytes (this function's contract).
        unsafe { access::copy_within_guest(target.addr, self.addr, count) }
    }

    /// Copies `count` bytes to `target`, if at least one of the two is mapped for each access.
    ///
    /// # Safety
    ///
    /// Both ranges are guest operands (see [`access`]).
    #[cold]
    #[inline(never)]
    unsafe fn copy_in_pieces(self, target: Location<'_>, count: usize) -> Result<(), Fault> {
        if let (Some(memory), Some(other)) = (self.on_demand, target.on_demand) {
            let distance = self.addr().abs_diff(target.addr());
            if memory.is_same(other) && distance < count {
                return on_demand::copy_overlapping(memory, target.addr(), self.addr(), count);
            }
        }
        self.pieces(count, Direction::Read, |src, before, len| {
            let target = target.wrapping_add(before);
            target.pieces(len, Direction::Write, |dst, done, len| {
                // SAFETY: `src + done` and `dst` are guest operands of `len` bytes: each is a part
                // of a new mapping, or of the range of this function's contract.
                unsafe { access::copy_within_guest(dst, src.wrapping_add(done), len) }
            })
        })
    }

    /// Runs `access` on the `len` bytes at this location: in pieces, or at once if they are mapped.
    fn pieces(
        self,
        len: usize,
        direction: Direction,
        mut access: impl FnMut(*mut u8, usize, usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        match self.on_demand {
            Some(memory) => on_demand::pieces(memory, self.addr(), len, direction, access),
            None => access(self.addr, 0, len),
        }
    }
}

impl Debug for Location<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&self.addr, f)
    }
}
