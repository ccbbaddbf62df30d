//! A raw disk image. Data moves directly between the file and guest memory, with `preadv(2)` and
//! `pwritev(2)`, one segment at a time.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use vm_memory::{vectored, GuestMemory};

use crate::block::{Disk, Transfer, SECTOR};
use crate::Error;

/// A raw disk image.
#[derive(Debug)]
pub struct Image {
    /// The file.
    pub file: Arc<File>,
    sectors: u64,
}

impl Image {
    /// Creates a temporary image of `sectors` sectors. Each word contains its own offset.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be created or written.
    pub fn temporary(sectors: u64) -> Result<Self, Error> {
        let file = tempfile::tempfile().map_err(Error::Disk)?;
        let words = (0..sectors * SECTOR).step_by(8);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        file.write_all_at(&bytes, 0).map_err(Error::Disk)?;
        let file = Arc::new(file);
        Ok(Self { file, sectors })
    }

    /// Opens an image. Without `writable`, the guest gets a temporary copy.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be opened or copied, is not a whole number of sectors,
    /// or has fewer than `min_sectors`.
    pub fn open(path: &Path, writable: bool, min_sectors: u64) -> Result<Self, Error> {
        let fail = Error::file("--disk", path);
        let mut file = OpenOptions::new()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(&fail)?;
        // Seek to the end: the metadata length of a block device is 0.
        let len = file.seek(SeekFrom::End(0)).map_err(&fail)?;
        let min = min_sectors * SECTOR;
        if !len.is_multiple_of(SECTOR) || len < min {
            return Err(Error::DiskSize {
                path: path.to_owned(),
                len,
                min,
            });
        }
        if !writable {
            file.rewind().map_err(&fail)?;
            let mut copy = tempfile::tempfile().map_err(Error::Disk)?;
            io::copy(&mut file, &mut copy).map_err(Error::Disk)?;
            file = copy;
        }
        Ok(Self {
            file: Arc::new(file),
            sectors: len / SECTOR,
        })
    }

    /// Reads whole sectors into a buffer of the host.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be read.
    pub fn read_sectors(&self, first: u64, count: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; (count * SECTOR) as usize];
        self.file.read_exact_at(&mut bytes, first * SECTOR)?;
        Ok(bytes)
    }
}

impl Disk for Image {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn transfer<M>(&mut self, memory: &Arc<M>, transfers: &mut [&mut Transfer])
    where
        M: GuestMemory + 'static,
    {
        for transfer in transfers {
            let mut offset = transfer.offset;
            transfer.outcome = transfer.buffers.iter().try_for_each(|&(addr, len)| {
                if transfer.is_read {
                    vectored::read_exact_from_at(&**memory, addr, len, &self.file, offset)?;
                } else {
                    vectored::write_all_to_at(&**memory, addr, len, &self.file, offset)?;
                }
                offset += len as u64;
                Ok(())
            });
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}
