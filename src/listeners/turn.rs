//! [`Turn`]: a lock that several objects are taken with, in one order.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose contents are consistent even after a panic of another holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lock without a guard, so that its holder can own it together with others.
///
/// Without waiting threads, it makes no system call.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    state: Mutex<State>,
    free: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_taken: bool,
    /// The number of threads that wait.
    waiting: usize,
}

impl Turn {
    fn take(&self) {
        let mut state = lock(&self.state);
        state.waiting = state.waiting.saturating_add(1);
        while state.is_taken {
            state = self
                .free
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting = state.waiting.saturating_sub(1);
        state.is_taken = true;
    }

    fn give_back(&self) {
        let mut state = lock(&self.state);
        state.is_taken = false;
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.free.notify_one();
        }
    }
}

/// An owner of a turn, or a pointer to one.
pub(crate) trait HasTurn {
    fn turn(&self) -> &Turn;
}

impl<T: HasTurn + ?Sized> HasTurn for &T {
    fn turn(&self) -> &Turn {
        (**self).turn()
    }
}

/// Turns that are held until this is dropped, with their owners.
pub(crate) struct Turns<T: HasTurn>(Vec<T>);

impl<T: HasTurn> Turns<T> {
    /// Takes the turns of the owners, in that order. Each must occur once.
    pub(crate) fn take(owners: impl IntoIterator<Item = T>) -> Self {
        let take = |owner: T| {
            owner.turn().take();
            owner
        };
        Self(owners.into_iter().map(take).collect())
    }

    /// Gives the turns back.
    pub(crate) fn give_back(&mut self) {
        self.0.drain(..).for_each(|owner| owner.turn().give_back());
    }

    pub(crate) fn owners(&self) -> &[T] {
        &self.0
    }
}

impl<T: HasTurn> Drop for Turns<T> {
    fn drop(&mut self) {
        self.give_back();
    }
}
