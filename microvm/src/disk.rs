//! The file behind the block device: sectors go between it and guest memory with no buffer between, by `preadv(2)` and `pwritev(2)`.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use vm_memory::{
    vectored, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryError, MmapRegion,
    VolatileMemory, VolatileMemoryError,
};

use crate::error::Error;
use crate::plan::{mix, CHUNK_SECTORS, SECTOR};

/// Sectors of the image that is made when none is given.
const IMAGE_SECTORS: u64 = 2048;
/// The first word of the pattern in that image; far from the words that the guest writes.
const IMAGE_PLACE: u64 = 1 << 48;

/// A disk.
#[derive(Debug)]
pub struct Disk {
    base: File,
    overlay: Option<Overlay>,
    /// The base again, in memory: then bytes are copied between this and guest memory.
    mapping: Option<MmapRegion>,
    sectors: u64,
    name: String,
}

/// A temporary file that takes the writes in place of the base, at the same offsets.
#[derive(Debug)]
struct Overlay {
    file: File,
    /// The sectors that have been written; all others are still the base's.
    written: BTreeSet<u64>,
}

impl Disk {
    /// Makes a temporary image with a known pattern, which is gone when it is closed.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] when it cannot be made.
    pub fn temporary() -> Result<Self, Error> {
        Self::temporary_of(IMAGE_SECTORS)
    }

    /// Makes a temporary image with so many sectors more, and maps it: its bytes are copied to guest memory and not read.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] when it cannot be made.
    pub fn temporary_and_mapped(more: u64) -> Result<Self, Error> {
        let fail = |why| Error::Image {
            what: "map the temporary disk image",
            why,
        };
        let mut disk = Self::temporary_of(IMAGE_SECTORS + more)?;
        let len = usize::try_from(disk.sectors * SECTOR).map_err(|e| fail(io::Error::other(e)))?;
        let place = FileOffset::new(disk.file().map_err(fail)?, 0);
        let mapping = MmapRegion::from_file(place, len).map_err(|e| fail(io::Error::other(e)))?;
        disk.mapping = Some(mapping);
        disk.name = "temporary image, mapped".to_owned();
        Ok(disk)
    }

    fn temporary_of(sectors: u64) -> Result<Self, Error> {
        let fail = |why| Error::Image {
            what: "make a temporary disk image",
            why,
        };
        let mut base = tempfile::tempfile().map_err(fail)?;
        let words = IMAGE_PLACE..IMAGE_PLACE + sectors * SECTOR / 8;
        let bytes: Vec<u8> = words.flat_map(|place| mix(place).to_le_bytes()).collect();
        base.write_all(&bytes).map_err(fail)?;
        Ok(Self {
            base,
            overlay: None,
            mapping: None,
            sectors,
            name: "temporary image".to_owned(),
        })
    }

