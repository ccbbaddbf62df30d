//! [`Window`]: a range of guest memory that is resolved once and accessed by offset.

mod accesses;

use core::fmt::{self, Debug};
use std::io::{self, ErrorKind};
use std::sync::Arc;

use super::generation::SeenGeneration;
use super::hold::{hold_for, TranslationHold};
use super::GuestMemorySliceIterator as _;
use super::{
    bounded_slices, not_created_for, Error, GuestAddress, GuestMemory, Permissions, Result,
};
use crate::bitmap::{mark_each, Bitmap as _, BS};
use crate::volatile_memory::{HeldSlice, Hold, VolatileSlice};

/// The maximum number of slices of a window.
///
/// The driver decides how scattered a range is. The limit bounds the memory that a window needs. It
/// is the number of vectors that one `readv(2)` takes, and far above what a ring needs.
const MAX_SLICES: usize = 1024;

/// A range of guest memory that is checked and translated once, and then accessed by offset.
///
/// Use it for memory that a device accesses several times: a virtqueue, the header of a request, a
/// register block in guest memory. An access by guest address finds the region, or asks the IOMMU,
/// each time. An access to a window only compares the offset with its length. In a contiguous
/// window, it costs little more than one through a pointer.
///
/// [`Bytes<usize>`](crate::Bytes) has the accesses. They follow the crate's
/// [memory model](crate#memory-model), mark the pages that they write, and report
/// [faults](crate::fault) by guest address.
///
/// # The map of the window
///
/// A window stays with the map that it was created from. It keeps that map, or borrows it, so its
/// memory stays mapped, and accesses continue to go there.
///
/// [`is_current`](Self::is_current) tells whether the map or the IOTLB has changed since. It is
/// cheap enough to call it for each request. [`refresh`](Self::refresh) then resolves the range
/// again. To notice changes of the map, create the window with `GuestMemoryAtomic::window`.
///
/// Behind an IOMMU, the window holds its translation: an invalidation waits until the window is
/// refreshed or dropped, as it waits for an [`IoBuffer`](crate::vectored::IoBuffer). So a driver
/// that unmaps the range waits for the device. A device that is idle must also refresh or drop its
/// windows when the IOTLB changes.
///
/// Memory of a Xen guest that is mapped for each access (feature `xen`) is mapped once, until the
/// window is dropped. Drop it before the request is returned to the guest. A window that is leaked
/// ([`mem::forget`](core::mem::forget)) keeps the pages mapped.
///
/// A window needs all blocks of its range plugged. It does not notice that one is unplugged later:
/// it is like an access that [began earlier](crate::mmap::PluggedBlocks#guarantees-of-unplugging).
/// [`refresh`](Self::refresh) then returns the error. If the block is made inaccessible, an access
/// faults, like one to memory whose file is truncated.
///
/// # Examples
///
/// A device reads the header of a request and writes its status, and needs one lookup:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let request = memory.window(GuestAddress(0x100), 0x20, Permissions::ReadWrite)?;
/// let kind: u32 = request.read_obj(0)?;
/// let sector: u64 = request.read_obj(8)?;
/// request.write_obj(0u8, 0x1f)?;
/// assert_eq!((kind, sector), (0, 0));
/// assert!(request.write_obj(0u8, 0x20).is_err(), "past the end");
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A ring that a device keeps, with the map that contains it:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::atomic::Ordering;
/// use std::sync::Arc;
/// use vm_memory::guest_memory::Window;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// struct UsedRing {
///     window: Window<'static, GuestMemoryMmap>,
/// }
///
/// impl UsedRing {
///     fn publish(&self, index: u16) -> vm_memory::GuestMemoryResult<()> {
///         self.window.store(index, 2, Ordering::Release)
///     }
/// }
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let addr = GuestAddress(0x800);
/// let window = Window::from_arc(Arc::new(memory), addr, 0x206, Permissions::ReadWrite)?;
/// UsedRing { window }.publish(1)?;
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// The program `examples/virtqueue.rs` has a whole virtqueue, while memory is hotplugged.
#[doc(alias = "MemoryRegionCache")]
#[doc(alias = "ring")]
#[doc(alias = "lock_pages")]
pub struct Window<'m, M: GuestMemory + ?Sized> {
    // The order of the fields is the order in which they are dropped. The slices borrow from the
    // map, which `map` keeps alive if the window does not borrow it itself. A call that gets a
    // window by value may drop the map, which `HeldSlice` permits. `readable` and `writable` hold
    // no reference, only host addresses.
    /// The bytes of `first` if the window permits reads. Otherwise empty, so that one comparison
    /// with the length covers bounds and permission.
    readable: VolatileSlice<'m>,
    /// The bytes of `first` if the window permits writes. Otherwise empty. A write must mark them.
    writable: VolatileSlice<'m>,
    /// The first slice, which is nearly always the only one. `None` if the window is empty, or if
    /// the last [`refresh`](Self::refresh) failed.
    first: Option<HeldSlice<'m, BS<'m, M::Bitmap>>>,
    /// The other slices, each with its offset in the window, in ascending order.
    rest: Vec<(usize, HeldSlice<'m, BS<'m, M::Bitmap>>)>,
    /// Keeps the translation in use. It was taken before the range was translated.
    hold: Option<TranslationHold>,
    map: Map<'m, M>,
    addr: GuestAddress,
    len: usize,
    access: Permissions,
}

