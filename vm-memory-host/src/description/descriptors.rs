//! [`Descriptors`]: the descriptors that a description refers to.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::builder::ReceivedFiles;

/// The descriptors that a [`Description`](super::Description) refers to, in its order.
///
/// [`describe`](super::describe) returns them, and
/// [`Description::builder`](super::Description::builder) takes them. A sender passes each
/// descriptor to the other process (`SCM_RIGHTS`, unix(7)), which collects those that it receives.
/// Within a process, a clone refers to the same descriptors.
///
/// A received descriptor can be that of a server that never replies (FUSE). Dropping it does not
/// wait for the server: a separate thread closes it, as [`Description::builder`] describes. While
/// that thread waits, setuid(2) and setgid(2) of the C library wait for it. The process cannot end
/// before either, not even by SIGKILL.
///
/// [`Description::builder`]: super::Description::builder
///
/// # Examples
///
/// ```
/// use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{describe, Backing, Descriptors, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// let (description, descriptors) = describe(&memory)?;
/// let to_send: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
///
/// // The other process receives duplicates.
/// let received: Vec<OwnedFd> =
///     to_send.iter().map(BorrowedFd::try_clone_to_owned).collect::<Result<_, _>>()?;
/// let same: GuestMemoryMmap = description.builder(Descriptors::from(received))?.build()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[doc(alias = "SCM_RIGHTS")]
pub struct Descriptors {
    files: Vec<Arc<File>>,
    /// Whether another process may have sent them.
    are_received: bool,
}

impl Descriptors {
    /// Lists the files of memory of this process.
    pub(super) fn of_memory(files: Vec<Arc<File>>) -> Self {
        Self {
            files,
            are_received: false,
        }
    }

    /// Takes all files, which the result closes without waiting for their servers.
    pub(super) fn take(mut self) -> ReceivedFiles {
        std::mem::take(&mut self.files).into()
    }

    /// Returns the number of descriptors.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Returns whether there are none, because all memory is anonymous.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Returns the descriptor with an index of
    /// [`BackingDescription::Descriptor`](super::BackingDescription::Descriptor).
    pub fn get(&self, index: usize) -> Option<&File> {
        self.files.get(index).map(Arc::as_ref)
    }

    /// Returns the descriptors in the order of their indices.
    pub fn iter(&self) -> impl Iterator<Item = &File> {
        self.files.iter().map(Arc::as_ref)
    }
}

impl FromIterator<OwnedFd> for Descriptors {
    fn from_iter<I: IntoIterator<Item = OwnedFd>>(descriptors: I) -> Self {
        let descriptors = descriptors.into_iter();
        Self {
            files: descriptors.map(|fd| Arc::new(File::from(fd))).collect(),
            are_received: true,
        }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        if self.are_received {
            drop(ReceivedFiles::from(std::mem::take(&mut self.files)));
        }
    }
}

impl From<Vec<OwnedFd>> for Descriptors {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        descriptors.into_iter().collect()
    }
}
