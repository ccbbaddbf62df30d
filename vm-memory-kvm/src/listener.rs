//! [`KvmSlots`] as a listener of guest memory.

use vm_memory::listeners::{BoxError, ChangeKind, MemoryChange, MemoryListener, NotAsBefore};
use vm_memory::GuestMemoryRegion;

use crate::{KvmSlots, SlotError};

/// Creates slots for ranges that become accessible, and deletes those of ranges that go.
///
/// The log is on for all slots while it is needed for one region, by
/// [`track_writes`](vm_memory::GuestMemoryAtomic::track_writes). The first harvest after the start
/// returns all slots, which the first copy of a migration reads in any case. Use either that or
/// [`set_tracking`](KvmSlots::set_tracking).
impl<R: GuestMemoryRegion> MemoryListener<R> for KvmSlots {
    fn name(&self) -> &str {
        "KVM memory slots"
    }

    fn change(&mut self, change: &MemoryChange<'_, R>) -> Result<(), BoxError> {
        match change.kind() {
            ChangeKind::Plugged => self.plug(change.region(), change.offset(), change.len()),
            ChangeKind::Unplugged => self.unplug(change.region(), change.offset(), change.len()),
            ChangeKind::TrackingStarted => self.start_region(change.start()),
            ChangeKind::TrackingStopped => self.stop_region(change.start()),
            // The guest may use plugged ranges only. KVM itself notices pages that are discarded.
            _ => Ok(()),
        }
        .map_err(|error| match error {
            SlotError::NotUndone { .. } => NotAsBefore::new(error).into(),
            _ => error.into(),
        })
    }
}
