//! Pages that go away under an access: errors where the handler is installed, and everything else as before.
#![cfg(all(
    feature = "rawfd",
    feature = "backend-mmap",
    feature = "backend-bitmap",
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64"),
    not(vm_memory_portable)
))]
#![expect(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    unsafe_code,
    reason = "a test that goes wrong may panic, and says what it does in fewer words"
)]

mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use common::emulator;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::fault::{self, Direction};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestRegionMmap,
    VolatileMemory, VolatileMemoryError,
};

const PAGE: usize = 4096;
const BASE: GuestAddress = GuestAddress(0x10_0000);

type Memory = GuestMemoryMmap<AtomicBitmap>;

fn memfd(pages: usize) -> Arc<File> {
    // SAFETY: a name that ends with a zero; the answer is a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"faults".as_ptr(), 0) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made, and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len((pages * PAGE) as u64).unwrap();
    Arc::new(file)
}

/// Memory of a file of so many pages, and the file.
fn shared(pages: usize) -> (Memory, Arc<File>) {
    let file = memfd(pages);
    let place = FileOffset::from_arc(file.clone(), 0);
    (
        Memory::from_ranges_with_files([(BASE, pages * PAGE, Some(place))]).unwrap(),
        file,
    )
}

fn protect(memory: &Memory, page: usize, protection: i32) {
    let host = memory.get_host_address(BASE).unwrap();
    let host = host.wrapping_add(page * PAGE);
    // SAFETY: a page of the mapping, which nothing but accesses of the crate touches.
    let answer = unsafe { libc::mprotect(host.cast(), PAGE, protection) };
    assert_eq!(answer, 0);
}

fn is_efault(error: &GuestMemoryError) -> bool {
    matches!(error, GuestMemoryError::IOError(e) if e.raw_os_error() == Some(libc::EFAULT))
}

#[test]
fn every_kind_of_access_to_a_page_that_is_gone_is_an_error() {
    fault::install().unwrap();
    let (memory, file) = shared(4);
    file.set_len(2 * PAGE as u64).unwrap();
    let gone = GuestAddress(BASE.0 + 2 * PAGE as u64);
    let mut buf = [0u8; 64];
    let io = |answer: Result<(), GuestMemoryError>| assert!(is_efault(&answer.unwrap_err()));

    io(memory.read_obj::<u8>(gone).map(drop));
    io(memory.read_obj::<u16>(gone).map(drop));
    io(memory.read_obj::<u32>(gone).map(drop));
    io(memory.read_obj::<u64>(gone).map(drop));
    io(memory.read_obj::<[u8; 13]>(gone).map(drop));
    io(memory.write_obj(1u8, gone));
    io(memory.write_obj(1u64, gone));
    io(memory.write_obj([1u8; 100], gone));
    io(memory.load::<u32>(gone, Ordering::Acquire).map(drop));
    io(memory.store(1u32, gone, Ordering::SeqCst));
    io(memory.store(1u16, gone, Ordering::Relaxed));
    io(memory.read_slice(&mut buf, gone));
    io(memory.write_slice(&buf, gone));
    io(memory.read(&mut buf, gone).map(drop));
    io(memory.write(&buf, gone).map(drop));
    io(memory.write_volatile_to(gone, &mut Vec::new(), 64).map(drop));
    io(memory
        .write_volatile_to(gone, &mut &mut [0u8; 64][..], 64)
        .map(drop));
    io(memory.read_volatile_from(gone, &mut &[0u8; 64][..], 64).map(drop));
    // System calls meet the page themselves.
    let zero = File::open("/dev/zero").unwrap();
    io(memory.read_volatile_from(gone, &mut &zero, 64).map(drop));

    let slice = memory.get_slice(gone, 64).unwrap();
    let io = |answer: Result<(), VolatileMemoryError>| {
        assert!(
            matches!(&answer, Err(VolatileMemoryError::IOError(e)) if e.raw_os_error() == Some(libc::EFAULT)),
            "{answer:?}"
        );
    };
    let order = Ordering::SeqCst;
    io(slice.fill_with_byte(1));
    io(slice.atomic_swap(1u8, 0, order).map(drop));
    io(slice.atomic_fetch_add(1u16, 0, order).map(drop));
    io(slice.atomic_fetch_and(1u32, 0, order).map(drop));
    io(slice.atomic_fetch_or(1u64, 0, order).map(drop));
    io(slice.atomic_compare_exchange(0u8, 1, 0, order, order).map(drop));
    io(slice.atomic_compare_exchange(0u64, 1, 0, order, order).map(drop));
    assert_eq!(slice.get_ref::<u32>(0).unwrap().load(), 0);
    slice.get_ref::<u32>(0).unwrap().store(1);
    assert_eq!(slice.copy_to(&mut [0u32; 4]), 0);
    slice.copy_from(&[1u16; 8]);
    let mut host = [7u8; 64];
    slice.copy_to_volatile_slice(host.as_mut_slice().into());
    assert_eq!(host, [7; 64]);
    assert!(matches!(
        slice.read_obj::<u64>(0),
        Err(VolatileMemoryError::IOError(_))
    ));

    // The rest is intact, and the page comes back with its file.
    memory.write_obj(5u64, BASE).unwrap();
    file.set_len(4 * PAGE as u64).unwrap();
    assert_eq!(memory.read_obj::<u64>(gone).unwrap(), 0);
    assert_eq!(memory.read_obj::<u64>(BASE).unwrap(), 5);
}

