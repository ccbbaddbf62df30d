//! [`Process`]: distinguishes a process from its children of fork(2).

use std::io::{Error, Result};
use std::ptr::{null_mut, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use super::{check, page_size, READ_WRITE};

/// The identity of a process. A child of fork(2) has another identity than its parent. All threads
/// of a process, and a child of vfork(2), have the same.
///
/// A PID does not suffice: a process in another PID namespace, or a later child, can have the same
/// one. Comparing these identities also needs no system call.
///
/// ```text
///   CREATED  ordinary memory: fork(2) copies it      the last identity, which only grows
///   page     MADV_WIPEONFORK: fork(2) clears it      the identity of this process, or 0
/// ```
///
/// A child finds 0 in the page, and takes the next number. This number is higher than those of all
/// its ancestors, so the child detects copies of their objects. Two children of one parent may have
/// the same number, but neither has objects that the other one made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Process(u64);

static CREATED: AtomicU64 = AtomicU64::new(0);
/// The page, or null before its creation. It is never unmapped.
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());

impl Process {
    /// Returns the identity of the current process.
    ///
    /// The first call maps a page, which needs Linux 4.14.
    pub(super) fn current() -> Result<Self> {
        match page() {
            Some(page) => Ok(identity(page)),
            None => create_page().map(identity),
        }
    }

    /// Returns whether this is the current process. Makes no system call.
    pub(super) fn is_current(self) -> bool {
        page().is_some_and(|page| identity(page) == self)
    }

    #[cfg(test)]
    pub(super) fn other() -> Self {
        Self(u64::MAX)
    }
}

#[expect(clippy::disallowed_methods, reason = "the page is not guest memory")]
fn page() -> Option<&'static AtomicU64> {
    // Acquire: pairs with the release in `create_page`, after which the page is mapped.
    let page = NonNull::new(PAGE.load(Ordering::Acquire))?;
    // SAFETY: `create_page` stores only pointers to a readable and writable mapping that is aligned
    // to a page and never unmapped. The kernel has filled it with zeroes, which are a valid
    // `AtomicU64`. A child also has the mapping: `MADV_WIPEONFORK` only clears its bytes.
    Some(unsafe { page.as_ref() })
}

fn identity(page: &AtomicU64) -> Process {
    // Relaxed: each number stands for itself, and protects no other memory.
    let found = page.load(Ordering::Relaxed);
    if found != 0 {
        return Process(found);
    }
    let next = CREATED.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
    // Another thread may be first.
    let stored = page.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
    Process(stored.map_or_else(|other| other, |_| next))
}

fn create_page() -> Result<&'static AtomicU64> {
    let len = page_size();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: without MAP_FIXED, mmap(2) chooses addresses that are not in use.
    let addr = unsafe { libc::mmap(null_mut(), len, READ_WRITE, flags, -1, 0) };
    if addr == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    // SAFETY: the range is the mapping that mmap(2) has just made, whose address no other code
    // knows. The advice changes bytes of children only.
    let advised = check(unsafe { libc::madvise(addr, len, libc::MADV_WIPEONFORK) });
    // Release: pairs with the acquire in `page`.
    let is_first = advised.is_ok()
        && PAGE
            .compare_exchange(
                null_mut(),
                addr.cast(),
                Ordering::Release,
                Ordering::Relaxed,
            )
            .is_ok();
    if !is_first {
        // SAFETY: the range is the mapping that mmap(2) has made above. `PAGE` has another one or
        // none, so no other code knows its address.
        let _ = unsafe { libc::munmap(addr, len) };
    }
    advised?;
    page().ok_or_else(|| Error::from_raw_os_error(libc::ENOMEM))
}

/// Runs `child` in a child of fork(2), and returns whether it returns `true` within 20 seconds.
#[cfg(test)]
pub(crate) fn in_child(child: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child may allocate, as fork(3) of glibc leaves the allocator's locks free in it.
    // Callers use no other state of threads that the child lacks.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: alarm(2) sets a timer of the child, whose signal ends the child.
        let _ = unsafe { libc::alarm(20) };
        let code = libc::c_int::from(!child());
        // SAFETY: `_exit(2)` ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = -1;
    // SAFETY: waitpid(2) writes one number to its argument.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    waited == pid && status == 0
}

/// Runs `work` in a child as [`in_child`] does, after the main thread of the child has ended.
#[cfg(test)]
pub(crate) fn in_child_without_main_thread(work: impl FnOnce() -> bool + Send + 'static) -> bool {
    in_child(|| {
        std::thread::spawn(|| {
            // The file is empty after the main thread has ended.
            while std::fs::read("/proc/self/smaps").is_ok_and(|smaps| !smaps.is_empty()) {
                std::thread::yield_now();
            }
            let code = libc::c_int::from(!work());
            // SAFETY: `_exit(2)` ends the child.
            unsafe { libc::_exit(code) };
        });
        // SAFETY: exit(2) ends only this thread. The kernel does not unmap its stack.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
        false
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_of_children_differs_from_that_of_all_ancestors() {
        let parent = Process::current().unwrap();
        assert!(parent.is_current());
        let child = || {
            let child = Process::current().unwrap();
            !parent.is_current()
                && child.is_current()
                && in_child(|| !parent.is_current() && !child.is_current())
        };
        assert!(in_child(child));
        assert!(in_child(child));
        assert_eq!(Process::current().unwrap(), parent);
    }
}
