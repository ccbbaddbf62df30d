//! [`FrontEnd`]: the other end of the sockets, with the messages that tests need.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vm_memory::{GuestAddress, Permissions};
use vm_memory_vhost::{
    Header, IotlbMessage, MessageError, VHOST_USER_BACKEND_IOTLB_MSG, VHOST_USER_IOTLB_MSG,
};

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
    /// The back end sent bytes that are not a message.
    #[error("the back end sent an invalid message")]
    Message(#[from] MessageError),
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
        user_address: u64,
        permissions: Permissions,
    ) -> Result<bool, FrontEndError> {
        let iova = GuestAddress(iova);
        let update = IotlbMessage::Update {
            iova,
            size,
            user_address,
            permissions,
        };
        self.send(&update.encode())
    }

    /// Invalidates mappings, and returns whether the back end accepted that. If it accepted, the
    /// mappings are out of use.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end does not acknowledge, or sends something else.
    pub fn invalidate(&self, iova: u64, size: u64) -> Result<bool, FrontEndError> {
        let iova = GuestAddress(iova);
        self.send(&IotlbMessage::Invalidate { iova, size }.encode())
    }

    /// Sends an IOTLB message with any payload, and returns whether the back end accepted it.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end does not acknowledge, or sends something else.
    pub fn send(&self, payload: &[u8]) -> Result<bool, FrontEndError> {
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        self.send_with(&Header::request(VHOST_USER_IOTLB_MSG, size), payload)
    }

    /// Sends a header that needs a reply and a payload, which need not match, and returns whether
    /// the back end accepted them.
    ///
    /// # Errors
    ///
    /// Returns [`FrontEndError`] if the back end does not acknowledge, or sends something else.
    pub fn send_with(&self, header: &Header, payload: &[u8]) -> Result<bool, FrontEndError> {
        let mut main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        let header = header.with_need_reply();
        main.write_all(&[&header.encode()[..], payload].concat())?;
        let mut bytes = [0; Header::SIZE];
        main.read_exact(&mut bytes)?;
        let reply = Header::decode(&bytes)?;
        if reply != Header::reply(header.request, 8) {
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
        let mut bytes = [0; Header::SIZE];
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
        let header = Header::decode(&bytes)?;
        let mut payload = [0; IotlbMessage::SIZE];
        if header != IotlbMessage::header(VHOST_USER_BACKEND_IOTLB_MSG) {
            return Err(FrontEndError::Unexpected(header));
        }
        channel.read_exact(&mut payload)?;
        Ok(Some(IotlbMessage::decode(&payload)?))
    }
}
