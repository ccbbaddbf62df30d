//! [`LockedFile`]: a file whose kernel lock is held by another thread.

#![expect(unsafe_code, reason = "makes the system calls of userfaultfd(2)")]

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::thread::JoinHandle;

use crate::lazy_pages::registered;
use crate::{skipped, PAGE};

/// A file whose lock in the kernel (`i_rwsem`) is held until this is dropped.
///
/// A thread writes to the file. It holds the lock and waits for the page of its buffer, which a
/// userfaultfd does not fill. The write ends at the drop: the first page of the file is then zero.
#[derive(Debug)]
pub struct LockedFile {
    /// Closing it lets the kernel fill the page.
    pages: Option<File>,
    writer: Option<JoinHandle<()>>,
}

impl LockedFile {
    /// Locks a file. Reports `test` as [skipped] and returns `None` if the system refuses that.
    pub fn lock(file: &File, test: &str) -> Option<Self> {
        match file.try_clone().and_then(Self::try_lock) {
            Ok(locked) => Some(locked),
            Err(error) => {
                skipped(test, format!("no userfaultfd: {error}"));
                None
            }
        }
    }

    fn try_lock(file: File) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: without MAP_FIXED, mmap(2) chooses addresses that are not in use.
        let buffer = unsafe { libc::mmap(null_mut(), PAGE, libc::PROT_READ, flags, -1, 0) };
        if buffer == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let buffer = buffer.addr();
        // SAFETY: the range was just mapped, and is never unmapped. No Rust reference covers it.
        let pages = unsafe { registered(buffer, PAGE) }?;
        let writer = std::thread::spawn(move || {
            let buffer: *const libc::c_void = std::ptr::with_exposed_provenance(buffer);
            // SAFETY: the kernel reads `PAGE` bytes at `buffer`, which stay mapped.
            unsafe { libc::pwrite(file.as_raw_fd(), buffer, PAGE, 0) };
        });
        let mut fault = libc::pollfd {
            fd: pages.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // The kernel reads the buffer after it has locked the file.
        // SAFETY: poll(2) reads and writes one structure at its argument.
        let ready = unsafe { libc::poll(&raw mut fault, 1, 60_000) };
        assert_eq!(ready, 1, "the write does not wait for its buffer");
        Ok(Self {
            pages: Some(pages),
            writer: Some(writer),
        })
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        drop(self.pages.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}
