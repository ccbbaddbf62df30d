//! [`AskingIommu`]: an IOMMU that requests missing mappings, and waits for them.

use std::fmt::{self, Debug};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::kind::{NONE_ARRIVED, REQUEST_FAILED, SOURCE_IS_CLOSED};
use super::requests::Waits;
use super::{
    Error, Invalidation, Iommu, Iotlb, IotlbFails, IotlbIterator, IotlbSnapshot, IovaRange,
    SharedIotlb,
};
use crate::guest_memory::{GuestAddress, Permissions, TranslationHold};

/// The number of lookups before a request is made although mappings changed since the lookup.
const LOOKUPS: usize = 16;

/// The party that knows all mappings: the front end of a vhost-user back end, or a page table.
///
/// Closures implement it, if there is nothing to do for accesses that are not permitted.
///
/// # Examples
///
/// See [`AskingIommu`].
pub trait MappingSource: Send + Sync {
    /// Requests the mappings of `range`, for an access.
    ///
    /// The mappings arrive by [`SharedIotlb::set_mapping`], on this or another thread, before or
    /// after this call returns. A source may map any part of the range that contains its first
    /// address. The rest is then requested separately. Several threads may call this at the same
    /// time.
    ///
    /// A mapping is the reply to each request for its pages whose access it permits. If it permits
    /// none of them, it is the reply to all, and these accesses fail. So set a mapping for each
    /// request, even if a mapping that does not permit the access is set already.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such mapping, or if the request cannot be sent. The access
    /// then fails without waiting.
    fn request_mapping(&self, range: &IovaRange, access: Permissions) -> io::Result<()>;

    /// Reports that a mapping of `range` does not permit an access, which fails.
    ///
    /// The provided method does nothing.
    ///
    /// # Errors
    ///
    /// Returns an error if the report cannot be sent. The error of the access includes it.
    fn report_refusal(&self, range: &IovaRange, access: Permissions) -> io::Result<()> {
        let _ = (range, access);
        Ok(())
    }
}

impl<F> MappingSource for F
where
    F: Fn(&IovaRange, Permissions) -> io::Result<()> + Send + Sync,
{
    fn request_mapping(&self, range: &IovaRange, access: Permissions) -> io::Result<()> {
        self(range, access)
    }
}

/// An [`Iommu`] that requests missing mappings from a [`MappingSource`], and waits for them.
///
/// The mappings are in a [`SharedIotlb`]. The thread that receives them calls
/// [`set_mapping`](SharedIotlb::set_mapping) on a handle to it, which wakes the threads that wait
/// for them. A hit costs as much as on the `SharedIotlb`, and takes no lock.
///
/// Clones are handles to the same IOMMU.
///
/// [`Error::kind`] tells the failures apart: a mapping that does not permit the access, a timeout,
/// a request that failed, a closed source.
///
/// # Requests
///
/// Each missing part of a range is requested once. Threads that miss the same page of 4 KiB, for
/// the same access, share a request. A page is requested again in these cases:
///
/// - Its mapping arrived, and was invalidated or evicted before the access found it.
/// - The thread that made the request gave up, and another thread waits for the page.
/// - A later access misses it.
///
/// The access fails without waiting if a mapping of the range does not permit it.
///
/// # Bound
///
/// With a [bound](SharedIotlb::set_bound), the oldest mappings are evicted, and requested again
/// when they are missed. An access fails before the timeout if its range needs more mappings than
/// the bound.
///
/// # Timeout
///
/// The source, and the guest that it serves, cannot keep an access waiting: mappings may arrive and
/// be removed again without end. After the timeout, an access continues only while it makes
/// progress. It makes further requests only if it misses fewer addresses than when it made the last
/// ones, and waits for none of them.
///
/// # Deadlocks
///
/// An invalidation waits for accesses that began before it. A source may send no mappings while it
/// waits for an invalidation. So a thread must not wait for a mapping while it holds another
/// translation: an iterator, a window, an I/O buffer or a [hold](Iommu::hold_translation). The wait
/// would last until the timeout. Call [`check_range`](crate::GuestMemory::check_range) for all
/// ranges of a request first, which makes their mappings arrive.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::mpsc;
/// use std::thread;
/// use std::time::Duration;
/// use vm_memory::iommu::{AskingIommu, IommuMemory, IovaRange, SharedIotlb};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// let iotlb = SharedIotlb::new();
/// let (requests, received) = mpsc::channel();
/// let iommu = AskingIommu::new(
///     iotlb.clone(),
///     Duration::from_secs(1),
///     move |range: &IovaRange, _: Permissions| {
///         requests.send(range.base).map_err(std::io::Error::other)
///     },
/// );
/// // The front end maps each page to the page at 0x1000.
/// thread::spawn(move || {
///     for iova in received {
///         let page = GuestAddress(iova.0 & !0xfff);
///         let _ = iotlb.set_mapping(page, GuestAddress(0x1000), 0x1000, Permissions::ReadWrite);
///     }
/// });
///
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let memory = IommuMemory::new(physical, iommu, true, ());
/// memory.write_obj(7u64, GuestAddress(0x8000_0010))?;
/// assert_eq!(memory.get_backend().read_obj::<u64>(GuestAddress(0x1010))?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "IOTLB miss")]
#[doc(alias = "vhost-user")]
pub struct AskingIommu<S> {
    shared: Arc<Shared<S>>,
}

