//! The wire format: headers, and `VHOST_USER_IOTLB_MSG`.
//!
//! ```text
//!   offset  0          4        8       12                                            44
//!           │ request  │ flags  │ size  │ iova   │ size   │ uaddr  │perm│type│ 0 … 0   │
//!           └── header ─────────────────┘ 8        8        8        1    1    6
//! ```
//!
//! Numbers are in the host's byte order. The payload is the kernel's `struct vhost_iotlb_msg` with
//! its padding.

use vm_memory::{GuestAddress, Permissions};

/// The request `VHOST_USER_IOTLB_MSG`, which front ends send.
pub const VHOST_USER_IOTLB_MSG: u32 = 22;
/// The request `VHOST_USER_BACKEND_IOTLB_MSG`, which back ends send on the back-end channel.
pub const VHOST_USER_BACKEND_IOTLB_MSG: u32 = 1;

/// The version of the protocol, in the lowest two bits of the flags.
const VERSION: u32 = 0b01;
/// The bit of the flags in a reply.
const REPLY: u32 = 0b0100;
/// The bit of the flags in a request that needs a reply.
const NEED_REPLY: u32 = 0b1000;

/// The length of an IOTLB message in a header.
const PAYLOAD: u32 = 32;

const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
const ACCESS_FAIL: u8 = 4;

/// The reason why bytes are not a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// The version is not 1, or the flags have unknown bits.
    #[error("unsupported flags {flags:#x}: the version must be 1, and bits 4 to 31 must be 0")]
    Flags {
        /// The flags of the header.
        flags: u32,
    },
    /// The header announces a payload that is too long.
    #[error("a payload of {size} bytes is longer than {max}", max = Header::MAX_PAYLOAD)]
    TooLong {
        /// The announced length.
        size: u32,
    },
    /// The payload has the wrong length.
    #[error("a payload of {found} bytes; an IOTLB message has {expected}", expected = IotlbMessage::SIZE)]
    Length {
        /// The length of the payload.
        found: usize,
    },
    /// The type of the IOTLB message is unknown.
    #[error("unknown type {0} of an IOTLB message")]
    Type(u8),
    /// The permissions are not one of `VHOST_ACCESS_*`.
    #[error("unknown permissions {0:#x}; the highest value is 3")]
    Permissions(u8),
    /// The range is empty.
    #[error("empty range at IOVA {iova:#x}", iova = iova.0)]
    Empty {
        /// The address of the range.
        iova: GuestAddress,
    },
    /// The range, or its target, passes the end of the address space.
    #[error("{size:#x} bytes at {addr:#x} pass the end of the address space")]
    PastTheEnd {
        /// The first I/O virtual address, or the first user address.
        addr: u64,
        /// The number of bytes.
        size: u64,
    },
}

/// The header of a vhost-user message.
///
/// The crates that own the socket, such as `vhost`, read and write headers. Use this type for a
/// channel of your own, such as the back-end channel.
///
/// # Examples
///
/// ```
/// use vm_memory_vhost::{Header, VHOST_USER_IOTLB_MSG};
///
/// let header = Header::request(VHOST_USER_IOTLB_MSG, 32).with_need_reply();
/// assert_eq!(Header::decode(&header.encode()), Ok(header));
/// assert!(header.need_reply);
///
/// // Version 3 does not exist.
/// assert!(Header::decode(&[0xff; Header::SIZE]).is_err());
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct Header {
    /// The number of the request.
    pub request: u32,
    /// The length of the payload, at most [`MAX_PAYLOAD`](Self::MAX_PAYLOAD).
    pub size: u32,
    /// Whether this is a reply.
    pub is_reply: bool,
    /// Whether the sender waits for a reply (protocol feature `REPLY_ACK`).
    pub need_reply: bool,
}

impl Header {
    /// The length of a header in bytes.
    pub const SIZE: usize = 12;
    /// The maximum length of a payload in bytes. No message of the protocol is longer.
    pub const MAX_PAYLOAD: u32 = 0x1000;

