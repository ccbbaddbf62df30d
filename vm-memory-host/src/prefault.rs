//! [`prefault`]: pages that are there before the guest asks for them.

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

/// How far a prefault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that have been brought in.
    pub done: u64,
    /// Bytes that there are to bring in.
    pub total: u64,
}

/// How much is brought in by one system call: long enough that the call costs nothing beside the pages, short enough that a callback is heard
/// often. A multiple of every size of huge pages up to itself; larger pages are brought in one by one.
const STEP: usize = 32 << 20;

/// Brings in all pages of guest memory, so that the guest does not wait for them, with so many threads, of which the calling one is one.
///
/// Anonymous memory, memfds and shared files get pages that can be written, and the bytes stay as they are; a private file is read, and copied page by page
/// when the guest writes. Blocks that are not plugged are left out. Nothing is marked dirty. Where memory is bound to NUMA nodes, it comes from
/// there whichever thread asks for it.
///
/// `progress` is called after every 32 MiB (or huge page, if that is larger), by one thread at a time and with ever more bytes. If it answers [`ControlFlow::Break`], the others finish what they
/// are at; what was brought in stays.
///
/// System calls: `madvise` with `MADV_POPULATE_WRITE` or `MADV_POPULATE_READ` (Linux 5.14), and `clone3` for threads.
///
/// # Errors
///
/// [`PrefaultError`], with what was done by then.
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

/// What one system call brings in.
#[derive(Clone, Copy)]
struct Step<'a> {
    mapping: &'a HostMapping,
    offset: usize,
    len: usize,
}

/// What the threads have in common.
struct State<'a> {
    done: u64,
    progress: &'a mut (dyn FnMut(Progress) -> ControlFlow<()> + Send),
    end: Option<PrefaultError>,
}

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
        progress,
        end: None,
    });
    let work = || loop {
        // Relaxed: the number is all that the threads share here.
        let Some(step) = steps.get(next.fetch_add(1, Ordering::Relaxed)) else {
            return;
        };
        let answer = bring_in(step);
        // A callback that has panicked ends the whole call.
        let Ok(mut state) = state.lock() else {
            return;
        };
        if state.end.is_some() {
            return;
        }
        match answer {
            Ok(()) => {
                state.done = state.done.saturating_add(bytes(step.len));
                let done = state.done;
                if (state.progress)(Progress { done, total }).is_break() && done < total {
                    state.end = Some(PrefaultError::Cancelled { done, total });
                    next.store(steps.len(), Ordering::Relaxed);
                }
            }
            Err(source) => {
                let done = state.done;
                state.end = Some(PrefaultError::System {
                    region: step.mapping.span(),
                    start: step.mapping.span().start.saturating_add(bytes(step.offset)),
                    len: bytes(step.len),
                    done,
                    total,
                    source,
                });
                next.store(steps.len(), Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(steps.len()) {
            let thread = std::thread::Builder::new().name("prefault".to_owned());
            // Where there can be no more threads, those that there are do it.
            if thread.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    state.end.map_or(Ok(()), Err)
}

/// Whether the machine has the memory. What is in memory already is looked up only if the whole would be too much, and that could change it.
fn check_memory(mappings: &[&HostMapping], host: &HostResources) -> Result<(), PrefaultError> {
    let (Some(available), Some(all)) = (host.available_memory(), host.all_memory()) else {
        return Ok(());
    };
    // Huge pages are in a pool, and the cache of a file is memory to be had.
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

/// Brings the pages of a step in: of blocks, those that are still plugged.
fn bring_in(step: &Step<'_>) -> io::Result<()> {
    let (mapping, advice) = (step.mapping, advice(step.mapping));
    let Some(blocks) = mapping.plugged_blocks() else {
        return mapping.mapped().advise(step.offset, step.len, advice);
    };
    // A block that is unplugged meanwhile would keep what is brought in.
    let _held = mapping.hold_blocks();
    let mut plugged = blocks.runs_in(step.offset, step.len);
    plugged.try_for_each(|(offset, len)| mapping.mapped().advise(offset, len, advice))
}

/// The parts of a mapping that can be reached, in steps.
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

fn advice(mapping: &HostMapping) -> Advice {
    let copied = mapping.file().is_some() && mapping.backing.sharing == Sharing::Private;
    if copied && mapping.kind() != BackingKind::Hugetlb {
        Advice::PopulateRead
    } else {
        Advice::PopulateWrite
    }
}
