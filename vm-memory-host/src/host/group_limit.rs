//! [`GroupLimit`]: a limit that a control group sets, in errors.

use std::fmt;
use std::path::PathBuf;

/// A limit that a control group sets on memory or huge pages. Only Linux has them.
///
/// # Examples
///
/// ```
/// use vm_memory_host::{BuildError, GroupLimit};
///
/// /// Returns the limit that prevented a build, whose message names its file and its use.
/// fn limit(error: &BuildError) -> Option<&GroupLimit> {
///     match error {
///         BuildError::ControlGroup { limit, .. } => Some(limit),
///         _ => None,
///     }
/// }
/// # let _ = limit;
/// ```
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
#[doc(alias = "cgroup")]
pub struct GroupLimit {
    /// The file that holds the limit.
    pub file: PathBuf,
    /// The limit in bytes.
    pub limit: u64,
    /// The number of bytes in use that the kernel cannot reclaim.
    pub used: u64,
    /// The number of available bytes, including swap if the limit does not count swap.
    pub available: u64,
}

impl fmt::Display for GroupLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        let (limit, used) = (self.limit, self.used);
        write!(
            f,
            "{file} allows {limit:#x} bytes, of which {used:#x} are in use"
        )
    }
}
