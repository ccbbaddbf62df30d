//! The models, without slices, indices and trees: bytes are a map, mappings are a log.

use std::collections::{BTreeMap, BTreeSet};

use vm_memory::Permissions;

/// The page size of dirty tracking.
pub const PAGE: u64 = 0x1000;

/// Guest memory as a list of regions, a map of bytes and a set of dirty pages.
#[derive(Debug, Default)]
pub struct Memory {
    /// First address and length of each region, ascending and without overlap.
    pub regions: Vec<(u64, u64)>,
    bytes: BTreeMap<u64, u8>,
    /// Dirty pages: the number of the region, and of the page in it.
    pub dirty: BTreeSet<(usize, u64)>,
}

impl Memory {
    /// Creates memory of zeroes.
    pub fn new(regions: Vec<(u64, u64)>) -> Self {
        Memory {
            regions,
            ..Default::default()
        }
    }

    /// Returns the number of the region that contains an address, and the offset in it.
    pub fn find(&self, addr: u64) -> Option<(usize, u64)> {
        let has =
            |(start, len): (u64, u64)| (addr >= start && addr - start < len).then(|| addr - start);
        self.regions
            .iter()
            .enumerate()
            .find_map(|(number, region)| Some((number, has(*region)?)))
    }

    /// Returns the segments of a range up to the first hole or 2^64: address and length of each.
    pub fn segments(&self, addr: u64, count: usize) -> Vec<(u64, usize)> {
        let mut segments = Vec::new();
        let (mut next, mut left) = (Some(addr), count);
        while let (Some(at), true) = (next, left != 0) {
            let Some((number, offset)) = self.find(at) else {
                break;
            };
            let here = (self.regions[number].1 - offset).min(left as u64);
            segments.push((at, here as usize));
            left -= here as usize;
            next = at.checked_add(here);
        }
        segments
    }

    /// Returns the number of bytes of a range before the first hole.
    pub fn reachable(&self, addr: u64, count: usize) -> usize {
        self.segments(addr, count).iter().map(|(_, len)| len).sum()
    }

    /// Returns the bytes of a range without holes.
    pub fn read(&self, addr: u64, count: usize) -> Vec<u8> {
        range(addr, count)
            .map(|at| self.bytes.get(&at).copied().unwrap_or(0))
            .collect()
    }

    /// Writes to a range without holes, and marks it.
    pub fn write(&mut self, addr: u64, data: &[u8]) {
        self.write_unmarked(addr, data);
        for at in range(addr, data.len()) {
            let (number, offset) = self.find(at).expect("the range has no holes");
            self.dirty.insert((number, offset / PAGE));
        }
    }

    /// Writes to a range without holes, and does not mark it.
    pub fn write_unmarked(&mut self, addr: u64, data: &[u8]) {
        let addresses = range(addr, data.len());
        self.bytes.extend(addresses.zip(data.iter().copied()));
    }
}

/// Returns the addresses of a range, which may end at 2^64.
fn range(addr: u64, count: usize) -> impl Iterator<Item = u64> {
    (0..count as u64).map(move |offset| addr + offset)
}

/// The target of an IOVA and its permissions, if it is mapped.
pub type Mapped = Option<(u64, Permissions)>;

/// An IOTLB as a log of changes. The last entry that contains an address decides its mapping.
#[derive(Debug, Default)]
pub struct Mappings {
    /// First and last address, and the target of the first.
    log: Vec<(u64, u64, Mapped)>,
}

/// A part of a range with one mapping, or unmapped: first, last, and the target of the first.
pub type Part = (u64, u64, Mapped);

impl Mappings {
    /// Records that the addresses from `first` to `last` are mapped or unmapped.
    pub fn set(&mut self, first: u64, last: u64, to: Mapped) {
        self.log.push((first, last, to));
    }

    /// Returns the target of an address.
    pub fn at(&self, addr: u64) -> Mapped {
        let (first, _, to) = self
            .log
            .iter()
            .rev()
            .find(|(first, last, _)| (*first..=*last).contains(&addr))?;
        to.map(|(target, permissions)| (target.wrapping_add(addr - first), permissions))
    }

    /// Splits a range at all possible changes, and joins adjacent parts without a change between
    /// them.
    pub fn parts(&self, first: u64, last: u64) -> Vec<Part> {
        let ends = self
            .log
            .iter()
            .flat_map(|(from, to, _)| [Some(*from), to.checked_add(1)]);
        let mut cuts: BTreeSet<u64> = ends
            .flatten()
            .filter(|cut| (first..=last).contains(cut))
            .collect();
        cuts.insert(first);
        let mut parts: Vec<Part> = Vec::new();
        let cuts: Vec<u64> = cuts.into_iter().collect();
        for (number, from) in cuts.iter().enumerate() {
            let to = cuts.get(number + 1).map_or(last, |next| next - 1);
            let here = self.at(*from);
            match parts.last_mut() {
                Some((start, end, before)) if continues(*before, from - *start, here) => *end = to,
                _ => parts.push((*from, to, here)),
            }
        }
        parts
    }
}

fn continues(before: Mapped, distance: u64, here: Mapped) -> bool {
    match (before, here) {
        (None, None) => true,
        (Some((to, permissions)), Some((here, others))) => {
            // Two mappings that meet at guest address 2^64 stay separate.
            to.checked_add(distance) == Some(here) && permissions == others
        }
        _ => false,
    }
}

/// Returns the last of `length` addresses, or `None` if `length` is 0 or the range ends past 2^64.
pub fn last_of(base: u64, length: usize) -> Option<u64> {
    base.checked_add((length as u64).checked_sub(1)?)
}

/// Returns the permissions with these bits.
pub fn permissions(bits: u8) -> Permissions {
    [
        Permissions::No,
        Permissions::Read,
        Permissions::Write,
        Permissions::ReadWrite,
    ][usize::from(bits & 3)]
}

/// Joins adjacent ranges, given by first address and length.
pub fn joined(ranges: impl IntoIterator<Item = (u64, u128)>) -> Vec<(u64, u128)> {
    let mut all: Vec<(u64, u128)> = Vec::new();
    for (first, len) in ranges {
        match all.last_mut() {
            Some((start, before)) if u128::from(*start) + *before == u128::from(first) => {
                *before += len
            }
            _ => all.push((first, len)),
        }
    }
    all
}
