//! [`prefault`]: populates pages before the guest uses them.
//!
//! The memory is divided into steps of at most 32 MiB, or one huge page if that is larger. There is
//! one queue for each set of NUMA nodes. Each thread begins with a different queue, and moves to
//! the CPUs of its nodes. It takes the next step from an atomic counter, and reports to the
//! callback under a mutex:
//!
//! ```text
//!   nodes {0}   │ 0 │ 1 │ 2 │ 3 │ …       thread 0, 2, …
//!   nodes {1}   │ 0 │ 1 │ 2 │ …           thread 1, 3, …
//!                         ▲ next: fetch_add
//!   threads      populate ──► State { done, end }, callback
//! ```

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use vm_memory::GuestMemoryBackend;

use super::system::{cause_of, check_memory, cpus_of, populate_pages};
use crate::error::PrefaultError;
use crate::host::HostResources;
use crate::mapping::{span_of, to_u64, usable, HostMapped, HostMapping};
use crate::region::Span;
use crate::sys::{run_on_threads, Cpus};

/// The progress of a prefault.
///
/// # Examples
///
/// ```
/// use vm_memory_host::Progress;
///
/// let percent = |progress: Progress| progress.done * 100 / progress.total.max(1);
/// assert_eq!(percent(Progress::default()), 0);
/// ```
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Progress {
    /// The number of populated bytes.
    pub done: u64,
    /// The number of bytes to populate.
    pub total: u64,
}

/// The number of bytes that a thread populates at a time.
///
/// It is large enough to hide the cost of a system call, and small enough for frequent callbacks.
/// It is a multiple of all smaller sizes of huge pages. Larger pages are populated one at a time.
const STEP: usize = 32 << 20;

/// Populates all pages of guest memory with `threads` threads, one of them the caller's.
///
/// Afterwards the guest does not wait for page faults. Bytes do not change, and nothing is marked
/// dirty.
///
/// - Anonymous memory, memfds and shared files get writable pages.
/// - Private files and read-only files are read. A page of a private file is copied when the guest
///   writes to it. Huge pages are copied at once: the build has reserved the copies.
/// - Unplugged blocks are skipped.
/// - Memory that is bound to NUMA nodes comes from these nodes, whichever thread populates it. New
///   threads run on the CPUs of these nodes, as far as this thread may run there. The caller's
///   thread does not move.
///
/// If the system refuses to create a thread, the others populate all pages.
///
/// One thread at a time calls `progress`, with a growing number of bytes. It does so after each
/// step of 32 MiB, or of one huge page if that is larger. [`ControlFlow::Break`] cancels the
/// prefault: other threads finish their current step, and populated pages stay.
///
/// New threads handle only the signals that their own faults raise.
///
/// # Windows
///
/// Each page is read, which populates it. Threads do not move to the CPUs of a node. The memory is
/// not checked in advance: the build has committed it.
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
/// - a region was not built by this crate, or was built by the parent process;
/// - the host has too little memory, in which case nothing is populated;
/// - a control group permits too little memory, in which case the error counts the bytes that were
///   populated;
/// - a file is too short for its region, because it was truncated after the build;
/// - `progress` returns [`ControlFlow::Break`] before all pages are populated; or
/// - the system refuses a call, for example on a kernel before Linux 5.14.
#[doc(alias = "prealloc")]
#[doc(alias = "populate")]
#[doc(alias = "MAP_POPULATE")]
#[doc(alias = "MADV_POPULATE_WRITE")]
pub fn prefault<M, F>(
    memory: &M,
    threads: NonZeroUsize,
    mut progress: F,
) -> Result<(), PrefaultError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
    F: FnMut(Progress) -> ControlFlow<()> + Send,
{
    let mappings = memory
        .iter()
        .map(|region| Ok((span_of(region), usable::<_, PrefaultError>(region)?)))
        .collect::<Result<Vec<_>, PrefaultError>>()?;
    let host = HostResources::current();
    run(&mappings, threads, &mut progress, &host)
}

/// The range that a thread populates at a time.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    /// The guest addresses of the region in its map.
    region: Span,
    mapping: &'a HostMapping,
    offset: usize,
    pub(super) len: usize,
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
        let len = to_u64(step.len);
        let (done, total) = (self.done.saturating_add(len), self.total);
        match result {
            Ok(()) => {
                self.done = done;
                if (self.progress)(Progress { done, total }).is_break() && done < total {
                    self.end = Some(PrefaultError::Cancelled { done, total });
                }
            }
            Err(source) => {
                let region = step.region;
                self.end = Some(PrefaultError::System {
                    region,
                    start: region.start.saturating_add(to_u64(step.offset)),
                    len,
                    done: self.done,
                    total,
                    source,
                });
            }
        }
    }
}

