//! The parts that the models share: the variant of the code that is explored, and loom's types
//! under the names of the libraries.

use core::cell::Cell;
use core::panic::Location;

use loom::sync::atomic::{self, Ordering};
use loom::sync::{Mutex, MutexGuard};

/// The variant of the libraries' files that is explored.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    /// Some loads are read-modify-writes that change nothing: those of counts, and sequentially
    /// consistent ones.
    ///
    /// loom 0.7.3 does not reorder a load with a later read-modify-write of the same atomic by
    /// another thread. A run of plain loads therefore misses some interleavings. It also lets a
    /// sequentially consistent load return an old value. A run of this kind has all interleavings,
    /// and the old values of weaker loads only.
    pub(crate) loads_modify: bool,
    /// An operation that is weakened.
    pub(crate) mutant: Option<Mutant>,
}

/// A weakened operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mutant {
    /// The end of the file's path, and the line in it.
    pub(crate) file: &'static str,
    pub(crate) line: u32,
    pub(crate) wrong: Wrong,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Wrong {
    /// Has the ordering `Relaxed`.
    Relaxed,
    /// Has the strongest ordering below `SeqCst`.
    AcqRel,
    /// Is a load and then a store.
    InTwo,
    /// Is left out.
    Missing,
}

std::thread_local! {
    /// loom runs all threads of a model on the thread that explores it.
    static RUN: Cell<Run> = const { Cell::new(Run { loads_modify: false, mutant: None }) };
}

/// Selects the variant for the models that this thread explores next.
pub(crate) fn choose(run: Run) {
    RUN.set(run);
}

/// Returns whether loads are read-modify-writes in this run.
pub(crate) fn loads_modify() -> bool {
    RUN.get().loads_modify
}

/// Returns the change of the operation at a place, if there is one.
pub(crate) fn wrong(at: &Location<'_>) -> Option<Wrong> {
    let mutant = RUN.get().mutant?;
    let here = at.file().ends_with(mutant.file) && at.line() == mutant.line;
    here.then_some(mutant.wrong)
}

/// Returns whether a model fails, with either kind of load.
pub(crate) fn fails(model: fn(), mutant: Option<Mutant>) -> bool {
    [false, true].into_iter().any(|loads_modify| {
        let run = move || {
            choose(Run {
                loads_modify,
                mutant,
            });
            model();
        };
        // On a new thread: a failed model does not reset loom's thread-local state.
        std::thread::spawn(run).join().is_err()
    })
}

/// Leaves out the first line with `operation` after the line with `place`.
pub(crate) fn left_out(
    (file, source): (&'static str, &str),
    place: &str,
    operation: &str,
) -> Mutant {
    let mut lines = (1u32..).zip(source.lines());
    lines
        .by_ref()
        .find(|(_, line)| line.contains(place))
        .unwrap_or_else(|| panic!("{file} has no line with {place:?}"));
    let (line, _) = lines
        .find(|(_, line)| line.contains(operation))
        .unwrap_or_else(|| panic!("no {operation:?} follows {place:?} in {file}"));
    let wrong = Wrong::Missing;
    Mutant { file, line, wrong }
}

#[track_caller]
pub(crate) fn fence(order: Ordering) {
    if wrong(Location::caller()).is_none() {
        atomic::fence(order);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no model panics while it holds a lock")
}

/// The guarantees of arc-swap that the libraries use, for a counted pointer. Loads and swaps of the
/// pointer have one order, and `swap` returns after each reader of the old pointer was counted.
#[derive(Debug)]
pub(crate) struct Swap<P>(Mutex<P>);

impl<P: Clone> Swap<P> {
    pub(crate) fn new(pointer: P) -> Self {
        Self(Mutex::new(pointer))
    }

    pub(crate) fn load(&self) -> P {
        lock(&self.0).clone()
    }

    pub(crate) fn swap(&self, pointer: P) -> P {
        core::mem::replace(&mut lock(&self.0), pointer)
    }
}
