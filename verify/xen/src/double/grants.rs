//! gntdev: the table of maps, their areas, and the mappings of the hypervisor.

#![expect(unsafe_code, reason = "reads the arguments of ioctls, and maps pages")]
#![expect(
    clippy::disallowed_methods,
    reason = "the arguments of an ioctl are not guest memory"
)]

use std::ops::Range;
use std::os::fd::AsRawFd;

use libc::c_void;

use super::call_log::Call;
use super::kernel::{covered, whole_pages, Grant, Kernel};
use super::memory::{self, Place};
use super::numbers::{
    COPY_DEST_IS_GRANT, COPY_SOURCE_IS_GRANT, MAP_GRANT_REF_SIZE, STATUS_BAD_DOMAIN,
    STATUS_BAD_REFERENCE, STATUS_PERMISSION,
};
use crate::environment::{Access, Host, PAGE};

/// A grant as a request names it: domain and reference.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Named {
    domain: u32,
    reference: u32,
}

/// A page that the hypervisor has mapped, and whether for writing.
type Hold = Option<bool>;

/// The memory of a process that maps a [`Map`].
#[derive(Debug)]
struct Area {
    addr: usize,
    /// Whether each page is still mapped.
    pages: Vec<bool>,
}

/// An entry of the table of an open gntdev.
#[derive(Debug)]
pub(super) struct Map {
    /// The inode of the open file.
    device: u64,
    /// The offset in the file, in pages.
    index: usize,
    grants: Vec<Named>,
    holds: Vec<Hold>,
    in_table: bool,
    area: Option<Area>,
    /// Whether the grants were mapped for reading only. They cannot be mapped for writing later.
    was_read_only: bool,
    /// Whether an injected fault kept the caller from releasing it.
    excused: bool,
}

impl Map {
    fn end(&self) -> usize {
        self.index + self.grants.len()
    }

    /// Returns whether each mapping of a reference is for writing. Does not count a mapping that an
    /// injected fault kept the caller from releasing.
    pub fn holds(&self, reference: u32) -> impl Iterator<Item = bool> + '_ {
        let pairs = self.grants.iter().zip(&self.holds);
        pairs.filter_map(move |(named, hold)| {
            hold.filter(|_| named.reference == reference && !self.excused)
        })
    }

    pub fn is_referred_to(&self) -> bool {
        self.in_table || self.area.is_some()
    }

    pub fn leak(&self) -> Option<String> {
        if self.excused {
            return None;
        }
        let references: Vec<_> = self.grants.iter().map(|named| named.reference).collect();
        let state = match (self.in_table, self.area.is_some()) {
            (true, true) => "mapped, and in the table",
            (true, false) => "in the table",
            _ => "mapped",
        };
        Some(format!("grants {references:?} are still {state}"))
    }
}

/// `struct ioctl_gntdev_map_grant_ref` without its references.
#[derive(Clone, Copy)]
#[repr(C)]
struct MapRequest {
    count: u32,
    pad: u32,
    index: u64,
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[derive(Clone, Copy)]
#[repr(C)]
struct UnmapRequest {
    index: u64,
    count: u32,
    pad: u32,
}

/// `struct ioctl_gntdev_grant_copy`.
#[derive(Clone, Copy)]
#[repr(C)]
struct CopyRequest {
    count: u32,
    segments: *mut Segment,
}

/// `struct gntdev_grant_copy_segment`. The unions are two words: a pointer, or a foreign page. The
/// pointers align it, so it has 24 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Segment {
    source: [u8; 8],
    dest: [u8; 8],
    len: u16,
    flags: u16,
    status: i16,
}

impl Segment {
    /// Returns reference, offset and domain of one side.
    fn foreign(side: [u8; 8]) -> (u32, u16, u32) {
        let [a, b, c, d, e, f, g, h] = side;
        let reference = u32::from_ne_bytes([a, b, c, d]);
        let offset = u16::from_ne_bytes([e, f]);
        (reference, offset, u32::from(u16::from_ne_bytes([g, h])))
    }
}

