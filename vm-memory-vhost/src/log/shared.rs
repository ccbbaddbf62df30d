//! [`SharedLog`]: a dirty log in memory that is shared with a peer.

use core::num::NonZeroUsize;
use core::sync::atomic::{fence, Ordering};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::arithmetic::{to_u64, words_of};
use vm_memory::dirty::LogWords;
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    fault, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, VolatileMemory,
    VolatileMemoryError, VolatileSlice,
};

use super::LogError;

/// The size of a page of a vhost log in bytes: 4 KiB, whatever the page size of the host.
pub const LOG_PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// The alignment of the mapping in the file. It is a multiple of all page sizes of Linux hosts.
const MAPPING_ALIGNMENT: u64 = 1 << 16;
/// The number of bytes in a word.
const WORD: usize = 8;
/// The number of bytes that a harvest skips at once, if they are 0.
const BLOCK: usize = 4096;

/// A dirty log in the wire format of vhost, in a file that another process maps as well.
///
/// Bit `n % 8` of byte `n / 8` stands for the 4 KiB page at guest address `n * 4096` (vhost-user
/// specification, "Migration"). A back end sets bits by atomic operations, in the order of the
/// memory model: after the page was written. A front end reads and clears them at the same time.
///
/// # Files of an untrusted peer
///
/// On Linux, [`map`](Self::map) accepts only a memfd on tmpfs that no peer can truncate, because it
/// has the seal `F_SEAL_SHRINK` of fcntl(2). Front ends send such a memfd. No file that the peer
/// serves itself (FUSE) can have the seal. hugetlbfs is refused: on an access to a page for which
/// it has no huge page, the kernel raises SIGBUS. It also does so for a missing page of a memfd if
/// the commit limit is reached (`vm.overcommit_memory` = 2). Call
/// [`fault::install`](vm_memory::fault::install) for this case.
///
/// [`map_unsealed`](Self::map_unsealed) accepts any file:
///
/// - The peer may truncate it, or take the huge pages that it needs. Call
///   [`fault::install`](vm_memory::fault::install): an access past the end or to a missing page
///   then returns an error, and does not end the process.
/// - The peer may serve it. The call, each mark, and the drop of the log can then wait without
///   limit.
///
/// # Examples
///
/// A front end creates a log of 16 MiB of memory, and harvests it in each round of a migration:
///
/// ```
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::dirty::DirtyMemory;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_vhost::log::SharedLog;
///
/// let memory: GuestMemoryMmap<AtomicBitmap> =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)])?;
/// let size = SharedLog::size_for(&memory);
/// let log = SharedLog::create(size)?;
/// let file = log.file();
/// // … VHOST_USER_SET_LOG_BASE with the file, the offset 0 and the size …
/// # let _ = file;
///
/// let (mut dirty, mut words) = (DirtyMemory::new(), Vec::new());
/// dirty.harvest_with(&memory, &[log.harvest(&mut words)?]);
/// assert_eq!(dirty.total_pages(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "VHOST_USER_SET_LOG_BASE")]
#[doc(alias = "VHOST_USER_PROTOCOL_F_LOG_SHMFD")]
#[doc(alias = "VHOST_LOG_PAGE")]
#[derive(Debug)]
pub struct SharedLog {
    mapping: MmapRegion<()>,
    file: Arc<File>,
    /// The offset of the log in the mapping, a multiple of 8.
    offset: usize,
    /// The number of bytes. The mapping contains all of them.
    size: usize,
}

