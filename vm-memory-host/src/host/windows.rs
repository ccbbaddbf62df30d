//! [`HostResources`] on Windows.

/// The resources of the host, of which none is read in advance.
///
/// The system counts all accessible memory against its commit limit, and refuses what exceeds it.
/// No check is needed before.
#[derive(Debug)]
pub(crate) struct HostResources;

impl HostResources {
    pub(crate) fn current() -> Self {
        Self
    }

    /// Returns the number of VMAs that a process may have: the system does not limit it.
    pub(super) fn max_map_count(&self) -> Option<u64> {
        None
    }
}
