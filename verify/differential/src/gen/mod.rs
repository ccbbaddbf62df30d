//! Generates operations, mostly at the edges of existing regions and mappings.

mod others;
mod regions;
mod slices;
mod streams;

use fastrand::Rng;

use crate::context::Context;
use crate::machine::Extent;
use crate::op::*;

/// Granularities of bitmaps, including unusual ones.
const GRANULARITIES: &[usize] = &[
    1,
    2,
    3,
    7,
    8,
    64,
    100,
    512,
    4095,
    4096,
    4096,
    4096,
    4097,
    8192,
    1 << 20,
];

/// A generator of operations for a context.
pub struct Gen<'a> {
    rng: &'a mut Rng,
    context: &'a Context,
}

/// Returns the next operation.
pub fn next(rng: &mut Rng, context: &Context) -> Op {
    Gen { rng, context }.op()
}

/// Returns the initial layout.
pub fn first(rng: &mut Rng, context: &Context) -> Op {
    Op::Build(Gen { rng, context }.layout())
}

impl Gen<'_> {
    fn one_in(&mut self, n: u32) -> bool {
        self.rng.u32(0..n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.rng.usize(0..from.len())].clone()
    }

    fn seed(&mut self) -> u8 {
        self.rng.u8(..)
    }

    fn ty(&mut self) -> Ty {
        if self.one_in(40) {
            return Ty::Empty;
        }
        self.pick(Ty::OF_MEMORY)
    }

    fn atom(&mut self) -> AtomTy {
        self.pick(AtomTy::ALL)
    }

    fn perm(&mut self) -> Perm {
        self.pick(Perm::ALL)
    }

    /// Returns `value`, or a number near it.
    fn near(&mut self, value: u64) -> u64 {
        match self.rng.u32(0..10) {
            0..5 => value,
            5 => value.wrapping_add(self.rng.u64(1..9)),
            6 => value.wrapping_sub(self.rng.u64(1..9)),
            7 => value.wrapping_add(1),
            8 => value.wrapping_sub(1),
            _ => value
                .wrapping_add(self.rng.u64(0..0x2000))
                .wrapping_sub(0x1000),
        }
    }

    /// Returns a number near a power of two, near 0 or near 2^64.
    fn edge(&mut self) -> u64 {
        let edge = self.pick(&[
            0,
            1,
            0x1000,
            1 << 32,
            1 << 63,
            u64::MAX,
            u64::MAX - 0xfff,
            i64::MAX as u64,
        ]);
        self.near(edge)
    }

    fn extents(&self, on: &Target) -> Vec<Extent> {
        match on {
            Target::Published => self.context.published.clone(),
            Target::Kept => self.context.kept.clone().unwrap_or_default(),
            Target::Iommu if self.context.iommu_enabled => self.context.tlb.extents(),
            Target::Iommu => self.context.backend.clone(),
            _ => self.context.extents.clone(),
        }
    }

    fn address_in(&mut self, extents: &[Extent]) -> u64 {
        if extents.is_empty() || self.one_in(16) {
            return self.edge();
        }
        let extent = self.pick(extents);
        match self.rng.u32(0..8) {
            0 | 1 => self.near(extent.base),
            2 | 3 => self.near(extent.base.wrapping_add(extent.len)),
            4 => {
                let page = self.rng.u64(0..=extent.len / 4096);
                self.near(extent.base.wrapping_add(page * 4096))
            }
            _ => extent.base.wrapping_add(self.rng.u64(0..extent.len.max(1))),
        }
    }

    /// Returns a length that fits into a buffer, for a range that starts at `from`.
    fn length(&mut self, from: u64, extents: &[Extent]) -> usize {
        match self.rng.u32(0..12) {
            0 => 0,
            1 => 1,
            2..5 => self.rng.usize(2..40),
            5 => self.pick(&[2, 4, 8, 16, 4095, 4096, 4097]),
            6..9 if !extents.is_empty() => {
                // Ends near the end of a region.
                let extent = self.pick(extents);
                let end = extent.base.wrapping_add(extent.len);
                let distance = self.near(end.wrapping_sub(from));
                if distance < 0x1_0000 {
                    distance as usize
                } else {
                    self.rng.usize(0..64)
                }
            }
            9 => self.rng.usize(0..0x3000),
            _ => self.rng.usize(0..300),
        }
    }

    /// Returns any length.
    fn any_length(&mut self, from: u64, extents: &[Extent]) -> usize {
        match self.rng.u32(0..12) {
            0 => self.edge() as usize,
            // Ends near the end of the address space.
            1 => {
                let left = 0u64.wrapping_sub(from);
                self.near(left) as usize
            }
            _ => self.length(from, extents),
        }
    }

    fn region_index(&mut self) -> usize {
        let count = self.context.extents.len();
        if self.one_in(60) {
            count
        } else {
            self.rng.usize(0..count.max(1))
        }
    }

    fn region_len(&self, index: usize) -> u64 {
        self.context
            .extents
            .get(index)
            .map_or(0, |extent| extent.len)
    }

    fn offset(&mut self, len: u64) -> u64 {
        self.address_in(&[Extent { base: 0, len }])
    }

    fn target(&mut self) -> Target {
        match self.rng.u32(0..16) {
            0..7 => Target::Memory,
            7 => Target::Published,
            8 => Target::Kept,
            9..12 => Target::Iommu,
            12 | 13 => Target::OneRegion(self.region_index()),
            _ => Target::OneSlice(self.path()),
        }
    }

    fn order(&mut self, store: bool) -> Order {
        if self.one_in(30) {
            return self.pick(Order::ALL);
        }
        let sane = if store {
            Order::Release
        } else {
            Order::Acquire
        };
        self.pick(&[Order::Relaxed, Order::SeqCst, sane])
    }

    fn access(&mut self, at: u64, extents: &[Extent]) -> Access {
        let seed = self.seed();
        match self.rng.u32(0..16) {
            0 => Access::WriteBytes {
                len: self.length(at, extents),
                seed,
            },
            1 => Access::WriteSlice {
                len: self.length(at, extents),
                seed,
            },
            2 => Access::ReadBytes {
                len: self.length(at, extents),
            },
            3 => Access::ReadSlice {
                len: self.length(at, extents),
            },
            4 | 5 => Access::WriteObj {
                ty: self.ty(),
                seed,
            },
            6 | 7 => Access::ReadObj { ty: self.ty() },
            8 => Access::Store {
                ty: self.atom(),
                value: self.rng.u64(..),
                order: self.order(true),
            },
            9 => Access::Load {
                ty: self.atom(),
                order: self.order(false),
            },
            10..14 => {
                let count = self.any_length(at, extents);
                Access::ReadFrom {
                    source: self.source(count),
                    count,
                    exact: self.rng.bool(),
                }
            }
            _ => {
                let count = self.any_length(at, extents);
                let mut sink = self.sink(count);
                // The model does not know the capacity of pipes. Slices are written to pipes
                // elsewhere.
                if matches!(sink, Sink::PipeSink { .. }) {
                    sink = Sink::SocketSink { open: true };
                }
                Access::WriteTo {
                    sink,
                    count,
                    all: self.rng.bool(),
                }
            }
        }
    }

    fn touch(&mut self) -> Op {
        let on = self.target();
        let (at, extents) = match &on {
            Target::OneRegion(index) => {
                let len = self.region_len(*index);
                (self.offset(len), vec![Extent { base: 0, len }])
            }
            Target::OneSlice(path) => {
                let len = self.path_len(path);
                (self.offset(len), vec![Extent { base: 0, len }])
            }
            on => {
                let extents = self.extents(on);
                (self.address_in(&extents), extents)
            }
        };
        Op::Touch {
            access: self.access(at, &extents),
            on,
            at,
        }
    }

    fn ask(&mut self) -> Op {
        let on = self.pick(&[
            Target::Memory,
            Target::Memory,
            Target::Published,
            Target::Kept,
            Target::Iommu,
        ]);
        let extents = self.extents(&on);
        let at = self.address_in(&extents);
        let len = self.any_length(at, &extents);
        let stop = self.rng.bool();
        let choice = if on == Target::Iommu {
            self.rng.u32(12..15)
        } else {
            self.rng.u32(0..15)
        };
        let question = match choice {
            0 => self.pick(&[
                Question::NumRegions,
                Question::IterRegions,
                Question::LastAddr,
            ]),
            1 => Question::FindRegion(at),
            2 => Question::ToRegionAddr(at),
            3 => Question::AddressInRange(at),
            4 => Question::CheckAddress(at),
            5 => Question::CheckRange { at, len },
            6 => Question::CheckedOffset { at, by: len },
            7 | 8 => {
                let mut answers = Vec::new();
                while self.one_in(2) && answers.len() < 4 {
                    let by = self.rng.usize(0..20);
                    answers.push(self.pick(&[
                        Answer::Whole,
                        Answer::Short(by),
                        Answer::Over(by),
                        Answer::Refuse,
                    ]));
                }
                Question::TryAccess {
                    at,
                    count: len,
                    answers: List(answers),
                }
            }
            9 => Question::HostAddress(at),
            10 => Question::GetSlice { at, len },
            11 => Question::GetSlices { at, len, stop },
            12 => Question::CheckRangeFor {
                at,
                len,
                perm: self.perm(),
            },
            13 => Question::GetSlicesFor {
                at,
                len,
                perm: self.perm(),
                stop,
            },
            _ => Question::HasPhysical,
        };
        Op::Ask { on, question }
    }

    fn ask_region(&mut self) -> Op {
        let region = self.region_index();
        let len = self.region_len(region);
        let at = self.offset(len);
        let by = self.any_length(at, &[Extent { base: 0, len }]);
        let question = match self.rng.u32(0..11) {
            0 => RegionQuestion::Extent,
            1 => RegionQuestion::RegionHuge,
            2 => RegionQuestion::RegionFile,
            3 => RegionQuestion::RegionWhole,
            4 => RegionQuestion::RegionDirtyAt(at as usize),
            5 => RegionQuestion::RegionCheckAddress(at),
            6 => RegionQuestion::RegionInRange(at),
            7 => RegionQuestion::RegionCheckedOffset { at, by },
            8 => {
                let extents = self.context.extents.clone();
                RegionQuestion::RegionFromGuest(self.address_in(&extents))
            }
            9 => RegionQuestion::RegionHostAddress(at),
            _ => RegionQuestion::RegionSlice { at, len: by },
        };
        Op::AskRegion { region, question }
    }

    fn op(&mut self) -> Op {
        // An IOMMU without mappings refuses everything, which leaves little to compare.
        if self.context.iommu_enabled && self.context.tlb.mappings.len() < 4 && self.one_in(8) {
            return self.tlb();
        }
        match self.rng.u32(0..200) {
            0 => Op::Build(self.layout()),
            1..4 => self.insert(),
            4..6 => self.remove(),
            6..8 => Op::Publish,
            8 => Op::Keep {
                into_inner: self.rng.bool(),
            },
            9 => Op::Forget,
            10 => {
                let bytes = self.pick(&[0, 1, 4096, 0x10000, 0x10000]);
                Op::NewIommu {
                    enabled: !self.one_in(4),
                    bytes,
                    page: self.pick(GRANULARITIES),
                }
            }
            11 => Op::EnableIommu {
                on: !self.one_in(3),
            },
            12 => Op::ReplaceBackend,
            13 => Op::CloneIommu,
            14..90 => self.touch(),
            90..115 => self.ask(),
            115..125 => self.ask_region(),
            125..150 => {
                let path = self.path();
                let len = self.path_len(&path).min(1 << 20);
                Op::Volatile {
                    act: self.act(len),
                    path,
                }
            }
            150..162 => self.bits(),
            162..186 => self.tlb(),
            186..191 => self.map(),
            _ => self.pure(),
        }
    }
}