    /// Creates the header of a request that needs no reply.
    #[must_use]
    pub fn request(request: u32, size: u32) -> Self {
        Self {
            request,
            size,
            is_reply: false,
            need_reply: false,
        }
    }

    /// Requests a reply.
    #[must_use]
    pub fn with_need_reply(self) -> Self {
        Self {
            need_reply: true,
            ..self
        }
    }

    /// Creates the header of the reply to a request.
    #[must_use]
    pub fn reply(request: u32, size: u32) -> Self {
        Self {
            is_reply: true,
            ..Self::request(request, size)
        }
    }

    /// Converts the header into bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let reply = if self.is_reply { REPLY } else { 0 };
        let need_reply = if self.need_reply { NEED_REPLY } else { 0 };
        let fields = [self.request, VERSION | reply | need_reply, self.size];
        let mut bytes = [0; Self::SIZE];
        for (to, field) in bytes.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    /// Converts bytes into a header.
    ///
    /// # Errors
    ///
    /// Returns [`MessageError::Flags`] if the version is not 1 or a reserved bit is set, and
    /// [`MessageError::TooLong`] if the payload is longer than [`MAX_PAYLOAD`](Self::MAX_PAYLOAD).
    /// The rest of the stream is unreadable then: end the connection.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, MessageError> {
        let mut fields = bytes.chunks_exact(4).map(|field| {
            let mut number = [0; 4];
            number.copy_from_slice(field);
            u32::from_ne_bytes(number)
        });
        let mut next = || fields.next().unwrap_or_default();
        let (request, flags, size) = (next(), next(), next());
        if flags & !(REPLY | NEED_REPLY) != VERSION {
            return Err(MessageError::Flags { flags });
        }
        if size > Self::MAX_PAYLOAD {
            return Err(MessageError::TooLong { size });
        }
        Ok(Self {
            request,
            size,
            is_reply: flags & REPLY != 0,
            need_reply: flags & NEED_REPLY != 0,
        })
    }
}

/// An IOTLB message: the payload of `VHOST_USER_IOTLB_MSG` and `VHOST_USER_BACKEND_IOTLB_MSG`.
///
/// Front ends send `Update` and `Invalidate`. Back ends send `Miss` and `AccessFail` on the
/// back-end channel.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, Permissions};
/// use vm_memory_vhost::{IotlbMessage, MessageError};
///
/// let (iova, size, permissions) = (GuestAddress(0x8000), 0x1000, Permissions::ReadWrite);
/// let update = IotlbMessage::Update { iova, size, user_address: 0x7f00_0000_0000, permissions };
/// let mut payload = update.encode();
/// assert_eq!(IotlbMessage::decode(&payload), Ok(update));
///
/// payload[24] = 4; // permissions that do not exist
/// assert_eq!(IotlbMessage::decode(&payload), Err(MessageError::Permissions(4)));
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
#[doc(alias = "vhost_iotlb_msg")]
pub enum IotlbMessage {
    /// The back end has no mapping for an access (`VHOST_IOTLB_MISS`).
    Miss {
        /// The first address that is not mapped.
        iova: GuestAddress,
        /// The number of bytes that are not mapped. Many front ends ignore it.
        size: u64,
        /// The access.
        access: Permissions,
    },
    /// The front end sends a mapping (`VHOST_IOTLB_UPDATE`).
    Update {
        /// The first address.
        iova: GuestAddress,
        /// The number of bytes. It is not 0.
        size: u64,
        /// The target of the first address, in the address space of the front end.
        user_address: u64,
        /// The permissions of the mapping.
        permissions: Permissions,
    },
    /// The front end removes mappings (`VHOST_IOTLB_INVALIDATE`).
    Invalidate {
        /// The first address.
        iova: GuestAddress,
        /// The number of bytes. It is not 0. The range may pass 2^64; it ends there.
        size: u64,
    },
    /// A mapping of the range does not permit an access (`VHOST_IOTLB_ACCESS_FAIL`).
    AccessFail {
        /// The first address that does not permit the access.
        iova: GuestAddress,
        /// The number of bytes that do not permit the access.
        size: u64,
        /// The access.
        access: Permissions,
    },
}

