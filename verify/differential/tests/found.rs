//! Differences that earlier runs found. None may recur.

use vm_memory_differential::prelude::*;

/// Builds a memory of the regions `(base, len, flavour)`, with a `page` and a `seed` of 0.
fn build(kind: Kind, how: How, regions: &[(u64, u64, Flavour)]) -> Op {
    let region = |&(base, len, flavour)| RegionSpec {
        base,
        len,
        page: 0,
        flavour,
        seed: 0,
    };
    Build(Layout {
        kind,
        how,
        regions: regions.iter().map(region).collect(),
    })
}

/// An exact read over two regions lost the error of the source at the boundary, and read again.
#[test]
fn read_exact_with_error_between_regions_returns_error() {
    replay(&[
        build(
            Own,
            FromRegions,
            &[
                (0xffffffffffff5f1d, 0x64, RamWithHostAddress),
                (0xffffffffffff5f81, 0x1, RamWithHostAddress),
            ],
        ),
        Touch {
            on: Memory,
            at: 0xffffffffffff5f1d,
            access: ReadFrom {
                source: ScriptSource {
                    steps: list![Give(0x64), Fail(WouldBlockKind), Give(0x1)],
                    seed: 0x0,
                },
                count: 0x66,
                exact: true,
            },
        },
    ]);
}

/// An exact read over two regions lost the end of the source at the boundary.
#[test]
fn read_exact_with_end_of_source_between_regions_returns_error() {
    replay(&[
        build(
            MmapPlain,
            FromRangesWithFiles,
            &[(0x0, 0x64, RamWithHostAddress), (0x64, 0x1, Ram)],
        ),
        Touch {
            on: Memory,
            at: 0x0,
            access: ReadFrom {
                source: ScriptSource {
                    steps: list![Give(0x64), End, Give(0x1)],
                    seed: 0x0,
                },
                count: 0x65,
                exact: true,
            },
        },
    ]);
}

/// `write_volatile_to` stopped after the first short write; 0.18.0 completes each segment.
#[test]
fn write_to_short_sink_completes_segment() {
    replay(&[
        build(
            MmapTracked,
            FromRangesWithFiles,
            &[(0x16157debb94, 0x3, NotRam)],
        ),
        Touch {
            on: Memory,
            at: 0x16157debb95,
            access: WriteTo {
                sink: ScriptSink {
                    steps: list![Give(0x1), Give(0x1)],
                },
                count: 0x2,
                all: false,
            },
        },
    ]);
}

/// `write_volatile_to` returned 0 where 0.18.0 returns `WriteZero`.
#[test]
fn write_to_sink_that_accepts_nothing_returns_write_zero() {
    replay(&[
        build(MmapTracked, FromRegions, &[(0x67, 0x1, RamWithHostAddress)]),
        Touch {
            on: Memory,
            at: 0x67,
            access: WriteTo {
                sink: ScriptSink { steps: list![] },
                count: 0x1,
                all: false,
            },
        },
    ]);
}

/// 0.18.0 returns the error of a sink that accepted a byte before, and loses the count; B1 allows
/// it.
#[test]
fn write_to_failing_sink_returns_count_first() {
    replay(&[
        build(
            MmapTracked,
            FromArcRegions,
            &[(0x4ebd65452643ef90, 0x1000, RamWithHostAddress)],
        ),
        Touch {
            on: Memory,
            at: 0x4ebd65452643ff33,
            access: WriteTo {
                sink: ScriptSink {
                    steps: list![Give(0x1)],
                },
                count: 0x2,
                all: true,
            },
        },
    ]);
}

/// `check_range` reported a region without host memory as accessible.
#[test]
fn check_range_of_region_without_host_memory_is_false() {
    replay(&[
        build(Device, FromArcRegions, &[(0x3c2647496b7228b7, 0x3, Ram)]),
        Ask {
            on: Memory,
            question: CheckRange {
                at: 0x3c2647496b7228b9,
                len: 0x1,
            },
        },
    ]);
}

/// `check_range` with permissions reported a region without host memory as accessible.
#[test]
fn check_range_with_permissions_of_region_without_host_memory_is_false() {
    replay(&[
        build(Own, FromRegions, &[(0xffffffffffffe757, 0x1000, NotRam)]),
        Ask {
            on: Memory,
            question: CheckRangeFor {
                at: 0xffffffffffffe7b7,
                len: 0xf2,
                perm: Read,
            },
        },
    ]);
}