impl Kernel {
    /// Handles `MAP_GRANT_REF`.
    ///
    /// # Safety
    ///
    /// The argument points to the structure of the request.
    pub unsafe fn map_grants(&mut self, device: u64, argument: *mut c_void) -> Result<(), i32> {
        let request = argument.cast::<MapRequest>();
        // SAFETY: the argument begins with a `MapRequest` (this function's contract).
        let MapRequest { count, pad, .. } = unsafe { request.read_unaligned() };
        self.check_pad(pad);
        let mut grants = Vec::new();
        if (1..=self.limit).contains(&count) {
            // SAFETY: the references are after the head, in the same object.
            let mut from = unsafe { request.add(1) }.cast::<Named>();
            for _ in 0..count {
                // SAFETY: `count` references are in the argument (this function's contract).
                grants.push(unsafe { from.read_unaligned() });
                from = from.wrapping_add(1);
            }
        }
        let references = grants.iter().map(|named| named.reference).collect();
        self.log.enter(Call::MapGrants(references))?;
        if grants.is_empty() {
            return Err(libc::EINVAL);
        }
        let index = self.free_index(device, grants.len());
        self.maps.push(Map {
            device,
            index,
            holds: vec![None; grants.len()],
            grants,
            in_table: true,
            area: None,
            was_read_only: false,
            excused: false,
        });
        // The driver writes the request and the first reference back.
        let mut back = [0u8; MAP_GRANT_REF_SIZE];
        // SAFETY: the argument is at least so large, since it has a reference.
        unsafe { std::ptr::copy_nonoverlapping(argument.cast(), back.as_mut_ptr(), back.len()) };
        let offset = u64::try_from(index * self.host_page).map_err(|_| libc::EINVAL)?;
        back[8..16].copy_from_slice(&offset.to_ne_bytes());
        // SAFETY: the argument is at least so large, and writable (this function's contract).
        unsafe { std::ptr::copy_nonoverlapping(back.as_ptr(), argument.cast(), back.len()) };
        Ok(())
    }

    /// Notes a mistake if the padding of a request is not zero: a later kernel may use it.
    fn check_pad(&mut self, pad: u32) {
        if pad != 0 {
            self.log
                .mistake(format!("the padding of a request is {pad:#x}"));
        }
    }

    /// Returns the first gap of `count` pages in the table of a device.
    fn free_index(&self, device: u64, count: usize) -> usize {
        let mut used: Vec<_> = self
            .maps
            .iter()
            .filter(|map| map.device == device && map.in_table)
            .map(|map| map.index..map.end())
            .collect();
        used.sort_by_key(|range| range.start);
        let mut index = 0;
        for range in used {
            if index + count <= range.start {
                break;
            }
            index = range.end;
        }
        index
    }

    /// Handles `UNMAP_GRANT_REF`.
    ///
    /// # Safety
    ///
    /// The argument points to the structure of the request.
    pub unsafe fn unmap_grants(&mut self, device: u64, argument: *mut c_void) -> Result<(), i32> {
        // SAFETY: the argument is an `UnmapRequest` (this function's contract).
        let request = unsafe { argument.cast::<UnmapRequest>().read_unaligned() };
        self.check_pad(request.pad);
        let entered = self.log.enter(Call::UnmapGrants(request.count));
        let count = usize::try_from(request.count).map_err(|_| libc::EINVAL)?;
        let host_page = self.host_page;
        let map = self.maps.iter_mut().find(|map| {
            let offset = u64::try_from(map.index * host_page).ok();
            map.device == device && map.in_table && offset == Some(request.index)
        });
        let result = match map {
            None => Err(format!(
                "UNMAP_GRANT_REF of {:#x}, which is not in the table",
                request.index
            )),
            Some(map) if count != 0 && count != map.grants.len() => Err(format!(
                "UNMAP_GRANT_REF of {count} of {} grants",
                map.grants.len()
            )),
            Some(map) => {
                map.excused |= entered.is_err();
                map.in_table = entered.is_err();
                Ok(())
            }
        };
        entered?;
        self.collect();
        result.map_err(|mistake| {
            self.log.mistake(mistake);
            libc::ENOENT
        })
    }

