//! [`Arena`]: reserved addresses in which parts of files are mapped and unmapped later.

#[cfg(all(test, target_os = "linux"))]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::Permissions;

use crate::host::{read_vma_limit, HostResources, VmaBudget};
use crate::sys::{self, to_u64, ReservedArena};

/// Reserved addresses in which parts of files are mapped and unmapped while the guest runs.
///
/// It is the host side of a window that the guest accesses. Examples are the DAX window of
/// virtio-fs, the host visible memory of virtio-gpu, and the shared memory of a vhost-user device
/// (`SHMEM_MAP`). The VMM registers all of it as one KVM slot
/// ([`host_address`](Self::host_address)), and maps parts of files in it at the request of the
/// device.
///
/// ```text
///   guest   ├─────────────── one KVM slot ───────────────┤
///   host  ▒ ├ ░░░ ├─ file 1 ─┤ ░░░░░░ ├─ file 2 ─┤ ░░░░ ┤ ▒      ▒ guard, ░ PROT_NONE
/// ```
///
/// An access of a vCPU to a page without a file ends like one to a
/// [protected block](crate::Unplugged::Protected): with an error or an MMIO exit. The same applies
/// to a page past the end of a file. Another process may truncate a file that is not sealed.
///
/// The arena is not a region of guest memory: the accesses of vm-memory do not reach it. A device
/// that receives an address in the window as a buffer gets an error.
///
/// An untrusted process may serve a file (FUSE). It can then delay the accesses of the guest
/// without limit, and also the calls for other files. Pass memfds of such processes only.
///
/// In a process that has called mlockall(2) with `MCL_FUTURE`, inaccessible addresses count against
/// `RLIMIT_MEMLOCK`. The limit must allow three times the size of the arena, and its alignment: a
/// file is first mapped elsewhere, and moved twice.
///
/// All files are mapped shared. Dropping the arena unmaps it: remove the KVM slot before.
/// Do not use it in a child of fork(2).
///
/// # Windows
///
/// Addresses without a file are placeholders. Windows 10 has them since version 1803.
/// On an older system, [`new`](Self::new) returns [`ArenaError::System`], whose source is of the
/// kind `Unsupported`. The library has not been tested with a hypervisor on Windows. Unmap a range
/// from the guest before [`unmap`](Self::unmap), and map it in the guest after [`map`](Self::map).
///
/// - A mapping stays until [`unmap`](Self::unmap) unmaps all of it. One call may unmap several
///   mappings. [`map`](Self::map) replaces nothing. To replace a mapping or a part of it, unmap all
///   of it first, and map again what stays. A call that would have to do this returns
///   [`ArenaError::Mapped`].
/// - A mapping consists of pages of 4 KiB. All offsets can be any multiple of it.
/// - The file must not end before the last page of the mapping. If it ends inside that page, the
///   rest of the page reads as zeroes. This was tried under Wine only. The system does not truncate
///   a local file that is mapped.
/// - If the system refuses to unmap one of several mappings, those before it stay unmapped.
///   [`mapped`](Self::mapped) lists all of them until another `unmap` succeeds.
/// - The arenas of a process have at most about 12,000 mappings in all. Windows has no such limit,
///   but each mapping takes memory of its kernel.
///
/// # Examples
///
/// ```
/// use vm_memory::Permissions;
/// use vm_memory_host::Arena;
///
/// let file = tempfile::tempfile()?;
/// file.set_len(0x8000)?;
/// // The DAX window, whose KVM slot has this host address.
/// let window = Arena::new(1 << 30)?;
/// let slot = (window.host_address(), window.size());
///
/// // FUSE_SETUPMAPPING: 16 KiB from offset 0x2000 of the file.
/// window.map(0x20_0000, 0x4000, &file, 0x2000, Permissions::ReadWrite)?;
/// assert_eq!(window.mapped(), [(0x20_0000, 0x4000)]);
/// // FUSE_REMOVEMAPPING
/// window.unmap(0x20_0000, 0x4000)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[doc(alias = "DAX")]
#[doc(alias = "virtio-fs")]
#[doc(alias = "virtio-gpu")]
#[doc(alias = "SHMEM_MAP")]
pub struct Arena {
    address: usize,
    size: u64,
    state: Mutex<State>,
}

