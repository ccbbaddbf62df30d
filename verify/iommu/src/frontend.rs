//! [`FrontEnd`]: the other end of the sockets, with the messages that tests need.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vhost::{VhostAccess, VhostIotlbType};

use crate::message::{Header, IotlbMessage, WireError, HEADER_SIZE, IOTLB_SIZE};

/// The timeout of an acknowledgement. An invalidation waits for accesses in flight, and these wait
/// until their deadline.
const ACK_TIMEOUT: Duration = Duration::from_secs(20);

/// The error of an exchange with the back end.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The back end sent an unexpected message.
    #[error("the back end sent an unexpected message: {0:?}")]
    Unexpected(Header),
    /// The payload of a message has the wrong length.
    #[error("the back end sent an invalid payload")]
    Payload(#[from] WireError),
}

/// A front end that sends any message, and returns the messages of the back end.
#[derive(Debug)]
pub struct FrontEnd {
    /// Locked from a request to its acknowledgement, since these are matched by their order.
    main: Mutex<UnixStream>,
    requests: UnixStream,
}

impl FrontEnd {
    /// Creates a front end, and the back end's ends of the main channel and the back-end channel.
    ///
    /// # Errors
    ///
    /// Returns an error if the sockets cannot be created or configured.
    pub fn pair() -> io::Result<(FrontEnd, UnixStream, UnixStream)> {
        let (main, their_main) = UnixStream::pair()?;
        let (requests, their_requests) = UnixStream::pair()?;
        main.set_read_timeout(Some(ACK_TIMEOUT))?;
        let front_end = FrontEnd {
            main: Mutex::new(main),
            requests,
        };
        Ok((front_end, their_main, their_requests))
    }

    /// Maps I/O virtual addresses, and returns whether the back end accepted the mapping.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end does not acknowledge, or sends something else.
    pub fn update(
        &self,
        iova: u64,
        size: u64,
        uaddr: u64,
        access: VhostAccess,
    ) -> Result<bool, FrontEndError> {
        self.send(IotlbMessage {
            iova,
            size,
            uaddr,
            perm: perm_of(access),
            kind: kind_of(VhostIotlbType::Update),
        })
    }

    /// Invalidates mappings, and returns whether the back end accepted that. If it accepted, the
    /// mappings are out of use.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end does not acknowledge, or sends something else.
    pub fn invalidate(&self, iova: u64, size: u64) -> Result<bool, FrontEndError> {
        self.send(IotlbMessage {
            iova,
            size,
            uaddr: 0,
            perm: 0,
            kind: kind_of(VhostIotlbType::Invalidate),
        })
    }

    /// Sends a message of any type, and returns whether the back end accepted it.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end does not acknowledge, or sends something else.
    pub fn send(&self, message: IotlbMessage) -> Result<bool, FrontEndError> {
        let size = u32::try_from(IOTLB_SIZE).unwrap_or(u32::MAX);
        let header = Header::request(FrontendReq::IOTLB_MSG.into(), size, true);
        self.send_with(&header, &message.to_bytes())
    }

    /// Sends a header and a payload, which need not match, and returns whether the back end
    /// accepted them.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end does not acknowledge, or sends something else.
    pub fn send_with(&self, header: &Header, payload: &[u8]) -> Result<bool, FrontEndError> {
        let mut main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        main.write_all(&[&header.to_bytes()[..], payload].concat())?;
        let mut bytes = [0; HEADER_SIZE];
        main.read_exact(&mut bytes)?;
        let reply = Header::from_bytes(&bytes);
        if reply != Header::reply_to(header.request) {
            return Err(FrontEndError::Unexpected(reply));
        }
        let mut ack = [0; 8];
        main.read_exact(&mut ack)?;
        Ok(u64::from_ne_bytes(ack) == 0)
    }

    /// Sends bytes, and does not wait for a reply.
    ///
    /// # Errors
    ///
    /// Returns an error if the socket fails.
    pub fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let mut main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        main.write_all(bytes)
    }

    /// Ends the connection.
    ///
    /// # Errors
    ///
    /// Returns an error if the back end has already ended it.
    pub fn hang_up(&self) -> io::Result<()> {
        let main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        main.shutdown(std::net::Shutdown::Both)
    }

    /// Returns the next message on the back-end channel.
    ///
    /// Returns `None` if the back end is gone, or sends nothing within `timeout`.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end sends a message that is not an IOTLB message, or
    /// the socket fails.
    pub fn next_request(
        &self,
        timeout: Option<Duration>,
    ) -> Result<Option<IotlbMessage>, FrontEndError> {
        self.requests.set_read_timeout(timeout)?;
        let mut channel = &self.requests;
        let mut bytes = [0; HEADER_SIZE];
        match channel.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::WouldBlock
                ) =>
            {
                return Ok(None)
            }
            Err(error) => return Err(error.into()),
        }
        let header = Header::from_bytes(&bytes);
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        if header.request != u32::from(BackendReq::IOTLB_MSG)
            || size != IOTLB_SIZE
            || header.is_reply()
        {
            return Err(FrontEndError::Unexpected(header));
        }
        let mut payload = [0; IOTLB_SIZE];
        channel.read_exact(&mut payload)?;
        Ok(Some(IotlbMessage::from_bytes(&payload)?))
    }
}

#[expect(
    clippy::as_conversions,
    reason = "the number of a `repr(u8)` enumeration"
)]
fn perm_of(access: VhostAccess) -> u8 {
    access as u8
}

#[expect(
    clippy::as_conversions,
    reason = "the number of a `repr(u8)` enumeration"
)]
fn kind_of(kind: VhostIotlbType) -> u8 {
    kind as u8
}
