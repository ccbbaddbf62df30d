//! [`Window`]: a range of guest memory that is resolved once and accessed by offset.

use core::fmt::{self, Debug};
use core::sync::atomic::Ordering;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use super::hold::{hold_for, TranslationHold};
use super::{
    bounded_slices, Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions, Result,
};
use crate::bitmap::{Bitmap as _, BS};
use crate::bytes::Bytes;
use crate::convert::{to_u64, to_usize};
use crate::io::{ReadVolatile, WriteVolatile};
use crate::value::{AtomicAccess, ByteValued};
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
/// each time. An access to a window only compares the offset with its length.
///
/// [`Bytes<usize>`](Bytes) has the accesses. They follow the crate's
/// [memory model](crate#memory-model), mark the pages that they write, and report
/// [faults](crate::fault) by guest address.
///
/// # The map of the window
///
/// A window stays with the map that it was created from. It keeps that map, or borrows it, so its
/// memory stays mapped. After a hotplug, make a new window from the new map.
///
/// Behind an IOMMU, the window holds its translation: an invalidation waits until the window is
/// dropped, as it waits for an [`IoBuffer`](crate::vectored::IoBuffer). So a driver that unmaps the
/// range waits for the device. Drop the window when the request is done.
///
/// Memory of a Xen guest that is mapped for each access (feature `xen`) is mapped once, until the
/// window is dropped. Drop it before the request is returned to the guest. A window that is leaked
/// ([`mem::forget`](core::mem::forget)) keeps the pages mapped.
///
/// A block that is unplugged while a window covers it faults, like memory whose file is truncated.
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
#[doc(alias = "MemoryRegionCache")]
#[doc(alias = "ring")]
#[doc(alias = "lock_pages")]
pub struct Window<'m, M: GuestMemory + ?Sized> {
    // The order of the fields is the order in which they are dropped. `first` and `rest` borrow
    // from the map, which `_memory` keeps alive if the window does not borrow it itself. A call
    // that gets a window by value may drop the map, which `HeldSlice` permits.
    /// The first slice, which is nearly always the only one. `None` if the window is empty.
    first: Option<HeldSlice<'m, BS<'m, M::Bitmap>>>,
    /// The other slices, each with its offset in the window, in ascending order.
    rest: Vec<(usize, HeldSlice<'m, BS<'m, M::Bitmap>>)>,
    /// Keeps the translation in use. It was taken before the range was translated.
    _hold: Option<TranslationHold>,
    /// The map, if the window owns a share of it.
    _memory: Option<Arc<M>>,
    addr: GuestAddress,
    len: usize,
    access: Permissions,
}

// SAFETY: 1. `first` and `rest` hold host addresses and bitmap slices. Any thread may access the
// addresses through a `VolatileSlice` at any time. The bitmap slices are `Send` by the bound. 2.
// The map is owned as `Arc<M>` or borrowed as `&M`, and both are `Send` since `M: Send + Sync`. 3.
// `Hold` and `TranslationHold` are `Send` (asserted below). 4. The other fields are plain values.
unsafe impl<'m, M: GuestMemory + Send + Sync + ?Sized> Send for Window<'m, M> where
    BS<'m, M::Bitmap>: Send
{
}
// SAFETY: a `&Window` accesses guest memory through `VolatileSlice`s, which any number of threads
// may do at once. It marks through bitmap slices, which are `Sync` by the bound. It does not reach
// the map or the holds. Its other fields are plain values.
unsafe impl<'m, M: GuestMemory + Send + Sync + ?Sized> Sync for Window<'m, M> where
    BS<'m, M::Bitmap>: Sync
{
}

const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Hold>();
    is_send::<TranslationHold>();
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
        let mut window = Window {
            first: None,
            rest: Vec::new(),
            _hold: None,
            _memory: None,
            addr,
            len,
            access,
        };
        if len == 0 {
            return Ok(window);
        }
        if access == Permissions::No {
            return Err(Error::HostAddressNotAvailable);
        }
        window._hold = Some(hold_for(memory, addr, len, access)?);
        let mut gathered = 0usize;
        let mut slices = bounded_slices(memory, addr, len, access)?;
        slices.try_for_each_slice(|slice| {
            let offset = gathered;
            gathered = gathered
                .checked_add(slice.len())
                .ok_or(Error::InvalidBackendAddress)?;
            // SAFETY: the window drops the slice before the hold, and lends it for its own lifetime
            // only (`slice_from`, `slices`).
            let (slice, hold, inaccessible) = unsafe { slice.hold(access.direction()) }?;
            if let Some(error) = inaccessible {
                return Err(error.into());
            }
            window.push(offset, HeldSlice::new(slice, hold))
        })?;
        // An implementation of `get_slices` may return fewer bytes than it should.
        if gathered != len {
            return Err(Error::InvalidBackendAddress);
        }
        Ok(window)
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
    /// address of each. The pointers are valid as long as the window. The slices are not tracked:
    /// after a system call that writes, call [`mark_dirty`](Self::mark_dirty). A slice does not
    /// know the [permissions](Self::permissions) of the window. An empty window has no slices.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
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
    /// // After `recvmsg(2)` of 60 bytes into `vectors`:
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
        let part = Slices {
            window: self,
            offset,
            remaining: count,
        };
        for slice in part.map_while(Result::ok) {
            slice.bitmap().mark_dirty(0, slice.len());
        }
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

    /// Returns the guest address at `offset`, which may be past the end of the window.
    ///
    /// It wraps around at 2^64. [`ByAddress`] subtracts the address of the window again, and
    /// compares the offset with the length.
    #[inline(always)]
    fn at(&self, offset: usize) -> GuestAddress {
        GuestAddress(self.addr.0.wrapping_add(to_u64(offset)))
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
        // SAFETY: `memory` keeps the object at this address alive and in place until it is dropped.
        // It is moved into the window below, or dropped after the window that failed. The window
        // drops its slices before it, and lends them for its own lifetime only. Nothing else keeps
        // the reference: `get_slices` and `hold_translation` are generic over the lifetime.
        let borrowed: &'static M = unsafe { &*Arc::as_ptr(&memory) };
        let mut window = Window::new(borrowed, addr, len, access)?;
        window._memory = Some(memory);
        Ok(window)
    }
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

