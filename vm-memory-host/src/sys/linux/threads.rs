//! [`run_on_threads`] and [`run_detached`]: threads whose start never ends the process.
//! [`Cpus`]: a set of CPUs.

use std::any::Any;
use std::ffi::CStr;
use std::io::Result;
use std::mem::MaybeUninit;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::ptr::null_mut;

use rustix::thread::CpuSet;

use super::signals::without_signals;

/// The stack size of a thread that is joined, which is also that of the standard library.
const STACK: usize = 2 << 20;

/// The stack size of a detached thread. The C library allows no less on aarch64.
const SMALL_STACK: usize = 128 << 10;

/// The argument of a thread.
struct Start<'a, W> {
    name: &'a CStr,
    work: &'a W,
    number: usize,
    panic: Option<Box<dyn Any + Send>>,
}

/// Calls `work` with 0 in this thread and with 1, 2, … in up to `others` new threads.
///
/// The new threads are called `name`, of which the kernel keeps 15 bytes. If the system refuses a
/// thread, there are fewer. Returns when all of them have returned, and continues a panic of one of
/// them.
///
/// `std::thread` would end the process if the new thread finds no memory for its alternate signal
/// stack, for example at `vm.max_map_count`. These threads have no such stack.
pub(crate) fn run_on_threads<W: Fn(usize) + Sync>(name: &CStr, others: usize, work: &W) {
    // Not moved until all threads have ended: each has a pointer to its own element.
    let mut starts: Vec<Start<'_, W>> = (0..=others)
        .map(|number| Start {
            name,
            work,
            number,
            panic: None,
        })
        .collect();
    let mut threads = Vec::with_capacity(others);
    let mut panic = None;
    if let Some((mine, theirs)) = starts.split_first_mut() {
        for start in theirs {
            // SAFETY: `start` is not used again before the thread is joined, below. Nothing unwinds
            // before that: `threads` has room for all of them, and `run` catches the panics of
            // `work`. The data that `start` refers to is borrowed for all of `run_on_threads`.
            match unsafe { spawn(start) } {
                Some(thread) => threads.push(thread),
                None => break,
            }
        }
        mine.run();
    }
    for thread in threads {
        // SAFETY: pthread_create(3) has returned this thread. It is neither detached nor joined
        // before. The call waits, and cannot fail for such a thread.
        unsafe { libc::pthread_join(thread, null_mut()) };
    }
    for start in starts {
        panic = panic.or(start.panic);
    }
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

impl<W: Fn(usize)> Start<'_, W> {
    fn run(&mut self) {
        let result = catch_unwind(AssertUnwindSafe(|| (self.work)(self.number)));
        self.panic = result.err();
    }
}

/// Starts a thread that runs `start`.
///
/// # Safety
///
/// The caller joins the thread before it uses, moves or drops `start`, and before the data that
/// `start` refers to is dropped.
unsafe fn spawn<W: Fn(usize) + Sync>(start: &mut Start<'_, W>) -> Option<libc::pthread_t> {
    let argument: *mut Start<'_, W> = start;
    // SAFETY: `thread_main::<W>` takes a pointer to a `Start` with the same `W`, which the caller
    // leaves alone until it has joined the thread (contract of `spawn`).
    unsafe { create(STACK, thread_main::<W>, argument.cast()) }
}

/// Calls `work` in a new thread that nothing joins. Returns `work` if there is no such thread.
///
/// The new thread is called `name`. Its stack has 128 KiB. The system can refuse it.
///
/// Unlike `std::thread`, a lack of memory does not end the process: see [`run_on_threads`].
pub(crate) fn run_detached<W: FnOnce() + Send + 'static>(
    name: &'static CStr,
    work: W,
) -> std::result::Result<(), W> {
    let work = Box::into_raw(Box::new((name, work)));
    // SAFETY: `detached_main::<W>` takes a pointer from `Box::into_raw` to a name and the same `W`.
    // If the thread exists, only it uses the pointer. `W` is `Send`, and it and the name borrow
    // nothing that can end.
    match unsafe { create(SMALL_STACK, detached_main::<W>, work.cast()) } {
        Some(thread) => {
            // SAFETY: pthread_create(3) has returned this thread. It is neither joined nor
            // detached.
            unsafe { libc::pthread_detach(thread) };
            Ok(())
        }
        None => {
            // SAFETY: the pointer comes from `Box::into_raw`, and no thread has received it.
            let (_, work) = *unsafe { Box::from_raw(work) };
            Err(work)
        }
    }
}

/// Starts a thread that calls `main` with `argument`, on a stack of `stack` bytes.
///
/// It handles no signals except those of its own faults.
///
/// # Safety
///
/// `main` may be called with `argument` once, in another thread, until the caller joins it.
unsafe fn create(
    stack: usize,
    main: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void,
    argument: *mut libc::c_void,
) -> Option<libc::pthread_t> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: pthread_attr_init(3) writes one object to its argument, which has room for it.
    if unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: pthread_attr_init(3) has returned 0, so it has initialised the object. If the object
    // refuses the size, it keeps the default.
    let _ = unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), stack) };
    let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
    // SAFETY: pthread_attr_init(3) has returned 0, so it has initialised the attributes. `thread`
    // has room for the result. The new thread may call `main` with `argument` (contract of
    // `create`).
    let created = without_signals(|| unsafe {
        libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), main, argument)
    });
    // SAFETY: pthread_attr_init(3) has returned 0, so it has initialised the object, which is not
    // used again.
    let _ = unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    // SAFETY: pthread_create(3) has succeeded, and has written the thread.
    (created == 0).then(|| unsafe { thread.assume_init() })
}

