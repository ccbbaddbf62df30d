//! Files that are mapped and unmapped in an arena on Windows, and accesses of a guest to it.
#![cfg(windows)]
#![expect(
    unsafe_code,
    reason = "accesses the addresses of an arena as guest memory, and queries their state"
)]

use std::error::Error;
use std::fs::File;
use std::io::ErrorKind;
use std::mem::{size_of, MaybeUninit};
use std::os::windows::fs::FileExt;

use test_support::{in_own_process, skipped, temp_file, temp_file_of_len, MIB, PAGE, PAGE_U64};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    fault, Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    Permissions,
};
use vm_memory_host::{still_mapped, Arena, ArenaError};
use windows_sys::Win32::System::Memory::{VirtualQuery, MEMORY_BASIC_INFORMATION, MEM_FREE};

/// Creates an arena, or reports a skip if the system has no placeholders. The error says so.
fn arena(test: &str, pages: u64) -> Option<Arena> {
    match Arena::new(pages * PAGE_U64) {
        Ok(arena) => Some(arena),
        Err(error) => {
            assert_names_the_version(&error);
            skipped(test, "this system has no placeholders");
            None
        }
    }
}

fn assert_names_the_version(error: &ArenaError) {
    let ArenaError::System { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(source.kind(), ErrorKind::Unsupported, "{source}");
    let cause = error.source().unwrap().to_string();
    assert!(cause.contains("Windows 10 version 1803"), "{cause}");
}

/// Returns the addresses of an arena as guest memory that begins at 0.
fn guest_of(arena: &Arena) -> GuestMemoryMmap {
    fault::install().unwrap();
    let start = std::ptr::with_exposed_provenance_mut(arena.host_address());
    let builder = MmapRegionBuilder::new(usize::try_from(arena.size()).unwrap());
    // SAFETY: the arena keeps its addresses, and each test drops the memory first. An access where
    // nothing is mapped returns an error, because the fault handler is installed.
    let builder = unsafe { builder.with_raw_mmap_pointer(start) };
    memory_of(builder.build().unwrap())
}

fn memory_of(region: MmapRegion) -> GuestMemoryMmap {
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    GuestMemoryMmap::from_regions(vec![region]).unwrap()
}

fn page(number: u64) -> GuestAddress {
    GuestAddress(number * PAGE_U64)
}

/// Returns the first eight bytes of a page of the file `tag`.
fn number_of(tag: u64, page: u64) -> u64 {
    (tag << 32) | page
}

/// Creates the file `tag`, each page of which begins with its own number.
fn numbered_pages(tag: u64, pages: u64) -> File {
    let file = temp_file_of_len(pages * PAGE_U64);
    for number in 0..pages {
        let at = number * PAGE_U64;
        let written = file.seek_write(&number_of(tag, number).to_le_bytes(), at);
        assert_eq!(written.unwrap(), 8);
    }
    file
}

/// Returns the first number of a page, or `None` if an access to it fails.
fn number_in(memory: &GuestMemoryMmap, number: u64) -> Option<u64> {
    memory.read_obj::<u64>(page(number)).ok()
}

fn map(arena: &Arena, at: u64, pages: u64, file: &File, from: u64) -> Result<(), ArenaError> {
    let [at, len, from] = [at, pages, from].map(|pages| pages * PAGE_U64);
    arena.map(at, len, file, from, Permissions::ReadWrite)
}

fn unmap(arena: &Arena, at: u64, pages: u64) -> Result<(), ArenaError> {
    arena.unmap(at * PAGE_U64, pages * PAGE_U64)
}

fn mapped_pages(arena: &Arena) -> Vec<(u64, u64)> {
    let ranges = arena.mapped().into_iter();
    ranges
        .map(|(at, len)| (at / PAGE_U64, len / PAGE_U64))
        .collect()
}

#[test]
fn new_of_arena_succeeds_or_names_the_version_of_windows() {
    match Arena::new(MIB) {
        Ok(arena) => assert!(arena.mapped().is_empty()),
        Err(error) => assert_names_the_version(&error),
    }
    // A system with placeholders does not confuse a size that is too large with the lack of them.
    let error = Arena::new(1 << 50).unwrap_err();
    let ArenaError::System { source, .. } = error else {
        panic!("{error}");
    };
    let is_supported = Arena::new(MIB).is_ok();
    assert_eq!(
        source.kind() != ErrorKind::Unsupported,
        is_supported,
        "{source}"
    );
    // Neither length nor alignment of these is valid.
    for arena in [Arena::new(0), Arena::new(1)] {
        assert!(matches!(arena, Err(ArenaError::Range { .. })));
    }
    let error = Arena::with_alignment(MIB, 3).unwrap_err();
    assert!(matches!(error, ArenaError::Alignment { .. }), "{error}");
}

#[test]
fn guest_access_reaches_the_mapped_parts_of_files_and_nothing_else() {
    let test = "guest_access_reaches_the_mapped_parts_of_files_and_nothing_else";
    let Some(arena) = arena(test, 64) else {
        return;
    };
    assert!(u64::try_from(arena.host_address())
        .unwrap()
        .is_multiple_of(2 * MIB));
    let [one, two] = [1, 2].map(|tag| numbered_pages(tag, 32));
    // None of these is a multiple of the allocation granularity.
    map(&arena, 3, 5, &one, 7).unwrap();
    let (at, len) = (17 * PAGE_U64, 2 * PAGE_U64);
    arena
        .map(at, len, &two, PAGE_U64, Permissions::Read)
        .unwrap();
    assert_eq!(mapped_pages(&arena), [(3, 5), (17, 2)]);

    let guest = guest_of(&arena);
    let whole = FileOffset::new(one.try_clone().unwrap(), 0);
    let other = memory_of(MmapRegion::from_file(whole, 32 * PAGE).unwrap());
    for number in 0..64 {
        let expected = match number {
            3..8 => Some(number_of(1, number + 4)),
            17..19 => Some(number_of(2, number - 16)),
            _ => None,
        };
        assert_eq!(number_in(&guest, number), expected, "{number}");
    }
    other.write_slice(b"to the guest", page(9)).unwrap();
    assert_eq!(
        guest.read_obj::<[u8; 12]>(page(5)).unwrap(),
        *b"to the guest"
    );
    guest.write_slice(b"from the guest", page(7)).unwrap();
    assert_eq!(
        other.read_obj::<[u8; 14]>(page(11)).unwrap(),
        *b"from the guest"
    );
    // The bytes before a fault are counted, and a page for reading stays as it is.
    let bytes = [7; 6 * PAGE];
    assert_eq!(guest.write(&bytes, page(3)).unwrap(), 5 * PAGE);
    assert!(guest.write_obj(7u8, page(17)).is_err());

    unmap(&arena, 0, 10).unwrap();
    assert_eq!(mapped_pages(&arena), [(17, 2)]);
    assert!((0..17).all(|number| number_in(&guest, number).is_none()));
    assert_eq!(number_in(&guest, 17), Some(number_of(2, 1)));
    assert_eq!(other.read_obj::<u8>(page(7)).unwrap(), 7);
}

#[test]
fn change_that_would_cut_or_replace_a_mapping_returns_error_and_changes_nothing() {
    let test = "change_that_would_cut_or_replace_a_mapping_returns_error_and_changes_nothing";
    let Some(arena) = arena(test, 16) else {
        return;
    };
    let [one, two] = [1, 2].map(|tag| numbered_pages(tag, 16));
    map(&arena, 4, 4, &one, 0).unwrap();
    let guest = guest_of(&arena);
    let is_refused = |result: Result<(), ArenaError>| match result {
        Err(ArenaError::Mapped {
            mapped_offset,
            mapped_len,
            ..
        }) => (mapped_offset, mapped_len) == (4 * PAGE_U64, 4 * PAGE_U64),
        _ => false,
    };
    for (at, pages) in [(4, 1), (5, 1), (7, 1), (3, 2), (7, 2), (0, 7), (5, 11)] {
        assert!(is_refused(unmap(&arena, at, pages)), "{at} {pages}");
        assert!(is_refused(map(&arena, at, pages, &two, 0)), "{at} {pages}");
    }
    assert!(is_refused(map(&arena, 4, 4, &two, 0)));
    assert!(is_refused(map(&arena, 0, 16, &two, 0)));
    assert_eq!(
        unmap(&arena, 5, 1).unwrap_err().to_string(),
        "cannot change 0x1000 bytes at offset 0x5000 of an arena: 0x4000 bytes are mapped at \
        offset 0x4000, and this system unmaps all of them or none; unmap these first"
    );
    assert_eq!(mapped_pages(&arena), [(4, 4)]);
    for number in 0..16 {
        let expected = (4..8).contains(&number).then(|| number_of(1, number - 4));
        assert_eq!(number_in(&guest, number), expected, "{number}");
    }
    // The neighbours are free, and so is the range after it is unmapped.
    map(&arena, 3, 1, &two, 0).unwrap();
    map(&arena, 8, 8, &two, 8).unwrap();
    unmap(&arena, 4, 4).unwrap();
    map(&arena, 5, 2, &two, 3).unwrap();
    assert_eq!(mapped_pages(&arena), [(3, 1), (5, 2), (8, 8)]);
    assert_eq!(number_in(&guest, 6), Some(number_of(2, 4)));
    unmap(&arena, 0, 16).unwrap();
    map(&arena, 0, 16, &one, 0).unwrap();
    assert_eq!(number_in(&guest, 15), Some(number_of(1, 15)));
}

#[test]
fn map_of_file_shows_its_partial_last_page_and_refuses_pages_past_it() {
    let test = "map_of_file_shows_its_partial_last_page_and_refuses_pages_past_it";
    let Some(arena) = arena(test, 16) else {
        return;
    };
    let file = temp_file(&[9; PAGE + PAGE / 2]);
    for (pages, from) in [(3, 0), (1, 2), (1, 1 << 50)] {
        let ArenaError::System { source, .. } = map(&arena, 1, pages, &file, from).unwrap_err()
        else {
            panic!("{pages} {from}");
        };
        assert!(source.to_string().contains("ends at 0x1800"), "{source}");
    }
    let empty = temp_file(&[]);
    assert!(map(&arena, 1, 1, &empty, 0).is_err());
    assert!(arena.mapped().is_empty());

    map(&arena, 1, 2, &file, 0).unwrap();
    let guest = guest_of(&arena);
    let bytes: [u8; PAGE] = guest.read_obj(page(2)).unwrap();
    assert_eq!(bytes[..PAGE / 2], [9; PAGE / 2]);
    assert_eq!(bytes[PAGE / 2..], [0; PAGE / 2]);
    guest
        .write_obj(7u8, GuestAddress(3 * PAGE_U64 - 1))
        .unwrap();
    assert_eq!(number_in(&guest, 3), None);
    unmap(&arena, 1, 2).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0x1800);
}