/// The first page is there, the second is not: every length that reaches over the edge, at every distance from it.
#[test]
fn bytes_before_the_fault_are_counted_exactly() {
    fault::install().unwrap();
    let (memory, _file) = shared(2);
    let source: Vec<u8> = (0..300).map(|i| (i % 251) as u8 + 1).collect();
    for len in (1..=300usize).chain([1000, 2048, 4096]) {
        let source: Vec<u8> = source.iter().copied().cycle().take(len).collect();
        for inside in (0..len).step_by(if len <= 70 { 1 } else { 13 }) {
            let addr = GuestAddress(BASE.0 + (PAGE - inside) as u64);
            let edge = BASE.0 + PAGE as u64;
            let before = memory.get_slice(addr, inside).unwrap();

            protect(&memory, 1, libc::PROT_NONE);
            before.copy_from(&vec![0u8; inside]);
            let answer = memory.write(&source, addr);
            match inside {
                0 => assert!(is_efault(&answer.unwrap_err())),
                _ => assert_eq!(answer.unwrap(), inside, "write {len}"),
            }
            let fault = fault::last().unwrap();
            assert_eq!((fault.direction, fault.completed), (Direction::Write, inside));
            assert_eq!(
                fault.guest_address,
                if inside == 0 {
                    Some(GuestAddress(edge))
                } else {
                    fault.guest_address
                }
            );
            let mut back = vec![0u8; inside];
            memory.read_slice(&mut back, addr).unwrap();
            assert_eq!(back, source[..inside]);

            let mut buf = vec![0u8; len];
            let answer = memory.read(&mut buf, addr);
            match inside {
                0 => assert!(is_efault(&answer.unwrap_err())),
                _ => assert_eq!(answer.unwrap(), inside, "read {len}"),
            }
            assert_eq!(buf[..inside], source[..inside]);
            assert!(is_efault(&memory.read_slice(&mut buf, addr).unwrap_err()));
            let fault = fault::last().unwrap();
            assert_eq!((fault.direction, fault.completed), (Direction::Read, inside));
            assert_eq!(fault.guest_address, Some(GuestAddress(edge)));
            assert_eq!(
                fault.host_address,
                memory.get_host_address(GuestAddress(edge)).unwrap() as usize
            );
            protect(&memory, 1, libc::PROT_READ | libc::PROT_WRITE);
        }
    }
}

