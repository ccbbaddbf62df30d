//! Mappings on Windows: views of files end with their region, begin at any page, and never extend
//! the file.
#![cfg(all(windows, feature = "backend-mmap"))]
#![expect(unsafe_code, reason = "calls functions of Windows")]

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::mem::zeroed;
use std::os::windows::io::{AsRawHandle, FromRawHandle};

use tempfile::NamedTempFile;
use test_support::PAGE;
use vm_memory::mmap::{FromRangesError, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, Permissions, VolatileMemory,
};
use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, ERROR_MAPPED_ALIGNMENT, ERROR_USER_MAPPED_FILE, INVALID_HANDLE_VALUE,
};
use windows_sys::Win32::System::Memory::{
    VirtualQuery, MEMORY_BASIC_INFORMATION, MEM_COMMIT, MEM_MAPPED, MEM_PRIVATE,
};

/// The allocation granularity: a view begins at a multiple of it in its file.
const GRANULARITY: u64 = 0x1_0000;

/// Creates a file of this length, whose bytes are the numbers of their pages.
fn numbered(len: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..len).map(|at| (at / PAGE) as u8).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn place(file: &NamedTempFile, start: u64) -> FileOffset {
    FileOffset::new(file.as_file().try_clone().unwrap(), start)
}

fn len(file: &NamedTempFile) -> u64 {
    file.as_file().metadata().unwrap().len()
}

/// Returns whether a view of the file exists: the system does not truncate a file that has one.
fn is_mapped(file: &NamedTempFile) -> bool {
    match file.as_file().set_len(0) {
        Ok(()) => false,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(ERROR_USER_MAPPED_FILE as i32));
            true
        }
    }
}

fn query(addr: *mut u8) -> MEMORY_BASIC_INFORMATION {
    // SAFETY: zeroes are valid for this struct of integers and pointers.
    let mut information: MEMORY_BASIC_INFORMATION = unsafe { zeroed() };
    let size = size_of::<MEMORY_BASIC_INFORMATION>();
    // SAFETY: the struct is valid for writes of its size.
    let written = unsafe { VirtualQuery(addr.cast(), &mut information, size) };
    assert_eq!(written, size);
    information
}

fn os_error<T>(result: Result<T, MmapRegionError>) -> Option<i32> {
    result.err().unwrap().raw_os_error()
}

/// The items that differ from those of Unix.
#[test]
fn b13_items_have_the_signatures_of_0_18_0() {
    fn is_send_and_sync<T: Send + Sync>(_: &T) {}

    let _: fn(usize) -> std::io::Result<MmapRegion<()>> = MmapRegion::new;
    let _: fn(FileOffset, usize) -> std::io::Result<MmapRegion<()>> = MmapRegion::from_file;
    let _: for<'a> fn(&'a MmapRegion<()>) -> *mut u8 = MmapRegion::as_ptr;
    let _: for<'a> fn(&'a MmapRegion<()>) -> usize = MmapRegion::size;
    let _: for<'a> fn(&'a MmapRegion<()>) -> Option<&'a FileOffset> = MmapRegion::file_offset;
    let _: for<'a> fn(&'a MmapRegion<()>) -> &'a () = MmapRegion::bitmap;
    let error: MmapRegionError = std::io::Error::from_raw_os_error(22);
    let error: FromRangesError = error.into();
    let FromRangesError::MmapRegion(cause) = &error else {
        panic!("{error}");
    };
    let cause: &std::io::Error = cause;
    assert_eq!(cause.raw_os_error(), Some(22));
    let region = MmapRegion::<()>::new(PAGE).unwrap();
    is_send_and_sync(&region);
    assert!(region.get_slice(PAGE - 1, 1).is_ok() && region.get_slice(PAGE, 1).is_err());
}

#[test]
fn b13_view_of_dropped_or_unmapped_region_is_gone() {
    for unmap in [false, true] {
        let file = numbered(4 * PAGE);
        let region = MmapRegion::<()>::from_file(place(&file, 0x1000), 2 * PAGE).unwrap();
        assert_eq!(query(region.as_ptr()).Type, MEM_MAPPED);
        assert!(is_mapped(&file));
        if unmap {
            region.unmap().unwrap();
        } else {
            drop(region);
        }
        assert!(!is_mapped(&file));
    }
}

#[test]
fn b13_anonymous_memory_is_private_and_committed() {
    let region = MmapRegion::<()>::new(3 * PAGE + 1).unwrap();
    let found = query(region.as_ptr());
    assert_eq!((found.State, found.Type), (MEM_COMMIT, MEM_PRIVATE));
    assert_eq!((found.RegionSize, region.size()), (4 * PAGE, 3 * PAGE + 1));
    assert!(region
        .as_volatile_slice()
        .read_obj::<u64>(3 * PAGE - 7)
        .is_ok());
    // The address is found without the region: another allocation may take it only later.
    let addr = region.as_ptr();
    region.unmap().unwrap();
    let after = query(addr);
    assert!(
        after.State != MEM_COMMIT
            || after.AllocationBase != addr.cast()
            || after.RegionSize != 4 * PAGE
    );
}

