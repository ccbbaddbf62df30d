//! [`Mapping`]: memory of `VirtualAlloc`, or a view of a file.

use std::fs::File;
use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr::null;

use windows_sys::Win32::Foundation::{ERROR_MAPPED_ALIGNMENT, INVALID_HANDLE_VALUE};
use windows_sys::Win32::System::Memory::{
    CreateFileMappingW, MapViewOfFile, UnmapViewOfFile, VirtualAlloc, VirtualFree, FILE_MAP_READ,
    FILE_MAP_WRITE, MEMORY_MAPPED_VIEW_ADDRESS, MEM_COMMIT, MEM_RELEASE, MEM_RESERVE,
    PAGE_NOACCESS, PAGE_PROTECTION_FLAGS, PAGE_READONLY, PAGE_READWRITE,
};

use crate::convert::to_u64;
use crate::guest_memory::{FileOffset, Permissions};
use crate::mmap::host_range::HostRange;
use crate::page_size::{host_page_size, system_info};
use crate::xen::OnDemand;

/// A mapping of this process, which is unmapped on drop if it is owned.
#[derive(Debug)]
pub(in crate::mmap) struct Mapping {
    host: HostRange,
    memory: Memory,
}

/// The owned memory of a mapping, and how it is released.
#[derive(Clone, Copy, Debug)]
enum Memory {
    /// None: the memory was created elsewhere, or is released.
    Borrowed,
    /// Memory of `VirtualAlloc`, which begins with the host range.
    Private,
    /// A view of a file, which begins this number of bytes before the host range.
    View { before: usize },
}

/// The number of an invalid size, which users test. It is that of C and not of Windows, as in
/// 0.18.0.
const EINVAL: i32 = 22;
/// The number of a file that is not valid, which users test. It is that of C and not of Windows, as
/// in 0.18.0.
const EBADF: i32 = 9;

impl Mapping {
    /// Allocates `size` bytes of zeroes, private to this process and committed.
    pub(super) fn private(size: usize, permissions: Permissions) -> io::Result<Self> {
        check_size(size)?;
        let (how, protection) = (MEM_RESERVE | MEM_COMMIT, protection_of(permissions));
        // SAFETY: without an address, `VirtualAlloc` returns new memory. So this invalidates no
        // memory that is in use.
        let addr = unsafe { VirtualAlloc(null(), size, how, protection) };
        if addr.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            host: HostRange::new(addr.cast(), size, permissions),
            memory: Memory::Private,
        })
    }

    /// Maps `size` bytes of a file, shared with it.
    pub(super) fn of_file(
        file_offset: &FileOffset,
        size: usize,
        permissions: Permissions,
    ) -> io::Result<Self> {
        check_size(size)?;
        let (file, start) = (file_offset.file(), file_offset.start());
        let handle = file.as_raw_handle();
        if handle.is_null() || handle == INVALID_HANDLE_VALUE {
            // `CreateFileMappingW` would create memory without a file.
            return Err(io::Error::from_raw_os_error(EBADF));
        }
        if !start.is_multiple_of(page_size()) {
            let number = i32::try_from(ERROR_MAPPED_ALIGNMENT).unwrap_or(EINVAL);
            return Err(io::Error::from_raw_os_error(number));
        }
        let end = accessible_end(file, start, size)?;
        // A view begins at a multiple of the allocation granularity, which is larger than a page.
        let view_start = start & !u64::from(system_info().dwAllocationGranularity).wrapping_sub(1);
        let (Ok(before), Ok(len)) = (
            usize::try_from(start.wrapping_sub(view_start)),
            usize::try_from(end.wrapping_sub(view_start)),
        ) else {
            return Err(io::Error::from_raw_os_error(EINVAL));
        };
        let view = map_view(
            &section_of(file, permissions)?,
            view_start,
            len,
            permissions,
        )?;
        Ok(Self {
            host: HostRange::new(view.wrapping_add(before), size, permissions),
            memory: Memory::View { before },
        })
    }

    /// Borrows a mapping that was created elsewhere, with permissions that its creator states.
    pub(super) fn borrowed(
        addr: *mut u8,
        size: usize,
        permissions: Permissions,
    ) -> io::Result<Self> {
        if !addr.addr().is_multiple_of(host_page_size().get()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "cannot use the existing mapping: its pointer is not aligned to a page; \
                 pass the start of a page",
            ));
        }
        // As on Unix, permissions for no access count as not stated.
        let permissions = match permissions {
            Permissions::No => Permissions::ReadWrite,
            stated => stated,
        };
        Ok(Self {
            host: HostRange::new(addr, size, permissions),
            memory: Memory::Borrowed,
        })
    }

    /// Returns the memory, if it is mapped for each access. There is none on Windows.
    pub(in crate::mmap) fn on_demand(&self) -> Option<OnDemand<'_>> {
        None
    }

    /// Returns the host addresses.
    #[inline]
    pub(in crate::mmap) fn host(&self) -> HostRange {
        self.host
    }

    /// Closes the mapping to the fast path.
    pub(in crate::mmap) fn close(&mut self) {
        self.host.close();
    }

    /// Unmaps the memory, if it is owned.
    pub(in crate::mmap) fn unmap(&mut self) -> io::Result<()> {
        let addr = self.host.addr();
        let succeeded = match core::mem::replace(&mut self.memory, Memory::Borrowed) {
            Memory::Borrowed => return Ok(()),
            // SAFETY: `private` allocated this memory, which begins at `addr`. It was not released
            // before, as `memory` is `Borrowed` afterwards. No slice of it is left: slices borrow
            // the region, which is being dropped or consumed.
            Memory::Private => unsafe { VirtualFree(addr.cast(), 0, MEM_RELEASE) },
            Memory::View { before } => {
                let view = MEMORY_MAPPED_VIEW_ADDRESS {
                    Value: addr.wrapping_sub(before).cast(),
                };
                // SAFETY: `of_file` mapped this view, which begins `before` bytes before `addr`. It
                // was not unmapped before, as `memory` is `Borrowed` afterwards. No slice of it is
                // left: slices borrow the region, which is being dropped or consumed.
                unsafe { UnmapViewOfFile(view) }
            }
        };
        if succeeded != 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        log_warning!("cannot unmap {:#x} bytes: {error}", self.host.size());
        Err(error)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Drop cannot report the error; `MmapRegion::unmap` does.
        let _ = self.unmap();
    }
}

