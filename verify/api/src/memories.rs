//! Guest memory in mappings: every method of [`GuestMemoryBackend`], [`GuestMemory`] and [`Bytes`],
//! on the types that VMMs use.

use std::io::Cursor;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::everything::*;
use crate::{Outcome, PAGE};

/// Two regions with a hole between them, for all callers here.
const RANGES: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 2 * PAGE), (GuestAddress(0x10000), PAGE)];

/// Calls each constructor of the default memory, whose bitmap is `()`.
pub fn made() -> Outcome {
    let inferred: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&RANGES)?;
    let named = GuestMemoryMmap::<()>::from_ranges_with_files(
        RANGES.iter().map(|(base, size)| (*base, *size, None)),
    )?;
    let regions = RANGES
        .iter()
        .map(|(base, size)| GuestRegionMmap::<()>::from_range(*base, *size, None))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let collected = GuestMemoryMmap::from_regions(regions)?;
    let shared = GuestMemoryMmap::from_arc_regions(vec![Arc::new(
        GuestRegionMmap::<()>::from_range(GuestAddress(0), PAGE, None)?,
    )])?;
    let empty: GuestRegionCollection<GuestRegionMmap> = GuestRegionCollection::new();
    let default = GuestMemoryMmap::<()>::default();
    let counts: Vec<_> = [&inferred, &named, &collected, &shared, &empty, &default]
        .iter()
        .map(|memory| memory.num_regions())
        .collect();
    assert_eq!(counts, [2, 2, 2, 1, 0, 0]);

    let more = shared.insert_region(Arc::new(GuestRegionMmap::from_range(
        GuestAddress(0x8000),
        PAGE,
        None,
    )?))?;
    let (less, removed) = more.remove_region(GuestAddress(0x8000), PAGE as GuestUsize)?;
    assert_eq!((more.num_regions(), less.num_regions()), (2, 1));
    assert_eq!(removed.start_addr(), GuestAddress(0x8000));
    Ok(())
}

/// Calls the methods of [`GuestMemoryBackend`], without naming the trait where 0.18.0 allows it.
pub fn looked_up() -> Outcome {
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&RANGES)?;
    let inside = GuestAddress(0x10010);
    assert_eq!(memory.num_regions(), 2);
    assert!(memory.find_region(inside).is_some());
    assert_eq!(memory.iter().count(), 2);
    assert_eq!(
        memory.iter().map(|region| region.len()).sum::<u64>(),
        3 * PAGE as u64
    );
    let (region, offset) = memory.to_region_addr(inside).ok_or("no region")?;
    assert_eq!((region.start_addr().0, offset.0), (0x10000, 0x10));
    assert_eq!(memory.last_addr(), GuestAddress(0x10fff));
    assert!(memory.address_in_range(inside));
    assert_eq!(memory.check_address(inside), Some(inside));
    assert_eq!(
        memory.checked_offset(GuestAddress(0), 0x1fff),
        Some(GuestAddress(0x1fff))
    );
    assert!(!memory.get_host_address(inside)?.is_null());
    assert_eq!(memory.get_slice(inside, 16)?.len(), 16);
    // Both traits have these two methods, in 0.18.0 as well.
    assert!(GuestMemoryBackend::check_range(
        &memory,
        GuestAddress(0),
        2 * PAGE
    ));
    assert!(GuestMemory::check_range(
        &memory,
        GuestAddress(0),
        2 * PAGE,
        Permissions::ReadWrite
    ));
    assert_eq!(
        GuestMemoryBackend::get_slices(&memory, inside, 16).count(),
        1
    );
    assert_eq!(
        GuestMemory::get_slices(&memory, inside, 16, Permissions::Read)?.count(),
        1
    );
    assert!(memory.physical_memory().is_some());
    Ok(())
}

/// Iterates over slices with the methods of [`Iterator`] and [`GuestMemorySliceIterator`] in scope.
pub fn iterated() -> Outcome {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), PAGE),
        (GuestAddress(PAGE as u64), PAGE),
    ])?;
    let slices = || GuestMemoryBackend::get_slices(&memory, GuestAddress(0), 2 * PAGE);
    let mut iterator = slices();
    assert_eq!(
        iterator
            .by_ref()
            .take(1)
            .flatten()
            .map(|slice| slice.len())
            .sum::<usize>(),
        PAGE
    );
    assert_eq!(iterator.next().ok_or("one more")??.len(), PAGE);
    assert!(iterator.next().is_none());
    assert_eq!(
        slices()
            .stop_on_error()?
            .map(|slice| slice.len())
            .collect::<Vec<_>>(),
        [PAGE, PAGE]
    );
    let collected: GuestMemoryResult<Vec<_>> = slices().collect();
    assert_eq!(collected?.len(), 2);
    assert!(slices().all(|slice| slice.is_ok_and(|slice| !slice.is_empty())));
    assert_eq!(slices().fuse().enumerate().last().ok_or("none")?.0, 1);
    let by_permission =
        GuestMemory::get_slices(&memory, GuestAddress(8), PAGE, Permissions::Write)?;
    assert_eq!(by_permission.stop_on_error()?.count(), 2);
    let beyond = |from| GuestMemoryBackend::get_slices(&memory, GuestAddress(from), 3 * PAGE);
    assert_eq!(beyond(0).stop_on_error()?.count(), 2);
    assert!(beyond(3 * PAGE as u64).stop_on_error().is_err());
    Ok(())
}