extern "C" fn thread_main<W: Fn(usize) + Sync>(start: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: `spawn` passes a pointer to a `Start` with this `W`. Until this thread has been
    // joined, it stays in place and only this thread uses it (contract of `spawn`). `W` is `Sync`,
    // so the shared reference in it may be used here. The panic in it is `Send`.
    let start = unsafe { &mut *start.cast::<Start<'_, W>>() };
    set_name(start.name);
    start.run();
    null_mut()
}

extern "C" fn detached_main<W: FnOnce()>(work: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: `run_detached` passes a pointer from `Box::into_raw` to a name and a `W`. It starts
    // one thread with it, and does not use it any more.
    let (name, work) = *unsafe { Box::from_raw(work.cast::<(&'static CStr, W)>()) };
    set_name(name);
    // No thread joins this one, so a panic has nowhere to go.
    let _ = catch_unwind(AssertUnwindSafe(work));
    null_mut()
}

/// Names this thread for the tools of the system. A failure has no effect.
fn set_name(name: &CStr) {
    let _ = rustix::thread::set_name(name);
}

/// A set of CPUs, for up to 1024 of them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Cpus(CpuSet);

impl Cpus {
    /// Returns the CPUs that this thread may run on (sched_getaffinity(2)).
    pub(crate) fn allowed() -> Result<Self> {
        Ok(Self(rustix::thread::sched_getaffinity(None)?))
    }

    /// Returns the CPUs that are in this set and in a list, or `None` if there are none.
    pub(crate) fn among(&self, list: &[u32]) -> Option<Self> {
        let mut set = CpuSet::new();
        let all = list.iter().filter_map(|cpu| usize::try_from(*cpu).ok());
        // `CpuSet` panics for a higher number.
        for cpu in all.filter(|cpu| *cpu < CpuSet::MAX_CPU) {
            if self.0.is_set(cpu) {
                set.set(cpu);
            }
        }
        (set.count() != 0).then_some(Self(set))
    }

    /// Moves this thread to these CPUs (sched_setaffinity(2)).
    pub(crate) fn apply(&self) -> Result<()> {
        Ok(rustix::thread::sched_setaffinity(None, &self.0)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn run_on_threads_calls_each_number_once_in_named_threads_and_continues_a_panic() {
        let seen = Mutex::new(Vec::new());
        let work = |number| {
            let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
            seen.lock().unwrap().push((number, name == "worker\n"));
        };
        run_on_threads(c"worker", 3, &work);
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, [(0, false), (1, true), (2, true), (3, true)]);
        for panicking in 0..3 {
            let done = AtomicUsize::new(0);
            let work = |number| {
                done.fetch_add(1, Ordering::Relaxed);
                if number == panicking {
                    // Prints nothing, unlike a panic.
                    resume_unwind(Box::new(()));
                }
            };
            let result = catch_unwind(AssertUnwindSafe(|| run_on_threads(c"worker", 2, &work)));
            assert!(result.is_err());
            assert_eq!(done.into_inner(), 3);
        }
    }

    /// Returns whether this thread does not receive a signal.
    fn is_blocked(signal: libc::c_int) -> bool {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        let blocked = u64::from_str_radix(blocked.unwrap().trim(), 16).unwrap();
        blocked & (1 << (signal - 1)) != 0
    }

    #[test]
    fn threads_leave_signals_of_the_process_to_its_other_threads() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let send = move || sender.send([libc::SIGTERM, libc::SIGBUS].map(is_blocked));
        let detached = send.clone();
        assert!(run_detached(c"worker", move || detached().unwrap()).is_ok());
        assert_eq!(receiver.recv(), Ok([true, false]));
        run_on_threads(c"worker", 1, &|number| {
            if number == 1 {
                send().unwrap();
            }
        });
        assert_eq!(receiver.recv(), Ok([true, false]));
        assert!(!is_blocked(libc::SIGTERM));
    }

    #[test]
    fn cpus_among_a_list_are_allowed_ones() {
        let set = |cpus: &[usize]| {
            let mut set = CpuSet::new();
            cpus.iter().for_each(|cpu| set.set(*cpu));
            Cpus(set)
        };
        let all = set(&[1, 2, 3, 64, 1023]);
        let some = all.among(&[0, 1, 3, 64, 65, 1023, 1024, 4096]);
        assert_eq!(some, Some(set(&[1, 3, 64, 1023])));
        assert_eq!(all.among(&[0, 1024, u32::MAX]), None);
        assert_eq!(all.among(&[]), None);
        let mine = Cpus::allowed().unwrap();
        std::thread::spawn(move || mine.apply().unwrap())
            .join()
            .unwrap();
    }
}
