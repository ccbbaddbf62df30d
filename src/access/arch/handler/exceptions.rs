//! The vectored exception handler, on Windows.
//!
//! It reads only the exception, its context and the headers of this image, and keeps no state.

use core::ops::Range;
use core::ptr::{null_mut, with_exposed_provenance};
use std::io::{Error, Result};
use std::sync::{Mutex, PoisonError};

use windows_sys::Win32::Foundation::{
    EXCEPTION_ACCESS_VIOLATION, EXCEPTION_ILLEGAL_INSTRUCTION, EXCEPTION_IN_PAGE_ERROR,
};
use windows_sys::Win32::System::Diagnostics::Debug::{
    AddVectoredExceptionHandler, EXCEPTION_CONTINUE_EXECUTION, EXCEPTION_CONTINUE_SEARCH,
    EXCEPTION_POINTERS, EXCEPTION_RECORD, IMAGE_FILE_HEADER, IMAGE_SECTION_HEADER,
};
use windows_sys::Win32::System::LibraryLoader::{
    GetModuleHandleExW, GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS, GET_MODULE_HANDLE_EX_FLAG_PIN,
};

use super::{recover, Entry, FaultRange, Registers};

extern "C" {
    /// The start of this image. The linker defines it.
    #[link_name = "__ImageBase"]
    static IMAGE: [u8; 0];
}

/// The name of the section of the table.
const SECTION: [u8; 8] = *b".vmmf1\0\0";

/// The offset in an image of the offset of its headers ("PE Format", "MS-DOS Stub").
const OFFSET_OF_HEADERS: usize = 0x3c;
/// The length of the signature, which precedes the file header.
const SIGNATURE: usize = 4;

const _: () = assert!(size_of::<Entry>().is_power_of_two());

/// Returns the addresses of the table.
pub(super) fn table() -> Range<usize> {
    // The image is memory that Rust did not allocate. The provenance of such memory counts as
    // exposed.
    let image = (&raw const IMAGE).addr();
    let offset = with_exposed_provenance::<u32>(image.wrapping_add(OFFSET_OF_HEADERS));
    // SAFETY: the system has mapped the headers of this image at its start, and they stay there. An
    // image is aligned to 64 KiB, so this field is aligned ("PE Format").
    let offset = unsafe { *offset } as usize;
    let header = image.wrapping_add(offset).wrapping_add(SIGNATURE);
    // SAFETY: the file header follows the signature of the headers of this image, which the system
    // has mapped, and they stay there. The format aligns it to 8 bytes, less the signature of 4.
    let file = unsafe { &*with_exposed_provenance::<IMAGE_FILE_HEADER>(header) };
    let sections = header
        .wrapping_add(size_of::<IMAGE_FILE_HEADER>())
        .wrapping_add(usize::from(file.SizeOfOptionalHeader));
    for number in 0..usize::from(file.NumberOfSections) {
        let at = sections.wrapping_add(number.wrapping_mul(size_of::<IMAGE_SECTION_HEADER>()));
        // SAFETY: the optional header is followed by as many section headers as the file header
        // states. The system has mapped them, and they stay there. Their sizes keep the alignment
        // of 4 bytes.
        let section = unsafe { &*with_exposed_provenance::<IMAGE_SECTION_HEADER>(at) };
        if section.Name == SECTION {
            let start = image.wrapping_add(section.VirtualAddress as usize);
            // SAFETY: both fields of the union are integers. In an image, it is the size.
            let size = unsafe { section.Misc.VirtualSize } as usize;
            // The linker may pad the end of the section. An entry that is not whole is padding.
            let len = size & !size_of::<Entry>().wrapping_sub(1);
            return start..start.wrapping_add(len);
        }
    }
    0..0
}

/// Installs the handler, once.
pub(in crate::access::arch) fn install() -> Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*installed {
        keep_loaded((&raw const IMAGE).cast())?;
        // SAFETY: the system passes the record and the context of an exception to a handler. The
        // handler is in this image, which `keep_loaded` keeps in memory until the process ends.
        let handler = unsafe { AddVectoredExceptionHandler(1, Some(on_exception)) };
        if handler.is_null() {
            return Err(Error::last_os_error());
        }
        *installed = true;
    }
    Ok(())
}

/// Keeps the image that contains `address` loaded until the process ends.
///
/// The system calls the handler for each exception of the process, also after `FreeLibrary` has
/// unmapped the library that contains it.
pub(super) fn keep_loaded(address: *const ()) -> Result<()> {
    let how = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_PIN;
    let mut image = null_mut();
    // SAFETY: with the first flag, the call takes an address in place of a name, and only looks up
    // the image that contains it. It writes one handle to `image`, which is valid for writes.
    if unsafe { GetModuleHandleExW(how, address.cast(), &mut image) } == 0 {
        return Err(Error::last_os_error());
    }
    Ok(())
}

/// Handles an exception of any code in the process, before other handlers.
///
/// # Safety
///
/// `exception` points to the record and the context of an exception.
pub(super) unsafe extern "system" fn on_exception(exception: *mut EXCEPTION_POINTERS) -> i32 {
    // SAFETY: `exception` is valid (this function's contract).
    let exception = unsafe { &*exception };
    // SAFETY: the record is valid (this function's contract), and nothing changes it meanwhile.
    let record = unsafe { &*exception.ExceptionRecord };
    if let Some(fault) = FaultRange::from_record(record) {
        // SAFETY: the context is valid (this function's contract), and belongs to the handler until
        // it returns.
        let context = unsafe { &mut *exception.ContextRecord };
        if recover(&mut Registers::new(context), &fault) {
            return EXCEPTION_CONTINUE_EXECUTION;
        }
    }
    EXCEPTION_CONTINUE_SEARCH
}

/// The kind of an access that writes (`EXCEPTION_RECORD`, "ExceptionInformation"). A smaller number
/// is a read, and a larger one an instruction fetch.
const WRITE: usize = 1;

impl FaultRange {
    /// Returns the range that an access faulted in. `None` for all other exceptions.
    ///
    /// The page of a file that cannot be read is an `EXCEPTION_IN_PAGE_ERROR`.
    pub(super) fn from_record(record: &EXCEPTION_RECORD) -> Option<Self> {
        let [kind, address, ..] = record.ExceptionInformation;
        match record.ExceptionCode {
            EXCEPTION_ILLEGAL_INSTRUCTION => return Some(Self::NO_ADDRESS),
            EXCEPTION_ACCESS_VIOLATION | EXCEPTION_IN_PAGE_ERROR => {}
            _ => return None,
        }
        if record.NumberParameters < 2 || kind > WRITE {
            return None;
        }
        // A general protection fault has no address. The system reports the largest one.
        Some(match address {
            usize::MAX => Self::NO_ADDRESS,
            start => FaultRange { start, len: 1 },
        })
    }
}