/// The bitmap of [`accessed`]. On Windows, 0.18.0 creates a mapping only with a new one.
#[cfg(unix)]
type Marks = Option<AtomicBitmap>;
#[cfg(windows)]
type Marks = AtomicBitmap;

/// Calls [`Bytes`] by guest address, with types inferred from their use.
pub fn accessed() -> Outcome {
    #[cfg(unix)]
    let mapping = MmapRegionBuilder::new_with_bitmap(PAGE, Some(AtomicBitmap::with_len(PAGE)))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .build()?;
    #[cfg(windows)]
    let mapping = MmapRegion::new(PAGE)?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or("past the end")?;
    let memory: GuestMemoryMmap<Marks> = GuestMemoryMmap::from_regions(vec![region])?;
    let address = GuestAddress(0x100);
    assert_eq!(memory.write(&[1, 2, 3], address)?, 3);
    memory.write_slice(&[4, 5, 6, 7], address)?;
    memory.write_slice(b"text", GuestAddress(0x200))?;
    let mut buffer = [0; 4];
    assert_eq!(memory.read(&mut buffer, address)?, 4);
    memory.read_slice(&mut buffer, address)?;
    assert_eq!(buffer, [4, 5, 6, 7]);
    memory.write_obj(0x1234u32, address)?;
    memory.write_obj(Le64::from(5), address.unchecked_add(8))?;
    let value: u32 = memory.read_obj(address)?;
    assert_eq!(value, 0x1234);
    assert_eq!(memory.read_obj::<Le64>(address.unchecked_add(8))?, 5);
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x200))?, *b"text");
    memory.store(7u16, address, Ordering::Release)?;
    assert_eq!(memory.load::<u16>(address, Ordering::Acquire)?, 7);
    let flags: u8 = memory.load(address, Ordering::Relaxed)?;
    assert_eq!(flags, 7);

    assert_eq!(
        memory.read_volatile_from(address, &mut &[9u8; 8][..], 8)?,
        8
    );
    memory.read_exact_volatile_from(address, &mut Cursor::new(vec![8u8; 8]), 8)?;
    let mut sink = Vec::new();
    assert_eq!(memory.write_volatile_to(address, &mut sink, 4)?, 4);
    memory.write_all_volatile_to(address, &mut sink, 4)?;
    assert_eq!(sink, [8; 8]);

    let hole: std::result::Result<u8, GuestMemoryError> = memory.read_obj(GuestAddress(0x8000));
    assert!(matches!(
        hole,
        Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(0x8000)))
    ));
    Ok(())
}

/// Calls [`Bytes`] through references, `Arc`, and a region that was found by address.
pub fn behind_pointers() -> Outcome {
    let memory: Arc<GuestMemoryMmap> = Arc::new(GuestMemoryMmap::from_ranges(&RANGES)?);
    memory.write_obj(1u64, GuestAddress(8))?;
    let held = memory.memory();
    assert_eq!(held.read_obj::<u64>(GuestAddress(8))?, 1);
    assert_eq!(held.num_regions(), 2);
    assert_eq!(memory.get_slice(GuestAddress(8), 8)?.read_obj::<u64>(0)?, 1);

    let region = memory.find_region(GuestAddress(8)).ok_or("no region")?;
    assert_eq!(region.read_obj::<u64>(MemoryRegionAddress(8))?, 1);
    let (region, offset) = memory.to_region_addr(GuestAddress(9)).ok_or("no region")?;
    assert_eq!(region.write(&[1, 2], offset)?, 2);
    for region in memory.iter() {
        region.write_obj(0u8, MemoryRegionAddress(0))?;
    }
    Ok(())
}

/// Calls the deprecated method, which this crate keeps.
#[expect(
    deprecated,
    reason = "0.18.0 deprecates it, and its users still call it"
)]
pub fn deprecated() -> Outcome {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), PAGE),
        (GuestAddress(PAGE as u64), PAGE),
    ])?;
    let mut seen = Vec::new();
    let done = memory.try_access(
        0x20,
        GuestAddress(0xff0),
        |offset, length, address, region| {
            seen.push((
                offset,
                length,
                address.raw_value(),
                region.start_addr().raw_value(),
            ));
            Ok(length)
        },
    )?;
    assert_eq!(done, 0x20);
    assert_eq!(seen, [(0, 0x10, 0xff0, 0), (0x10, 0x10, 0, 0x1000)]);
    Ok(())
}

/// Calls the methods of a trait that a VMM defines. A method of the library with one of these names
/// would make the call ambiguous.
pub fn extended() -> Outcome {
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&RANGES)?;
    let answers: [Mine; 10] = [
        memory.find_slice(),
        memory.describe(),
        memory.dump(),
        memory.dump_dirty(),
        memory.reset_dirty(),
        memory.store_dirty_bitmap(),
        memory.mark_dirty(GuestAddress(0), 1),
        memory.discard_range(GuestAddress(0), PAGE),
        memory.read_cstr(GuestAddress(0)),
        memory.zero_range(GuestAddress(0), 1),
    ];
    assert_eq!(answers[6], Mine("mark_dirty"));
    Ok(())
}