#[test]
fn map_of_file_that_is_not_open_for_writing_permits_reads_only() {
    let test = "map_of_file_that_is_not_open_for_writing_permits_reads_only";
    let Some(arena) = arena(test, 16) else {
        return;
    };
    let named = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(named.path(), [7; PAGE]).unwrap();
    let file = File::open(named.path()).unwrap();
    let error = map(&arena, 2, 1, &file, 0).unwrap_err();
    assert!(
        matches!(error, ArenaError::System { what: "map", .. }),
        "{error}"
    );
    let access = Permissions::Read;
    arena.map(2 * PAGE_U64, PAGE_U64, &file, 0, access).unwrap();
    let guest = guest_of(&arena);
    assert_eq!(guest.read_obj::<u8>(page(2)).unwrap(), 7);
    assert!(guest.write_obj(8u8, page(2)).is_err());
}

/// The number that the model expects in each page of an arena, and where the mapping of it begins.
type Model = [Option<(u64, u64)>; 24];

#[test]
fn arena_after_random_changes_shows_what_a_model_shows() {
    let test = "arena_after_random_changes_shows_what_a_model_shows";
    let Some(arena) = arena(test, 24) else {
        return;
    };
    let files = [1, 2, 3].map(|tag| numbered_pages(tag, 32));
    let guest = guest_of(&arena);
    let (mut model, mut random): (Model, _) = ([None; 24], fastrand::Rng::with_seed(1));
    let mut changes = [0, 0, 0];
    for step in 0..600 {
        let at = random.usize(..24);
        let end = (at + random.usize(1..=8)).min(24);
        let (from, pages) = (random.u64(..24), (end - at) as u64);
        let range = &model[at..end];
        let start = |at: usize| model.get(at).copied().flatten().map(|(_, start)| start);
        let is_cut = |at: usize| at > 0 && start(at).is_some() && start(at) == start(at - 1);
        let (is_allowed, result) = if random.bool() {
            let file = random.usize(..3);
            let is_free = range.iter().all(Option::is_none);
            let result = map(&arena, at as u64, pages, &files[file], from);
            if is_free {
                for (page, shown) in (from..).zip(&mut model[at..end]) {
                    *shown = Some((number_of(file as u64 + 1, page), step));
                }
            }
            (is_free, result)
        } else {
            let is_whole = !is_cut(at) && !is_cut(end);
            if is_whole {
                model[at..end].fill(None);
            }
            (is_whole, unmap(&arena, at as u64, pages))
        };
        match result {
            Ok(()) => changes[0] += 1,
            Err(ArenaError::Mapped { .. }) => changes[1] += 1,
            Err(error) => panic!("{step}: {error}"),
        }
        assert_eq!(result.is_ok(), is_allowed, "{step}: {at}..{end}");
        for (number, expected) in (0..).zip(&model) {
            let expected = expected.map(|(number, _)| number);
            assert_eq!(number_in(&guest, number), expected, "{step}: {number}");
        }
        changes[2] += arena.mapped().len();
    }
    assert!(changes.iter().all(|count| *count > 100), "{changes:?}");
}

