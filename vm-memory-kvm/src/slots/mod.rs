//! [`KvmSlots`]: the memory slots of one virtual machine.

mod builder;
mod log;
mod numbers;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::arithmetic::{to_u64, to_usize};
use vm_memory::{
    guest_memory, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
    Permissions,
};

pub use builder::{DirtyLog, KvmSlotsBuilder};
pub use log::SlotLogs;

use crate::error::SlotError;
use crate::sys::{MappedRing, Ring, SlotRange};
use table::SlotTable;

/// The memory slots of a virtual machine, and their dirty log.
///
/// A clone is a handle to the same slots. Give one to the memory as its listener, and keep another
/// one for the dirty log.
///
/// Each range becomes a slot, or several ones if there is a
/// [size of slots](KvmSlotsBuilder::slot_size). Ranges are not merged. KVM cannot change the size
/// of a slot: to remove a part of it, the slot must be deleted and created again. A vCPU that uses
/// the rest meanwhile exits as if there was no memory (`VcpuExit::MmioRead`). Without merging, this
/// happens only if a range is removed in parts: see [`remove`](Self::remove).
///
/// Host memory may have slots at several guest addresses. Its dirty pages are those of the slots
/// through which the guest has written.
///
/// # Listener
///
/// `GuestMemoryAtomic::add_listener` makes the slots follow the map, and its plugged blocks. The
/// memory calls the listener before a range goes, and before others see a range that comes. If too
/// few slots are available, the memory does not change.
///
/// # Tracking
///
/// [`set_tracking`](Self::set_tracking) starts the dirty log, and [`take_log`](Self::take_log)
/// harvests it. No written page is lost when slots change, or when a call of KVM fails:
///
/// - A slot that is deleted while tracking is on counts as dirty, all of it, also if its rest gets
///   a new slot.
/// - A slot that is created while tracking is on is tracked. Its memory may have content that no
///   vCPU has written: see [`vm_memory::dirty`] for regions that are added between rounds.
/// - Pages that were read from KVM are kept here, until a harvest returns them.
/// - Pages that were written before tracking stops stay in the log for the next harvest.
///
/// # Examples
///
/// ```no_run
/// use std::sync::Arc;
/// use kvm_ioctls::Kvm;
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_kvm::KvmSlots;
///
/// let memory: GuestMemoryMmap<AtomicBitmap> =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
/// let vm = Arc::new(Kvm::new()?.create_vm()?);
/// // SAFETY: `memory` is dropped after the last vCPU of the machine.
/// let slots = unsafe { KvmSlots::builder(Arc::clone(&vm)).build() }?;
/// slots.add_memory(&memory)?;
/// assert_eq!(slots.slots()[0].len, 0x10_000);
/// let vcpu = vm.create_vcpu(0)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "KVM_SET_USER_MEMORY_REGION")]
#[doc(alias = "memslot")]
#[derive(Clone)]
pub struct KvmSlots {
    table: Arc<Mutex<SlotTable>>,
}

/// A memory slot, as [`KvmSlots::slots`] lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlotInfo {
    /// The number of the slot.
    pub number: u32,
    /// The first guest address.
    pub start: GuestAddress,
    /// The length in bytes.
    pub len: u64,
    /// Whether writes of the guest exit to the VMM.
    pub is_read_only: bool,
    /// Whether KVM logs the pages that vCPUs write.
    pub is_tracked: bool,
}

impl KvmSlots {
    /// Returns a builder for the slots of a virtual machine.
    pub fn builder(vm: Arc<VmFd>) -> KvmSlotsBuilder {
        KvmSlotsBuilder::new(vm)
    }

    fn table(&self) -> MutexGuard<'_, SlotTable> {
        // No call of KVM panics, so a table is consistent whenever the lock is released.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds slots for host memory.
    ///
    /// The guest finds the `len` bytes at `host` at `start`. If `access` does not include writes,
    /// the guest's writes exit to the VMM.
    ///
    /// # Errors
    ///
    /// - [`SlotError::NotPages`], [`SlotError::HostAddress`] or [`SlotError::PastTheEnd`] if the
    ///   range does not consist of pages;
    /// - [`SlotError::Overlap`] if a part has a slot already;
    /// - [`SlotError::TooManySlots`] if too few slots are available;
    /// - [`SlotError::Kvm`] if KVM refuses a slot;
    /// - [`SlotError::NotUndone`] if KVM refuses a slot and does not delete those before it.
    ///
    /// After an error other than `NotUndone`, the guest has no slot for the range.
    ///
    /// # Safety
    ///
    /// 1. The `len` bytes at `host` are mapped, with a protection that permits reads, and writes if
    ///    `access` includes them. This holds until [`remove`](Self::remove) of the range has
    ///    succeeded, or until no vCPU of the machine runs any more. If the call fails, it holds for
    ///    the ranges `remaining` of [`SlotError::NotUndone`].
    /// 2. No Rust reference to the bytes exists meanwhile. All accesses to them permit the guest to
    ///    write the bytes at the same time.
    #[expect(unsafe_code, reason = "the guest accesses host memory by its address")]
    pub unsafe fn add(
        &self,
        start: GuestAddress,
        len: u64,
        host: *mut u8,
        access: Permissions,
    ) -> Result<(), SlotError> {
        self.table().add(&[slot_range(start, len, host, access)])
    }

