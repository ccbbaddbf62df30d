//! [`Outcome`]: the result of a scenario.
//!
//! Wrong data causes a panic. An error of the library that the scenario does not expect ends it
//! with [`Stop::Error`]. This is correct only if the environment has injected that error.

use std::io;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestMemoryError, GuestRegionCollectionError, VolatileMemoryError};

/// The result of a scenario.
pub type Outcome<T = ()> = Result<T, Stop>;

/// The reason why a scenario ended early.
#[derive(Debug)]
pub enum Stop {
    /// An access or a mapping returned an error.
    Error {
        /// The error of the system, if it is one.
        errno: Option<i32>,
        /// The error in words.
        text: String,
    },
    /// The scenario does not apply to the environment, for this reason.
    Skipped(String),
}

impl Stop {
    fn new(errno: Option<i32>, error: &dyn std::fmt::Debug) -> Self {
        Self::Error {
            errno,
            text: format!("{error:?}"),
        }
    }

    /// Returns the error of the system, if it is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Error { errno, .. } => *errno,
            Self::Skipped(_) => None,
        }
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::new(error.raw_os_error(), &error)
    }
}

impl From<GuestMemoryError> for Stop {
    fn from(error: GuestMemoryError) -> Self {
        let errno = match &error {
            GuestMemoryError::IOError(error) => error.raw_os_error(),
            _ => None,
        };
        Self::new(errno, &error)
    }
}

impl From<VolatileMemoryError> for Stop {
    fn from(error: VolatileMemoryError) -> Self {
        let errno = match &error {
            VolatileMemoryError::IOError(error) => error.raw_os_error(),
            _ => None,
        };
        Self::new(errno, &error)
    }
}

impl From<MmapRegionError> for Stop {
    fn from(error: MmapRegionError) -> Self {
        let errno = match &error {
            MmapRegionError::Mmap(error) => error.raw_os_error(),
            _ => None,
        };
        Self::new(errno, &error)
    }
}

impl From<GuestRegionCollectionError> for Stop {
    fn from(error: GuestRegionCollectionError) -> Self {
        Self::new(None, &error)
    }
}

/// Requires that `result` is the system's error `errno`.
///
/// # Errors
///
/// Returns another error of the system, which the environment may have injected.
///
/// # Panics
///
/// Panics if `result` is a success, or an error that is not of the system.
pub fn expect_errno<T, E: Into<Stop>>(result: Result<T, E>, errno: i32, what: &str) -> Outcome {
    match result.map_err(Into::into) {
        Ok(_) => panic!("{what} succeeded, but must fail with errno {errno}"),
        Err(stop) if stop.errno() == Some(errno) => Ok(()),
        Err(stop) if stop.errno().is_some() => Err(stop),
        Err(stop) => panic!("{what} must fail with errno {errno}, not with {stop:?}"),
    }
}
