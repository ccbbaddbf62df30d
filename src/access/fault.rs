//! Recovery from SIGBUS, SIGSEGV and SIGILL in accesses to guest memory, or from exceptions of
//! Windows.
//!
//! A mapped page can become inaccessible for several reasons:
//!
//! - its file is truncated, or its block device ends before it,
//! - its memory is poisoned, by a hardware error or `MADV_HWPOISON`,
//! - the pool of huge pages is empty,
//! - a userfaultfd raises SIGBUS,
//! - `mprotect(2)` or `VirtualProtect` removes a permission,
//! - it is donated to a protected guest, or private to one (pKVM, SEV-SNP, `guest_memfd`),
//! - its device does not support misaligned accesses,
//! - another hypervisor emulates it, but not for this instruction,
//! - Windows decommits it, or cannot read its file.
//!
//! An access to such a page normally kills the process. After [`install`], an access of this crate
//! returns an error instead.
//!
//! # Examples
//!
//! ```
//! # #[cfg(all(target_os = "linux", feature = "backend-mmap"))] {
//! use vm_memory::{fault, Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
//!
//! if fault::install().is_err() {
//!     return Ok(()); // not supported on this target
//! }
//! let file = tempfile::tempfile()?;
//! file.set_len(0x2_0000)?;
//! let start = GuestAddress(0x10_0000);
//! let backing = FileOffset::new(file.try_clone()?, 0);
//! let memory: GuestMemoryMmap =
//!     GuestMemoryMmap::from_ranges_with_files(&[(start, 0x2_0000, Some(backing))])?;
//!
//! // Another process truncates the file.
//! file.set_len(0x1_0000)?;
//! let mut buf = vec![0; 0x2_0000];
//! assert_eq!(memory.read(&mut buf, start)?, 0x1_0000);
//! assert!(memory.read_obj::<u64>(GuestAddress(0x11_0000)).is_err());
//!
//! let fault = fault::last().ok_or("no fault")?;
//! assert_eq!(fault.guest_address, Some(GuestAddress(0x11_0000)));
//! assert_eq!(fault.direction, fault::Direction::Read);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The program `examples/truncated_file.rs` shows more results.
//!
//! # Results of an access that faults
//!
//! - `read`, `write` and the other partial accesses return the number of bytes moved before the
//!   fault. If there are none, they return the error.
//! - All other accesses return an `IOError` with `raw_os_error() == Some(EFAULT)`. On Windows, the
//!   number is that of `ERROR_NOACCESS`.
//! - Methods that cannot fail (`VolatileRef::load`, `copy_to`) read zeroes or stop early.
//! - [`last`] returns the details to the thread that made the access.
//!
//! With the feature `xen`, an access may map its pages first. A page that cannot be mapped has the
//! same results, with the error number of the mapping in place of `EFAULT`. A page that is not
//! granted is `EINVAL`. No signal is involved, so this needs no handler.
//!
//! # The handler
//!
//! The handler acts on a signal only if all of these hold:
//!
//! 1. An instruction raised the signal (`si_code`).
//! 2. The interrupted instruction is one of this crate that accesses guest memory.
//! 3. The faulting address is in the guest operand of that instruction, or the system reports none.
//!
//! A general protection fault has no address, and neither has SIGILL. Then the first two conditions
//! decide. The other operand of the instruction, if there is one, is a slice or a value of the
//! program.
//!
//! All other signals go to the handler that was installed before, or have the default action.
//! Examples are a stack overflow, a host buffer in a guard page, `kill -BUS`, and a memory error
//! elsewhere.
//!
//! The handler reads the table of instructions and changes two registers. It does not allocate,
//! lock, or use thread-local storage.
//!
//! The kernel invokes the handler as it would have invoked the previous one: the same signals are
//! blocked. It runs on the alternate signal stack only if that handler asked for it (`SA_ONSTACK`).
//! If no handler was installed, it runs on the alternate stack, if the thread has one. The stack
//! must have room for the frame of a signal.
//!
//! # Windows
//!
//! The handler is a vectored exception handler, which the system calls before others. It acts on an
//! `EXCEPTION_ACCESS_VIOLATION`, an `EXCEPTION_IN_PAGE_ERROR` or an `EXCEPTION_ILLEGAL_INSTRUCTION`
//! under conditions 2 and 3. All other exceptions go on to the other handlers
//! (`EXCEPTION_CONTINUE_SEARCH`). A handler that was installed later as the first one, and that
//! handles these exceptions, prevents recovery. The sections about signals do not apply.
//!
//! # Signals that are sent
//!
//! The handler of Rust's standard library reports stack overflows. At any other signal, it sets the
//! default action and returns. If the signal was sent, such as by `kill -BUS`, the fault handler
//! then sets itself again. Between these two calls, a guest fault in another thread ends the
//! process.
//!
//! [`pass_on_sent_signals`] closes this window. Call it with `false`, unless the program has a
//! handler that needs sent signals. A handler that does not change the action opens no window.
//!
//! The fault handler cannot close the window by itself. A process has one action for a signal, and
//! each thread may set it. While the default action is set, the kernel ends the process at a fault.
//! The fault handler cannot distinguish the standard library's handler, which sets the default
//! action, from the program's own handler, which needs the signal. The standard library does not
//! publish the address of its handler. Calling a handler as a test would pass on a signal that was
//! never sent.
//!
//! # Limits
//!
//! - If a handler for SIGBUS, SIGSEGV or SIGILL is installed later and does not call the previous
//!   one, faults kill the process again.
//! - A thread must not block SIGBUS, SIGSEGV or SIGILL. The kernel kills a process that faults with
//!   the signal blocked. So a signal handler must not access guest memory: it may interrupt the
//!   fault handler, which runs with its signal blocked.
//! - Accesses through pointers (`ptr_guard`, `get_host_address`) and references (`aligned_as_ref`,
//!   `get_atomic_ref`) are not covered. System calls that use such pointers return `EFAULT`.
//! - `load` and `store` are not covered for a type that no register of 1, 2, 4 or 8 bytes holds:
//!   they use a reference. Only a type with its own `AtomicInteger` can be so large.
//! - Accesses in a shared object other than that of `install` are not covered (`dylib`,
//!   `prefer-dynamic`): each object has its own table. On Linux, the
//!   object must not be unloaded. On Windows, [`install`] keeps it loaded.
//! - On Windows, a vectored handler that is installed later may be called first. The first access
//!   to a page with `PAGE_GUARD` is not covered.
//! - On Windows, the handler changes the instruction pointer of the thread. Processes with
//!   hardware-enforced stack protection may validate it (`SetContextIpValidation`). Recovery in
//!   such a process is not tested.
//! - The targets are Linux on x86_64 and on little-endian aarch64, and Windows on x86_64, with one
//!   of the features `rawfd`, `backend-mmap` and `backend-bitmap`.
//!
//! # System calls
//!
//! [`install`] makes six calls of `rt_sigaction`. The handler returns by `rt_sigreturn`. For a
//! signal that is not a guest fault, it may also make:
//!
//! - `rt_sigaction`, to apply the default action, or to check and set its own,
//! - the calls of `raise(3)`: `tgkill`, `gettid`, and in some C libraries `getpid` and
//!   `rt_sigprocmask`.