/// An error of [`Arena`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// A range is empty, does not consist of whole pages, or is not inside the arena. Where a file
    /// with huge pages is mapped, these are the pages.
    #[error(
        "{len:#x} bytes at offset {offset:#x} of an arena of {size:#x} bytes are not whole pages \
        inside it; align the range"
    )]
    Range {
        /// The offset of the range in the arena, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The size of the arena in bytes.
        size: u64,
    },
    /// An arena cannot have this alignment.
    #[error("an arena cannot be aligned to {alignment:#x} bytes; pass a power of two")]
    Alignment {
        /// The alignment in bytes.
        alignment: u64,
    },
    /// The file has larger pages than the range, its offsets or the arena are aligned to.
    #[error(
        "cannot map {len:#x} bytes at offset {offset:#x} of an arena, from offset \
        {file_offset:#x} of a file with pages of {page_size:#x} bytes; align all three to the \
        pages, and the arena by Arena::with_alignment"
    )]
    FilePages {
        /// The offset of the range in the arena, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The offset in the file, in bytes.
        file_offset: u64,
        /// The page size of the file in bytes.
        page_size: u64,
    },
    /// A file is mapped in the range, or in a part of it ([Windows](Arena#windows)).
    #[error(
        "cannot change {len:#x} bytes at offset {offset:#x} of an arena: {mapped_len:#x} bytes are \
        mapped at offset {mapped_offset:#x}, and this system unmaps all of them or none; unmap \
        these first"
    )]
    Mapped {
        /// The offset of the range in the arena, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The offset of the mapping in the arena, in bytes.
        mapped_offset: u64,
        /// Its length in bytes.
        mapped_len: u64,
    },
    /// The guests of this process may not use more VMAs.
    #[error(
        "the arena has {pieces} mapped pieces, and the guests of this process may use no more \
        VMAs; {}",
        sys::VMA_REMEDY
    )]
    TooManyPieces {
        /// The number of mapped pieces.
        pieces: usize,
    },
    /// The system refused a call.
    #[error("cannot {what} {len:#x} bytes at offset {offset:#x} of an arena")]
    System {
        /// The operation.
        what: &'static str,
        /// The offset of the range in the arena, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The error of the system.
        source: io::Error,
    },
}

#[derive(Debug)]
struct State {
    reserved: ReservedArena,
    pieces: Pieces,
    vmas: VmaBudget,
}

impl Arena {
    /// Reserves `size` bytes of host addresses, aligned to a transparent huge page.
    ///
    /// Files with larger pages need [`with_alignment`](Self::with_alignment).
    ///
    /// # Errors
    ///
    /// Returns an [`ArenaError`] if the size is 0 or not whole pages, or if the guests of this
    /// process use too many VMAs. Also returns one if the system refuses the reservation, for
    /// example because of the limit of the address space.
    pub fn new(size: u64) -> Result<Self, ArenaError> {
        Self::with_alignment(size, sys::huge_page_size())
    }

    /// Reserves `size` bytes of host addresses, aligned to at least `alignment` bytes.
    ///
    /// Use it for files with huge pages of 1 GiB. The alignment is a power of two. If it is smaller
    /// than a transparent huge page, the result is that of [`new`](Self::new).
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory_host::Arena;
    ///
    /// let window = Arena::with_alignment(4 << 30, 1 << 30)?;
    /// assert!(window.host_address().is_multiple_of(1 << 30));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns [`ArenaError::Alignment`] if the alignment is not a power of two, and the errors of
    /// [`new`](Self::new). The reservation temporarily takes `alignment` more bytes of addresses.
    /// On Windows, the arena keeps them.
    pub fn with_alignment(size: u64, alignment: u64) -> Result<Self, ArenaError> {
        let (offset, len) = (0, size);
        let align = usize::try_from(alignment.max(sys::huge_page_size()))
            .ok()
            .filter(|_| alignment.is_power_of_two())
            .ok_or(ArenaError::Alignment { alignment })?;
        let whole = usize::try_from(size)
            .ok()
            .filter(|size| *size != 0 && size.is_multiple_of(sys::page_size()))
            .ok_or(ArenaError::Range { offset, len, size })?;
        read_vma_limit(&HostResources::current());
        let mut vmas = VmaBudget::default();
        if !vmas.try_take(VMAS_OF_EMPTY) {
            return Err(ArenaError::TooManyPieces { pieces: 0 });
        }
        let reserved = ReservedArena::new(whole, align).map_err(|source| ArenaError::System {
            what: "reserve",
            offset,
            len,
            source,
        })?;
        Ok(Self {
            address: reserved.host_address(),
            size,
            state: Mutex::new(State {
                reserved,
                pieces: Pieces::default(),
                vmas,
            }),
        })
    }

