//! The only code that reads or writes guest bytes.
//!
//! ```text
//!     volatile_memory
//!        │ read_value, load_ordered, copy_from_guest, …    this module: a fault becomes a `Fault`
//!        ▼
//!     RoutineSet, Register, Word                           the contract of each routine
//!        │
//!        ├── arch        assembly for x86_64 and aarch64, the fault table and the fault handler
//!        └── portable    relaxed atomics, for other targets, Miri and ThreadSanitizer: there,
//!                        `portable.rs` is the module `arch`
//! ```
//!
//! # Memory model
//!
//! Guest CPUs, devices in other processes and other threads of this process write guest memory at
//! any time. Plain accesses in Rust would race with them, and a data race is undefined behaviour.
//! The atomics of the standard library do not help: they must not have different sizes on the same
//! bytes.
//!
//! Assembly therefore moves guest bytes, at every size. To the language, each block of assembly is
//! a set of relaxed atomic accesses to single bytes, which may overlap in any way. Everything else
//! is a property of the instructions:
//!
//! 1. A naturally aligned access of 1, 2, 4 or 8 bytes is one instruction and is not torn. This
//!    holds for [`read_value`], [`write_value`], and each copy of exactly that size and alignment.
//! 2. [`copy_elements_from_guest`] and [`copy_elements_to_guest`] do not tear naturally aligned
//!    elements of 2, 4 or 8 bytes, and move them in ascending order. Elements in the same aligned
//!    32 bytes may move together, without an order among them. Elements of one byte are a bulk
//!    copy.
//! 3. [`load_ordered`], [`store_ordered`], [`fetch`] and [`compare_exchange`] have the requested
//!    ordering. The other functions are unordered, except that the compiler does not move one block
//!    of assembly across another.
//! 4. A bulk copy may move bytes in any order and more than once. It has executed all of its
//!    loads and stores before it returns. On x86_64, other processors see its stores before any
//!    later store of the same thread. On other processors, only a later store with release
//!    ordering, or a fence, orders them.
//!
//! The portable routines keep guarantees 1 to 4 on the processor. The documentation of `portable`
//! names the case that the language leaves undefined.
//!
//! # Contract
//!
//! All functions of this module share one contract:
//!
//! - A *guest operand* is a range that stays mapped for the access while the call lasts. No Rust
//!   reference (`&T`, `&mut T`, a slice) covers any of its bytes, except to atomics.
//!   Its pointer may also write, even if the call only reads: it does not come from a shared
//!   reference. The portable routines create references to atomics, which need that.
//! - A host operand is valid for the access, as for a plain copy.
//!
//! The values of guest bytes are arbitrary. The functions check no bounds and mark nothing dirty;
//! the caller checks before the call and marks after it.
//!
//! # Faults
//!
//! A mapped page can become inaccessible: its file is truncated, or its memory is poisoned. With
//! the handler of [`fault`] installed, an access to such a page returns a [`Fault`]. Without it,
//! the signal kills the process, as for a plain copy.
//!
//! A routine returns the address that faulted and does not count. To find the count, the bytes
//! below that address are moved once more, in ascending order ([`recount`]). If the system reports
//! no address, the bytes are moved once more up to the first one that cannot be moved.

// First, so that the modules of processors can use its macros.
#[cfg(test)]
#[macro_use]
mod tests;

// Assembly is for ELF, for Mach-O without a fault table, and for COFF on x86_64. `cargo xtask
// emulate` compares the machine code of the routines in Mach-O files with that for Linux. Miri and
// ThreadSanitizer do not see what assembly accesses; `--cfg vm_memory_portable` serves the latter.
#[cfg_attr(
    not(all(
        any(target_arch = "x86_64", target_arch = "aarch64"),
        target_endian = "little",
        any(unix, all(windows, target_arch = "x86_64")),
        not(miri),
        not(vm_memory_portable)
    )),
    path = "portable.rs"
)]
mod arch;
mod atomic;
mod copy;
pub mod fault;
mod recount;
mod routine_set;
mod value;
mod within;

use core::num::NonZeroI32;

pub(crate) use atomic::{compare_exchange, fetch, load_ordered, store_ordered};
pub(crate) use copy::{
    copy_elements_from_guest, copy_elements_to_guest, copy_from_guest, copy_to_guest, fill_guest,
};
pub(crate) use routine_set::{Fetch, Word};
pub(crate) use value::{read_value, write_value};
pub(crate) use within::copy_within_guest;

/// A plain value: it consists of initialised bytes, and any bytes of its size are a value.
///
/// Each [`ByteValued`](trait@crate::ByteValued) type implements it. The trait keeps this module
/// independent of that one, which is built on it.
///
/// # Safety
///
/// The type has no padding, and every bit pattern of its size is a valid value.
pub(crate) unsafe trait Plain: Copy {}

/// The error number of an access to a bad address: `EFAULT`, which is the same on every Unix, or
/// `ERROR_NOACCESS` of Windows.
const EFAULT: NonZeroI32 = NonZeroI32::new(if cfg!(windows) { 998 } else { 14 }).expect("not zero");

/// An access that met an inaccessible page. [`fault::last`] returns the details.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    completed: usize,
    /// The error of mapping the page for the access, or `EFAULT` if it was mapped.
    #[cfg(feature = "xen")]
    errno: NonZeroI32,
}

impl Fault {
    /// Creates the fault of an access that moved `completed` bytes before it.
    fn after(completed: usize) -> Self {
        Self::with_errno(completed, EFAULT)
    }

    #[cfg_attr(
        not(feature = "xen"),
        expect(unused_variables, reason = "it is `EFAULT`")
    )]
    fn with_errno(completed: usize, errno: NonZeroI32) -> Self {
        Self {
            completed,
            #[cfg(feature = "xen")]
            errno,
        }
    }

    /// Creates the fault of memory that could not be mapped for an access, and records it.
    ///
    /// The memory has no host address: `addr` names its first byte. The access had moved
    /// `completed` bytes.
    #[cold]
    pub(crate) fn unmapped(
        addr: usize,
        direction: fault::Direction,
        completed: usize,
        error: &std::io::Error,
    ) -> Self {
        fault::record(addr.saturating_add(completed), direction, completed);
        let errno = error.raw_os_error().and_then(NonZeroI32::new);
        Self::with_errno(completed, errno.unwrap_or(EFAULT))
    }

    /// Records the fault again, for an access at `addr` that had moved `before` bytes.
    ///
    /// The memory has no host address: the fault was in a mapping of this access. A fault of the
    /// other direction was at the other operand of a copy, and keeps its address.
    #[cold]
    pub(crate) fn at_addr(
        mut self,
        addr: usize,
        direction: fault::Direction,
        before: usize,
    ) -> Self {
        let completed = before.saturating_add(self.completed);
        if fault::last().is_some_and(|last| last.direction == direction) {
            fault::record(addr.saturating_add(completed), direction, completed);
        } else {
            fault::add_completed(before);
        }
        self.completed = completed;
        self
    }

    /// Returns the error number of the access.
    pub(crate) fn errno(self) -> i32 {
        #[cfg(feature = "xen")]
        return self.errno.get();
        #[cfg(not(feature = "xen"))]
        EFAULT.get()
    }

    /// Returns the number of bytes moved before the fault, counted from the first byte.
    pub(crate) fn completed(self) -> usize {
        self.completed
    }
}
