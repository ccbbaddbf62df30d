//! The machine's pool of huge pages, which is one for all programs.

use std::fs::File;

use crate::common::skipped;

/// How many huge pages there are.
pub(crate) const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// The file that the tests of vm-memory-host and microvm lock, too.
const TURN: &str = "/tmp/vm-memory-hugepages.lock";

/// Waits until nobody else changes the pool or looks at it: no other thread, and no other test program. The turn is over when the file is closed. If there
/// can be no turn, says so aloud.
pub(crate) fn turn(test: &str) -> Option<File> {
    // Whoever made it, others may read it, which is enough for a lock; to write to it, or to open it as if it had to be made, they may not (proc_sys_fs(5),
    // protected_regular).
    let turn = File::open(TURN).or_else(|_| File::options().create(true).append(true).open(TURN));
    match turn.and_then(|turn| turn.lock().map(|()| turn)) {
        Ok(turn) => Some(turn),
        Err(error) => {
            skipped(
                test,
                format!("no turn at the pool of huge pages: {TURN}: {error}"),
            );
            None
        }
    }
}
