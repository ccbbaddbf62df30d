//! Users of guest memory that follow its changes: KVM slots, mappings of VFIO and vhost, trackers.
//!
//! A [`MemoryListener`] is told of each change before it takes effect, and can refuse it. It is
//! added to a [`GuestMemoryAtomic`](crate::GuestMemoryAtomic), and follows
//!
//! - replacements of the map, by `update` and `replace`,
//! - changes of the pages of a region that has a [`RegionNotifier`]: blocks that are plugged and
//!   unplugged, and ranges that are discarded. All regions of `vm-memory-host` have one.
//!
//! ```text
//!   update(map A ─► map B) ──► GuestMemoryAtomic ──┐
//!                                                  ├──► MemoryListener 1: KVM slots
//!   unplug(…), discard(…) ──► RegionNotifier ──────┘    MemoryListener 2: VFIO mappings
//! ```
//!
//! # What a listener may use
//!
//! A listener may use the ranges of which it was told [`ChangeKind::Plugged`], until it is told
//! [`ChangeKind::Unplugged`]. A region without blocks is plugged and unplugged as a whole. The
//! library tells a listener before it frees a page that the listener may use:
//!
//! | change | listeners are told |
//! |---|---|
//! | a region joins the map | `Added`, `Plugged` for each range, before readers see it |
//! | a region leaves the map | `Unplugged` for each range, `Removed`, while readers see it |
//! | blocks are plugged | `Plugged`, when their pages exist |
//! | blocks are unplugged | `Unplugged`, before accesses end and pages are freed |
//! | pages are discarded | `Discarded`, before they are freed |
//! | `track_writes(true)` | `TrackingStarted` for each region, and later after each `Added` |
//! | `track_writes(false)` | `TrackingStopped` for each region; before, also with each `Removed` |
//!
//! A range that goes need not be one that came. If eight blocks were plugged at once, one of them
//! can go. A listener then splits its mapping, or it has mapped each block on its own.
//!
//! # Order
//!
//! The changes of one call are one transaction. Ranges that go come before ranges that come.
//! Listeners are told of what comes in the order in which they were added, and of what goes in the
//! reverse order. Each change is told to all of them before the next one. Then each is told to
//! [`commit`](MemoryListener::commit).
//!
//! If a listener fails or panics, the library undoes the transaction: it tells each listener the
//! inverse of what it was told, in reverse order. Then nothing has changed, and the caller gets a
//! [`ListenerError`]. If a listener also fails to undo, it is *detached*: it is told nothing more.
//! The memory keeps every map that it may use, and no page of these maps is discarded or unplugged,
//! until the listener is removed.
//!
//! Calls for one memory come one at a time. Readers of the map never wait for them. Plugs, unplugs
//! and discards of a region wait for one another, and for changes of the maps that have the region.
//!
//! # What a listener may not do
//!
//! A listener can access guest memory. From within a call, it cannot change any map, or the pages
//! of any region. Such calls return [`ListenerError::InListener`], and
//! [`lock`](crate::GuestMemoryAtomic::lock) panics. A listener must not wait for another thread
//! that makes such a change.
//!
//! # Pins
//!
//! A [`Pin`] refuses discards and unplugs of a range. Take one for pages that a device accesses by
//! their physical address. The listener of VFIO pins what it maps, and drops the pin when it
//! unmaps.
//!
//! # System calls
//!
//! `futex(2)` if changes contend, or in [`RegionNotifier::wait_until_unpinned`]. `getpid(2)` for
//! changes of a memory with listeners.
//!
//! # Examples
//!
//! A listener that keeps a table of regions, as a vhost-user front end does:
//!
//! ```
//! # #[cfg(all(feature = "backend-mmap", feature = "backend-atomic"))] {
//! use std::sync::{Arc, Mutex};
//! use vm_memory::listeners::{BoxError, ChangeKind, MemoryChange, MemoryListener};
//! use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
//! use vm_memory::GuestRegionMmap;
//!
//! #[derive(Clone, Default)]
//! struct Table(Arc<Mutex<Vec<(u64, u64)>>>);
//!
//! impl<R> MemoryListener<R> for Table {
//!     fn change(&mut self, change: &MemoryChange<'_, R>) -> Result<(), BoxError> {
//!         let range = (change.start().0, change.len());
//!         let mut ranges = self.0.lock().unwrap();
//!         match change.kind() {
//!             ChangeKind::Added if ranges.len() == 2 => return Err("the table is full".into()),
//!             ChangeKind::Added => ranges.push(range),
//!             ChangeKind::Removed => ranges.retain(|known| *known != range),
//!             _ => {}
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
//! let memory = GuestMemoryAtomic::new(map);
//! let table = Table::default();
//! memory.add_listener(Box::new(table.clone()))?;
//!
//! let dimm = |start| GuestRegionMmap::from_range(GuestAddress(start), 0x1000, None).map(Arc::new);
//! memory.update(|map| map.insert_region(dimm(0x10_0000).unwrap()))?;
//! assert_eq!(*table.0.lock().unwrap(), [(0, 0x1000), (0x10_0000, 0x1000)]);
//!
//! // The table has no room for another region, so the memory does not get it.
//! let refused = memory.update(|map| map.insert_region(dimm(0x20_0000).unwrap()));
//! assert!(refused.unwrap_err().to_string().contains("Table"));
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod calling;
mod notifier;
mod pin;
mod turn;