impl SharedLog {
    /// Maps the log of `size` bytes at `offset` in a sealed file, for reading and writing.
    ///
    /// The file, the offset and the size are those of `VHOST_USER_SET_LOG_BASE`. The log owns the
    /// file.
    ///
    /// # Errors
    ///
    /// - [`LogError::Unsealed`] on Linux, unless the file has the seal `F_SEAL_SHRINK`. The error
    ///   returns the file.
    /// - [`LogError::HugePages`] on Linux, unless fstatfs(2) reports that the file is on tmpfs.
    /// - The errors of [`map_unsealed`](Self::map_unsealed).
    pub fn map(file: impl Into<OwnedFd>, offset: u64, size: u64) -> Result<Self, LogError> {
        let file = file.into();
        #[cfg(target_os = "linux")]
        if !cannot_shrink(&file) {
            return Err(LogError::Unsealed { file });
        }
        // The seal proves that the file has no server, for which fstatfs(2) could wait.
        #[cfg(target_os = "linux")]
        if !is_on_tmpfs(&file) {
            return Err(LogError::HugePages { file });
        }
        Self::map_unsealed(file, offset, size)
    }

    /// Maps the log of `size` bytes at `offset` in any file, for reading and writing.
    ///
    /// Use it only if the peer is [trusted](Self#files-of-an-untrusted-peer).
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory_vhost::log::SharedLog;
    ///
    /// let file = tempfile::tempfile()?;
    /// file.set_len(0x1000)?;
    /// let log = SharedLog::map_unsealed(file, 0, 0x1000)?;
    /// assert_eq!(log.pages(), 0x8000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`LogError::Empty`] if the log has no bytes.
    /// - [`LogError::Misaligned`] if it does not begin at a multiple of 8 bytes.
    /// - [`LogError::TooLarge`] if its end exceeds 64 bits, or the address space of the process.
    /// - [`LogError::Map`] if the file ends before it, or if `mmap(2)` fails.
    pub fn map_unsealed(
        file: impl Into<OwnedFd>,
        offset: u64,
        size: u64,
    ) -> Result<Self, LogError> {
        if size == 0 {
            return Err(LogError::Empty);
        }
        if !offset.is_multiple_of(8) {
            return Err(LogError::Misaligned { offset });
        }
        let too_large = LogError::TooLarge { offset, size };
        let inside = offset % MAPPING_ALIGNMENT;
        let start = offset.saturating_sub(inside);
        let (Some(_), Some(mapped)) = (offset.checked_add(size), inside.checked_add(size)) else {
            return Err(too_large);
        };
        let (Ok(mapped), Ok(inside), Ok(size)) = (
            usize::try_from(mapped),
            usize::try_from(inside),
            usize::try_from(size),
        ) else {
            return Err(too_large);
        };
        let file = Arc::new(File::from(file.into()));
        let mapping = MmapRegion::from_file(FileOffset::from_arc(file.clone(), start), mapped);
        Ok(Self {
            mapping: mapping.map_err(LogError::Map)?,
            file,
            offset: inside,
            size,
        })
    }

    /// Creates a log of `size` bytes without marks, in a memfd. [`size_for`](Self::size_for)
    /// returns the size.
    ///
    /// A front end sends the [file](Self::file), the offset 0 and the size. The length of the memfd
    /// is sealed, so a back end cannot truncate it (memfd_create(2)).
    ///
    /// # Errors
    ///
    /// - [`LogError::Empty`] if `size` is 0.
    /// - [`LogError::Create`] if the kernel refuses the memfd, or the process may not create a file
    ///   of this size (`EFBIG`, `RLIMIT_FSIZE`).
    /// - The errors of [`map_unsealed`](Self::map_unsealed).
    #[cfg(target_os = "linux")]
    pub fn create(size: u64) -> Result<Self, LogError> {
        if size == 0 {
            return Err(LogError::Empty);
        }
        let file = sealed_memfd(size).map_err(LogError::Create)?;
        Self::map_unsealed(file, 0, size)
    }

    /// Returns the file that contains the log.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the number of bytes of a log for all pages of a memory: a multiple of 8.
    pub fn size_for<M: GuestMemoryBackend + ?Sized>(memory: &M) -> u64 {
        // At most 2^52 pages, so that nothing overflows.
        pages_of(memory).div_ceil(64).saturating_mul(8)
    }

    /// Returns the number of pages for which the log has bits.
    pub fn pages(&self) -> u64 {
        to_u64(self.size).saturating_mul(8)
    }

