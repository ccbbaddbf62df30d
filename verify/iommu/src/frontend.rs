//! [`FrontEnd`]: the other side of the sockets, as much of it as a test needs.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vhost::{VhostAccess, VhostIotlbType};

use crate::message::{Header, IotlbMessage, WireError, HEADER_SIZE, IOTLB_SIZE};

/// How long an acknowledgement may take: an invalidation waits for accesses that run, and those for their deadline.
const ACK_TIMEOUT: Duration = Duration::from_secs(20);

/// What the front end meets.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// The socket.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The back end sent something else than what was to come.
    #[error("the back end sent {0:?}")]
    Unexpected(Header),
    /// The payload of a message has another length.
    #[error("the back end sent {0}")]
    Payload(#[from] WireError),
}

/// A front end: sends what it is told, and hands out what the back end sends.
#[derive(Debug)]
pub struct FrontEnd {
    /// Locked from a request to its acknowledgement: these carry no number.
    main: Mutex<UnixStream>,
    requests: UnixStream,
}

impl FrontEnd {
    /// Makes a front end, and the back end's sides of the main and of the back-end channel.
    ///
    /// # Errors
    ///
    /// If the sockets cannot be made.
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

    /// Maps I/O virtual addresses to the front end's, and returns whether the back end took it.
    ///
    /// # Errors
    ///
    /// If the back end does not answer, or with something else.
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

    /// Takes a mapping back, and returns whether the back end took that. Then it uses the mapping no more.
    ///
    /// # Errors
    ///
    /// If the back end does not answer, or with something else.
    pub fn invalidate(&self, iova: u64, size: u64) -> Result<bool, FrontEndError> {
        self.send(IotlbMessage {
            iova,
            size,
            uaddr: 0,
            perm: 0,
            kind: kind_of(VhostIotlbType::Invalidate),
        })
    }

    /// Sends a message of any kind, and returns whether the back end took it.
    ///
    /// # Errors
    ///
    /// If the back end does not answer, or with something else.
    pub fn send(&self, message: IotlbMessage) -> Result<bool, FrontEndError> {
        let size = u32::try_from(IOTLB_SIZE).unwrap_or(u32::MAX);
        let header = Header::request(FrontendReq::IOTLB_MSG.into(), size, true);
        self.send_with(&header, &message.to_bytes())
    }

    /// Sends a header and a payload that need not fit it, and returns whether the back end took it.
    ///
    /// # Errors
    ///
    /// If the back end does not answer, or with something else.
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

    /// Sends bytes, and waits for nothing.
    ///
    /// # Errors
    ///
    /// If the socket does not take them.
    pub fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let mut main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        main.write_all(bytes)
    }

    /// Ends the connection.
    ///
    /// # Errors
    ///
    /// If it has been ended by the back end.
    pub fn hang_up(&self) -> io::Result<()> {
        let main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        main.shutdown(std::net::Shutdown::Both)
    }

    /// The next message on the back-end channel; `None` when the back end is gone, or sends nothing for as long as `patience`.
    ///
    /// # Errors
    ///
    /// If the back end sends something else than an IOTLB message, or the socket fails.
    pub fn next_request(
        &self,
        patience: Option<Duration>,
    ) -> Result<Option<IotlbMessage>, FrontEndError> {
        self.requests.set_read_timeout(patience)?;
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
