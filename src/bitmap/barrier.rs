//! The process-wide barrier: `membarrier(2)`.

use std::io;

#[cfg(test)]
std::thread_local! {
    /// The number of barriers that this thread has requested.
    pub(crate) static BARRIERS: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// Makes every running thread of this process execute a full memory barrier.
///
/// This is the heavy half of an asymmetric pair of barriers; the light half is a compiler fence in
/// the other threads. When the function returns, this thread sees all writes that precede the
/// barrier of another thread in program order. After its barrier, that thread sees all writes that
/// precede the call.
///
/// System calls: `membarrier(2)` with `MEMBARRIER_CMD_PRIVATE_EXPEDITED`, and for the first call in
/// a process also with `MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED`. The seccomp filters of many
/// VMMs do not allow it, so this crate makes the call only in functions whose documentation says
/// so.
///
/// # Examples
///
/// ```
/// # #[cfg(target_os = "linux")]
/// vm_memory::bitmap::process_wide_barrier()?;
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
///
/// Returns the error of `membarrier(2)`: `ENOSYS` before Linux 4.14, or the error that a seccomp
/// filter returns. On other systems, returns an error of the kind `Unsupported`.
#[doc(alias = "membarrier")]
#[doc(alias = "asymmetric fence")]
pub fn process_wide_barrier() -> io::Result<()> {
    #[cfg(test)]
    BARRIERS.set(BARRIERS.get().saturating_add(1));
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        match membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
            // The process is not registered yet.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
                membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
            }
            result => result,
        }
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(target_os = "linux", not(miri)))]
fn membarrier(command: libc::c_int) -> io::Result<()> {
    #[expect(unsafe_code, reason = "libc has no function for membarrier(2)")]
    // SAFETY: membarrier(2) takes a command, flags and a CPU number, none of which is a pointer,
    // and accesses no memory of the process.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
