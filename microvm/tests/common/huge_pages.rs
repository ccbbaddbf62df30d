//! Huge pages for a test, out of the machine's pool.

use std::fs;

use crate::common::skipped;

/// Huge pages of 2 MiB that are free for one test. Tests of all programs take turns, and the number in the pool is put back.
pub struct HugePages {
    before: String,
    _turn: fs::File,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// The file that the tests of vm-memory and vm-memory-host lock, too.
const TURN: &str = "/tmp/vm-memory-hugepages.lock";

impl HugePages {
    /// Makes sure that `count` are free; says so aloud if that cannot be.
    pub fn reserve(count: u64, test: &str) -> Option<Self> {
        // Whoever made it, others may read it, which is enough for a lock; to write to it, or to open it as if it
        // had to be made, they may not (proc_sys_fs(5), protected_regular).
        let turn = fs::File::open(TURN)
            .or_else(|_| fs::File::options().create(true).append(true).open(TURN));
        let turn = match turn.and_then(|turn| turn.lock().map(|()| turn)) {
            Ok(turn) => turn,
            Err(e) => {
                skipped(
                    test,
                    &format!("no turn at the pool of huge pages: {TURN}: {e}"),
                );
                return None;
            }
        };
        let free = || {
            let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
            fs::read_to_string(path).map_or(0, |text| text.trim().parse().unwrap_or(0))
        };
        let before = match fs::read_to_string(POOL) {
            Ok(before) => before,
            Err(e) => {
                skipped(test, &format!("no pool of huge pages: {e}"));
                return None;
            }
        };
        let pages = Self {
            before,
            _turn: turn,
        };
        let total: u64 = pages.before.trim().parse().unwrap();
        let missing = count.saturating_sub(free());
        if let Err(e) = fs::write(POOL, (total + missing).to_string()) {
            skipped(
                test,
                &format!("the pool of huge pages cannot be changed: {e}"),
            );
            return None;
        }
        if free() < count {
            skipped(
                test,
                &format!("{count} huge pages cannot be had, but {}", free()),
            );
            return None;
        }
        Some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(POOL, self.before.trim());
    }
}
