//! Helpers that the tests of every crate in this workspace share.
//!
//! | helper | use |
//! |---|---|
//! | [`skipped`] | reports a test that this machine cannot run |
//! | [`page_size`] | the size of a page of this system |
//! | [`PAGE`], [`PAGE_U64`], [`MIB`] | sizes of ranges of guest memory |
//! | [`temp_file`], [`temp_file_of_len`] | files that disappear with their descriptor |
//! | [`HugePages`] | exclusive use of the machine's huge pages |
//! | [`LazyPages`] | a userfaultfd handler that fills pages from a snapshot |
//! | [`LockedFile`] | a file whose lock in the kernel another thread holds |
//! | [`FuseServer`], [`returned`] | a file whose server fails; calls that must return |
//! | [`in_own_process`], [`run_again`] | a test that changes or counts what a process has |
//! | [`record_calls`] | the system calls that a function makes |
//! | [`CallRecorder`], [`documented_calls`] | compares them with the documentation |
//! | [`refuse_calls`], [`refuse_calls_with`] | make system calls of a function fail |
//! | [`SetOnDrop`] | ends the threads of a test after a panic |
//! | [`wait_until`], [`ThreadId`] | wait for a condition, or until a thread sleeps |
//! | [`StaticAllocator`] | an allocator without system calls |
//! | [`error_chain`], [`assert_causes_printed_once`] | the messages of an error and its causes |
//! | [`emulator`] | the program that runs the tests of another processor |
//!
//! A test that cannot run on a machine prints a line with `SKIPPED:` and passes. These lines list
//! the properties that a test run did not check. CI accepts those in `.ci/skips`, and no others.
//!
//! ```
//! fn writes_to_a_pipe_wait() {
//!     if !std::path::Path::new("/dev/null").exists() {
//!         return test_support::skipped("writes_to_a_pipe_wait", "no /dev/null");
//!     }
//!     let file = test_support::temp_file(&[7; 100]);
//!     assert_eq!(file.metadata().unwrap().len(), 100);
//! }
//! # writes_to_a_pipe_wait();
//! ```

// # Layers
//
// A module imports only from lines above it.
//
// ```text
// wait, emulator, error_chain, files, huge_pages, set_on_drop, fuse_server, static_allocator
// system_calls
// own_process
// lazy_pages
// locked_file
// ```
mod emulator;
mod error_chain;
mod files;
#[cfg(target_os = "linux")]
mod fuse_server;
mod huge_pages;
#[cfg(target_os = "linux")]
mod lazy_pages;
#[cfg(target_os = "linux")]
mod locked_file;
mod own_process;
mod set_on_drop;
mod static_allocator;
#[cfg(target_os = "linux")]
mod system_calls;
mod wait;

use std::fmt::Display;
use std::io::Write;

pub use emulator::emulator;
pub use error_chain::{assert_causes_printed_once, error_chain};
pub use files::{temp_file, temp_file_of_len};
#[cfg(target_os = "linux")]
pub use fuse_server::{returned, FuseServer, FUSE_FLUSH};
pub use huge_pages::HugePages;
#[cfg(target_os = "linux")]
pub use lazy_pages::{poison, LazyPages};
#[cfg(target_os = "linux")]
pub use locked_file::LockedFile;
pub use own_process::{in_own_process, run_again};
pub use set_on_drop::SetOnDrop;
pub use static_allocator::StaticAllocator;
#[cfg(target_os = "linux")]
pub use system_calls::{
    call_rows, documented_calls, record_calls, refuse_calls, refuse_calls_with, Call, CallRecorder,
    CallRow,
};
pub use wait::wait_until;
#[cfg(target_os = "linux")]
pub use wait::ThreadId;

/// Reports that `test` does not run on this machine, and the reason.
///
/// The line `SKIPPED: {test}: {why}` goes to standard error directly, because libtest shows the
/// captured output of failed tests only. One write keeps the lines of several threads apart.
pub fn skipped(test: &str, why: impl Display) {
    let line = format!("SKIPPED: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// 4 KiB: the size of a page of guest memory, and of the host on x86_64.
pub const PAGE: usize = 4096;

/// [`PAGE`] as a length or an offset in guest memory.
pub const PAGE_U64: u64 = PAGE as u64;

/// The number of bytes of 1 MiB.
pub const MIB: u64 = 1 << 20;

/// Returns the size of a page of this system, in bytes.
pub fn page_size() -> usize {
    #[cfg(unix)]
    return rustix::param::page_size();
    // Each processor that Windows runs on has pages of 4 KiB.
    #[cfg(windows)]
    PAGE
}