/// Populates mappings, as [`prefault`] does. Each has the guest addresses of its region.
pub(crate) fn run(
    mappings: &[(Span, &HostMapping)],
    threads: NonZeroUsize,
    progress: &mut (dyn FnMut(Progress) -> ControlFlow<()> + Send),
    host: &HostResources,
) -> Result<(), PrefaultError> {
    check_memory(mappings, host)?;
    let steps: Vec<Step<'_>> = mappings.iter().flat_map(steps).collect();
    let total = steps
        .iter()
        .fold(0u64, |sum, step| sum.saturating_add(to_u64(step.len)));
    let count = threads.get().min(steps.len()).saturating_sub(1);
    // Threads move only for memory with a NUMA policy.
    let moves = |(_, mapping): &(Span, &HostMapping)| !mapping.options.numa.nodes().is_empty();
    let moves = count > 0 && mappings.iter().any(moves);
    let allowed = moves.then(Cpus::allowed).and_then(Result::ok);
    let queues = queues(steps, allowed.as_ref(), host);
    let state = Mutex::new(State {
        done: 0,
        total,
        progress,
        end: None,
    });
    let work = |number: usize| {
        for queue in in_turn(&queues, number) {
            if let (true, Some(cpus)) = (number > 0, &queue.cpus) {
                // If the system refuses to move the thread, the pages still come from the right
                // nodes.
                let _ = cpus.apply();
            }
            while let Some(step) = queue.take() {
                let result = populate(step);
                // Poisoned: the callback has panicked, and `run_on_threads` continues the panic.
                let Ok(mut state) = state.lock() else {
                    return;
                };
                if state.end.is_none() {
                    state.finish(step, result);
                }
                if state.end.is_some() {
                    queues.iter().for_each(Queue::finish);
                    return;
                }
            }
        }
    };
    run_on_threads(c"prefault", count, &work);
    let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match state.end {
        None => Ok(()),
        Some(error) => Err(cause_of(error, mappings, host)),
    }
}

/// The steps of memory on the same NUMA nodes.
pub(super) struct Queue<'a> {
    pub(super) steps: Vec<Step<'a>>,
    next: AtomicUsize,
    /// The CPUs to populate it on: those of its nodes, or all that this process may use. `None` if
    /// no thread must move.
    pub(super) cpus: Option<Cpus>,
}

impl Queue<'_> {
    fn take(&self) -> Option<&Step<'_>> {
        // Relaxed: the counter protects no other memory.
        self.steps.get(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Skips the remaining steps.
    fn finish(&self) {
        self.next.store(self.steps.len(), Ordering::Relaxed);
    }
}

/// Sorts steps into one queue for each set of NUMA nodes.
///
/// `allowed` are the CPUs that threads may use, or `None` if they must not move.
pub(super) fn queues<'a>(
    steps: Vec<Step<'a>>,
    allowed: Option<&Cpus>,
    host: &HostResources,
) -> Vec<Queue<'a>> {
    let mut by_nodes: BTreeMap<&[u32], Vec<Step<'a>>> = BTreeMap::new();
    for step in steps {
        let nodes = step.mapping.options.numa.nodes();
        by_nodes.entry(nodes).or_default().push(step);
    }
    let queue = |(nodes, steps)| Queue {
        steps,
        next: AtomicUsize::new(0),
        cpus: cpus_of(nodes, allowed, host),
    };
    by_nodes.into_iter().map(queue).collect()
}

/// Returns all items, starting with a different one for each number.
fn in_turn<T>(items: &[T], number: usize) -> impl Iterator<Item = &T> {
    let first = number.checked_rem(items.len()).unwrap_or(0);
    items.iter().cycle().skip(first).take(items.len())
}

/// Populates the pages of a step that are plugged.
fn populate(step: &Step<'_>) -> io::Result<()> {
    let mapping = step.mapping;
    // Without this lock, a block that is unplugged at the same time would keep the new pages. On
    // Windows, a discard makes pages inaccessible while it runs.
    let _held = mapping.hold_blocks()?;
    let Some(blocks) = mapping.plugged_blocks() else {
        return populate_pages(mapping, step.offset, step.len);
    };
    let mut plugged = blocks.runs_in(step.offset, step.len);
    plugged.try_for_each(|(offset, len)| populate_pages(mapping, offset, len))
}

/// Returns the accessible ranges of a mapping, as offset and length.
pub(super) fn accessible(mapping: &HostMapping) -> Vec<(usize, usize)> {
    match mapping.plugged_blocks() {
        Some(blocks) => blocks.runs().collect(),
        None => vec![(0, mapping.mapped().len())],
    }
}

/// Divides the accessible parts of a mapping into steps.
pub(super) fn steps<'a>(
    &(region, mapping): &(Span, &'a HostMapping),
) -> impl Iterator<Item = Step<'a>> + use<'a> {
    let page = usize::try_from(mapping.page_size()).unwrap_or(STEP);
    let step = STEP.max(page);
    accessible(mapping)
        .into_iter()
        .flat_map(move |(start, len)| {
            (0..len).step_by(step).map(move |at| Step {
                region,
                mapping,
                offset: start.saturating_add(at),
                len: len.saturating_sub(at).min(step),
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_turn_of_each_number_begins_at_another_item() {
        let all = |number| in_turn(&[7, 8, 9], number).copied().collect::<Vec<_>>();
        assert_eq!([all(0), all(1)], [[7, 8, 9], [8, 9, 7]]);
        assert_eq!(all(5), [9, 7, 8]);
        assert_eq!(in_turn::<u8>(&[], 1).count(), 0);
    }
}
