//! [`BackEnd`]: receives the messages of the front end.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vm_memory::iommu::{AskingIommu, ReadersRemain, SharedIotlb};
use vm_memory_vhost::{
    ApplyError, BackendChannel, Header, IotlbMessage, MessageError, RegionTable,
    VHOST_USER_IOTLB_MSG,
};

/// The timeout of a write to a channel: a front end that does not read must not block a device
/// forever.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// The time that accesses have to end before an invalidation is refused. Longer than any access.
const INVALIDATION_TIMEOUT: Duration = Duration::from_secs(15);

/// The IOMMU of the device.
pub type VhostIommu = AskingIommu<BackendChannel<UnixStream>>;

/// The reason why a message of the front end was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request is unknown.
    #[error("unknown request {0}")]
    Request(u32),
    /// The payload is not a message.
    #[error("invalid payload")]
    Payload(#[from] MessageError),
    /// The message cannot be applied. It has no effect.
    #[error(transparent)]
    Message(#[from] ApplyError),
    /// The mapping was removed, but an access still uses it.
    #[error(transparent)]
    InUse(#[from] ReadersRemain),
}

/// The thread that receives updates and invalidations from the main channel.
///
/// It acknowledges an invalidation after the end of all accesses that were translated before.
#[derive(Debug)]
pub struct BackEnd {
    shared: Arc<Shared>,
    main: UnixStream,
    receiver: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

#[derive(Debug)]
struct Shared {
    iommu: VhostIommu,
    table: RegionTable,
}

impl BackEnd {
    /// Starts a back end on a main channel and a back-end channel.
    ///
    /// An access waits for missing mappings no longer than `timeout`.
    ///
    /// # Errors
    ///
    /// Returns an error if a socket cannot be configured, or the thread cannot be started.
    pub fn start(
        main: UnixStream,
        requests: UnixStream,
        table: RegionTable,
        timeout: Duration,
    ) -> io::Result<Self> {
        main.set_write_timeout(Some(WRITE_TIMEOUT))?;
        requests.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let source = BackendChannel::new(requests);
        let iommu = AskingIommu::new(SharedIotlb::new(), timeout, source);
        let shared = Arc::new(Shared { iommu, table });
        let channel = main.try_clone()?;
        let server = Arc::clone(&shared);
        let receiver = thread::Builder::new()
            .name("iotlb-receiver".into())
            .spawn(move || {
                let end = server.serve(&channel);
                // No message can invalidate a mapping now. No reply needs the end of its readers.
                let _ = server.iommu.close();
                // Fails if the front end has already ended the connection.
                let _ = channel.shutdown(Shutdown::Both);
                end
            })?;
        Ok(BackEnd {
            shared,
            main,
            receiver: Mutex::new(Some(receiver)),
        })
    }

    /// Returns the IOMMU of the device.
    pub fn iommu(&self) -> &VhostIommu {
        &self.shared.iommu
    }

    /// Handles one message, as the receiver thread does.
    ///
    /// # Errors
    ///
    /// Returns [`Refusal`] if the message is refused.
    pub fn handle(&self, request: u32, payload: &[u8]) -> Result<(), Refusal> {
        self.shared.handle(request, payload)
    }

    /// Ends the connection, and returns the result of the receiver thread. Returns `None` if the
    /// result was returned before.
    pub fn disconnect(&self) -> Option<thread::Result<io::Result<()>>> {
        // Fails if the receiver thread has already ended the connection.
        let _ = self.main.shutdown(Shutdown::Both);
        self.wait_for_end()
    }

    /// Waits until the receiver thread ends by itself, and returns its result. Returns `None` if
    /// the result was returned before.
    pub fn wait_for_end(&self) -> Option<thread::Result<io::Result<()>>> {
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        receiver.take().map(JoinHandle::join)
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // A caller that needs the result calls `disconnect` first.
        let _ = self.disconnect();
    }
}

impl Shared {
    /// Handles messages until the front end ends the connection, or sends a message that makes the
    /// rest of the stream unreadable.
    fn serve(&self, mut channel: &UnixStream) -> io::Result<()> {
        loop {
            let mut bytes = [0; Header::SIZE];
            let Some((first, rest)) = bytes.split_first_mut() else {
                return Ok(());
            };
            // The connection may end between two messages, but not within one.
            if channel.read(std::slice::from_mut(first))? == 0 {
                return Ok(());
            }
            channel.read_exact(rest)?;
            let invalid = |what| io::Error::new(ErrorKind::InvalidData, what);
            let header = Header::decode(&bytes).map_err(|error| invalid(error.to_string()))?;
            if header.is_reply {
                return Err(invalid("the front end sent a reply".into()));
            }
            let mut payload = vec![0; usize::try_from(header.size).unwrap_or(usize::MAX)];
            channel.read_exact(&mut payload)?;
            let result = self.handle(header.request, &payload);
            if header.need_reply {
                let reply = Header::reply(header.request, 8).encode();
                let ack = u64::from(result.is_err()).to_ne_bytes();
                channel.write_all(&[&reply[..], &ack].concat())?;
            }
        }
    }

    fn handle(&self, request: u32, payload: &[u8]) -> Result<(), Refusal> {
        if request != VHOST_USER_IOTLB_MSG {
            return Err(Refusal::Request(request));
        }
        let message = IotlbMessage::decode(payload)?;
        let change = message.apply(&self.table, self.iommu.iotlb())?;
        if let IotlbMessage::Invalidate { .. } = message {
            let now = Instant::now();
            let deadline = now.checked_add(INVALIDATION_TIMEOUT).unwrap_or(now);
            change.wait(deadline)?;
        }
        Ok(())
    }
}
