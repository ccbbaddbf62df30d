//! The error of a run.

use std::io;

/// The reason that a run cannot be set up, or fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver found a wrong value.
    #[error("{what} {place:#x}: found {found:#x}, expected {expected:#x}")]
    Mismatch {
        /// The kind of the value.
        what: &'static str,
        /// Its address, offset or number.
        place: u64,
        /// The value.
        found: u64,
        /// The value that it must have.
        expected: u64,
    },
    /// Any other error.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// An error of microvm.
    #[error(transparent)]
    Microvm(#[from] microvm::Error),
}

impl Error {
    /// Converts an error, or a message.
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Io(io::Error::other(error))
    }

    /// Converts the error of a lock whose holder panicked.
    pub(crate) fn poisoned<T>(_: std::sync::PoisonError<T>) -> Self {
        Self::other("a device panicked")
    }
}
