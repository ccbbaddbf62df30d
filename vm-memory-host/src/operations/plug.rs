//! [`plug`], [`unplug`] and [`unplug_all`]: make blocks of a region accessible and inaccessible.
//! [`plug_state`] returns their state.
//!
//! `PluggedBlocks` of vm-memory records which blocks accesses may reach. The order of steps keeps
//! accesses from a block while its pages change:
//!
//! - `plug` frees old pages, prepares the block, tells listeners, and then records it as plugged.
//! - `unplug` tells listeners, records the block as unplugged, and then frees its pages.

use std::fmt;
use std::io;
use std::sync::atomic::Ordering;

use vm_memory::listeners::ChangeKind;
use vm_memory::mmap::BlockStates;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::system::{
    check_memory_of_blocks, close_all, not_plugged, prepare, prepare_empty, withdraw,
};
use crate::error::ChangeError;
use crate::mapping::{
    parts, span_of, to_u64, unplugged_runs, Changes, HostMapped, HostMapping, Part,
};

/// Makes the blocks of a range accessible. Blocks that are plugged already keep their bytes.
///
/// Use it for a virtio-mem device (virtio 1.2, section 5.15), at the request of the running guest.
/// The map is not replaced.
///
/// New blocks read as zeroes. They are not marked dirty: [`unplug`] has marked them, and a
/// destination has no bytes of a block that was never plugged. The pages of a shared file are freed
/// first, for all processes that map it. Only the owner of the memory may therefore plug its
/// blocks. A process that builds it from a [`Description`](crate::Description) would zero blocks in
/// use, and no bitmap would record that. Pages that could be missing later are allocated now: huge
/// pages, and pages of a tmpfs with a size limit. [Sparse](crate::Region::sparse) regions do not
/// allocate the latter.
///
/// For a shared file, the call may [wait for another process](crate::Backing::Memfd) that has it.
///
/// Returns the number of bytes that became accessible, by which a virtio-mem device increases its
/// `plugged_size`. The device must reject a PLUG request that covers a plugged block (section
/// 5.15.6.3). It asks for the [state](plug_state) first.
///
/// The range may span regions, also those of another device. A device must check first that a
/// guest's range is inside its own region ([`Span::contains_range`](crate::Span::contains_range)),
/// and within its `requested_size`.
///
/// # Windows
///
/// The memory of the blocks is committed, and counts against the commit limit. A block must be
/// [`Unplugged::Protected`](crate::Unplugged::Protected) anonymous memory. Map it in the guest
/// after the call.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{plug, unplug, MemoryBuilder, Region, Unplugged};
///
/// let block = NonZeroU64::new(2 << 20).unwrap();
/// let region = Region::new(GuestAddress(1 << 32), 64 << 20).blocks(block, Unplugged::Mapped);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
///
/// let addr = GuestAddress((1 << 32) + (4 << 20));
/// assert!(memory.write_obj(1u64, addr).is_err());
/// assert_eq!(plug(&memory, addr, 2 << 20)?, 2 << 20);
/// memory.write_obj(1u64, addr)?;
/// // This block is plugged already.
/// assert_eq!(plug(&memory, addr, 2 << 20)?, 0);
/// unplug(&memory, addr, 2 << 20)?;
/// assert!(memory.read_obj::<u64>(addr).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns a [`ChangeError`] and changes nothing if the range
///
/// - passes 2^64 or has holes,
/// - does not consist of whole blocks,
/// - touches a region without blocks, or one that this crate did not build, or
/// - touches a region that the parent process built.
///
/// Returns [`ChangeError::NoPages`] if the pool has too few huge pages. Returns
/// [`ChangeError::Memory`] if the host has too little memory for a tmpfs with a size limit. Returns
/// [`ChangeError::ControlGroup`] if a control group allows too little of either, and
/// [`ChangeError::System`] if the system refuses a call. Returns [`ChangeError::Listener`] if a
/// listener refuses the blocks. If the number of free huge pages cannot be
/// read, such as in a jail without /sys, too few of them cause `System` with `EFAULT`.
/// [`ChangeError::is_shortage`] returns `true` for all of these shortages: the device may plug
/// fewer blocks, or let the driver try again.
///
/// Blocks of earlier regions stay plugged; blocks of the failing region stay plugged or unplugged
/// as before.
#[doc(alias = "virtio-mem")]
#[doc(alias = "hotplug")]
pub fn plug<M>(memory: &M, addr: GuestAddress, len: u64) -> Result<u64, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let mut changed = 0u64;
    for part in parts(memory, addr, len, block_size)? {
        check_memory_of_blocks(&part)?;
        changed = changed.saturating_add(plug_part(&part)?);
    }
    Ok(changed)
}

