use std::fs::{self, File};

use crate::skipped;

/// The number of huge pages in the pool. Writing it resizes the pool.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// The file that a test program locks while it uses the pool.
const LOCK: &str = "/tmp/vm-memory-hugepages.lock";

/// Exclusive use of the machine's pool of huge pages of 2 MiB.
///
/// All programs share one pool, so tests take turns, across threads and across the test programs of
/// all crates. Dropping this ends the turn, and restores the size of the pool.
#[derive(Debug)]
pub struct HugePages {
    before: Option<u64>,
    _turn: File,
}

impl HugePages {
    /// Waits for the pool and locks it. Reports `test` as [skipped] and returns `None` if the lock
    /// file cannot be locked.
    pub fn lock(test: &str) -> Option<Self> {
        // The file may belong to another user. Reading is enough to lock it; writing or creating it
        // may be forbidden (proc_sys_fs(5), protected_regular).
        let turn =
            File::open(LOCK).or_else(|_| File::options().create(true).append(true).open(LOCK));
        match turn.and_then(|turn| turn.lock().map(|()| turn)) {
            Ok(turn) => Some(Self {
                before: None,
                _turn: turn,
            }),
            Err(error) => {
                skipped(
                    test,
                    format!("cannot lock the pool of huge pages: {LOCK}: {error}"),
                );
                None
            }
        }
    }

    /// Locks the pool and grows it until at least `count` pages are free. Reports `test` as
    /// [skipped] and returns `None` if that is not possible.
    pub fn reserve(count: u64, test: &str) -> Option<Self> {
        let mut pages = Self::lock(test)?;
        match pages.grow_to_free(count) {
            Ok(()) => Some(pages),
            Err(why) => {
                skipped(test, why);
                None
            }
        }
    }

    fn grow_to_free(&mut self, count: u64) -> Result<(), String> {
        if meminfo("Hugepagesize:") != Some(2048) {
            return Err("the default huge page of this machine is not 2 MiB".to_owned());
        }
        let before = self.total();
        let missing = count.saturating_sub(self.free());
        if missing > 0 {
            self.before = Some(before);
            fs::write(POOL, (before + missing).to_string())
                .map_err(|error| format!("cannot resize the pool of huge pages: {error}"))?;
        }
        match self.free() {
            free if free >= count => Ok(()),
            free => Err(format!(
                "{count} huge pages needed, but only {free} are free after resizing the pool"
            )),
        }
    }

    /// Returns the number of huge pages in the pool, free or in use.
    pub fn total(&self) -> u64 {
        meminfo("HugePages_Total:").unwrap_or(0)
    }

    /// Returns the number of free huge pages in the pool.
    pub fn free(&self) -> u64 {
        meminfo("HugePages_Free:").unwrap_or(0)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = fs::write(POOL, before.to_string());
        }
    }
}

/// Returns the number in a line of /proc/meminfo.
fn meminfo(name: &str) -> Option<u64> {
    let all = fs::read_to_string("/proc/meminfo").ok()?;
    let line = all.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_dropped_restore_the_pool() {
        let test = "huge_pages_dropped_restore_the_pool";
        let Some(locked) = HugePages::lock(test) else {
            return;
        };
        let before = locked.total();
        drop(locked);
        if let Some(reserved) = HugePages::reserve(1, test) {
            assert!(reserved.free() >= 1 && reserved.total() >= before);
        }
        if let Some(locked) = HugePages::lock(test) {
            assert_eq!(locked.total(), before);
        }
    }
}
