//! A region over placeholders of Windows. Blocks of private memory and views of files come and go
//! in one range of addresses. Accesses to a hole are errors.
#![cfg(all(
    windows,
    target_arch = "x86_64",
    feature = "backend-mmap",
    not(vm_memory_portable)
))]
#![expect(
    unsafe_code,
    reason = "calls functions of Windows, and passes memory that they return to a region"
)]

use std::ffi::{c_void, CStr};
use std::fs;
use std::mem::transmute;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr::{null, null_mut};

use tempfile::NamedTempFile;
use test_support::{skipped, PAGE};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    fault, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};
use windows_sys::Win32::Foundation::{ERROR_NOACCESS, HANDLE};
use windows_sys::Win32::System::LibraryLoader::{GetModuleHandleA, GetProcAddress};
use windows_sys::Win32::System::Memory::{
    CreateFileMappingW, UnmapViewOfFile, VirtualFree, MEMORY_MAPPED_VIEW_ADDRESS, MEM_COMMIT,
    MEM_PRESERVE_PLACEHOLDER, MEM_RELEASE, MEM_REPLACE_PLACEHOLDER, MEM_RESERVE,
    MEM_RESERVE_PLACEHOLDER, PAGE_NOACCESS, PAGE_READWRITE,
};

const BASE: GuestAddress = GuestAddress(0x10_0000);

/// A function whose type is not known yet.
type Found = unsafe extern "system" fn() -> isize;
type VirtualAlloc2 =
    unsafe extern "system" fn(HANDLE, *const u8, usize, u32, u32, *mut c_void, u32) -> *mut u8;
type MapViewOfFile3 = unsafe extern "system" fn(
    HANDLE,
    HANDLE,
    *const u8,
    u64,
    usize,
    u32,
    u32,
    *mut c_void,
    u32,
) -> *mut u8;
type DiscardVirtualMemory = unsafe extern "system" fn(*mut u8, usize) -> u32;

/// The functions that older systems lack.
struct Functions {
    allocate: VirtualAlloc2,
    map_view: MapViewOfFile3,
    discard: DiscardVirtualMemory,
}

impl Functions {
    /// Finds the functions. Returns `None` if the system lacks one.
    fn find() -> Option<Self> {
        // SAFETY: the name ends with a null. The library stays loaded while the process lives.
        let library = unsafe { GetModuleHandleA(c"kernelbase.dll".as_ptr().cast()) };
        let find = |name: &CStr| {
            // SAFETY: the library is loaded, and the name ends with a null.
            unsafe { GetProcAddress(library, name.as_ptr().cast()) }
        };
        let (allocate, map_view) = (find(c"VirtualAlloc2")?, find(c"MapViewOfFile3")?);
        let discard = find(c"DiscardVirtualMemory")?;
        Some(Self {
            // SAFETY: the type is that of the function in the documentation of Windows.
            allocate: unsafe { transmute::<Found, VirtualAlloc2>(allocate) },
            // SAFETY: the type is that of the function in the documentation of Windows.
            map_view: unsafe { transmute::<Found, MapViewOfFile3>(map_view) },
            // SAFETY: the type is that of the function in the documentation of Windows.
            discard: unsafe { transmute::<Found, DiscardVirtualMemory>(discard) },
        })
    }

    /// Reserves addresses as a placeholder. Returns null if the system has no placeholders.
    fn reserve(&self, size: usize) -> *mut u8 {
        let how = MEM_RESERVE | MEM_RESERVE_PLACEHOLDER;
        // SAFETY: without an address, the memory is new.
        unsafe { (self.allocate)(null_mut(), null(), size, how, PAGE_NOACCESS, null_mut(), 0) }
    }

    /// Fills a placeholder of one page with private memory.
    fn fill(&self, addr: *mut u8) {
        let how = MEM_RESERVE | MEM_COMMIT | MEM_REPLACE_PLACEHOLDER;
        // SAFETY: the call replaces a placeholder, which nobody can use, and nothing else.
        let filled =
            unsafe { (self.allocate)(null_mut(), addr, PAGE, how, PAGE_READWRITE, null_mut(), 0) };
        assert_eq!(filled, addr);
    }