    /// Adds slots for the accessible ranges of all regions of a memory.
    ///
    /// Use it for a memory that does not change. Otherwise, add a clone of this object to the
    /// memory as its listener. Regions without a host address get no slot.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`add`](Self::add), and [`SlotError::NoHostAddress`] if a region
    /// returns another error than `HostAddressNotAvailable`. After an error other than `NotUndone`,
    /// no region has a slot.
    pub fn add_memory<M: GuestMemoryBackend + ?Sized>(&self, memory: &M) -> Result<(), SlotError> {
        let mut ranges = Vec::new();
        for region in memory.iter() {
            let len = to_usize(region.len());
            let mut offset = 0;
            while offset < len {
                let at = MemoryRegionAddress(to_u64(offset));
                let run = region.reachable_range(at, len.saturating_sub(offset));
                if run.is_empty() {
                    break;
                }
                let start = to_u64(offset.saturating_add(run.start));
                ranges.extend(range_of(region, start, to_u64(run.len()))?);
                offset = offset.saturating_add(run.end);
            }
        }
        self.table().add(&ranges)
    }

    /// Adds slots for the `len` bytes at `offset` in a region, unless it has no host address.
    pub(crate) fn plug<R: GuestMemoryRegion>(
        &self,
        region: &R,
        offset: u64,
        len: u64,
    ) -> Result<(), SlotError> {
        let range = range_of(region, offset, len)?;
        self.table().add(range.as_slice())
    }

    /// Deletes the slots of a range of a region, which need not be mapped here.
    pub(crate) fn unplug<R: GuestMemoryRegion>(
        &self,
        region: &R,
        offset: u64,
        len: u64,
    ) -> Result<(), SlotError> {
        match range_of(region, offset, len)? {
            Some(range) => self.remove(GuestAddress(range.start), len),
            None => Ok(()),
        }
    }

    /// Logs the writes to a region, and so to all slots. All slots count as dirty at the start: if
    /// a stop is undone, writes in the meantime are not in the log.
    pub(crate) fn start_region(&self, start: GuestAddress) -> Result<(), SlotError> {
        let mut table = self.table();
        if table.tracked_regions.is_empty() {
            table.set_tracking(true)?;
            table.mark_all();
        }
        table.tracked_regions.insert(start);
        Ok(())
    }

    /// Ends the log if no other region needs it.
    pub(crate) fn stop_region(&self, start: GuestAddress) -> Result<(), SlotError> {
        let mut table = self.table();
        if table.tracked_regions.iter().eq([&start]) {
            table.set_tracking(false)?;
        }
        table.tracked_regions.remove(&start);
        Ok(())
    }

    /// Removes the slots of the `len` bytes at `start`. Parts without a slot are ignored.
    ///
    /// A slot that is only partly in the range is deleted, and its rest gets a new slot. A vCPU
    /// that accesses the rest meanwhile exits as if there was no memory. Pause the vCPUs for this
    /// call, or use the size of the blocks that the guest unplugs as
    /// [size of slots](KvmSlotsBuilder::slot_size).
    ///
    /// # Errors
    ///
    /// - [`SlotError::NotPages`] or [`SlotError::PastTheEnd`] if the range does not consist of
    ///   pages;
    /// - [`SlotError::TooManySlots`] if the rest needs more slots than are available;
    /// - [`SlotError::Kvm`] if KVM refuses a call;
    /// - [`SlotError::NotUndone`] if KVM refuses a call, and also those that undo the ones before.
    ///
    /// After an error other than `NotUndone`, all ranges have slots as before.
    pub fn remove(&self, start: GuestAddress, len: u64) -> Result<(), SlotError> {
        self.table().remove(start.0, len)
    }

    /// Turns the dirty log of all slots on or off, also of those that are added later.
    ///
    /// Before a migration copies memory, call this and
    /// [`DirtyMemory::set_tracking`](vm_memory::dirty::DirtyMemory::set_tracking), in any order.
    /// Writes that end after the call returns are in the log. When tracking stops, the next
    /// harvest still returns the pages that were written before the call.
    ///
    /// # Errors
    ///
    /// - [`SlotError::Kvm`] if KVM refuses a call;
    /// - [`SlotError::NotUndone`] if KVM refuses a call, and also those that undo the ones before.
    #[doc(alias = "KVM_MEM_LOG_DIRTY_PAGES")]
    pub fn set_tracking(&self, is_tracking: bool) -> Result<(), SlotError> {
        self.table().set_tracking(is_tracking)
    }

