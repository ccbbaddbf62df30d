//! Each cause of a fault returns an error: protection, huge pages, userfaultfd, memory errors.

use std::os::fd::AsRawFd;

use super::*;
use test_support::{emulator, skipped, HugePages};
use vm_memory::fault::{self, Direction};
use vm_memory::{Bytes, GuestRegionMmap, VolatileMemory};

#[test]
fn write_to_read_only_page_returns_efault() {
    fault::install().unwrap();
    let (memory, _file) = shared(1);
    protect(&memory, 0, libc::PROT_READ);
    assert!(is_efault(&memory.write_obj(1u32, BASE).unwrap_err()));
    assert_eq!(fault::last().unwrap().direction, Direction::Write);
    assert_eq!(fault::last().unwrap().guest_address, Some(BASE));
    assert_eq!(memory.read_obj::<u32>(BASE).unwrap(), 0);
}

#[test]
fn access_with_empty_huge_page_pool_returns_error() {
    let test = "access_with_empty_huge_page_pool_returns_error";
    fault::install().unwrap();
    // SAFETY: the name is a C string.
    let fd =
        unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    if fd < 0 {
        return skipped(test, "no huge pages of 2 MiB on this machine");
    }
    // SAFETY: the descriptor is new and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    // More than any pool has; it can be mapped because of MAP_NORESERVE.
    let size = 1usize << 40;
    file.set_len(size as u64).unwrap();
    // Keeps other tests from adding pages to the pool.
    let Some(pool) = HugePages::lock(test) else {
        return;
    };
    if pool.total() > 0 {
        let why = format!("the pool of huge pages has {} pages", pool.total());
        return skipped(test, why);
    }
    let region = GuestRegionMmap::<()>::from_range(BASE, size, Some(FileOffset::new(file, 0)));
    if let (Err(error), Some(emulator)) = (&region, emulator()) {
        // The emulator chooses addresses that are aligned to small pages only.
        return skipped(test, format!("{emulator:?} cannot map huge pages: {error}"));
    }
    let region = region.unwrap();
    let slice = region.as_volatile_slice();
    assert!(slice.read_obj::<u64>(1 << 30).is_err());
    assert!(slice.write(&[1; 100], 5).is_err());
}

#[test]
fn access_to_userfaultfd_page_with_sigbus_returns_efault() {
    // The type of request numbers differs between glibc and musl.
    const UFFD_API: u64 = 0xaa;
    const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
    const UFFDIO_API: u32 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u32 = 0xc020_aa00;
    const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

    fault::install().unwrap();
    // SAFETY: userfaultfd(2) accesses no memory of this program.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return skipped(
            "access_to_userfaultfd_page_with_sigbus_returns_efault",
            format!("no userfaultfd: {error}"),
        );
    }
    // SAFETY: the descriptor is new and has no other owner.
    let userfaultfd = unsafe { File::from_raw_fd(fd as i32) };
    let mut api = [UFFD_API, UFFD_FEATURE_SIGBUS, 0];
    // SAFETY: `struct uffdio_api` is three 64-bit numbers (Linux,
    // include/uapi/linux/userfaultfd.h).
    let status = unsafe { libc::ioctl(userfaultfd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) };
    assert_eq!(status, 0);
    let memory = Memory::from_ranges(&[(BASE, 4 * PAGE)]).unwrap();
    let host = memory.get_host_address(BASE).unwrap() as u64;
    let mut register = [host, 4 * PAGE as u64, UFFDIO_REGISTER_MODE_MISSING, 0];
    // SAFETY: `struct uffdio_register` is four 64-bit numbers; only this test uses the range.
    let status = unsafe {
        libc::ioctl(
            userfaultfd.as_raw_fd(),
            UFFDIO_REGISTER as _,
            register.as_mut_ptr(),
        )
    };
    assert_eq!(status, 0);
    assert!(is_efault(&memory.read_obj::<u64>(BASE).unwrap_err()));
    assert!(is_efault(
        &memory
            .write_slice(&[1; 5000], GuestAddress(BASE.0 + 100))
            .unwrap_err()
    ));
    assert_eq!(
        fault::last().unwrap().guest_address,
        Some(GuestAddress(BASE.0 + 100))
    );
}