#[test]
fn typed_copies_stop_at_a_whole_element() {
    fault::install().unwrap();
    let (memory, _file) = shared(2);
    for elements in [1usize, 2, 31, 32, 100, 500] {
        let slice = memory
            .get_slice(
                GuestAddress(BASE.0 + (PAGE - elements * 4) as u64),
                elements * 4 + 400,
            )
            .unwrap();
        let source: Vec<u32> = (1..=(elements + 100) as u32).collect();
        protect(&memory, 1, libc::PROT_NONE);
        slice.copy_from(&source);
        let mut back = vec![0u32; elements + 100];
        assert_eq!(slice.copy_to(&mut back), elements);
        assert_eq!(back[..elements], source[..elements]);
        protect(&memory, 1, libc::PROT_READ | libc::PROT_WRITE);
    }
}

#[test]
fn a_fill_writes_and_counts_what_lies_before_the_fault() {
    fault::install().unwrap();
    let (memory, file) = shared(2);
    file.set_len(PAGE as u64).unwrap();
    for len in (1..300).chain([PAGE]) {
        let start = GuestAddress(BASE.0 + (PAGE - len) as u64);
        for more in [1, 63, PAGE] {
            let slice = memory.get_slice(BASE, 2 * PAGE).unwrap();
            slice
                .subslice(PAGE - len, len)
                .unwrap()
                .fill_with_byte(0)
                .unwrap();
            slice
                .subslice(PAGE - len, len + more)
                .unwrap()
                .fill_with_byte(0xab)
                .unwrap_err();
            let fault = fault::last().unwrap();
            assert_eq!((fault.completed, fault.direction), (len, Direction::Write));
            let mut written = vec![0; len];
            memory.read_slice(&mut written, start).unwrap();
            assert!(written.iter().all(|b| *b == 0xab), "{len} and {more}");
        }
    }
}

#[test]
fn what_may_have_been_written_is_marked() {
    fault::install().unwrap();
    let (memory, _file) = shared(3);
    protect(&memory, 2, libc::PROT_NONE);
    let region = memory.find_region(BASE).unwrap();
    region.bitmap().reset();
    assert_eq!(memory.write(&[1; 3 * PAGE], BASE).unwrap(), 2 * PAGE);
    assert!(region.bitmap().dirty_at(0) && region.bitmap().dirty_at(PAGE));
}

/// A value of several pieces over the edge: what was written before the fault is marked.
#[test]
fn a_value_that_is_written_in_part_is_marked() {
    fault::install().unwrap();
    let (memory, _file) = shared(2);
    let region = memory.find_region(BASE).unwrap();
    let addr = GuestAddress(BASE.0 + PAGE as u64 - 8);
    protect(&memory, 1, libc::PROT_NONE);
    region.bitmap().reset();
    assert!(is_efault(&memory.write_obj([7u8; 16], addr).unwrap_err()));
    assert_eq!(memory.read_obj::<[u8; 8]>(addr).unwrap(), [7; 8]);
    assert!(region.bitmap().dirty_at(0));
}

