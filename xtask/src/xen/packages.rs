//! The hypervisor and the kernel, from Debian's packages.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{ensure, Context, Result};

use crate::debian::{add_arm64, succeed, update};

/// The version of the hypervisor. The program of domain 0 creates a domain with hypercalls that
/// differ between versions.
const XEN: &str = "4.17";

/// The kernel's modules that the scenarios need, in the order of loading.
const MODULES: [&str; 3] = ["xen-privcmd", "xen-gntdev", "xen-gntalloc"];

/// The files that boot a machine.
#[derive(Debug)]
pub struct Boot {
    /// The hypervisor, in the format that the emulator loads.
    pub hypervisor: PathBuf,
    /// The kernel of domain 0.
    pub kernel: PathBuf,
    /// The modules of that kernel, in the order of loading.
    pub modules: Vec<PathBuf>,
}

/// Downloads and unpacks the packages of an architecture, unless an earlier run did so.
///
/// # Errors
///
/// Returns an error if a package is unknown, or cannot be downloaded or unpacked.
pub fn unpack(architecture: &str, folder: &Path, install: bool) -> Result<Boot> {
    let folder = folder.join(architecture);
    let done = folder.join("unpacked");
    if !done.exists() {
        download(architecture, &folder, install)?;
        File::create(&done).with_context(|| format!("cannot write {}", done.display()))?;
    }
    let boot = folder.join("boot");
    let compressed = boot.join(format!("xen-{XEN}-{architecture}.gz"));
    let hypervisor = if compressed.exists() {
        decompress(&compressed, &boot.join("xen"))?
    } else {
        boot.join(format!("xen-{XEN}-{architecture}"))
    };
    let modules = MODULES
        .iter()
        .map(|name| find(&folder.join("lib"), &|file| file == format!("{name}.ko")))
        .collect::<Result<_>>()?;
    Ok(Boot {
        hypervisor,
        kernel: find(&boot, &|file| file.starts_with("vmlinuz-"))?,
        modules,
    })
}

fn download(architecture: &str, folder: &Path, install: bool) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let image = match kernel_package(architecture) {
        Ok(image) => image,
        Err(_) if install => {
            if architecture == "arm64" {
                add_arm64()?;
            }
            update()?;
            kernel_package(architecture)?
        }
        Err(error) => return Err(error),
    };
    let hypervisor = format!("xen-hypervisor-{XEN}-{architecture}:{architecture}");
    // apt-get warns on standard error that it downloads as root.
    succeed(
        Command::new("apt-get")
            .args(["download", "-qq", &hypervisor, &image])
            .current_dir(folder)
            .stderr(Stdio::null()),
    )
    .with_context(|| format!("cannot download {hypervisor} and {image}"))?;
    for entry in fs::read_dir(folder)? {
        let package = entry?.path();
        if package
            .extension()
            .is_some_and(|extension| extension == "deb")
        {
            extract(&package, folder)?;
            fs::remove_file(&package)?;
        }
    }
    Ok(())
}

/// Returns the package of the current kernel, which is a dependency of the package without a
/// version.
fn kernel_package(architecture: &str) -> Result<String> {
    let name = format!("linux-image-{architecture}:{architecture}");
    let output = Command::new("apt-cache")
        .args(["depends", &name])
        .output()
        .context("cannot start apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let image = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
        .with_context(|| format!("apt-cache does not know {name}"))?;
    let image = image.split(':').next().unwrap_or(image);
    Ok(format!("{image}:{architecture}"))
}

/// Extracts the files of a package that a boot needs. The other files of a kernel take 300 MB.
fn extract(package: &Path, folder: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let contents = archive.stdout.take().context("dpkg-deb has no output")?;
    let extracted = Command::new("tar")
        .args(["-x", "--wildcards", "./boot/*", "*/xen/*.ko"])
        .current_dir(folder)
        .stdin(contents)
        // A package without modules does not match the second pattern.
        .stderr(Stdio::null())
        .status()
        .context("cannot start tar")?;
    let archived = archive.wait()?;
    let readable = archived.success() && folder.join("boot").exists();
    ensure!(
        readable,
        "cannot unpack {}: dpkg-deb ended with {archived}, tar with {extracted}",
        package.display()
    );
    Ok(())
}

fn decompress(compressed: &Path, file: &Path) -> Result<PathBuf> {
    let output = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    let status = Command::new("gzip")
        .arg("-dc")
        .arg(compressed)
        .stdin(Stdio::null())
        .stdout(output)
        .status()
        .context("cannot start gzip")?;
    ensure!(status.success(), "gzip ended with {status}");
    Ok(file.to_owned())
}

/// Returns the file below `folder` whose name `matches` accepts.
fn find(folder: &Path, matches: &dyn Fn(&str) -> bool) -> Result<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_str().is_some_and(matches) {
                return Ok(entry.path());
            }
        }
    }
    anyhow::bail!("{} lacks a file of the packages", folder.display())
}
