//! [`Mapped`]: the memory of a region, and the system calls that change it.

use std::fs::File;
use std::io::{Error, Result};
use std::ptr::null;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, Permissions, VolatileSlice};
use windows_sys::Win32::Foundation::ERROR_ACCESS_DENIED;
use windows_sys::Win32::System::Memory::{
    GetLargePageMinimum, VirtualAlloc, VirtualAllocExNuma, VirtualFree, VirtualLock, MEM_COMMIT,
    MEM_DECOMMIT, MEM_LARGE_PAGES, MEM_RELEASE, MEM_RESERVE, PAGE_NOACCESS, PAGE_PROTECTION_FLAGS,
    PAGE_READWRITE, VIRTUAL_ALLOCATION_TYPE,
};
use windows_sys::Win32::System::ProcessStatus::{
    K32QueryWorkingSetEx, PSAPI_WORKING_SET_EX_BLOCK, PSAPI_WORKING_SET_EX_INFORMATION,
};

use super::{check, invalid, page_size, this_process};
use crate::sys::{page_size_u64, system_error, to_u64};

/// The memory of one region. Dropping it releases the memory.
///
/// Invariants:
///
/// - Its addresses belong to this object alone while it exists.
/// - It begins and ends at page boundaries.
/// - It is readable, and writable if `writable` is set, except where memory of a
///   [`Reservation`] is not committed.
/// - No Rust reference ever covers it, except to atomic integers. A user of one
///   (`GuestMemory::get_atomic_ref`) ensures that its page is accessible.
#[derive(Debug)]
pub(crate) struct Mapped {
    memory: Memory,
    len: usize,
    writable: bool,
}

#[derive(Debug)]
enum Memory {
    Private(Reservation),
    /// Large pages, which are never decommitted: a part of them could not be committed again.
    Large(Reservation),
    /// A view of a file, which vm-memory has mapped.
    View(MmapRegion<()>),
}

/// Addresses that this object has reserved, for private memory.
///
/// ```text
///   base                              base + offset
///   ├ unused, at least a page of it ──┤── region ──┤ unused, at least a page ┤
/// ```
///
/// The memory of the region is committed in parts. All other pages are a guard: they are never
/// committed. Memory of large pages has no guard.
#[derive(Debug)]
struct Reservation {
    base: *mut u8,
    offset: usize,
    /// The length of all addresses.
    len: usize,
}

/// The requested place of a [`Mapped`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    /// The host address equals `rest` modulo `align`, a power of two. Both are whole pages.
    pub(crate) align: usize,
    pub(crate) rest: usize,
    /// The NUMA node that pages come from, as long as it has free ones.
    pub(crate) node: Option<u32>,
}

impl Placement {
    /// Returns the number of addresses in which `len` bytes fit between two guards, at each base.
    ///
    /// Fails unless the length and the placement are whole pages.
    pub(super) fn len_with_guards(self, len: usize) -> Result<usize> {
        let page = page_size();
        let Self { align, rest, .. } = self;
        let is_whole = |size: usize| size.is_multiple_of(page);
        if len == 0 || ![len, align, rest].into_iter().all(is_whole) || !align.is_power_of_two() {
            return Err(invalid());
        }
        // The bytes begin after a guard and less than `align` further bytes.
        let slack = align
            .checked_add(page)
            .and_then(|slack| slack.checked_add(page));
        let all = slack.and_then(|slack| len.checked_add(slack));
        all.ok_or_else(invalid)
    }

    /// Returns the offset of the bytes in these addresses, which begin at `base`.
    pub(super) fn offset_from(self, base: usize) -> usize {
        let page = page_size();
        let after_guard = base.wrapping_add(page);
        let further = self.rest.wrapping_sub(after_guard) & self.align.wrapping_sub(1);
        page.saturating_add(further)
    }
}

/// The pages of a range that are in the working set of this process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkingSet {
    pub(crate) resident: u64,
    /// The part of `resident` in pages that no other process can have.
    pub(crate) private: u64,
    pub(crate) large: u64,
    pub(crate) locked: u64,
}

