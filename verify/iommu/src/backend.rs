//! [`VhostIommu`]: an [`Iommu`] that requests missing mappings from the front end.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, net::Shutdown};

use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vhost::VhostIotlbType;
use vm_memory::iommu::{Error, Iommu, Iotlb, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, Permissions};

use crate::message::{Header, IotlbMessage, WireError, HEADER_SIZE, IOTLB_SIZE, MAX_PAYLOAD};
use crate::table::{RegionTable, TableError};

/// The timeout of a write to a channel: a front end that does not read must not block a device
/// forever.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

const UPDATE: u8 = kind_of(VhostIotlbType::Update);
const INVALIDATE: u8 = kind_of(VhostIotlbType::Invalidate);
const MISS: u8 = kind_of(VhostIotlbType::Miss);
const ACCESS_FAIL: u8 = kind_of(VhostIotlbType::AccessFail);

#[expect(
    clippy::as_conversions,
    reason = "the number of a `repr(u8)` enumeration, in a constant"
)]
const fn kind_of(kind: VhostIotlbType) -> u8 {
    kind as u8
}

/// The reason why a message of the front end was refused. A refused message changes nothing.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request is unknown.
    #[error("unknown request {0}")]
    Request(u32),
    /// The payload has the wrong length.
    #[error("invalid payload")]
    Payload(#[from] WireError),
    /// The type is unknown, or only back ends send it.
    #[error("unexpected IOTLB message of type {0}")]
    Kind(u8),
    /// The permissions are not one of `VHOST_ACCESS_*`.
    #[error("unknown permissions {0:#x}")]
    Permissions(u8),
    /// The range is empty. Some protocols use that for the whole address space.
    #[error("empty range at IOVA {0:#x}")]
    Empty(u64),
    /// The range passes 2^64.
    #[error("{1:#x} bytes at IOVA {0:#x} pass the end of the address space")]
    Overflow(u64, u64),
    /// The target of the mapping is not guest memory.
    #[error(transparent)]
    Target(#[from] TableError),
    /// The IOTLB refused the mapping.
    #[error(transparent)]
    Iotlb(#[from] Error),
}

/// An IOMMU that requests missing mappings from the front end, and waits for them until a deadline.
///
/// A receiver thread handles updates and invalidations from the main channel. It takes the write
/// lock of the IOTLB for an invalidation. So it acknowledges only after the end of all accesses
/// that were translated before.
///
/// # Deadlocks
///
/// A thread that holds an iterator over slices of this memory must not access the memory in another
/// way. The second read lock could wait for a writer, which waits for the first one.
pub struct VhostIommu {
    shared: Arc<Shared>,
    main: UnixStream,
    receiver: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

struct Shared {
    iotlb: RwLock<Iotlb>,
    table: RegionTable,
    changes: Mutex<Changes>,
    changed: Condvar,
    /// The back-end channel. `None` after a failed write, which may have sent a part of a message.
    requests: Mutex<Option<UnixStream>>,
    deadline: Duration,
}

/// The number of changes that the receiver thread has made. Waiting threads compare it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Changes {
    updates: u64,
    invalidations: u64,
    closed: bool,
}

impl VhostIommu {
    /// Starts a back end on a main channel and a back-end channel.
    ///
    /// An access waits for missing mappings no longer than `deadline`.
    ///
    /// # Errors
    ///
    /// Returns an error if a socket cannot be configured, or the thread cannot be started.
    pub fn start(
        main: UnixStream,
        requests: UnixStream,
        table: RegionTable,
        deadline: Duration,
    ) -> io::Result<Self> {
        main.set_write_timeout(Some(WRITE_TIMEOUT))?;
        requests.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let shared = Arc::new(Shared {
            iotlb: RwLock::default(),
            table,
            changes: Mutex::default(),
            changed: Condvar::new(),
            requests: Mutex::new(Some(requests)),
            deadline,
        });
        let channel = main.try_clone()?;
        let server = Arc::clone(&shared);
        let receiver = thread::Builder::new()
            .name("iotlb-receiver".into())
            .spawn(move || {
                let end = server.serve(&channel);
                server.close();
                // Fails if the front end has already ended the connection.
                let _ = channel.shutdown(Shutdown::Both);
                end
            })?;
        Ok(VhostIommu {
            shared,
            main,
            receiver: Mutex::new(Some(receiver)),
        })
    }

    /// Handles one message, as the receiver thread does.
    ///
    /// # Errors
    ///
    /// Returns [`Refusal`] if the message is refused. A refused message changes nothing.
    pub fn handle(&self, header: &Header, payload: &[u8]) -> Result<(), Refusal> {
        self.shared.handle(header, payload)
    }

    /// Returns whether the connection is open.
    pub fn is_connected(&self) -> bool {
        !self.shared.changes().closed
    }

    /// Returns the cached mappings.
    pub fn iotlb(&self) -> RwLockReadGuard<'_, Iotlb> {
        self.shared.iotlb()
    }

    /// Ends the connection, and returns the result of the receiver thread. Returns `None` if the
    /// result was returned before.
    pub fn disconnect(&self) -> Option<thread::Result<io::Result<()>>> {
        // Fails if the receiver thread has already ended the connection.
        let _ = self.main.shutdown(Shutdown::Both);
        let receiver = lock(&self.receiver).take();
        receiver.map(JoinHandle::join)
    }

    /// Waits until the receiver thread ends by itself, and returns its result. Returns `None` if
    /// the result was returned before.
    pub fn wait_for_end(&self) -> Option<thread::Result<io::Result<()>>> {
        let receiver = lock(&self.receiver).take();
        receiver.map(JoinHandle::join)
    }
}

impl Drop for VhostIommu {
    fn drop(&mut self) {
        // A caller that needs the result calls `disconnect` first.
        let _ = self.disconnect();
    }
}

impl fmt::Debug for VhostIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostIommu")
            .field("deadline", &self.shared.deadline)
            .field("changes", &*self.shared.changes())
            .finish_non_exhaustive()
    }
}

