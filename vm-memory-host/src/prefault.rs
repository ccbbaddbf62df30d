//! [`prefault`]: populates pages before the guest uses them.
//!
//! The memory is divided into steps of one `madvise(2)` each. Threads take the next step from an
//! atomic counter, and report to the callback under a mutex:
//!
//! ```text
//!   steps   │ 0 │ 1 │ 2 │ 3 │ 4 │ …
//!                     ▲ next: fetch_add
//!   threads      populate ──► State { done, end }, callback
//! ```

use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestRegionMmap};

use crate::error::PrefaultError;
use crate::mapping::{bytes, provisioned, HostMapping};
use crate::region::{BackingKind, Sharing};
use crate::residency::resident;
use crate::resources::HostResources;
use crate::sys::Advice;

/// The progress of a prefault.
///
/// # Examples
///
/// ```
/// use vm_memory_host::Progress;
///
/// let percent = |progress: Progress| progress.done * 100 / progress.total.max(1);
/// assert_eq!(percent(Progress { done: 64 << 20, total: 256 << 20 }), 25);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The number of populated bytes.
    pub done: u64,
    /// The number of bytes to populate.
    pub total: u64,
}

/// The number of bytes that one system call populates.
///
/// It is large enough to hide the cost of the call, and small enough for frequent callbacks. It is
/// a multiple of all smaller sizes of huge pages. Larger pages are populated one at a time.
const STEP: usize = 32 << 20;

/// Populates all pages of guest memory with `threads` threads, one of them the caller's.
///
/// Afterwards the guest does not wait for page faults. Bytes do not change, and nothing is marked
/// dirty.
///
/// - Anonymous memory, memfds and shared files get writable pages.
/// - Private files are read. A page is copied when the guest writes to it.
/// - Unplugged blocks are skipped.
/// - Memory that is bound to NUMA nodes comes from these nodes, whichever thread populates it.
///
/// One thread at a time calls `progress`, with a growing number of bytes. It does so after each
/// step of 32 MiB, or of one huge page if that is larger. [`ControlFlow::Break`] cancels the
/// prefault: other threads finish their current step, and populated pages stay.
///
/// # System calls
///
/// - `madvise` with `MADV_POPULATE_WRITE` or `MADV_POPULATE_READ` (Linux 5.14);
/// - calls that read /proc/meminfo and /proc/self/cgroup;
/// - calls that create threads, such as `clone3`;
/// - `mincore` if the memory might not fit.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::ops::ControlFlow;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{prefault, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 64 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// prefault(&memory, NonZeroUsize::new(2).unwrap(), |progress| {
///     println!("{} of {} MiB", progress.done >> 20, progress.total >> 20);
///     ControlFlow::Continue(())
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns a [`PrefaultError`] if
///
/// - a region was not built by this crate;
/// - the host has too little memory, in which case nothing is populated;
/// - `progress` returns [`ControlFlow::Break`] before all pages are populated; or
/// - the system refuses a call, for example on a kernel before Linux 5.14.
#[doc(alias = "prealloc")]
#[doc(alias = "populate")]
#[doc(alias = "MAP_POPULATE")]
#[doc(alias = "MADV_POPULATE_WRITE")]
pub fn prefault<B, M, F>(
    memory: &M,
    threads: NonZeroUsize,
    mut progress: F,
) -> Result<(), PrefaultError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
    F: FnMut(Progress) -> ControlFlow<()> + Send,
{
    let mappings = memory
        .iter()
        .map(provisioned)
        .collect::<Result<Vec<_>, _>>()?;
    run(&mappings, threads, &mut progress)
}

/// The range that one system call populates.
#[derive(Clone, Copy)]
struct Step<'a> {
    mapping: &'a HostMapping,
    offset: usize,
    len: usize,
}

/// The state that the threads share under a mutex.
struct State<'a> {
    done: u64,
    total: u64,
    progress: &'a mut (dyn FnMut(Progress) -> ControlFlow<()> + Send),
    /// The first error. Threads stop when it is set.
    end: Option<PrefaultError>,
}

impl State<'_> {
    /// Records the result of a step.
    fn finish(&mut self, step: &Step<'_>, result: io::Result<()>) {
        let len = bytes(step.len);
        let (done, total) = (self.done.saturating_add(len), self.total);
        match result {
            Ok(()) => {
                self.done = done;
                if (self.progress)(Progress { done, total }).is_break() && done < total {
                    self.end = Some(PrefaultError::Cancelled { done, total });
                }
            }
            Err(source) => {
                let region = step.mapping.span();
                self.end = Some(PrefaultError::System {
                    region,
                    start: region.start.saturating_add(bytes(step.offset)),
                    len,
                    done: self.done,
                    total,
                    source,
                });
            }
        }
    }
}