/// Makes the blocks of a range inaccessible, and discards their pages.
///
/// Accesses that begin after the call do not reach the blocks. For accesses in progress, see
/// [`PluggedBlocks`](vm_memory::mmap::PluggedBlocks). Those that reach a protected block or lack a
/// page return an error: the build requires [`vm_memory::fault::install`] for such regions.
///
/// The pages of blocks that are already unplugged are also discarded. All pages of the range are
/// marked dirty. Huge pages return to the pool.
///
/// For a shared file, the call may [wait for another process](crate::Backing::Memfd) that has it.
///
/// Returns the number of bytes that were accessible before. A virtio-mem device must reject an
/// UNPLUG request that covers an unplugged block (section 5.15.6.4). It asks for the
/// [state](plug_state) first.
///
/// The range may span regions, also those of another device, as in [`plug`].
///
/// # Windows
///
/// The memory of the blocks is decommitted, and no longer counts against the commit limit. Unmap
/// the blocks from the guest before the call.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{plug, residency, unplug, MemoryBuilder, Region, Unplugged};
///
/// let block = NonZeroU64::new(2 << 20).unwrap();
/// let region = Region::new(GuestAddress(0), 8 << 20).blocks(block, Unplugged::Mapped);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// plug(&memory, GuestAddress(0), 4 << 20)?;
/// memory.write_obj(1u8, GuestAddress(0))?;
///
/// // Unplugging returns the page.
/// assert_eq!(unplug(&memory, GuestAddress(0), 8 << 20)?, 4 << 20);
/// assert_eq!(residency(&memory)?[0].1.resident, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns a [`ChangeError`] and changes nothing if the range
///
/// - passes 2^64 or has holes,
/// - does not consist of whole blocks,
/// - touches a region without blocks, or one that this crate did not build, or
/// - touches a region that the parent process built.
///
/// Returns [`ChangeError::System`] for the first region whose pages the system refuses to discard.
/// All blocks of the range are unplugged nevertheless. Returns [`ChangeError::Listener`] for the
/// first region of which a listener refuses the change, or which has pinned pages in the range. Its
/// blocks stay plugged, and those of other regions are unplugged.
///
/// The `plugged_size` of the device is then the number of bytes that
/// [`BlockStates`](vm_memory::mmap::BlockStates) counts as plugged.
#[doc(alias = "virtio-mem")]
#[doc(alias = "hot-unplug")]
pub fn unplug<M>(memory: &M, addr: GuestAddress, len: u64) -> Result<u64, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let mut result = Ok(0u64);
    for part in parts(memory, addr, len, block_size)? {
        let here = unplug_part(&part);
        part.mark_dirty();
        result = result.and_then(|changed| Ok(changed.saturating_add(here?)));
    }
    result
}

/// Unplugs all blocks of the region that contains `addr`, like [`unplug`].
///
/// Use it for the UNPLUG ALL request of a virtio-mem device (virtio 1.2, section 5.15.6.5), and
/// when the guest is reset.
///
/// Returns the number of bytes that were accessible before.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{plug, unplug_all, MemoryBuilder, Region, Unplugged};
///
/// let block = NonZeroU64::new(2 << 20).unwrap();
/// let region = Region::new(GuestAddress(1 << 32), 64 << 20).blocks(block, Unplugged::Mapped);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// plug(&memory, GuestAddress((1 << 32) + (4 << 20)), 8 << 20)?;
/// assert_eq!(unplug_all(&memory, GuestAddress(1 << 32))?, 8 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// - Returns [`ChangeError::Hole`] if no region contains `addr`.
/// - Returns the errors of [`unplug`] for the region.
#[doc(alias = "virtio-mem")]
#[doc(alias = "hot-unplug")]
pub fn unplug_all<M>(memory: &M, addr: GuestAddress) -> Result<u64, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let region = memory.find_region(addr);
    let region = region.ok_or(ChangeError::Hole { addr: addr.0 })?;
    unplug(memory, region.start_addr(), region.len())
}

