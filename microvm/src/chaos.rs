//! `--chaos`: files are cut off and grown again under the mappings of a running VMM.
//!
//! Two files lose pages while the guest runs: the last sectors of the disk image, which is mapped here, and a third region of guest
//! memory. A request of the plan's [`Storm`] moves data between the two. Without `vm_memory::fault` the first one that meets a page which is gone
//! would kill the process; with it, the device answers with an I/O error and everything else goes on.
//!
//! A thread cuts and grows as fast as it can, at times and to lengths that come from a seed. That alone leaves to chance what a request
//! meets, so every fourth request is made certain: the device holds the thread still, with both files whole or one of them cut off, until the
//! request is over. What was moved between whole files is compared on the spot; it may be gone in the next moment.
//!
//! The thread that cuts files is the only one that changes their length, and always under [`Chaos::files`]' lock.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::disk::Disk;
use crate::error::Error;
use crate::memory::{self, GuestRam, PAGE};
use crate::plan::{mix, Storm, CHUNK_SECTORS, SECTOR};

/// Chunks of each pass of the storm; a page of guest memory each.
pub const CHUNKS: u64 = 64;
/// Every so many requests are certain to find the files in a known state.
const CERTAIN_EVERY: u64 = 4;
/// The third region begins on such a boundary behind the second.
const BOUNDARY: u64 = 1 << 30;

/// Guest memory with a third region behind the others, which is a file's.
///
/// # Errors
///
/// [`Error::MapMemory`].
pub fn with_region(ram: &GuestRam) -> Result<GuestRam, Error> {
    memory::with_file_region(ram, region_start(ram), CHUNKS * PAGE)
}

/// Where the third region begins, or did.
fn region_start(ram: &GuestRam) -> u64 {
    let steady = ram.iter().take(2).map(|region| region.last_addr().0).max();
    (steady.unwrap_or(0) / BOUNDARY + 1) * BOUNDARY
}

/// What the storm's requests did, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that moved all of their bytes.
    pub moved: u64,
    /// Requests that met a page which was gone.
    pub failed: u64,
    /// Requests between whole files.
    pub certain_whole: u64,
    /// Requests that were certain to meet a page which was gone.
    pub certain_cut: u64,
    /// Requests that ended in another way than was certain, failed for another reason, or moved the wrong bytes.
    pub wrong: u64,
}

/// Two files that are not what they were.
#[derive(Debug)]
pub struct Chaos {
    files: Mutex<Files>,
    over: AtomicBool,
    cuts: AtomicU64,
    seed: u64,
    storm: Storm,
}

#[derive(Debug)]
struct Files {
    /// The disk, and its length in bytes without the sectors of the storm.
    disk: (File, u64),
    /// The region.
    region: File,
    /// How many random numbers have been drawn.
    drawn: u64,
}

impl Files {
    /// Sets both lengths, in pages of what can be cut.
    fn set(&self, disk_pages: u64, region_pages: u64) -> std::io::Result<()> {
        self.disk.0.set_len(self.disk.1 + disk_pages * PAGE)?;
        self.region.set_len(region_pages * PAGE)
    }
}

/// What a request will find.
#[derive(Debug)]
pub enum Moment<'a> {
    /// Anything.
    Any,
    /// The files, whole or cut, as long as this is kept.
    Certain {
        /// Whether both are whole; else one of them has none of the pages.
        whole: bool,
        /// Keeps the thread out.
        _held: Held<'a>,
    },
}

/// The files stay as they are as long as this is kept.
#[derive(Debug)]
pub struct Held<'a>(#[expect(dead_code, reason = "is kept, not used")] MutexGuard<'a, Files>);

