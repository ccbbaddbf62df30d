//! [`run_on_threads`]: threads that work together.

use std::convert::Infallible;
use std::ffi::CStr;
use std::io::{Error, ErrorKind, Result};
use std::panic::resume_unwind;
use std::thread::{scope, Builder};

/// Calls `work` with 0 in this thread and with 1, 2, … in up to `others` new threads.
///
/// The new threads are called `name`. If the system refuses a thread, there are fewer. Returns when
/// all of them have returned, and continues a panic of one of them.
pub(crate) fn run_on_threads<W: Fn(usize) + Sync>(name: &CStr, others: usize, work: &W) {
    let name = name.to_string_lossy();
    scope(|scope| {
        let mut threads = Vec::with_capacity(others);
        for number in 1..=others {
            let builder = Builder::new().name(name.clone().into_owned());
            match builder.spawn_scoped(scope, move || work(number)) {
                Ok(thread) => threads.push(thread),
                Err(_) => break,
            }
        }
        work(0);
        for thread in threads {
            if let Err(panic) = thread.join() {
                resume_unwind(panic);
            }
        }
    });
}

/// A set of CPUs. There is none on Windows, where no thread is moved.
#[derive(Clone, Debug)]
pub(crate) struct Cpus(Infallible);

impl Cpus {
    /// Fails.
    pub(crate) fn allowed() -> Result<Self> {
        Err(Error::from(ErrorKind::Unsupported))
    }

    pub(crate) fn apply(&self) -> Result<()> {
        match self.0 {}
    }
}
