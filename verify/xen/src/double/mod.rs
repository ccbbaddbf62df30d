//! [`Double`]: the devices of Xen inside the test program.
//!
//! ```text
//!   library ── ioctl, mmap, munmap ──► hooks ──► Kernel      table, areas, grants, calls
//!                                        │          │
//!                                        └──────────┴──► the system, with memfds
//! ```
//!
//! A memfd holds the pages of the domain. Two kinds of empty memfds are the devices. The test
//! program defines the C symbols `ioctl`, `mmap` and `munmap` by [`interpose!`](crate::interpose).
//! So the library does not need to change. Calls that are not for a device go to the system.
//!
//! The double behaves as gntdev and privcmd of Linux 6.1 on Xen 4.17, on both kinds of
//! [`Host`](crate::environment::Host).

mod call_log;
mod foreign;
mod grants;
pub mod hooks;
mod kernel;
pub(crate) mod memory;
mod numbers;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use call_log::{Call, Injection};

use crate::environment::{Access, Environment, Host, InUse, PAGE, PAGES};
use hooks::Device;
use kernel::Kernel;

/// The number of the domain in the double.
const DOMAIN: u32 = 7;

/// The frame of the first page of the domain in the double.
const FIRST_FRAME: u64 = 0x4_0000;

/// The devices of Xen inside the test program, and a domain.
#[derive(Debug)]
pub struct Double {
    kernel: Arc<Mutex<Kernel>>,
    /// The open devices, which keep their inode numbers in use.
    devices: Vec<File>,
}

impl Double {
    /// Creates a domain and its grants, as a host of one kind sees them.
    ///
    /// # Panics
    ///
    /// Panics if the test program does not use [`interpose!`](crate::interpose), or if a memfd
    /// cannot be created.
    #[must_use]
    pub fn new(host: Host) -> Self {
        let ram = memory::memfd("domain").expect("cannot create a memfd");
        let len = u64::try_from(PAGES * PAGE).expect("the pages fit");
        ram.set_len(len).expect("cannot resize a memfd");
        let mut double = Self {
            kernel: Arc::new(Mutex::new(Kernel::new(host, DOMAIN, FIRST_FRAME, ram))),
            devices: Vec::new(),
        };
        let device = double.gntdev().expect("cannot create a device");
        assert!(
            hooks::is_interposed(&device),
            "the test program does not use `interpose!`"
        );
        double.kernel().log.clear();
        double
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&mut self, device: Device) -> io::Result<File> {
        let file = memory::memfd("device")?;
        hooks::register(&file, device, &self.kernel)?;
        self.devices.push(file.try_clone()?);
        Ok(file)
    }

    /// Lets this thread's calls of `mmap` count as calls to the environment, until the result is
    /// dropped.
    ///
    /// A fault can then be injected into mappings that are not of a device.
    #[must_use]
    pub fn on_this_thread(&self) -> hooks::Scope {
        hooks::Scope::new(&self.kernel)
    }

    /// Returns the calls since the last [`forget_calls`](Self::forget_calls).
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.kernel().log.calls().to_vec()
    }

    /// Forgets the calls so far.
    pub fn forget_calls(&mut self) {
        self.kernel().log.clear();
    }

    /// Injects a fault into a call, or removes the fault with `None`.
    pub fn inject(&mut self, injection: Option<Injection>) {
        self.kernel().log.inject(injection);
    }

    /// Returns whether the injected fault has happened.
    #[must_use]
    pub fn is_injected(&self) -> bool {
        self.kernel().log.is_injected()
    }

    /// Returns the error of the injected fault, if there is one.
    #[must_use]
    pub fn injected_errno(&self) -> Option<i32> {
        self.kernel().log.injected_errno()
    }

    /// Grants `pages` pages by consecutive references, which may be more than the domain has.
    ///
    /// # Panics
    ///
    /// Panics if the system does not resize the memfd of the domain.
    pub fn grant_long_run(&mut self, first: u32, pages: usize) {
        let mut kernel = self.kernel();
        let len = u64::try_from(pages * PAGE).expect("the pages fit");
        kernel.ram().set_len(len).expect("cannot resize a memfd");
        for (reference, page) in (first..).zip(0..pages) {
            kernel.grant_any(reference, page, Access::ReadWrite);
        }
    }

    /// Makes a frame absent for a number of requests, like a frame that is paged out.
    pub fn page_out(&mut self, frame: u64, requests: u32) {
        self.kernel().page_out(frame, requests);
    }

    /// Simulates a host whose pages have `size` bytes, for calls of this thread, until the drop.
    ///
    /// Each grant takes a page of the host, of which only the first 4 KiB are accessible.
    pub fn set_host_page_size(&mut self, size: usize) {
        self.kernel().host_page = size;
        hooks::set_page_size(Some(size));
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        hooks::set_page_size(None);
        for device in &self.devices {
            hooks::forget(device);
        }
    }
}

impl Environment for Double {
    fn host(&self) -> Host {
        self.kernel().host
    }

    fn domain(&self) -> u32 {
        DOMAIN
    }

    fn gntdev(&mut self) -> io::Result<File> {
        self.open(Device::Gntdev)
    }

    fn privcmd(&mut self) -> io::Result<File> {
        self.open(Device::Privcmd)
    }

    fn frames(&self) -> Range<u64> {
        self.kernel().frames()
    }

    fn grant(&mut self, reference: u32, page: usize, access: Access) {
        self.kernel().grant(reference, page, access);
    }

    fn revoke(&mut self, reference: u32) {
        self.kernel().revoke(reference);
    }

    fn in_use(&self, reference: u32) -> InUse {
        self.kernel().in_use(reference)
    }

    fn read(&self, page: usize, offset: usize, bytes: &mut [u8]) {
        let at = u64::try_from(page * PAGE + offset).expect("the offset fits");
        let result = self.kernel().ram().read_exact_at(bytes, at);
        result.expect("cannot read the domain's memory");
    }

    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) {
        let at = u64::try_from(page * PAGE + offset).expect("the offset fits");
        let result = self.kernel().ram().write_all_at(bytes, at);
        result.expect("cannot write the domain's memory");
    }

    fn audit(&mut self) -> Vec<String> {
        self.kernel().audit()
    }

    fn as_double(&mut self) -> Option<&mut Double> {
        Some(self)
    }
}