/// Returns whether all pages of a range are free addresses.
fn are_free(start: usize, len: usize) -> bool {
    (start..start + len).step_by(PAGE).all(|at| {
        let mut info = MaybeUninit::<MEMORY_BASIC_INFORMATION>::uninit();
        let at = std::ptr::without_provenance(at);
        // SAFETY: the call writes one structure to its argument, which has room for it.
        let written = unsafe { VirtualQuery(at, info.as_mut_ptr(), size_of_val(&info)) };
        assert_eq!(written, size_of::<MEMORY_BASIC_INFORMATION>());
        // SAFETY: the call has written the structure.
        unsafe { info.assume_init() }.State == MEM_FREE
    })
}

#[test]
fn drop_of_arena_frees_all_addresses_and_files() {
    let test = "drop_of_arena_frees_all_addresses_and_files";
    // In another test, a thread could take the addresses.
    in_own_process(test, |test| {
        let Some(arena) = arena(test, 64) else {
            return;
        };
        let file = numbered_pages(1, 32);
        map(&arena, 0, 1, &file, 0).unwrap();
        map(&arena, 20, 4, &file, 3).unwrap();
        map(&arena, 40, 24, &file, 0).unwrap();
        unmap(&arena, 20, 4).unwrap();
        map(&arena, 22, 1, &file, 0).unwrap();
        // Guards are on both sides.
        let (start, len) = (arena.host_address(), 64 * PAGE);
        for page in [start - PAGE, start, start + len - PAGE, start + len] {
            assert!(!are_free(page, PAGE));
        }
        // The system does not truncate a file that is mapped.
        assert!(file.set_len(0).is_err());
        drop(arena);
        assert!(are_free(start - PAGE, len + 2 * PAGE));
        file.set_len(0).unwrap();
        assert_eq!(still_mapped(), 0);
    });
}
