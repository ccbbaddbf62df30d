//! Volatile slices: paths to a slice, and operations on it.

use super::Gen;
use crate::machine::Extent;
use crate::op::*;

impl Gen<'_> {
    pub(super) fn path(&mut self) -> Path {
        let mut len;
        let root = match self.rng.u32(0..8) {
            0..4 => {
                let index = self.region_index();
                len = self.region_len(index);
                Root::OfRegion(index)
            }
            4 => {
                let region = self.region_index();
                let at = self.offset(self.region_len(region));
                let count = self.any_length(
                    at,
                    &[Extent {
                        base: 0,
                        len: self.region_len(region),
                    }],
                );
                len = count as u64;
                Root::OfMapping {
                    region,
                    at: at as usize,
                    len: count,
                }
            }
            5 => {
                let extents = self.context.extents.clone();
                let at = self.address_in(&extents);
                let count = self.any_length(at, &extents);
                len = count as u64;
                Root::OfMemory { at, len: count }
            }
            6 => {
                len = self.rng.u64(0..8300);
                Root::OfBuffer { len: len as usize }
            }
            _ => {
                len = self.rng.u64(0..200);
                Root::OfLocal { len: len as usize }
            }
        };
        len = len.min(1 << 20);
        let mut steps = Vec::new();
        while self.one_in(3) && steps.len() < 4 {
            let at = self.offset(len) as usize;
            let count = self.any_length(at as u64, &[Extent { base: 0, len }]);
            let step = match self.rng.u32(0..8) {
                0 => Walk::Offset(at),
                1 => Walk::Subslice { at, len: count },
                2 => Walk::SplitLeft(at),
                3 => Walk::SplitRight(at),
                4 => Walk::Get { at, len: count },
                5 => Walk::ThroughRef { at, ty: self.ty() },
                6 => Walk::ThroughArray {
                    at,
                    count,
                    ty: self.ty(),
                },
                _ => Walk::Whole2,
            };
            len = match step {
                Walk::Offset(at) | Walk::SplitRight(at) => len.saturating_sub(at as u64),
                Walk::SplitLeft(at) => len.min(at as u64),
                Walk::Subslice { len: count, .. } | Walk::Get { len: count, .. } => count as u64,
                _ => len,
            };
            steps.push(step);
        }
        Path {
            root,
            steps: List(steps),
        }
    }

    /// Returns the approximate length of the slice at the end of a path.
    pub(super) fn path_len(&self, path: &Path) -> u64 {
        let mut len = match path.root {
            Root::OfRegion(index) => self.region_len(index),
            Root::OfMapping { len, .. } | Root::OfMemory { len, .. } => len as u64,
            Root::OfBuffer { len } | Root::OfLocal { len } => len as u64,
        };
        for step in path.steps.iter() {
            len = match *step {
                Walk::Offset(at) | Walk::SplitRight(at) => len.saturating_sub(at as u64),
                Walk::SplitLeft(at) => len.min(at as u64),
                Walk::Subslice { len: count, .. } | Walk::Get { len: count, .. } => count as u64,
                Walk::ThroughRef { .. } => 8,
                Walk::ThroughArray { count, .. } => count as u64,
                Walk::Whole2 => len,
            };
        }
        len
    }

    pub(super) fn act(&mut self, len: u64) -> Act {
        let own = [Extent { base: 0, len }];
        let at = self.offset(len) as usize;
        let count = match self.rng.u32(0..4) {
            0 => self.any_length(at as u64, &own),
            1 => self.length(at as u64, &own) / 4,
            _ => self.rng.usize(0..12),
        };
        let given = count.min(0x800) + self.rng.usize(0..3);
        match self.rng.u32(0..24) {
            0 => Act::Extent2,
            1 => Act::Guard {
                mutable: self.rng.bool(),
            },
            2 => Act::CopyTo {
                ty: self.ty(),
                count: given,
            },
            3 => Act::CopyFrom {
                ty: self.ty(),
                count: given,
                seed: self.seed(),
            },
            4 => Act::CopyToSlice { to: self.path() },
            5 => Act::EndOffset {
                base: at,
                by: count,
            },
            6 => Act::ArrayOfSlice,
            7 => Act::DirtyAt2(at),
            8 => Act::DirectRead {
                source: self.source(len as usize),
                exact: self.rng.bool(),
            },
            9 => Act::DirectWrite {
                sink: self.sink(len as usize),
                all: self.rng.bool(),
            },
            10..=16 => self.act_on_reference(at),
            _ => self.act_on_array(at, count, given),
        }
    }

    /// Draws a method of a reference to the value at `at`.
    fn act_on_reference(&mut self, at: usize) -> Act {
        let (ty, seed) = (self.ty(), self.seed());
        match self.rng.u32(0..7) {
            0 => Act::RefLoad { at, ty },
            1 => Act::RefStore { at, ty, seed },
            2 => Act::RefExtent { at, ty },
            3 => Act::AtomicRefLoad {
                at,
                ty: self.atom(),
            },
            4 => Act::AtomicRefStore {
                at,
                ty: self.atom(),
                value: self.rng.u64(..),
            },
            5 => Act::AlignedRef { at, ty },
            _ => Act::AlignedMut { at, ty, seed },
        }
    }

    /// Draws a method of an array of `count` elements at `at`. A copy has `given` values in host
    /// memory.
    fn act_on_array(&mut self, at: usize, count: usize, given: usize) -> Act {
        let index = if self.one_in(6) {
            self.near(count as u64) as usize
        } else {
            self.rng.usize(0..count.max(1))
        };
        let (ty, seed) = (self.ty(), self.seed());
        match self.rng.u32(0..8) {
            0 => Act::ArrayExtent { at, count, ty },
            1 => Act::ArrayGuard {
                at,
                count,
                ty,
                mutable: self.rng.bool(),
            },
            2 => Act::ArrayLoad {
                at,
                count,
                ty,
                index,
            },
            3 => Act::ArrayStore {
                at,
                count,
                ty,
                index,
                seed,
            },
            4 => Act::ArrayRefAt {
                at,
                count,
                ty,
                index,
            },
            5 => Act::ArrayCopyTo {
                at,
                count,
                ty,
                room: given,
            },
            6 => Act::ArrayCopyFrom {
                at,
                count,
                ty,
                given,
                seed,
            },
            _ => Act::ArrayCopyToSlice {
                at,
                count,
                ty,
                to: self.path(),
            },
        }
    }
}
