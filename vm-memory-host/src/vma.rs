//! [`VmaBudget`]: how many areas of addresses guests can make the kernel keep.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use crate::resources::number;

/// VmaBudget of addresses that guests can make the kernel keep, of which it has so many for the whole process (`vm.max_map_count`). Each is counted
/// before it can be made, and while this is there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct VmaBudget(usize);

static IN_USE: AtomicUsize = AtomicUsize::new(0);

impl VmaBudget {
    /// Counts so many more; nothing changes if that would be too many.
    pub(crate) fn try_take(&mut self, more: usize) -> bool {
        // Relaxed: it is a count and orders nothing.
        let sum = |now: usize| now.checked_add(more).filter(|sum| *sum <= vma_limit());
        let taken = IN_USE
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum)
            .is_ok();
        if taken {
            self.0 = self.0.saturating_add(more);
        }
        taken
    }

    /// Counts so many less, which cannot be made any more.
    pub(crate) fn release(&mut self, less: usize) {
        let less = less.min(self.0);
        self.0 = self.0.saturating_sub(less);
        IN_USE.fetch_sub(less, Ordering::Relaxed);
    }

    /// How many are counted here.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.0
    }
}

impl Drop for VmaBudget {
    fn drop(&mut self) {
        self.release(self.0);
    }
}

/// How many areas of addresses guests may make the kernel keep, in all of this process: half of those that it keeps at most.
pub(crate) fn vma_limit() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let most = number(Path::new("/proc/sys/vm/max_map_count")).unwrap_or(65_530);
        usize::try_from(most / 2).unwrap_or(usize::MAX)
    })
}