#[test]
fn b13_from_file_at_each_page_maps_bytes_of_that_page() {
    let pages = 40;
    let file = numbered(pages * PAGE);
    for first in 0..pages {
        for count in [1, 2, 17] {
            if first + count > pages {
                continue;
            }
            let start = (first * PAGE) as u64;
            let region = MmapRegion::<()>::from_file(place(&file, start), count * PAGE).unwrap();
            assert_eq!(
                (region.size(), region.file_offset().unwrap().start()),
                (count * PAGE, start)
            );
            assert!(region.as_ptr().addr().is_multiple_of(PAGE));
            let slice = region.as_volatile_slice();
            for page in 0..count {
                for at in [page * PAGE, (page + 1) * PAGE - 1] {
                    assert_eq!(slice.read_obj::<u8>(at).unwrap(), (first + page) as u8);
                }
            }
        }
    }
    // Far into a file, with both halves of the offset.
    let (far, sparse) = (
        (5 << 32) + GRANULARITY + 0x3000,
        NamedTempFile::new().unwrap(),
    );
    sparse.as_file().set_len(far + 0x1000).unwrap();
    let mut writer = sparse.reopen().unwrap();
    writer.seek(SeekFrom::Start(far)).unwrap();
    writer.write_all(b"far").unwrap();
    let region = MmapRegion::<()>::from_file(place(&sparse, far), PAGE).unwrap();
    let mut text = [0; 3];
    region.as_volatile_slice().read_slice(&mut text, 0).unwrap();
    assert_eq!(&text, b"far");
}

#[test]
fn b13_write_to_region_of_file_reaches_the_file() {
    let file = numbered(4 * PAGE);
    let ranges = [(GuestAddress(0), 2 * PAGE, Some(place(&file, 0x2000)))];
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
    memory.write_slice(b"guest", GuestAddress(0xffd)).unwrap();
    drop(memory);
    let (mut reader, mut bytes) = (file.reopen().unwrap(), [0; 7]);
    reader.seek(SeekFrom::Start(0x2ffc)).unwrap();
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\x02guest\x03");
}

#[test]
fn b13_file_that_is_too_short_is_refused_and_not_extended() {
    for (file_len, start, size) in [
        (0x3000, 0, 0x4000),
        (0x3000, 0x2000, 0x1001),
        (0x3000, 0x3000, 1),
        (0x2fff, 0x10_0000, 0x1000),
        (0, 0, 1),
        (0x3000, u64::MAX - 0xfff, 0x2000),
    ] {
        let file = numbered(file_len);
        let error = MmapRegion::<()>::from_file(place(&file, start), size).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(
            error.to_string().starts_with("cannot map file: "),
            "{error}"
        );
        assert_eq!(len(&file), file_len as u64);
        let ranges = [(GuestAddress(0), size, Some(place(&file, start)))];
        let error = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap_err();
        assert!(matches!(error, FromRangesError::MmapRegion(_)), "{error}");
        assert!(!is_mapped(&file));
    }
}

#[test]
fn b13_file_that_ends_in_last_page_is_mapped_and_not_extended() {
    for (file_len, start, size) in [
        (0x2001, 0x1000, 0x2000),
        (0x2001, 0x2000, 0x1000),
        (0x2001, 0x2000, 1),
        (1, 0, 0x1000),
        (0x1_4001, 0x1_4000, 0x1000),
    ] {
        let file = numbered(file_len);
        let region = MmapRegion::<()>::from_file(place(&file, start), size).unwrap();
        let slice = region.as_volatile_slice();
        let first = slice.read_obj::<u8>(0).unwrap();
        assert_eq!(u64::from(first), start / 0x1000);
        slice.read_obj::<u8>(size - 1).unwrap();
        assert_eq!(len(&file), file_len as u64);
    }
}

#[test]
fn b13_read_only_file_needs_permission_to_read_only() {
    let file = numbered(2 * PAGE);
    let read_only = || FileOffset::new(File::open(file.path()).unwrap(), 0x1000);
    let refused = MmapRegion::<()>::from_file(read_only(), PAGE);
    assert_eq!(os_error(refused), Some(ERROR_ACCESS_DENIED as i32));
    let mapping = MmapRegionBuilder::<()>::new(PAGE)
        .with_file_offset(read_only())
        .with_permissions(Permissions::Read)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    assert_eq!(region.allowed_access(), Permissions::Read);
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(5)).unwrap(), 1);
    assert!(memory.write_obj(1u8, GuestAddress(5)).is_err());
}

#[test]
fn b13_invalid_sizes_offsets_and_handles_return_error_numbers_of_0_18_0() {
    let (einval, ebadf) = (Some(22), Some(9));
    let file = numbered(PAGE);
    for size in [0, usize::MAX, 1 << 47] {
        assert_eq!(os_error(MmapRegion::<()>::new(size)), einval, "{size:#x}");
        assert_eq!(
            os_error(MmapRegion::<()>::from_file(place(&file, 0), size)),
            einval
        );
        assert_eq!(os_error(MmapRegionBuilder::<()>::new(size).build()), einval);
    }
    for handle in [INVALID_HANDLE_VALUE, std::ptr::null_mut()] {
        // SAFETY: the value is not a handle, so closing it affects nothing.
        let invalid = unsafe { File::from_raw_handle(handle) };
        assert_eq!(invalid.as_raw_handle(), handle);
        let refused = MmapRegion::<()>::from_file(FileOffset::new(invalid, 0), PAGE);
        assert_eq!(os_error(refused), ebadf);
    }
    for start in [1, 8, 0xfff] {
        let refused = MmapRegion::<()>::from_file(place(&file, start), 1);
        assert_eq!(os_error(refused), Some(ERROR_MAPPED_ALIGNMENT as i32));
    }
}
