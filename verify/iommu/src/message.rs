//! The wire format of the messages.
//!
//! ```text
//!   offset  0          4        8       12                                            44
//!           │ request  │ flags  │ size  │ iova   │ size   │ uaddr  │perm│type│ 0 … 0   │
//!           └── header ─────────────────┘ 8        8        8        1    1    6
//! ```
//!
//! Numbers are in the host's byte order. The `vhost` crate has no conversion of `vhost_iotlb_msg`
//! that ignores padding, and its header is private. So this module defines both, and
//! `tests/wire.rs` compares them with that crate.

use vhost::vhost_user::message::VhostUserHeaderFlag;

/// The length of a header.
pub const HEADER_SIZE: usize = 12;
/// The length of an IOTLB message's payload: `struct vhost_iotlb_msg` with its padding.
pub const IOTLB_SIZE: usize = 32;
/// The longest payload, as in the `vhost` crate. A header with a longer one ends the connection.
pub const MAX_PAYLOAD: usize = 0x1000;

/// The version of the protocol, in the lowest two bits of the flags.
const VERSION: u32 = 1;

/// The error of bytes that are not a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum WireError {
    /// The payload has the wrong length.
    #[error("a payload of {found} bytes, expected {expected}")]
    Length {
        /// The expected number of bytes.
        expected: usize,
        /// The actual number of bytes.
        found: usize,
    },
}

/// The header of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// The number of the request.
    pub request: u32,
    /// The version, and the flags for replies.
    pub flags: u32,
    /// The length of the payload that follows.
    pub size: u32,
}

impl Header {
    /// Creates the header of a request.
    pub fn request(request: u32, size: u32, need_reply: bool) -> Self {
        let flag = if need_reply {
            VhostUserHeaderFlag::NEED_REPLY.bits()
        } else {
            0
        };
        Header {
            request,
            flags: VERSION | flag,
            size,
        }
    }

    /// Creates the header of the reply to a request. Its payload is a number of 8 bytes.
    pub fn reply_to(request: u32) -> Self {
        Header {
            request,
            flags: VERSION | VhostUserHeaderFlag::REPLY.bits(),
            size: 8,
        }
    }

    /// Returns whether the sender waits for a reply.
    pub fn needs_reply(&self) -> bool {
        self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0
    }

    /// Returns whether this is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & VhostUserHeaderFlag::REPLY.bits() != 0
    }

    /// Returns whether the version is supported and the reserved bits are 0.
    pub fn is_of_this_version(&self) -> bool {
        self.flags & VhostUserHeaderFlag::VERSION.bits() == VERSION
            && self.flags & VhostUserHeaderFlag::RESERVED_BITS.bits() == 0
    }

    /// Converts the header into bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let fields = [self.request, self.flags, self.size];
        for (to, field) in bytes.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    /// Converts bytes into a header.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut fields = bytes.chunks_exact(4).map(|field| {
            let mut number = [0; 4];
            number.copy_from_slice(field);
            u32::from_ne_bytes(number)
        });
        let mut next = || fields.next().unwrap_or_default();
        Header {
            request: next(),
            flags: next(),
            size: next(),
        }
    }
}

/// The payload of an IOTLB message: `struct vhost_iotlb_msg`.
///
/// Permissions and type may be unknown ones, which the receiver refuses.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IotlbMessage {
    /// The first I/O virtual address.
    pub iova: u64,
    /// The number of bytes.
    pub size: u64,
    /// The target of the first address, in the front end's address space.
    pub uaddr: u64,
    /// The permissions: `VHOST_ACCESS_*`.
    pub perm: u8,
    /// The type: `VHOST_IOTLB_*`.
    pub kind: u8,
}

impl IotlbMessage {
    /// Converts the payload into bytes, with zeroes as padding.
    pub fn to_bytes(&self) -> [u8; IOTLB_SIZE] {
        let mut bytes = [0; IOTLB_SIZE];
        let fields = [
            self.iova,
            self.size,
            self.uaddr,
            u64::from_ne_bytes(self.tail()),
        ];
        for (to, field) in bytes.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    fn tail(&self) -> [u8; 8] {
        [self.perm, self.kind, 0, 0, 0, 0, 0, 0]
    }

    /// Converts bytes into a payload. Ignores the padding, which C leaves uninitialised.
    ///
    /// # Errors
    ///
    /// Returns [`WireError::Length`] if there are not [`IOTLB_SIZE`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() != IOTLB_SIZE {
            return Err(WireError::Length {
                expected: IOTLB_SIZE,
                found: bytes.len(),
            });
        }
        let mut fields = bytes.chunks_exact(8).map(|field| {
            let mut number = [0; 8];
            number.copy_from_slice(field);
            number
        });
        let mut next = || fields.next().unwrap_or_default();
        let (iova, size, uaddr) = (next(), next(), next());
        let [perm, kind, ..] = next();
        Ok(IotlbMessage {
            iova: u64::from_ne_bytes(iova),
            size: u64::from_ne_bytes(size),
            uaddr: u64::from_ne_bytes(uaddr),
            perm,
            kind,
        })
    }
}