/// Returns an error for a size of 0, or one that exceeds the addresses of a process.
fn check_size(size: usize) -> io::Result<()> {
    let system = system_info();
    let largest = system
        .lpMaximumApplicationAddress
        .addr()
        .wrapping_sub(system.lpMinimumApplicationAddress.addr());
    if size == 0 || size > largest {
        return Err(io::Error::from_raw_os_error(EINVAL));
    }
    Ok(())
}

/// Returns the protection of pages that permit these accesses.
fn protection_of(permissions: Permissions) -> PAGE_PROTECTION_FLAGS {
    match permissions {
        Permissions::No => PAGE_NOACCESS,
        Permissions::Read => PAGE_READONLY,
        Permissions::Write | Permissions::ReadWrite => PAGE_READWRITE,
    }
}

fn page_size() -> u64 {
    to_u64(host_page_size().get())
}

/// Returns the offset in the file at which a view of these bytes ends, or an error if the file ends
/// before their last page.
///
/// It is the end of the bytes, or that of the file. The system maps the whole last page.
fn accessible_end(file: &File, start: u64, size: usize) -> io::Result<u64> {
    let Some(end) = start.checked_add(to_u64(size)) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "cannot map file: offset plus length exceeds the largest file offset; map fewer bytes",
        ));
    };
    let (len, page) = (file.metadata()?.len(), page_size());
    if len.div_ceil(page) < end.div_ceil(page) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "cannot map file: file ends at {len:#x}, before the end of the region at \
                 {end:#x}; extend the file or map fewer bytes"
            ),
        ));
    }
    Ok(end.min(len))
}

/// Creates a section of the whole file, which views can be mapped of.
///
/// A section with a length of its own would extend a file that is shorter.
fn section_of(file: &File, permissions: Permissions) -> io::Result<OwnedHandle> {
    let protection = if permissions.has_write() {
        PAGE_READWRITE
    } else {
        PAGE_READONLY
    };
    // SAFETY: the handle is that of an open file, as `file` is borrowed. The other pointers are
    // null, which stands for the default security and no name.
    let section =
        unsafe { CreateFileMappingW(file.as_raw_handle(), null(), protection, 0, 0, null()) };
    if section.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has created this handle, and nothing else has it.
    Ok(unsafe { OwnedHandle::from_raw_handle(section) })
}

/// Maps `len` bytes of a section, at an offset that is a multiple of the allocation granularity.
///
/// The view keeps the section alive.
fn map_view(
    section: &OwnedHandle,
    offset: u64,
    len: usize,
    permissions: Permissions,
) -> io::Result<*mut u8> {
    let access = if permissions.has_write() {
        FILE_MAP_READ | FILE_MAP_WRITE
    } else {
        FILE_MAP_READ
    };
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
    let (high, low) = (half(offset >> 32), half(offset));
    // SAFETY: the handle is that of a section. Without an address, the system chooses a free one,
    // so this invalidates no memory that is in use.
    let view = unsafe { MapViewOfFile(section.as_raw_handle(), access, high, low, len) };
    if view.Value.is_null() {
        return Err(io::Error::last_os_error());
    }
    Ok(view.Value.cast())
}