/// The number of faults that a copy takes does not grow with its length.
#[test]
fn a_long_copy_into_nothing_ends_soon() {
    fault::install().unwrap();
    let pages = 32 << 8;
    let (memory, file) = shared(pages);
    file.set_len(PAGE as u64).unwrap();
    let mut buf = vec![0u8; pages * PAGE];
    let begun = std::time::Instant::now();
    assert_eq!(memory.read(&mut buf, BASE).unwrap(), PAGE);
    assert_eq!(memory.write(&buf[..16_000], BASE).unwrap(), PAGE);
    assert!(
        begun.elapsed() < std::time::Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}

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
fn a_file_that_shrinks_and_grows_under_copies_is_survived() {
    fault::install().unwrap();
    let (memory, file) = shared(64);
    let done = AtomicBool::new(false);
    let mut faults = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                file.set_len(PAGE as u64).unwrap();
                std::thread::yield_now();
                file.set_len(64 * PAGE as u64).unwrap();
                std::thread::yield_now();
            }
        });
        let mut buf = vec![0u8; 64 * PAGE];
        for round in 0..4000 {
            let answer = match round % 3 {
                0 => memory.read(&mut buf, BASE),
                1 => memory.write(&buf, BASE),
                _ => memory
                    .read_obj::<u64>(GuestAddress(BASE.0 + 63 * PAGE as u64))
                    .map(|_| buf.len()),
            };
            match answer {
                Ok(moved) if moved == buf.len() => {}
                Ok(moved) => {
                    // Anywhere from the second page on: a page can go while it is being copied.
                    assert!((PAGE..buf.len()).contains(&moved), "{moved}");
                    faults += 1;
                }
                Err(error) => {
                    assert!(is_efault(&error), "{error}");
                    faults += 1;
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    println!("{faults} of 4000 accesses met a page that was gone");
}

#[test]
fn faults_may_come_by_the_hundred_thousand_and_from_two_threads() {
    fault::install().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (memory, file) = shared(2);
                file.set_len(0).unwrap();
                let mut buf = [0u8; 40];
                for round in 0..25_000u64 {
                    assert!(memory.read_obj::<u32>(BASE).is_err());
                    assert!(memory.write(&buf, GuestAddress(BASE.0 + round % 4000)).is_err());
                    assert!(memory.read(&mut buf, BASE).is_err());
                    assert!(memory.store(1u8, BASE, Ordering::SeqCst).is_err());
                }
            });
        }
    });
}

#[test]
fn an_empty_pool_of_huge_pages_is_an_error() {
    fault::install().unwrap();
    // SAFETY: as in `memfd`.
    let fd = unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    if fd < 0 {
        println!("SKIPPED: no huge pages of 2 MiB on this machine");
        return;
    }
    // SAFETY: as in `memfd`.
    let file = unsafe { File::from_raw_fd(fd) };
    // More than any pool has; MAP_NORESERVE lets it be mapped all the same.
    let size = 1usize << 40;
    file.set_len(size as u64).unwrap();
    let free = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap();
    if free.trim() != "0" {
        println!(
            "SKIPPED: the pool of huge pages is not empty, but has {}",
            free.trim()
        );
        return;
    }
    let region = GuestRegionMmap::<()>::from_range(BASE, size, Some(FileOffset::new(file, 0)));
    if let (Err(error), Some(emulator)) = (&region, emulator()) {
        // It chooses addresses itself, at multiples of small pages.
        println!("SKIPPED: {emulator:?} cannot map huge pages: {error}");
        return;
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
        println!("SKIPPED: no userfaultfd: {}", std::io::Error::last_os_error());
        return;
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

/// What must still kill, each in a process of its own.
fn in_a_process_of_its_own(what: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let mut command = match emulator() {
        Some(emulator) => Command::new(emulator),
        None => Command::new(&program),
    };
    if emulator().is_some() {
        command.arg(program);
    }
    command
        .args(["--exact", "dies_as_it_would_without_us", "--nocapture"])
        .env("FAULTS_DIE", what);
    if cfg!(panic = "abort") {
        // A test program that aborts on panic runs each test in a child of its own, and would report its death in its own way.
        command.args(["-Zunstable-options", "--force-run-in-process"]);
    }
    command.output().unwrap()
}

#[test]
fn dies_as_it_would_without_us() {
    let Ok(what) = std::env::var("FAULTS_DIE") else {
        return;
    };
    if what == "once" {
        install_a_handler_that_is_called_once();
    }
    if what != "sent without us" {
        fault::install().unwrap();
    }
    let (memory, file) = shared(1);
    match what.as_str() {
        // SAFETY: not sound, and meant to kill the process.
        "null" | "once" => unsafe { std::hint::black_box(std::ptr::null::<u8>()).read_volatile() }.into(),
        "sent" | "sent without us" => {
            // SAFETY: sends a signal to this process.
            unsafe { libc::raise(libc::SIGBUS) };
            println!("survived the first");
            if what == "sent" {
                // The former handler is gone, ours is not.
                protect(&memory, 0, libc::PROT_NONE);
                assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
            }
            // SAFETY: as above.
            unsafe { libc::raise(libc::SIGBUS) };
            0
        }
        "notice" => {
            // A memory error that nobody has touched: code 5 of SIGBUS (sigaction(2), BUS_MCEERR_AO), in `siginfo_t` the third number.
            let mut info = [0i32; 32];
            info[0] = libc::SIGBUS;
            info[2] = 5;
            // SAFETY: asks for a number.
            let process = unsafe { libc::getpid() };
            // SAFETY: asks for a number.
            let thread = unsafe { libc::gettid() };
            // SAFETY: `info` is as large as `siginfo_t`; to itself, a thread may send any code (rt_sigqueueinfo(2)).
            let answer = unsafe {
                libc::syscall(
                    libc::SYS_rt_tgsigqueueinfo,
                    process,
                    thread,
                    libc::SIGBUS,
                    info.as_ptr(),
                )
            };
            assert_eq!(answer, 0);
            println!("survived the notice");
            file.set_len(0).unwrap();
            assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
            std::process::exit(77);
        }
        "stack" => overflow(1),
        "host" => {
            // The guest's page is there, the host's buffer is not.
            let (other, _other_file) = shared(1);
            let host = other.get_host_address(BASE).unwrap();
            protect(&other, 0, libc::PROT_NONE);
            // SAFETY: not sound, and meant to kill the process.
            let buf = unsafe { std::slice::from_raw_parts_mut(host, 64) };
            memory.read(buf, BASE).unwrap() as u64
        }
        other => unreachable!("{other}"),
    };
    unreachable!("should have died");
}

/// As a crash logger does that leaves the rest to the default action.
fn install_a_handler_that_is_called_once() {
    extern "C" fn logger(_: i32) {
        let line = b"logged\n";
        // SAFETY: a buffer and its length; async-signal-safe (signal-safety(7)).
        unsafe { libc::write(1, line.as_ptr().cast(), line.len()) };
    }
    let handler: extern "C" fn(i32) = logger;
    // SAFETY: zeroes are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_RESETHAND;
    // SAFETY: a handler of one argument, as the flags say.
    let answer = unsafe { libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()) };
    assert_eq!(answer, 0);
}

fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 100]);
    if depth == 0 {
        0
    } else {
        overflow(depth + 1) + frame[(depth % 100) as usize]
    }
}

