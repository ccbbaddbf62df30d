//! Regions and their mappings. A [`GuestRegionMmap`] is a [`GuestMemoryRegion`] and derefs to an
//! [`MmapRegion`], a [`VolatileMemory`] with many of the same method names. The method that a call
//! resolves to must not change.

use std::io::Cursor;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use crate::everything::*;
use crate::{Outcome, PAGE};

/// Creates a file of `pages` pages, each filled with its number.
fn file(pages: u8) -> std::io::Result<std::fs::File> {
    let mut file = tempfile::tempfile()?;
    for page in 0..pages {
        file.write_all(&[page; PAGE])?;
    }
    Ok(file)
}

/// Calls every method of a region.
pub fn region() -> Outcome {
    let region = GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(0x4000), PAGE, None)?;
    let length: u64 = region.len();
    assert_eq!(length, PAGE as u64);
    assert_eq!(region.start_addr(), GuestAddress(0x4000));
    assert_eq!(region.last_addr(), GuestAddress(0x4fff));
    let offset = MemoryRegionAddress(0x10);
    assert!(region.address_in_range(offset));
    assert_eq!(region.check_address(offset), Some(offset));
    assert_eq!(region.checked_offset(offset, 0xff0), None);
    assert_eq!(region.to_region_addr(GuestAddress(0x4010)), Some(offset));
    assert!(region.file_offset().is_none());
    #[cfg(target_os = "linux")]
    assert_eq!(region.is_hugetlbfs(), None);
    assert!(!region.get_host_address(offset)?.is_null());
    let slice: VolatileSlice<'_, BS<'_, AtomicBitmap>> = region.get_slice(offset, 8)?;
    assert_eq!(slice.len(), 8);
    assert_eq!(region.as_volatile_slice()?.len(), PAGE);

    region.write_obj(1u32, offset)?;
    assert!(region.bitmap().dirty_at(0x10));
    assert_eq!(region.read_obj::<u32>(offset)?, 1);
    region.store(2u32, offset, Ordering::Release)?;
    assert_eq!(region.load::<u32>(offset, Ordering::Acquire)?, 2);
    assert_eq!(region.write(&[1], offset)?, 1);
    region.write_slice(&[1, 2], offset)?;
    let mut buffer = [0; 2];
    assert_eq!(region.read(&mut buffer, offset)?, 2);
    region.read_slice(&mut buffer, offset)?;
    assert_eq!(region.read_volatile_from(offset, &mut &[3u8; 2][..], 2)?, 2);
    region.read_exact_volatile_from(offset, &mut Cursor::new([3u8; 2]), 2)?;
    assert_eq!(region.write_volatile_to(offset, &mut Vec::new(), 2)?, 2);
    region.write_all_volatile_to(offset, &mut &mut buffer[..], 2)?;
    assert_eq!(buffer, [3; 2]);

    let answers: [Mine; 7] = [
        region.slot(),
        region.unplug(),
        region.discard_range(0, PAGE),
        region.advise(),
        region.protect(),
        region.read_cstr(offset),
        region.zero_range(offset, 1),
    ];
    assert_eq!(answers[2], Mine("discard_range"));
    Ok(())
}