/// The bytes of dropped private memory and arenas that the system has refused to release.
static STILL_MAPPED: AtomicU64 = AtomicU64::new(0);

/// Returns the bytes of dropped private memory and arenas that the system has refused to release.
pub(crate) fn still_mapped() -> u64 {
    // Relaxed: the counter protects no other memory.
    STILL_MAPPED.load(Ordering::Relaxed)
}

/// Counts bytes that the system has just refused to release, and reports its error.
pub(super) fn count_still_mapped(len: usize) {
    log_warning!("cannot release memory: {}", Error::last_os_error());
    // Relaxed: see `still_mapped`.
    STILL_MAPPED.fetch_add(to_u64(len), Ordering::Relaxed);
}

/// Returns the size of a large page in bytes, or `None` if the processor has none.
pub(crate) fn large_page_size() -> Option<u64> {
    // SAFETY: the call takes no argument and touches no memory of the caller.
    let size = unsafe { GetLargePageMinimum() };
    (size != 0).then(|| to_u64(size))
}

// SAFETY: `base` is passed to system calls, which any thread may make, and to `VolatileSlice`,
// which permits concurrent access from any thread. No field is bound to the thread that created it.
unsafe impl Send for Reservation {}
// SAFETY: `&Reservation` changes no field. It is used to commit and decommit pages, and the system
// serialises these changes.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Allocates `len` bytes of addresses. `offset` is that of the region in them.
    fn new(
        len: usize,
        how: VIRTUAL_ALLOCATION_TYPE,
        protection: PAGE_PROTECTION_FLAGS,
        node: Option<u32>,
    ) -> Result<Self> {
        // This number stands for no preferred node (`NUMA_NO_PREFERRED_NODE`).
        let node = node.unwrap_or(u32::MAX);
        let process = this_process();
        // SAFETY: without an address, the call returns new addresses of this process. So it
        // invalidates no memory that is in use.
        let base = unsafe { VirtualAllocExNuma(process, null(), len, how, protection, node) };
        if base.is_null() {
            return Err(Error::last_os_error());
        }
        let (base, offset) = (base.cast(), 0);
        Ok(Self { base, offset, len })
    }

    fn addr(&self) -> *mut u8 {
        self.base.wrapping_add(self.offset)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: `new` has allocated these addresses, and nothing else releases them. Nothing uses
        // them any more: the `Mapped` that owns this object is being dropped, and a vm-memory
        // region over it would keep its owner.
        if unsafe { VirtualFree(self.base.cast(), 0, MEM_RELEASE) } == 0 {
            count_still_mapped(self.len);
        }
    }
}

impl Mapped {
    /// Reserves `len` bytes between two guards. None of them is committed.
    ///
    /// Fails unless `len` and the placement are whole pages.
    pub(crate) fn reserve(len: usize, place: Placement) -> Result<Self> {
        let all = place.len_with_guards(len)?;
        let mut reservation = Reservation::new(all, MEM_RESERVE, PAGE_NOACCESS, place.node)?;
        reservation.offset = place.offset_from(reservation.base.addr());
        Ok(Self {
            memory: Memory::Private(reservation),
            len,
            writable: true,
        })
    }

    /// Allocates `len` bytes of large pages, which are committed and stay in memory.
    pub(crate) fn large(len: usize, node: Option<u32>) -> Result<Self> {
        // The system accepts large pages only if they are reserved and committed together.
        let how = MEM_RESERVE | MEM_COMMIT | MEM_LARGE_PAGES;
        Ok(Self {
            memory: Memory::Large(Reservation::new(len, how, PAGE_READWRITE, node)?),
            len,
            writable: true,
        })
    }

    /// Maps `len` bytes of a file, shared with it.
    pub(crate) fn view(file: &Arc<File>, offset: u64, len: usize, writable: bool) -> Result<Self> {
        let permissions = if writable {
            Permissions::ReadWrite
        } else {
            Permissions::Read
        };
        let view = MmapRegionBuilder::<()>::new(len)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .with_permissions(permissions)
            .build()?;
        Ok(Self {
            memory: Memory::View(view),
            len,
            writable,
        })
    }