    /// Reads and clears the log, and returns it for [`DirtyMemory::harvest_with`].
    ///
    /// `words` is a buffer, which a later call reuses. Its old contents are dropped.
    ///
    /// Each mark is in one result: that of this call or of a later one. Read the pages after the
    /// call: the data of all marks that it cleared are then visible.
    ///
    /// # Errors
    ///
    /// - [`LogError::Inaccessible`] if the log cannot be read. Marks may be lost then: treat all
    ///   pages as dirty ([`DirtyMemory::insert_all`]).
    /// - [`LogError::OutOfMemory`] if memory runs out. No mark is cleared then.
    ///
    /// [`DirtyMemory::harvest_with`]: vm_memory::dirty::DirtyMemory::harvest_with
    /// [`DirtyMemory::insert_all`]: vm_memory::dirty::DirtyMemory::insert_all
    pub fn harvest<'w>(&self, words: &'w mut Vec<u64>) -> Result<LogWords<'w>, LogError> {
        let count = self.size.div_ceil(WORD);
        words.clear();
        words
            .try_reserve(count)
            .map_err(|_| LogError::OutOfMemory { words: count })?;
        words.resize(count, 0);
        self.harvest_into(words).map_err(LogError::Inaccessible)?;
        // The back end wrote a page before it marked it, and this thread reads it after the mark.
        fence(Ordering::SeqCst);
        Ok(LogWords::new(GuestAddress(0), words, LOG_PAGE_SIZE))
    }

    fn harvest_into(&self, words: &mut [u64]) -> Result<(), VolatileMemoryError> {
        let bits = self.bits()?;
        let mut at = 0usize;
        for words in words.chunks_mut(BLOCK / WORD) {
            let len = BLOCK.min(self.size.saturating_sub(at));
            if !bits.subslice(at, len)?.is_zero()? {
                for (number, word) in words.iter_mut().enumerate() {
                    *word = take(&bits, at.saturating_add(number.saturating_mul(WORD)))?;
                }
            }
            at = at.saturating_add(BLOCK);
        }
        Ok(())
    }

    /// Marks the pages of the `len` bytes at guest address `addr`, after they were written.
    ///
    /// Returns whether all of them were marked.
    pub(super) fn mark(&self, addr: usize, len: usize) -> bool {
        let Some(more) = len.checked_sub(1) else {
            return true;
        };
        let first = addr / LOG_PAGE_SIZE;
        let last = addr.saturating_add(more) / LOG_PAGE_SIZE;
        let Ok(bits) = self.bits() else {
            return false;
        };
        let mut is_marked = self.has_page(last);
        for (word, pages) in words_of(first..last.saturating_add(1)) {
            let at = word.saturating_mul(WORD);
            if at >= self.size {
                break;
            }
            // After a fault, the other pages are still marked. The writer of the page reads
            // `fault::last` for its own faults.
            is_marked &= fault::keep_last(|| or(&bits, at, pages)).is_ok();
        }
        is_marked
    }

    /// Returns whether the log has bits for all of the `len` bytes at guest address `addr`.
    pub(super) fn tracks(&self, addr: usize, len: usize) -> bool {
        len == 0
            || addr
                .checked_add(len.saturating_sub(1))
                .is_some_and(|last| self.has_page(last / LOG_PAGE_SIZE))
    }

    /// Returns whether the page of guest address `addr` is marked.
    pub(super) fn is_marked(&self, addr: usize) -> bool {
        let page = addr / LOG_PAGE_SIZE;
        let load = |bits: VolatileSlice<'_>| bits.load::<u8>(page / 8, Ordering::Acquire);
        let byte = fault::keep_last(|| self.bits().and_then(load));
        byte.is_ok_and(|byte| byte & (1 << (page % 8)) != 0)
    }

    fn has_page(&self, page: usize) -> bool {
        page / 8 < self.size
    }

    fn bits(&self) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        self.mapping.get_slice(self.offset, self.size)
    }
}

