//! Runs operations on one of the two crates. This folder is compiled once for each, with the crate
//! as `vm`, so that both run the same code.

mod asks;
mod bits;
mod fault;
mod kinds;
mod maps;
mod pure;
mod slices;
mod space;
mod streams;
mod tlb;
mod touch;
mod types;

use self::bits::bits;
use self::fault::Hosts;
use self::space::{build, Space, SpaceOf};
use super::vm;
use crate::context::Mapping;
use crate::machine::{Extent, Machine, Placed, State};
use crate::op::{Op, Target};
use crate::out::Out;
use vm::bitmap::AtomicBitmap;
use vm::iommu::Iotlb;
use vm::{GuestAddress, GuestRegionCollection};

/// Returns the ID of a type of this crate, which distinguishes the two crates.
pub fn crate_type_id() -> std::any::TypeId {
    std::any::TypeId::of::<GuestAddress>()
}

/// One crate, with the objects that operations created.
pub struct TestedCrate {
    space: Box<dyn Space>,
    bitmaps: [AtomicBitmap; 3],
    alone: Iotlb,
}

impl Machine for TestedCrate {
    fn fresh() -> Self {
        TestedCrate {
            space: Box::new(SpaceOf::<kinds::Mapped<()>>::new(
                GuestRegionCollection::new(),
            )),
            bitmaps: Default::default(),
            alone: Iotlb::new(),
        }
    }

    fn apply(&mut self, op: &Op) -> Out {
        match *op {
            Op::Build(ref layout) => match build(layout) {
                Ok(space) => {
                    self.space = space;
                    Out::Nothing
                }
                Err(fault) => Out::Failed(fault),
            },
            Op::Bits { bitmap, ref act } => match self.bitmaps.get_mut(bitmap) {
                Some(bitmap) => bits(bitmap, act),
                None => Out::NotApplicable,
            },
            Op::Tlb {
                alone: true,
                ref act,
            } => tlb::tlb(&mut self.alone, act, &Hosts::default()),
            Op::Map(ref spec) => maps::map(spec),
            Op::FdsOverlap {
                same_file,
                first,
                first_len,
                second,
                second_len,
            } => maps::fds_overlap(same_file, (first, first_len), (second, second_len)),
            Op::BuilderMarks { size, ref writes } => maps::builder_marks(size, writes),
            Op::GuestRegion { base, size, arc } => maps::guest_region(base, size, arc),
            Op::Calculate { what, a, b } => pure::arith(what, a, b),
            Op::Value {
                ty,
                what,
                len,
                skip,
                seed,
            } => pure::value(ty, what, len, skip, seed),
            Op::Endian { ty, value } => pure::endian(ty, value),
            Op::Perms { a, b } => pure::perms(a, b),
            _ => self.space.apply(op),
        }
    }

    fn extents(&self) -> Vec<Extent> {
        self.space.extents()
    }

    fn reach(&self, on: &Target) -> Vec<Placed> {
        self.space.reach(on)
    }

    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64> {
        self.space.words_after(place, before, marks)
    }

    fn mappings(&mut self, alone: bool) -> Vec<Mapping> {
        if alone {
            tlb::mappings(&self.alone)
        } else {
            self.space.mappings()
        }
    }

    fn state(&self) -> State {
        self.space.state()
    }

    fn set_bits(&mut self, region: usize, words: &[u64]) {
        self.space.set_bits(region, words);
    }

    fn set_iommu_bits(&mut self, words: &[u64]) {
        self.space.set_iommu_bits(words);
    }

    fn forget_mappings(&mut self, alone: bool) {
        if alone {
            self.alone = Iotlb::new();
        } else {
            self.space.forget_mappings();
        }
    }
}
