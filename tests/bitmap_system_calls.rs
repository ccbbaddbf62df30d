//! Marks and harvests make no system calls: strict seccomp mode does not kill a process that runs
//! them. This test is a program of its own, because it forks.
#![cfg(all(
    target_os = "linux",
    feature = "backend-bitmap",
    feature = "backend-mmap",
    not(miri)
))]
#![expect(unsafe_code, reason = "fork(2), prctl(2) and waitpid(2)")]

use std::num::NonZeroUsize;

use test_support::{skipped, PAGE};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The child's exit status if it cannot install the filter.
const NO_FILTER: i32 = 77;

/// Runs `work` in a child process. A system call other than read(2), write(2), exit(2) and
/// sigreturn(2) kills it.
///
/// Returns the signal that ended the child, 0 if it exited, or `None` without such filters.
fn without_system_calls(work: impl FnOnce()) -> Option<i32> {
    // SAFETY: the child has only this thread, so it must not take a lock that another thread held
    // at the fork. It runs `work`, which uses memory that exists already, allocates nothing and
    // takes no lock.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        // SAFETY: this prctl(2) takes numbers only. Strict mode permits read, write, exit and
        // sigreturn.
        let filtered = unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::c_ulong::from(libc::SECCOMP_MODE_STRICT),
                0,
                0,
                0,
            )
        };
        let status = match filtered {
            0 => {
                work();
                0
            }
            _ => NO_FILTER,
        };
        // exit(2) ends the only thread; the filter does not permit exit_group(2), which _exit(3)
        // makes. SAFETY: exit(2) takes a number and does not return.
        unsafe { libc::syscall(libc::SYS_exit, status) };
    }
    let mut status = 0;
    // SAFETY: `status` is a valid pointer to an `int` during the call.
    let ended = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(ended, child);
    match (libc::WIFSIGNALED(status), libc::WEXITSTATUS(status)) {
        (true, _) => Some(libc::WTERMSIG(status)),
        (false, 0) => Some(0),
        (false, NO_FILTER) => None,
        (false, other) => panic!("the child ended with {other}"),
    }
}

#[test]
fn marks_and_harvests_make_no_system_call() {
    let test = "marks_and_harvests_make_no_system_call";
    let page = NonZeroUsize::new(PAGE).unwrap();
    // The second size has a summary.
    for pages in [100usize, 1 << 22] {
        let bitmap = AtomicBitmap::new(pages * PAGE, page);
        let mut dirty = DirtyPages::new(pages * PAGE, page);
        let mut words = vec![0u64; pages.div_ceil(64)];
        let result = without_system_calls(|| {
            bitmap.mark_dirty(5, 1);
            bitmap.set_addr_range(0, 70 * PAGE);
            bitmap.reset_addr_range(0, PAGE);
            bitmap.set_bit(99);
            bitmap.reset_bit(99);
            bitmap.harvest_into(&mut dirty);
            bitmap.put_back(&dirty);
            bitmap.harvest_words(&mut words);
            bitmap.set_from_words(PAGE, &words, page);
            bitmap.stop_tracking();
            bitmap.start_tracking();
            bitmap.reset();
        });
        match result {
            None => return skipped(test, "strict seccomp filters are not available"),
            Some(signal) => assert_eq!(
                signal, 0,
                "signal that killed the child, with {pages} pages"
            ),
        }
    }

    let regions = [0u64, 0x10_000].map(|start| {
        let bitmap = AtomicBitmap::new(0x8000, page);
        let mapping = MmapRegionBuilder::new_with_bitmap(0x8000, bitmap)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    });
    let memory = GuestMemoryMmap::from_regions(regions.into()).unwrap();
    let mut dirty = DirtyMemory::new();
    // The first harvest allocates the buffers.
    dirty.harvest(&memory);
    let log = LogWords::new(GuestAddress(0x2000), &[0b101], page);
    let result = without_system_calls(|| {
        memory.write_obj(1u64, GuestAddress(0x1000)).unwrap();
        DirtyMemory::mark(&memory, &log);
        dirty.put_back(&memory);
        DirtyMemory::set_tracking(&memory, false);
        DirtyMemory::set_tracking(&memory, true);
        dirty.clear();
        dirty.harvest_with(&memory, &[log]);
        dirty.add_log(&memory, &log);
        assert_eq!(dirty.total_bytes(), 0x3000);
    });
    assert_eq!(result, Some(0));

    // Another system call kills the child, so the filter works.
    let killed = without_system_calls(std::thread::yield_now);
    assert_eq!(killed, Some(libc::SIGKILL));
}
