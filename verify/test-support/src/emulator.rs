use std::ffi::OsString;

/// Returns the program with which cargo runs this test program.
///
/// Returns `None` if the processor runs it directly. `cargo xtask emulate` runs the tests for other
/// processors with qemu. A test that starts itself again needs the same program. A test of
/// behaviour that qemu does not emulate is skipped.
pub fn emulator() -> Option<OsString> {
    RUNNER.and_then(std::env::var_os)
}

/// The variable in which cargo finds the program. `None` if this machine runs the target.
const RUNNER: Option<&str> = if !cfg!(all(target_os = "linux", target_env = "gnu")) {
    None
} else if cfg!(target_arch = "aarch64") {
    Some("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER")
} else if cfg!(target_arch = "riscv64") {
    Some("CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_RUNNER")
} else if cfg!(target_arch = "s390x") {
    Some("CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_RUNNER")
} else if cfg!(target_arch = "powerpc64") {
    Some("CARGO_TARGET_POWERPC64LE_UNKNOWN_LINUX_GNU_RUNNER")
} else {
    None
};
