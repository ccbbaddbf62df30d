//! Accesses to an [`IoBuffer`] that move all their bytes.

use super::IoBuffer;
use crate::guest_memory::{Error, GuestMemory, Permissions, Result};
use crate::value::ByteValued;

impl<M: GuestMemory + 'static> IoBuffer<M> {
    /// Reads a value at `offset`, such as the header of a request. Segments may split it.
    ///
    /// The access is not atomic.
    ///
    /// # Examples
    ///
    /// The driver splits a header between two descriptors:
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, Le32, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// memory.write_slice(&[8, 0, 0], GuestAddress(0x1000))?;
    /// memory.write_slice(&[1, 5], GuestAddress(0x3000))?;
    /// let ranges = [(GuestAddress(0x1000), 3), (GuestAddress(0x3000), 2)];
    /// let request = IoBuffer::from_ranges(&memory, ranges, Permissions::Read)?;
    /// assert_eq!(request.read_obj::<Le32>(0)?.to_native(), 0x100_0008);
    ///
    /// // The header that the driver sends is too short.
    /// let short = request.read_obj::<Le32>(4).unwrap_err();
    /// assert!(matches!(short, GuestMemoryError::PartialBuffer { expected: 4, completed: 0 }));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns the errors of [`read_slice`](Self::read_slice).
    pub fn read_obj<T: ByteValued>(&self, offset: usize) -> Result<T> {
        let mut value = T::zeroed();
        self.read_slice(value.as_mut_slice(), offset)?;
        Ok(value)
    }

    /// Writes a value at `offset`, such as the header of a packet. Segments may split it.
    ///
    /// The access is not atomic. The pages written are marked dirty.
    ///
    /// # Examples
    ///
    /// See [`split_to`](Self::split_to).
    ///
    /// # Errors
    ///
    /// Returns the errors of [`write_slice`](Self::write_slice).
    pub fn write_obj<T: ByteValued>(&self, value: T, offset: usize) -> Result<()> {
        self.write_slice(value.as_slice(), offset)
    }

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// [`copy_to`](Self::copy_to) accepts a buffer that is too short, and returns the number of
    /// bytes.
    ///
    /// # Errors
    ///
    /// - [`Error::PartialBuffer`] if the buffer has too few bytes. None are copied then.
    /// - [`Error::PartialBuffer`] if some bytes were copied before one that cannot be accessed.
    /// - The errors of [`copy_to`](Self::copy_to).
    pub fn read_slice(&self, buf: &mut [u8], offset: usize) -> Result<()> {
        self.move_all(Permissions::Read, offset, buf.len(), || {
            self.segments.copy_to(offset, buf)
        })
    }

    /// Writes all of `buf` to the bytes at `offset`.
    ///
    /// The pages written are marked dirty. [`copy_from`](Self::copy_from) accepts a buffer that is
    /// too short, and returns the number of bytes.
    ///
    /// # Errors
    ///
    /// - [`Error::PartialBuffer`] if the buffer has too few bytes. None are copied then.
    /// - [`Error::PartialBuffer`] if some bytes were copied before one that cannot be accessed.
    /// - The errors of [`copy_from`](Self::copy_from).
    pub fn write_slice(&self, buf: &[u8], offset: usize) -> Result<()> {
        self.move_all(Permissions::Write, offset, buf.len(), || {
            self.segments.copy_from(offset, buf)
        })
    }

    /// Calls `copy` for the `expected` bytes at `offset`, if the buffer has them.
    fn move_all(
        &self,
        access: Permissions,
        offset: usize,
        expected: usize,
        copy: impl FnOnce() -> Result<usize>,
    ) -> Result<()> {
        self.require(access)?;
        let has_all = offset
            .checked_add(expected)
            .is_some_and(|end| end <= self.len());
        match if has_all { copy()? } else { 0 } {
            completed if has_all && completed == expected => Ok(()),
            completed => Err(Error::PartialBuffer {
                expected,
                completed,
            }),
        }
    }
}
