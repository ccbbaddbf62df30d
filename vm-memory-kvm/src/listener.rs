//! [`KvmSlots`] as a listener of guest memory.

use vm_memory::listeners::{BoxError, ChangeKind, MemoryChange, MemoryListener};
use vm_memory::GuestMemoryRegion;

use crate::KvmSlots;

/// Creates slots for ranges that become accessible, and deletes those of ranges that go.
impl<R: GuestMemoryRegion> MemoryListener<R> for KvmSlots {
    fn name(&self) -> &str {
        "KVM memory slots"
    }

    fn change(&mut self, change: &MemoryChange<'_, R>) -> Result<(), BoxError> {
        match change.kind() {
            ChangeKind::Plugged => self.plug(change.region(), change.offset(), change.len())?,
            ChangeKind::Unplugged => self.remove(change.start(), change.len())?,
            // The guest may use plugged ranges only. KVM itself notices pages that are discarded.
            _ => {}
        }
        Ok(())
    }
}
