//! What the harness needs of a crate under test.

use crate::context::Mapping;
use crate::host::HostRange;
use crate::op::{Op, Target};
use crate::out::Out;

/// Where a region is for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub base: u64,
    pub len: u64,
}

/// A region as an access by address finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub base: u64,
    pub len: u64,
    /// Its place in [`State`].
    pub place: usize,
    /// Whether it has memory of the host's.
    pub ram: bool,
}

/// A region as it is now.
#[derive(Clone, Debug)]
pub struct RegionState {
    pub memory: HostRange,
    /// The words of the dirty bitmap, then the number of its bits; nothing if there is none.
    pub bits: Vec<u64>,
    pub base: u64,
    pub len: u64,
}

/// All memory as it is now.
#[derive(Clone, Debug)]
pub struct State {
    /// The regions of the current collection, then kept and removed ones, then the buffer without a bitmap.
    pub regions: Vec<RegionState>,
    /// The words of the `IommuMemory`'s own bitmap, and the number of its bits.
    pub iommu: Vec<u64>,
}

/// One of the two crates, with what was made of it.
pub trait Machine {
    /// An empty one.
    fn fresh() -> Self;

    /// Does an operation. It may panic.
    fn apply(&mut self, op: &Op) -> Out;

    /// The current regions.
    fn extents(&self) -> Vec<Extent>;

    /// The regions that an access on `on` may reach; those of the backend for an `IommuMemory`.
    fn reach(&self, on: &Target) -> Vec<Placed>;

    /// What the words of a region's bitmap, or of the `IommuMemory`'s (`None`), would be if those ranges of offset and
    /// length were marked and the words had been `before`.
    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64>;

    /// All that the IOTLB that stands alone, or that of the `IommuMemory`, has, the last address included.
    fn mappings(&mut self, alone: bool) -> Vec<Mapping>;

    /// Memory and dirty bits.
    fn state(&self) -> State;

    /// Makes the dirty bits of a region (as counted by [`State`]) those of `words`.
    fn set_bits(&mut self, region: usize, words: &[u64]);

    /// The same for the bitmap of the `IommuMemory`.
    fn set_iommu_bits(&mut self, words: &[u64]);

    /// Empties the IOTLB that stands alone, or that of the `IommuMemory`.
    fn forget_mappings(&mut self, alone: bool);
}