/// Returns whether a file has a seal that forbids to truncate it. Does not wait for a server.
#[cfg(target_os = "linux")]
fn cannot_shrink(file: &OwnedFd) -> bool {
    let seals = rustix::fs::fcntl_get_seals(file);
    seals.is_ok_and(|seals| seals.contains(rustix::fs::SealFlags::SHRINK))
}

/// Returns whether a file is on tmpfs, whose pages are allocated on access. hugetlbfs also has
/// seals, but a limited number of pages.
#[cfg(target_os = "linux")]
fn is_on_tmpfs(file: &OwnedFd) -> bool {
    /// `TMPFS_MAGIC` (Linux `include/uapi/linux/magic.h`).
    const TMPFS: i128 = 0x01021994;

    rustix::fs::fstatfs(file).is_ok_and(|stat| i128::from(stat.f_type) == TMPFS)
}

/// Creates a memfd of `size` zeroes whose length cannot change.
///
/// No process can execute it, or make it executable (`MFD_NOEXEC_SEAL`, Linux 6.3). Before Linux
/// 6.3, its owner could set the execute permission again.
#[cfg(target_os = "linux")]
fn sealed_memfd(size: u64) -> std::io::Result<OwnedFd> {
    use rustix::fs::{fchmod, fcntl_add_seals, ftruncate, memfd_create};
    use rustix::fs::{MemfdFlags, Mode, SealFlags};
    use rustix::io::Errno;

    // ftruncate(2) would raise SIGXFSZ, which ends the process by default.
    if file_size_limit().is_some_and(|limit| size > limit) {
        return Err(Errno::FBIG.into());
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let name = c"vhost-log";
    let file = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not support the flag, and makes the memfd executable.
        Err(Errno::INVAL) => {
            let file = memfd_create(name, flags)?;
            fchmod(&file, Mode::from_raw_mode(0o666))?;
            file
        }
        result => result?,
    };
    ftruncate(&file, size)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Returns the length to which this process may extend a file.
///
/// Returns `None` if it is not limited, or if a seccomp filter refuses the call.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "rustix has no getrlimit that can fail")]
fn file_size_limit() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: getrlimit(2) writes one `rlimit` to its argument, a live exclusive reference to one.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) };
    (result == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Returns the number of pages from guest address 0 up to the last address of a memory.
pub(super) fn pages_of<M: GuestMemoryBackend + ?Sized>(memory: &M) -> u64 {
    match memory.num_regions() {
        0 => 0,
        _ => (memory.last_addr().0 / 4096).saturating_add(1),
    }
}

/// Sets bits of the word at an offset, whether they are set or not. Bits past the end are ignored.
///
/// The peer may harvest without a fence. So the read-modify-write is unconditional: the one that
/// clears the bit then acquires it, and the data with it.
fn or(bits: &VolatileSlice<'_>, at: usize, pages: u64) -> Result<(), VolatileMemoryError> {
    if at.saturating_add(WORD) <= bits.len() {
        return bits
            .atomic_fetch_or(pages.to_le(), at, Ordering::SeqCst)
            .map(drop);
    }
    for (at, pages) in (at..bits.len()).zip(pages.to_le_bytes()) {
        if pages != 0 {
            bits.atomic_fetch_or(pages, at, Ordering::SeqCst)?;
        }
    }
    Ok(())
}

/// Reads and clears the word at an offset.
fn take(bits: &VolatileSlice<'_>, at: usize) -> Result<u64, VolatileMemoryError> {
    if at.saturating_add(WORD) <= bits.len() {
        return match bits.load::<u64>(at, Ordering::Relaxed)? {
            0 => Ok(0),
            _ => bits
                .atomic_swap(0u64, at, Ordering::SeqCst)
                .map(u64::from_le),
        };
    }
    let mut bytes = [0; WORD];
    for (at, byte) in (at..bits.len()).zip(&mut bytes) {
        *byte = bits.atomic_swap(0u8, at, Ordering::SeqCst)?;
    }
    Ok(u64::from_le_bytes(bytes))
}
