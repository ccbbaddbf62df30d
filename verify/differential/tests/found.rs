//! What runs have found, as printed by them. Each was a difference that no rule allows, and is none any more.

use vm_memory_differential::prelude::*;

/// An exact read over two regions swallowed the error of the source at the boundary, and asked it again.
#[test]
fn an_error_between_two_regions_ends_an_exact_read() {
    replay(&[
        Build(Layout {
            kind: Own,
            how: FromRegions,
            regions: list![
                RegionSpec {
                    base: 0xffffffffffff5f1d,
                    len: 0x64,
                    page: 0x0,
                    flavour: RamWithHostAddress,
                    seed: 0x0
                },
                RegionSpec {
                    base: 0xffffffffffff5f81,
                    len: 0x1,
                    page: 0x0,
                    flavour: RamWithHostAddress,
                    seed: 0x0
                }
            ],
        }),
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

/// The same with the end of the source.
#[test]
fn the_end_of_the_source_between_two_regions_ends_an_exact_read() {
    replay(&[
        Build(Layout {
            kind: MmapPlain,
            how: FromRangesWithFiles,
            regions: list![
                RegionSpec {
                    base: 0x0,
                    len: 0x64,
                    page: 0x0,
                    flavour: RamWithHostAddress,
                    seed: 0x0
                },
                RegionSpec {
                    base: 0x64,
                    len: 0x1,
                    page: 0x0,
                    flavour: Ram,
                    seed: 0x0
                }
            ],
        }),
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

/// `write_volatile_to` on guest memory stopped after the first short write; the reference writes each part whole.
#[test]
fn a_write_to_a_short_sink_goes_on() {
    replay(&[
        Build(Layout {
            kind: MmapTracked,
            how: FromRangesWithFiles,
            regions: list![RegionSpec {
                base: 0x16157debb94,
                len: 0x3,
                page: 0x0,
                flavour: NotRam,
                seed: 0x0
            }],
        }),
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

/// … and answered 0 where the reference says `WriteZero`.
#[test]
fn a_sink_that_takes_nothing_is_an_error() {
    replay(&[
        Build(Layout {
            kind: MmapTracked,
            how: FromRegions,
            regions: list![RegionSpec {
                base: 0x67,
                len: 0x1,
                page: 0x0,
                flavour: RamWithHostAddress,
                seed: 0x0
            }],
        }),
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

/// The reference gives the error of a sink that took a byte before, and loses the byte: B1 allows that.
#[test]
fn a_count_comes_before_an_error_of_the_sink() {
    replay(&[
        Build(Layout {
            kind: MmapTracked,
            how: FromArcRegions,
            regions: list![RegionSpec {
                base: 0x4ebd65452643ef90,
                len: 0x1000,
                page: 0x0,
                flavour: RamWithHostAddress,
                seed: 0x0
            }],
        }),
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

/// `check_range` said that a region without host memory can be accessed.
#[test]
fn memory_that_is_not_ram_cannot_be_accessed() {
    replay(&[
        Build(Layout {
            kind: Device,
            how: FromArcRegions,
            regions: list![RegionSpec {
                base: 0x3c2647496b7228b7,
                len: 0x3,
                page: 0x0,
                flavour: Ram,
                seed: 0x0
            }],
        }),
        Ask {
            on: Memory,
            question: CheckRange {
                at: 0x3c2647496b7228b9,
                len: 0x1,
            },
        },
    ]);
}

/// The same with permissions.
#[test]
fn nor_with_permissions() {
    replay(&[
        Build(Layout {
            kind: Own,
            how: FromRegions,
            regions: list![RegionSpec {
                base: 0xffffffffffffe757,
                len: 0x1000,
                page: 0x0,
                flavour: NotRam,
                seed: 0x0
            }],
        }),
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

/// `try_access` refused a callback that handled more than one region, but not more than was asked for.
#[test]
fn a_callback_may_skip_over_a_region() {
    replay(&[
        Build(Layout {
            kind: MmapTracked,
            how: FromArcRegions,
            regions: list![RegionSpec {
                base: 0x1e13f9d33f26e0ff,
                len: 0x8,
                page: 0x0,
                flavour: Ram,
                seed: 0x0
            }],
        }),
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
fn try_access_up_to_the_top_tells_its_count() {
    replay(&[
        Build(Layout {
            kind: Device,
            how: OneByOne,
            regions: list![RegionSpec {
                base: 0xfffffffffffffffd,
                len: 0x3,
                page: 0x0,
                flavour: Ram,
                seed: 0x0
            }],
        }),
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

/// Of a region that passes 2^64, the bytes above were accessible.
#[test]
fn a_region_past_the_top_is_cut_there() {
    replay(&[
        Build(Layout {
            kind: Own,
            how: FromRegions,
            regions: list![RegionSpec {
                base: 0xffffffffffffffff,
                len: 0x2,
                page: 0x0,
                flavour: Ram,
                seed: 0x0
            }],
        }),
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

/// … and address 0 was found in it.
#[test]
fn address_0_is_not_in_a_region_at_the_top() {
    replay(&[
        Build(Layout {
            kind: Own,
            how: OneByOne,
            regions: list![RegionSpec {
                base: 0xffffffffffffe71b,
                len: 0x18e6,
                page: 0x0,
                flavour: RamWithHostAddress,
                seed: 0x0
            }],
        }),
        Ask {
            on: Memory,
            question: CheckAddress(0x0),
        },
    ]);
}

/// `unchecked_align_up` panicked in release builds for an alignment that is no power of two.
#[test]
fn unchecked_align_up_does_not_panic() {
    replay(&[Calculate {
        what: UncheckedAlignUp,
        a: 0x0,
        b: 0x0,
    }]);
}

/// `from_slice` found a value of size 0 in no bytes, the reference finds none.
#[test]
fn no_value_in_no_bytes() {
    replay(&[Value {
        ty: Empty,
        what: FromSlice,
        len: 0x0,
        skip: 0x0,
        seed: 0x0,
    }]);
}

/// More elements than `isize::MAX` are `TooBig`, whatever their size.
#[test]
fn too_many_elements_are_too_big() {
    replay(&[
        Build(Layout {
            kind: Own,
            how: FromArcRegions,
            regions: list![RegionSpec {
                base: 0x0,
                len: 0x0,
                page: 0x0,
                flavour: RamWithHostAddress,
                seed: 0x0
            }],
        }),
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

/// The same where they have no size.
#[test]
fn too_many_elements_of_size_0_are_too_big() {
    replay(&[
        Build(Layout {
            kind: MmapTracked,
            how: OneByOne,
            regions: list![RegionSpec {
                base: 0x0,
                len: 0x5d,
                page: 0x0,
                flavour: Ram,
                seed: 0x0
            }],
        }),
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

/// The reference panics where a copy goes to an empty region: B11 allows that, wherever in the operation the region is.
#[test]
fn a_copy_to_an_empty_region_is_an_error() {
    replay(&[
        Build(Layout {
            kind: Own,
            how: OneByOne,
            regions: list![RegionSpec {
                base: 0x0,
                len: 0x0,
                page: 0x0,
                flavour: Ram,
                seed: 0x0
            }],
        }),
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