/// The state of a range of blocks, as [`plug_state`] returns it.
///
/// The variants are the values of a STATE response (virtio 1.2, section 5.15.6.6).
///
/// # Examples
///
/// ```
/// use vm_memory_host::PlugState;
///
/// let response = |state| match state {
///     PlugState::Plugged => 0u16,
///     PlugState::Unplugged => 1,
///     PlugState::Mixed => 2,
/// };
/// assert_eq!(response(PlugState::Mixed), 2);
/// assert_eq!(PlugState::Mixed.to_string(), "mixed");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlugState {
    /// All blocks are plugged.
    Plugged,
    /// All blocks are unplugged.
    Unplugged,
    /// Some blocks are plugged, and some are not.
    Mixed,
}

impl fmt::Display for PlugState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PlugState::Plugged => "plugged",
            PlugState::Unplugged => "unplugged",
            PlugState::Mixed => "mixed",
        })
    }
}

/// Returns whether the blocks of a range are plugged.
///
/// Use it for the STATE request of a virtio-mem device (virtio 1.2, section 5.15.6.6), and to check
/// its PLUG and UNPLUG requests. A change by another thread may or may not be included.
///
/// The range may span regions, also those of another device, as in [`plug`].
///
/// The cost follows the number of blocks in the range. Makes no system call.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{plug, plug_state, MemoryBuilder, PlugState, Region, Unplugged};
///
/// let block = NonZeroU64::new(2 << 20).unwrap();
/// let region = Region::new(GuestAddress(0), 64 << 20).blocks(block, Unplugged::Mapped);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// plug(&memory, GuestAddress(2 << 20), 2 << 20)?;
/// let state = |addr, len| plug_state(&memory, GuestAddress(addr), len);
/// assert_eq!(state(2 << 20, 2 << 20)?, PlugState::Plugged);
/// assert_eq!(state(4 << 20, 8 << 20)?, PlugState::Unplugged);
/// assert_eq!(state(0, 4 << 20)?, PlugState::Mixed);
/// assert!(state(1 << 20, 2 << 20).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns [`ChangeError::Empty`] if `len` is 0, and a [`ChangeError`] if the range
///
/// - passes 2^64 or has holes,
/// - does not consist of whole blocks,
/// - touches a region without blocks, or one that this crate did not build, or
/// - touches a region that the parent process built.
#[doc(alias = "virtio-mem")]
pub fn plug_state<M>(memory: &M, addr: GuestAddress, len: u64) -> Result<PlugState, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    if len == 0 {
        return Err(ChangeError::Empty { addr: addr.0 });
    }
    let parts = parts(memory, addr, len, block_size)?;
    let all = |state: fn(&BlockStates, usize, usize) -> bool| {
        parts.iter().all(|part| {
            let record = part.mapping.plugged_blocks();
            record.is_some_and(|record| state(record, part.offset, part.len))
        })
    };
    Ok(if all(BlockStates::is_plugged) {
        PlugState::Plugged
    } else if all(BlockStates::is_unplugged) {
        PlugState::Unplugged
    } else {
        PlugState::Mixed
    })
}

/// Returns the block size of a region as the granularity for [`parts`].
fn block_size<R: HostMapped>(
    region: &R,
    mapping: &HostMapping,
) -> Result<(&'static str, u64), ChangeError> {
    let no_blocks = || ChangeError::NoBlocks {
        region: span_of(region),
    };
    let (blocks, _) = mapping.blocks.as_ref().ok_or_else(no_blocks)?;
    Ok(("blocks", blocks.size.get()))
}