    /// Opens an image. Unless `writable`, what the guest writes goes to a temporary overlay.
    ///
    /// # Errors
    ///
    /// [`Error::OpenFile`], [`Error::DiskOddSize`], [`Error::DiskTooSmall`], and [`Error::Image`]
    /// when there is no place for the overlay.
    pub fn open(path: &Path, writable: bool) -> Result<Self, Error> {
        let fail = |why| Error::OpenFile {
            option: "--disk",
            path: path.to_owned(),
            why,
        };
        // Looked at before it is opened: opening a FIFO waits for its other end.
        let kind = std::fs::metadata(path).map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(fail(io::Error::other(
                "neither a regular file nor a block device",
            )));
        }
        let mut base = OpenOptions::new()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(fail)?;
        // Not the metadata's length: that of a block device is 0.
        let size = base.seek(SeekFrom::End(0)).map_err(fail)?;
        if size % SECTOR != 0 {
            let fix = format!("make it one with: truncate -s %{SECTOR} {}", path.display());
            return Err(Error::DiskOddSize {
                path: path.to_owned(),
                size,
                fix,
            });
        }
        let sectors = size / SECTOR;
        if sectors < CHUNK_SECTORS {
            return Err(Error::DiskTooSmall {
                path: path.to_owned(),
                size,
            });
        }
        let overlay = if writable {
            None
        } else {
            let file = tempfile::tempfile().map_err(|why| Error::Image {
                what: "make a temporary overlay",
                why,
            })?;
            Some(Overlay {
                file,
                written: BTreeSet::new(),
            })
        };
        Ok(Self {
            base,
            overlay,
            mapping: None,
            sectors,
            name: path.display().to_string(),
        })
    }

    /// Its capacity.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether its bytes are copied, and not read and written.
    pub fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }

    /// The file of the image, once more.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn file(&self) -> io::Result<File> {
        self.base.try_clone()
    }

    /// What to call it in the report.
    pub fn describe(&self) -> String {
        let Self { name, sectors, .. } = self;
        match self.overlay {
            Some(_) => format!("{name}, {sectors} sectors, writes go to an overlay"),
            None => format!("{name}, {sectors} sectors"),
        }
    }

    /// Moves `len` bytes at byte `offset` of the disk into guest memory at `addr`.
    ///
    /// # Errors
    ///
    /// Those of the file and of guest memory; bytes before the error may have been moved.
    pub fn read_to_guest<M>(
        &mut self,
        mem: &M,
        mut addr: GuestAddress,
        mut offset: u64,
        len: usize,
    ) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        if let Some(mapping) = &self.mapping {
            return copy_in_parts(offset, addr, len, |part, at, addr| {
                mapping
                    .as_volatile_slice()
                    .read_slice(part, at)
                    .map_err(of_mapping)?;
                mem.write_slice(part, addr)
            });
        }
        let mut left = len;
        while left > 0 {
            let (file, run) = self.run_at(offset, left);
            vectored::read_exact_from_at(mem, addr, run, file, offset)?;
            left -= run;
            offset += run as u64;
            addr.0 = addr
                .0
                .checked_add(run as u64)
                .ok_or(GuestMemoryError::GuestAddressOverflow)?;
        }
        Ok(())
    }

    /// Moves `len` bytes from guest memory at `addr` to byte `offset` of the disk. They become
    /// visible with [`Disk::commit`].
    ///
    /// # Errors
    ///
    /// Those of the file and of guest memory; bytes before the error may have been moved.
    pub fn write_from_guest<M>(
        &mut self,
        mem: &M,
        addr: GuestAddress,
        offset: u64,
        len: usize,
    ) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        if let Some(mapping) = &self.mapping {
            return copy_in_parts(offset, addr, len, |part, at, addr| {
                mem.read_slice(part, addr)?;
                mapping
                    .as_volatile_slice()
                    .write_slice(part, at)
                    .map_err(of_mapping)
            });
        }
        let file = match &self.overlay {
            Some(overlay) => &overlay.file,
            None => &self.base,
        };
        vectored::write_all_to_at(mem, addr, len, file, offset)
    }

    /// The file that byte `offset` of the disk is read from or written to, and how many bytes from there on, `most` at most, are so in the same
    /// file. It is open as long as the disk is.
    pub fn place(&mut self, offset: u64, most: usize, reads: bool) -> (RawFd, usize) {
        match &self.overlay {
            Some(overlay) if !reads => (overlay.file.as_raw_fd(), most),
            _ => {
                let (file, run) = self.run_at(offset, most);
                (file.as_raw_fd(), run)
            }
        }
    }

    /// Says that `count` sectors from `first` on have been written whole.
    pub fn commit(&mut self, first: u64, count: u64) {
        if let Some(overlay) = &mut self.overlay {
            overlay.written.extend(first..first.saturating_add(count));
        }
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn flush(&mut self) -> io::Result<()> {
        match &self.overlay {
            // It does not outlive the process.
            Some(_) => Ok(()),
            None => self.base.sync_data(),
        }
    }

    /// Reads whole sectors into host memory: how the host looks at the disk before and after.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn read_sectors(&mut self, first: u64, count: u64) -> io::Result<Vec<u8>> {
        let too_large = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = count
            .checked_mul(SECTOR)
            .and_then(|n| usize::try_from(n).ok());
        let mut bytes = vec![0; len.ok_or_else(too_large)?];
        let mut offset = first.checked_mul(SECTOR).ok_or_else(too_large)?;
        let mut rest = bytes.as_mut_slice();
        while !rest.is_empty() {
            let (file, run) = self.run_at(offset, rest.len());
            file.seek(SeekFrom::Start(offset))?;
            let (now, later) = rest.split_at_mut(run);
            file.read_exact(now)?;
            offset += run as u64;
            rest = later;
        }
        Ok(bytes)
    }

    /// The file that holds byte `offset` of the disk, and how many bytes from there on, `most` at
    /// most and one at least, lie in the same file.
    fn run_at(&mut self, offset: u64, most: usize) -> (&mut File, usize) {
        let Some(overlay) = &mut self.overlay else {
            return (&mut self.base, most);
        };
        let sector = offset / SECTOR;
        let written = overlay.written.contains(&sector);
        let end = if written {
            let wanted = most / SECTOR as usize + 2;
            let same = (sector..).zip(overlay.written.range(sector..)).take(wanted);
            sector + same.take_while(|(n, s)| n == *s).count() as u64
        } else {
            overlay
                .written
                .range(sector..)
                .next()
                .copied()
                .unwrap_or(u64::MAX / SECTOR)
        };
        let run = usize::try_from(end * SECTOR - offset)
            .unwrap_or(usize::MAX)
            .min(most);
        (
            if written {
                &mut overlay.file
            } else {
                &mut self.base
            },
            run,
        )
    }
}

