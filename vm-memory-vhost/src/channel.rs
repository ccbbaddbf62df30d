//! [`BackendChannel`]: sends the misses of a device to the front end.

use std::io::{self, ErrorKind, Write};
use std::sync::{Mutex, PoisonError};

use vm_memory::arithmetic::to_u64;
use vm_memory::iommu::{IovaRange, MappingSource};
use vm_memory::Permissions;

use crate::message::{IotlbMessage, VHOST_USER_BACKEND_IOTLB_MSG};

/// The back-end channel: the source of the mappings of an [`AskingIommu`].
///
/// It sends `Miss` and `AccessFail` messages to the front end, without `need_reply`. The writer is
/// the socket of `VHOST_USER_SET_BACKEND_REQ_FD`, or any other that sends bytes to the front end.
/// Set a write timeout for a socket: a front end that does not read must not block a device.
///
/// After a write that fails, the channel is [broken](Self::is_broken): it sends nothing more,
/// because a part of a message may have been sent. Each access that misses then fails. End the
/// connection, and call [`AskingIommu::close`](vm_memory::iommu::AskingIommu::close).
///
/// The protocol has no refusal. A front end may not reply to a `Miss` of an address that the guest
/// has not mapped: QEMU does not. The access then fails at the timeout. Do not end the connection
/// for it.
///
/// [`AskingIommu`]: vm_memory::iommu::AskingIommu
///
/// # Examples
///
/// ```
/// use std::io::Read;
/// use std::os::unix::net::UnixStream;
/// use std::time::Duration;
/// use vm_memory::iommu::{AskingIommu, IommuMemory, SharedIotlb};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
/// use vm_memory_vhost::{BackendChannel, Header, IotlbMessage};
///
/// let (channel, mut front_end) = UnixStream::pair()?;
/// let iotlb = SharedIotlb::new();
/// let iommu =
///     AskingIommu::new(iotlb.clone(), Duration::from_secs(1), BackendChannel::new(channel));
/// // The front end replies on the main channel, which another thread reads.
/// std::thread::spawn(move || -> std::io::Result<()> {
///     let mut message = [0; IotlbMessage::MESSAGE_SIZE];
///     front_end.read_exact(&mut message)?;
///     let miss = IotlbMessage::decode(&message[Header::SIZE..]).unwrap();
///     let iova = GuestAddress(0x8000);
///     assert_eq!(miss, IotlbMessage::Miss { iova, size: 8, access: Permissions::Write });
///     iotlb.set_mapping(iova, GuestAddress(0x1000), 0x1000, Permissions::ReadWrite).unwrap();
///     Ok(())
/// });
///
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let memory = IommuMemory::new(physical, iommu, true, ());
/// memory.write_obj(7u64, GuestAddress(0x8000))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[doc(alias = "VHOST_USER_SET_BACKEND_REQ_FD")]
pub struct BackendChannel<W> {
    writer: Mutex<Option<W>>,
}

impl<W: Write + Send> BackendChannel<W> {
    /// Creates a channel that writes to `writer`.
    pub fn new(writer: W) -> Self {
        Self {
            writer: Mutex::new(Some(writer)),
        }
    }

    /// Returns whether a write has failed. The channel then sends nothing more.
    ///
    /// A write that another thread makes at the same time ends first.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::os::unix::net::UnixStream;
    /// use std::time::Duration;
    /// use vm_memory::iommu::{AskingIommu, Iommu, SharedIotlb};
    /// use vm_memory::{GuestAddress, Permissions};
    /// use vm_memory_vhost::BackendChannel;
    ///
    /// let (channel, front_end) = UnixStream::pair()?;
    /// let source = BackendChannel::new(channel);
    /// let iommu = AskingIommu::new(SharedIotlb::new(), Duration::from_secs(1), source);
    /// drop(front_end);
    /// assert!(iommu.translate(GuestAddress(0x1000), 8, Permissions::Read).is_err());
    /// assert!(iommu.source().is_broken());
    /// iommu.close().wait(std::time::Instant::now() + Duration::from_secs(1))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_broken(&self) -> bool {
        let writer = self.writer.lock();
        writer.unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn send(&self, message: &IotlbMessage) -> io::Result<()> {
        let bytes = message.to_message(VHOST_USER_BACKEND_IOTLB_MSG);
        // A message is written as a whole, or the channel is broken.
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out, so that the channel is also broken if the writer panics.
        let mut open = writer.take().ok_or_else(|| {
            let reason = "the channel is broken: an earlier write has failed";
            io::Error::new(ErrorKind::NotConnected, reason)
        })?;
        open.write_all(&bytes)?;
        *writer = Some(open);
        Ok(())
    }
}

impl<W: Write + Send> MappingSource for BackendChannel<W> {
    fn request_mapping(&self, range: &IovaRange, access: Permissions) -> io::Result<()> {
        let (iova, size) = (range.base, to_u64(range.length));
        self.send(&IotlbMessage::Miss { iova, size, access })
    }

    fn report_refusal(&self, range: &IovaRange, access: Permissions) -> io::Result<()> {
        let (iova, size) = (range.base, to_u64(range.length));
        self.send(&IotlbMessage::AccessFail { iova, size, access })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::message::Header;
    use vm_memory::GuestAddress;

    /// A writer that keeps the bytes, and fails after `left` of them.
    struct Limited {
        bytes: Arc<Mutex<Vec<u8>>>,
        left: usize,
    }

    impl Write for Limited {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let written = bytes.len().min(self.left).min(13);
            self.left -= written;
            self.bytes.lock().unwrap().extend(&bytes[..written]);
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn request_after_partial_write_is_not_sent() {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let channel = BackendChannel::new(Limited {
            bytes: Arc::clone(&bytes),
            left: 2 * 44 + 20,
        });
        let iova = GuestAddress(0x8000);
        let range = IovaRange {
            base: iova,
            length: 0x2000,
        };
        channel.request_mapping(&range, Permissions::Read).unwrap();
        channel.report_refusal(&range, Permissions::Write).unwrap();
        assert!(!channel.is_broken());
        let error = channel.request_mapping(&range, Permissions::Read);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::WriteZero);
        let error = channel.request_mapping(&range, Permissions::Read);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::NotConnected);
        assert!(channel.is_broken());

        let bytes = bytes.lock().unwrap();
        assert_eq!(bytes.len(), 2 * 44 + 20);
        let messages: Vec<_> = bytes
            .chunks_exact(44)
            .map(|bytes| {
                let header = Header::decode(bytes.first_chunk().unwrap());
                assert_eq!(header, Ok(Header::request(1, 32)));
                IotlbMessage::decode(&bytes[12..]).unwrap()
            })
            .collect();
        let size = 0x2000;
        let access = Permissions::Read;
        let miss = IotlbMessage::Miss { iova, size, access };
        let access = Permissions::Write;
        let fail = IotlbMessage::AccessFail { iova, size, access };
        assert_eq!(messages, [miss, fail]);
    }
}