/// The map of a window.
enum Map<'m, M: ?Sized> {
    Borrowed(&'m M),
    Owned(Arc<M>),
    /// The map that was current in a state of its source.
    #[cfg_attr(
        not(feature = "backend-atomic"),
        expect(dead_code, reason = "without the feature, maps are not replaced")
    )]
    Current(Arc<M>, SeenGeneration, Source<M>),
}

/// A function that returns the current map, and the state of the source that it belongs to.
pub(crate) type Source<M> = Box<dyn Fn() -> (Arc<M>, SeenGeneration) + Send + Sync>;

// SAFETY: 1. The slices hold host addresses and bitmap slices. Any thread may access the addresses
// through a `VolatileSlice` at any time. The bitmap slices are `Send` by the bound. 2. The map is
// owned as `Arc<M>` or borrowed as `&M`, and both are `Send` since `M: Send + Sync`. 3. `Hold`,
// `TranslationHold`, `SeenGeneration` and `Source` are `Send` (asserted below). 4. The other fields
// are plain values.
unsafe impl<'m, M: GuestMemory + Send + Sync + ?Sized> Send for Window<'m, M> where
    BS<'m, M::Bitmap>: Send
{
}
// SAFETY: a `&Window` accesses guest memory through `VolatileSlice`s, which any number of threads
// may do at once. It marks through bitmap slices, which are `Sync` by the bound. It reaches
// `SeenGeneration` and `TranslationHold`, which are `Sync` (asserted below). It does not reach the
// map, `Source` or `Hold`. Its other fields are plain values.
unsafe impl<'m, M: GuestMemory + Send + Sync + ?Sized> Sync for Window<'m, M> where
    BS<'m, M::Bitmap>: Sync
{
}

const _: fn() = || {
    fn is_send<T: Send>() {}
    fn is_send_and_sync<T: Send + Sync>() {}
    is_send::<Hold>();
    is_send::<Source<()>>();
    is_send_and_sync::<SeenGeneration>();
    is_send_and_sync::<TranslationHold>();
};

impl<'m, M: GuestMemory + ?Sized> Window<'m, M> {
    /// Creates a window of the `len` bytes at `addr` that borrows the map.
    ///
    /// [`GuestMemory::window`] calls it, and documents the errors.
    pub(super) fn new(
        memory: &'m M,
        addr: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<Self> {
        Window::of(Map::Borrowed(memory), addr, len, access)
    }

    fn of(map: Map<'m, M>, addr: GuestAddress, len: usize, access: Permissions) -> Result<Self> {
        let mut window = Window {
            readable: nothing(),
            writable: nothing(),
            first: None,
            rest: Vec::new(),
            hold: None,
            map,
            addr,
            len,
            access,
        };
        window.resolve()?;
        Ok(window)
    }

    /// Finds the slices of a window that has none.
    ///
    /// After an error or a panic, it may have some of them.
    fn resolve(&mut self) -> Result<()> {
        let (addr, len, access) = (self.addr, self.len, self.access);
        let memory: &'m M = match &self.map {
            Map::Borrowed(memory) => memory,
            // SAFETY: the `Arc` keeps the object at this address alive and in place until it is
            // dropped or replaced. The slices that are made of the reference go into this window.
            // It drops them before the `Arc` (the order of the fields) and before the `Arc` is
            // replaced (`refresh`). It lends them for its own lifetime only. Nothing else keeps
            // the reference: `get_slices` and `hold_translation` are generic over the lifetime.
            Map::Owned(memory) | Map::Current(memory, ..) => unsafe { &*Arc::as_ptr(memory) },
        };
        if len == 0 {
            return Ok(());
        }
        if access == Permissions::No {
            return Err(not_created_for("window", access, access));
        }
        self.hold = Some(hold_for(memory, [(addr, len)], access)?);
        let mut gathered = 0usize;
        let mut slices = bounded_slices(memory, addr, len, access)?;
        slices.try_for_each_slice(|slice| {
            let offset = gathered;
            gathered = gathered
                .checked_add(slice.len())
                .ok_or(Error::InvalidBackendAddress)?;
            let (held, inaccessible) = slice.hold(access.direction())?;
            if let Some(error) = inaccessible {
                return Err(error.into());
            }
            self.push(offset, held)
        })?;
        // An implementation of `get_slices` may return fewer bytes than it should.
        if gathered != len {
            return Err(Error::InvalidBackendAddress);
        }
        if let Some(first) = &self.first {
            let bytes = first.slice().clone().with_other_bitmap(());
            if access.allow(Permissions::Read) {
                self.readable = bytes;
            }
            if access.allow(Permissions::Write) {
                self.writable = bytes;
            }
        }
        Ok(())
    }

