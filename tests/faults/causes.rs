use std::os::fd::AsRawFd;

use super::*;
use test_support::{emulator, skipped, HugePages};
use vm_memory::fault::{self, Direction};
use vm_memory::{Bytes, GuestRegionMmap, VolatileMemory};

#[test]
fn a_page_that_may_be_read_only_refuses_writes() {
    fault::install().unwrap();
    let (memory, _file) = shared(1);
    protect(&memory, 0, libc::PROT_READ);
    assert!(is_efault(&memory.write_obj(1u32, BASE).unwrap_err()));
    assert_eq!(fault::last().unwrap().direction, Direction::Write);
    assert_eq!(fault::last().unwrap().guest_address, Some(BASE));
    assert_eq!(memory.read_obj::<u32>(BASE).unwrap(), 0);
}

#[test]
fn an_empty_pool_of_huge_pages_is_an_error() {
    let test = "an_empty_pool_of_huge_pages_is_an_error";
    fault::install().unwrap();
    // SAFETY: as in `memfd`.
    let fd =
        unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    if fd < 0 {
        return skipped(test, "no huge pages of 2 MiB on this machine");
    }
    // SAFETY: as in `memfd`.
    let file = unsafe { File::from_raw_fd(fd) };
    // More than any pool has; MAP_NORESERVE lets it be mapped all the same.
    let size = 1usize << 40;
    file.set_len(size as u64).unwrap();
    // It stays empty until this test is over.
    let Some(pool) = HugePages::lock(test) else {
        return;
    };
    if pool.total() > 0 {
        let why = format!("the pool of huge pages has {} pages", pool.total());
        return skipped(test, why);
    }
    let region = GuestRegionMmap::<()>::from_range(BASE, size, Some(FileOffset::new(file, 0)));
    if let (Err(error), Some(emulator)) = (&region, emulator()) {
        // It chooses addresses itself, at multiples of small pages.
        return skipped(test, format!("{emulator:?} cannot map huge pages: {error}"));
    }
    let region = region.unwrap();
    let slice = region.as_volatile_slice();
    assert!(slice.read_obj::<u64>(1 << 30).is_err());
    assert!(slice.write(&[1; 100], 5).is_err());
}

/// A region whose pages a userfaultfd answers for, with SIGBUS.
#[test]
fn a_userfaultfd_that_answers_with_sigbus_is_an_error() {
    // The numbers of requests are of one type in glibc and of another in musl.
    const UFFD_API: u64 = 0xaa;
    const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
    const UFFDIO_API: u32 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u32 = 0xc020_aa00;
    const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

    fault::install().unwrap();
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return skipped(
            "a_userfaultfd_that_answers_with_sigbus_is_an_error",
            format!("no userfaultfd: {error}"),
        );
    }
    // SAFETY: the descriptor was just made, and nobody else has it.
    let userfaultfd = unsafe { File::from_raw_fd(fd as i32) };
    let mut api = [UFFD_API, UFFD_FEATURE_SIGBUS, 0];
    // SAFETY: `struct uffdio_api` is three 64-bit numbers (Linux, include/uapi/linux/userfaultfd.h).
    let answer = unsafe { libc::ioctl(userfaultfd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) };
    assert_eq!(answer, 0);
    let memory = Memory::from_ranges(&[(BASE, 4 * PAGE)]).unwrap();
    let host = memory.get_host_address(BASE).unwrap() as u64;
    let mut register = [host, 4 * PAGE as u64, UFFDIO_REGISTER_MODE_MISSING, 0];
    // SAFETY: `struct uffdio_register` is four 64-bit numbers; the range is a mapping that only this test uses.
    let answer = unsafe {
        libc::ioctl(
            userfaultfd.as_raw_fd(),
            UFFDIO_REGISTER as _,
            register.as_mut_ptr(),
        )
    };
    assert_eq!(answer, 0);
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

/// A page with a memory error that an access runs into. The kernel is asked for one by a child, which it kills for having the page.
#[test]
fn a_poisoned_page_is_an_error() {
    let test = "a_poisoned_page_is_an_error";
    fault::install().unwrap();
    let (memory, _file) = shared(3);
    memory.write_slice(&[7; 3 * PAGE], BASE).unwrap();
    let host = memory.get_host_address(BASE).unwrap().wrapping_add(PAGE);
    // SAFETY: the child calls nothing but what is async-signal-safe (signal-safety(7)).
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: a page of a mapping that only this test uses.
        let answer = unsafe { libc::madvise(host.cast(), PAGE, libc::MADV_HWPOISON) };
        let code = match answer {
            0 => 0,
            _ => std::io::Error::last_os_error().raw_os_error().unwrap_or(1),
        };
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for the child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) != 0 {
        let error = std::io::Error::from_raw_os_error(libc::WEXITSTATUS(status));
        return skipped(test, format!("the kernel poisons no page: {error}"));
    }
    if let Some(emulator) = emulator() {
        let why = format!("{emulator:?} says that it has poisoned a page, and has not");
        return skipped(test, why);
    }
    // In its middle: the kernel says where the page begins, or the very byte.
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
