//! `MmapRegion`, its builder and `GuestRegionMmap`.
#![expect(unsafe_code, reason = "building on a raw mapping is unsafe")]

use std::sync::Arc;

use super::fault::{Hosts, IntoFault};
use super::streams::file_of_len;
use super::vm;
use super::vm::bitmap::AtomicBitmap;
use super::vm::mmap::{MmapRegionBuilder, MmapRegionError};
use super::vm::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileMemory,
};
use crate::op::{MapFlags, MapHow, MapSpec, Span};
use crate::out::{Fault, Out};

/// Returns whether a size is within the harness's limit, or so large that no host can map it.
fn sensible(size: usize) -> bool {
    size <= 1 << 20 || size >= 1 << 50
}

fn flags(flags: MapFlags) -> i32 {
    match flags {
        MapFlags::NoFlags => 0,
        MapFlags::PrivateAnon => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        MapFlags::SharedAnon => libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        MapFlags::SharedOnly => libc::MAP_SHARED,
        MapFlags::PrivateOnly => libc::MAP_PRIVATE,
        MapFlags::FixedPrivateAnon => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
        MapFlags::NoReserveAnon => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    }
}

fn told(region: &MmapRegion<()>) -> Out {
    Out::All(vec![
        region.size().into(),
        Out::Num(region.prot() as u64),
        Out::Num(region.flags() as u64),
        region.owned().into(),
        region.is_hugetlbfs().into(),
        region
            .file_offset()
            .map(|file| {
                Out::All(vec![
                    file.start().into(),
                    Out::Bool(Arc::strong_count(file.arc()) > 0),
                ])
            })
            .into(),
        VolatileMemory::len(region).into(),
        VolatileMemory::is_empty(region).into(),
        ((region.as_ptr() as usize) % 4096).into(),
    ])
}

/// Writes and reads the first bytes of a region by guest address, and reads those of `base`.
///
/// `base` is the mapping of a region of an existing one.
fn touched(region: MmapRegion<()>, base: &MmapRegion<()>) -> Out {
    let fault = |error: vm::GuestMemoryError| error.fault(&Hosts::default());
    let memory = GuestRegionMmap::new(region, GuestAddress(0x1000))
        .map(|region| GuestMemoryMmap::from_regions(vec![region]));
    let Some(Ok(memory)) = memory else {
        return Out::Absent;
    };
    let start = GuestAddress(0x1000);
    let write = memory.write_obj(0x0102_0304_0506_0708u64, start);
    let read = memory.read_obj::<u64>(start);
    let bytes = base.as_volatile_slice().read_obj::<u64>(0);
    Out::All(vec![
        Out::of(write.map_err(fault)),
        Out::of(read.map_err(fault)),
        Out::of(bytes.map_err(|error| error.fault(&Hosts::default()))),
    ])
}

/// Returns the builder with all settings of a mapping.
fn builder(spec: &MapSpec, file: Option<FileOffset>) -> MmapRegionBuilder<()> {
    let mut builder = MmapRegionBuilder::new(spec.size)
        .with_mmap_prot(prot(spec))
        .with_mmap_flags(flags(spec.flags));
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    if let Some(huge) = spec.huge {
        builder = builder.with_hugetlbfs(huge);
    }
    builder
}

fn prot(spec: &MapSpec) -> i32 {
    i32::from(spec.prot & 7)
}