use core::cell::Cell;
use core::sync::atomic::{AtomicBool, Ordering};

use super::arch::Routines;
use super::routine_set::RoutineSet;
use crate::address::GuestAddress;

/// The direction of an access. A field of [`LastFault`], which has an example.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Direction {
    /// From guest memory to the host.
    Read,
    /// From the host to guest memory.
    Write,
}

/// The details of an access that met an inaccessible page. Returned by [`last`].
///
/// # Examples
///
/// ```
/// use vm_memory::fault::{Direction, LastFault};
///
/// /// Describes a fault for the log of a device.
/// fn describe(fault: &LastFault) -> String {
///     let access = match fault.direction {
///         Direction::Read => "read",
///         Direction::Write => "write",
///     };
///     match fault.guest_address {
///         Some(addr) => format!("{access} of guest address {addr} failed"),
///         None => format!("{access} of host address {:#x} failed", fault.host_address),
///     }
/// }
///
/// if let Some(fault) = vm_memory::fault::last() {
///     // "read of guest address 0x110000 failed"
///     println!("{}", describe(&fault));
/// }
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct LastFault {
    /// The guest address of the byte that faulted, if the access was by guest address.
    ///
    /// Behind an IOMMU, this is an IOVA.
    pub guest_address: Option<GuestAddress>,
    /// The host address of the byte that faulted.
    ///
    /// If the system reports no address, the access is repeated to find the first byte that cannot
    /// be moved. For an atomic access, and for a copy whose progress is not known, it is the first
    /// byte of the access.
    ///
    /// Memory of a Xen guest that is mapped for each access has none. It is then the offset from
    /// the start of the first page of the region.
    pub host_address: usize,
    /// The direction of the access.
    ///
    /// For a copy within guest memory whose fault has no address, it is `Write`, although the fault
    /// may have been in the source.
    pub direction: Direction,
    /// The number of bytes moved before the fault.
    ///
    /// It counts from the start of the access in the region that contains the byte.
    ///
    /// It is 0 for a copy between overlapping ranges of guest memory whose destination is higher,
    /// or lower by less than 16 bytes. The progress of such a copy is not known.
    pub completed: usize,
}

