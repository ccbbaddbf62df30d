//! [`VmaBudget`]: a limit on the VMAs of guest memory.
//!
//! On Linux, a process may have `vm.max_map_count` VMAs. Each region needs some, and an untrusted
//! description chooses how many regions there are. A guest creates more by unplugging protected
//! blocks and by discarding pages of private files. This module counts them in advance, for the
//! whole process, and leaves half of the maximum to the process itself.
//!
//! Windows has no maximum, but each mapping takes memory of the kernel. An arena counts its
//! mappings there, with the limit that Linux has by default.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use super::HostResources;

/// The number of VMAs that all shares together hold.
static IN_USE: AtomicUsize = AtomicUsize::new(0);

/// A share of the VMAs that guest memory may have. Dropping it releases the share.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct VmaBudget(usize);

impl VmaBudget {
    /// Takes `more` VMAs if the limit allows all of them, and returns whether it does.
    pub(crate) fn try_take(&mut self, more: usize) -> bool {
        self.try_take_below(vma_limit(), more)
    }

    /// Does the same as [`try_take`](Self::try_take), but leaves a quarter of the limit to builds.
    ///
    /// A guest chooses when it discards. It must not prevent the hotplug of a region.
    pub(crate) fn try_take_for_guest(&mut self, more: usize) -> bool {
        let limit = vma_limit();
        self.try_take_below(limit.saturating_sub(limit / 4), more)
    }

    fn try_take_below(&mut self, limit: usize, more: usize) -> bool {
        // Relaxed: the counter protects no other memory.
        let sum = |in_use: usize| {
            let sum = in_use.checked_add(more);
            sum.filter(|sum| *sum <= limit)
        };
        let taken = IN_USE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum);
        if taken.is_ok() {
            self.0 = self.0.saturating_add(more);
        }
        taken.is_ok()
    }

    /// Moves up to `count` VMAs of this share to a share of their own.
    #[cfg(target_os = "linux")]
    pub(crate) fn split(&mut self, count: usize) -> Self {
        let count = count.min(self.0);
        self.0 = self.0.saturating_sub(count);
        Self(count)
    }

    /// Returns the number of VMAs that are in no share.
    #[cfg(target_os = "linux")]
    pub(crate) fn available() -> usize {
        // Relaxed: the number may change before the caller uses it, and protects no other memory.
        vma_limit().saturating_sub(IN_USE.load(Ordering::Relaxed))
    }

    /// Releases VMAs that can no longer exist.
    pub(crate) fn release(&mut self, less: usize) {
        let less = less.min(self.0);
        self.0 = self.0.saturating_sub(less);
        // Relaxed: the number protects no other memory.
        IN_USE.fetch_sub(less, Ordering::Relaxed);
    }

    /// Returns the number of VMAs in this share.
    pub(crate) fn count(&self) -> usize {
        self.0
    }
}

impl Drop for VmaBudget {
    fn drop(&mut self) {
        self.release(self.0);
    }
}

/// The limit of this process.
static LIMIT: VmaLimit = VmaLimit(OnceLock::new());

/// Half of the maximum, once it was read.
struct VmaLimit(OnceLock<usize>);

impl VmaLimit {
    /// Reads the limit, unless it is known. After a failure, the next call reads it again.
    fn read(&self, host: &HostResources) {
        if self.0.get().is_some() {
            return;
        }
        if let Some(count) = host.max_map_count() {
            let _ = self.0.set(usize::try_from(count / 2).unwrap_or(usize::MAX));
        }
    }

    /// Returns the limit. Unless it is known, returns that of Linux by default.
    fn get(&self) -> usize {
        self.0.get().copied().unwrap_or(65_530 / 2)
    }
}

/// Reads the number of VMAs that guest memory may have, unless it is known.
///
/// Builds and new arenas call it. Guests cause other calls, under a seccomp filter that may forbid
/// to read /proc.
pub(crate) fn read_vma_limit(host: &HostResources) {
    LIMIT.read(host);
}

/// Returns the number of VMAs that guest memory may have: half of the maximum.
///
/// Reads no file.
pub(crate) fn vma_limit() -> usize {
    LIMIT.get()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::host::tree;

    #[test]
    fn limit_that_cannot_be_read_is_read_again_later() {
        let limit = VmaLimit(OnceLock::new());
        let (_keep, without) = tree(&[]);
        limit.read(&without);
        assert_eq!(limit.get(), 32_765);
        let max_map_count = |text| tree(&[("proc/sys/vm/max_map_count", text)]);
        let (_keep, host) = max_map_count("1000\n");
        limit.read(&host);
        assert_eq!(limit.get(), 500);
        // It is known now, and stays.
        limit.read(&max_map_count("2000\n").1);
        assert_eq!(limit.get(), 500);
    }
}