/// A window as a [`GuestMemory`], whose only addresses are those of the window.
///
/// So accesses by offset share the implementation of accesses by guest address.
struct ByAddress<'w, 'm, M: GuestMemory + ?Sized>(&'w Window<'m, M>);

impl<'m, M: GuestMemory + ?Sized> GuestMemory for ByAddress<'_, 'm, M> {
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = BS<'m, M::Bitmap>;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let end = self.offset(addr).checked_add(count);
        count == 0 || (self.permits(access) && end.is_some_and(|end| end <= self.0.len))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        if !self.permits(access) {
            return Err(Error::HostAddressNotAvailable);
        }
        Ok(Slices {
            window: self.0,
            offset: self.offset(addr),
            remaining: count,
        })
    }

    #[inline(always)]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        if !self.permits(access) {
            return None;
        }
        self.0
            .first
            .as_ref()?
            .slice()
            .subslice(self.offset(addr), count)
            .ok()
    }
}

impl<'m, M: GuestMemory + ?Sized> ByAddress<'_, 'm, M> {
    #[inline(always)]
    fn permits(&self, access: Permissions) -> bool {
        self.0.access.allow(access)
    }

    /// Returns the offset of `addr` in the window, which may be past its end.
    #[inline(always)]
    fn offset(&self, addr: GuestAddress) -> usize {
        to_usize(addr.0.wrapping_sub(self.0.addr.0))
    }
}

/// The slices of a part of a window. Past the end of the window, it returns an error.
struct Slices<'a, 'm, M: GuestMemory + ?Sized> {
    window: &'a Window<'m, M>,
    offset: usize,
    remaining: usize,
}

impl<'a, 'm, M: GuestMemory + ?Sized> Iterator for Slices<'a, 'm, M> {
    type Item = Result<VolatileSlice<'a, BS<'m, M::Bitmap>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let Some(slice) = self.window.slice_from(self.offset) else {
            self.remaining = 0;
            return Some(Err(Error::InvalidBackendAddress));
        };
        let slice = slice.first(self.remaining);
        // Neither wraps: the slice is at most the rest of the range, and ends in the window.
        self.remaining = self.remaining.wrapping_sub(slice.len());
        self.offset = self.offset.wrapping_add(slice.len());
        Some(Ok(slice))
    }
}

impl<M: GuestMemory + ?Sized> core::iter::FusedIterator for Slices<'_, '_, M> {}
impl<'a, 'm, M: GuestMemory + ?Sized> GuestMemorySliceIterator<'a, BS<'m, M::Bitmap>>
    for Slices<'a, 'm, M>
{
}

/// Accesses by offset in the window.
///
/// An access that starts past the end returns [`Error::InvalidBackendAddress`]. One that passes the
/// end moves the bytes before it; see [`Bytes`] for how each method reports that. An access that
/// the window was not created for returns [`Error::HostAddressNotAvailable`].
impl<M: GuestMemory + ?Sized> Bytes<usize> for Window<'_, M> {
    type E = Error;

    #[inline(always)]
    fn write(&self, buf: &[u8], offset: usize) -> Result<usize> {
        ByAddress(self).write(buf, self.at(offset))
    }

    #[inline(always)]
    fn read(&self, buf: &mut [u8], offset: usize) -> Result<usize> {
        ByAddress(self).read(buf, self.at(offset))
    }

    #[inline(always)]
    fn write_slice(&self, buf: &[u8], offset: usize) -> Result<()> {
        ByAddress(self).write_slice(buf, self.at(offset))
    }

    #[inline(always)]
    fn read_slice(&self, buf: &mut [u8], offset: usize) -> Result<()> {
        ByAddress(self).read_slice(buf, self.at(offset))
    }

    #[inline(always)]
    fn write_obj<T: ByteValued>(&self, val: T, offset: usize) -> Result<()> {
        ByAddress(self).write_obj(val, self.at(offset))
    }

    #[inline(always)]
    fn read_obj<T: ByteValued>(&self, offset: usize) -> Result<T> {
        ByAddress(self).read_obj(self.at(offset))
    }

    fn read_volatile_from<F>(&self, offset: usize, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        ByAddress(self).read_volatile_from(self.at(offset), src, count)
    }

    fn read_exact_volatile_from<F>(&self, offset: usize, src: &mut F, count: usize) -> Result<()>
    where
        F: ReadVolatile,
    {
        ByAddress(self).read_exact_volatile_from(self.at(offset), src, count)
    }

    fn write_volatile_to<F>(&self, offset: usize, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        ByAddress(self).write_volatile_to(self.at(offset), dst, count)
    }

    fn write_all_volatile_to<F>(&self, offset: usize, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        ByAddress(self).write_all_volatile_to(self.at(offset), dst, count)
    }

    #[inline(always)]
    fn store<T: AtomicAccess>(&self, val: T, offset: usize, order: Ordering) -> Result<()> {
        ByAddress(self).store(val, self.at(offset), order)
    }

    #[inline(always)]
    fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> Result<T> {
        ByAddress(self).load(self.at(offset), order)
    }
}
