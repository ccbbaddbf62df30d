//! Operations as plain data, whose `Debug` form is Rust for a test.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A list of operands. Unlike `Vec`'s, its `Debug` form is an expression of its type.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct List<T>(pub Vec<T>);

impl<T: fmt::Debug> fmt::Debug for List<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("list!")?;
        self.0.fmt(f)
    }
}

impl<T> std::ops::Deref for List<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> FromIterator<T> for List<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        List(items.into_iter().collect())
    }
}

/// Builds a [`List`].
#[macro_export]
macro_rules! list {
    ($($item:expr),* $(,)?) => { $crate::op::List(vec![$($item),*]) };
}

macro_rules! data {
    ($($(#[$meta:meta])* pub $what:ident $name:ident { $($body:tt)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
            pub $what $name { $($body)* }
        )*
    };
}

macro_rules! plain {
    ($($(#[$meta:meta])* pub enum $name:ident { $($(#[$note:meta])* $variant:ident),* $(,)? })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
            pub enum $name { $($(#[$note])* $variant),* }

            impl $name {
                /// Every variant.
                pub const ALL: &'static [$name] = &[$($name::$variant),*];
            }
        )*
    };
}

plain! {
    /// The type of the regions.
    pub enum Kind {
        /// `GuestRegionMmap<()>`.
        MmapPlain,
        /// `GuestRegionMmap<AtomicBitmap>`.
        MmapTracked,
        /// `GuestRegionMmap<Option<AtomicBitmap>>`.
        MmapMaybe,
        /// A region of the harness over `GuestMemoryRegionBytes`, anywhere in the address space.
        Own,
        /// A region of the harness with its own `Bytes`, without host memory.
        Device,
    }

    /// The function that creates the collection.
    pub enum How { FromRegions, FromArcRegions, FromRanges, FromRangesWithFiles, OneByOne }

    /// The abilities of a region of the kind `Own`.
    pub enum Flavour { Ram, RamWithHostAddress, NotRam }

    /// A `ByteValued` type.
    pub enum Ty {
        U8, U16, U32, U64, U128, Usize, I8, I16, I32, I64, I128, Isize,
        Be16, Be32, Be64, BeSize, Le16, Le32, Le64, LeSize,
        /// A structure of the size in its name.
        Bytes3,
        Bytes40,
        /// A structure without bytes.
        Empty,
    }

    /// An `AtomicAccess` type.
    pub enum AtomTy { AtomU8, AtomI8, AtomU16, AtomI16, AtomU32, AtomI32, AtomU64, AtomI64, AtomUsize, AtomIsize }

    /// A memory ordering.
    pub enum Order { Relaxed, Release, Acquire, AcqRel, SeqCst }

    /// A permission.
    pub enum Perm { No, Read, Write, ReadWrite }

    /// The error of a scripted source or sink.
    pub enum Trouble { Eintr, Eagain, Eio, InterruptedKind, WouldBlockKind, OtherKind, UnexpectedEofKind, OutOfBoundsFault, PartialFault }
}

data! {
    /// One operation, which runs on both crates.
    pub enum Op {
        Build(Layout),
        InsertRegion(RegionSpec),
        RemoveRegion { base: u64, len: u64 },
        /// The current collection becomes that of the `GuestMemoryAtomic`.
        Publish,
        /// A guard of the `GuestMemoryAtomic` is kept, as `Target::Kept`.
        Keep { into_inner: bool },
        Forget,
        Touch { on: Target, at: u64, access: Access },
        Ask { on: Target, question: Question },
        AskRegion { region: usize, question: RegionQuestion },
        Volatile { path: Path, act: Act },
        Bits { bitmap: usize, act: BitAct },
        Tlb { alone: bool, act: TlbAct },
        NewIommu { enabled: bool, bytes: usize, page: usize },
        EnableIommu { on: bool },
        ReplaceBackend,
        CloneIommu,
        Map(MapSpec),
        FdsOverlap { same_file: bool, first: u64, first_len: usize, second: u64, second_len: usize },
        BuilderMarks { size: usize, writes: List<Span> },
        GuestRegion { base: u64, size: usize, arc: bool },
        Calculate { what: Arith, a: u64, b: u64 },
        Value { ty: Ty, what: ValueAct, len: usize, skip: usize, seed: u8 },
        Endian { ty: Ty, value: u64 },
        Perms { a: Perm, b: Perm },
    }

    /// Offset and length.
    pub struct Span { pub at: usize, pub len: usize }

    /// A collection of regions.
    pub struct Layout { pub kind: Kind, pub how: How, pub regions: List<RegionSpec> }

    /// A region. `page` is the granularity of its dirty bitmap. With 0 it has no bitmap, if the
    /// kind permits that.
    pub struct RegionSpec { pub base: u64, pub len: u64, pub page: usize, pub flavour: Flavour, pub seed: u8 }

    /// The target of an access or a question.
    pub enum Target { Memory, Published, Kept, Iommu, OneRegion(usize), OneSlice(Path) }

    /// A method of `Bytes`.
    pub enum Access {
        WriteBytes { len: usize, seed: u8 },
        WriteSlice { len: usize, seed: u8 },
        ReadBytes { len: usize },
        ReadSlice { len: usize },
        WriteObj { ty: Ty, seed: u8 },
        ReadObj { ty: Ty },
        Store { ty: AtomTy, value: u64, order: Order },
        Load { ty: AtomTy, order: Order },
        ReadFrom { source: Source, count: usize, exact: bool },
        WriteTo { sink: Sink, count: usize, all: bool },
    }

    /// The source of a volatile read.
    pub enum Source {
        ScriptSource { steps: List<Step>, seed: u8 },
        SliceSource { len: usize, seed: u8 },
        CursorSource { len: usize, pos: u64, seed: u8 },
        FileSource { len: usize, pos: u64, seed: u8, handle: Handle },
        PipeSource { len: usize, open: bool, seed: u8, handle: Handle },
        SocketSource { len: usize, open: bool, seed: u8 },
        /// A file that is open for writing only.
        DeafSource,
    }

    /// The sink of a volatile write.
    pub enum Sink {
        ScriptSink { steps: List<Step> },
        VecSink { filled: usize },
        SliceSink { room: usize },
        CursorSink { room: usize, pos: u64 },
        FileSink { filled: usize, pos: u64, handle: Handle },
        PipeSink { room: usize, open: bool, handle: Handle },
        SocketSink { open: bool },
        FullSink,
        /// A file that is open for reading only.
        MuteSink,
    }

    /// One call of a scripted source or sink. Calls after the last one move nothing.
    pub enum Step { Give(usize), End, Fail(Trouble) }

    /// A method of `GuestMemoryBackend` or `GuestMemory`.
    pub enum Question {
        NumRegions,
        IterRegions,
        LastAddr,
        FindRegion(u64),
        ToRegionAddr(u64),
        AddressInRange(u64),
        CheckAddress(u64),
        CheckRange { at: u64, len: usize },
        CheckedOffset { at: u64, by: usize },
        TryAccess { at: u64, count: usize, answers: List<Answer> },
        HostAddress(u64),
        GetSlice { at: u64, len: usize },
        GetSlices { at: u64, len: usize, stop: bool },
        CheckRangeFor { at: u64, len: usize, perm: Perm },
        GetSlicesFor { at: u64, len: usize, perm: Perm, stop: bool },
        HasPhysical,
    }

    /// The result of the callback of `try_access`.
    pub enum Answer { Whole, Short(usize), Over(usize), Refuse }

    /// A method of `GuestMemoryRegion`.
    pub enum RegionQuestion {
        Extent,
        RegionHuge,
        RegionFile,
        RegionWhole,
        RegionDirtyAt(usize),
        RegionCheckAddress(u64),
        RegionInRange(u64),
        RegionCheckedOffset { at: u64, by: usize },
        RegionFromGuest(u64),
        RegionHostAddress(u64),
        RegionSlice { at: u64, len: usize },
    }

    /// The path to a `VolatileSlice`.
    pub struct Path { pub root: Root, pub steps: List<Walk> }

    /// The slice that a path starts from.
    pub enum Root {
        OfRegion(usize),
        OfMapping { region: usize, at: usize, len: usize },
        OfMemory { at: u64, len: usize },
        /// The buffer of the harness, without a bitmap.
        OfBuffer { len: usize },
        /// Bytes of this operation only, which are part of the outcome.
        OfLocal { len: usize },
    }

    /// One step of a path.
    pub enum Walk {
        Offset(usize),
        Subslice { at: usize, len: usize },
        SplitLeft(usize),
        SplitRight(usize),
        Get { at: usize, len: usize },
        ThroughRef { at: usize, ty: Ty },
        ThroughArray { at: usize, count: usize, ty: Ty },
        Whole2,
    }

    /// A method of `VolatileMemory`, `VolatileSlice`, `VolatileRef` or `VolatileArrayRef`.
    pub enum Act {
        Extent2,
        Guard { mutable: bool },
        CopyTo { ty: Ty, count: usize },
        CopyFrom { ty: Ty, count: usize, seed: u8 },
        CopyToSlice { to: Path },
        EndOffset { base: usize, by: usize },
        RefLoad { at: usize, ty: Ty },
        RefStore { at: usize, ty: Ty, seed: u8 },
        RefExtent { at: usize, ty: Ty },
        ArrayExtent { at: usize, count: usize, ty: Ty },
        ArrayGuard { at: usize, count: usize, ty: Ty, mutable: bool },
        ArrayLoad { at: usize, count: usize, ty: Ty, index: usize },
        ArrayStore { at: usize, count: usize, ty: Ty, index: usize, seed: u8 },
        ArrayRefAt { at: usize, count: usize, ty: Ty, index: usize },
        ArrayCopyTo { at: usize, count: usize, ty: Ty, room: usize },
        ArrayCopyFrom { at: usize, count: usize, ty: Ty, given: usize, seed: u8 },
        ArrayCopyToSlice { at: usize, count: usize, ty: Ty, to: Path },
        ArrayOfSlice,
        AtomicRefLoad { at: usize, ty: AtomTy },
        AtomicRefStore { at: usize, ty: AtomTy, value: u64 },
        AlignedRef { at: usize, ty: Ty },
        AlignedMut { at: usize, ty: Ty, seed: u8 },
        DirtyAt2(usize),
        DirectRead { source: Source, exact: bool },
        DirectWrite { sink: Sink, all: bool },
    }

    /// A method of `AtomicBitmap`, `Option` of one, or a slice of one.
    pub enum BitAct {
        NewBitmap { bytes: usize, page: usize },
        BitmapWithLen(usize),
        DefaultBitmap,
        Enlarge(usize),
        SetRange { at: usize, len: usize },
        ResetRange { at: usize, len: usize },
        SetBit(usize),
        ResetBit(usize),
        ReadBit(usize),
        ReadAddr(usize),
        Harvest,
        ResetAll,
        CloneOver,
        MarkDirty { view: View, skips: List<usize>, at: usize, len: usize },
        ReadDirty { view: View, skips: List<usize>, at: usize },
    }

    /// A method of `Iotlb`.
    pub enum TlbAct {
        SetMapping { iova: u64, gpa: u64, len: usize, perm: Perm },
        Invalidate { iova: u64, len: usize },
        InvalidateAll,
        Lookup { iova: u64, len: usize, perm: Perm },
    }

    /// A mapping created by a function of `MmapRegion` or its builder.
    pub struct MapSpec { pub how: MapHow, pub size: usize, pub prot: u8, pub flags: MapFlags, pub file: Option<FileSpec>, pub huge: Option<bool> }

    /// The file of a mapping.
    pub struct FileSpec { pub len: u64, pub offset: u64 }
}

plain! {
    /// The function that maps.
    pub enum MapHow { MapNew, MapFromFile, MapBuild, MapRaw, MapRawMisaligned, MapRawBuilder, MapBuilder, MapBuilderBare, MapFromRange }

    /// Flags for `mmap`.
    pub enum MapFlags { NoFlags, PrivateAnon, SharedAnon, SharedOnly, PrivateOnly, FixedPrivateAnon, NoReserveAnon }

    /// The type through which the methods of `Bitmap` are called.
    pub enum View { Direct, RefView, ArcView, SomeView, NoneView }

    /// The form in which a descriptor is passed.
    pub enum Handle { Owned, Borrowed, ByRef, ByMutRef }

    /// Arithmetic on addresses.
    pub enum Arith {
        CheckedAdd, CheckedSub, OverflowingAdd, OverflowingSub, UncheckedAdd, UncheckedSub, CheckedOffsetFrom,
        UncheckedOffsetFrom, CheckedAlignUp, UncheckedAlignUp, Mask, BitAndOr, ComputeOffset, IovaRangeOf,
    }

    /// A method of `ByteValued`.
    pub enum ValueAct { FromSlice, FromMutSlice, AsSlice, AsBytes, ReadExactFrom, WriteAllTo, Zeroed }
}

impl Ty {
    /// The types of accesses to memory.
    pub const OF_MEMORY: &'static [Ty] = &[
        Ty::U8,
        Ty::U16,
        Ty::U32,
        Ty::U64,
        Ty::U128,
        Ty::I32,
        Ty::Be16,
        Ty::Be64,
        Ty::Le32,
        Ty::LeSize,
        Ty::Bytes3,
        Ty::Bytes40,
    ];
}

impl Path {
    /// Returns whether it starts from guest memory.
    pub fn root_is_memory(&self) -> bool {
        matches!(self.root, Root::OfMemory { .. })
    }
}

impl Source {
    /// Returns whether a system call reads from the source.
    pub fn is_descriptor(&self) -> bool {
        matches!(
            self,
            Source::FileSource { .. }
                | Source::PipeSource { .. }
                | Source::SocketSource { .. }
                | Source::DeafSource
        )
    }
}
