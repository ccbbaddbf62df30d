//! [`Tracking`]: the switch that turns the marks of writes on and off.
//!
//! A writer stores its data and then reads the switch. If it finds the switch off, it does not
//! mark. The first copy of a migration must then read the data, since no harvest returns the page.
//! So both sides have a full fence between the two steps:
//!
//! | thread | first | fence | then |
//! |---|---|---|---|
//! | writer | stores the data | `W` in [`Tracking::is_on_after_write`] | loads the switch |
//! | migration | switches on | `C` in [`Tracking::switch`] | loads the data |
//!
//! Of the two fences one precedes the other in the total order. If `W` comes first, the migration
//! reads the data. If `C` comes first, the writer finds the switch on, and marks.
//!
//! A writer that finds the switch on needs no fence here. It marks the page, and [`super::marks`]
//! proves that the harvest finds the data. `verify/loom` explores this file. Its mutants leave out
//! each fence, and show that a model loses a page.

use super::sync::{fence, AtomicU8, Ordering};

/// Writes mark pages.
const ON: u8 = 0;
/// Writes do not mark pages.
const OFF: u8 = 1;
/// Writes do not mark pages. Writers are paused while the switch changes, so they need no fence.
const OFF_UNTIL_PAUSED: u8 = 2;

/// A switch for marking, which threads read while it changes.
#[derive(Debug)]
pub(super) struct Tracking {
    state: AtomicU8,
    /// The state for off: `OFF` or `OFF_UNTIL_PAUSED`.
    off: u8,
}

impl Tracking {
    /// Creates a switch that is on.
    pub(super) fn new() -> Self {
        Self {
            state: AtomicU8::new(ON),
            off: OFF,
        }
    }

    /// Creates a switch that is on, and that changes only while writers are paused.
    pub(super) fn switched_while_paused() -> Self {
        Self {
            off: OFF_UNTIL_PAUSED,
            ..Self::new()
        }
    }

    /// Returns a new switch in the same state.
    pub(super) fn copy(&self) -> Self {
        Self {
            state: AtomicU8::new(self.state.load(Ordering::SeqCst)),
            off: self.off,
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.state.load(Ordering::SeqCst) == ON
    }

    /// Returns whether a write must mark. The data were stored before the call.
    #[inline(always)]
    pub(super) fn is_on_after_write(&self) -> bool {
        match self.state.load(Ordering::Relaxed) {
            ON => true,
            OFF => self.is_on_after_fence(),
            _ => false,
        }
    }

    #[inline(never)]
    fn is_on_after_fence(&self) -> bool {
        fence(Ordering::SeqCst);
        self.is_on()
    }

    /// Turns the switch on or off.
    ///
    /// After the call, this thread reads the data of each write that did not find the switch on.
    pub(super) fn switch(&self, on: bool) {
        let state = if on { ON } else { self.off };
        self.state.store(state, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}