/// Calls `copy` with a buffer, an offset in the mapped disk, and a guest address, for one part of the range after another.
fn copy_in_parts(
    offset: u64,
    addr: GuestAddress,
    len: usize,
    copy: impl Fn(&mut [u8], usize, GuestAddress) -> Result<(), GuestMemoryError>,
) -> Result<(), GuestMemoryError> {
    let mut buffer = [0; SECTOR as usize];
    let mut done = 0;
    while done < len {
        let part = buffer.len().min(len - done);
        let at = offset
            .checked_add(done as u64)
            .and_then(|at| usize::try_from(at).ok());
        let guest = addr.0.checked_add(done as u64);
        let (Some(at), Some(guest), Some(buffer)) = (at, guest, buffer.get_mut(..part)) else {
            return Err(GuestMemoryError::GuestAddressOverflow);
        };
        copy(buffer, at, GuestAddress(guest))?;
        done += part;
    }
    Ok(())
}

/// An error of the mapped disk. `From` would make a place that is not there one of guest memory.
fn of_mapping(error: VolatileMemoryError) -> GuestMemoryError {
    match error {
        VolatileMemoryError::IOError(error) => GuestMemoryError::IOError(error),
        VolatileMemoryError::PartialBuffer {
            expected,
            completed,
        } => GuestMemoryError::PartialBuffer {
            expected,
            completed,
        },
        other => GuestMemoryError::IOError(io::Error::other(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{map, Backing, MIN_MEM};

    fn image(sectors: u64) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..sectors)
            .flat_map(|s| [s as u8; SECTOR as usize])
            .collect();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn an_overlay_hides_the_file_sector_by_sector() {
        let file = image(16);
        let before = std::fs::read(file.path()).unwrap();
        let ram = map(MIN_MEM, Backing::Anonymous).unwrap();
        let mut disk = Disk::open(file.path(), false).unwrap();
        let (from, to) = (GuestAddress(0x1000), GuestAddress(0x10000));
        ram.write_slice(&[0xee; 4 * SECTOR as usize], from).unwrap();
        for (first, count) in [(3, 2), (5, 1), (15, 1)] {
            let len = usize::try_from(count * SECTOR).unwrap();
            disk.write_from_guest(&ram, from, first * SECTOR, len)
                .unwrap();
            disk.commit(first, count);
        }
        let mut want = before.clone();
        for sector in [3, 4, 5, 15] {
            want[sector * 512..][..512].fill(0xee);
        }
        assert_eq!(disk.read_sectors(0, 16).unwrap(), want);
        disk.read_to_guest(&ram, to, 100, want.len() - 200).unwrap();
        let mut got = vec![0; want.len() - 200];
        ram.read_slice(&mut got, to).unwrap();
        assert_eq!(got, want[100..want.len() - 100]);
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
    }

    #[test]
    fn writes_reach_the_file_when_they_may() {
        let file = image(8);
        let ram = map(MIN_MEM, Backing::Anonymous).unwrap();
        let mut disk = Disk::open(file.path(), true).unwrap();
        ram.write_slice(&[0xee; 512], GuestAddress(0)).unwrap();
        disk.write_from_guest(&ram, GuestAddress(0), 7 * SECTOR, 512)
            .unwrap();
        disk.commit(7, 1);
        disk.flush().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[7 * 512..], [0xee; 512]);
    }

    #[test]
    fn a_file_that_shrank_is_an_error() {
        let file = image(16);
        let ram = map(MIN_MEM, Backing::Anonymous).unwrap();
        let mut disk = Disk::open(file.path(), false).unwrap();
        file.as_file().set_len(4096).unwrap();
        assert!(disk
            .read_to_guest(&ram, GuestAddress(0), 4096, 512)
            .is_err());
        assert!(disk.read_sectors(7, 2).is_err());
    }

    #[test]
    fn the_temporary_image_has_no_word_twice() {
        let mut disk = Disk::temporary().unwrap();
        let bytes = disk.read_sectors(0, disk.sectors()).unwrap();
        let words: BTreeSet<_> = bytes.chunks(8).map(<[u8]>::to_vec).collect();
        assert_eq!(words.len() as u64, IMAGE_SECTORS * SECTOR / 8);
    }
}