/// Creates the mapping, calls every method that does not access its memory, and then accesses it.
pub fn map(spec: &MapSpec) -> Out {
    if !sensible(spec.size) {
        return Out::NotApplicable;
    }
    let file = spec
        .file
        .as_ref()
        .map(|file| FileOffset::new(file_of_len(file.len.min(1 << 30)), file.offset));
    let (prot, flags) = (prot(spec), flags(spec.flags));
    let base = match MmapRegion::<()>::new(1 << 16) {
        Ok(base) => base,
        Err(error) => return Out::Failed(error.fault(&Hosts::default())),
    };
    let mut made: Result<MmapRegion<()>, MmapRegionError> = match (spec.how, file) {
        (MapHow::MapNew, _) => MmapRegion::new(spec.size),
        (MapHow::MapFromFile, Some(file)) => MmapRegion::from_file(file, spec.size),
        (MapHow::MapFromFile, None) => return Out::NotApplicable,
        (MapHow::MapBuild, file) => MmapRegion::build(file, spec.size, prot, flags),
        (MapHow::MapRaw, _) => {
            // SAFETY: the memory outlives the region, which only this function has. Its first bytes
            // are accessed, which are in `base`.
            unsafe { MmapRegion::build_raw(base.as_ptr(), spec.size, prot, flags) }
        }
        (MapHow::MapRawBuilder, file) => {
            let builder = builder(spec, file);
            // SAFETY: the memory outlives the region, which only this function has. Its first bytes
            // are accessed, which are in `base`.
            unsafe { builder.with_raw_mmap_pointer(base.as_ptr()) }.build()
        }
        (MapHow::MapRawMisaligned, _) => {
            // SAFETY: the memory outlives the region, which is never accessed; an unaligned address
            // is refused.
            unsafe { MmapRegion::build_raw(base.as_ptr().wrapping_add(8), spec.size, prot, flags) }
        }
        (MapHow::MapBuilder, file) => builder(spec, file).build(),
        (MapHow::MapBuilderBare, _) => MmapRegionBuilder::new(spec.size).build(),
        (MapHow::MapFromRange, file) => {
            let made = GuestRegionMmap::<()>::from_range(GuestAddress(0x1000), spec.size, file);
            return Out::of(
                made.map_err(|error| error.fault(&Hosts::default()))
                    .map(|region| {
                        let mapping = region.get_mmap();
                        vec![
                            told(&mapping),
                            region.start_addr().0.into(),
                            region.last_addr().0.into(),
                        ]
                    }),
            );
        }
    };
    if let (Ok(region), Some(huge)) = (&mut made, spec.huge) {
        region.set_hugetlbfs(huge);
    }
    // The reference accesses whatever is there, so the first bytes must be.
    let has_bytes = spec.file.as_ref().is_none_or(|file| {
        let len = file.len.min(1 << 30);
        file.offset.checked_add(8).is_some_and(|end| end <= len)
    });
    let accessible = match spec.how {
        MapHow::MapRaw | MapHow::MapRawBuilder | MapHow::MapNew => true,
        MapHow::MapFromFile => has_bytes,
        MapHow::MapBuild | MapHow::MapBuilder => prot == 3 && has_bytes,
        _ => false,
    };
    Out::of(
        made.map(|region| {
            let facts = told(&region);
            if !accessible || spec.size < 8 {
                return facts;
            }
            Out::All(vec![facts, touched(region, &base)])
        })
        .map_err(|error| error.fault(&Hosts::default())),
    )
}

/// Returns whether two file mappings overlap.
pub fn fds_overlap(same_file: bool, first: (u64, usize), second: (u64, usize)) -> Out {
    const LARGEST_FILE: u64 = 1 << 16;
    let ends = [first, second].map(|(offset, len)| offset.checked_add(len as u64));
    if ends
        .iter()
        .any(|end| end.is_none_or(|end| end > LARGEST_FILE))
    {
        return Out::NotApplicable;
    }
    let file = Arc::new(file_of_len(LARGEST_FILE));
    let other = if same_file {
        Arc::clone(&file)
    } else {
        Arc::new(file_of_len(LARGEST_FILE))
    };
    let made =
        |file, (offset, len)| MmapRegion::<()>::from_file(FileOffset::from_arc(file, offset), len);
    match (made(file, first), made(other, second)) {
        (Ok(a), Ok(b)) => {
            let alone = MmapRegion::<()>::new(4096);
            Out::All(vec![
                a.fds_overlap(&b).into(),
                b.fds_overlap(&a).into(),
                alone.is_ok_and(|alone| alone.fds_overlap(&a)).into(),
            ])
        }
        (Err(error), _) | (_, Err(error)) => Out::Failed(error.fault(&Hosts::default())),
    }
}

/// Writes to a region whose builder created the bitmap, and returns the dirty pages.
pub fn builder_marks(size: usize, writes: &[Span]) -> Out {
    if size > 1 << 18 {
        return Out::NotApplicable;
    }
    let made = MmapRegionBuilder::<AtomicBitmap>::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
        .build();
    let region = match made {
        Ok(region) => region,
        Err(error) => return Out::Failed(error.fault(&Hosts::default())),
    };
    let slice = region.as_volatile_slice();
    let results: Vec<Out> = writes
        .iter()
        .map(|span| {
            let written = slice.write(&vec![7; span.len.min(1 << 18)], span.at);
            Out::of(written.map_err(|error| error.fault(&Hosts(vec![region.as_ptr() as usize]))))
        })
        .collect();
    let dirty = (0..size.div_ceil(4096))
        .filter(|page| region.bitmap().is_addr_set(page * 4096))
        .map(Out::from);
    Out::All(vec![Out::All(results), Out::All(dirty.collect())])
}

/// Creates a region of a mapping at a guest address.
pub fn guest_region(base: u64, size: usize, arc: bool) -> Out {
    if size > 1 << 20 {
        return Out::NotApplicable;
    }
    let mapping = match MmapRegion::<()>::new(size) {
        Ok(mapping) => mapping,
        Err(error) => return Out::Failed(error.fault(&Hosts::default())),
    };
    let region = if arc {
        GuestRegionMmap::with_arc(Arc::new(mapping), GuestAddress(base))
    } else {
        GuestRegionMmap::new(mapping, GuestAddress(base))
    };
    match region {
        None => Out::Failed(Fault::Named("InvalidGuestRegion")),
        Some(region) => Out::All(vec![
            region.start_addr().0.into(),
            vm::GuestMemoryRegion::len(&region).into(),
            region.last_addr().0.into(),
            told(&region.get_mmap()),
        ]),
    }
}