    /// Fills a placeholder of one page with the second page of a file.
    fn map(&self, addr: *mut u8, file: &NamedTempFile) {
        let handle = file.as_file().as_raw_handle();
        // SAFETY: the handle is that of an open file, and the name is null.
        let section = unsafe { CreateFileMappingW(handle, null(), PAGE_READWRITE, 0, 0, null()) };
        assert!(!section.is_null());
        // SAFETY: the handle is new and valid, and has no other owner.
        let section = unsafe { OwnedHandle::from_raw_handle(section) };
        let (handle, offset) = (section.as_raw_handle(), PAGE as u64);
        let how = MEM_REPLACE_PLACEHOLDER;
        // SAFETY: the call replaces a placeholder, which nobody can use, and nothing else.
        let view = unsafe {
            (self.map_view)(
                handle,
                null_mut(),
                addr,
                offset,
                PAGE,
                how,
                PAGE_READWRITE,
                null_mut(),
                0,
            )
        };
        assert_eq!(view, addr);
    }
}

/// Makes the first `size` bytes of a placeholder, or private memory of this size, a placeholder.
fn release_to_placeholder(addr: *mut u8, size: usize) {
    // SAFETY: accesses to the range go through the crate, which reports a fault as an error.
    let released =
        unsafe { VirtualFree(addr.cast(), size, MEM_RELEASE | MEM_PRESERVE_PLACEHOLDER) };
    assert_ne!(released, 0);
}

/// Creates a memory of one region over `size` bytes at `addr`.
fn memory_at(addr: *mut u8, size: usize) -> GuestMemoryMmap {
    let builder = MmapRegionBuilder::new(size);
    // SAFETY: the range stays reserved until the memory is dropped. An access to a hole returns an
    // error, because the fault handler is installed.
    let builder = unsafe { builder.with_raw_mmap_pointer(addr) };
    let region: MmapRegion<()> = builder.build().unwrap();
    let region = GuestRegionMmap::new(region, BASE).unwrap();
    GuestMemoryMmap::from_regions(vec![region]).unwrap()
}

fn at(offset: usize) -> GuestAddress {
    GuestAddress(BASE.0 + offset as u64)
}

#[test]
fn region_over_placeholders_reaches_filled_pages_and_reports_holes() {
    let test = "region_over_placeholders_reaches_filled_pages_and_reports_holes";
    let Some(functions) = Functions::find() else {
        return skipped(test, "this system has no placeholders");
    };
    let start = functions.reserve(3 * PAGE);
    if start.is_null() {
        return skipped(test, "this system has no placeholders");
    }
    fault::install().unwrap();
    let [first, hole, last] = [0, PAGE, 2 * PAGE].map(|offset| start.wrapping_add(offset));
    release_to_placeholder(first, PAGE);
    release_to_placeholder(hole, PAGE);
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), [[5; PAGE], [7; PAGE]].concat()).unwrap();
    functions.fill(first);
    functions.map(last, &file);
    let memory = memory_at(start, 3 * PAGE);

    // The view begins at a page of the file that is not a multiple of the granularity.
    assert_eq!(memory.read_obj::<[u8; 8]>(at(2 * PAGE)).unwrap(), [7; 8]);
    let error = memory.read_obj::<u64>(at(PAGE)).unwrap_err();
    let number = Some(ERROR_NOACCESS as i32);
    assert!(matches!(error, GuestMemoryError::IOError(e) if e.raw_os_error() == number));
    let bytes: Vec<u8> = (0..3 * PAGE).map(|at| at as u8 | 1).collect();
    assert_eq!(memory.write(&bytes, BASE).unwrap(), PAGE);

    functions.fill(hole);
    assert_eq!(memory.write(&bytes, BASE).unwrap(), 3 * PAGE);
    assert_eq!(fs::read(file.path()).unwrap()[PAGE..], bytes[2 * PAGE..]);
    release_to_placeholder(hole, PAGE);
    assert_eq!(memory.write(&bytes, BASE).unwrap(), PAGE);

    // SAFETY: the page is private and committed, and no reference to it exists.
    let status = unsafe { (functions.discard)(first, PAGE) };
    assert_eq!(status, 0);
    memory.write_obj(9u64, BASE).unwrap();
    assert_eq!(memory.read_obj::<u64>(BASE).unwrap(), 9);

    drop(memory);
    let view = MEMORY_MAPPED_VIEW_ADDRESS { Value: last.cast() };
    // SAFETY: the address is that of a view, which nobody uses any more.
    let unmapped = unsafe { UnmapViewOfFile(view) };
    assert_ne!(unmapped, 0);
    for page in [first, hole] {
        // SAFETY: the page is private memory or a placeholder, which nobody uses any more.
        let released = unsafe { VirtualFree(page.cast(), 0, MEM_RELEASE) };
        assert_ne!(released, 0);
    }
}
