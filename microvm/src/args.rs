//! The command line.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::Parser;

use crate::error::Error;
use crate::memory::{Backing, MAX_MEM, MIN_MEM, PAGE};
use crate::uring::DiskIo;

/// A small virtual machine monitor that shows guest memory at work.
///
/// Without options it maps guest RAM on both sides of the 32-bit hole, starts a built-in 64-bit
/// guest on /dev/kvm, serves its virtio block device from a temporary image, and at the end compares
/// every page, sector and count with what they must be.
#[derive(Debug, Parser)]
#[command(name = "microvm", version, after_help = AFTER_HELP, max_term_width = 80)]
pub struct Args {
    /// Guest RAM, with suffix K, M or G; half of it (at most 3G) lies below the 32-bit hole
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub mem: String,

    /// What guest RAM is kept in: memfd, anon, hugetlb (pages of 2 MiB, of which --mem takes 128 for 256M and --plug 8 more) or file:PATH, which is mapped shared and made if it is not there
    /// [default: anon on KVM, memfd for the driver thread, which needs a second mapping]
    #[arg(long, value_name = "KIND", value_parser = Backing::parse)]
    pub backing: Option<Backing>,

    /// Bring all of guest RAM in before the guest starts
    #[arg(long)]
    pub prefault: bool,

    /// Let 16M of memory come while the guest runs, of which it uses half, and go again
    #[arg(long, conflicts_with = "kernel")]
    pub plug: bool,

    /// How the disk is read and written; io_uring takes all requests of a notification together
    #[arg(
        long,
        value_name = "HOW",
        default_value = "sync",
        conflicts_with = "chaos"
    )]
    pub disk_io: DiskIo,

    /// Disk image of the guest; unchanged unless --disk-write is given [default: a temporary one]
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,

    /// Let the guest write to FILE itself. The built-in guest overwrites its last 64 KiB
    #[arg(long, requires = "disk")]
    pub disk_write: bool,

    /// Run the driver as a thread on the same memory and device, without /dev/kvm
    #[arg(long, conflicts_with = "kernel")]
    pub no_kvm: bool,

    /// Cut the end of the disk image and of a third region off, and grow them again, while the guest runs
    #[arg(long, conflicts_with_all = ["kernel", "disk"])]
    pub chaos: bool,

    /// What --chaos draws its lengths and pauses from [default: the clock]
    #[arg(long, value_name = "N", requires = "chaos")]
    pub seed: Option<u64>,

    /// Put the disk behind an IOMMU, whose mappings the driver changes while requests are in flight; implies --no-kvm
    #[arg(long, conflicts_with_all = ["kernel", "chaos"])]
    pub iommu: bool,

    /// The KVM device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    pub kvm: String,

    /// Boot this kernel instead: an ELF file with a PVH entry, or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk for the kernel
    #[arg(
        long,
        value_name = "FILE",
        requires = "kernel",
        conflicts_with = "no_kvm"
    )]
    pub initrd: Option<PathBuf>,

    /// Command line for the kernel; with --disk, the virtio device is appended to it
    #[arg(long, value_name = "TEXT", requires = "kernel", conflicts_with = "no_kvm", default_value = DEFAULT_CMDLINE)]
    pub cmdline: String,
}

/// A console on the serial port, and an exit instead of a hang when the kernel stops.
const DEFAULT_CMDLINE: &str = "console=ttyS0 earlyprintk=ttyS0 reboot=t panic=-1 acpi=off pci=off";

const AFTER_HELP: &str = "\
Without --disk-write a disk FILE is only read: what the guest writes goes to a temporary overlay \
that is dropped at the end.

With --kernel the serial port is the terminal (input line by line, Ctrl-C ends microvm); a reset, \
or a byte written to port 0xf4, ends the run.

Exit status: 0 if everything agrees; 1 if a page, sector or count is wrong or the guest failed; 2 \
if microvm could not start.";

impl Args {
    /// Parses the process's arguments. `Ok(None)` when help or the version was asked for and
    /// printed.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`], with clap's message folded into one line.
    pub fn from_command_line() -> Result<Option<Self>, Error> {
        match Self::try_parse() {
            Ok(args) => Ok(Some(args)),
            Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
                // A closed pipe behind `microvm --help | head -1` is nobody's error.
                let _ = e.print();
                Ok(None)
            }
            Err(e) => Err(Error::Usage(one_line(&e.to_string()))),
        }
    }
}

