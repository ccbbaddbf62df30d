//! The models. They know nothing of slices, indices and trees: bytes are a map, mappings are a log.

use std::collections::{BTreeMap, BTreeSet};

use vm_memory::Permissions;

/// The page size of dirty tracking.
pub const PAGE: u64 = 0x1000;

/// Guest memory as a list of regions, a map of bytes and a set of dirty pages.
#[derive(Debug, Default)]
pub struct Memory {
    /// First address and length, ascending, without overlap.
    pub regions: Vec<(u64, u64)>,
    bytes: BTreeMap<u64, u8>,
    /// Number of the region, and of the page in it.
    pub dirty: BTreeSet<(usize, u64)>,
}

impl Memory {
    /// Memory of zeroes.
    pub fn new(regions: Vec<(u64, u64)>) -> Self {
        Memory {
            regions,
            ..Default::default()
        }
    }

    /// The number of the region that has an address, and the offset in there.
    pub fn find(&self, addr: u64) -> Option<(usize, u64)> {
        let has =
            |(start, len): (u64, u64)| (addr >= start && addr - start < len).then(|| addr - start);
        self.regions
            .iter()
            .enumerate()
            .find_map(|(number, region)| Some((number, has(*region)?)))
    }

    /// The parts of a range that lie in one region each, up to the first hole or 2^64: address and length.
    pub fn pieces(&self, addr: u64, count: usize) -> Vec<(u64, usize)> {
        let mut pieces = Vec::new();
        let (mut next, mut left) = (Some(addr), count);
        while let (Some(at), true) = (next, left != 0) {
            let Some((number, offset)) = self.find(at) else {
                break;
            };
            let here = (self.regions[number].1 - offset).min(left as u64);
            pieces.push((at, here as usize));
            left -= here as usize;
            next = at.checked_add(here);
        }
        pieces
    }

    /// How many bytes of a range there are before the first hole.
    pub fn reachable(&self, addr: u64, count: usize) -> usize {
        self.pieces(addr, count).iter().map(|(_, len)| len).sum()
    }

    /// The bytes of a range that is all there.
    pub fn read(&self, addr: u64, count: usize) -> Vec<u8> {
        (addr..)
            .take(count)
            .map(|at| self.bytes.get(&at).copied().unwrap_or(0))
            .collect()
    }

    /// Writes to a range that is all there, and marks it.
    pub fn write(&mut self, addr: u64, data: &[u8]) {
        self.write_unmarked(addr, data);
        for at in (addr..).take(data.len()) {
            let (number, offset) = self.find(at).expect("the range is all there");
            self.dirty.insert((number, offset / PAGE));
        }
    }

    /// Writes to a range that is all there, for those who keep the marks elsewhere.
    pub fn write_unmarked(&mut self, addr: u64, data: &[u8]) {
        self.bytes.extend((addr..).zip(data.iter().copied()));
    }
}

/// What an address of an IOTLB is mapped to, and what may be done there; or nothing.
pub type Mapped = Option<(u64, Permissions)>;

/// An IOTLB as the log of what was done to it: the last entry that has an address says what it is mapped to.
#[derive(Debug, Default)]
pub struct Mappings {
    /// First and last address, and what the first is mapped to.
    log: Vec<(u64, u64, Mapped)>,
}

/// A part of a range whose addresses fare alike: first, last, what the first is mapped to.
pub type Part = (u64, u64, Mapped);

impl Mappings {
    /// Notes that the addresses from `first` to `last` are mapped, or are so no more.
    pub fn set(&mut self, first: u64, last: u64, to: Mapped) {
        self.log.push((first, last, to));
    }

    /// What an address is mapped to.
    pub fn at(&self, addr: u64) -> Mapped {
        let (first, _, to) = self
            .log
            .iter()
            .rev()
            .find(|(first, last, _)| (*first..=*last).contains(&addr))?;
        to.map(|(target, permissions)| (target.wrapping_add(addr - first), permissions))
    }

    /// A range, cut wherever anything may change, and joined again where nothing did.
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
            to.wrapping_add(distance) == here && permissions == others
        }
        _ => false,
    }
}

/// The last of `length` addresses; `None` if there is none, or it would be past 2^64.
pub fn last_of(base: u64, length: usize) -> Option<u64> {
    base.checked_add((length as u64).checked_sub(1)?)
}

/// The permissions with these bits.
pub fn permissions(bits: u8) -> Permissions {
    [
        Permissions::No,
        Permissions::Read,
        Permissions::Write,
        Permissions::ReadWrite,
    ][usize::from(bits & 3)]
}

/// Joins ranges that touch: first address and number of addresses.
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