std::thread_local! {
    /// Written after the handler has returned. The handler itself does not use it.
    static LAST: Cell<Option<LastFault>> = const { Cell::new(None) };
    /// The number of faults, which wraps.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Returns the last fault of an access by this thread, or `None` if there was none.
///
/// # Examples
///
/// ```
/// // No access of this thread has faulted.
/// assert!(vm_memory::fault::last().is_none());
/// ```
#[doc(alias = "si_addr")]
pub fn last() -> Option<LastFault> {
    LAST.get()
}

/// Makes accesses, and then restores the result of [`last`].
///
/// Use it in [`Bitmap::mark_dirty`](crate::bitmap::Bitmap::mark_dirty) if the marks are in memory
/// that may fault, such as a log that a peer may truncate. The caller of the write then does not
/// mistake the fault of the mark for a fault of its own.
///
/// # Examples
///
/// ```
/// use vm_memory::fault;
///
/// let before = fault::last();
/// let is_marked = fault::keep_last(|| {
///     // Accesses that may fault, and whose results say whether they did.
///     true
/// });
/// assert!(is_marked && fault::last() == before);
/// ```
#[inline]
pub fn keep_last<R>(accesses: impl FnOnce() -> R) -> R {
    let (last, count) = (LAST.get(), COUNT.get());
    let result = accesses();
    LAST.set(last);
    COUNT.set(count);
    result
}

/// Returns the number of faults of this thread, which wraps.
#[inline]
pub(crate) fn count() -> u64 {
    COUNT.get()
}

/// Records a fault of this thread.
#[cold]
pub(super) fn record(host_address: usize, direction: Direction, completed: usize) {
    COUNT.set(COUNT.get().wrapping_add(1));
    LAST.set(Some(LastFault {
        guest_address: None,
        host_address,
        direction,
        completed,
    }));
}

/// Adds the bytes that a larger access had moved before the part that faulted.
#[cold]
pub(super) fn add_completed(before: usize) {
    if let Some(fault) = LAST.get() {
        LAST.set(Some(LastFault {
            completed: fault.completed.saturating_add(before),
            ..fault
        }));
    }
}

/// Adds the guest address to the last fault, which an access to `len` bytes met.
///
/// The bytes are at `guest` for the guest and at `host` in this process.
#[cold]
pub(crate) fn record_guest_address(guest: GuestAddress, host: *const u8, len: usize) {
    if let Some(fault) = LAST.get() {
        let offset = fault.host_address.wrapping_sub(host.addr());
        if let (true, Ok(offset)) = (offset < len, u64::try_from(offset)) {
            let guest_address = guest.0.checked_add(offset).map(GuestAddress);
            LAST.set(Some(LastFault {
                guest_address,
                ..fault
            }));
        }
    }
}

/// Installs the fault handler for the whole process. Further calls do nothing.
///
/// Call it after the program has installed its own handlers for SIGBUS, SIGSEGV and SIGILL, so that
/// it passes on their signals.
///
/// # Examples
///
/// ```
/// if let Err(error) = vm_memory::fault::install() {
///     eprintln!("a truncated file or a memory error will end the process: {error}");
/// }
/// ```
///
/// # Errors
///
/// - [`Unsupported`](std::io::ErrorKind::Unsupported) on targets other than those that the
///   [module](self#limits) names, or without the features that it names.
/// - An error of `sigaction(2)`, or of `GetModuleHandleExW` or `AddVectoredExceptionHandler`. A
///   later call tries again.
#[doc(alias = "SIGBUS")]
#[doc(alias = "SIGSEGV")]
#[doc(alias = "SIGILL")]
#[doc(alias = "pKVM")]
#[doc(alias = "guest_memfd")]
#[doc(alias = "sigaction")]
#[doc(alias = "truncate")]
#[doc(alias = "poison")]
#[doc(alias = "MADV_HWPOISON")]
#[doc(alias = "hwpoison")]
#[doc(alias = "MCE")]
#[doc(alias = "userfaultfd")]
#[doc(alias = "EFAULT")]
pub fn install() -> std::io::Result<()> {
    let install = Routines::INSTALL_FAULT_HANDLER.ok_or_else(|| {
        std::io::Error::new(
            std::io::ErrorKind::Unsupported,
            "cannot install the fault handler: it supports only Linux on x86_64 and aarch64, and \
             Windows on x86_64, with one of the features rawfd, backend-mmap and backend-bitmap",
        )
    })?;
    install()?;
    // Release: a thread that sees the flag sees the handler installed.
    INSTALLED.store(true, Ordering::Release);
    log_debug!("the fault handler is installed");
    Ok(())
}

/// Sets whether the previous handler receives each SIGBUS, SIGSEGV or SIGILL that was sent.
///
/// The default is `true`. A process can send a signal, as `kill -BUS` does. The kernel sends one to
/// report a memory error that no access has met.
///
/// With `false`, a sent signal ends the process, which is the default action. There are two
/// exceptions. A signal that was ignored before [`install`] stays ignored. The previous handler
/// still receives faults outside of guest memory, so stack overflows are reported.
///
/// Call it with `false` if the only previous handler is that of Rust's standard library. The module
/// documentation [explains why](self#signals-that-are-sent). It can be called before or after
/// [`install`], and again: the last call takes effect. It makes no system call. On targets without
/// a fault handler, it has no effect.
///
/// # Examples
///
/// ```
/// use vm_memory::fault;
///
/// // The program has installed no handler of its own.
/// fault::pass_on_sent_signals(false);
/// if let Err(error) = fault::install() {
///     eprintln!("a truncated file or a memory error will end the process: {error}");
/// }
/// ```
#[doc(alias = "kill")]
#[doc(alias = "SIG_DFL")]
pub fn pass_on_sent_signals(pass_on: bool) {
    // Relaxed: the flag protects no other memory.
    PASSES_ON_SENT_SIGNALS.store(pass_on, Ordering::Relaxed);
}

/// Whether sent signals go to the previous handler.
pub(super) static PASSES_ON_SENT_SIGNALS: AtomicBool = AtomicBool::new(true);

/// Whether a call of [`install`] has succeeded.
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Returns whether [`install`] has succeeded in this process.
///
/// Makes no system call. A handler that was installed later and does not call the previous one goes
/// unnoticed.
///
/// # Examples
///
/// ```
/// assert_eq!(vm_memory::fault::install().is_ok(), vm_memory::fault::is_installed());
/// ```
pub fn is_installed() -> bool {
    INSTALLED.load(Ordering::Acquire)
}