struct Shared<S> {
    iotlb: SharedIotlb,
    timeout: Duration,
    source: S,
    closed: AtomicBool,
}

/// The requests that concern one access. Takes them back when it is dropped.
struct Access<'a> {
    iotlb: &'a SharedIotlb,
    waits: Waits,
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        self.iotlb.snapshots().take_back(&mut self.waits);
    }
}

impl<S: MappingSource> AskingIommu<S> {
    /// Creates an IOMMU whose accesses wait for missing mappings no longer than `timeout`.
    ///
    /// With a timeout of 0, an access finds only mappings that
    /// [`request_mapping`](MappingSource::request_mapping) sets before it returns.
    pub fn new(iotlb: SharedIotlb, timeout: Duration, source: S) -> Self {
        let closed = AtomicBool::new(false);
        Self {
            shared: Arc::new(Shared {
                iotlb,
                timeout,
                source,
                closed,
            }),
        }
    }

    /// Returns the IOTLB.
    pub fn iotlb(&self) -> &SharedIotlb {
        &self.shared.iotlb
    }

    /// Returns the source of the mappings.
    pub fn source(&self) -> &S {
        &self.shared.source
    }

    /// Removes all mappings, ends all waits, and makes later misses fail without a request.
    ///
    /// Call it when the connection to the source ends, because nothing can invalidate the mappings
    /// afterwards. Call it after the last [`set_mapping`](SharedIotlb::set_mapping): a mapping that
    /// is set later stays, and accesses use it. Accesses that began before the call may still use
    /// the mappings: wait for the returned [`Invalidation`].
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use vm_memory::iommu::{AskingIommu, Iommu, IovaRange, SharedIotlb};
    /// use vm_memory::{GuestAddress, Permissions};
    ///
    /// let source = |_: &IovaRange, _: Permissions| Ok(());
    /// let iommu = AskingIommu::new(SharedIotlb::new(), Duration::MAX, source);
    /// assert!(iommu.close().is_done());
    /// let error = iommu.translate(GuestAddress(0x1000), 8, Permissions::Read).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "cannot translate IOVA range 0x1000-0x1007: \
    ///      0x1000-0x1007 is not mapped, and the source of mappings is closed"
    /// );
    /// ```
    #[must_use = "until it is done, a device may use the removed mappings"]
    pub fn close(&self) -> Invalidation {
        // Release: a request that sees it also sees what the caller did before. A request that has
        // not seen it waits, and `wake` takes the lock under which that request checks again.
        self.shared.closed.store(true, Ordering::Release);
        let invalidation = self.shared.iotlb.invalidate_all();
        self.shared.iotlb.snapshots().wake();
        invalidation
    }

    /// Returns whether [`close`](Self::close) was called.
    pub fn is_closed(&self) -> bool {
        // Acquire: pairs with the store in `close`.
        self.shared.closed.load(Ordering::Acquire)
    }
}

