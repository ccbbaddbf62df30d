//! The C symbols that the test program defines, and the device that each call is for.

#![expect(unsafe_code, reason = "takes the place of functions of the C library")]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use libc::{c_int, c_long, c_void, off_t, size_t};

use super::kernel::Kernel;
use super::memory::{self, Place};
use super::numbers::{GRANT_COPY, MAP_GRANT_REF, MMAPBATCH_V2, PROBE, PROBED, UNMAP_GRANT_REF};

/// Defines the C symbols `ioctl`, `mmap`, `munmap` and `sysconf` of a test program. Each test
/// program that creates a [`Double`](crate::double::Double) uses it once.
#[macro_export]
macro_rules! interpose {
    () => {
        mod interposed {
            #![expect(unsafe_code, reason = "defines C symbols")]

            use std::ffi::{c_int, c_long, c_ulong, c_void};

            use $crate::double::hooks;

            /// # Safety
            ///
            /// The arguments are valid for ioctl(2).
            #[no_mangle]
            unsafe extern "C" fn ioctl(
                fd: c_int,
                request: c_ulong,
                argument: *mut c_void,
            ) -> c_int {
                // SAFETY: the caller passes what ioctl(2) needs.
                unsafe { hooks::ioctl(fd, request as u32, argument) }
            }

            /// # Safety
            ///
            /// The arguments are valid for mmap(2).
            #[no_mangle]
            unsafe extern "C" fn mmap(
                addr: *mut c_void,
                len: usize,
                prot: c_int,
                flags: c_int,
                fd: c_int,
                offset: i64,
            ) -> *mut c_void {
                // SAFETY: the caller passes what mmap(2) needs.
                unsafe { hooks::mmap(addr, len, prot, flags, fd, offset) }
            }

            /// # Safety
            ///
            /// The arguments are valid for munmap(2).
            #[no_mangle]
            unsafe extern "C" fn munmap(addr: *mut c_void, len: usize) -> c_int {
                // SAFETY: the caller passes what munmap(2) needs.
                unsafe { hooks::munmap(addr, len) }
            }

            #[no_mangle]
            extern "C" fn sysconf(name: c_int) -> c_long {
                hooks::sysconf(name)
            }
        }
    };
}

/// The device that a memfd represents.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Device {
    Gntdev,
    Privcmd,
}

type Shared = Arc<Mutex<Kernel>>;

/// Devices by file system and inode.
type Devices = HashMap<(u64, u64), (Device, Shared)>;

static DEVICES: LazyLock<Mutex<Devices>> = LazyLock::new(Mutex::default);

thread_local! {
    /// The page size that this thread sees, if it is not that of the system.
    static PAGE_SIZE: Cell<Option<usize>> = const { Cell::new(None) };
    static COUNTING: RefCell<Option<Shared>> = const { RefCell::new(None) };
}

/// A thread whose calls of `mmap` count as calls to an environment. Created by
/// [`Double::on_this_thread`](super::Double::on_this_thread).
#[derive(Debug)]
pub struct Scope(());

impl Scope {
    pub(super) fn new(kernel: &Shared) -> Self {
        COUNTING.with(|counting| *counting.borrow_mut() = Some(Arc::clone(kernel)));
        Self(())
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        COUNTING.with(|counting| counting.borrow_mut().take());
    }
}

fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn register(file: &File, device: Device, kernel: &Shared) -> io::Result<()> {
    let inode = memory::inode(file.as_raw_fd()).ok_or_else(io::Error::last_os_error)?;
    locked(&DEVICES).insert(inode, (device, Arc::clone(kernel)));
    Ok(())
}

pub(super) fn forget(file: &File) {
    if let Some(inode) = memory::inode(file.as_raw_fd()) {
        locked(&DEVICES).remove(&inode);
    }
}

