use std::fs::File;
use std::io::{Seek, Write};

/// Creates an unnamed temporary file with `contents`, positioned at its start.
///
/// # Panics
///
/// Panics if the file cannot be created or written.
pub fn temp_file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("cannot create a temporary file");
    file.write_all(contents)
        .and_then(|()| file.rewind())
        .expect("cannot write to a temporary file");
    file
}

/// Creates an unnamed temporary file of `len` zero bytes, which is sparse.
///
/// # Panics
///
/// Panics if the file cannot be created or resized.
pub fn temp_file_of_len(len: u64) -> File {
    let file = tempfile::tempfile().expect("cannot create a temporary file");
    file.set_len(len).expect("cannot resize a temporary file");
    file
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn temp_file_reads_back_from_its_start() {
        let mut read = Vec::new();
        temp_file(b"guest").read_to_end(&mut read).unwrap();
        assert_eq!(read, b"guest");
    }

    #[test]
    fn temp_file_of_len_has_that_length() {
        assert_eq!(temp_file_of_len(0x3000).metadata().unwrap().len(), 0x3000);
    }
}