impl Iommu for VhostIommu {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let shared = &*self.shared;
        let cannot = |reason: String| Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason,
        };
        let too_late = || {
            cannot(format!(
                "the front end sent no mapping within {:?}",
                shared.deadline
            ))
        };
        let begin = Instant::now();
        // The last miss that was sent, and the number of invalidations before it.
        let mut asked: Option<(IovaRange, u64)> = None;
        loop {
            // Before the lookup: a later change ends the wait below.
            let seen = *shared.changes();
            let fails = match Iotlb::lookup(shared.iotlb(), iova, length, access) {
                Ok(found) => return Ok(found),
                Err(fails) => fails,
            };
            if seen.closed {
                return Err(cannot("the front end is gone".into()));
            }
            if let Some(first) = fails.access_fails.first() {
                // One message per access, for any number of mappings that refuse it.
                shared.ask(ACCESS_FAIL, first, access).map_err(|error| {
                    cannot(format!("not permitted, and the report failed: {error}"))
                })?;
                return Err(cannot(format!("{access:?} is not permitted at {first}")));
            }
            // One miss at a time: a front end may map one page of it, or all of it. A miss is sent
            // again only if an invalidation may have removed the reply.
            let miss = fails.misses.into_iter().next();
            if let Some(miss) =
                miss.filter(|miss| asked.as_ref() != Some(&(*miss, seen.invalidations)))
            {
                if asked.is_some() && begin.elapsed() >= shared.deadline {
                    return Err(too_late());
                }
                shared
                    .ask(MISS, &miss, access)
                    .map_err(|error| cannot(format!("cannot send the miss of {miss}: {error}")))?;
                asked = Some((miss, seen.invalidations));
            }
            let left = shared.deadline.saturating_sub(begin.elapsed());
            if !shared.wait_for_change(seen, left) {
                return Err(too_late());
            }
        }
    }
}