#[test]
fn a_null_pointer_elsewhere_still_kills() {
    assert_eq!(
        in_a_process_of_its_own("null").status.signal(),
        Some(libc::SIGSEGV)
    );
}

/// The handler of Rust's standard library lets the first one pass.
#[test]
fn a_signal_that_was_sent_does_what_it_did_before() {
    for what in ["sent", "sent without us"] {
        let output = in_a_process_of_its_own(what);
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("survived the first"),
            "{what}"
        );
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{what}");
    }
}

#[test]
fn a_host_buffer_that_is_not_there_still_kills() {
    assert_eq!(
        in_a_process_of_its_own("host").status.signal(),
        Some(libc::SIGSEGV)
    );
}

#[test]
fn a_stack_overflow_is_still_reported() {
    let output = in_a_process_of_its_own("stack");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("overflowed its stack"), "{message}");
}

#[test]
fn a_notice_of_a_memory_error_leaves_the_handler_in_place() {
    let output = in_a_process_of_its_own("notice");
    let message = String::from_utf8_lossy(&output.stderr);
    if let (true, Some(emulator)) = (message.contains("accel/tcg"), emulator()) {
        println!(
            "SKIPPED: {emulator:?} takes the notice for a fault of its own: {}",
            message.trim()
        );
        return;
    }
    assert!(String::from_utf8_lossy(&output.stdout).contains("survived the notice"));
    assert_eq!(output.status.code(), Some(77), "{output:?}");
}

#[test]
fn a_handler_that_is_to_be_called_once_is_called_once() {
    let output = in_a_process_of_its_own("once");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).matches("logged").count(),
        1
    );
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV));
}
