//! Dirty logs that a back end and a front end share, in the wire format of vhost.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use test_support::{refuse_calls, returned, skipped, FuseServer};
use vm_memory::bitmap::{ArcSlice, AtomicBitmap, Bitmap};
use vm_memory::dirty::DirtyMemory;
use vm_memory::iommu::{MarkedIommuMemory, SharedIotlb};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{fault, Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, Permissions};
use vm_memory_vhost::log::{LogBitmap, LogError, SharedLog};

const PAGE: usize = 4096;
type Memory = GuestMemoryMmap<ArcSlice<LogBitmap>>;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Creates a file of `len` zeroes.
fn file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

fn map(file: &File, offset: u64, size: u64) -> Result<SharedLog, LogError> {
    SharedLog::map_unsealed(file.try_clone().unwrap(), offset, size)
}

/// Creates regions of (first page, number of pages).
fn memory(bitmap: &Arc<LogBitmap>, regions: &[(u64, usize)]) -> Memory {
    let regions = regions.iter().map(|&(first, pages)| {
        let start = first * PAGE as u64;
        let marks = bitmap.slice(GuestAddress(start));
        let mapping = MmapRegionBuilder::new_with_bitmap(pages * PAGE, marks);
        GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(start)).unwrap()
    });
    Memory::from_regions(regions.collect()).unwrap()
}

#[test]
fn create_without_permission_to_read_limits_makes_log() {
    let create = || SharedLog::create(4096);
    match refuse_calls(libc::SYS_prlimit64, libc::EPERM, create) {
        Ok(log) => assert_eq!(log.unwrap().pages(), 8 * 4096),
        Err(error) => skipped(
            "create_without_permission_to_read_limits_makes_log",
            format!("no seccomp filters: {error}"),
        ),
    }
}

/// Checks that nobody can execute a log, and returns whether its owner could change that.
fn assert_cannot_be_executed(log: &SharedLog) -> bool {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;
    let file = log.file();
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o666);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match std::process::Command::new(path).status() {
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied),
        // A child under qemu reports the failure by its exit status.
        Ok(status) => assert_eq!(status.code(), Some(127)),
    }
    let executable = std::fs::Permissions::from_mode(0o777);
    file.set_permissions(executable).is_ok()
}

#[test]
fn created_log_cannot_be_executed() {
    const NOEXEC_SEAL: u32 = 8;
    const F_SEAL_EXEC: u32 = 0x20;
    let log = SharedLog::create(4096).unwrap();
    let has_flag = rustix::fs::fcntl_get_seals(log.file()).unwrap().bits() & F_SEAL_EXEC != 0;
    assert_eq!(assert_cannot_be_executed(&log), !has_flag);

    // A kernel before 6.3 refuses the flag.
    let (number, flag) = (libc::SYS_memfd_create, (1, NOEXEC_SEAL));
    let create = || SharedLog::create(4096);
    match test_support::refuse_calls_with(number, flag, libc::EINVAL, create) {
        Ok(log) => assert!(assert_cannot_be_executed(&log.unwrap())),
        Err(error) => test_support::skipped(
            "created_log_cannot_be_executed (before Linux 6.3)",
            format!("no seccomp filters: {error}"),
        ),
    }
}

