use super::*;
use std::os::unix::fs::FileExt;
use test_support::{temp_file_of_len, HugePages, MIB, PAGE, PAGE_U64};

#[test]
fn cut_leaves_what_a_list_of_all_bytes_leaves() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut pieces, mut all) = (Pieces::default(), [false; 24]);
        for step in 0..12 {
            let (start, len) = (random.usize(..24), random.usize(1..=8));
            let end = (start + len).min(24);
            let is_mapped = random.bool();
            let count = pieces.count_after(start, end, is_mapped);
            pieces.cut(start, end);
            if is_mapped {
                pieces.0.insert(start, Piece { end, page: 1 });
            }
            assert_eq!(pieces.0.len(), count, "{seed} {step}");
            all[start..end].fill(is_mapped);
            let mut found = [false; 24];
            let mut last = 0;
            for (start, Piece { end, .. }) in &pieces.0 {
                assert!(last <= *start && start < end, "{seed} {step}: {pieces:?}");
                last = *end;
                found[*start..*end].fill(true);
            }
            assert_eq!(found, all, "{seed} {step}");
        }
    }
}

#[test]
#[expect(
    unsafe_code,
    reason = "lets the kernel read memory that may be inaccessible"
)]
fn arena_shows_the_mapped_parts_of_files_and_nothing_else() {
    let files = [1u8, 2].map(|byte| {
        let file = temp_file_of_len(8 * PAGE_U64);
        file.write_all_at(&[byte; 8 * PAGE], 0).unwrap();
        file
    });
    let arena = Arena::new(16 * PAGE_U64).unwrap();
    let address = arena.host_address();
    assert!(to_u64(address).is_multiple_of(sys::huge_page_size()));
    // Reads through a system call, which fails where the memory is inaccessible.
    let byte_of = |page: usize| {
        let (reader, writer) = std::io::pipe().unwrap();
        let from = std::ptr::with_exposed_provenance::<libc::c_void>(address + page * PAGE);
        // SAFETY: the kernel reads the byte, or returns an error.
        let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), from, 1) };
        let mut byte = [0];
        (written == 1).then(|| {
            std::io::Read::read_exact(&mut &reader, &mut byte).unwrap();
            byte[0]
        })
    };
    let shown = || (0..16).map(byte_of).collect::<Vec<_>>();
    assert_eq!(shown(), [None; 16]);
    let [one, two] = &files;
    let access = Permissions::ReadWrite;
    arena.map(0, 8 * PAGE_U64, one, 0, access).unwrap();
    arena
        .map(2 * PAGE_U64, 2 * PAGE_U64, two, PAGE_U64, access)
        .unwrap();
    arena.unmap(6 * PAGE_U64, 10 * PAGE_U64).unwrap();
    let (a, b) = (Some(1), Some(2));
    let expected = [a, a, b, b, a, a];
    assert_eq!(shown()[..6], expected);
    assert_eq!(shown()[6..], [None; 10]);
    let ranges = [(0, 2), (2, 2), (4, 2)].map(|(at, len)| (at * PAGE_U64, len * PAGE_U64));
    assert_eq!(arena.mapped(), ranges);
    arena
        .map(PAGE_U64, 4 * PAGE_U64, two, 0, Permissions::No)
        .unwrap();
    assert_eq!(arena.mapped(), [(0, PAGE_U64), (5 * PAGE_U64, PAGE_U64)]);
    assert_eq!(shown()[..6], [a, None, None, None, None, a]);
    arena.unmap(0, 16 * PAGE_U64).unwrap();
    assert_eq!(arena.lock().vmas.count(), VMAS_OF_EMPTY);
}

#[test]
fn change_of_invalid_range_or_file_returns_error_and_changes_nothing() {
    let arena = Arena::new(4 * PAGE_U64).unwrap();
    let file = temp_file_of_len(4 * PAGE_U64);
    arena.map(0, PAGE_U64, &file, 0, Permissions::Read).unwrap();
    for (offset, len) in [
        (0, 0),
        (1, PAGE_U64),
        (0, PAGE_U64 + 1),
        (0, 5 * PAGE_U64),
        (4 * PAGE_U64, PAGE_U64),
        (PAGE_U64, !(PAGE_U64 - 1)),
    ] {
        let unmapped = arena.unmap(offset, len);
        let mapped = arena.map(offset, len, &file, 0, Permissions::Read);
        for result in [unmapped, mapped] {
            let error = result.unwrap_err();
            assert!(matches!(error, ArenaError::Range { .. }), "{error}");
        }
    }
    let read_only = tempfile::NamedTempFile::new().unwrap();
    let read_only = File::open(read_only.path()).unwrap();
    let access = Permissions::ReadWrite;
    let error = arena.map(0, PAGE_U64, &read_only, 0, access).unwrap_err();
    assert!(matches!(error, ArenaError::System { .. }), "{error}");
    let error = arena.map(0, PAGE_U64, &file, 1, access).unwrap_err();
    assert!(matches!(error, ArenaError::FilePages { .. }), "{error}");
    assert_eq!(arena.mapped(), [(0, PAGE_U64)]);
    assert!(matches!(Arena::new(0), Err(ArenaError::Range { .. })));
    assert!(matches!(Arena::new(1), Err(ArenaError::Range { .. })));
}