/// Plugs the initial blocks of a new mapping, which keep their bytes, and protects the others.
pub(crate) fn plug_initial(mapping: &HostMapping, plugged: &[(usize, usize)]) -> io::Result<()> {
    let Some((blocks, record)) = &mapping.blocks else {
        return Ok(());
    };
    let changes = mapping.lock_changes()?;
    close_all(mapping, blocks)?;
    for &(offset, len) in plugged {
        prepare(&changes, blocks, offset, len)?;
        record.plug(offset, len).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Plugs whole blocks of a part, and returns the number of bytes that were unplugged.
fn plug_part<R: HostMapped>(part: &Part<'_, R>) -> Result<u64, ChangeError> {
    let (mapping, offset, len) = (part.mapping, part.offset, part.len);
    let Some((blocks, record)) = &mapping.blocks else {
        return Ok(0);
    };
    let mut told = part.begin()?;
    let unplugged = unplugged_runs(record, offset, len);
    let withdraw_all = |changes: &Changes<'_>| {
        for &(at, run) in &unplugged {
            // The first error is reported. The next plug or unplug frees pages that stay.
            let _ = withdraw(changes, blocks, at, run);
        }
    };
    let lock = || {
        mapping
            .lock_changes()
            .map_err(|source| not_plugged(part, source))
    };
    let runs = to_runs(&unplugged);
    // A listener that failed to undo an earlier plug may use these pages.
    let unpinned = told.check_unpinned(ChangeKind::Plugged, &runs);
    unpinned.map_err(|source| part.refused_by_listener(source))?;
    let changes = lock()?;
    let prepared = unplugged
        .iter()
        .try_for_each(|&(at, run)| prepare_empty(&changes, blocks, at, run));
    if let Err(source) = prepared {
        withdraw_all(&changes);
        return Err(not_plugged(part, source));
    }
    // A listener may read the mapping, which needs the lock. `told` excludes other changes.
    drop(changes);
    let announced = told.announce(ChangeKind::Plugged, &runs);
    let changes = lock()?;
    if let Err(source) = announced {
        // A listener that failed to undo is detached, and has pinned the region.
        if told.check_unpinned(ChangeKind::Plugged, &runs).is_ok() {
            withdraw_all(&changes);
        }
        return Err(part.refused_by_listener(source));
    }
    if !unplugged.is_empty() {
        // Relaxed: see `plugs`. Pages that a balloon has collected in the blocks before are stale.
        mapping.plugs.fetch_add(1, Ordering::Relaxed);
    }
    if let Err(source) = record.plug(offset, len) {
        told.undo(ChangeKind::Plugged, &runs);
        return Err(not_plugged(part, io::Error::other(source)));
    }
    Ok(total(unplugged))
}

/// Unplugs whole blocks of a part, and returns the number of bytes that were plugged.
fn unplug_part<R: HostMapped>(part: &Part<'_, R>) -> Result<u64, ChangeError> {
    let (mapping, offset, len) = (part.mapping, part.offset, part.len);
    let Some((blocks, record)) = &mapping.blocks else {
        return Ok(0);
    };
    let mut told = part.begin()?;
    let plugged = part.accessible_runs();
    let others = to_runs(&unplugged_runs(record, offset, len));
    let announced = told
        .check_unpinned(ChangeKind::Unplugged, &others)
        .and_then(|()| told.announce(ChangeKind::Unplugged, &plugged));
    announced.map_err(|source| part.refused_by_listener(source))?;
    let unplug = || {
        let changes = mapping.lock_changes()?;
        // The record changes first: later accesses must not reach the block.
        record.unplug(offset, len).map_err(io::Error::other)?;
        withdraw(&changes, blocks, offset, len)
    };
    unplug().map_err(|source| part.refused("discard", source))?;
    let lengths = plugged.iter().map(|(_, len)| *len);
    Ok(lengths.fold(0, u64::saturating_add))
}

/// Returns runs as listeners are told of them.
fn to_runs(runs: &[(usize, usize)]) -> Vec<(u64, u64)> {
    let runs = runs.iter();
    runs.map(|&(at, len)| (to_u64(at), to_u64(len))).collect()
}

/// Returns the total length of runs.
pub(super) fn total(runs: impl IntoIterator<Item = (usize, usize)>) -> u64 {
    let lengths = runs.into_iter().map(|(_, len)| to_u64(len));
    lengths.fold(0, u64::saturating_add)
}
