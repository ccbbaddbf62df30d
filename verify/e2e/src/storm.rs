//! Files that are truncated and grown while the device moves bytes between them.
//!
//! Two files lose pages during a run: the last sectors of the disk image, which is mapped, and a
//! third region of guest memory. Without [`vm_memory::fault`], the first request that touches a
//! missing page would kill the process. With it, the device returns an I/O error and everything
//! else continues.
//!
//! A thread truncates and grows the files, with pauses and lengths from a seed. The outcome of most
//! requests depends on timing. Every fourth request has a certain outcome: both files are whole or
//! one of them is empty. The disk stops the thread until such a request ends. The disk compares the
//! data between whole files at once, before a truncation can remove it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use microvm::block::{Disk, Transfer, SECTOR};
use microvm::bus::lock;
use microvm::disk::Image;
use microvm::memory::{pages_of, GuestRam, PAGE};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, MmapRegion, VolatileMemory, VolatileMemoryError,
};

use crate::memory::with_truncatable_region;
use crate::plan::{mix, Storm, CHUNK_SECTORS};
use crate::Error;

/// The number of chunks in each pass of the storm. Each is one page of guest memory.
pub const CHUNKS: u64 = 64;
/// A request whose number is a multiple of this one has a certain outcome.
const CERTAIN_EVERY: u64 = 4;
/// The third region begins at a multiple of this number of bytes, after the second.
const BOUNDARY: u64 = 1 << 30;

/// Adds the third region to `ram`.
///
/// # Errors
///
/// Returns an error if the system cannot provide it.
pub fn with_region(ram: &GuestRam) -> Result<GuestRam, Error> {
    with_truncatable_region(ram, region_start(ram), CHUNKS * PAGE)
}

fn region_start(ram: &GuestRam) -> u64 {
    let steady = ram.iter().take(2).map(|region| region.last_addr().0).max();
    (steady.unwrap_or(0) / BOUNDARY + 1) * BOUNDARY
}

/// The number of requests of a storm by outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that moved all of their bytes.
    pub moved: u64,
    /// Requests that touched a missing page.
    pub failed: u64,
    /// Certain requests between whole files.
    pub certain_whole: u64,
    /// Certain requests with an empty file.
    pub certain_truncated: u64,
    /// Requests with an outcome other than the certain one, an unexpected error, or wrong bytes.
    pub wrong: u64,
    /// The pages that reads wrote completely.
    pub written: BTreeSet<u64>,
}

/// Two files whose lengths change.
#[derive(Debug)]
pub struct Truncation {
    files: Mutex<Files>,
    over: AtomicBool,
    count: AtomicU64,
    seed: u64,
    storm: Storm,
}

#[derive(Debug)]
struct Files {
    disk: File,
    /// The length of the disk without the sectors of the storm.
    steady: u64,
    region: File,
    drawn: u64,
}

impl Files {
    /// Sets the number of pages in both files, without the steady sectors of the disk.
    fn set(&self, disk_pages: u64, region_pages: u64) -> io::Result<()> {
        self.disk.set_len(self.steady + disk_pages * PAGE)?;
        self.region.set_len(region_pages * PAGE)
    }
}

/// The state of the files during a request.
#[derive(Debug)]
pub enum Moment<'a> {
    /// Unknown: the files change.
    Any,
    /// Certain until this value is dropped.
    Certain {
        /// Whether both files are whole. Otherwise one of them is empty.
        whole: bool,
        /// Keeps the thread out.
        held: Held<'a>,
    },
}

/// Prevents changes of the files.
#[derive(Debug)]
pub struct Held<'a>(#[expect(dead_code, reason = "a guard")] MutexGuard<'a, Files>);