/// The kernel does not divide a huge page. A refusal must not lose its addresses.
#[test]
fn change_that_cuts_page_of_hugetlb_file_returns_error_and_changes_nothing() {
    let test = "change_that_cuts_page_of_hugetlb_file_returns_error_and_changes_nothing";
    let Some(_pages) = HugePages::reserve(2, test) else {
        return;
    };
    let huge = 2 * MIB;
    let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
    let memfd = File::from(rustix::fs::memfd_create("arena", flags).unwrap());
    memfd.set_len(2 * huge).unwrap();
    let small = temp_file_of_len(huge);
    let arena = Arena::new(4 * huge).unwrap();
    let access = Permissions::ReadWrite;
    let error = arena.map(PAGE_U64, huge, &memfd, 0, access).unwrap_err();
    assert!(matches!(error, ArenaError::FilePages { .. }), "{error}");
    arena.map(0, 2 * huge, &memfd, 0, access).unwrap();

    for (offset, len) in [(0, PAGE_U64), (PAGE_U64, huge), (huge + PAGE_U64, PAGE_U64)] {
        let unmapped = arena.unmap(offset, len);
        let mapped = arena.map(offset, len, &small, 0, access);
        for result in [unmapped, mapped] {
            let error = result.unwrap_err();
            assert!(matches!(error, ArenaError::Range { .. }), "{error}");
        }
    }
    assert_eq!(arena.mapped(), [(0, 2 * huge)]);

    arena.map(0, huge, &small, 0, access).unwrap();
    arena.unmap(huge, huge).unwrap();
    arena.map(0, huge, &memfd, huge, access).unwrap();
    assert_eq!(arena.mapped(), [(0, huge)]);
}

#[test]
fn arena_with_alignment_maps_pages_of_1_gib() {
    const GIB: u64 = 1 << 30;
    let test = "arena_with_alignment_maps_pages_of_1_gib";
    for alignment in [0, 3, GIB + 1] {
        let error = Arena::with_alignment(GIB, alignment).unwrap_err();
        assert!(matches!(error, ArenaError::Alignment { .. }), "{error}");
    }
    let error = Arena::with_alignment(GIB, 1 << 63).unwrap_err();
    assert!(matches!(error, ArenaError::System { .. }), "{error}");
    let small = Arena::with_alignment(PAGE_U64, 1).unwrap();
    assert!(to_u64(small.host_address()).is_multiple_of(sys::huge_page_size()));

    let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_1GB;
    let memfd = match rustix::fs::memfd_create("arena", flags) {
        Ok(memfd) => File::from(memfd),
        Err(error) => return test_support::skipped(test, format!("no pages of 1 GiB: {error}")),
    };
    memfd.set_len(2 * GIB).unwrap();
    // Mapping a page does not need one: only an access does.
    let arena = Arena::with_alignment(2 * GIB, GIB).unwrap();
    let map =
        |arena: &Arena, offset, len, at| arena.map(offset, len, &memfd, at, Permissions::ReadWrite);
    map(&arena, GIB, GIB, GIB).unwrap();
    assert_eq!(arena.mapped(), [(GIB, GIB)]);
    arena.unmap(0, 2 * GIB).unwrap();
    for (offset, len, at) in [(2 * MIB, GIB, 0), (0, 2 * MIB, 0), (0, GIB, 2 * MIB)] {
        let error = map(&arena, offset, len, at).unwrap_err();
        assert!(matches!(error, ArenaError::FilePages { .. }), "{error}");
    }

    // The reservations are adjacent, so not all of them are aligned by chance.
    let others: Vec<_> = (0..8).map(|_| Arena::new(GIB + 2 * MIB).unwrap()).collect();
    let is_unaligned = |arena: &&Arena| !to_u64(arena.host_address()).is_multiple_of(GIB);
    let unaligned = others.iter().find(is_unaligned).unwrap();
    let error = map(unaligned, 0, GIB, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot map 0x40000000 bytes at offset 0x0 of an arena, from offset 0x0 of a file with \
        pages of 0x40000000 bytes; align all three to the pages, and the arena by \
        Arena::with_alignment"
    );
}