#[test]
fn created_log_is_shared_with_peer_that_cannot_change_its_length() {
    for size in [1u64, 8, 4096, 12_345] {
        let front_end = SharedLog::create(size).unwrap();
        let file = front_end.file().try_clone().unwrap();
        assert_eq!(front_end.pages(), size * 8);
        assert_eq!(file.metadata().unwrap().len(), size);
        for other in [0, size - 1, size + 1, 1 << 20] {
            assert!(file.set_len(other).is_err(), "{size} to {other}");
        }
        let bitmap = Arc::new(marking(map(&file, 0, size).unwrap()));
        assert!(harvest(&front_end).is_empty());
        bitmap.mark_dirty(7 * PAGE, 1);
        assert_eq!(harvest(&front_end), BTreeSet::from([7]));
    }
    assert!(matches!(SharedLog::create(0), Err(LogError::Empty)));
    // Larger than any file.
    match SharedLog::create(u64::MAX) {
        Err(LogError::Create(error)) => assert!(error.raw_os_error().is_some()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn slice_of_bitmap_marks_the_pages_of_its_region() {
    let front_end = SharedLog::create(8).unwrap();
    let file = front_end.file().try_clone().unwrap();
    let bitmap = Arc::new(marking(map(&file, 0, 8).unwrap()));
    let slice = bitmap.slice(GuestAddress(3 * PAGE as u64));
    slice.mark_dirty(PAGE + 1, 1);
    assert_eq!(harvest(&front_end), BTreeSet::from([4]));
    assert_eq!(bitmap.lost_marks(), 0);
    bitmap.slice(GuestAddress(u64::MAX)).mark_dirty(0, 1);
    assert_eq!(bitmap.lost_marks(), 1);
}

#[test]
fn write_behind_iommu_marks_guest_page_in_log() {
    let bitmap = Arc::new(LogBitmap::new());
    let memory = memory(&bitmap, &[(0x100, 0x10)]);
    let size = SharedLog::size_for(&memory);
    let file = file(size);
    let log = map(&file, 0, size).unwrap();
    bitmap.replace(&memory, log, soon()).unwrap();

    let iotlb = SharedIotlb::new();
    let (iova, guest) = (GuestAddress(0x5000), GuestAddress(0x10_3000));
    iotlb
        .set_mapping(iova, guest, 0x1000, Permissions::ReadWrite)
        .unwrap();
    let device = MarkedIommuMemory::by_guest_address(memory, iotlb, true);
    device.write_obj(7u64, iova).unwrap();
    let front_end = map(&file, 0, size).unwrap();
    assert_eq!(harvest(&front_end), BTreeSet::from([0x103]));
}

/// Creates a bitmap whose log is `log`.
fn marking(log: SharedLog) -> LogBitmap {
    let bitmap = LogBitmap::new();
    bitmap.replace(&Memory::new(), log, soon()).unwrap();
    bitmap
}

/// Returns the pages of a harvest.
fn harvest(log: &SharedLog) -> BTreeSet<u64> {
    let mut words = Vec::new();
    let words = log.harvest(&mut words).unwrap().words;
    let bits =
        (0..words.len() as u64 * 64).filter(|bit| words[*bit as usize / 64] >> (bit % 64) & 1 != 0);
    bits.collect()
}

proptest! {
    #[test]
    fn marks_are_bits_of_bytes_in_file_and_harvests_clear_them(
        offset in prop_oneof![Just(0u64), (0..3000u64).prop_map(|word| word * 8)],
        size in 1u64..700,
        ranges in prop::collection::vec((0usize..6000 * PAGE, 0usize..300 * PAGE), 0..8),
    ) {
        // The bytes around the log belong to others.
        let file = file(offset + size + 9);
        let bitmap = marking(map(&file, offset, size).unwrap());
        let front_end = map(&file, offset, size).unwrap();
        let (mut marked, mut lost) = (BTreeSet::new(), 0);
        for (start, len) in ranges {
            bitmap.mark_dirty(start, len);
            let pages = (start / PAGE) as u64..(start + len).div_ceil(PAGE) as u64;
            let pages = if len == 0 { 0..0 } else { pages };
            lost += u64::from(pages.end > size * 8);
            marked.extend(pages.filter(|page| *page < size * 8));
        }
        prop_assert_eq!(bitmap.lost_marks(), lost);
        for page in 0..size * 8 + 9 {
            prop_assert_eq!(bitmap.dirty_at(page as usize * PAGE), marked.contains(&page));
        }
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).unwrap();
        let bits = (0..bytes.len() as u64 * 8).filter(|bit| bytes[*bit as usize / 8] >> (bit % 8) & 1 != 0);
        prop_assert!(bits.eq(marked.iter().map(|page| offset * 8 + page)));
        prop_assert_eq!(harvest(&front_end), marked);
        prop_assert!(harvest(&front_end).is_empty());
    }
}

#[test]
fn harvest_of_hostile_log_adds_pages_of_regions_only() {
    let ranges = [
        (GuestAddress(0x2000), 2 * PAGE),
        (GuestAddress(0x10_0000), PAGE),
    ];
    let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let file = file(64);
    let log = map(&file, 0, 64).unwrap();
    // The back end sets all bits.
    marking(map(&file, 0, 64).unwrap()).mark_dirty(0, usize::MAX);
    let (mut dirty, mut words) = (DirtyMemory::new(), vec![7; 100]);
    dirty.harvest_with(&memory, &[log.harvest(&mut words).unwrap()]);
    assert_eq!(dirty.runs().collect::<Vec<_>>(), ranges);
}

#[test]
fn map_of_hostile_log_returns_error() {
    let file = file(0x1000);
    let error = |offset, size| map(&file, offset, size).unwrap_err();
    assert!(matches!(error(0, 0), LogError::Empty));
    assert!(matches!(error(4, 8), LogError::Misaligned { offset: 4 }));
    for (offset, size) in [(u64::MAX - 7, 8), (8, u64::MAX), (u64::MAX - 7, u64::MAX)] {
        assert!(
            matches!(error(offset, size), LogError::TooLarge { .. }),
            "{offset:#x}"
        );
    }
    for (offset, size) in [
        (0, 0x1001),
        (0x1000, 8),
        (1 << 40, 8),
        (0, 1 << 50),
        (0, u64::MAX),
    ] {
        let error = error(offset, size);
        assert!(
            matches!(error, LogError::Map(_)),
            "{offset:#x}, {size:#x}: {error}"
        );
        assert!(error.source().is_some());
    }
    assert!(map(&file, 0xff8, 8).is_ok());
}

/// A file without the seal may be truncated, or served by the peer.
#[cfg(target_os = "linux")]
#[test]
fn map_of_file_without_shrink_seal_returns_the_file() {
    use rustix::fs::{fcntl_add_seals, memfd_create, MemfdFlags, SealFlags};

    let memfd = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = File::from(memfd_create("log", flags).unwrap());
        memfd.set_len(0x1000).unwrap();
        memfd
    };
    let grow = memfd();
    fcntl_add_seals(&grow, SealFlags::GROW | SealFlags::SEAL).unwrap();
    for unsealed in [file(0x1000), memfd(), grow] {
        // No other error closes the file.
        for size in [0x1000, 0x1001, 0] {
            let copy = unsealed.try_clone().unwrap();
            match SharedLog::map(copy, 0, size) {
                Err(LogError::Unsealed { file }) => {
                    assert_eq!(File::from(file).metadata().unwrap().len(), 0x1000);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(map(&unsealed, 0, 0x1000).is_ok());
    }
    let sealed = memfd();
    fcntl_add_seals(&sealed, SealFlags::SHRINK).unwrap();
    SharedLog::map(sealed, 0, 0x1000).unwrap();
    let created = SharedLog::create(0x1000).unwrap();
    SharedLog::map(created.file().try_clone().unwrap(), 0, 0x1000).unwrap();
}

#[test]
fn map_of_file_whose_server_is_silent_does_not_ask_it() {
    let test = "map_of_file_whose_server_is_silent_does_not_ask_it";
    let Some(server) = FuseServer::mount(test) else {
        return;
    };
    let file = server.open();
    let error = returned(|| SharedLog::map(file, 0, 0x1000)).unwrap_err();
    assert!(matches!(error, LogError::Unsealed { .. }), "{error}");
    assert_eq!(server.unanswered(), Vec::<u32>::new());
    // The error has the file, and closing it would wait for the server.
    drop(server);
}

/// The kernel raises SIGBUS on an access to a page of hugetlbfs, if it has no huge page left.
#[test]
fn map_of_sealed_hugetlb_file_returns_the_file() {
    use rustix::fs::{fcntl_add_seals, memfd_create, MemfdFlags, SealFlags};

    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let memfd = match memfd_create("log", flags) {
        Ok(memfd) => File::from(memfd),
        Err(error) => {
            let why = format!("no pages of 2 MiB: {error}");
            return skipped("map_of_sealed_hugetlb_file_returns_the_file", why);
        }
    };
    memfd.set_len(HUGE).unwrap();
    fcntl_add_seals(&memfd, SealFlags::SHRINK).unwrap();
    match SharedLog::map(memfd, 0, 0x1000) {
        Err(LogError::HugePages { file }) => {
            assert_eq!(File::from(file).metadata().unwrap().len(), HUGE);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn replace_with_log_that_is_too_short_returns_error_and_keeps_the_old_log() {
    let bitmap = Arc::new(LogBitmap::new());
    // The last page is 0x1100.
    let memory = memory(&bitmap, &[(1, 3), (0x1000, 0x101)]);
    assert_eq!(SharedLog::size_for(&memory), 0x228);
    let (old, short) = (file(0x228), file(0x220));
    bitmap
        .replace(&memory, map(&old, 0, 0x228).unwrap(), soon())
        .unwrap();
    let error = bitmap.replace(&memory, map(&short, 0, 0x220).unwrap(), soon());
    let error = error.unwrap_err();
    assert!(
        matches!(
            error,
            LogError::TooShort {
                pages: 0x1100,
                needed: 0x1101
            }
        ),
        "{error}"
    );
    memory
        .write_obj(1u8, GuestAddress(0x1100 * PAGE as u64))
        .unwrap();
    assert_eq!(
        harvest(&map(&old, 0, 0x228).unwrap()),
        BTreeSet::from([0x1100])
    );
}

#[test]
fn region_past_the_end_of_the_log_is_refused() {
    let bitmap = Arc::new(marking(map(&file(8), 0, 8).unwrap()));
    let build = |first: usize, pages: usize| {
        let marks = ArcSlice::new(Arc::clone(&bitmap), first * PAGE);
        MmapRegionBuilder::new_with_bitmap(pages * PAGE, marks).build()
    };
    assert!(build(60, 4).is_ok());
    assert!(build(60, 5).is_err());
    bitmap.stop();
    assert!(build(60, 5).is_ok());
}

#[test]
fn replaced_log_has_earlier_marks_and_new_log_has_later_ones() {
    let bitmap = Arc::new(LogBitmap::new());
    let memory = memory(&bitmap, &[(0, 64)]);
    let write = |page: u64| {
        memory
            .write_obj(1u8, GuestAddress(page * PAGE as u64))
            .unwrap()
    };
    let logs = [file(8), file(8)].map(|file| (map(&file, 0, 8).unwrap(), file));
    write(1);
    assert!(!bitmap.is_marking() && !bitmap.dirty_at(PAGE));
    for (page, (_, file)) in (2..).zip(&logs) {
        bitmap
            .replace(&memory, map(file, 0, 8).unwrap(), soon())
            .unwrap();
        write(page);
        assert!(bitmap.is_marking() && bitmap.dirty_at(page as usize * PAGE));
    }
    bitmap.stop();
    write(4);
    assert!(!bitmap.is_marking());
    let found = logs.map(|(log, _)| harvest(&log));
    assert_eq!(found, [BTreeSet::from([2]), BTreeSet::from([3])]);
}

#[test]
fn truncated_log_loses_marks_without_ending_the_process() {
    if let Err(error) = fault::install() {
        let test = "truncated_log_loses_marks_without_ending_the_process";
        skipped(test, error);
        return;
    }
    let file = file(4 * PAGE as u64);
    let log = map(&file, 0, 4 * PAGE as u64).unwrap();
    let bitmap = marking(map(&file, 0, 4 * PAGE as u64).unwrap());
    let pages_of_log_page = PAGE * 8;
    bitmap.mark_dirty(0, 1);
    file.set_len(PAGE as u64).unwrap();
    // The first part of the range is still marked.
    bitmap.mark_dirty((pages_of_log_page - 2) * PAGE, 4 * PAGE);
    assert_eq!(bitmap.lost_marks(), 1);
    assert!(bitmap.dirty_at((pages_of_log_page - 1) * PAGE));
    assert!(!bitmap.dirty_at(pages_of_log_page * PAGE));
    // The faults are not those of the writer.
    assert_eq!(fault::last(), None);
    let error = log.harvest(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, LogError::Inaccessible(_)), "{error}");
    assert!(fault::last().is_some());
}

/// Threads write pages while the front end replaces the log. It harvests each old log for the last
/// time after the replacement, and finds all pages in the end.
#[test]
fn replacements_while_threads_write_lose_no_page() {
    const PAGES: u64 = 256;
    let bitmap = Arc::new(LogBitmap::new());
    let memory = memory(&bitmap, &[(0, PAGES as usize)]);
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let size = SharedLog::size_for(&memory);
    let new_log = || {
        let file = file(size);
        bitmap
            .replace(&memory, map(&file, 0, size).unwrap(), soon())
            .unwrap();
        map(&file, 0, size).unwrap()
    };
    let mut log = new_log();
    let mut copies = [0u64; PAGES as usize];
    let mut copy = |log: &SharedLog| {
        for page in harvest(log) {
            copies[page as usize] = memory.read_obj(GuestAddress(page * PAGE as u64)).unwrap();
        }
    };
    thread::scope(|scope| {
        for thread in 0..2 {
            let (memory, stop, writes) = (&memory, &stop, &writes);
            scope.spawn(move || {
                let mut value = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    value += 1;
                    let page = (value * 7 % (PAGES / 2)) * 2 + thread;
                    memory
                        .write_obj(value, GuestAddress(page * PAGE as u64))
                        .unwrap();
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..if cfg!(miri) { 3 } else { 50 } {
            let before = writes.load(Ordering::Relaxed);
            while writes.load(Ordering::Relaxed) < before + 20 {
                thread::yield_now();
            }
            let old = std::mem::replace(&mut log, new_log());
            copy(&old);
            if round % 3 == 0 {
                copy(&log);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    copy(&log);
    for (page, copied) in (0..).zip(copies) {
        let value: u64 = memory.read_obj(GuestAddress(page * PAGE as u64)).unwrap();
        assert_eq!(copied, value, "page {page}");
    }
    assert_eq!(bitmap.lost_marks(), 0);
}