    /// Returns the host address of the first byte.
    ///
    /// An access where no file is mapped raises SIGSEGV, or an access violation on Windows.
    pub fn host_address(&self) -> usize {
        self.address
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Maps `len` bytes of `file` from `file_offset` at `offset` in the arena.
    ///
    /// Replaces everything that is mapped there, except on [Windows](#windows). An access of the
    /// guest reaches either the previous mapping or the new one. The arena does not keep the file
    /// open. With [`Permissions::No`], the call is [`unmap`](Self::unmap).
    ///
    /// On Linux, the file is mapped elsewhere, and the mapping is then moved into the arena.
    /// Another process that seals the file meanwhile causes an error, and the arena keeps all its
    /// addresses.
    ///
    /// # Aborts
    ///
    /// On Linux, aborts the process if the kernel has unmapped the range and then lacks memory for
    /// page tables. Another thread could get the addresses, and the guest would reach its memory.
    ///
    /// # Errors
    ///
    /// Returns an [`ArenaError`] and changes nothing if
    ///
    /// - the range is empty, not whole pages, or not inside the arena;
    /// - the address, the length or the offset in the file are not whole pages of the file;
    /// - the guests of this process use too many VMAs (on Windows, too many mappings);
    /// - the system refuses the file, for example because it is not open for the access;
    /// - the system cannot move its mapping, for example one of huge pages before Linux 5.16; or
    /// - something is mapped there, or the file is too short, on [Windows](#windows).
    pub fn map(
        &self,
        offset: u64,
        len: u64,
        file: &File,
        file_offset: u64,
        access: Permissions,
    ) -> Result<(), ArenaError> {
        let writable = match access {
            Permissions::Read => false,
            Permissions::Write | Permissions::ReadWrite => true,
            Permissions::No => return self.unmap(offset, len),
        };
        // Before the lock: a server of the file may delay this, but not the calls for other files.
        let page = sys::page_size_of(file).map_err(|source| ArenaError::System {
            what: "examine the file for",
            offset,
            len,
            source,
        })?;
        let pages = Some((page, file_offset));
        self.change("map", offset, len, pages, |reserved, offset, len| {
            reserved.map(offset, len, file, page, file_offset, writable)
        })
    }

    /// Makes a range inaccessible. Parts of it may already be inaccessible.
    ///
    /// On [Windows](#windows), a mapping must be inside the range, or outside of it.
    ///
    /// # Aborts
    ///
    /// Aborts the process under the condition that [`map`](Self::map) describes.
    ///
    /// # Errors
    ///
    /// Returns an [`ArenaError`] under the conditions that [`map`](Self::map) lists. On Windows, if
    /// the system refuses to unmap one of several mappings, those before it are unmapped.
    pub fn unmap(&self, offset: u64, len: u64) -> Result<(), ArenaError> {
        self.change("unmap", offset, len, None, ReservedArena::unmap)
    }

    /// Returns the mapped ranges as offset and length, in ascending order.
    pub fn mapped(&self) -> Vec<(u64, u64)> {
        let state = self.lock();
        let pieces = state.pieces.0.iter();
        pieces
            .map(|(start, piece)| (to_u64(*start), to_u64(piece.end.saturating_sub(*start))))
            .collect()
    }

    /// Changes a range with `change`. `file` is the page size of the file that is mapped there, and
    /// the offset in it.
    fn change(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        file: Option<(usize, u64)>,
        change: impl FnOnce(&mut ReservedArena, usize, usize) -> io::Result<()>,
    ) -> Result<(), ArenaError> {
        let mut state = self.lock();
        let State {
            reserved,
            pieces,
            vmas,
        } = &mut *state;
        let inside = |at: u64| {
            let at = usize::try_from(at).ok();
            at.filter(|at| *at <= reserved.len() && at.is_multiple_of(sys::page_size()))
        };
        let end = offset.checked_add(len).filter(|_| len != 0);
        let range = inside(offset).zip(end.and_then(inside));
        let range = range.filter(|(start, end)| !pieces.have_page_across(*start, *end));
        let (start, end) = range.ok_or(ArenaError::Range {
            offset,
            len,
            size: self.size,
        })?;
        if let Some((from, piece)) = pieces.in_the_way(start, end, file.is_some()) {
            return Err(ArenaError::Mapped {
                offset,
                len,
                mapped_offset: to_u64(from),
                mapped_len: to_u64(piece.end.saturating_sub(from)),
            });
        }
        if let Some((page, file_offset)) = file {
            let page_size = to_u64(page);
            let at = to_u64(self.address.saturating_add(start));
            let aligned = [at, len, file_offset];
            if !aligned.iter().all(|at| at.is_multiple_of(page_size)) {
                return Err(ArenaError::FilePages {
                    offset,
                    len,
                    file_offset,
                    page_size,
                });
            }
        }
        let needed = vmas_of(pieces.count_after(start, end, file.is_some()));
        if !vmas.try_take_for_guest(needed.saturating_sub(vmas.count())) {
            return Err(ArenaError::TooManyPieces {
                pieces: pieces.0.len(),
            });
        }
        let (from, to) = match file {
            Some(_) => (start, end),
            None => pieces.between(start, end, reserved.len()),
        };
        let result = change(reserved, from, to.saturating_sub(from));
        if result.is_ok() {
            pieces.cut(start, end);
            if let Some((page, _)) = file {
                pieces.0.insert(start, Piece { end, page });
            }
        }
        let needed = vmas_of(pieces.0.len());
        vmas.release(vmas.count().saturating_sub(needed));
        result.map_err(|source| ArenaError::System {
            what,
            offset,
            len,
            source,
        })
    }

    /// Poisoning is ignored: no code panics while it holds this lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The VMAs of an arena without mapped pieces: the addresses between two guards. The kernel merges
/// all three unless mlockall(2) was called after the arena was created.
const VMAS_OF_EMPTY: usize = 3;

/// Returns an upper bound of the VMAs of an arena: its pieces, and the addresses between them.
fn vmas_of(pieces: usize) -> usize {
    pieces.saturating_mul(2).saturating_add(VMAS_OF_EMPTY)
}

/// Disjoint mapped ranges by their start.
#[derive(Debug, Default)]
struct Pieces(BTreeMap<usize, Piece>);

/// A mapped range.
#[derive(Clone, Copy, Debug)]
struct Piece {
    end: usize,
    /// The page size of its file. The range consists of whole pages.
    page: usize,
}

impl Pieces {
    /// Returns the number of pieces after a range is replaced or removed.
    ///
    /// Removing pieces must need no VMAs: a guest that has used all of them has to do it.
    fn count_after(&self, start: usize, end: usize, is_mapped: bool) -> usize {
        let mut count = self.0.len().saturating_add(usize::from(is_mapped));
        for (piece_start, piece) in self.cut_by(start, end) {
            let kept =
                usize::from(piece_start < start).saturating_add(usize::from(end < piece.end));
            count = count.saturating_add(kept).saturating_sub(1);
        }
        count
    }

    /// Returns whether the start or the end of a range is inside a page of a mapped file.
    fn have_page_across(&self, start: usize, end: usize) -> bool {
        self.cut_by(start, end).any(|(piece_start, piece)| {
            [start, end].into_iter().any(|at| {
                (piece_start..piece.end).contains(&at)
                    && !at.saturating_sub(piece_start).is_multiple_of(piece.page)
            })
        })
    }

    /// Returns a piece that the system cannot change as requested, because pieces are whole there.
    fn in_the_way(&self, start: usize, end: usize, is_mapped: bool) -> Option<(usize, Piece)> {
        let is_cut = |from: usize, piece: Piece| from < start || end < piece.end;
        self.cut_by(start, end)
            .find(|(from, piece)| is_mapped || is_cut(*from, *piece))
            .filter(|_| sys::MAPPINGS_ARE_WHOLE)
    }

    /// Extends a range that is unmapped to the pieces before and after it.
    ///
    /// All addresses between two pieces are then one VMA. After mlockall(2), the kernel does not
    /// merge new mappings with older ones.
    fn between(&self, start: usize, end: usize, len: usize) -> (usize, usize) {
        let before = self.0.range(..start).next_back();
        let from = before.map_or(0, |(_, piece)| piece.end.min(start));
        let last = self.0.range(..end).next_back();
        let to = match last {
            Some((_, piece)) if piece.end > end => end,
            _ => self.0.range(end..).next().map_or(len, |(next, _)| *next),
        };
        (from, to)
    }

    /// Returns the pieces that are partly or wholly in a range, in descending order.
    fn cut_by(&self, start: usize, end: usize) -> impl Iterator<Item = (usize, Piece)> + '_ {
        let before = self.0.range(..end).rev();
        before
            .map(|(start, piece)| (*start, *piece))
            .take_while(move |(_, piece)| piece.end > start)
    }

    /// Removes a range. Pieces that are partly in it keep their other parts.
    fn cut(&mut self, start: usize, end: usize) {
        let cut: Vec<_> = self.cut_by(start, end).collect();
        for (piece_start, piece) in cut {
            self.0.remove(&piece_start);
            if piece_start < start {
                let before = Piece {
                    end: start,
                    ..piece
                };
                self.0.insert(piece_start, before);
            }
            if end < piece.end {
                self.0.insert(end, piece);
            }
        }
    }
}