    /// Drops the slices and the translation.
    fn release(&mut self) {
        self.readable = nothing();
        self.writable = nothing();
        self.first = None;
        self.rest.clear();
        self.hold = None;
    }

    /// Returns whether the window shows the current map, with the current translations.
    ///
    /// This is one load for a window of `GuestMemoryAtomic::window`, and one behind a
    /// [`SharedIotlb`](crate::iommu::SharedIotlb). Each change of the map or of the IOTLB makes it
    /// return `false`, even one that does not concern the range. A change that was published before
    /// this call, by any synchronisation of the two threads, is seen.
    ///
    /// A window of [`GuestMemory::window`] or [`from_arc`](Self::from_arc) does not know of other
    /// maps. An IOMMU that creates its own [`TranslationHold`] does not report changes.
    ///
    /// # Examples
    ///
    /// See [`refresh`](Self::refresh).
    #[doc(alias = "generation")]
    #[inline]
    pub fn is_current(&self) -> bool {
        let map = match &self.map {
            Map::Current(_, seen, _) => seen.is_current(),
            Map::Borrowed(_) | Map::Owned(_) => true,
        };
        let resolved = self.first.is_some() || self.len == 0;
        map && resolved && self.hold.as_ref().is_none_or(TranslationHold::is_current)
    }

    /// Resolves the range again, in the current map and with the current translations.
    ///
    /// Releases the old map and translation first, so that an invalidation need not wait for the
    /// window. A window of [`GuestMemory::window`] or [`from_arc`](Self::from_arc) stays with its
    /// map.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(all(feature = "backend-mmap", feature = "backend-atomic"))] {
    /// use std::sync::Arc;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};
    /// use vm_memory::Permissions;
    ///
    /// let map: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let memory = GuestMemoryAtomic::new(map);
    /// let mut ring = memory.window(GuestAddress(0x800), 0x206, Permissions::ReadWrite)?;
    ///
    /// // A region is plugged, and later the ring's region is unplugged.
    /// let dimm = Arc::new(GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None)?);
    /// memory.update(|map| map.insert_region(dimm))?;
    /// assert!(!ring.is_current());
    /// ring.refresh()?;
    /// assert!(ring.is_current());
    ///
    /// memory.update(|map| map.remove_region(GuestAddress(0), 0x1000).map(|(map, _)| map))?;
    /// ring.write_obj(1u16, 2)?; // still the old map
    /// assert!(ring.refresh().is_err());
    /// assert!(ring.write_obj(1u16, 2).is_err());
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns the errors of [`GuestMemory::window`]. After an error, or a panic of the memory, the
    /// window has no memory and holds no translation. Each access returns an error, and
    /// [`is_current`](Self::is_current) returns `false`. Another `refresh` may succeed.
    pub fn refresh(&mut self) -> Result<()> {
        self.release();
        if let Map::Current(map, seen, source) = &mut self.map {
            (*map, *seen) = source();
        }
        // The guard releases the window even if the memory's implementation panics.
        let unresolved = ReleaseOnDrop(self);
        unresolved.0.resolve()?;
        core::mem::forget(unresolved);
        Ok(())
    }

    /// Appends the slice at `offset`.
    fn push(&mut self, offset: usize, slice: HeldSlice<'m, BS<'m, M::Bitmap>>) -> Result<()> {
        if self.first.is_none() {
            self.first = Some(slice);
            return Ok(());
        }
        // One slice is `first`.
        if self.rest.len() >= MAX_SLICES.saturating_sub(1) {
            return Err(too_scattered(self.addr, self.len));
        }
        self.rest
            .try_reserve(1)
            .map_err(|error| Error::IOError(io::Error::new(ErrorKind::OutOfMemory, error)))?;
        self.rest.push((offset, slice));
        Ok(())
    }

