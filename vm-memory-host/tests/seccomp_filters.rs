//! The functions of each phase work under the seccomp filter of that phase, and other calls do not.
//!
//! A filter cannot be removed, so each task runs in a process of its own.
//! The crate seccompiler has the numbers of system calls of three processors.
#![cfg(all(
    target_os = "linux",
    target_env = "gnu",
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )
))]

mod every_region;

use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use every_region::{writable_regions, HUGE};
use rustix::mm::MprotectFlags;
use seccompiler::{apply_filter, compile_from_json, BpfProgram};
use test_support::{skipped, temp_file, temp_file_of_len, HugePages, MIB};
use vm_memory::{vectored, Bytes, GuestAddress, GuestMemoryMmap, Permissions};
use vm_memory_host::{
    content, describe, discard, huge_page_pools, plug, prefault, residency, unplug, Arena, Backing,
    HostResources, MemoryBuilder, NumaPolicy, Region, SECCOMP_FILTERS,
};

const TEST: &str = "functions_of_each_phase_work_under_its_filter";
/// The environment variable that names the task of a child.
const TASK: &str = "VM_MEMORY_HOST_TEST_TASK";

fn filter(phase: &str) -> BpfProgram {
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let mut filters = compile_from_json(SECCOMP_FILTERS.as_bytes(), arch).unwrap();
    filters.remove(phase).unwrap()
}

/// Runs `work` in a thread under the filter of a phase.
fn under_filter(phase: &str, work: impl FnOnce() + Send) {
    let filter = filter(phase);
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            apply_filter(&filter).unwrap();
            work();
        });
        thread.join().unwrap();
    });
}

fn regions(has_huge_pages: bool) -> Vec<Region> {
    writable_regions(GuestAddress(0), 4 * HUGE, has_huge_pages)
}

fn build(region: Region) -> GuestMemoryMmap {
    MemoryBuilder::new().region(region).build().unwrap()
}

/// Calls the functions of the phase `boot`.
fn boot(regions: Vec<Region>) {
    vm_memory::fault::install().unwrap();
    HostResources::read();
    huge_page_pools();
    Arena::new(4 * HUGE).unwrap();
    let threads = NonZeroUsize::new(3).unwrap();
    for region in regions {
        let memory = build(region);
        prefault(&memory, threads, |_| ControlFlow::Continue(())).unwrap();
    }
    let large = Region::new(GuestAddress(0), 80 * MIB);
    for numa in [NumaPolicy::Inherit, NumaPolicy::Preferred(0)] {
        let large = large.clone().numa(numa);
        let builder = MemoryBuilder::new().region(large);
        let builder = builder.prefault(threads, |_| ControlFlow::Continue(()));
        builder.build::<()>().unwrap();
    }
}

/// Calls the functions of the phase `run_time`.
fn run_time(memories: Vec<GuestMemoryMmap>, arena: &Arena, files: &[std::fs::File; 2]) {
    let first = GuestAddress(0);
    let [mapped, disk] = files;
    for memory in memories {
        let has_blocks = plug(&memory, first, 2 * HUGE).is_ok();
        memory.write_obj(1u8, first).unwrap();
        vectored::read_from_at(&memory, first, 0x1000, disk, 0).unwrap();
        discard(&memory, first, 2 * HUGE).unwrap();
        residency(&memory).unwrap();
        describe(&memory).unwrap();
        if has_blocks {
            unplug(&memory, first, 2 * HUGE).unwrap();
        }
    }
    arena
        .map(HUGE, HUGE, mapped, 0, Permissions::ReadWrite)
        .unwrap();
    arena.unmap(0, 4 * HUGE).unwrap();
    read_clock();
}

fn task(name: &str) {
    match name {
        "boot" => {
            let pages = HugePages::reserve(16, TEST);
            let regions = regions(pages.is_some());
            under_filter("boot", || boot(regions));
        }
        "run_time" | "migration" => {
            vm_memory::fault::install().unwrap();
            let pages = HugePages::reserve(32, TEST);
            let memories: Vec<_> = regions(pages.is_some()).into_iter().map(build).collect();
            if name == "migration" {
                return under_filter(name, || {
                    for memory in &memories {
                        content(memory).unwrap().count();
                    }
                });
            }
            let arena = Arena::new(4 * HUGE).unwrap();
            let files = [temp_file_of_len(HUGE), temp_file(&[7; 0x1000])];
            under_filter(name, || run_time(memories, &arena, &files));
        }
        // Calls that no filter permits.
        "socket" => under_filter("boot", || drop(std::net::UdpSocket::bind("127.0.0.1:0"))),
        "truncate" => {
            let file = temp_file(b"x");
            under_filter("run_time", || drop(truncate(&file)));
        }
        "create" => under_filter("boot", || drop(std::fs::File::create("/dev/null"))),
        "execute" => under_filter("run_time", make_executable),
        "memfd" => under_filter("migration", || {
            drop(build(
                Region::new(GuestAddress(0), MIB).backing(Backing::Memfd),
            ));
        }),
        other => panic!("unknown task {other}"),
    }
}

/// Opens a file for reading, and truncates it: Linux permits that.
fn truncate(file: &std::fs::File) -> io::Result<std::fs::File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut options = std::fs::OpenOptions::new();
    options.read(true).custom_flags(libc::O_TRUNC).open(path)
}

/// Reads the clock by a system call, as the vDSO does if it cannot read the clock itself.
#[expect(unsafe_code, reason = "makes a system call")]
fn read_clock() {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one `timespec` to `now`.
    let result =
        unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut now) };
    assert_eq!(result, 0);
}

/// Makes a page of this process executable.
#[expect(unsafe_code, reason = "maps a page and changes its protection")]
fn make_executable() {
    use rustix::mm::{mmap_anonymous, mprotect, MapFlags, ProtFlags};
    // SAFETY: without MAP_FIXED, mmap(2) chooses addresses that are not in use.
    let page = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            0x1000,
            ProtFlags::READ,
            MapFlags::PRIVATE,
        )
    };
    // SAFETY: nothing uses the page, which stays readable.
    let _ = unsafe {
        mprotect(
            page.unwrap(),
            0x1000,
            MprotectFlags::READ | MprotectFlags::EXEC,
        )
    };
}

fn run(task: &str) -> io::Result<ExitStatus> {
    let mut child = Command::new(std::env::current_exe()?);
    child.args(["--exact", TEST, "--nocapture", "--test-threads=1"]);
    child.env(TASK, task).stdout(Stdio::null()).status()
}

#[test]
fn functions_of_each_phase_work_under_its_filter() {
    if let Ok(name) = std::env::var(TASK) {
        return task(&name);
    }
    let refused = run("socket").unwrap();
    if refused.success() || refused.signal().is_none() {
        return skipped(TEST, format!("no seccomp filters: {refused}"));
    }
    for name in ["socket", "create", "truncate", "execute", "memfd"] {
        let status = run(name).unwrap();
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{name}: {status}");
    }
    for name in ["boot", "run_time", "migration"] {
        let status = run(name).unwrap();
        assert!(status.success(), "{name}: {status}");
    }
}
