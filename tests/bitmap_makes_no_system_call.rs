//! Marks and harvests make no system call unless they are asked to: they go on under a filter that kills whoever makes one. A program of its own, since the
//! process is forked.
#![cfg(all(
    target_os = "linux",
    feature = "backend-bitmap",
    feature = "backend-mmap",
    not(miri)
))]
#![expect(unsafe_code, reason = "fork(2), prctl(2) and waitpid(2)")]

use std::num::NonZeroUsize;

use test_support::skipped;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const PAGE: usize = 4096;
/// What the child ends with where it cannot have a filter.
const NO_FILTER: i32 = 77;

/// Runs `work` in a child that from then on may end, and nothing else: any other system call kills it. `None` if there can be no such filter; otherwise the
/// signal that it ended by, 0 for none.
fn without_system_calls(work: impl FnOnce()) -> Option<i32> {
    // SAFETY: the child runs `work` and ends; the test harness's other threads are not in it, and `work` takes no lock that one of them may have had: it
    // uses memory that was made before, and allocates nothing.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        // SAFETY: takes numbers. In strict mode, read, write, exit and sigreturn are left.
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
        // exit(2), of this thread, which is the only one: exit_group(2), which _exit(3) makes, is not allowed.
        // SAFETY: takes numbers, and does not return.
        unsafe { libc::syscall(libc::SYS_exit, status) };
    }
    let mut status = 0;
    // SAFETY: `status` is a place for an int that lives through the call.
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
    // Of the second kind, which has a summary, as well.
    for pages in [100usize, 1 << 22] {
        let bitmap = AtomicBitmap::new(pages * PAGE, page);
        let mut dirty = DirtyPages::new(pages * PAGE, page);
        let mut words = vec![0u64; pages.div_ceil(64)];
        let answer = without_system_calls(|| {
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
        match answer {
            None => return skipped(test, "no strict seccomp filter here"),
            Some(signal) => assert_eq!(signal, 0, "killed by this signal, with {pages} pages"),
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
    // Its buffers are there after the first one.
    dirty.harvest(&memory);
    let log = LogWords {
        start: GuestAddress(0x2000),
        words: &[0b101],
        page_size: page,
    };
    let answer = without_system_calls(|| {
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
    assert_eq!(answer, Some(0));

    // The other way round: what does make a system call is killed, so that the filter is one.
    let killed = without_system_calls(|| {
        let _ = DirtyMemory::start_tracking(&memory);
    });
    assert_eq!(killed, Some(libc::SIGKILL));
    let mut looking = AtomicBitmap::new(PAGE, page);
    if let Err(error) = looking.test_before_marking() {
        return skipped(test, format!("no membarrier(2): {error}"));
    }
    let mut dirty = DirtyPages::new(PAGE, page);
    let killed = without_system_calls(|| looking.harvest_into(&mut dirty));
    assert_eq!(killed, Some(libc::SIGKILL));
}