use core::any::type_name;
use core::fmt;
use std::error::Error;

use crate::address::Address;
use crate::GuestAddress;

#[cfg(feature = "backend-atomic")]
pub(crate) use calling::call;
pub(crate) use calling::refuse_in_listener;
#[cfg(feature = "backend-atomic")]
pub(crate) use notifier::{next_id, Observer};
pub use notifier::{RegionChanges, RegionNotifier};
pub use pin::{Pin, StillPinned};
#[cfg(feature = "backend-atomic")]
pub(crate) use turn::{lock, HasTurn, Turn, Turns};

/// An error of any type, from a [`MemoryListener`].
pub type BoxError = Box<dyn Error + Send + Sync>;

/// The error of a listener that could neither make a change nor go back.
///
/// The library detaches the listener, and keeps the memory that it may use.
#[derive(Debug, thiserror::Error)]
#[error("the listener failed in the middle of a change")]
pub struct NotAsBefore(#[source] BoxError);

impl NotAsBefore {
    /// Creates the error from its cause.
    pub fn new(source: impl Into<BoxError>) -> Self {
        Self(source.into())
    }
}

/// Follows the changes of a guest memory whose regions have the type `R`.
///
/// The [module](self) states the order of calls, and shows an implementation.
#[doc(alias = "RamDiscardListener")]
#[doc(alias = "notifier")]
pub trait MemoryListener<R>: Send {
    /// Returns the name for errors. The provided method returns the name of the type.
    fn name(&self) -> &str {
        type_name::<Self>()
    }

    /// Follows one change.
    ///
    /// A listener that follows only the ranges that it may use handles [`ChangeKind::Plugged`] and
    /// [`ChangeKind::Unplugged`], and returns `Ok` for the others.
    ///
    /// # Errors
    ///
    /// After an error, the listener must be as it was before the call. The change does not take
    /// place. A listener that cannot go back returns a [`NotAsBefore`], and is detached.
    fn change(&mut self, change: &MemoryChange<'_, R>) -> Result<(), BoxError>;

    /// Ends a transaction. The listener was told of all its changes.
    ///
    /// A listener that sends whole tables collects changes, and sends the table here. The call
    /// comes also after changes were undone.
    ///
    /// # Errors
    ///
    /// After an error, the library undoes the changes and calls `commit` again.
    fn commit(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// The kind of a [`MemoryChange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChangeKind {
    /// A region joins the map. The listener may not use it yet.
    Added,
    /// A region leaves the map. The listener may not use any of it.
    Removed,
    /// The listener may use the range. Its pages exist, or are allocated on access.
    ///
    /// Accesses of this process to blocks succeed after the call, not during it.
    Plugged,
    /// The range becomes inaccessible, and its pages may be freed after the call.
    Unplugged,
    /// The pages of the range are replaced by zeroes after the call. The range stays accessible.
    ///
    /// It has no inverse, so it is not undone.
    Discarded,
    /// The listener logs writes to the region that this process does not mark, until
    /// [`TrackingStopped`](Self::TrackingStopped).
    ///
    /// Examples are the writes of vCPUs, which KVM logs, and those of VFIO devices.
    TrackingStarted,
    /// The listener need not log writes to the region any more.
    TrackingStopped,
}

impl ChangeKind {
    /// Returns the change that undoes this one, or `None` for [`Discarded`](Self::Discarded).
    pub fn inverse(self) -> Option<Self> {
        match self {
            Self::Added => Some(Self::Removed),
            Self::Removed => Some(Self::Added),
            Self::Plugged => Some(Self::Unplugged),
            Self::Unplugged => Some(Self::Plugged),
            Self::Discarded => None,
            Self::TrackingStarted => Some(Self::TrackingStopped),
            Self::TrackingStopped => Some(Self::TrackingStarted),
        }
    }

    /// Returns whether something goes, so that listeners are told in reverse order.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn takes_away(self) -> bool {
        !matches!(self, Self::Added | Self::Plugged | Self::TrackingStarted)
    }
}

impl fmt::Display for ChangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Added => "add",
            Self::Removed => "remove",
            Self::Plugged => "plug",
            Self::Unplugged => "unplug",
            Self::Discarded => "discard",
            Self::TrackingStarted => "track",
            Self::TrackingStopped => "stop tracking",
        })
    }
}

