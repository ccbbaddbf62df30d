//! The messages as they lie on the wire.
//!
//! ```text
//!   offset  0          4        8       12                                            44
//!           │ request  │ flags  │ size  │ iova   │ size   │ uaddr  │perm│type│ 0 … 0   │
//!           └── header ─────────────────┘ 8        8        8        1    1    6
//! ```
//!
//! Numbers are in the host's byte order. The `vhost` crate has the payload as `vhost_iotlb_msg`, but no way to bytes and back that
//! leaves padding alone, and keeps its header to itself: this module goes by the layout, and a test compares it with theirs.

use vhost::vhost_user::message::VhostUserHeaderFlag;

/// The length of a header.
pub const HEADER_SIZE: usize = 12;
/// The length of an IOTLB message's payload: `struct vhost_iotlb_msg` with its padding.
pub const IOTLB_SIZE: usize = 32;
/// The longest payload that is read; a header that says more ends the connection. That of the `vhost` crate.
pub const MAX_PAYLOAD: usize = 0x1000;

/// The version of the protocol, in the flags' lowest two bits.
const VERSION: u32 = 1;

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum WireError {
    /// There are not as many bytes as it needs, or more.
    #[error("{found} bytes, where there should be {expected}")]
    Length {
        /// How many there should be.
        expected: usize,
        /// How many there are.
        found: usize,
    },
}

/// What each message begins with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// What is asked for.
    pub request: u32,
    /// Version, reply, need reply.
    pub flags: u32,
    /// The length of the payload behind.
    pub size: u32,
}

impl Header {
    /// The header of a request.
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

    /// The header of the reply to a request, which is a number of 8 bytes.
    pub fn reply_to(request: u32) -> Self {
        Header {
            request,
            flags: VERSION | VhostUserHeaderFlag::REPLY.bits(),
            size: 8,
        }
    }

    /// Whether the sender waits for a reply.
    pub fn needs_reply(&self) -> bool {
        self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0
    }

    /// Whether this is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & VhostUserHeaderFlag::REPLY.bits() != 0
    }

    /// Whether version and reserved bits are what this version of the protocol has.
    pub fn is_of_this_version(&self) -> bool {
        self.flags & VhostUserHeaderFlag::VERSION.bits() == VERSION
            && self.flags & VhostUserHeaderFlag::RESERVED_BITS.bits() == 0
    }

    /// The header as bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let fields = [self.request, self.flags, self.size];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    /// The header that these bytes are.
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
/// Permissions and type are as they came: what is not known is for the receiver to refuse.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IotlbMessage {
    /// The first I/O virtual address.
    pub iova: u64,
    /// How many bytes.
    pub size: u64,
    /// What the first is mapped to, in the front end's address space.
    pub uaddr: u64,
    /// `VHOST_ACCESS_*`.
    pub perm: u8,
    /// `VHOST_IOTLB_*`.
    pub kind: u8,
}

impl IotlbMessage {
    /// The payload as bytes, with zeroes for padding.
    pub fn to_bytes(&self) -> [u8; IOTLB_SIZE] {
        let mut bytes = [0; IOTLB_SIZE];
        let fields = [
            self.iova,
            self.size,
            self.uaddr,
            u64::from_ne_bytes(self.tail()),
        ];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    fn tail(&self) -> [u8; 8] {
        [self.perm, self.kind, 0, 0, 0, 0, 0, 0]
    }

    /// The payload that these bytes are. What the padding holds does not matter: C leaves it as it was.
    ///
    /// # Errors
    ///
    /// If they are not [`IOTLB_SIZE`] bytes.
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
