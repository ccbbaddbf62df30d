//! What cargo runs a test program with.

use std::ffi::OsString;

/// What cargo runs this program with, where the machine cannot run it by itself (`cargo xtask emulate`).
pub(crate) fn emulator() -> Option<OsString> {
    if cfg!(all(
        target_arch = "aarch64",
        target_os = "linux",
        target_env = "gnu"
    )) {
        std::env::var_os("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER")
    } else {
        None
    }
}
