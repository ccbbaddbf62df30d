//! Layouts, insertions and removals of regions.

use super::{Gen, GRANULARITIES};
use crate::machine::Extent;
use crate::op::*;

/// The lengths of regions.
const REGION_LENGTHS: &[u64] = &[
    1, 2, 3, 7, 8, 9, 16, 100, 0xfff, 0x1000, 0x1000, 0x1000, 0x1001, 0x2000, 0x2ffd,
];

impl Gen<'_> {
    pub(super) fn region_spec(&mut self, base: u64, len: u64) -> RegionSpec {
        let page = if self.one_in(12) {
            0
        } else {
            self.pick(GRANULARITIES)
        };
        let flavour = match self.rng.u32(0..8) {
            0 => Flavour::NotRam,
            1..4 => Flavour::RamWithHostAddress,
            _ => Flavour::Ram,
        };
        RegionSpec {
            base,
            len,
            page,
            flavour,
            seed: self.seed(),
        }
    }

    pub(super) fn layout(&mut self) -> Layout {
        let kind = self.pick(&[
            Kind::MmapPlain,
            Kind::MmapTracked,
            Kind::MmapTracked,
            Kind::MmapMaybe,
            Kind::Own,
            Kind::Own,
            Kind::Own,
            Kind::Device,
        ]);
        let how = match kind {
            Kind::MmapPlain | Kind::MmapTracked => self.pick(How::ALL),
            _ => self.pick(&[How::FromRegions, How::FromArcRegions, How::OneByOne]),
        };
        let count = match self.rng.u32(0..20) {
            0 => 0,
            1..16 => self.rng.usize(1..6),
            16..19 => self.rng.usize(6..20),
            _ => self.rng.usize(20..=64),
        };
        let own = matches!(kind, Kind::Own | Kind::Device);
        let mut base = match self.rng.u32(0..6) {
            0 | 1 => 0,
            2 => self.rng.u64(1..0x3000),
            3 => 0x1000 * self.rng.u64(1..64),
            4 => 0xffff_f000,
            _ => self.rng.u64(..) >> 1,
        };
        let mut regions = Vec::new();
        for _ in 0..count {
            let mut len = self.pick(REGION_LENGTHS);
            if count > 20 {
                len = len.min(64);
            }
            if own && self.one_in(100) {
                len = 0;
            }
            regions.push(self.region_spec(base, len));
            let gap = match self.rng.u32(0..8) {
                0..5 => 0,
                5 => self.rng.u64(1..20),
                6 => 0x1000 * self.rng.u64(1..4),
                _ => self.rng.u64(0..1 << 40),
            };
            base = base.wrapping_add(len).wrapping_add(gap);
        }
        // At the top: the last region ends at or just below 2^64.
        if self.rng.u32(0..10) < if own { 4 } else { 1 } {
            let mut end = if self.one_in(3) {
                self.rng.u64(0..0x20).wrapping_neg()
            } else {
                0u64
            };
            let bottom = regions
                .first()
                .filter(|_| count > 1 && !self.rng.u8(..).is_multiple_of(3))
                .cloned();
            for spec in regions.iter_mut().rev() {
                spec.base = end.wrapping_sub(spec.len);
                end = spec.base;
            }
            if let (Some(bottom), Some(first)) = (bottom, regions.first_mut()) {
                first.base = 0;
                first.len = bottom.len;
            }
        }
        if !regions.is_empty() && self.one_in(12) {
            let index = self.rng.usize(0..regions.len());
            match self.rng.u32(0..4) {
                0 => regions.swap(0, index),
                1 => regions[index].base = self.edge(),
                2 => regions[index].len = self.rng.u64(0..0x2000),
                _ => {
                    let other = self.rng.usize(0..regions.len());
                    regions[index].base = regions[other].base;
                }
            }
        }
        Layout {
            kind,
            how,
            regions: List(regions),
        }
    }

    pub(super) fn insert(&mut self) -> Op {
        let extents = self.context.extents.clone();
        let base = self.address_in(&extents);
        let mut len = self.pick(REGION_LENGTHS);
        if self.one_in(50) {
            len = 0;
        }
        let mut base = if self.one_in(2) {
            base.wrapping_sub(len)
        } else {
            base
        };
        if base.checked_add(len).is_none() && !self.one_in(20) {
            base = 0u64.wrapping_sub(len);
        }
        Op::InsertRegion(self.region_spec(base, len))
    }

    pub(super) fn remove(&mut self) -> Op {
        let index = self.region_index();
        let extent = self.context.extents.get(index).copied().unwrap_or(Extent {
            base: 0,
            len: 0x1000,
        });
        if self.one_in(3) {
            Op::RemoveRegion {
                base: self.near(extent.base),
                len: self.near(extent.len),
            }
        } else {
            Op::RemoveRegion {
                base: extent.base,
                len: extent.len,
            }
        }
    }
}