    /// Harvests the pages that vCPUs have written since the last harvest.
    ///
    /// Read the pages after this returns. With [`DirtyLog::Bitmap`] and [`DirtyLog::Manual`], the
    /// log has all writes of the guest before the call. With [`DirtyLog::Ring`], a processor may
    /// hold back pages until its vCPU exits: pause the vCPUs before the last harvest.
    ///
    /// # Errors
    ///
    /// Returns [`SlotError::Kvm`] or [`SlotError::Vm`] if KVM refuses a call. No page is lost: the
    /// next harvest returns all of them.
    #[doc(alias = "KVM_GET_DIRTY_LOG")]
    pub fn take_log(&self) -> Result<SlotLogs, SlotError> {
        self.table().take_log()
    }

    /// Takes the entries of the dirty rings, and keeps their pages for the next harvest.
    ///
    /// Call it when `KVM_RUN` exits because a ring is full (`KVM_EXIT_DIRTY_RING_FULL`, 31).
    /// kvm-ioctls returns `VcpuExit::Unsupported(31)`.
    ///
    /// # Errors
    ///
    /// - [`SlotError::NoRing`] if the log is not a ring;
    /// - [`SlotError::Vm`] if KVM refuses to reset the rings. The pages are kept.
    #[doc(alias = "KVM_EXIT_DIRTY_RING_FULL")]
    #[doc(alias = "KVM_RESET_DIRTY_RINGS")]
    pub fn drain_rings(&self) -> Result<(), SlotError> {
        let mut table = self.table();
        match table.log {
            DirtyLog::Ring { .. } => table.keep_rings(),
            _ => Err(SlotError::NoRing),
        }
    }

    /// Maps the dirty ring of a new vCPU, which has not run yet.
    ///
    /// Call it once for each vCPU of this virtual machine. Access to the ring of another machine
    /// may end the process by SIGBUS.
    ///
    /// # Errors
    ///
    /// - [`SlotError::NoRing`] if the log is not a ring;
    /// - [`SlotError::Vm`] if the ring cannot be mapped.
    #[doc(alias = "KVM_CAP_DIRTY_LOG_RING")]
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), SlotError> {
        let mut table = self.table();
        let DirtyLog::Ring { entries } = table.log else {
            return Err(SlotError::NoRing);
        };
        let ring = MappedRing::map(vcpu, entries, table.page_size);
        let ring = ring.map_err(|source| SlotError::Vm {
            action: "map the dirty ring of a vCPU",
            source,
        })?;
        table.rings.push(Ring::new(Box::new(ring)));
        Ok(())
    }

    /// Lists the slots, in ascending order of guest addresses.
    pub fn slots(&self) -> Vec<SlotInfo> {
        let table = self.table();
        let slots = table.slots.values().map(|slot| SlotInfo {
            number: slot.number,
            start: GuestAddress(slot.range.start),
            len: slot.range.len,
            is_read_only: slot.range.is_read_only,
            is_tracked: slot.is_tracked,
        });
        slots.collect()
    }
}

/// Returns the slot for host memory.
fn slot_range(start: GuestAddress, len: u64, host: *mut u8, access: Permissions) -> SlotRange {
    SlotRange {
        start: start.0,
        len,
        host: to_u64(host.addr()),
        is_read_only: !access.has_write(),
    }
}

/// Returns the slot for the `len` bytes at `offset` in a region, unless it has no host address.
fn range_of<R: GuestMemoryRegion>(
    region: &R,
    offset: u64,
    len: u64,
) -> Result<Option<SlotRange>, SlotError> {
    let past_the_end = || SlotError::PastTheEnd {
        start: region.start_addr(),
        len: region.len(),
    };
    let start = region.start_addr().0.checked_add(offset);
    let start = GuestAddress(start.ok_or_else(past_the_end)?);
    let end = offset.checked_add(len).filter(|end| *end <= region.len());
    end.ok_or_else(past_the_end)?;
    match region.get_host_address(MemoryRegionAddress(offset)) {
        Ok(host) => Ok(Some(slot_range(start, len, host, region.allowed_access()))),
        // A region that is not RAM, or is not mapped here: the guest exits to the VMM.
        Err(guest_memory::Error::HostAddressNotAvailable) => Ok(None),
        Err(source) => Err(SlotError::NoHostAddress { start, len, source }),
    }
}

impl fmt::Debug for KvmSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmSlots")
            .field("slots", &self.slots())
            .finish_non_exhaustive()
    }
}