/// Calls the methods that a region has by deref to its mapping.
pub fn region_as_mapping() -> Outcome {
    let region = GuestRegionMmap::<()>::new(MmapRegion::new(PAGE)?, GuestAddress(0x4000))
        .ok_or("past the end")?;
    let mapping: Arc<MmapRegion<()>> = region.get_mmap();
    let again =
        GuestRegionMmap::with_arc(mapping.clone(), GuestAddress(0x8000)).ok_or("past the end")?;
    assert_eq!(region.as_ptr(), mapping.as_ptr());
    assert_eq!(again.as_ptr(), region.as_ptr());
    assert_eq!(region.size(), PAGE);
    #[cfg(unix)]
    {
        let _: &MmapRegion = &mapping;
        assert_eq!(region.prot(), libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(region.flags() & libc::MAP_ANONYMOUS, libc::MAP_ANONYMOUS);
        assert!(region.owned());
        assert!(!region.fds_overlap(&again));
    }
    assert!(!region.is_empty());
    assert_eq!(region.compute_end_offset(0, PAGE)?, PAGE);
    region.get_ref::<u32>(4)?.store(5);
    assert_eq!(region.get_array_ref::<u16>(4, 2)?.load(0), 5);
    assert_eq!(
        region
            .get_atomic_ref::<AtomicU32>(4)?
            .load(Ordering::Relaxed),
        5
    );
    // With the trait's name this is the mapping's method, without it the region's.
    assert_eq!(VolatileMemory::get_slice(&*region, 4, 4)?.len(), 4);
    assert_eq!(VolatileMemory::len(&*region), PAGE);
    Ok(())
}

/// Calls every method of a mapping.
pub fn mapping() -> Outcome {
    let file = Arc::new(file(3)?);
    let at = |start| FileOffset::from_arc(file.clone(), start);
    let mapping = MmapRegion::<AtomicBitmap>::from_file(at(PAGE as u64), PAGE)?;
    assert_eq!(mapping.size(), PAGE);
    assert_eq!(mapping.len(), PAGE);
    assert!(!mapping.is_empty());
    let backing = mapping.file_offset().ok_or("no file")?;
    assert_eq!(
        (backing.start(), backing.file().metadata()?.len()),
        (PAGE as u64, 3 * PAGE as u64)
    );
    assert!(Arc::ptr_eq(backing.arc(), &file));

    assert_eq!(mapping.as_volatile_slice().read_obj::<u8>(0)?, 1);
    assert_eq!(mapping.get_slice(PAGE - 1, 1)?.len(), 1);
    assert_eq!(mapping.compute_end_offset(1, 2)?, 3);
    mapping.get_ref::<u8>(0)?.store(9);
    assert!(mapping.bitmap().dirty_at(0));
    assert_eq!(mapping.get_array_ref::<u8>(0, 2)?.len(), 2);
    assert_eq!(
        mapping
            .get_atomic_ref::<AtomicU32>(0)?
            .load(Ordering::Relaxed),
        0x0101_0109
    );
    // SAFETY: only this function accesses the mapping, and the reference ends with the statement.
    assert_eq!(*unsafe { mapping.aligned_as_ref::<u32>(0) }?, 0x0101_0109);
    // SAFETY: only this function accesses the mapping, and the reference ends with the statement.
    *unsafe { mapping.aligned_as_mut::<u32>(0) }? = 7;
    assert_eq!(mapping.get_ref::<u32>(0)?.load(), 7);
    let answers: [Mine; 2] = [mapping.advise(), mapping.protect()];
    assert_eq!(answers[1], Mine("protect"));
    Ok(())
}

/// Calls the methods that a mapping has on Unix only.
#[cfg(unix)]
pub fn mapping_of_unix() -> Outcome {
    let file = Arc::new(file(3)?);
    let at = |start| FileOffset::from_arc(file.clone(), start);
    let mut mapping = MmapRegion::<AtomicBitmap>::from_file(at(PAGE as u64), PAGE)?;
    assert!(mapping.owned());
    assert_eq!(mapping.prot(), libc::PROT_READ | libc::PROT_WRITE);
    assert_ne!(mapping.flags() & libc::MAP_SHARED, 0);
    assert_eq!(mapping.is_hugetlbfs(), None);
    mapping.set_hugetlbfs(false);
    assert_eq!(mapping.is_hugetlbfs(), Some(false));
    let other = MmapRegion::<()>::from_file(at(0), PAGE)?;
    assert!(!mapping.fds_overlap(&other));
    Ok(())
}

/// Calls the constructors of a memory with files.
pub fn with_files() -> Outcome {
    let ranges = GuestMemoryMmap::<()>::from_ranges_with_files(&[(
        GuestAddress(0),
        PAGE,
        Some(FileOffset::new(file(1)?, 0)),
    )])?;
    assert_eq!(ranges.num_regions(), 1);
    Ok(())
}

/// Calls the other constructors, which exist on Unix only.
#[cfg(unix)]
pub fn built() -> Outcome {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    );
    let anonymous = MmapRegion::<()>::build(None, PAGE, prot, flags | libc::MAP_ANONYMOUS)?;
    // SAFETY: `anonymous` has this length, and outlives the mapping created here.
    let borrowed = unsafe { MmapRegion::<()>::build_raw(anonymous.as_ptr(), PAGE, prot, flags) }?;
    assert!(!borrowed.owned());
    let builder = MmapRegionBuilder::new_with_bitmap(PAGE, ())
        .with_mmap_prot(prot)
        .with_mmap_flags(flags)
        .with_hugetlbfs(false)
        .with_file_offset(FileOffset::new(file(1)?, 0));
    assert_eq!(builder.build()?.size(), PAGE);
    // SAFETY: `anonymous` has this length, and outlives the mapping created here.
    let raw =
        unsafe { MmapRegionBuilder::<()>::new(PAGE).with_raw_mmap_pointer(anonymous.as_ptr()) };
    assert_eq!(raw.build()?.as_ptr(), anonymous.as_ptr());
    assert!(matches!(
        MmapRegion::<()>::build(None, PAGE, prot, flags | libc::MAP_FIXED),
        Err(MmapRegionError::MapFixed)
    ));
    Ok(())
}
