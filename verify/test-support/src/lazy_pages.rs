//! [`LazyPages`]: a handler of userfaultfd(2) that fills pages from a snapshot.

#![expect(unsafe_code, reason = "makes the system calls of userfaultfd(2)")]

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::skipped;

// Linux, include/uapi/linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_API: u32 = 0xc018_aa3f;
const UFFDIO_REGISTER: u32 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u32 = 0x8010_aa01;
const UFFDIO_POISON: u32 = 0xc020_aa08;
const UFFDIO_COPY: u32 = 0xc028_aa03;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_EVENT_REMOVE: u8 = 0x15;

/// Memory whose missing pages a thread fills from a snapshot, with userfaultfd(2).
///
/// In the snapshot, all bytes are equal. Pages that the kernel reports as removed are filled with
/// zeroes instead, as a VMM does after a discard. Dropping this stops the thread.
#[derive(Debug)]
pub struct LazyPages {
    removed: Arc<Mutex<Vec<Range<usize>>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl LazyPages {
    /// Registers `len` bytes at `addr`, whose pages have `page` bytes, with a snapshot of `byte`.
    ///
    /// Reports `test` as [skipped] and returns `None` if the system refuses that.
    ///
    /// # Safety
    ///
    /// The range is mapped, and no Rust reference covers it.
    pub unsafe fn register(
        addr: usize,
        len: usize,
        page: usize,
        byte: u8,
        test: &str,
    ) -> Option<Self> {
        // SAFETY: the range is mapped and no Rust reference covers it (contract of `register`).
        let file = match unsafe { registered(addr, len) } {
            Ok(file) => file,
            Err(error) => {
                skipped(test, format!("no userfaultfd: {error}"));
                return None;
            }
        };
        let removed = Arc::new(Mutex::new(Vec::new()));
        let over = Arc::new(AtomicBool::new(false));
        let handler = Handler {
            file,
            page,
            byte,
            removed: Arc::clone(&removed),
            over: Arc::clone(&over),
        };
        Some(Self {
            removed,
            over,
            thread: Some(std::thread::spawn(move || handler.run())),
        })
    }

    /// Returns whether the kernel reports the page at a host address as removed within 5 seconds.
    ///
    /// The thread records an event shortly after the kernel has delivered it.
    pub fn is_removed(&self, addr: usize) -> bool {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let removed = self.removed.lock().unwrap();
            if removed.iter().any(|range| range.contains(&addr)) {
                return true;
            }
            drop(removed);
            if Instant::now() > until {
                return false;
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for LazyPages {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Creates a userfaultfd that reports removed pages, and registers a range for missing pages.
///
/// # Safety
///
/// The range is mapped, and no Rust reference covers it.
pub(crate) unsafe fn registered(addr: usize, len: usize) -> Result<File> {
    // SAFETY: the contract of this function.
    unsafe { registered_with(UFFD_FEATURE_EVENT_REMOVE, addr, len) }
}

/// Makes a missing page inaccessible, as a memory error does, with `UFFDIO_POISON` (Linux 6.6).
///
/// Reports `test` as [skipped] and returns `false` if the system refuses that.
///
/// # Safety
///
/// The page is mapped, and no Rust reference covers it.
pub unsafe fn poison(addr: usize, page: usize, test: &str) -> bool {
    let (start, len) = (addr as u64, page as u64);
    // SAFETY: the page is mapped and no Rust reference covers it (contract of this function).
    let poisoned = unsafe { registered_with(UFFD_FEATURE_POISON, addr, page) }.and_then(|file| {
        request(&file, UFFDIO_POISON, &mut [start, len, 0, 0])?;
        request(&file, UFFDIO_UNREGISTER, &mut [start, len])
    });
    if let Err(error) = &poisoned {
        skipped(test, format!("the kernel cannot poison a page: {error}"));
    }
    poisoned.is_ok()
}

/// Creates a userfaultfd with a feature, and registers a range for missing pages.
///
/// # Safety
///
/// The range is mapped, and no Rust reference covers it.
unsafe fn registered_with(feature: u64, addr: usize, len: usize) -> Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd(2) takes a number, and accesses no memory of this program.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    let file = unsafe { File::from_raw_fd(fd as RawFd) };
    request(&file, UFFDIO_API, &mut [UFFD_API, feature, 0])?;
    let mode = UFFDIO_REGISTER_MODE_MISSING;
    request(
        &file,
        UFFDIO_REGISTER,
        &mut [addr as u64, len as u64, mode, 0],
    )?;
    Ok(file)
}

/// Makes a request whose structure consists of 64-bit numbers.
fn request<const N: usize>(file: &File, request: u32, numbers: &mut [u64; N]) -> Result<()> {
    // The size of the structure is in bits 16 to 29.
    assert_eq!(request >> 16 & 0x3fff, (N * 8) as u32);
    // SAFETY: the structure of the request has the size of `numbers`, by the assertion. It changes
    // missing pages of the registered range only, which no Rust reference covers (`register`).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, numbers.as_mut_ptr()) };
    match result {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// Waits for a message, for at most 10 ms. Then the thread checks whether it must end.
fn wait_for_message(file: &File) {
    let mut ready = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: poll(2) reads and writes one structure at its argument. An early return does no harm.
    unsafe { libc::poll(&raw mut ready, 1, 10) };
}

struct Handler {
    file: File,
    page: usize,
    byte: u8,
    removed: Arc<Mutex<Vec<Range<usize>>>>,
    over: Arc<AtomicBool>,
}

impl Handler {
    fn run(mut self) {
        let mut missing: Vec<usize> = Vec::new();
        // `struct uffd_msg`.
        let mut message = [0u8; 32];
        while !self.over.load(Ordering::Relaxed) {
            match self.file.read(&mut message) {
                Ok(32) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // All removals are known, so pages can be filled.
                    missing.retain(|page| !self.fill(*page));
                    if missing.is_empty() {
                        wait_for_message(&self.file);
                    }
                    continue;
                }
                other => panic!("cannot read from the userfaultfd: {other:?}"),
            }
            let number =
                |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap()) as usize;
            match message[0] {
                UFFD_EVENT_PAGEFAULT => missing.push(number(16) / self.page * self.page),
                UFFD_EVENT_REMOVE => self.removed.lock().unwrap().push(number(8)..number(16)),
                other => panic!("unexpected event {other:#x}"),
            }
        }
    }

    /// Fills a page, and returns whether it is done.
    fn fill(&self, page: usize) -> bool {
        let is_removed = |range: &Range<usize>| range.contains(&page);
        let byte = if self.removed.lock().unwrap().iter().any(is_removed) {
            0
        } else {
            self.byte
        };
        let source = vec![byte; self.page];
        let mut copy = [page as u64, source.as_ptr() as u64, self.page as u64, 0, 0];
        match request(&self.file, UFFDIO_COPY, &mut copy) {
            Ok(()) => true,
            // Another thread is removing pages.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => false,
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => true,
            Err(error) => panic!("cannot fill a page: {error}"),
        }
    }
}
