//! A device thread that writes to guest memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{Memory, Result};

const PAGE: u64 = 0x1000;
const PAGES: u64 = 64;

/// A thread that writes to 64 pages, one after another, until it is stopped.
pub struct Device {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::result::Result<(), GuestMemoryError>>,
}

impl Device {
    /// Starts the thread. The first of its pages is at `start`.
    pub fn start(memory: &Arc<Memory>, start: GuestAddress) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (memory, stopped) = (Arc::clone(memory), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut count = 0;
            while !stopped.load(Ordering::Acquire) {
                let page = GuestAddress(start.0 + count % PAGES * PAGE);
                memory.write_obj(count, page)?;
                count += 1;
            }
            Ok(())
        });
        Self { stop, thread }
    }

    /// Stops the thread after its current write.
    ///
    /// # Errors
    ///
    /// Returns the error of a write, or an error if the thread panicked.
    pub fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.join().map_err(|_| "the device panicked")?;
        Ok(ended?)
    }
}