    /// Handles `mmap` of a gntdev.
    ///
    /// # Safety
    ///
    /// Nothing relies on memory at the place, if the flags contain `MAP_FIXED`.
    pub unsafe fn mmap_grants(
        &mut self,
        device: u64,
        place: Place,
        offset: i64,
    ) -> Result<usize, i32> {
        let writing = place.prot & libc::PROT_WRITE != 0;
        let len = place.len;
        self.log.enter(Call::Mmap { len, writing })?;
        if writing && place.flags & libc::MAP_SHARED == 0 {
            return Err(libc::EINVAL);
        }
        let count = len.div_ceil(self.host_page);
        let found = self.maps.iter().position(|map| {
            let at = i64::try_from(map.index * self.host_page).ok();
            let fits = map.grants.len() == count && at == Some(offset);
            map.device == device && map.in_table && fits
        });
        let number = found.ok_or(libc::EINVAL)?;
        let map = self.maps.get(number).ok_or(libc::EINVAL)?;
        if map.area.is_some() || (writing && map.was_read_only) {
            return Err(libc::EINVAL);
        }
        let granted: Vec<Option<Grant>> = map
            .grants
            .iter()
            .map(|named| self.granted(named.domain, named.reference))
            .map(|grant| grant.filter(|grant| !writing || grant.access == Access::ReadWrite))
            .collect();
        let whole = granted.iter().all(Option::is_some);
        // Only the hypervisor of a paravirtualized host undoes the mappings that succeeded.
        if whole || self.host == Host::AutoTranslated {
            let map = self.maps.get_mut(number).ok_or(libc::EINVAL)?;
            map.was_read_only |= !writing;
            for (hold, grant) in map.holds.iter_mut().zip(&granted) {
                *hold = grant.map(|_| writing);
            }
        }
        let pages: Option<Vec<_>> = granted
            .iter()
            .map(|grant| Some(grant.as_ref()?.page))
            .collect();
        let pages = pages.ok_or(libc::EINVAL)?;
        // SAFETY: nothing relies on memory at the place (this function's contract).
        let addr = unsafe { self.show(place, &pages, self.host_page) }?;
        let map = self.maps.get_mut(number).ok_or(libc::EINVAL)?;
        map.area = Some(Area {
            addr,
            pages: vec![true; count],
        });
        Ok(addr)
    }

    /// Simulates another thread that maps memory in the hole that a failed `mmap` has left.
    ///
    /// The kernel unmaps the memory at a fixed address before it calls the driver.
    ///
    /// # Safety
    ///
    /// Nothing relies on memory at the place.
    pub unsafe fn take_hole(&mut self, place: Place) {
        let other = Place {
            prot: libc::PROT_NONE,
            flags: libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            ..place
        };
        // SAFETY: nothing relies on memory at the place (this function's contract).
        if let Ok(addr) = unsafe { memory::mmap(other, -1, 0) } {
            self.holes.push(addr..addr + place.len);
        }
    }

    /// Records a mistake if `munmap` concerns memory of another thread.
    pub fn check_holes(&mut self, memory: &Range<usize>) {
        let concerned = |hole: &Range<usize>| hole.start < memory.end && memory.start < hole.end;
        if self.holes.iter().any(concerned) {
            self.log
                .mistake("munmap of memory that another thread mapped".to_owned());
        }
    }

    /// Maps pages of the domain at a distance of `stride`. Returns the address of the first.
    ///
    /// # Safety
    ///
    /// Nothing relies on memory at the place, if the flags contain `MAP_FIXED`.
    pub unsafe fn show(&self, place: Place, pages: &[usize], stride: usize) -> Result<usize, i32> {
        let ram = self.ram().as_raw_fd();
        let offset = |page: usize| i64::try_from(page * PAGE).map_err(|_| libc::EINVAL);
        let first = *pages.first().ok_or(libc::EINVAL)?;
        let addr = if stride == PAGE {
            // Consecutive pages need one call, which extends past the memfd if there are more.
            // SAFETY: nothing relies on memory at the place (this function's contract).
            unsafe { memory::mmap(shared(place), ram, offset(first)?) }?
        } else {
            // The rest of a page of the host does not belong to the domain.
            let rest = Place {
                prot: libc::PROT_NONE,
                flags: place.flags & libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                ..place
            };
            // SAFETY: nothing relies on memory at the place (this function's contract).
            unsafe { memory::mmap(rest, -1, 0) }?
        };
        for (number, page) in pages.iter().enumerate() {
            if stride != PAGE || *page != first + number {
                let one = Place {
                    addr: addr + number * stride,
                    len: PAGE,
                    flags: place.flags | libc::MAP_FIXED,
                    ..place
                };
                // SAFETY: the page is in the mapping that this function created. No other code has
                // its address.
                unsafe { memory::mmap(shared(one), ram, offset(*page)?) }?;
            }
        }
        Ok(addr)
    }

