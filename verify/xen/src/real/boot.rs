//! The first process of domain 0: mounts, modules, and power-off.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The folder of the kernel's modules, which are loaded in the order of their names.
const MODULES: &str = "/modules";

/// Makes the devices of Xen available.
///
/// # Errors
///
/// Returns an error if a file system cannot be mounted or a module cannot be loaded.
pub fn set_up() -> io::Result<()> {
    mount(c"proc", "/proc")?;
    mount(c"sysfs", "/sys")?;
    mount(c"devtmpfs", "/dev")?;
    fs::create_dir_all(std::env::temp_dir())?;
    let mut modules: Vec<_> = fs::read_dir(MODULES)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    modules.sort();
    modules.iter().try_for_each(|module| load(module))
}

fn mount(kind: &CStr, at: &str) -> io::Result<()> {
    fs::create_dir_all(at)?;
    let target = std::ffi::CString::new(at)?;
    // SAFETY: three strings that end with a zero, and no data.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    check(result.into(), at)
}

fn load(module: &Path) -> io::Result<()> {
    let file = File::open(module)?;
    // SAFETY: the call reads the file, and a string that ends with a zero.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    check(result, &module.display().to_string())
}

fn check(result: libc::c_long, what: &str) -> io::Result<()> {
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(io::Error::new(error.kind(), format!("{what}: {error}")))
}

/// Turns the machine off.
pub fn power_off() -> ! {
    // SAFETY: no file system has anything to write.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    // Reached only without the privilege. The kernel panics when its first process ends.
    std::process::exit(1)
}
