//! [`Placeholders`]: reserved addresses that views of files can replace.

use std::ffi::{c_void, CStr};
use std::io::{Error, ErrorKind, Result};
use std::mem::transmute;
use std::ptr::{null, null_mut};

use windows_sys::Win32::Foundation::{ERROR_INVALID_PARAMETER, HANDLE};
use windows_sys::Win32::System::LibraryLoader::{GetModuleHandleA, GetProcAddress};
use windows_sys::Win32::System::Memory::{
    VirtualFree, MEM_RELEASE, MEM_RESERVE, MEM_RESERVE_PLACEHOLDER, PAGE_NOACCESS,
};

use super::memory::count_still_mapped;
use super::{page_size, this_process};

type VirtualAlloc2 = unsafe extern "system" fn(
    process: HANDLE,
    base: *const c_void,
    size: usize,
    how: u32,
    protection: u32,
    parameters: *mut c_void,
    parameter_count: u32,
) -> *mut c_void;

pub(super) type MapViewOfFile3 = unsafe extern "system" fn(
    section: HANDLE,
    process: HANDLE,
    base: *const c_void,
    offset: u64,
    size: usize,
    how: u32,
    protection: u32,
    parameters: *mut c_void,
    parameter_count: u32,
) -> *mut c_void;

pub(super) type UnmapViewOfFile2 =
    unsafe extern "system" fn(process: HANDLE, base: *const c_void, how: u32) -> i32;

/// A function whose type is not known yet.
type Found = unsafe extern "system" fn() -> isize;

/// The functions for placeholders, which systems before version 1803 of Windows 10 lack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placeholders {
    allocate: VirtualAlloc2,
    pub(super) map_view: MapViewOfFile3,
    pub(super) unmap_view: UnmapViewOfFile2,
}

impl Placeholders {
    /// Finds the functions in this process. The error of a system without them says so.
    pub(super) fn find() -> Result<Self> {
        Self::find_in(c"kernelbase.dll")
    }

    /// Finds the functions in a library that each process keeps loaded.
    fn find_in(library: &CStr) -> Result<Self> {
        // SAFETY: the name ends with a null.
        let library = unsafe { GetModuleHandleA(library.as_ptr().cast()) };
        if library.is_null() {
            return Err(lacking());
        }
        let find = |name: &CStr| -> Result<Found> {
            // SAFETY: `library` is the handle of a library that is loaded: it is not null. It stays
            // loaded, as the documentation of this function requires. The name ends with a null.
            let found = unsafe { GetProcAddress(library, name.as_ptr().cast()) };
            found.ok_or_else(lacking)
        };
        let allocate = find(c"VirtualAlloc2")?;
        let map_view = find(c"MapViewOfFile3")?;
        let unmap_view = find(c"UnmapViewOfFile2")?;
        Ok(Self {
            // SAFETY: the type is that of the function `VirtualAlloc2` in the documentation of
            // Windows, and both types are pointers to functions.
            allocate: unsafe { transmute::<Found, VirtualAlloc2>(allocate) },
            // SAFETY: the type is that of the function `MapViewOfFile3` in the documentation of
            // Windows, and both types are pointers to functions.
            map_view: unsafe { transmute::<Found, MapViewOfFile3>(map_view) },
            // SAFETY: the type is that of the function `UnmapViewOfFile2` in the documentation of
            // Windows, and both types are pointers to functions.
            unmap_view: unsafe { transmute::<Found, UnmapViewOfFile2>(unmap_view) },
        })
    }

    /// Reserves `len` bytes of addresses as one placeholder, and returns the first one.
    pub(super) fn reserve(&self, len: usize) -> Result<usize> {
        let error = match self.try_reserve(len) {
            Err(error) if is_invalid(&error) => error,
            result => return result,
        };
        // Either the length is invalid, or the system knows the function but no placeholders. One
        // page tells them apart.
        match self.try_reserve(page_size()) {
            Ok(base) => {
                // SAFETY: `try_reserve` has reserved these addresses for this function, which has
                // not used them. No other code knows them.
                let released = unsafe { VirtualFree(pointer(base).cast_mut(), 0, MEM_RELEASE) };
                if released == 0 {
                    count_still_mapped(page_size());
                }
                Err(error)
            }
            Err(page) if is_invalid(&page) => Err(lacking()),
            Err(_) => Err(error),
        }
    }

    fn try_reserve(&self, len: usize) -> Result<usize> {
        let (process, how) = (this_process(), MEM_RESERVE | MEM_RESERVE_PLACEHOLDER);
        // SAFETY: without an address, the call returns new addresses of this process. So it
        // invalidates no memory that is in use. There are no parameters, and their count is 0.
        let base =
            unsafe { (self.allocate)(process, null(), len, how, PAGE_NOACCESS, null_mut(), 0) };
        if base.is_null() {
            return Err(Error::last_os_error());
        }
        Ok(base.expose_provenance())
    }
}

/// Returns an address as an argument of a system call. Rust code does not dereference it.
pub(super) fn pointer(address: usize) -> *const c_void {
    std::ptr::without_provenance(address)
}

fn is_invalid(error: &Error) -> bool {
    error.raw_os_error() == Some(ERROR_INVALID_PARAMETER.cast_signed())
}

/// The error of a system without placeholders.
fn lacking() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "this system has no placeholders; use Windows 10 version 1803 or later",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_in_library_without_the_functions_returns_error_that_names_the_version() {
        for library in [c"ntdll.dll", c"not_loaded.dll"] {
            let error = Placeholders::find_in(library).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert_eq!(
                error.to_string(),
                "this system has no placeholders; use Windows 10 version 1803 or later"
            );
        }
    }
}