    /// Returns the guest address of the first byte.
    pub fn addr(&self) -> GuestAddress {
        self.addr
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the access that the window was created for. Other accesses return an error.
    pub fn permissions(&self) -> Permissions {
        self.access
    }

    /// Returns the memory of the window as slices, in ascending order of address.
    ///
    /// They are for system calls: [`ptr_guard_mut`](VolatileSlice::ptr_guard_mut) returns the
    /// address of each. The pointers are valid until the window is refreshed or dropped.
    /// The slices are not tracked: after a system call that writes, call
    /// [`mark_dirty`](Self::mark_dirty). After a short count, mark all bytes of the call, unless
    /// the kernel counts every byte that it writes ([dirty tracking](crate::io#dirty-tracking)). A
    /// slice does not know the [permissions](Self::permissions) of the window. An empty window has
    /// no slices.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(all(unix, feature = "backend-mmap"))] {
    /// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
    /// let packet = memory.window(GuestAddress(0xf00), 0x600, Permissions::Write)?;
    /// let vector = |slice: vm_memory::VolatileSlice<'_>| libc::iovec {
    ///     iov_base: slice.ptr_guard_mut().as_ptr().cast(),
    ///     iov_len: slice.len(),
    /// };
    /// let vectors: Vec<libc::iovec> = packet.slices().map(vector).collect();
    /// assert_eq!(vectors.len(), 2);
    /// // After `readv(2)` of a packet of 60 bytes from a TAP device into `vectors`:
    /// packet.mark_dirty(0, 60);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "iovec")]
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> + use<'_, 'm, M> {
        // The bitmap slices of a window that owns its map have the lifetime `'static`, which must
        // not leave the window.
        let rest = self.rest.iter().map(|(_, held)| held);
        let slices = self.first.iter().chain(rest);
        slices.map(|held| held.slice().clone().with_other_bitmap(()))
    }

    /// Marks the pages of the `count` bytes at `offset`, which the kernel or a device wrote.
    ///
    /// Bytes past the end of the window are ignored.
    pub fn mark_dirty(&self, offset: usize, count: usize) {
        let end = offset.saturating_add(count);
        let from = self.rest.partition_point(|(start, _)| *start <= offset);
        let rest = self.rest.get(from.saturating_sub(1)..).unwrap_or_default();
        let first = self.first.iter().map(|held| (0, held.slice()));
        let slices = first.chain(rest.iter().map(|(start, held)| (*start, held.slice())));
        // The bitmaps are not sliced: a bitmap may panic there.
        mark_each(slices.take_while(|(start, _)| *start < end), |part| {
            let (start, slice) = part;
            let skip = offset.saturating_sub(start);
            let len = end.saturating_sub(start).min(slice.len());
            if let Some(len @ 1..) = len.checked_sub(skip) {
                slice.bitmap().mark_dirty(skip, len);
            }
        });
    }

    /// Returns the rest of the slice that contains `offset`, or `None` past the end of the window.
    fn slice_from(&self, offset: usize) -> Option<VolatileSlice<'_, BS<'m, M::Bitmap>>> {
        let first = self.first.as_ref()?.slice();
        let (start, slice) = if offset < first.len() {
            (0, first)
        } else {
            let after = self.rest.partition_point(|(start, _)| *start <= offset);
            let (start, held) = self.rest.get(after.checked_sub(1)?)?;
            (*start, held.slice())
        };
        let rest = slice.offset(offset.checked_sub(start)?).ok()?;
        (!rest.is_empty()).then_some(rest)
    }
}

impl<M: GuestMemory + 'static> Window<'static, M> {
    /// Creates a window of the `len` bytes at `addr` that owns a share of the map.
    ///
    /// It has no lifetime, so a device can keep it. `GuestMemoryLoadGuard::into_inner` returns the
    /// `Arc` of the current map of a `GuestMemoryAtomic`.
    ///
    /// # Examples
    ///
    /// See [`Window`].
    ///
    /// # Errors
    ///
    /// Returns the errors of [`GuestMemory::window`].
    pub fn from_arc(
        memory: Arc<M>,
        addr: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<Self> {
        Window::of(Map::Owned(memory), addr, len, access)
    }

    /// Creates a window in the current map of a source, which replaces its maps.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn from_source(
        source: Source<M>,
        addr: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<Self> {
        let (map, seen) = source();
        Window::of(Map::Current(map, seen, source), addr, len, access)
    }
}

/// Releases a window that is not resolved completely.
struct ReleaseOnDrop<'w, 'm, M: GuestMemory + ?Sized>(&'w mut Window<'m, M>);

impl<M: GuestMemory + ?Sized> Drop for ReleaseOnDrop<'_, '_, M> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Returns a slice of no bytes.
fn nothing<'m>() -> VolatileSlice<'m> {
    VolatileSlice::from(&mut [][..])
}

#[cold]
fn too_scattered(addr: GuestAddress, len: usize) -> Error {
    Error::IOError(io::Error::new(
        ErrorKind::InvalidInput,
        format!(
            "window of {len:#x} bytes at {:#x} has more than {MAX_SLICES} slices; use a smaller one",
            addr.0
        ),
    ))
}

impl<M: GuestMemory + ?Sized> Debug for Window<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("addr", &self.addr)
            .field("len", &self.len)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}
