//! [`tell`]: tells listeners of changes, undoes what one refuses, and detaches those that fail.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{ListenerId, OnError};
use crate::guest_memory::GuestMemoryBackend;
use crate::listeners::{
    call, BoxError, ListenerError, MemoryChange, MemoryListener, NotAsBefore, Pin,
};
use crate::region::GuestMemoryRegion;

/// A listener of a memory.
pub(super) struct Entry<M: GuestMemoryBackend> {
    pub(super) id: ListenerId,
    pub(super) name: String,
    pub(super) listener: Box<dyn MemoryListener<M::R>>,
    pub(super) detached: Option<Kept<M>>,
}

/// The memory that a detached listener may use.
pub(super) struct Kept<M> {
    _maps: Vec<Arc<M>>,
    _pins: Vec<Pin>,
    pub(super) error: String,
}

/// Tells listeners of the changes of one transaction, and to commit them.
///
/// `maps` are those that a listener may use if it is detached. Without changes, no one is told.
pub(super) fn tell<M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    changes: &[MemoryChange<'_, M::R>],
    maps: &[Arc<M>],
    on_error: OnError,
) -> Result<(), ListenerError> {
    let mut told = Vec::new();
    let Err(mut error) = try_to_tell(entries, changes, maps, on_error, &mut told) else {
        return Ok(());
    };
    let undone = undo(entries, told, maps);
    if let ListenerError::Refused { detached, .. } | ListenerError::NotCommitted { detached, .. } =
        &mut error
    {
        *detached = undone;
    }
    Err(error)
}

/// Tells listeners of changes. Adds to `told` the number of each listener that was told, and of
/// which change.
fn try_to_tell<'a, M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    changes: &[MemoryChange<'a, M::R>],
    maps: &[Arc<M>],
    on_error: OnError,
    told: &mut Vec<(usize, MemoryChange<'a, M::R>)>,
) -> Result<(), ListenerError> {
    if changes.is_empty() {
        return Ok(());
    }
    for change in changes {
        let count = entries.len();
        for place in 0..count {
            let number = if change.kind().takes_away() {
                count.saturating_sub(1).saturating_sub(place)
            } else {
                place
            };
            let Some(entry) = attached(entries, number) else {
                continue;
            };
            match call(|| entry.listener.change(change)) {
                Ok(()) => told.push((number, *change)),
                Err(source) if on_error == OnError::Detach => entry.detach(maps, &source),
                Err(source) => {
                    if source.is::<NotAsBefore>() {
                        entry.detach(maps, &source);
                    }
                    return Err(ListenerError::Refused {
                        listener: entry.name.clone(),
                        kind: change.kind(),
                        start: change.start(),
                        len: change.len(),
                        detached: Vec::new(),
                        source,
                    });
                }
            }
        }
    }
    for number in 0..entries.len() {
        let Some(entry) = attached(entries, number) else {
            continue;
        };
        match call(|| entry.listener.commit()) {
            Ok(()) => {}
            Err(source) if on_error == OnError::Detach => entry.detach(maps, &source),
            Err(source) => {
                return Err(ListenerError::NotCommitted {
                    listener: entry.name.clone(),
                    detached: Vec::new(),
                    source,
                })
            }
        }
    }
    Ok(())
}

/// Tells listeners the inverse of what they were told, in reverse order.
///
/// Returns the names of the listeners that failed. They are detached.
fn undo<M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    told: Vec<(usize, MemoryChange<'_, M::R>)>,
    maps: &[Arc<M>],
) -> Vec<String> {
    let numbers: BTreeSet<usize> = told.iter().map(|(number, _)| *number).collect();
    let mut failed = Vec::new();
    let mut undo = |number, step: &mut dyn FnMut(&mut dyn MemoryListener<M::R>) -> Result<_, _>| {
        let Some(entry) = attached(entries, number) else {
            return;
        };
        if let Err(source) = call(|| step(&mut *entry.listener)) {
            entry.detach(maps, &source);
            failed.push(entry.name.clone());
        }
    };
    for (number, change) in told.into_iter().rev() {
        if let Some(inverse) = change.inverse() {
            undo(number, &mut |listener| listener.change(&inverse));
        }
    }
    for number in numbers {
        undo(number, &mut |listener| listener.commit());
    }
    failed
}

/// Returns the name of a listener, for errors.
pub(super) fn name_of<R>(listener: &mut dyn MemoryListener<R>) -> Result<String, ListenerError> {
    let mut name = String::new();
    let named = call(|| {
        name = listener.name().to_owned();
        Ok(())
    });
    named.map_err(|source| ListenerError::NotCommitted {
        listener: "without a name".to_owned(),
        detached: Vec::new(),
        source,
    })?;
    Ok(name)
}

/// Returns a listener that is not detached.
fn attached<M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    number: usize,
) -> Option<&mut Entry<M>> {
    entries
        .get_mut(number)
        .filter(|entry| entry.detached.is_none())
}

impl<M: GuestMemoryBackend> Entry<M> {
    /// Keeps all that the listener may use, and tells it nothing more.
    fn detach(&mut self, maps: &[Arc<M>], error: &BoxError) {
        let mut text = String::new();
        // A panic of `Display` leaves the text empty.
        let _ = call(|| {
            text = error.to_string();
            Ok(())
        });
        let regions = maps.iter().flat_map(|map| map.iter());
        let pins =
            regions.filter_map(|region| Some(region.notifier()?.pin_always(0, region.len())));
        self.detached = Some(Kept {
            _pins: pins.collect(),
            _maps: maps.to_vec(),
            error: text,
        });
    }
}