    /// Handles `munmap` of areas of grants. Returns whether the memory contained a part of one.
    pub fn unmap_areas(&mut self, memory: &Range<usize>) -> Result<bool, i32> {
        let (host, host_page) = (self.host, self.host_page);
        let touched = |area: &Option<Area>| match area {
            Some(area) => !covered(area.addr, area.pages.len(), host_page, memory).is_empty(),
            None => false,
        };
        if !self.maps.iter().any(|map| touched(&map.area)) {
            return Ok(false);
        }
        let entered = self.log.enter(Call::Munmap(memory.len()));
        for map in self.maps.iter_mut().filter(|map| touched(&map.area)) {
            if entered.is_err() {
                map.excused = true;
                continue;
            }
            let Some(area) = &mut map.area else { continue };
            let pages = covered(area.addr, area.pages.len(), host_page, memory);
            for (page, hold) in area
                .pages
                .iter_mut()
                .zip(&mut map.holds)
                .skip(pages.start)
                .take(pages.len())
            {
                *page = false;
                if host == Host::Pv {
                    *hold = None;
                }
            }
            if !area.pages.contains(&true) {
                map.area = None;
            }
        }
        self.collect();
        entered.map(|()| true)
    }

    /// Handles `GRANT_COPY`.
    ///
    /// # Safety
    ///
    /// The argument points to the structure of the request.
    pub unsafe fn copy_grants(&mut self, argument: *mut c_void) -> Result<(), i32> {
        // SAFETY: the argument is a `CopyRequest` (this function's contract).
        let request = unsafe { argument.cast::<CopyRequest>().read_unaligned() };
        self.log.enter(Call::CopyGrants(request.count))?;
        for number in 0..usize::try_from(request.count).map_err(|_| libc::EINVAL)? {
            let segment = request.segments.wrapping_add(number);
            // SAFETY: `count` segments are there (this function's contract).
            let mut copy = unsafe { segment.read_unaligned() };
            // SAFETY: nothing relies on the contents of the memory that the request names.
            copy.status = unsafe { self.copy_segment(copy) }?;
            // SAFETY: the segment is writable (this function's contract).
            unsafe { segment.write_unaligned(copy) };
        }
        Ok(())
    }

    /// Copies one segment, and returns its status.
    ///
    /// # Safety
    ///
    /// Nothing relies on the contents of the local memory that the segment writes.
    unsafe fn copy_segment(&self, segment: Segment) -> Result<i16, i32> {
        let to_memory = match segment.flags {
            COPY_SOURCE_IS_GRANT => true,
            COPY_DEST_IS_GRANT => false,
            _ => return Err(libc::EINVAL),
        };
        let (far, near) = if to_memory {
            (segment.source, segment.dest)
        } else {
            (segment.dest, segment.source)
        };
        let (reference, offset, domain) = Segment::foreign(far);
        let len = usize::from(segment.len);
        if usize::from(offset) + len > PAGE {
            return Err(libc::EINVAL);
        }
        if domain != self.domain {
            return Ok(STATUS_BAD_DOMAIN);
        }
        let Some(grant) = self.granted(domain, reference) else {
            return Ok(STATUS_BAD_REFERENCE);
        };
        if !to_memory && grant.access == Access::ReadOnly {
            return Ok(STATUS_PERMISSION);
        }
        let at =
            u64::try_from(grant.page * PAGE + usize::from(offset)).map_err(|_| libc::EINVAL)?;
        let memory = std::ptr::with_exposed_provenance_mut(usize::from_ne_bytes(near));
        // SAFETY: nothing relies on the contents of the memory (this function's contract).
        unsafe { memory::transfer(self.ram(), at, memory, len, to_memory) }?;
        Ok(0)
    }
}

/// Returns the place with a mapping that is shared and of a file.
pub(super) fn shared(place: Place) -> Place {
    let flags = place.flags & !(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    Place {
        len: whole_pages(place.len).map_or(place.len.next_multiple_of(PAGE), |pages| pages * PAGE),
        flags: flags | libc::MAP_SHARED,
        ..place
    }
}
