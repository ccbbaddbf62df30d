//! A slow model of guest memory: a map of its bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;

use super::stream::Stream;
use super::*;

/// A slow model: every byte of the memory, its regions, and the dirty bytes.
pub(super) struct Model {
    pub(super) bytes: BTreeMap<u64, u8>,
    regions: Vec<(u64, usize)>,
    pub(super) dirty: BTreeSet<u64>,
}

impl Model {
    pub(super) fn new(regions: Vec<(u64, usize)>) -> Self {
        let bytes = regions
            .iter()
            .flat_map(|&(start, len)| (0..len as u64).map(move |i| (start + i, 0)));
        Self {
            bytes: bytes.collect(),
            regions,
            dirty: BTreeSet::new(),
        }
    }

    /// Returns the bytes at `addr` before the first hole.
    pub(super) fn reach(&self, addr: u64, count: usize) -> Vec<u8> {
        (0..count as u64)
            .map_while(|i| self.bytes.get(&addr.checked_add(i)?).copied())
            .collect()
    }

    /// Returns the number of bytes that an access moves, or the expected error.
    pub(super) fn movable(&self, addr: u64, count: usize) -> Result<usize> {
        match self.reach(addr, count).len() {
            0 if count != 0 => Err(Error::InvalidGuestAddress(GuestAddress(addr))),
            n => Ok(n),
        }
    }

    /// Returns the lengths of the segments of a range before the first hole.
    pub(super) fn segments(&self, addr: u64, count: usize) -> Vec<usize> {
        let (mut segments, mut last) = (vec![], None);
        for i in 0..self.reach(addr, count).len() as u64 {
            let region = self.region_of(addr + i);
            if region != last {
                segments.push(0);
            }
            *segments.last_mut().unwrap() += 1;
            last = region;
        }
        segments
    }

    fn region_of(&self, addr: u64) -> Option<(u64, usize)> {
        self.regions
            .iter()
            .copied()
            .find(|&(start, len)| (start..start + len as u64).contains(&addr))
    }

    pub(super) fn write(&mut self, addr: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            *self.bytes.get_mut(&(addr + i as u64)).unwrap() = *byte;
            self.dirty.insert(addr + i as u64);
        }
    }

    /// Returns the expected result of an atomic access. Host memory is aligned to pages.
    pub(super) fn atomic(&self, addr: u64, size: usize) -> Result<()> {
        let (start, len) = self
            .region_of(addr)
            .ok_or(Error::InvalidGuestAddress(GuestAddress(addr)))?;
        let offset = (addr - start) as usize;
        if offset + size > len || !offset.is_multiple_of(size) {
            return Err(Error::InvalidBackendAddress);
        }
        Ok(())
    }

    /// Returns the number of bytes that a transfer moves if it stops at the first short read.
    pub(super) fn transfer(&self, addr: u64, count: usize, stream: &mut Stream) -> Result<usize> {
        self.movable(addr, count)?;
        let mut done = 0;
        for segment in self.segments(addr, count) {
            if stream.left == 0 {
                return match stream.end {
                    number if number != 0 && done == 0 => Err(Error::IOError(system_error(number))),
                    _ => Ok(done),
                };
            }
            let moved = stream.step(segment);
            done += moved;
            if moved < segment {
                break;
            }
        }
        Ok(done)
    }

    /// Returns the number of bytes that an exact transfer moves, and its result.
    pub(super) fn whole_transfer(
        &self,
        addr: u64,
        count: usize,
        stream: &Stream,
        reading: bool,
    ) -> (usize, Result<()>) {
        let done = match self.movable(addr, count) {
            Err(error) => return (0, Err(error)),
            Ok(movable) => movable.min(stream.left),
        };
        let result = match (done, stream.end) {
            _ if done == count => Ok(()),
            (0, 0) if !reading => Err(Error::IOError(ErrorKind::WriteZero.into())),
            (0, number @ 1..) => Err(Error::IOError(system_error(number))),
            _ => Err(Error::PartialBuffer {
                expected: count,
                completed: done,
            }),
        };
        (done, result)
    }
}