/// Populates mappings, as [`prefault`] does.
pub(crate) fn run(
    mappings: &[&HostMapping],
    threads: NonZeroUsize,
    progress: &mut (dyn FnMut(Progress) -> ControlFlow<()> + Send),
) -> Result<(), PrefaultError> {
    check_memory(mappings, &HostResources::current())?;
    let steps: Vec<Step<'_>> = mappings.iter().flat_map(|mapping| steps(mapping)).collect();
    let total = steps
        .iter()
        .fold(0u64, |sum, step| sum.saturating_add(bytes(step.len)));
    let next = AtomicUsize::new(0);
    let state = Mutex::new(State {
        done: 0,
        total,
        progress,
        end: None,
    });
    // Relaxed: the counter only hands out steps, and the mutex protects the state.
    let take = || steps.get(next.fetch_add(1, Ordering::Relaxed));
    let work = || {
        while let Some(step) = take() {
            let result = populate(step);
            // Poisoned: the callback has panicked, and the scope will propagate that.
            let Ok(mut state) = state.lock() else {
                return;
            };
            if state.end.is_none() {
                state.finish(step, result);
            }
            if state.end.is_some() {
                next.store(steps.len(), Ordering::Relaxed);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(steps.len()) {
            let thread = std::thread::Builder::new().name("prefault".to_owned());
            // If a limit forbids more threads, the existing ones populate all steps.
            if thread.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    state.end.map_or(Ok(()), Err)
}

/// Checks that the host has enough memory.
///
/// Counting resident pages takes time, so they are counted only if that can change the outcome.
fn check_memory(mappings: &[&HostMapping], host: &HostResources) -> Result<(), PrefaultError> {
    let (Some(available), Some(all)) = (host.available_memory(), host.total_memory()) else {
        return Ok(());
    };
    // Huge pages come from a pool, and the page cache of files is reclaimable.
    let own = || {
        let mappings = mappings.iter().copied();
        mappings
            .filter(|mapping| matches!(mapping.kind(), BackingKind::Anonymous | BackingKind::Memfd))
    };
    let lengths = own().flat_map(steps).map(|step| bytes(step.len));
    let mut wanted = lengths.fold(0u64, u64::saturating_add);
    if wanted <= available.saturating_add(all) {
        for mapping in own() {
            if wanted <= available {
                return Ok(());
            }
            wanted = wanted.saturating_sub(resident(mapping).unwrap_or(0));
        }
    }
    if wanted <= available {
        return Ok(());
    }
    Err(PrefaultError::Memory { wanted, available })
}

/// Populates the pages of a step that are plugged.
fn populate(step: &Step<'_>) -> io::Result<()> {
    let (mapping, advice) = (step.mapping, advice(step.mapping));
    let Some(blocks) = mapping.plugged_blocks() else {
        return mapping.mapped().advise(step.offset, step.len, advice);
    };
    // Without this lock, a block that is unplugged at the same time would keep the new pages.
    let _held = mapping.hold_blocks();
    let mut plugged = blocks.runs_in(step.offset, step.len);
    plugged.try_for_each(|(offset, len)| mapping.mapped().advise(offset, len, advice))
}

/// Divides the accessible parts of a mapping into steps.
fn steps(mapping: &HostMapping) -> impl Iterator<Item = Step<'_>> {
    let whole = (0, mapping.mapped().len());
    let plugged = mapping
        .plugged_blocks()
        .map_or_else(|| vec![whole], |blocks| blocks.runs().collect());
    let page = usize::try_from(mapping.page_size()).unwrap_or(STEP);
    let step = STEP.max(page);
    plugged.into_iter().flat_map(move |(start, len)| {
        (0..len).step_by(step).map(move |at| Step {
            mapping,
            offset: start.saturating_add(at),
            len: len.saturating_sub(at).min(step),
        })
    })
}

/// Returns the advice that populates a mapping without copying pages of a private file.
fn advice(mapping: &HostMapping) -> Advice {
    let is_private = mapping.file().is_some() && mapping.backing.sharing == Sharing::Private;
    if is_private && mapping.kind() != BackingKind::Hugetlb {
        Advice::PopulateRead
    } else {
        Advice::PopulateWrite
    }
}