/// The thread that cuts files; stopped, and the files whole, when this goes.
#[derive(Debug)]
pub struct Running {
    chaos: Arc<Chaos>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Chaos {
    /// Makes ready to cut the end of `disk` and the third region of `ram`; faults become errors from now on.
    ///
    /// # Errors
    ///
    /// [`Error::Chaos`] if faults cannot be made errors here, or a file cannot be had.
    pub fn new(ram: &GuestRam, disk: &Disk, seed: u64) -> Result<Arc<Self>, Error> {
        vm_memory::fault::install().map_err(|why| cannot("turn faults into errors", why))?;
        let start = region_start(ram);
        let region = ram
            .find_region(GuestAddress(start))
            .and_then(|region| region.file_offset().map(|place| place.file().try_clone()));
        let region = region.unwrap_or_else(|| Err(std::io::ErrorKind::NotFound.into()));
        let steady = disk.sectors() - CHUNKS * CHUNK_SECTORS;
        let files = Files {
            disk: (
                disk.file()
                    .map_err(|why| cannot("share the disk image", why))?,
                steady * SECTOR,
            ),
            region: region.map_err(|why| cannot("share the region's file", why))?,
            drawn: 0,
        };
        let storm = Storm {
            sector: steady,
            chunks: CHUNKS,
            buffers: start,
        };
        Ok(Arc::new(Self {
            files: Mutex::new(files),
            over: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
            seed,
            storm,
        }))
    }

    /// The requests that meet it.
    pub fn storm(&self) -> Storm {
        self.storm
    }

    /// What lengths and pauses are drawn from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// How often files were cut.
    pub fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::Relaxed)
    }

    /// Begins.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`].
    pub fn start(self: &Arc<Self>) -> Result<Running, Error> {
        let chaos = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("chaos".to_owned())
            .spawn(move || chaos.cut_and_grow())
            .map_err(|why| Error::Thread {
                what: "start the thread of --chaos",
                why: why.to_string(),
            })?;
        // A short run could be over before the thread has had its first turn.
        while self.cuts() == 0 && !thread.is_finished() {
            std::thread::yield_now();
        }
        Ok(Running {
            chaos: Arc::clone(self),
            thread: Some(thread),
        })
    }

    /// Called by the device before request number `nth` of the storm.
    ///
    /// # Errors
    ///
    /// If a file cannot be given the length that the request is to meet.
    pub fn before(&self, nth: u64) -> std::io::Result<Moment<'_>> {
        if !nth.is_multiple_of(CERTAIN_EVERY) {
            return Ok(Moment::Any);
        }
        let files = self.files();
        let whole = match nth / CERTAIN_EVERY % 4 {
            1 => files.set(0, CHUNKS).map(|()| false),
            3 => files.set(CHUNKS, 0).map(|()| false),
            _ => files.set(CHUNKS, CHUNKS).map(|()| true),
        }?;
        if !whole {
            self.cuts.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Moment::Certain {
            whole,
            _held: Held(files),
        })
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut_and_grow(&self) -> std::io::Result<()> {
        while !self.over.load(Ordering::Relaxed) {
            let mut files = self.files();
            let mut draw = || {
                files.drawn += 1;
                // Its high bits are the better ones.
                mix(self.seed ^ files.drawn).rotate_right(32)
            };
            let (disk, region, pause) = (draw() % CHUNKS, draw() % CHUNKS, draw() % 64);
            files.set(disk, region)?;
            drop(files);
            self.cuts.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(pause));
            self.files().set(CHUNKS, CHUNKS)?;
            std::thread::sleep(Duration::from_micros(pause));
        }
        Ok(())
    }
}

impl Running {
    /// Ends it, with both files as long as they were.
    ///
    /// # Errors
    ///
    /// What went wrong in the thread.
    pub fn stop(mut self) -> Result<Arc<Chaos>, Error> {
        self.join()
            .map_err(|why| cannot("cut files and grow them again", why))?;
        Ok(Arc::clone(&self.chaos))
    }

    fn join(&mut self) -> std::io::Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.chaos.over.store(true, Ordering::Relaxed);
        thread
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")))?;
        self.chaos.files().set(CHUNKS, CHUNKS)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // On a path that reports another error already.
        let _ = self.join();
    }
}

fn cannot(what: &'static str, why: std::io::Error) -> Error {
    Error::Chaos { what, why }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::{map, Backing, MIN_MEM};

    #[test]
    fn a_certain_moment_is_what_it_says_for_as_long_as_it_is_kept() {
        let ram = with_region(&map(MIN_MEM, Backing::Anonymous).unwrap()).unwrap();
        let disk = Disk::temporary_and_mapped(CHUNKS * CHUNK_SECTORS).unwrap();
        let chaos = match Chaos::new(&ram, &disk, 7) {
            Ok(chaos) => chaos,
            Err(why) => {
                // Not println: that is not shown when a test passes.
                let test = "a_certain_moment_is_what_it_says_for_as_long_as_it_is_kept";
                let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
                return;
            }
        };
        let running = chaos.start().unwrap();
        let file = disk.file().unwrap();
        let steady = chaos.storm().sector * SECTOR;
        let mut whole_and_cut = [0; 2];
        for nth in 0..400 {
            let Moment::Certain { whole, _held } = chaos.before(nth).unwrap() else {
                assert_ne!(nth % CERTAIN_EVERY, 0);
                continue;
            };
            whole_and_cut[usize::from(whole)] += 1;
            let lengths = || {
                let region = ram
                    .find_region(GuestAddress(chaos.storm().buffers))
                    .unwrap();
                let region = region
                    .file_offset()
                    .unwrap()
                    .file()
                    .metadata()
                    .unwrap()
                    .len();
                (file.metadata().unwrap().len() - steady, region)
            };
            let full = CHUNKS * PAGE;
            let before = lengths();
            assert_eq!(whole, before == (full, full));
            assert!(whole || before == (0, full) || before == (full, 0));
            std::thread::yield_now();
            assert_eq!(lengths(), before);
        }
        assert_eq!(whole_and_cut, [50, 50]);
        assert!(running.stop().unwrap().cuts() > 50);
        assert_eq!(file.metadata().unwrap().len(), steady + CHUNKS * PAGE);
    }
}