/// The first paragraph of clap's message, on one line.
fn one_line(message: &str) -> String {
    let first = message.split("\n\n").next().unwrap_or(message);
    let words: Vec<&str> = first.split_whitespace().collect();
    let line = words.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

/// Parses `--mem`: digits and one of the suffixes K, M, G (powers of 1024), within what the
/// machine can have.
///
/// # Errors
///
/// [`Error::MemSize`] for text that is no size, a size that is no multiple of a page, and one that
/// is too small or too large.
pub fn parse_mem(given: &str) -> Result<u64, Error> {
    let fail = |why: String| Error::MemSize {
        given: given.to_owned(),
        why,
    };
    let (digits, unit) = match given.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let unit = match suffix.to_ascii_uppercase() {
                'K' => 1 << 10,
                'M' => 1 << 20,
                'G' => 1 << 30,
                _ => return Err(fail(format!("unknown suffix {suffix:?}"))),
            };
            (&given[..at], unit)
        }
        _ => (given, 1),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(fail("not a size".to_owned()));
    }
    let size = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    let Some(size) = size.filter(|&size| size <= MAX_MEM) else {
        return Err(fail(format!("too large, {} is the most", human(MAX_MEM))));
    };
    if size < MIN_MEM {
        return Err(fail(format!(
            "too small, the guest needs at least {}",
            human(MIN_MEM)
        )));
    }
    if size % PAGE != 0 {
        return Err(fail(format!(
            "{size} bytes is not a multiple of the page size {PAGE}"
        )));
    }
    Ok(size)
}

/// A size as a reader would write it: `256 MiB`, `2.5 KiB`, `17 bytes`.
pub fn human(bytes: u64) -> String {
    let (shift, unit) = match bytes {
        n if n >= 1 << 30 => (30, "GiB"),
        n if n >= 1 << 20 => (20, "MiB"),
        n if n >= 1 << 10 => (10, "KiB"),
        n => return format!("{n} byte{}", if n == 1 { "" } else { "s" }),
    };
    let whole = bytes >> shift;
    // Ten times the fraction is below 10 * 2^30 and fits.
    let tenths = ((bytes & ((1 << shift) - 1)) * 10) >> shift;
    if tenths == 0 {
        format!("{whole} {unit}")
    } else {
        format!("{whole}.{tenths} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_suffix() {
        assert_eq!(parse_mem("256M").unwrap(), 256 << 20);
        assert_eq!(parse_mem("256m").unwrap(), 256 << 20);
        assert_eq!(parse_mem("1G").unwrap(), 1 << 30);
        assert_eq!(parse_mem("20480K").unwrap(), 20 << 20);
        assert_eq!(parse_mem("33554432").unwrap(), 32 << 20);
    }

    #[test]
    fn sizes_that_are_none() {
        let junk = [
            "", "M", "-1M", "+1M", "256MB", "0x100M", "1.5G", " 256M", "256T", "25é", "é",
        ];
        let out_of_range = [
            "0",
            "0G",
            "1",
            "15M",
            "65G",
            "99999999999999999999G",
            "18446744073709551615",
        ];
        for given in junk.iter().chain(&out_of_range).chain(&["16777217"]) {
            let e = parse_mem(given).unwrap_err().to_string();
            assert!(e.starts_with(&format!("--mem {given}: ")), "{e}");
            assert!(!e.contains('\n'), "{e}");
        }
    }

    #[test]
    fn human_sizes() {
        assert_eq!(human(0), "0 bytes");
        assert_eq!(human(1), "1 byte");
        assert_eq!(human(2560), "2.5 KiB");
        assert_eq!(human(256 << 20), "256 MiB");
        assert_eq!(human(u64::MAX), "17179869183.9 GiB");
    }

    #[test]
    fn usage_errors_are_one_line() {
        for args in [
            &["microvm", "--nonsense"][..],
            &["microvm", "--kernel", "x", "--no-kvm"],
        ] {
            let e = Args::try_parse_from(args).unwrap_err();
            let line = one_line(&e.to_string());
            assert!(!line.contains('\n') && !line.starts_with("error"), "{line}");
        }
    }
}