impl Shared {
    fn iotlb(&self) -> RwLockReadGuard<'_, Iotlb> {
        self.iotlb.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        lock(&self.changes)
    }

    /// Changes the IOTLB, and then notifies waiting threads.
    fn change<T>(
        &self,
        iotlb: impl FnOnce(&mut Iotlb) -> T,
        count: impl FnOnce(&mut Changes),
    ) -> T {
        let done = iotlb(&mut self.iotlb.write().unwrap_or_else(PoisonError::into_inner));
        count(&mut self.changes());
        self.changed.notify_all();
        done
    }

    /// Waits for a change since `seen`, for at most `left`. Returns whether there was one.
    fn wait_for_change(&self, seen: Changes, left: Duration) -> bool {
        let (now, _) = self
            .changed
            .wait_timeout_while(self.changes(), left, |now| *now == seen)
            .unwrap_or_else(PoisonError::into_inner);
        *now != seen
    }

    /// Sends a message to the front end.
    fn ask(&self, kind: u8, range: &IovaRange, access: Permissions) -> io::Result<()> {
        let message = IotlbMessage {
            iova: range.base.0,
            size: u64::try_from(range.length).unwrap_or(u64::MAX),
            uaddr: 0,
            perm: perm_of(access),
            kind,
        };
        let size = u32::try_from(IOTLB_SIZE).unwrap_or(u32::MAX);
        let header = Header::request(BackendReq::IOTLB_MSG.into(), size, false);
        let bytes = [&header.to_bytes()[..], &message.to_bytes()].concat();
        let mut requests = lock(&self.requests);
        let channel = requests
            .as_mut()
            .ok_or_else(|| io::Error::from(ErrorKind::NotConnected))?;
        let sent = channel.write_all(&bytes);
        if sent.is_err() {
            *requests = None;
        }
        sent
    }

    /// Handles messages until the front end ends the connection, or sends a message that makes the
    /// rest of the stream unreadable.
    fn serve(&self, mut channel: &UnixStream) -> io::Result<()> {
        loop {
            let mut bytes = [0; HEADER_SIZE];
            let Some((first, rest)) = bytes.split_first_mut() else {
                return Ok(());
            };
            // The connection may end between two messages, but not within one.
            if channel.read(std::slice::from_mut(first))? == 0 {
                return Ok(());
            }
            channel.read_exact(rest)?;
            let header = Header::from_bytes(&bytes);
            let size = usize::try_from(header.size).unwrap_or(usize::MAX);
            if !header.is_of_this_version() || header.is_reply() || size > MAX_PAYLOAD {
                let what = format!("not a request of this protocol: {header:?}");
                return Err(io::Error::new(ErrorKind::InvalidData, what));
            }
            let mut payload = vec![0; size];
            channel.read_exact(&mut payload)?;
            let result = self.handle(&header, &payload);
            if header.needs_reply() {
                let reply = Header::reply_to(header.request).to_bytes();
                let ack = u64::from(result.is_err()).to_ne_bytes();
                channel.write_all(&[&reply[..], &ack].concat())?;
            }
        }
    }

    /// Removes all mappings, because no message can invalidate them now, and ends all waits.
    fn close(&self) {
        *lock(&self.requests) = None;
        self.change(Iotlb::invalidate_all, |changes| changes.closed = true);
    }

    fn handle(&self, header: &Header, payload: &[u8]) -> Result<(), Refusal> {
        if header.request != u32::from(FrontendReq::IOTLB_MSG) {
            return Err(Refusal::Request(header.request));
        }
        let message = IotlbMessage::from_bytes(payload)?;
        match message.kind {
            UPDATE => self.update(&message),
            INVALIDATE => self.invalidate(&message),
            other => Err(Refusal::Kind(other)),
        }
    }

    fn update(&self, message: &IotlbMessage) -> Result<(), Refusal> {
        let permissions = permissions_of(message.perm).ok_or(Refusal::Permissions(message.perm))?;
        let more = message
            .size
            .checked_sub(1)
            .ok_or(Refusal::Empty(message.iova))?;
        let overflow = || Refusal::Overflow(message.iova, message.size);
        message.iova.checked_add(more).ok_or_else(overflow)?;
        // All checks are made before the first mapping is set.
        let ranges = self.table.translate(message.uaddr, message.size)?;
        usize::try_from(message.size).map_err(|_| overflow())?;
        self.change(
            |iotlb| {
                let mut iova = message.iova;
                for (target, len) in ranges {
                    let length = usize::try_from(len).map_err(|_| overflow())?;
                    iotlb.set_mapping(GuestAddress(iova), target, length, permissions)?;
                    // Wraps only after the last range, if that ends at 2^64.
                    iova = iova.wrapping_add(len);
                }
                Ok(())
            },
            |changes| changes.updates = changes.updates.wrapping_add(1),
        )
    }

    fn invalidate(&self, message: &IotlbMessage) -> Result<(), Refusal> {
        if message.size == 0 {
            return Err(Refusal::Empty(message.iova));
        }
        // A range that passes the end is not refused, because its mappings must be removed.
        let length = usize::try_from(message.size).unwrap_or(usize::MAX);
        self.change(
            |iotlb| iotlb.invalidate_mapping(GuestAddress(message.iova), length),
            |changes| changes.invalidations = changes.invalidations.wrapping_add(1),
        );
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Converts `VHOST_ACCESS_*`, which have the numbers of `Permissions`.
fn permissions_of(perm: u8) -> Option<Permissions> {
    Some(match perm {
        0 => Permissions::No,
        1 => Permissions::Read,
        2 => Permissions::Write,
        3 => Permissions::ReadWrite,
        _ => return None,
    })
}

fn perm_of(permissions: Permissions) -> u8 {
    match permissions {
        Permissions::No => 0,
        Permissions::Read => 1,
        Permissions::Write => 2,
        Permissions::ReadWrite => 3,
    }
}