/// A child process poisons the page, because the kernel may kill the process that does so.
#[test]
fn access_to_poisoned_page_returns_efault() {
    let test = "access_to_poisoned_page_returns_efault";
    fault::install().unwrap();
    let (memory, _file) = shared(3);
    memory.write_slice(&[7; 3 * PAGE], BASE).unwrap();
    let host = memory.get_host_address(BASE).unwrap().wrapping_add(PAGE);
    // SAFETY: the child calls only async-signal-safe functions (signal-safety(7)).
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: the page is of a mapping that only this test uses.
        let status = unsafe { libc::madvise(host.cast(), PAGE, libc::MADV_HWPOISON) };
        let code = match status {
            0 => 0,
            _ => std::io::Error::last_os_error().raw_os_error().unwrap_or(1),
        };
        // SAFETY: `_exit(2)` ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) != 0 {
        let error = std::io::Error::from_raw_os_error(libc::WEXITSTATUS(status));
        return skipped(test, format!("the kernel cannot poison a page: {error}"));
    }
    if let Some(emulator) = emulator() {
        let why = format!("{emulator:?} ignores MADV_HWPOISON");
        return skipped(test, why);
    }
    // The kernel reports the byte, or the start of the page.
    let gone = GuestAddress(BASE.0 + PAGE as u64 + 100);
    assert!(is_efault(&memory.read_obj::<u64>(gone).unwrap_err()));
    assert!(is_efault(
        &memory.read_slice(&mut [0; 300], gone).unwrap_err()
    ));
    let fault = fault::last().unwrap();
    assert_eq!((fault.guest_address, fault.completed), (Some(gone), 0));
    let mut buf = vec![0; 2 * PAGE];
    assert_eq!(memory.read(&mut buf, BASE).unwrap(), PAGE);
    assert_eq!(buf[..PAGE], [7; PAGE]);
    assert_eq!(
        memory
            .read_obj::<u8>(GuestAddress(BASE.0 + 2 * PAGE as u64))
            .unwrap(),
        7
    );
}

/// A loop device, which is detached on drop.
struct LoopDevice(File);

impl LoopDevice {
    /// Attaches a free loop device to `file`.
    fn attach(file: &File) -> std::io::Result<Self> {
        const LOOP_CTL_GET_FREE: u32 = 0x4c82;
        const LOOP_SET_FD: u32 = 0x4c00;
        let result = |status: i32| match status {
            -1 => Err(std::io::Error::last_os_error()),
            number => Ok(number),
        };
        let both = || File::options().read(true).write(true).clone();
        let control = both().open("/dev/loop-control")?;
        // Another process may attach the free device first.
        let mut busy = std::io::Error::from_raw_os_error(libc::EBUSY);
        for _ in 0..10 {
            // SAFETY: the request has no argument.
            let number =
                result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) })?;
            let device = both().open(format!("/dev/loop{number}"))?;
            // SAFETY: the argument of the request is a descriptor.
            let status =
                unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD as _, file.as_raw_fd()) };
            match result(status) {
                Ok(_) => return Ok(Self(device)),
                Err(error) => busy = error,
            }
        }
        Err(busy)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        const LOOP_CLR_FD: u32 = 0x4c01;
        // SAFETY: the request has no argument.
        unsafe { libc::ioctl(self.0.as_raw_fd(), LOOP_CLR_FD as _) };
    }
}

/// `fstat(2)` does not return the length of a device, so the region is mapped.
#[test]
fn access_past_end_of_block_device_returns_efault() {
    fault::install().unwrap();
    let device = match LoopDevice::attach(&memfd(2)) {
        Ok(device) => device,
        Err(error) => {
            let test = "access_past_end_of_block_device_returns_efault";
            return skipped(test, format!("no loop device: {error}"));
        }
    };
    let backing = FileOffset::new(device.0.try_clone().unwrap(), 0);
    let memory = Memory::from_ranges_with_files([(BASE, 4 * PAGE, Some(backing))]).unwrap();
    let gone = GuestAddress(BASE.0 + 2 * PAGE as u64);
    memory.write_obj(7u64, GuestAddress(gone.0 - 8)).unwrap();
    assert!(is_efault(&memory.read_obj::<u64>(gone).unwrap_err()));
    assert!(is_efault(&memory.write_obj(7u64, gone).unwrap_err()));
    assert_eq!(fault::last().unwrap().guest_address, Some(gone));
    assert_eq!(memory.read(&mut [0; 4 * PAGE], BASE).unwrap(), 2 * PAGE);
}