    /// Returns a pointer to the first byte.
    pub(crate) fn addr(&self) -> *mut u8 {
        match &self.memory {
            Memory::Private(reservation) | Memory::Large(reservation) => reservation.addr(),
            Memory::View(view) => view.as_ptr(),
        }
    }

    /// Returns the host address of the first byte.
    pub(crate) fn host_address(&self) -> usize {
        self.addr().addr()
    }

    /// Returns the length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Succeeds: on Windows, no other process has a copy of this object.
    pub(crate) fn check_here(&self) -> Result<()> {
        Ok(())
    }

    /// Returns a pointer to a range of this memory, after checking that the range is inside.
    fn part(&self, offset: usize, len: usize) -> Result<*mut u8> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        end.ok_or_else(invalid)?;
        Ok(self.addr().wrapping_add(offset))
    }

    /// Returns the same for whole pages of private memory that is committed in parts.
    ///
    /// There is at least one page.
    fn private_part(&self, offset: usize, len: usize) -> Result<*mut u8> {
        let page = page_size();
        let is_whole = offset.is_multiple_of(page) && len.is_multiple_of(page) && len != 0;
        match &self.memory {
            Memory::Private(_) if is_whole => self.part(offset, len),
            _ => Err(invalid()),
        }
    }

    /// Makes whole pages accessible. Pages that were not committed read as zeroes.
    pub(crate) fn commit(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.private_part(offset, len)?;
        // SAFETY: `private_part` has checked that the range is inside the addresses that this
        // object has reserved. The call changes no bytes of pages that are committed already, and
        // `PAGE_READWRITE` is the protection of all of them.
        let committed = unsafe { VirtualAlloc(addr.cast(), len, MEM_COMMIT, PAGE_READWRITE) };
        if committed.is_null() {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    /// Makes whole pages inaccessible, and returns their memory to the system.
    pub(crate) fn decommit(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.private_part(offset, len)?;
        // SAFETY: `private_part` has checked that the range is not empty and inside the addresses
        // that this object has reserved, which stay reserved. An access raises an access violation:
        // the contract of `VolatileSlice::with_bitmap` allows a protection that refuses accesses.
        // No Rust reference covers the range, except those to atomic integers, whose users exclude
        // an inaccessible page (invariant of `Mapped`).
        check(unsafe { VirtualFree(addr.cast(), len, MEM_DECOMMIT) })
    }

    /// Locks a range in memory, with all of its pages.
    pub(crate) fn lock(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.part(offset, len)?;
        // SAFETY: `part` has checked that the range belongs to this object. The call changes
        // neither bytes nor protection.
        check(unsafe { VirtualLock(addr.cast(), len) })
    }

    /// Returns a slice of a range, which must be committed to be accessed.
    fn slice(&self, offset: usize, len: usize) -> Result<VolatileSlice<'_>> {
        let addr = self.part(offset, len)?;
        // SAFETY: the contract of `VolatileSlice::new`. `part` has checked that the range is inside
        // the addresses of this object. They stay its own while `self` is borrowed, which is longer
        // than the slice lives. No Rust reference covers them (invariant of `Mapped`).
        Ok(unsafe { VolatileSlice::new(addr, len) })
    }

    /// Populates the pages of a committed range. Bytes do not change.
    pub(crate) fn populate(&self, offset: usize, len: usize) -> Result<()> {
        let slice = self.slice(offset, len)?;
        // A read suffices: the system has no shared page of zeroes.
        (0..len)
            .step_by(page_size())
            .try_for_each(|at| slice.read_obj::<u8>(at).map(drop))
            .map_err(system_error)
    }

    /// Writes zeroes to a committed range.
    pub(crate) fn fill_zeroes(&self, offset: usize, len: usize) -> Result<()> {
        if !self.writable {
            return Err(Error::from_raw_os_error(ERROR_ACCESS_DENIED.cast_signed()));
        }
        let slice = self.slice(offset, len)?;
        slice.fill_with_byte(0).map_err(system_error)
    }

    /// Returns the pages of a range that are in the working set of this process.
    pub(crate) fn working_set(&self, offset: usize, len: usize) -> Result<WorkingSet> {
        self.part(offset, len)?;
        let (page, mut sum) = (page_size(), WorkingSet::default());
        let end = offset.saturating_add(len);
        let mut entries = [PSAPI_WORKING_SET_EX_INFORMATION {
            VirtualAddress: std::ptr::null_mut(),
            VirtualAttributes: PSAPI_WORKING_SET_EX_BLOCK { Flags: 0 },
        }; ENTRIES];
        for start in (offset..end).step_by(page.saturating_mul(ENTRIES)) {
            let pages = end.saturating_sub(start).div_ceil(page).min(ENTRIES);
            let entries = entries.get_mut(..pages).unwrap_or_default();
            for (entry, at) in entries.iter_mut().zip((start..end).step_by(page)) {
                entry.VirtualAddress = self.addr().wrapping_add(at).cast();
            }
            query(entries)?;
            entries.iter().for_each(|entry| sum.add(entry));
        }
        Ok(sum)
    }
}