/// Returns whether the program's `ioctl`, `mmap` and `munmap` are those of the double.
pub(super) fn is_interposed(file: &File) -> bool {
    let fd = file.as_raw_fd();
    // SAFETY: the request takes no argument, and the kernel does not know it.
    let probed = unsafe { libc::ioctl(fd, PROBE.into(), std::ptr::null_mut::<c_void>()) };
    // SAFETY: without `MAP_FIXED`, no memory is replaced. The double refuses the call, because no
    // grant is in the table.
    let mapped = unsafe {
        let protection = libc::PROT_READ;
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    probed == PROBED && mapped == libc::MAP_FAILED
}

/// Returns the device of a descriptor, its environment, and the number of its open file.
fn device(fd: c_int) -> Option<(Device, Shared, u64)> {
    let inode = memory::inode(fd)?;
    let devices = locked(&DEVICES);
    let (device, kernel) = devices.get(&inode)?;
    Some((*device, Arc::clone(kernel), inode.1))
}

fn result<T>(result: Result<T, i32>, failed: T) -> T {
    result.unwrap_or_else(|errno| {
        memory::set_errno(errno);
        failed
    })
}

/// Replaces `ioctl`.
///
/// # Safety
///
/// The arguments are valid for ioctl(2).
pub unsafe fn ioctl(fd: c_int, request: u32, argument: *mut c_void) -> c_int {
    let of_xen = matches!(request >> 8 & 0xff, 0x47 | 0x50);
    let Some((device, kernel, number)) = of_xen.then(|| device(fd)).flatten() else {
        // SAFETY: the caller passes what the request needs.
        return result(unsafe { memory::ioctl(fd, request, argument) }, -1);
    };
    let mut kernel = locked(&kernel);
    let done = match (device, request) {
        (_, PROBE) => return PROBED,
        // SAFETY: the caller passes what the request needs.
        (Device::Gntdev, MAP_GRANT_REF) => unsafe { kernel.map_grants(number, argument) },
        // SAFETY: the caller passes what the request needs.
        (Device::Gntdev, UNMAP_GRANT_REF) => unsafe { kernel.unmap_grants(number, argument) },
        // SAFETY: the caller passes what the request needs.
        (Device::Gntdev, GRANT_COPY) => unsafe { kernel.copy_grants(argument) },
        // SAFETY: the caller passes what the request needs.
        (Device::Privcmd, MMAPBATCH_V2) => unsafe { kernel.map_frames(argument) },
        _ => {
            kernel.log.mistake(format!("unknown request {request:#x}"));
            Err(libc::ENOTTY)
        }
    };
    result(done.map(|()| 0), -1)
}

/// Replaces `mmap`.
///
/// # Safety
///
/// The arguments are valid for mmap(2).
pub unsafe fn mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let place = Place {
        addr: addr.expose_provenance(),
        len,
        prot,
        flags,
    };
    let named = (fd >= 0).then(|| device(fd)).flatten();
    let mapped = match named {
        Some((Device::Gntdev, kernel, number)) => {
            let mut kernel = locked(&kernel);
            // SAFETY: the caller passes what mmap(2) needs.
            let mapped = unsafe { kernel.mmap_grants(number, place, offset) };
            if mapped.is_err() && flags & libc::MAP_FIXED != 0 {
                // SAFETY: with `MAP_FIXED`, the caller gave up the memory at the place.
                unsafe { kernel.take_hole(place) };
            }
            mapped
        }
        Some((Device::Privcmd, kernel, _)) => {
            // SAFETY: the caller passes what mmap(2) needs.
            unsafe { locked(&kernel).mmap_frames(fd, place) }
        }
        // SAFETY: the caller passes what mmap(2) needs.
        None => enter_other().and_then(|()| unsafe { memory::mmap(place, fd, offset) }),
    };
    let mapped = mapped.map(std::ptr::with_exposed_provenance_mut);
    result(mapped, libc::MAP_FAILED)
}

/// Records a call that is not for a device, on a thread that counts these.
fn enter_other() -> Result<(), i32> {
    let counting = COUNTING.try_with(|counting| counting.borrow().clone());
    match counting {
        Ok(Some(kernel)) => locked(&kernel).log.enter_other(),
        _ => Ok(()),
    }
}

/// Replaces `munmap`.
///
/// # Safety
///
/// The arguments are valid for munmap(2).
pub unsafe fn munmap(addr: *mut c_void, len: size_t) -> c_int {
    let start = addr.expose_provenance();
    let memory = start..start.saturating_add(len);
    let kernels: Vec<_> = locked(&DEVICES)
        .values()
        .map(|(_, kernel)| Arc::clone(kernel))
        .collect();
    for kernel in kernels {
        let mut kernel = locked(&kernel);
        kernel.check_holes(&memory);
        let grants = kernel.unmap_areas(&memory);
        let done = grants.and_then(|_| kernel.unmap_foreign(&memory));
        if let Err(errno) = done {
            return result(Err(errno), -1);
        }
    }
    // SAFETY: the caller passes what munmap(2) needs.
    result(unsafe { memory::munmap(start, len) }.map(|()| 0), -1)
}

/// Sets the page size that this thread sees, or `None` for that of the system.
pub(super) fn set_page_size(size: Option<usize>) {
    PAGE_SIZE.set(size);
}

/// Takes the place of `sysconf`.
pub fn sysconf(name: c_int) -> c_long {
    let set = PAGE_SIZE.get().filter(|_| name == libc::_SC_PAGESIZE);
    if let Some(size) = set.and_then(|size| c_long::try_from(size).ok()) {
        return size;
    }
    type Sysconf = extern "C" fn(c_int) -> c_long;
    // SAFETY: the name is a C string.
    let symbol = unsafe { libc::dlsym(libc::RTLD_NEXT, c"sysconf".as_ptr()) };
    // SAFETY: the C library defines the symbol with this type. A null pointer is `None`.
    let next = unsafe { std::mem::transmute::<*mut c_void, Option<Sysconf>>(symbol) };
    next.map_or(-1, |next| next(name))
}