/// `try_access` refused a callback that handled more than one region, within the requested count.
#[test]
fn try_access_callback_may_handle_several_regions() {
    replay(&[
        build(
            MmapTracked,
            FromArcRegions,
            &[(0x1e13f9d33f26e0ff, 0x8, Ram)],
        ),
        Ask {
            on: Memory,
            question: TryAccess {
                at: 0x1e13f9d33f26e106,
                count: 0x9,
                answers: list![Over(0x1)],
            },
        },
    ]);
}

/// `try_access` lost its count at 2^64.
#[test]
fn try_access_up_to_2_pow_64_returns_count() {
    replay(&[
        build(Device, OneByOne, &[(0xfffffffffffffffd, 0x3, Ram)]),
        Ask {
            on: Memory,
            question: TryAccess {
                at: 0xfffffffffffffffd,
                count: 0x4,
                answers: list![],
            },
        },
    ]);
}

/// The bytes above 2^64 of a region that passes it were accessible.
#[test]
fn region_past_2_pow_64_ends_there() {
    replay(&[
        build(Own, FromRegions, &[(0xffffffffffffffff, 0x2, Ram)]),
        Touch {
            on: Published,
            at: 0xffffffffffffffff,
            access: WriteSlice {
                len: 0x2,
                seed: 0x1,
            },
        },
    ]);
}

/// Address 0 was found in a region that passes 2^64.
#[test]
fn region_past_2_pow_64_does_not_contain_address_0() {
    replay(&[
        build(
            Own,
            OneByOne,
            &[(0xffffffffffffe71b, 0x18e6, RamWithHostAddress)],
        ),
        Ask {
            on: Memory,
            question: CheckAddress(0x0),
        },
    ]);
}

/// `unchecked_align_up` panicked in release builds if the alignment was not a power of two.
#[test]
fn unchecked_align_up_with_odd_alignment_does_not_panic() {
    replay(&[Calculate {
        what: UncheckedAlignUp,
        a: 0x0,
        b: 0x0,
    }]);
}

/// `from_slice` found a value of size 0 in an empty slice; 0.18.0 does not.
#[test]
fn from_slice_of_zero_sized_value_in_empty_slice_is_none() {
    replay(&[Value {
        ty: Empty,
        what: FromSlice,
        len: 0x0,
        skip: 0x0,
        seed: 0x0,
    }]);
}

/// More elements than `isize::MAX` were not `TooBig`.
#[test]
fn array_with_more_elements_than_isize_max_is_too_big() {
    replay(&[
        build(Own, FromArcRegions, &[(0x0, 0x0, RamWithHostAddress)]),
        Volatile {
            path: Path {
                root: OfRegion(0x0),
                steps: list![],
            },
            act: ArrayLoad {
                at: 0x2007,
                count: 0xffffffffffffdff9,
                ty: U8,
                index: 0x0,
            },
        },
    ]);
}

/// More elements of size 0 than `isize::MAX` were not `TooBig`.
#[test]
fn array_with_more_zero_sized_elements_than_isize_max_is_too_big() {
    replay(&[
        build(MmapTracked, OneByOne, &[(0x0, 0x5d, Ram)]),
        Volatile {
            path: Path {
                root: OfRegion(0x0),
                steps: list![],
            },
            act: ArrayCopyFrom {
                at: 0x0,
                count: 0x8fffffffffd6cfff,
                ty: Empty,
                given: 0x800,
                seed: 0xb2,
            },
        },
    ]);
}

/// 0.18.0 panics when a copy has an empty region as its target; B11 allows that at any
/// address of the region.
#[test]
fn copy_to_empty_region_returns_error() {
    replay(&[
        build(Own, OneByOne, &[(0x0, 0x0, Ram)]),
        Volatile {
            path: Path {
                root: OfRegion(0x0),
                steps: list![],
            },
            act: CopyToSlice {
                to: Path {
                    root: OfMemory { at: 0x0, len: 0x0 },
                    steps: list![],
                },
            },
        },
    ]);
}