/// The number of pages that one call asks for.
const ENTRIES: usize = 512;

/// Fills in the attributes of the pages whose addresses are in `entries`.
fn query(entries: &mut [PSAPI_WORKING_SET_EX_INFORMATION]) -> Result<()> {
    let size = u32::try_from(size_of_val(entries)).map_err(|_| invalid())?;
    let process = this_process();
    // SAFETY: the call reads the addresses and writes the attributes of `size` bytes of entries,
    // which is the size of the slice. It accesses no byte at the addresses.
    check(unsafe { K32QueryWorkingSetEx(process, entries.as_mut_ptr().cast(), size) })
}

impl WorkingSet {
    /// Adds a page. The bits are those of `PSAPI_WORKING_SET_EX_BLOCK`.
    fn add(&mut self, page: &PSAPI_WORKING_SET_EX_INFORMATION) {
        // SAFETY: all fields of the union are integers of the same size, for which each value is
        // valid.
        let flags = unsafe { page.VirtualAttributes.Flags };
        let has = |bit: u32| flags & 1usize.wrapping_shl(bit) != 0;
        let (is_valid, is_shared, is_locked, is_large) = (has(0), has(15), has(22), has(23));
        let count = |sum: &mut u64, is_counted: bool| {
            if is_valid && is_counted {
                *sum = sum.saturating_add(page_size_u64());
            }
        };
        count(&mut self.resident, true);
        count(&mut self.private, !is_shared);
        count(&mut self.locked, is_locked);
        count(&mut self.large, is_large);
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use super::*;

    #[test]
    fn decommit_of_large_pages_returns_error_and_keeps_bytes() {
        let len = 2 * page_size();
        // Ordinary pages: most machines have no large ones.
        let how = MEM_RESERVE | MEM_COMMIT;
        let reservation = Reservation::new(len, how, PAGE_READWRITE, None).unwrap();
        let large = Mapped {
            memory: Memory::Large(reservation),
            len,
            writable: true,
        };
        let slice = large.slice(0, len).unwrap();
        slice.write_obj(7u8, 0).unwrap();
        assert!(large.decommit(0, len).is_err() && large.commit(0, len).is_err());
        assert_eq!(slice.read_obj::<u8>(0).unwrap(), 7);
    }

    #[test]
    fn drop_of_reservation_that_the_system_keeps_is_counted() {
        let (base, offset, len) = (null_mut(), 0, 0x3000);
        let before = still_mapped();
        // The system refuses to release this address, which changes nothing.
        drop(Reservation { base, offset, len });
        assert_eq!(still_mapped().checked_sub(before), Some(0x3000));
    }
}
