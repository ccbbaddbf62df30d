//! [`KvmSlots`] as a listener of guest memory.

use vm_memory::listeners::{BoxError, ChangeKind, MemoryChange, MemoryListener};
use vm_memory::GuestMemoryRegion;

use crate::KvmSlots;

/// Creates slots for ranges that become accessible, and deletes those of ranges that go.
///
/// The log is on for all slots while it is needed for one region, by
/// [`track_writes`](vm_memory::GuestMemoryAtomic::track_writes). Use either that or
/// [`set_tracking`](KvmSlots::set_tracking).
impl<R: GuestMemoryRegion> MemoryListener<R> for KvmSlots {
    fn name(&self) -> &str {
        "KVM memory slots"
    }

    fn change(&mut self, change: &MemoryChange<'_, R>) -> Result<(), BoxError> {
        match change.kind() {
            ChangeKind::Plugged => self.plug(change.region(), change.offset(), change.len())?,
            ChangeKind::Unplugged => self.remove(change.start(), change.len())?,
            ChangeKind::TrackingStarted => {
                if self.tracked.is_empty() {
                    self.set_tracking(true)?;
                }
                self.tracked.insert(change.start());
            }
            ChangeKind::TrackingStopped => {
                if self.tracked.iter().eq([&change.start()]) {
                    self.set_tracking(false)?;
                }
                self.tracked.remove(&change.start());
            }
            // The guest may use plugged ranges only. KVM itself notices pages that are discarded.
            _ => {}
        }
        Ok(())
    }
}
