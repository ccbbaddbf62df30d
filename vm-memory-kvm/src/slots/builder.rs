//! [`KvmSlotsBuilder`]: the options of slots, and the capabilities of KVM that they need.

use core::ops::Range;
use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    kvm_dirty_gfn, kvm_enable_cap, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NR_MEMSLOTS, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use kvm_ioctls::VmFd;
use vm_memory::arithmetic::to_u64;
use vm_memory::dirty::LogWords;
use vm_memory::GuestAddress;

use super::table::SlotTable;
use super::KvmSlots;
use crate::error::SlotError;
use crate::sys::Vm;

/// The record that KVM keeps of the pages that vCPUs write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DirtyLog {
    /// A bitmap for each slot. A harvest reads and clears each one in a single call, during which
    /// vCPUs that write wait.
    #[default]
    Bitmap,
    /// A bitmap for each slot, which a harvest clears in pieces
    /// (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`). vCPUs that write wait for one piece only.
    Manual {
        /// The number of pages that one call clears. It is rounded to a multiple of 64.
        max_pages: u32,
    },
    /// A ring for each vCPU (`KVM_CAP_DIRTY_LOG_RING`). A harvest costs as much as pages were
    /// written, whatever the size of memory. A vCPU whose ring is full exits:
    /// [`KvmSlots::drain_rings`].
    Ring {
        /// The number of entries of each vCPU, a power of two.
        entries: u32,
    },
}

/// The options of [`KvmSlots`].
///
/// # Examples
///
/// Slots of 2 MiB for a virtio-mem device with such blocks, and a dirty log that is cleared in
/// pieces of 64 MiB:
///
/// ```no_run
/// use std::sync::Arc;
/// use kvm_ioctls::Kvm;
/// use vm_memory_kvm::{DirtyLog, KvmSlots};
///
/// let vm = Arc::new(Kvm::new()?.create_vm()?);
/// let builder = KvmSlots::builder(vm)
///     .slot_size(2 << 20)
///     .dirty_log(DirtyLog::Manual { max_pages: 16384 });
/// // SAFETY: no vCPU of the machine runs.
/// let slots = unsafe { builder.build() }?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "a builder has no effect before build"]
pub struct KvmSlotsBuilder {
    vm: Arc<VmFd>,
    numbers: Range<u32>,
    slot_size: Option<u64>,
    log: DirtyLog,
}

