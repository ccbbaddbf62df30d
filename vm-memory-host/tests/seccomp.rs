//! Calls at run time open no files, so a seccomp filter may forbid that.
//!
//! The filter cannot be removed, so the test starts this program again for itself.
#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "installs a seccomp filter with prctl(2)")]

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use test_support::{skipped, temp_file_of_len, MIB, PAGE_U64 as PAGE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{
    discard, discard_pages, plug, unplug, unplug_all, Backing, MemoryBuilder, Region,
    TransparentHugePages, Unplugged,
};

const TEST: &str = "discard_and_plug_after_build_open_no_files";
/// The environment variable that names the task of a child.
const TASK: &str = "VM_MEMORY_HOST_TEST_TASK";

/// Makes the kernel end this process with SIGSYS if this thread opens a file (seccomp(2)).
fn forbid_opening_files() -> io::Result<()> {
    let forbidden = [
        libc::SYS_openat,
        libc::SYS_openat2,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open,
    ];
    let instruction = |code: u32, k: u32, if_equal: usize| libc::sock_filter {
        code: code as u16,
        jt: if_equal as u8,
        jf: 0,
        k,
    };
    // The number of the call is the first word of `struct seccomp_data`.
    let mut program = vec![instruction(
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        0,
        0,
    )];
    for (n, call) in forbidden.iter().enumerate() {
        let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(instruction(jump, *call as u32, forbidden.len() - n));
    }
    program.push(instruction(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0));
    program.push(instruction(
        libc::BPF_RET,
        libc::SECCOMP_RET_KILL_PROCESS,
        0,
    ));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let (one, zero) = (1 as libc::c_ulong, 0 as libc::c_ulong);
    // SAFETY: `PR_SET_NO_NEW_PRIVS` takes numbers, and the kernel accesses no memory.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, zero, zero, zero) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let mode = libc::SECCOMP_MODE_FILTER as libc::c_ulong;
    // SAFETY: the kernel reads `len` instructions at `filter`, which are those of the vector.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn run(task: &str) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", TEST, "--nocapture", "--test-threads=1"]);
    child
        .env(TASK, task)
        .stdout(Stdio::null())
        .status()
        .unwrap()
}

fn build(region: Region) -> GuestMemoryMmap {
    MemoryBuilder::new().region(region).build().unwrap()
}

fn change_memory_without_opening_files() {
    let region = |backing| Region::new(GuestAddress(0), 4 * MIB).backing(backing);
    let private = || region(Backing::private_file(temp_file_of_len(4 * MIB), 0));
    let memories = [
        build(private()),
        build(private().transparent_huge_pages(TransparentHugePages::Off)),
        build(region(Backing::Anonymous)),
        build(region(Backing::Memfd)),
        build(region(Backing::shared_file(temp_file_of_len(4 * MIB), 0))),
    ];
    // Protected blocks would read max_map_count during the build, and hide a later read.
    let blocks = NonZeroU64::new(MIB).unwrap();
    let blocks = build(region(Backing::Memfd).blocks(blocks, Unplugged::Mapped));
    forbid_opening_files().unwrap();
    for memory in memories {
        memory.write_obj(7u8, GuestAddress(PAGE)).unwrap();
        assert_eq!(discard(&memory, GuestAddress(PAGE), PAGE).unwrap(), PAGE);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(PAGE)).unwrap(), 0);
        assert_eq!(discard_pages(&memory, [1u32, 3, 2]).discarded, 3);
    }
    plug(&blocks, GuestAddress(0), 2 * MIB).unwrap();
    unplug(&blocks, GuestAddress(0), MIB).unwrap();
    unplug_all(&blocks, GuestAddress(0)).unwrap();
}

#[test]
fn discard_and_plug_after_build_open_no_files() {
    match std::env::var(TASK).as_deref() {
        Ok("open") => {
            if forbid_opening_files().is_ok() {
                let opened = File::open("/dev/null");
                panic!("the filter does not work: {opened:?}");
            }
        }
        Ok(_) => change_memory_without_opening_files(),
        Err(_) => {
            let opened = run("open");
            if opened.success() {
                return skipped(TEST, "no seccomp filters");
            }
            assert_eq!(opened.signal(), Some(libc::SIGSYS), "{opened}");
            let changed = run("change");
            assert!(changed.success(), "{changed}");
        }
    }
}
