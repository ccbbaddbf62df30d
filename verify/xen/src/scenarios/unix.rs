//! Regions that are not of Xen, and the values of the interface.

use std::os::unix::fs::FileExt;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, MmapRange,
    MmapRegion, MmapXenFlags, Permissions, VolatileMemory,
};

use super::setup::memory;
use super::Scenario;
use crate::double::memory::memfd;
use crate::environment::{Environment, PAGE};
use crate::outcome::Outcome;

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        unix_region_of_zeroes_is_read_and_written,
        unix_region_of_file_is_shared_with_it,
    ],
    X21: [
        unix_region_past_end_of_file_is_refused,
        unix_region_for_reading_refuses_writes,
        unix_region_marks_its_last_page,
        unix_regions_of_same_bytes_overlap,
    ],
    X22: [
        flags_have_their_published_values,
    ],
    X23: [
        constructors_without_xen_stay,
    ],
];

const START: GuestAddress = GuestAddress(0x10_0000);

fn unix_region_of_zeroes_is_read_and_written(_: &mut dyn Environment) -> Outcome {
    let memory: GuestMemoryMmap = memory(MmapRange::new_unix(2 * PAGE, None, START), START)?;
    memory.write_obj(0x1234_5678u32, GuestAddress(START.0 + 0xffe))?;
    assert_eq!(
        memory.read_obj::<u32>(GuestAddress(START.0 + 0xffe))?,
        0x1234_5678
    );
    assert_eq!(memory.read_obj::<u64>(START)?, 0);
    Ok(())
}

fn unix_region_of_file_is_shared_with_it(_: &mut dyn Environment) -> Outcome {
    let file = memfd("file")?;
    file.set_len(0x3000)?;
    let place = FileOffset::new(file.try_clone()?, 0x1000);
    let memory: GuestMemoryMmap = memory(MmapRange::new_unix(2 * PAGE, Some(place), START), START)?;
    memory.write_slice(b"to the file", GuestAddress(START.0 + 8))?;
    let mut bytes = [0; 11];
    file.read_exact_at(&mut bytes, 0x1008)?;
    assert_eq!(&bytes, b"to the file");
    Ok(())
}

fn unix_region_past_end_of_file_is_refused(_: &mut dyn Environment) -> Outcome {
    let file = memfd("file")?;
    file.set_len(0x1000)?;
    let place = FileOffset::new(file, 0);
    let region = MmapRegion::<()>::from_range(MmapRange::new_unix(2 * PAGE, Some(place), START));
    match region {
        Err(MmapRegionError::MappingPastEof) => Ok(()),
        Err(MmapRegionError::Mmap(error)) => Err(error.into()),
        other => panic!("{other:?}"),
    }
}

fn unix_region_for_reading_refuses_writes(_: &mut dyn Environment) -> Outcome {
    let mut range = MmapRange::new_unix(PAGE, None, START);
    range.set_prot(libc::PROT_READ);
    let memory: GuestMemoryMmap = memory(range, START)?;
    assert!(GuestMemory::check_range(
        &memory,
        START,
        8,
        Permissions::Read
    ));
    assert!(!GuestMemory::check_range(
        &memory,
        START,
        8,
        Permissions::Write
    ));
    assert!(memory.write_obj(1u32, START).is_err());
    assert_eq!(memory.read_obj::<u32>(START)?, 0);
    Ok(())
}

fn unix_region_marks_its_last_page(_: &mut dyn Environment) -> Outcome {
    let range = MmapRange::new_unix(2 * PAGE + 1, None, START);
    let memory: GuestMemoryMmap<AtomicBitmap> = memory(range, START)?;
    memory.write_obj(1u8, GuestAddress(START.0 + 0x2000))?;
    let region = memory.find_region(START).expect("the region is there");
    assert!(region.bitmap().dirty_at(0x2000));
    assert!(!region.bitmap().dirty_at(0x1000));
    Ok(())
}

fn unix_regions_of_same_bytes_overlap(_: &mut dyn Environment) -> Outcome {
    let file = memfd("file")?;
    file.set_len(0x4000)?;
    let region = |at: u64| -> Outcome<MmapRegion> {
        let place = FileOffset::new(file.try_clone()?, at);
        let range = MmapRange::new_unix(2 * PAGE, Some(place), START);
        Ok(MmapRegion::from_range(range)?)
    };
    // Regions of descriptors that differ do not overlap, even if the file is the same.
    let (low, middle) = (region(0)?, region(0x1000)?);
    assert!(!low.fds_overlap(&middle));
    let place = FileOffset::new(file, 0);
    let shared = |at: u64| -> Outcome<MmapRegion> {
        let place = FileOffset::from_arc(place.arc().clone(), at);
        let range = MmapRange::new_unix(2 * PAGE, Some(place), START);
        Ok(MmapRegion::from_range(range)?)
    };
    let (low, middle, high) = (shared(0)?, shared(0x1000)?, shared(0x2000)?);
    assert!(low.fds_overlap(&middle));
    assert!(!low.fds_overlap(&high));
    Ok(())
}

fn flags_have_their_published_values(_: &mut dyn Environment) -> Outcome {
    let values = [
        (MmapXenFlags::UNIX, 0),
        (MmapXenFlags::FOREIGN, 1),
        (MmapXenFlags::GRANT, 2),
        (MmapXenFlags::NO_ADVANCE_MAP, 8),
        (MmapXenFlags::ALL, 3),
    ];
    for (flag, bits) in values {
        assert_eq!(flag.bits(), bits, "{flag:?}");
    }
    for bits in 0..64u32 {
        let known = bits & !0xb == 0;
        let flags = MmapXenFlags::from_bits(bits);
        assert_eq!(flags.is_some(), known, "{bits:#x}");
        if let Some(flags) = flags {
            assert_eq!(flags.is_valid(), [0, 1, 2, 10].contains(&bits), "{bits:#x}");
        }
    }
    assert!(MmapXenFlags::from_bits(0x100).is_none());
    Ok(())
}

#[cfg(feature = "additions")]
fn constructors_without_xen_stay(_: &mut dyn Environment) -> Outcome {
    let region = MmapRegion::<()>::new(PAGE)?;
    assert_eq!((region.size(), region.owned()), (PAGE, true));
    let region = vm_memory::mmap::MmapRegionBuilder::<()>::new(PAGE).build()?;
    assert_eq!(region.xen_mmap_flags(), MmapXenFlags::UNIX.bits());
    region.as_volatile_slice().write_obj(7u32, 4)?;
    assert_eq!(region.as_volatile_slice().read_obj::<u32>(4)?, 7);
    Ok(())
}

#[cfg(not(feature = "additions"))]
fn constructors_without_xen_stay(_: &mut dyn Environment) -> Outcome {
    let region = MmapRegion::<()>::from_range(MmapRange::new_unix(PAGE, None, START))?;
    assert_eq!(region.as_volatile_slice().len(), PAGE);
    panic!("vm-memory has neither `MmapRegion::new` nor `MmapRegionBuilder` with the feature");
}
