//! A barrier in all threads of the process, by `membarrier(2)`.

use std::io;

#[cfg(test)]
std::thread_local! {
    /// How often this thread has asked for one.
    pub(crate) static ASKED_FOR: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// Has every thread of this process that is running go through a full memory barrier now.
///
/// What other threads had written before this was called, in the order of their programs, is seen by what this one reads when it has returned; what
/// this one wrote before is seen by whatever they read afterwards. It costs them nothing but the interruption, and this one a few microseconds.
///
/// System calls: `membarrier(2)` with `MEMBARRIER_CMD_PRIVATE_EXPEDITED`, and, the first time in a process, `MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED`.
/// Many seccomp filters of VMMs do not allow them, so nothing in this crate makes them unasked.
///
/// # Errors
///
/// What the kernel answers: `ENOSYS` before Linux 4.14. `Unsupported` on other systems.
///
/// ```
/// # #[cfg(target_os = "linux")]
/// vm_memory::bitmap::barrier_in_all_threads()?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn barrier_in_all_threads() -> io::Result<()> {
    #[cfg(test)]
    ASKED_FOR.with(|asked_for| asked_for.set(asked_for.get().saturating_add(1)));
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        match membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
            // Not registered yet.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
                membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
            }
            answer => answer,
        }
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(target_os = "linux", not(miri)))]
fn membarrier(command: libc::c_int) -> io::Result<()> {
    #[expect(
        unsafe_code,
        reason = "membarrier(2) has no form in libc but the system call"
    )]
    // SAFETY: the system call takes numbers (command, flags, CPU) and touches no memory of this process.
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
