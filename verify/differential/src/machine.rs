//! The interface of the harness to a crate under test.

use crate::context::Mapping;
use crate::host::HostRange;
use crate::op::{Op, Target};
use crate::out::Out;

/// The guest address range of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub base: u64,
    pub len: u64,
}

/// A region that an access by address can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub base: u64,
    pub len: u64,
    /// Its index in [`State`].
    pub place: usize,
    /// Whether it has host memory.
    pub ram: bool,
}

/// The current state of a region.
#[derive(Clone, Debug)]
pub struct RegionState {
    pub memory: HostRange,
    /// The words of the dirty bitmap, then the number of its bits; empty without a bitmap.
    pub bits: Vec<u64>,
    pub base: u64,
    pub len: u64,
}

/// The current state of all memory.
#[derive(Clone, Debug)]
pub struct State {
    /// The regions of the current collection, then kept and removed regions, then the buffer
    /// without a bitmap.
    pub regions: Vec<RegionState>,
    /// The words of the bitmap of the `IommuMemory`, and the number of its bits.
    pub iommu: Vec<u64>,
}

/// One of the two crates, with the objects that operations created.
pub trait Machine {
    /// Creates an empty machine.
    fn fresh() -> Self;

    /// Runs an operation, which may panic.
    fn apply(&mut self, op: &Op) -> Out;

    /// Returns the current regions.
    fn extents(&self) -> Vec<Extent>;

    /// Returns the regions that an access to `on` can reach. For an `IommuMemory`, these are the
    /// regions of its backend.
    fn reach(&self, on: &Target) -> Vec<Placed>;

    /// Returns the words `before` of a bitmap with `marks` added: ranges of offset and length. The
    /// bitmap is that of the region `place`, or of the `IommuMemory` if `place` is `None`.
    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64>;

    /// Returns all mappings of the separate IOTLB, or of the `IommuMemory`'s, up to the last
    /// address.
    fn mappings(&mut self, alone: bool) -> Vec<Mapping>;

    /// Returns the current memory and dirty bits.
    fn state(&self) -> State;

    /// Sets the dirty bits of a region, by its index in [`State`], to `words`.
    fn set_bits(&mut self, region: usize, words: &[u64]);

    /// Sets the bits of the bitmap of the `IommuMemory` to `words`.
    fn set_iommu_bits(&mut self, words: &[u64]);

    /// Empties the separate IOTLB, or that of the `IommuMemory`.
    fn forget_mappings(&mut self, alone: bool);
}
