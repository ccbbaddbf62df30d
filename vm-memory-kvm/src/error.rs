//! [`SlotError`]: the reason why KVM's slots did not follow.

use std::{fmt, io};

use vm_memory::{guest_memory, GuestAddress};

/// The error of a change of KVM's memory slots, or of their dirty log.
///
/// Unless it is [`NotUndone`](Self::NotUndone), all slots are as before the call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// KVM refused a call.
    #[error("cannot {action} the memory slot for {len:#x} bytes at {:#x}", start.0)]
    Kvm {
        /// The call that KVM refused.
        action: SlotAction,
        /// The first guest address of the slot.
        start: GuestAddress,
        /// The length of the slot in bytes.
        len: u64,
        /// The error of KVM.
        source: io::Error,
    },
    /// KVM refused a call that concerns the whole virtual machine.
    #[error("cannot {action}")]
    Vm {
        /// The call that KVM refused.
        action: &'static str,
        /// The error of KVM.
        source: io::Error,
    },
    /// A call failed, and so did the calls that were to undo those before it.
    #[error(
        "cannot undo a change of memory slots: the guest lost {}, still has {}, and the tracking \
        changed for {}",
        list(lost),
        list(remaining),
        list(tracking)
    )]
    NotUndone {
        /// The ranges that had a slot and have none now, as guest addresses and lengths.
        lost: Vec<(GuestAddress, u64)>,
        /// The ranges that have a slot and had none. They must stay mapped. Remove them with
        /// [`KvmSlots::remove`](crate::KvmSlots::remove).
        remaining: Vec<(GuestAddress, u64)>,
        /// The ranges whose tracking is not as before. All their pages count as dirty once.
        tracking: Vec<(GuestAddress, u64)>,
        /// The error of the call that failed first.
        source: Box<SlotError>,
    },
    /// The range is empty, or does not consist of whole pages.
    #[error(
        "{len:#x} bytes at {:#x} are not whole pages: address and length must be multiples of \
        {page_size:#x}, and the length not 0", start.0
    )]
    NotPages {
        /// The first guest address of the range.
        start: GuestAddress,
        /// The length of the range in bytes.
        len: u64,
        /// The size of a page of the host in bytes.
        page_size: u64,
    },
    /// The host address is not the start of a page.
    #[error("host address {host:#x} is not a multiple of the page size {page_size:#x}")]
    HostAddress {
        /// The host address.
        host: usize,
        /// The size of a page of the host in bytes.
        page_size: u64,
    },
    /// The range passes the end of an address space.
    #[error("{len:#x} bytes at {:#x} pass the end of the address space", start.0)]
    PastTheEnd {
        /// The first guest address of the range.
        start: GuestAddress,
        /// The length of the range in bytes.
        len: u64,
    },
    /// A part of the range has a slot already.
    #[error(
        "{len:#x} bytes at {:#x} overlap the slot for {other_len:#x} bytes at {:#x}; remove it \
        first", start.0, other.0
    )]
    Overlap {
        /// The first guest address of the range.
        start: GuestAddress,
        /// The length of the range in bytes.
        len: u64,
        /// The first guest address of the slot.
        other: GuestAddress,
        /// The length of the slot in bytes.
        other_len: u64,
    },
    /// The change needs more slots than are available.
    #[error(
        "the change needs {needed} memory slots, but {available} of {limit} are available; use \
        fewer, larger ranges or blocks"
    )]
    TooManySlots {
        /// The number of slots that the change needs in addition.
        needed: u64,
        /// The number of slots that are not in use.
        available: u64,
        /// The number of slots that this object may use.
        limit: u64,
    },
    /// The size of a slot is not a power of two, or smaller than a page.
    #[error(
        "slots of {size:#x} bytes: the size must be a power of two, and {page_size:#x} or more"
    )]
    SlotSize {
        /// The size in bytes.
        size: u64,
        /// The size of a page of the host in bytes.
        page_size: u64,
    },
    /// This KVM cannot do what was requested.
    #[error("this KVM lacks {0}")]
    Unsupported(&'static str),
    /// The dirty ring does not have a permitted number of entries.
    #[error(
        "dirty ring of {entries} entries: the number must be a power of two, with at least one \
        page and at most {max} entries"
    )]
    RingSize {
        /// The number of entries of each vCPU.
        entries: u32,
        /// The largest number that KVM permits.
        max: u32,
    },
    /// The virtual machine has no dirty rings.
    #[error("the dirty log is not a ring; select DirtyLog::Ring in the builder")]
    NoRing,
    /// The region has no address in this process.
    #[error("the {len:#x} bytes at {:#x} have no host address", start.0)]
    NoHostAddress {
        /// The first guest address of the range.
        start: GuestAddress,
        /// The length of the range in bytes.
        len: u64,
        /// The error of the region.
        source: guest_memory::Error,
    },
}

/// A call of KVM for a memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SlotAction {
    /// `KVM_SET_USER_MEMORY_REGION` with a number that was free.
    Create,
    /// `KVM_SET_USER_MEMORY_REGION` with the size 0.
    Delete,
    /// `KVM_SET_USER_MEMORY_REGION` with other flags.
    SetTracking,
    /// `KVM_GET_DIRTY_LOG`.
    ReadLog,
    /// `KVM_CLEAR_DIRTY_LOG`.
    ClearLog,
}

impl fmt::Display for SlotAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Delete => "delete",
            Self::SetTracking => "set the flags of",
            Self::ReadLog => "read the dirty log of",
            Self::ClearLog => "clear the dirty log of",
        })
    }
}

/// Lists ranges for a message.
fn list(ranges: &[(GuestAddress, u64)]) -> String {
    let each = ranges.iter();
    let each = each.map(|(start, len)| format!("{len:#x} bytes at {:#x}", start.0));
    match ranges {
        [] => "nothing".to_owned(),
        _ => each.collect::<Vec<_>>().join(", "),
    }
}