/// The thread that changes the files. Dropping this stops it and makes the files whole.
#[derive(Debug)]
pub struct Running {
    truncation: Arc<Truncation>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Truncation {
    /// Prepares to truncate the end of `image` and the third region of `ram`, and installs the
    /// fault handler.
    ///
    /// # Errors
    ///
    /// Returns an error if this platform has no fault recovery, or a file cannot be shared.
    pub fn new(ram: &GuestRam, image: &Image, seed: u64) -> Result<Arc<Self>, Error> {
        vm_memory::fault::install()?;
        let buffers = region_start(ram);
        let region = ram
            .find_region(GuestAddress(buffers))
            .and_then(|r| r.file_offset());
        let region = region.ok_or_else(|| Error::other("no third region"))?;
        let sector = image.sectors() - CHUNKS * CHUNK_SECTORS;
        let files = Files {
            disk: image.file.try_clone()?,
            steady: sector * SECTOR,
            region: region.file().try_clone()?,
            drawn: 0,
        };
        Ok(Arc::new(Self {
            files: Mutex::new(files),
            over: AtomicBool::new(false),
            count: AtomicU64::new(0),
            seed,
            storm: Storm {
                sector,
                chunks: CHUNKS,
                buffers,
            },
        }))
    }

    /// Returns the requests that touch the files.
    pub fn storm(&self) -> Storm {
        self.storm
    }

    /// Returns the number of truncations.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// Returns an error if the system cannot start it.
    pub fn start(self: &Arc<Self>) -> Result<Running, Error> {
        let truncation = Arc::clone(self);
        let thread = std::thread::Builder::new().name("truncate".into());
        let thread = thread.spawn(move || truncation.truncate_and_grow())?;
        // A short run could be over before the thread has started.
        while self.count() == 0 && !thread.is_finished() {
            std::thread::yield_now();
        }
        Ok(Running {
            truncation: Arc::clone(self),
            thread: Some(thread),
        })
    }

    /// Returns the state of the files for request `nth` of the storm.
    ///
    /// # Errors
    ///
    /// Returns an error if a file cannot be resized.
    pub fn moment(&self, nth: u64) -> io::Result<Moment<'_>> {
        if !nth.is_multiple_of(CERTAIN_EVERY) {
            return Ok(Moment::Any);
        }
        let files = lock(&self.files);
        let [disk, region] = match nth / CERTAIN_EVERY % 4 {
            1 => [0, CHUNKS],
            3 => [CHUNKS, 0],
            _ => [CHUNKS, CHUNKS],
        };
        files.set(disk, region)?;
        let whole = disk == region;
        self.count.fetch_add(u64::from(!whole), Ordering::Relaxed);
        Ok(Moment::Certain {
            whole,
            held: Held(files),
        })
    }

    fn truncate_and_grow(&self) -> io::Result<()> {
        while !self.over.load(Ordering::Relaxed) {
            let mut files = lock(&self.files);
            let mut draw = || {
                files.drawn += 1;
                mix(self.seed ^ files.drawn).rotate_right(32)
            };
            let (disk, region, pause) = (draw() % CHUNKS, draw() % CHUNKS, draw() % 64);
            files.set(disk, region)?;
            drop(files);
            self.count.fetch_add(1, Ordering::Relaxed);
            let_others_run(pause);
            lock(&self.files).set(CHUNKS, CHUNKS)?;
            let_others_run(pause);
        }
        Ok(())
    }
}

/// Offers the processor to other threads `times` times.
fn let_others_run(times: u64) {
    (0..times).for_each(|_| std::thread::yield_now());
}

impl Running {
    /// Stops the thread and makes both files whole.
    ///
    /// # Errors
    ///
    /// Returns an error if the thread failed.
    pub fn stop(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.truncation.over.store(true, Ordering::Relaxed);
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))?;
        lock(&self.truncation.files).set(CHUNKS, CHUNKS)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// A mapped disk image whose last sectors are truncated and grown.
pub struct StormDisk {
    /// The image.
    pub image: Image,
    mapping: MmapRegion,
    truncation: Arc<Truncation>,
    /// The requests of the storm so far.
    pub counts: Counts,
}

