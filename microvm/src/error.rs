//! The reasons for which microvm cannot run a guest.

use std::io;
use std::path::{Path, PathBuf};

const WITHOUT_KVM: &str = "without KVM, `cargo test -p e2e` drives the devices from a thread";

/// A reason for which microvm cannot run a guest: what failed, why, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system cannot provide guest memory.
    #[error("cannot map guest memory")]
    Build(#[from] vm_memory_host::BuildError),
    /// The system cannot populate guest memory.
    #[error("--prefault: cannot populate guest memory")]
    Prefault(#[from] vm_memory_host::PrefaultError),
    /// microvm cannot access guest memory where it needs to.
    #[error("cannot access guest memory; try a larger --mem")]
    GuestMemory(#[from] vm_memory::GuestMemoryError),
    /// A file on the command line cannot be used.
    #[error("{option} {}: cannot use the file; check the path and its permissions", path.display())]
    File {
        /// The option that names the file.
        option: &'static str,
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The disk image has the wrong size.
    #[error("--disk {}: {len} bytes, expected a multiple of 512 and at least {min}", path.display())]
    DiskSize {
        /// The path of the image.
        path: PathBuf,
        /// The length of the image in bytes.
        len: u64,
        /// The minimum length in bytes.
        min: u64,
    },
    /// The disk image cannot be read, copied or created.
    #[error("disk image: cannot read or write it; check the free space in $TMPDIR")]
    Disk(#[source] io::Error),
    /// The kernel image cannot be booted.
    #[error("--kernel: {0}")]
    Kernel(String),
    /// This machine is not supported.
    #[error("microvm needs an x86_64 machine with KVM; {WITHOUT_KVM}")]
    Architecture,
    /// The KVM device cannot be opened.
    #[error(
        "{device}: cannot open it; load kvm_intel or kvm_amd and join the device's group; {WITHOUT_KVM}"
    )]
    KvmDevice {
        /// The path of the device.
        device: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A KVM ioctl failed.
    #[error("KVM: cannot {action}")]
    Kvm {
        /// The action that failed.
        action: &'static str,
        /// The error of the ioctl.
        source: io::Error,
    },
    /// The host cannot provide a thread, an event or a signal handler.
    #[error("a host resource is not available; check the limits of the process (ulimit -a)")]
    Host(#[from] io::Error),
    /// The virtqueue cannot be created.
    #[error("cannot create the virtqueue")]
    Queue(#[from] virtio_queue::Error),
}

impl Error {
    /// Returns a conversion from an I/O error on `path`, which `option` names.
    pub(crate) fn file(option: &'static str, path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File {
            option,
            path: path.clone(),
            source,
        }
    }
}
