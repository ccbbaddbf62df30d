//! [`LogBitmap`]: a bitmap that marks in a shared log.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::arithmetic::to_usize;
use vm_memory::bitmap::{ArcSlice, Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::logs::Logs;
use super::shared::pages_of;
use super::{LogError, SharedLog};

/// The time between two checks of the writers.
const POLL: Duration = Duration::from_micros(50);

/// The dirty bitmap of a vhost-user back end: it marks in the log of its front end.
///
/// Without a log it marks nothing, and a write costs a load and a fence. Its offsets are guest
/// physical addresses. Each region has a [slice](Self::slice) that begins at the guest address of
/// the region.
///
/// # Behind an IOMMU
///
/// The log has a bit for each guest physical page also if the device uses I/O virtual addresses
/// (vhost-user specification, "Migration"). Give the regions their slices as without an IOMMU, and
/// put [`MarkedIommuMemory::by_guest_address`] over the memory. [`IommuMemory::new`] marks by I/O
/// virtual address instead, which the front end does not expect.
///
/// [`MarkedIommuMemory::by_guest_address`]: vm_memory::iommu::IommuMemory::by_guest_address
/// [`IommuMemory::new`]: vm_memory::iommu::IommuMemory::new
///
/// # Regions that are added
///
/// While there is a log, a region that the log has no bits for cannot be built, because its marks
/// would be lost. `vm-memory-host` returns `BuildError::Region` then. The front end sends a larger
/// log first, and then the region (`VHOST_USER_ADD_MEM_REG`). [Replace](Self::replace) the log
/// before the region is built.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use std::time::{Duration, Instant};
///
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{Backing, MemoryBuilder, Region};
/// use vm_memory_vhost::log::{LogBitmap, SharedLog};
/// use vm_memory_vhost::MemoryRegion;
///
/// # let received = MemoryRegion::new(GuestAddress(0x10_0000), 0x10_0000, 0x7f00_0000_0000, 0);
/// # let ram = Region::new(GuestAddress(0), received.size).backing(Backing::Memfd);
/// # let front_end = GuestMemoryMmap::<()>::from_regions(vec![ram.build()?])?;
/// # let file = vm_memory_host::describe(&front_end)?.1.get(0).unwrap().try_clone()?;
/// // VHOST_USER_SET_MEM_TABLE, VHOST_USER_ADD_MEM_REG
/// let bitmap = Arc::new(LogBitmap::new());
/// let region = Region::new(received.guest_address, received.size)
///     .backing(Backing::shared_file(file, received.mmap_offset))
///     .sealed(true);
/// let regions = MemoryBuilder::new()
///     .region(region)
///     .build_regions_with_bitmaps(|start, _size| bitmap.slice(start))?;
/// let memory = GuestMemoryMmap::from_regions(regions)?;
///
/// // VHOST_USER_SET_LOG_BASE
/// # let front_end = SharedLog::create(SharedLog::size_for(&memory))?;
/// # let (file, size) = (front_end.file().try_clone()?, SharedLog::size_for(&memory));
/// let log = SharedLog::map(file, 0, size)?;
/// bitmap.replace(&memory, log, Instant::now() + Duration::from_secs(1))?;
/// // … acknowledge it …
///
/// memory.write_obj(7u64, GuestAddress(0x10_3000))?;
/// // The front end finds the mark of page 0x103.
/// let mut words = Vec::new();
/// assert_eq!(front_end.harvest(&mut words)?.words[4], 1 << 3);
/// assert_eq!(bitmap.lost_marks(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "VHOST_USER_SET_LOG_BASE")]
#[doc(alias = "VHOST_F_LOG_ALL")]
#[doc(alias = "migrate")]
#[derive(Debug)]
pub struct LogBitmap {
    logs: Logs<Arc<SharedLog>>,
    lost: AtomicU64,
}

impl LogBitmap {
    /// Creates a bitmap without a log.
    pub fn new() -> Self {
        Self {
            logs: Logs::new(),
            lost: AtomicU64::new(0),
        }
    }

    /// Returns the bitmap of a region that begins at a guest address.
    ///
    /// `MemoryBuilder::build_regions_with_bitmaps` of the crate `vm-memory-host` takes it. Without
    /// that crate, use [`MmapRegionBuilder::new_with_bitmap`](vm_memory::mmap::MmapRegionBuilder).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    /// use vm_memory::mmap::MmapRegionBuilder;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
    /// use vm_memory_vhost::log::LogBitmap;
    ///
    /// let (start, size) = (GuestAddress(1 << 32), 0x10_0000);
    /// let bitmap = Arc::new(LogBitmap::new());
    /// let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap.slice(start)).build()?;
    /// let region = GuestRegionMmap::new(mapping, start).ok_or("past the end")?;
    /// let memory = GuestMemoryMmap::from_regions(vec![region])?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn slice(self: &Arc<Self>, start: GuestAddress) -> ArcSlice<Self> {
        // A log has no bits for addresses above `usize::MAX`, so such a mark counts as lost.
        let offset = to_usize(start.0);
        ArcSlice::new(Arc::clone(self), offset)
    }

    /// Marks in another log, or in the first one. After this, acknowledge
    /// `VHOST_USER_SET_LOG_BASE`.
    ///
    /// No mark is lost. Threads mark in both logs until no thread marks in the old log only. After
    /// that, they mark in `new` only. So after the acknowledgement, the front end finds each mark
    /// in the old log or in the new one. It copies all of memory after the acknowledgement of the
    /// first log: the data of all unmarked writes are then visible.
    ///
    /// Threads hold a log only while they mark. So this waits for microseconds, unless a thread is
    /// not scheduled. First it waits for another call of this method, without regard to the
    /// deadline.
    ///
    /// # Errors
    ///
    /// - [`LogError::TooShort`] if the log has no bits for a page of the memory.
    /// - [`LogError::WritersRemain`] if, at the deadline, a thread still marks in the old log only.
    ///
    /// The old log then stays, with all marks. Do not acknowledge the message.
    pub fn replace<M>(&self, memory: &M, new: SharedLog, deadline: Instant) -> Result<(), LogError>
    where
        M: GuestMemoryBackend + ?Sized,
    {
        let (pages, needed) = (new.pages(), pages_of(memory));
        if pages < needed {
            return Err(LogError::TooShort { pages, needed });
        }
        self.logs.replace(Arc::new(new), |writers| {
            let time = deadline.saturating_duration_since(Instant::now());
            if time.is_zero() {
                return Err(LogError::WritersRemain { writers });
            }
            std::thread::sleep(POLL.min(time));
            Ok(())
        })
    }

    /// Stops marking, when the front end clears `VHOST_F_LOG_ALL`.
    ///
    /// A thread that marks at the same time may still mark in the log. Waits for a call of
    /// [`replace`](Self::replace) in another thread, which ends by its deadline.
    pub fn stop(&self) {
        self.logs.remove();
    }

    /// Returns whether writes are marked.
    pub fn is_marking(&self) -> bool {
        self.logs.is_on()
    }

    /// Returns the number of marks that could not be set. It never falls.
    ///
    /// A write during [`replace`](Self::replace) has a mark in each log, and counts once for each
    /// that it cannot set. The log ends before the page, or the front end has truncated its file. A
    /// migration would lose these pages: report an error to the front end.
    pub fn lost_marks(&self) -> u64 {
        // Acquire: pairs with the increment. Who sees a mark that was lost also sees the write.
        self.lost.load(Ordering::Acquire)
    }
}

impl Default for LogBitmap {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> WithBitmapSlice<'a> for LogBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for LogBitmap {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.logs.mark_each(|log| {
            if !log.mark(offset, len) {
                // Wraps only after 2^64 lost marks. Release: see `lost_marks`.
                self.lost.fetch_add(1, Ordering::AcqRel);
            }
        });
    }

    fn dirty_at(&self, offset: usize) -> bool {
        !self.logs.all(|log| !log.is_marked(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }

    /// Without a log, all bytes count as tracked: they are not tracked on purpose.
    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        self.logs.all(|log| log.tracks(offset, len))
    }
}
