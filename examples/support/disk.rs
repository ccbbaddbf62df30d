//! The image of a disk.

use std::fs::File;
use std::io::{self, Write};

/// The size of a sector.
pub const SECTOR: usize = 512;
const SECTORS: u8 = 16;

/// Creates a disk of 16 sectors. Each byte of a sector is the number of the sector.
///
/// # Errors
///
/// Returns an error if the temporary file cannot be created or written.
pub fn numbered() -> io::Result<File> {
    let mut image = tempfile::tempfile()?;
    for sector in 0..SECTORS {
        image.write_all(&[sector; SECTOR])?;
    }
    Ok(image)
}
