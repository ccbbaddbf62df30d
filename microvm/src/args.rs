//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::memory::{Backing, PAGE, SIZES};
use crate::report::human;

/// A small virtual machine monitor on vm-memory.
///
/// Boots a built-in 64-bit guest that writes to its RAM and drives a virtio block device. Prints
/// the memory map, the requests, and the dirty pages of guest and device. Exits with 0 if
/// all checks pass, with 1 if one fails, and with 2 if the guest cannot be started.
#[derive(Debug, Parser)]
#[command(name = "microvm", version, max_term_width = 100)]
pub struct Args {
    /// Size of guest RAM, with suffix K, M or G. Half of it, at most 3G, is below the 32-bit hole
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub mem: u64,

    /// Host memory for guest RAM: anon, memfd, hugetlb (2 MiB pages), or file:PATH (created if it
    /// does not exist)
    #[arg(long, value_name = "KIND", default_value = "anon")]
    pub backing: Backing,

    /// Populate all of guest RAM before the guest starts
    #[arg(long)]
    pub prefault: bool,

    /// Raw disk image. The guest gets a temporary copy [default: a temporary image]
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,

    /// Let the guest write to the image itself. The built-in guest overwrites its second 512 KiB
    #[arg(long, requires = "disk")]
    pub disk_write: bool,

    /// Boot a kernel instead of the built-in guest: an ELF file with a PVH note, or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// Command line of the kernel. The virtio device is appended to it
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = DEFAULT_CMDLINE)]
    pub cmdline: String,

    /// KVM device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    pub kvm: String,

    /// Format of the report
    #[arg(long, value_enum, default_value = "text")]
    pub format: Format,
}

/// The format of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Text for a terminal, after the guest's output.
    Text,
    /// One JSON object, which contains the guest's output.
    Json,
}

const DEFAULT_CMDLINE: &str = "console=ttyS0 earlyprintk=ttyS0 reboot=t panic=-1 acpi=off pci=off";

/// Parses a size of RAM: digits and one of the suffixes K, M, G (powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let suffixes = [('K', 10), ('M', 20), ('G', 30)];
    let split = |(suffix, shift)| Some((upper.strip_suffix(suffix)?, shift));
    let (digits, shift) = suffixes.into_iter().find_map(split).unwrap_or((&upper, 0));
    let number = digits.parse().ok().filter(|_| !digits.starts_with('+'));
    let size = number.and_then(|number: u64| number.checked_mul(1 << shift));
    let size = size.ok_or("expected a size such as 256M")?;
    if !SIZES.contains(&size) || !size.is_multiple_of(PAGE) {
        let [least, most] = [SIZES.start(), SIZES.end()].map(|size| human(*size));
        return Err(format!(
            "expected a multiple of {PAGE} from {least} to {most}"
        ));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_size_with_and_without_suffix_succeeds() {
        for (text, size) in [
            ("256M", 256 << 20),
            ("256m", 256 << 20),
            ("1G", 1 << 30),
            ("20480K", 20 << 20),
            ("33554432", 32 << 20),
        ] {
            assert_eq!(parse_size(text), Ok(size));
        }
    }

    #[test]
    fn parse_size_of_invalid_text_returns_error() {
        let junk = [
            "", "M", "-1M", "+1M", "256MM", "256MB", "0x100M", "1.5G", " 256M", "256T", "é",
        ];
        let out_of_range = [
            "0",
            "1",
            "15M",
            "65G",
            "99999999999999999999G",
            "17179869183G",
        ];
        for text in junk.iter().chain(&out_of_range).chain(&["16777217"]) {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