/// A change of one range of guest memory.
///
/// The reference to the region is valid during the call only. A listener can keep the map: it then
/// counts as a reader.
pub struct MemoryChange<'a, R> {
    kind: ChangeKind,
    region: &'a R,
    region_start: GuestAddress,
    offset: u64,
    len: u64,
}

impl<'a, R> MemoryChange<'a, R> {
    /// Creates a description of a change, such as for the test of a listener.
    ///
    /// The range has `len` bytes at `offset` in `region`, which starts at `region_start`.
    pub fn new(
        kind: ChangeKind,
        region: &'a R,
        region_start: GuestAddress,
        offset: u64,
        len: u64,
    ) -> Self {
        Self {
            kind,
            region,
            region_start,
            offset,
            len,
        }
    }

    /// Returns what happens to the range.
    pub fn kind(&self) -> ChangeKind {
        self.kind
    }

    /// Returns the region that contains the range.
    pub fn region(&self) -> &'a R {
        self.region
    }

    /// Returns the first byte of the range, as an offset in the region in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the first guest physical address of the range.
    ///
    /// It saturates for a region that claims addresses past 2^64.
    pub fn start(&self) -> GuestAddress {
        GuestAddress(self.region_start.raw_value().saturating_add(self.offset))
    }

    /// Returns the length of the range in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the change that undoes this one.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn inverse(self) -> Option<Self> {
        let kind = self.kind.inverse()?;
        Some(Self { kind, ..self })
    }
}

impl<R> Clone for MemoryChange<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for MemoryChange<'_, R> {}

impl<R> fmt::Debug for MemoryChange<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryChange")
            .field("kind", &self.kind)
            .field("start", &self.start())
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A change that did not take place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenerError {
    /// A listener refused the change, or panicked.
    #[error(
        "listener {listener} refused to {kind} {len:#x} bytes at {:#x}{}",
        start.0,
        detached_suffix(detached)
    )]
    Refused {
        /// The name of the listener.
        listener: String,
        /// The change.
        kind: ChangeKind,
        /// The first guest physical address of the range.
        start: GuestAddress,
        /// The length of the range in bytes.
        len: u64,
        /// The listeners that failed to undo earlier changes, and are detached now.
        detached: Vec<String>,
        /// The error of the listener.
        source: BoxError,
    },
    /// A listener did not commit the changes.
    #[error(
        "listener {listener} did not commit the changes{}",
        detached_suffix(detached)
    )]
    NotCommitted {
        /// The name of the listener.
        listener: String,
        /// The listeners that failed to undo the changes, and are detached now.
        detached: Vec<String>,
        /// The error of the listener.
        source: BoxError,
    },
    /// The range has pinned pages.
    #[error("cannot {kind} {len:#x} bytes at offset {offset:#x} of the region: pages are pinned")]
    Pinned {
        /// The change.
        kind: ChangeKind,
        /// The first byte of the range, as an offset in the region in bytes.
        offset: u64,
        /// The length of the range in bytes.
        len: u64,
    },
    /// Pages of the range are being discarded or unplugged, so they cannot be pinned.
    #[error(
        "cannot pin {len:#x} bytes at offset {offset:#x} of the region: pages are being freed"
    )]
    BeingFreed {
        /// The first byte of the range, as an offset in the region in bytes.
        offset: u64,
        /// The length of the range in bytes.
        len: u64,
    },
    /// A discard or an unplug was announced before by the same [`RegionChanges`].
    #[error("a discard or an unplug was announced already; begin another change")]
    AlreadyAnnounced,
    /// A listener tried to change guest memory while it was told of a change.
    #[error("a memory listener cannot change guest memory while it is told of a change")]
    InListener,
    /// The parent process added the listeners. They are not told of changes in a child of fork(2).
    #[error("the listeners of the memory belong to the parent process")]
    OtherProcess,
    /// The memory has no listener of this number.
    #[error("the memory has no listener of this number")]
    Unknown,
}

fn detached_suffix(detached: &[String]) -> String {
    match detached {
        [] => String::new(),
        names => format!("; detached: {}", names.join(", ")),
    }
}
