//! Where faults cannot be recovered from.

use std::io::{Error, ErrorKind, Result};

/// Says so.
pub(super) fn install() -> Result<()> {
    Err(Error::new(
        ErrorKind::Unsupported,
        "faults in guest memory are recovered from only on Linux on x86_64 and aarch64, with one of the features rawfd, backend-mmap and \
         backend-bitmap",
    ))
}