impl IotlbMessage {
    /// The length of an IOTLB message in bytes, without its header.
    pub const SIZE: usize = 32;

    /// The length of an IOTLB message in bytes, with its header.
    pub const MESSAGE_SIZE: usize = Header::SIZE.saturating_add(Self::SIZE);

    /// Returns the name of the type, as the kernel defines it.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Miss { .. } => "VHOST_IOTLB_MISS",
            Self::Update { .. } => "VHOST_IOTLB_UPDATE",
            Self::Invalidate { .. } => "VHOST_IOTLB_INVALIDATE",
            Self::AccessFail { .. } => "VHOST_IOTLB_ACCESS_FAIL",
        }
    }

    /// Creates the header of an IOTLB message: [`VHOST_USER_IOTLB_MSG`] of a front end, or
    /// [`VHOST_USER_BACKEND_IOTLB_MSG`] of a back end.
    #[must_use]
    pub fn header(request: u32) -> Header {
        Header::request(request, PAYLOAD)
    }

    /// Converts the message into bytes, with its header.
    ///
    /// The header requests no reply. For another one, send [`header`](Self::header) and
    /// [`encode`](Self::encode).
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Permissions};
    /// use vm_memory_vhost::{Header, IotlbMessage, VHOST_USER_BACKEND_IOTLB_MSG};
    ///
    /// let (iova, size, access) = (GuestAddress(0x8000), 0x1000, Permissions::Write);
    /// let miss = IotlbMessage::Miss { iova, size, access };
    /// let bytes = miss.to_message(VHOST_USER_BACKEND_IOTLB_MSG);
    /// assert_eq!(bytes.len(), IotlbMessage::MESSAGE_SIZE);
    /// let (header, payload) = bytes.split_first_chunk().ok_or("too short")?;
    /// assert_eq!(
    ///     Header::decode(header)?,
    ///     IotlbMessage::header(VHOST_USER_BACKEND_IOTLB_MSG)
    /// );
    /// assert_eq!(IotlbMessage::decode(payload)?, miss);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn to_message(&self, request: u32) -> [u8; Self::MESSAGE_SIZE] {
        let header = Self::header(request).encode();
        let mut message = [0; Self::MESSAGE_SIZE];
        let bytes = header.into_iter().chain(self.encode());
        for (to, byte) in message.iter_mut().zip(bytes) {
            *to = byte;
        }
        message
    }

    /// Converts the message into bytes, with zeroes as padding.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let (iova, size, user_address, permissions, kind) = match *self {
            Self::Miss { iova, size, access } => (iova, size, 0, access, MISS),
            Self::Update {
                iova,
                size,
                user_address,
                permissions,
            } => (iova, size, user_address, permissions, UPDATE),
            Self::Invalidate { iova, size } => (iova, size, 0, Permissions::No, INVALIDATE),
            Self::AccessFail { iova, size, access } => (iova, size, 0, access, ACCESS_FAIL),
        };
        let tail = [perm_of(permissions), kind, 0, 0, 0, 0, 0, 0];
        let fields = [iova.0, size, user_address, u64::from_ne_bytes(tail)];
        let mut bytes = [0; Self::SIZE];
        for (to, field) in bytes.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    /// Converts bytes into a message. Ignores the padding, which C leaves uninitialised, and the
    /// fields that the type of the message does not use.
    ///
    /// # Errors
    ///
    /// Returns [`MessageError`] if there are not [`SIZE`](Self::SIZE) bytes, or the type or the
    /// permissions are unknown. An empty range of an `Update` or `Invalidate` is also an error, and
    /// so is a range of an `Update` that passes 2^64.
    pub fn decode(payload: &[u8]) -> Result<Self, MessageError> {
        if payload.len() != Self::SIZE {
            let found = payload.len();
            return Err(MessageError::Length { found });
        }
        let mut fields = payload.chunks_exact(8).map(|field| {
            let mut number = [0; 8];
            number.copy_from_slice(field);
            number
        });
        let mut next = || fields.next().unwrap_or_default();
        let iova = GuestAddress(u64::from_ne_bytes(next()));
        let size = u64::from_ne_bytes(next());
        let user_address = u64::from_ne_bytes(next());
        let [perm, kind, ..] = next();
        match kind {
            MISS => Ok(Self::Miss {
                iova,
                size,
                access: permissions_of(perm)?,
            }),
            UPDATE => {
                check_range(iova, iova.0, size)?;
                check_range(iova, user_address, size)?;
                Ok(Self::Update {
                    iova,
                    size,
                    user_address,
                    permissions: permissions_of(perm)?,
                })
            }
            INVALIDATE if size == 0 => Err(MessageError::Empty { iova }),
            INVALIDATE => Ok(Self::Invalidate { iova, size }),
            ACCESS_FAIL => Ok(Self::AccessFail {
                iova,
                size,
                access: permissions_of(perm)?,
            }),
            other => Err(MessageError::Type(other)),
        }
    }
}

