//! privcmd: areas, and the frames that are mapped in them.

#![expect(unsafe_code, reason = "reads the arguments of ioctls, and maps pages")]
#![expect(
    clippy::disallowed_methods,
    reason = "the arguments of an ioctl are not guest memory"
)]

use std::ops::Range;

use libc::{c_int, c_void};

use super::call_log::Call;
use super::grants::shared;
use super::kernel::{covered, Kernel};
use super::memory::{self, Place};
use crate::environment::PAGE;

/// The memory of a process that maps frames.
#[derive(Debug)]
pub(super) struct ForeignArea {
    addr: usize,
    prot: c_int,
    pages: Vec<Frame>,
    /// Whether a request for the whole area was made.
    requested: bool,
    excused: bool,
}

/// A page of an area.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Frame {
    /// Not mapped to a frame yet. An access raises SIGBUS.
    Absent,
    Mapped,
    Unmapped,
}

impl ForeignArea {
    pub fn is_unmapped(&self) -> bool {
        self.pages.iter().all(|page| *page == Frame::Unmapped)
    }

    pub fn leak(&self) -> Option<String> {
        let pages = self.pages.len();
        (!self.excused).then(|| format!("an area of {pages} frames is still mapped"))
    }

    fn end(&self) -> usize {
        self.addr + self.pages.len() * PAGE
    }
}

/// `struct privcmd_mmapbatch_v2`.
#[derive(Clone, Copy)]
#[repr(C)]
struct BatchRequest {
    count: u32,
    domain: u16,
    addr: u64,
    frames: *const u64,
    errors: *mut i32,
}

impl Kernel {
    /// Handles `mmap` of a privcmd, whose file is `fd`.
    ///
    /// # Safety
    ///
    /// Nothing relies on memory at the place, if the flags contain `MAP_FIXED`.
    pub unsafe fn mmap_frames(&mut self, fd: c_int, place: Place) -> Result<usize, i32> {
        let writing = place.prot & libc::PROT_WRITE != 0;
        let len = place.len;
        self.log.enter(Call::Mmap { len, writing })?;
        // The memfd of the device is empty, so an access to a page raises SIGBUS.
        // SAFETY: nothing relies on memory at the place (this function's contract).
        let addr = unsafe { memory::mmap(shared(place), fd, 0) }?;
        self.foreign.push(ForeignArea {
            addr,
            prot: place.prot,
            pages: vec![Frame::Absent; len.div_ceil(PAGE)],
            requested: false,
            excused: false,
        });
        Ok(addr)
    }

    /// Handles `MMAPBATCH_V2`.
    ///
    /// # Safety
    ///
    /// The argument points to the structure of the request.
    pub unsafe fn map_frames(&mut self, argument: *mut c_void) -> Result<(), i32> {
        // SAFETY: the argument is a `BatchRequest` (this function's contract).
        let request = unsafe { argument.cast::<BatchRequest>().read_unaligned() };
        let count = usize::try_from(request.count).map_err(|_| libc::EINVAL)?;
        self.log.enter(Call::MapFrames(count))?;
        let addr = usize::try_from(request.addr).map_err(|_| libc::EFAULT)?;
        let end = addr.checked_add(count * PAGE).ok_or(libc::EINVAL)?;
        let found = self
            .foreign
            .iter()
            .position(|area| area.addr <= addr && end <= area.end());
        let number = found.filter(|_| count > 0).ok_or(libc::EINVAL)?;
        let area = self.foreign.get(number).ok_or(libc::EINVAL)?;
        let pages = covered(area.addr, area.pages.len(), PAGE, &(addr..end));
        let whole = pages.len() == area.pages.len();
        let absent = area
            .pages
            .get(pages.clone())
            .is_some_and(|pages| pages.iter().all(|page| *page == Frame::Absent));
        // The driver maps whole pages of the host.
        let parts = [addr - area.addr, count * PAGE];
        let aligned = parts.iter().all(|len| len.is_multiple_of(self.host_page));
        if !absent || !aligned || (!area.requested && !whole) {
            return Err(libc::EINVAL);
        }
        let prot = area.prot;
        let mut paged_out = false;
        for (index, page) in pages.enumerate() {
            // SAFETY: `count` frames are there (this function's contract).
            let frame = unsafe { request.frames.wrapping_add(index).read_unaligned() };
            let error = match self.frame_error(request.domain, frame) {
                Ok(of_domain) => {
                    let place = Place {
                        addr: addr + index * PAGE,
                        len: PAGE,
                        prot,
                        flags: libc::MAP_FIXED,
                    };
                    // SAFETY: the page is in the area, whose owner requests the frame there.
                    unsafe { self.show(place, &[of_domain], PAGE) }?;
                    if let Some(area) = self.foreign.get_mut(number) {
                        area.pages[page] = Frame::Mapped;
                    }
                    0
                }
                Err(errno) => {
                    paged_out |= errno == libc::ENOENT;
                    -errno
                }
            };
            // SAFETY: `count` errors have room there (this function's contract).
            unsafe { request.errors.wrapping_add(index).write_unaligned(error) };
        }
        if let Some(area) = self.foreign.get_mut(number) {
            area.requested = true;
        }
        if paged_out {
            return Err(libc::ENOENT);
        }
        Ok(())
    }

    /// Returns the page of a frame, or the error of mapping it.
    fn frame_error(&mut self, domain: u16, frame: u64) -> Result<usize, i32> {
        if u32::from(domain) != self.domain {
            return Err(libc::ESRCH);
        }
        if let Some(requests) = self.paged_out.get_mut(&frame) {
            if *requests > 0 {
                *requests -= 1;
                return Err(libc::ENOENT);
            }
        }
        self.page_of(frame).ok_or(libc::EINVAL)
    }

    /// Handles `munmap` of areas of frames. Returns whether the memory contained a part of one.
    pub fn unmap_foreign(&mut self, memory: &Range<usize>) -> Result<bool, i32> {
        let touched =
            |area: &ForeignArea| !covered(area.addr, area.pages.len(), PAGE, memory).is_empty();
        if !self.foreign.iter().any(touched) {
            return Ok(false);
        }
        let entered = self.log.enter(Call::Munmap(memory.len()));
        for area in self.foreign.iter_mut().filter(|area| touched(area)) {
            if entered.is_err() {
                area.excused = true;
                continue;
            }
            let pages = covered(area.addr, area.pages.len(), PAGE, memory);
            for page in area.pages.iter_mut().skip(pages.start).take(pages.len()) {
                *page = Frame::Unmapped;
            }
        }
        self.collect();
        entered.map(|()| true)
    }
}
