//! The identity of a file, and its holes.

use std::fs::{File, Metadata};
use std::io::{Error, Result};
use std::mem::MaybeUninit;
use std::os::windows::fs::MetadataExt;
use std::os::windows::io::AsRawHandle;

use windows_sys::Win32::Storage::FileSystem::{
    GetFileInformationByHandle, BY_HANDLE_FILE_INFORMATION, FILE_ATTRIBUTE_COMPRESSED,
    FILE_ATTRIBUTE_SPARSE_FILE,
};

/// Returns the serial number of a file's volume, and its number there.
///
/// Returns `None` on a file system that has no such numbers.
pub(crate) fn file_identity(file: &File) -> Result<Option<(u32, u64)>> {
    let mut info = MaybeUninit::<BY_HANDLE_FILE_INFORMATION>::uninit();
    // SAFETY: the handle is that of an open file, as `file` is borrowed. The call writes one
    // structure to its argument, which has room for it.
    let succeeded = unsafe { GetFileInformationByHandle(file.as_raw_handle(), info.as_mut_ptr()) };
    if succeeded == 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the call has succeeded, and has written the structure.
    let info = unsafe { info.assume_init() };
    let number = u64::from(info.nFileIndexHigh) << 32 | u64::from(info.nFileIndexLow);
    Ok(identity(info.dwVolumeSerialNumber, number))
}

fn identity(volume: u32, number: u64) -> Option<(u32, u64)> {
    // A file system returns one of these for all files if it cannot number them (MS-FSCC 2.1.9).
    (number != 0 && number != u64::MAX).then_some((volume, number))
}

/// Returns whether a file may have parts without space on its volume.
pub(crate) fn has_holes(metadata: &Metadata) -> bool {
    metadata.file_attributes() & (FILE_ATTRIBUTE_SPARSE_FILE | FILE_ATTRIBUTE_COMPRESSED) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_of_file_without_number_is_none() {
        assert_eq!([identity(7, 0), identity(7, u64::MAX)], [None; 2]);
        assert_eq!(identity(7, 1), Some((7, 1)));
    }
}