impl StormDisk {
    /// Maps `image`.
    ///
    /// # Errors
    ///
    /// Returns an error if the image cannot be mapped.
    pub fn new(image: Image, truncation: Arc<Truncation>) -> Result<Self, Error> {
        let len = (image.sectors() * SECTOR) as usize;
        let file = FileOffset::new(image.file.try_clone()?, 0);
        let mapping = MmapRegion::from_file(file, len).map_err(Error::other)?;
        Ok(Self {
            image,
            mapping,
            truncation,
            counts: Counts::default(),
        })
    }

    /// Copies sector by sector between the mapping and guest memory.
    fn copy(&self, memory: &impl GuestMemory, transfer: &Transfer) -> Result<(), GuestMemoryError> {
        let (mut offset, disk) = (transfer.offset as usize, self.mapping.as_volatile_slice());
        for &(addr, len) in transfer.buffers.iter() {
            let mut buffer = [0; SECTOR as usize];
            for done in (0..len).step_by(buffer.len()) {
                let part = &mut buffer[..(len - done).min(SECTOR as usize)];
                let at = GuestAddress(addr.0 + done as u64);
                if transfer.is_read {
                    disk.read_slice(part, offset).map_err(of_disk)?;
                    memory.write_slice(part, at)?;
                } else {
                    memory.read_slice(part, at)?;
                    disk.write_slice(part, offset).map_err(of_disk)?;
                }
                offset += part.len();
            }
        }
        Ok(())
    }

    fn copy_in_storm(&mut self, memory: &impl GuestMemory, transfer: &mut Transfer) {
        let truncation = Arc::clone(&self.truncation);
        let moment = truncation.moment(self.counts.moved + self.counts.failed);
        let moment = moment.expect("cannot resize a file");
        transfer.outcome = self.copy(memory, transfer);
        let mut good = transfer.outcome.as_ref().map_or_else(is_fault, |()| true);
        if let Moment::Certain { whole, held } = moment {
            good &= transfer.outcome.is_ok() == whole;
            if whole {
                self.counts.certain_whole += 1;
                good &= self.has_bytes_of_file(memory, transfer);
            } else {
                self.counts.certain_truncated += 1;
            }
            drop(held);
        }
        self.counts.wrong += u64::from(!good);
        match transfer.outcome {
            Ok(()) => self.counts.moved += 1,
            Err(_) => self.counts.failed += 1,
        }
        if transfer.is_read && transfer.outcome.is_ok() {
            let ranges = transfer.buffers.iter();
            let pages = ranges.flat_map(|(addr, len)| pages_of(addr.0, *len as u64));
            self.counts.written.extend(pages);
        }
    }

    /// Returns whether guest memory contains the bytes of the file.
    fn has_bytes_of_file(&self, memory: &impl GuestMemory, transfer: &Transfer) -> bool {
        let len = transfer.buffers.bytes();
        let mut bytes = vec![0; len as usize];
        let file = self
            .image
            .read_sectors(transfer.offset / SECTOR, len / SECTOR);
        let read = transfer.buffers.read(memory, &mut bytes);
        read.is_ok() && file.is_ok_and(|file| file == bytes)
    }
}

impl Disk for StormDisk {
    fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    fn transfer<M>(&mut self, memory: &Arc<M>, transfers: &mut [&mut Transfer])
    where
        M: GuestMemory + 'static,
    {
        for transfer in transfers {
            if transfer.offset < self.truncation.storm.sector * SECTOR {
                transfer.outcome = self.copy(&**memory, transfer);
            } else {
                self.copy_in_storm(&**memory, transfer);
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.image.flush()
    }
}

/// Converts an error of the mapped disk. `From` would report it as an error of guest memory.
fn of_disk(error: VolatileMemoryError) -> GuestMemoryError {
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

/// Returns whether an access touched a missing page.
fn is_fault(error: &GuestMemoryError) -> bool {
    match error {
        GuestMemoryError::IOError(error) => error.raw_os_error() == Some(libc::EFAULT),
        GuestMemoryError::PartialBuffer { .. } => true,
        _ => false,
    }
}
