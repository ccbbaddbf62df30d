//! The input of the target `access`: regions, and a sequence of operations.

use arbitrary::Arbitrary;

use crate::stream::StreamPlan;

#[derive(Arbitrary, Debug)]
pub(super) struct Input {
    pub(super) base: Base,
    /// The hole before each region, and its length.
    pub(super) regions: Vec<(u16, u16)>,
    pub(super) steps: Vec<Step>,
}

/// The start of the first region.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Base {
    Zero,
    Small(u16),
    Below4Gib(u16),
    /// The last region ends at 2^64.
    Top,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum At {
    /// At this distance from the start or the end of a region.
    Near {
        region: u8,
        end: bool,
        by: i16,
    },
    Top(u16),
    Anywhere(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Len {
    Short(u8),
    Medium(u16),
    /// All addresses except this number.
    Huge(u16),
}

/// A descriptor of a chain, as in virtio.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) at: At,
    pub(super) len: u16,
    pub(super) device_writes: bool,
}

#[derive(Arbitrary, Debug)]
pub(super) enum Step {
    Write(At, Len),
    Read(At, Len),
    WriteSlice(At, Len),
    ReadSlice(At, Len),
    /// The width is 1, 2, 4, 8 or 16 bytes.
    WriteObj(At, u8),
    ReadObj(At, u8),
    /// The width is 1, 2, 4 or 8 bytes.
    Store(At, u8),
    Load(At, u8),
    ReadFrom(At, Len, StreamPlan),
    ReadExactFrom(At, Len, StreamPlan),
    WriteTo(At, Len, StreamPlan),
    WriteAllTo(At, Len, StreamPlan),
    Check(At, Len, u8),
    Slices(At, Len, u8),
    Offset(At, Len),
    Chain(Vec<Descriptor>),
    Harvest,
}
