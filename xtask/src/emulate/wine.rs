//! [`Wine`]: a Wine, the folder of its files, and how cargo starts programs with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::harness::variable;
use crate::debian::succeed;

/// Wine without its wrapper, which needs a display. Debian 12 and 13 have it here.
pub(super) const PROGRAM: &str = "/usr/lib/wine/wine64";
/// The linker, which also makes a library that Wine 8 lacks.
pub(super) const LINKER: &str = "x86_64-w64-mingw32-gcc";
/// The program that makes a folder with a Debian system.
pub(super) const DEBOOTSTRAP: &str = "/usr/sbin/debootstrap";

/// A library of Windows that Wine 8 lacks. Rust's standard library gets random numbers from it.
const RANDOM_NUMBERS: &str = r"#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID buffer, ULONG len);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE buffer, SIZE_T len) {
    return SystemFunction036(buffer, (ULONG)len);
}
";

/// Starts a program of the Debian system in the folder `$1`.
///
/// The program sees the folders `$2` and `$3` at their paths, and runs in the current one. The
/// mounts are those of this process only: they end with it.
const IN_SYSTEM: &str = r#"set -e
system=$1
for folder in "$2" "$3"; do
    mkdir -p "$system$folder"
    mount --bind "$folder" "$system$folder"
done
mount -t proc proc "$system/proc"
shift 3
exec chroot "$system" env -C "$PWD" "$@"
"#;

/// A Wine that is ready to run programs.
pub(super) struct Wine {
    /// The folder of its files.
    prefix: PathBuf,
    /// The program that starts it, with its arguments.
    start: Vec<String>,
}

impl Wine {
    /// Returns the Wine 8 of this Debian 12, whose files are in `folder`.
    pub(super) fn installed(folder: &Path) -> Result<Self> {
        let wine = Self {
            prefix: folder.join("wine"),
            start: vec![PROGRAM.to_owned()],
        };
        wine.boot()?;
        Ok(wine)
    }

    /// Returns the Wine 10 of a Debian 13 in `folder`, which is made if it does not exist.
    ///
    /// This needs root and a network. Programs also see the folder `root`.
    pub(super) fn of_debian_13(root: &Path, folder: &Path) -> Result<Self> {
        let system = folder.join("debian-13");
        if !system.join(PROGRAM.trim_start_matches('/')).exists() {
            // The name changes when the folder is complete.
            let incomplete = folder.join("debian-13.incomplete");
            if incomplete.exists() {
                fs::remove_dir_all(&incomplete)
                    .with_context(|| format!("cannot remove {}", incomplete.display()))?;
            }
            let mut make = Command::new(DEBOOTSTRAP);
            make.args(["--variant=minbase", "--include=wine64", "trixie"]);
            succeed(make.arg(&incomplete))?;
            fs::rename(&incomplete, &system)
                .with_context(|| format!("cannot create {}", system.display()))?;
        }
        let script = folder.join("in_debian_13.sh");
        fs::write(&script, IN_SYSTEM)
            .with_context(|| format!("cannot write {}", script.display()))?;
        let mut start: Vec<_> = ["unshare", "--mount", "sh"].map(str::to_owned).into();
        for path in [&script, &system, root, folder] {
            start.push(path.display().to_string());
        }
        start.push(PROGRAM.to_owned());
        let wine = Self {
            prefix: folder.join("wine-10"),
            start,
        };
        wine.boot()?;
        Ok(wine)
    }

    /// Makes cargo start programs of a target with this Wine.
    pub(super) fn runs(&self, command: &mut Command, target: &str) {
        command.env(variable(target, "RUNNER"), self.start.join(" "));
        self.describe(command);
    }

    /// Says where the files are. There are no messages, and no offers to install programs. The
    /// debugger would change the status of a test program that crashes on purpose.
    fn describe(&self, command: &mut Command) {
        command
            .env("WINEPREFIX", &self.prefix)
            .env("WINEDEBUG", "-all")
            .env("WINEDLLOVERRIDES", "mscoree,mshtml,winedbg.exe=");
    }

    /// Makes the folder of the files, with the library that Wine 8 lacks.
    fn boot(&self) -> Result<()> {
        let system = self.prefix.join("drive_c/windows/system32");
        if !system.join("kernel32.dll").exists() {
            let mut boot = Command::new("env");
            boot.args(&self.start).args(["wineboot", "--init"]);
            self.describe(&mut boot);
            succeed(boot.stderr(Stdio::null()))?;
        }
        let library = system.join("bcryptprimitives.dll");
        if !library.exists() {
            let source = self.prefix.join("random_numbers.c");
            fs::write(&source, RANDOM_NUMBERS)
                .with_context(|| format!("cannot write {}", source.display()))?;
            let mut compile = Command::new(LINKER);
            compile.args(["-shared", "-O2", "-o"]);
            compile.arg(&library).arg(&source).arg("-ladvapi32");
            succeed(&mut compile)?;
        }
        Ok(())
    }
}
