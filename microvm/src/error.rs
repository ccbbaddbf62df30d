//! What can keep microvm from starting, each as one line: what is wrong, and what to do.

use std::io;
use std::path::PathBuf;

/// An error that ends microvm with exit status 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line cannot be understood.
    #[error("{0} (microvm --help lists what there is)")]
    Usage(String),
    /// `--mem` is no size, or one that cannot be had.
    #[error("--mem {given}: {why}; give a size such as 256M")]
    MemSize {
        /// The text after `--mem`.
        given: String,
        /// What is wrong with it.
        why: String,
    },
    /// Guest memory could not be mapped.
    #[error("cannot map {size} of guest memory: {why}; try a smaller --mem")]
    MapMemory {
        /// The size, as a reader would write it.
        size: String,
        /// What the library or the kernel said.
        why: String,
    },
    /// Guest memory cannot be had as it was asked for.
    #[error("cannot have guest memory: {0}")]
    Build(#[from] vm_memory_host::BuildError),
    /// The pages of guest memory cannot be brought in.
    #[error("--prefault: {0}")]
    Prefault(#[from] vm_memory_host::PrefaultError),
    /// The driver thread cannot have a mapping of its own.
    #[error(
        "--backing anon: the driver thread needs a second mapping of guest memory, and anonymous memory has none; \
        give --backing memfd, or run on KVM"
    )]
    NoSecondView,
    /// io_uring is there but cannot be used.
    #[error("--disk-io io_uring: {0}; --disk-io sync does without")]
    Uring(io::Error),
    /// A file named on the command line cannot be opened.
    #[error("{option} {}: {why}; check the path and its permissions", path.display())]
    OpenFile {
        /// The option it was given to.
        option: &'static str,
        /// The path as given.
        path: PathBuf,
        /// What the operating system said.
        why: io::Error,
    },
    /// The disk image has a size that no disk has.
    #[error("--disk {}: {size} bytes is not a whole number of 512-byte sectors; {fix}", path.display())]
    DiskOddSize {
        /// The path as given.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The command that mends it.
        fix: String,
    },
    /// The disk image is too small for the built-in guest.
    #[error("--disk {}: {size} bytes is too small; the built-in guest needs at least 4096", path.display())]
    DiskTooSmall {
        /// The path as given.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The temporary image, or the overlay, cannot be made or read.
    #[error("cannot {what}: {why}; check the space in $TMPDIR")]
    Image {
        /// What was tried.
        what: &'static str,
        /// What the operating system said.
        why: io::Error,
    },
    /// The file after `--kernel` or `--initrd` does not boot.
    #[error("{option} {}: {why}", path.display())]
    Kernel {
        /// The option it was given to.
        option: &'static str,
        /// The path as given.
        path: PathBuf,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// `/dev/kvm` is there but cannot be used.
    #[error("{device}: {why}; {fix}")]
    KvmDevice {
        /// The device's path.
        device: String,
        /// What the kernel said.
        why: String,
        /// What to do about it.
        fix: &'static str,
    },
    /// A kernel was to be booted, but there is no KVM to boot it on.
    #[error("--kernel needs KVM, and {0}; load the kvm module, or leave --kernel out")]
    KernelNeedsKvm(String),
    /// KVM refused a step of setting the machine up.
    #[error("KVM cannot {what}: {why}; --no-kvm runs without it")]
    Kvm {
        /// The step.
        what: &'static str,
        /// What the kernel said.
        why: String,
    },
    /// Guest memory refused an access of microvm's own.
    #[error("cannot {what}: {why}; try a larger --mem")]
    GuestMemory {
        /// What was tried.
        what: &'static str,
        /// What the library said.
        why: vm_memory::GuestMemoryError,
    },
    /// Files cannot be cut off and grown again.
    #[error("--chaos: cannot {what}: {why}")]
    Chaos {
        /// What was tried.
        what: &'static str,
        /// What the operating system said.
        why: io::Error,
    },
    /// A thread could not be started, or died.
    #[error("cannot {what}: {why}")]
    Thread {
        /// What was tried.
        what: &'static str,
        /// What the operating system said.
        why: String,
    },
}
