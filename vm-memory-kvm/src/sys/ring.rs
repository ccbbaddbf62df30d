//! [`Ring`]: the dirty ring of a vCPU, in memory that KVM shares.

use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::{fmt, ptr, slice};
use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{kvm_dirty_gfn, KVM_DIRTY_LOG_PAGE_OFFSET};
use kvm_ioctls::VcpuFd;
use vm_memory::arithmetic::to_usize;

/// The flag of an entry that KVM has written (`KVM_DIRTY_GFN_F_DIRTY`).
const DIRTY: u32 = 1;
/// The flag of an entry that was collected (`KVM_DIRTY_GFN_F_RESET`).
const RESET: u32 = 2;

/// A `struct kvm_dirty_gfn` that KVM changes at the same time.
///
/// ```text
///   0 ─ KVM writes the entry ─► DIRTY ─ collect ─► RESET ─ reset_rings ─► 0
/// ```
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());
const _: () = assert!(align_of::<Entry>() == align_of::<kvm_dirty_gfn>());

/// The entries of a ring.
pub(crate) trait RingMemory: fmt::Debug + Send {
    /// Returns the entries. Their number is a power of two, or 0.
    fn entries(&self) -> &[Entry];
}

/// The dirty ring of one vCPU, and the place of its next entry.
#[derive(Debug)]
pub(crate) struct Ring {
    memory: Box<dyn RingMemory>,
    next: usize,
}

impl Ring {
    /// Creates a ring whose next entry is the first one, as in a vCPU that has not run.
    pub(crate) fn new(memory: Box<dyn RingMemory>) -> Self {
        Self { memory, next: 0 }
    }

    /// Takes the entries that KVM has written, as numbers of slots and of pages in them.
    ///
    /// A vCPU that runs may write further entries. Takes at most as many as the ring has, so that
    /// such a vCPU does not keep the caller.
    pub(crate) fn collect(&mut self, mut each: impl FnMut(u32, u64)) {
        let entries = self.memory.entries();
        for _ in 0..entries.len() {
            let Some(entry) = entries.get(self.next) else {
                return;
            };
            // Acquire: KVM writes the slot and the offset before this flag (release).
            if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return;
            }
            // Relaxed: until the flag RESET is set, KVM does not write the entry.
            let slot = entry.slot.load(Ordering::Relaxed);
            each(slot, entry.offset.load(Ordering::Relaxed));
            // Release: KVM uses the entry again after it has read this flag (acquire), so after the
            // two loads.
            entry.flags.store(RESET, Ordering::Release);
            let next = self.next.saturating_add(1);
            self.next = if next < entries.len() { next } else { 0 };
        }
    }
}

/// The ring of a vCPU, mapped from its descriptor.
#[derive(Debug)]
pub(crate) struct MappedRing {
    start: *mut Entry,
    count: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and its content is atomic.
unsafe impl Send for MappedRing {}

impl MappedRing {
    /// Maps the ring of `count` entries of a vCPU.
    ///
    /// The mapping keeps the ring in existence, also after the descriptor is closed.
    pub(crate) fn map(vcpu: &VcpuFd, count: u32, page_size: u64) -> io::Result<Self> {
        let count = NonZeroUsize::new(to_usize(u64::from(count)));
        let count = count.ok_or(io::ErrorKind::InvalidInput)?;
        let offset = page_size.checked_mul(u64::from(KVM_DIRTY_LOG_PAGE_OFFSET));
        // The headers of riscv64 say 0, which is the page of `kvm_run`.
        let offset = offset.filter(|offset| *offset != 0);
        let offset = offset.and_then(|offset| libc::off_t::try_from(offset).ok());
        let offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, len) = (vcpu.as_raw_fd(), bytes(count));
        // SAFETY: the kernel chooses a free range of addresses, so nothing else is unmapped.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                fd,
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            count,
        })
    }
}

/// Returns the number of bytes of a ring.
fn bytes(count: NonZeroUsize) -> usize {
    count.get().saturating_mul(size_of::<Entry>())
}

impl RingMemory for MappedRing {
    #[expect(
        clippy::disallowed_methods,
        reason = "the memory is KVM's, not the guest's"
    )]
    fn entries(&self) -> &[Entry] {
        // SAFETY: 1. `map` has mapped `count` entries at `start`, a page boundary, for reads and
        //    writes. Only `drop` unmaps them.
        // 2. An `Entry` has the size and alignment of a `kvm_dirty_gfn`, and all bytes are valid.
        // 3. KVM and other threads change entries by atomic accesses only, and so does this crate.
        unsafe { slice::from_raw_parts(self.start, self.count.get()) }
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // SAFETY: `map` has mapped these bytes. The slices of `entries` borrow `self`, so none is
        // left.
        unsafe { libc::munmap(self.start.cast(), bytes(self.count)) };
    }
}

#[cfg(test)]
pub(crate) mod double {
    //! A ring that a test fills in the place of KVM.

    use std::sync::Arc;

    use super::*;

    /// Entries that the test and a [`Ring`] share, and KVM's places in them.
    #[derive(Clone, Debug)]
    pub(crate) struct SharedEntries(Arc<[Entry]>);

    impl SharedEntries {
        pub(crate) fn new(count: usize) -> Self {
            Self((0..count).map(|_| Entry::default()).collect())
        }

        /// Writes an entry at a place. Returns whether the place was free.
        pub(crate) fn push(&self, place: usize, slot: u32, offset: u64) -> bool {
            let entry = &self.0[place % self.0.len()];
            if entry.flags.load(Ordering::Acquire) != 0 {
                return false;
            }
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(offset, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            true
        }

        /// Frees the entries that were collected, as `KVM_RESET_DIRTY_RINGS` does.
        pub(crate) fn reset(&self) {
            for entry in self.0.iter() {
                if entry.flags.load(Ordering::Acquire) & RESET != 0 {
                    entry.flags.store(0, Ordering::Release);
                }
            }
        }
    }

    impl RingMemory for SharedEntries {
        fn entries(&self) -> &[Entry] {
            &self.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::double::SharedEntries;
    use super::*;

    fn collected(ring: &mut Ring) -> Vec<(u32, u64)> {
        let mut all = Vec::new();
        ring.collect(|slot, offset| all.push((slot, offset)));
        all
    }

    #[test]
    fn collect_takes_each_entry_once_and_continues_after_it() {
        let shared = SharedEntries::new(4);
        let mut ring = Ring::new(Box::new(shared.clone()));
        assert!(shared.push(0, 1, 10) && shared.push(1, 1, 11) && shared.push(2, 2, 12));
        assert_eq!(collected(&mut ring), [(1, 10), (1, 11), (2, 12)]);
        assert_eq!(collected(&mut ring), []);
        assert!(shared.push(3, 7, 13));
        // Without a reset, the first entry is not free.
        assert!(!shared.push(4, 7, 14));
        assert_eq!(collected(&mut ring), [(7, 13)]);
        shared.reset();
        assert!(shared.push(4, 7, 14));
        assert_eq!(collected(&mut ring), [(7, 14)]);
    }

    #[test]
    fn collect_of_a_full_ring_takes_all_entries_and_ends() {
        let shared = SharedEntries::new(4);
        let mut ring = Ring::new(Box::new(shared.clone()));
        for offset in 0..4 {
            assert!(shared.push(offset as usize, 0, offset));
        }
        let mut count = 0;
        // A vCPU that writes an entry for each one that is taken.
        ring.collect(|_, offset| {
            count += 1;
            shared.reset();
            shared.push(offset as usize + 4, 0, offset + 4);
        });
        assert_eq!(count, 4);
    }
}