impl KvmSlotsBuilder {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            numbers: 0..u32::MAX,
            slot_size: None,
            log: DirtyLog::default(),
        }
    }

    /// Sets the numbers of slots that may be used. The default is all numbers that KVM has.
    ///
    /// Use it for a VMM that has slots of its own. With [`DirtyLog::Ring`], no page of these other
    /// slots is reported.
    pub fn numbers(mut self, numbers: Range<u32>) -> Self {
        self.numbers = numbers;
        self
    }

    /// Cuts ranges into slots at the multiples of `size` bytes.
    ///
    /// A range that begins and ends at such multiples is then removed without touching its
    /// neighbours. Choose the size of the blocks that a guest plugs and unplugs. The default is one
    /// slot for each range.
    pub fn slot_size(mut self, size: u64) -> Self {
        self.slot_size = Some(size);
        self
    }

    /// Selects the dirty log. The default is [`DirtyLog::Bitmap`].
    pub fn dirty_log(mut self, log: DirtyLog) -> Self {
        self.log = log;
        self
    }

    /// Enables the dirty log in KVM, and returns the slots, of which there are none yet.
    ///
    /// # Errors
    ///
    /// - [`SlotError::SlotSize`] or [`SlotError::RingSize`] for an option that is not permitted;
    /// - [`SlotError::Unsupported`] if this KVM lacks the dirty log;
    /// - [`SlotError::Vm`] if KVM refuses to enable it. Dirty rings cannot be enabled after the
    ///   first vCPU was created.
    ///
    /// # Safety
    ///
    /// 1. A range is accessible memory of a region. [`KvmSlots::add_memory`] gets it, or it is
    ///    plugged in a memory whose listener is a clone of the result. Each range is mapped at its
    ///    host address. The protection permits the
    ///    [`allowed_access`](vm_memory::GuestMemoryRegion::allowed_access) of its region.
    /// 2. Clause 1 holds until the slots of the range were removed with success, or until no vCPU
    ///    of the machine runs any more. If the range cannot be added, it holds for the ranges
    ///    `remaining` of [`SlotError::NotUndone`].
    /// 3. No Rust reference to bytes of these ranges exists meanwhile. All accesses to them permit
    ///    the guest to write the bytes at the same time, as those of `vm_memory` do.
    ///
    /// The regions of a `GuestMemoryMmap` comply if vCPUs run only while it exists. So do those of
    /// a `GuestMemoryAtomic` of such a map, for its listener. The slots are deleted before their
    /// memory is unmapped.
    #[expect(unsafe_code, reason = "the guest accesses host memory by its address")]
    pub unsafe fn build(self) -> Result<KvmSlots, SlotError> {
        // KVM logs in pages of the host.
        let log = LogWords::kvm(GuestAddress(0), &[]);
        let page_size = to_u64(log.page_size.get());
        if let Some(size) = self.slot_size {
            if !size.is_power_of_two() || size < page_size {
                return Err(SlotError::SlotSize { size, page_size });
            }
        }
        enable(&self.vm, self.log, page_size)?;
        let limit = self.vm.check_extension_raw(KVM_CAP_NR_MEMSLOTS.into());
        // A KVM without the capability has 32.
        let limit = u32::try_from(limit)
            .ok()
            .filter(|limit| *limit > 0)
            .unwrap_or(32);
        let numbers = self.numbers.start..self.numbers.end.min(limit);
        // SAFETY: a table passes ranges to this object from three functions of `KvmSlots` only:
        //    `add`, `add_memory` and `plug`.
        // 1. For `add`, its caller has promised that they are mapped (clause 1). For the others,
        //    they are ranges of a region: the caller of this function has promised it (clauses 1
        //    and 2). Both promises end when the slot is deleted, as that of `Vm::new` does.
        // 2. Clause 2 of `add` and clause 3 of this function are clause 2 of `Vm::new`.
        let calls = unsafe { Vm::new(self.vm) };
        let mut table = SlotTable::new(Box::new(calls), numbers, page_size);
        (table.log, table.slot_size) = (self.log, self.slot_size);
        Ok(KvmSlots {
            table: Arc::new(Mutex::new(table)),
        })
    }
}

/// Enables a kind of dirty log.
fn enable(vm: &VmFd, log: DirtyLog, page_size: u64) -> Result<(), SlotError> {
    let has = |cap: u32| u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
    let (cap, argument, action) = match log {
        DirtyLog::Bitmap => return Ok(()),
        DirtyLog::Manual { .. } => {
            let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
            if has(cap) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
                return Err(SlotError::Unsupported(
                    "dirty logs that are cleared in pieces (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)",
                ));
            }
            let argument = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
            (cap, argument, "enable the manual dirty log")
        }
        DirtyLog::Ring { entries } => {
            // The second one exists on x86_64 only, and means the same there.
            let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
            let found = caps.into_iter().find(|cap| has(*cap) != 0);
            let cap = found.ok_or(SlotError::Unsupported(
                "dirty rings (KVM_CAP_DIRTY_LOG_RING_ACQ_REL)",
            ))?;
            let entry = to_u64(size_of::<kvm_dirty_gfn>());
            let max = u64::from(has(cap)).checked_div(entry).unwrap_or(0);
            let bytes = u64::from(entries).saturating_mul(entry);
            if !entries.is_power_of_two() || bytes < page_size || u64::from(entries) > max {
                let max = u32::try_from(max).unwrap_or(u32::MAX);
                return Err(SlotError::RingSize { entries, max });
            }
            (
                cap,
                bytes,
                "enable the dirty rings, before the first vCPU is created",
            )
        }
    };
    let cap = kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    };
    let enabled = vm.enable_cap(&cap);
    enabled.map_err(|error| SlotError::Vm {
        action,
        source: io::Error::from(error),
    })
}