/// Checks that `size` bytes at `addr` are a range of the message for `iova`.
fn check_range(iova: GuestAddress, addr: u64, size: u64) -> Result<(), MessageError> {
    let more = size.checked_sub(1).ok_or(MessageError::Empty { iova })?;
    match addr.checked_add(more) {
        Some(_) => Ok(()),
        None => Err(MessageError::PastTheEnd { addr, size }),
    }
}

/// Converts `VHOST_ACCESS_*`.
fn permissions_of(perm: u8) -> Result<Permissions, MessageError> {
    Permissions::from_rw_bits(perm.into()).ok_or(MessageError::Permissions(perm))
}

/// Converts permissions into `VHOST_ACCESS_*`.
fn perm_of(permissions: Permissions) -> u8 {
    match permissions {
        Permissions::No => 0,
        Permissions::Read => 1,
        Permissions::Write => 2,
        Permissions::ReadWrite => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes of an IOTLB message with any values.
    fn payload(iova: u64, size: u64, user: u64, perm: u8, kind: u8) -> Vec<u8> {
        let numbers = [iova, size, user].map(u64::to_ne_bytes).concat();
        [&numbers[..], &[perm, kind], &[0xff; 6]].concat()
    }

    #[test]
    fn to_message_is_header_and_payload() {
        let (iova, size) = (GuestAddress(7), 8);
        let message = IotlbMessage::Invalidate { iova, size };
        let bytes = message.to_message(VHOST_USER_IOTLB_MSG);
        let header = Header::request(VHOST_USER_IOTLB_MSG, 32);
        assert_eq!(bytes.len(), 44);
        assert_eq!(bytes[..12], header.encode());
        assert_eq!(bytes[12..], message.encode());
        let length = IotlbMessage::header(VHOST_USER_IOTLB_MSG).size;
        assert_eq!(usize::try_from(length), Ok(IotlbMessage::SIZE));
    }

    #[test]
    fn decode_of_each_type_returns_its_fields() {
        let (iova, size, access) = (GuestAddress(7), 8, Permissions::Write);
        let messages = [
            (1, IotlbMessage::Miss { iova, size, access }),
            (3, IotlbMessage::Invalidate { iova, size }),
            (4, IotlbMessage::AccessFail { iova, size, access }),
        ];
        for (kind, message) in messages {
            assert_eq!(
                IotlbMessage::decode(&payload(7, 8, 9, 2, kind)),
                Ok(message)
            );
        }
        let update = IotlbMessage::Update {
            iova,
            size,
            user_address: 9,
            permissions: access,
        };
        assert_eq!(IotlbMessage::decode(&payload(7, 8, 9, 2, 2)), Ok(update));
        // The padding is zero, and the rest is as above.
        assert_eq!(update.encode()[..26], payload(7, 8, 9, 2, 2)[..26]);
        assert_eq!(update.encode()[26..], [0; 6]);
    }

    #[test]
    fn decode_of_hostile_payload_returns_error() {
        use MessageError::*;
        let top = u64::MAX;
        let iova = GuestAddress(7);
        let cases = [
            (payload(7, 8, 9, 4, 1), Permissions(4)),
            (payload(7, 8, 9, 0xff, 2), Permissions(0xff)),
            (payload(7, 0, 9, 3, 2), Empty { iova }),
            (payload(7, 0, 9, 3, 3), Empty { iova }),
            (payload(top, 2, 9, 3, 2), PastTheEnd { addr: top, size: 2 }),
            (payload(7, 2, top, 3, 2), PastTheEnd { addr: top, size: 2 }),
            (payload(7, top, 2, 3, 2), PastTheEnd { addr: 7, size: top }),
            (payload(7, 8, 9, 3, 0), Type(0)),
            (payload(7, 8, 9, 3, 5), Type(5)),
            (payload(7, 8, 9, 3, 0xff), Type(0xff)),
            (payload(7, 8, 9, 3, 2)[1..].to_vec(), Length { found: 31 }),
            (vec![0; 33], Length { found: 33 }),
            (vec![], Length { found: 0 }),
        ];
        for (payload, error) in cases {
            assert_eq!(IotlbMessage::decode(&payload), Err(error));
        }
        // All of the address space, and a range that ends with it.
        let all = payload(1, top, 1, 3, 2);
        assert!(
            matches!(IotlbMessage::decode(&all), Ok(IotlbMessage::Update { size, .. }) if size == top)
        );
        let past = payload(top, top, 0, 0, 3);
        assert!(matches!(
            IotlbMessage::decode(&past),
            Ok(IotlbMessage::Invalidate { .. })
        ));
    }

    #[test]
    fn decode_of_header_with_unknown_bits_returns_error() {
        let header = Header::request(22, 32).with_need_reply();
        let bytes = |flags: u32, size: u32| {
            let mut bytes = [0; Header::SIZE];
            bytes[..4].copy_from_slice(&22u32.to_ne_bytes());
            bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
            bytes[8..].copy_from_slice(&size.to_ne_bytes());
            bytes
        };
        assert_eq!(header.encode(), bytes(0b1001, 32));
        assert_eq!(Header::reply(22, 8).encode(), bytes(0b0101, 8));
        for flags in [0, 0b10, 0b11, 0b1_0001, 0x8000_0001, u32::MAX] {
            let error = MessageError::Flags { flags };
            assert_eq!(Header::decode(&bytes(flags, 32)), Err(error));
        }
        for size in [0x1001, u32::MAX] {
            let error = MessageError::TooLong { size };
            assert_eq!(Header::decode(&bytes(1, size)), Err(error));
        }
        assert!(Header::decode(&bytes(1, 0x1000)).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            // Miri cannot resolve the path of the file.
            failure_persistence: None,
            ..ProptestConfig::with_cases(if cfg!(miri) { 32 } else { 4096 })
        })]

        /// A payload that is accepted has the same meaning after a round trip.
        #[test]
        fn decode_of_random_payload_is_inverse_of_encode(
            iova in any::<u64>(),
            size in prop_oneof![0u64..4, any::<u64>()],
            user in any::<u64>(),
            perm in 0u8..6,
            kind in 0u8..7,
        ) {
            if let Ok(message) = IotlbMessage::decode(&payload(iova, size, user, perm, kind)) {
                let encoded = message.encode();
                prop_assert_eq!(&encoded[..16], &payload(iova, size, user, perm, kind)[..16]);
                prop_assert_eq!(encoded[25], kind);
                prop_assert_eq!(IotlbMessage::decode(&encoded), Ok(message));
            }
        }

        #[test]
        fn decode_of_random_bytes_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = IotlbMessage::decode(&bytes);
            if let Some(header) = bytes.first_chunk() {
                if let Ok(decoded) = Header::decode(header) {
                    prop_assert_eq!(&decoded.encode(), header);
                }
            }
        }
    }
}