impl<S: MappingSource> Shared<S> {
    /// Requests the missing parts of a range until a lookup finds it.
    #[cold]
    fn request(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, Error> {
        let begin = Instant::now();
        // `None` does not pass.
        let deadline = begin.checked_add(self.timeout);
        let snapshots = self.iotlb.snapshots();
        let mut requests = Access {
            iotlb: &self.iotlb,
            waits: Waits::default(),
        };
        // Acquire: pairs with the store in `close`.
        let is_closed = || self.closed.load(Ordering::Acquire);
        let (mut lookups, mut is_late) = (0usize, false);
        // The number of addresses that the last requests were made for.
        let mut requested = usize::MAX;
        loop {
            // The guard of the snapshot is dropped by a lookup that fails: no invalidation waits
            // for a thread that waits here.
            let snapshot = self.iotlb.snapshot();
            let version = snapshot.version();
            let fails = match Iotlb::lookup(snapshot, iova, length, access) {
                Ok(found) => return Ok(found),
                Err(fails) => fails,
            };
            if !fails.access_fails.is_empty() {
                return Err(self.refuse(fails, iova, length, access));
            }
            let cannot = |what: fmt::Arguments<'_>| {
                let first = fails.misses.first();
                let missing = first.map_or_else(String::new, IovaRange::to_string);
                Error::CannotResolve {
                    iova_range: IovaRange { base: iova, length },
                    reason: format!("{missing} {what}"),
                }
            };
            if is_closed() {
                return Err(cannot(format_args!("{SOURCE_IS_CLOSED}")));
            }
            let lengths = fails.misses.iter().map(|miss| miss.length);
            let missing = lengths.fold(0, usize::saturating_add);
            if is_late && missing >= requested {
                let timeout = self.timeout;
                return Err(cannot(format_args!("{NONE_ARRIVED} {timeout:?}")));
            }
            // If mappings changed since the lookup, the missing ones may have arrived.
            lookups = lookups.saturating_add(1);
            let version = (lookups < LOOKUPS).then_some(version);
            let firsts = fails.misses.iter().map(|miss| miss.base.0);
            let waits = &mut requests.waits;
            let Some(new) = snapshots.request(version, firsts, access.bits(), waits) else {
                continue;
            };
            (lookups, requested) = (0, missing);
            for miss in new.into_iter().filter_map(|index| fails.misses.get(index)) {
                self.source
                    .request_mapping(miss, access)
                    .map_err(|error| cannot(format_args!("{REQUEST_FAILED} {error}")))?;
            }
            is_late = !snapshots.wait(waits, deadline, is_closed);
        }
    }

    /// Reports an access that a mapping does not permit, and returns its error.
    fn refuse(
        &self,
        fails: IotlbFails,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Error {
        let refused = fails.access_fails.first();
        let of_mapping = refused
            .filter(|range| !range.passes_the_end())
            .filter(|_| !fails.is_refused_by_bound());
        let report = of_mapping.map_or(Ok(()), |range| self.source.report_refusal(range, access));
        let mut error = fails.into_error(iova, length, access);
        if let (Err(report), Error::CannotResolve { reason, .. }) = (report, &mut error) {
            reason.push_str(&format!(", and the report of that failed: {report}"));
        }
        error
    }
}

impl<S: MappingSource> Iommu for AskingIommu<S> {
    type IotlbGuard<'a>
        = IotlbSnapshot
    where
        Self: 'a;

    #[inline(always)]
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, Error> {
        match self.shared.iotlb.lookup(iova, length, access) {
            Ok(found) => Ok(found),
            Err(_) => self.shared.request(iova, length, access),
        }
    }

    fn current_iotlb(&self) -> Option<IotlbSnapshot> {
        self.shared.iotlb.current_iotlb()
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.shared.iotlb.hold_translation()
    }
}

impl<S> Clone for AskingIommu<S> {
    fn clone(&self) -> Self {
        let shared = Arc::clone(&self.shared);
        Self { shared }
    }
}

impl<S> Debug for AskingIommu<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AskingIommu")
            .field("iotlb", &self.shared.iotlb)
            .field("timeout", &self.shared.timeout)
            .field("closed", &self.shared.closed)
            .finish_non_exhaustive()
    }
}
