//! [`Kernel`]: the state of the hypervisor and of the two drivers in an environment.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;

use super::call_log::CallLog;
use super::foreign::ForeignArea;
use super::grants::Map;
use crate::environment::{Access, Host, InUse, PAGE, PAGES, REFERENCES};

/// A grant in the table of the domain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    pub page: usize,
    pub access: Access,
}

/// The state of the hypervisor and of the two drivers.
#[derive(Debug)]
pub(super) struct Kernel {
    pub host: Host,
    pub domain: u32,
    pub limit: u32,
    /// The size of a page of the host, which each grant takes.
    pub host_page: usize,
    pub log: CallLog,
    /// The table of each open gntdev, with the number of the file.
    pub maps: Vec<Map>,
    pub foreign: Vec<ForeignArea>,
    pub paged_out: HashMap<u64, u32>,
    /// Memory that another thread mapped in holes of [`take_hole`](Self::take_hole).
    pub holes: Vec<Range<usize>>,
    first_frame: u64,
    ram: File,
    grants: HashMap<u32, Grant>,
}

impl Kernel {
    pub fn new(host: Host, domain: u32, first_frame: u64, ram: File) -> Self {
        Self {
            host,
            domain,
            limit: 65_536,
            host_page: PAGE,
            log: CallLog::default(),
            maps: Vec::new(),
            foreign: Vec::new(),
            paged_out: HashMap::new(),
            holes: Vec::new(),
            first_frame,
            ram,
            grants: HashMap::new(),
        }
    }

    pub fn ram(&self) -> &File {
        &self.ram
    }

    pub fn frames(&self) -> Range<u64> {
        let count = u64::try_from(PAGES).expect("the number of pages fits");
        self.first_frame..self.first_frame + count
    }

    /// Returns the page of a frame of the domain.
    pub fn page_of(&self, frame: u64) -> Option<usize> {
        let page = usize::try_from(frame.checked_sub(self.first_frame)?).ok()?;
        (page < PAGES).then_some(page)
    }

    pub fn grant(&mut self, reference: u32, page: usize, access: Access) {
        assert!(REFERENCES.contains(&reference) && page < PAGES);
        self.grant_any(reference, page, access);
    }

    pub fn grant_any(&mut self, reference: u32, page: usize, access: Access) {
        self.grants.insert(reference, Grant { page, access });
    }

    pub fn revoke(&mut self, reference: u32) {
        self.grants.remove(&reference);
    }

    /// Returns the grant by which this domain may map a page.
    pub fn granted(&self, domain: u32, reference: u32) -> Option<Grant> {
        // The drivers keep 16 bits of the number of a domain.
        if domain & 0xffff != self.domain {
            return None;
        }
        self.grants.get(&reference).copied()
    }

    pub fn in_use(&self, reference: u32) -> InUse {
        let held = self.maps.iter().flat_map(|map| map.holds(reference));
        held.fold(InUse::default(), |sum, writing| InUse {
            reading: true,
            writing: sum.writing || writing,
        })
    }

    pub fn page_out(&mut self, frame: u64, requests: u32) {
        self.paged_out.insert(frame, requests);
    }

    /// Forgets maps that nobody refers to.
    pub fn collect(&mut self) {
        self.maps.retain(Map::is_referred_to);
        self.foreign.retain(|area| !area.is_unmapped());
    }

    pub fn audit(&mut self) -> Vec<String> {
        let mut wrong = self.log.take_mistakes();
        wrong.extend(self.maps.iter().filter_map(Map::leak));
        wrong.extend(self.foreign.iter().filter_map(ForeignArea::leak));
        wrong
    }
}

/// Returns the number of pages in `len` bytes, if it is a whole number.
pub(super) fn whole_pages(len: usize) -> Option<usize> {
    len.is_multiple_of(PAGE).then_some(len / PAGE)
}

/// Returns the pages that a range of memory covers, of an area of `pages` pages at `addr`.
pub(super) fn covered(
    addr: usize,
    pages: usize,
    page_size: usize,
    memory: &Range<usize>,
) -> Range<usize> {
    let end = addr + pages * page_size;
    let from = memory.start.clamp(addr, end);
    let to = memory.end.clamp(from, end);
    (from - addr) / page_size..(to - addr).div_ceil(page_size)
}
