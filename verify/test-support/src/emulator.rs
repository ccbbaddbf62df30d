use std::ffi::OsString;

/// Returns the program with which cargo runs this test program.
///
/// Returns `None` if the processor runs it directly. `cargo xtask emulate` runs the tests for
/// aarch64 with qemu. A test that starts itself again needs the same program. A test of behaviour
/// that qemu does not emulate is skipped.
pub fn emulator() -> Option<OsString> {
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
