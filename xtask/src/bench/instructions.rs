//! `cargo xtask bench --instructions`: the instructions of the hottest operations, counted by
//! callgrind and compared with `bench/instructions.tsv`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};

use super::{Args, Bench};

/// The numbers of runs of an operation under callgrind. The difference of the two counts excludes
/// the set-up.
const FEW: u64 = 1_000;
const MANY: u64 = 11_000;

/// The factor by which a count may exceed its pin. Versions of glibc and the compiler differ by a
/// few instructions.
const TOLERANCE: f64 = 1.02;

/// The operations that devices do for each request.
const HOT: [&str; 21] = [
    "find_region, n=64",
    "get_slice64, n=1",
    "read_obj.u16, n=1",
    "read_obj.u64, n=1",
    "read_obj.s16, n=1",
    "write_obj.u64, n=1",
    "write_obj.u64, n=1, AtomicBitmap",
    "load.u16, n=1",
    "store.u64, n=1",
    "read_slice, 64, n=1",
    "write_slice, 04K, n=1",
    "read_slice_cross, 16, n=64",
    "vectored: 64 KiB over eight regions, against preadv(2)",
    "VolatileSlice::copy_to, u32, 4096B",
    "virtio-queue 0.18: add_used, n=1",
    "Window: add_used",
    "mark_dirty, 1B, already",
    "GuestMemoryReader: memory()",
    "Iotlb::lookup of 8 B hit, n=10000, fragmented",
    "IommuMemory: read_obj.u64 behind an RwLock, n=1, fragmented",
    "IommuMemory: read_obj.u64 behind a SharedIotlb, n=10000",
];

impl Bench {
    /// Counts the instructions of the hottest operations, and compares or pins them.
    pub(super) fn instructions(&self, args: &Args) -> Result<bool> {
        let asked = Command::new("valgrind").arg("--version").output();
        if !asked.is_ok_and(|output| output.status.success()) {
            println!("SKIPPED: instruction counts: valgrind is not installed");
            return Ok(true);
        }
        let file = self.folder.join("instructions.tsv");
        let mut pins = match fs::read_to_string(&file) {
            Ok(text) => pins(&text)
                .with_context(|| format!("{} is not a file that --pin wrote", file.display()))?,
            Err(_) if args.pin => Pins::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", file.display()))
            }
        };
        let mut more = 0u32;
        println!(
            "{:<8} {:<60} {:>9} {:>9}",
            "build", "operation", "counted", "pinned"
        );
        for build in args.builds() {
            let program = self.build(build)?;
            for operation in HOT {
                let counted = self.count(&program, operation)?;
                let key = (build.name().to_owned(), operation.to_owned());
                let pinned = pins.get(&key).copied();
                let verdict = verdict(counted, pinned);
                let pinned = pinned.map_or_else(|| "–".to_owned(), |pinned| format!("{pinned:.1}"));
                println!(
                    "{:<8} {operation:<60} {counted:>9.1} {pinned:>9} {verdict}",
                    build.name()
                );
                if verdict == MORE || verdict == NOT_PINNED {
                    more = more.saturating_add(1);
                }
                if args.pin {
                    pins.insert(key, counted);
                }
            }
        }
        if args.pin {
            fs::write(&file, pins_text(&pins))
                .with_context(|| format!("cannot write {}", file.display()))?;
            println!("written: {}", file.display());
            return Ok(true);
        }
        if more > 0 {
            println!("{more} operations take more instructions than pinned, or have no pin");
        }
        Ok(more == 0)
    }

    /// Returns the instructions of one run of an operation.
    fn count(&self, program: &Path, operation: &str) -> Result<f64> {
        let few = self.callgrind(program, operation, FEW)?;
        let many = self.callgrind(program, operation, MANY)?;
        let difference = u32::try_from(
            many.checked_sub(few)
                .context("more runs take fewer instructions")?,
        )
        .context("more than 2^32 instructions")?;
        let runs = u32::try_from(MANY.saturating_sub(FEW))?;
        Ok(f64::from(difference) / f64::from(runs))
    }

    /// Returns the instructions of the whole program with `iterations` runs of an operation.
    fn callgrind(&self, program: &Path, operation: &str, iterations: u64) -> Result<u64> {
        let profile = self.target.join("callgrind.out");
        let output = Command::new("valgrind")
            .arg("--tool=callgrind")
            .arg(format!("--callgrind-out-file={}", profile.display()))
            .arg(program)
            .args([
                "--count",
                operation,
                "--iterations",
                &iterations.to_string(),
            ])
            .output()
            .context("cannot start valgrind")?;
        ensure!(
            output.status.success(),
            "{operation}: valgrind ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let text = fs::read_to_string(&profile)?;
        total(&text).with_context(|| format!("{} has no total", profile.display()))
    }
}

const MORE: &str = "MORE";
const NOT_PINNED: &str = "NOT PINNED";

fn verdict(counted: f64, pinned: Option<f64>) -> &'static str {
    match pinned {
        None => NOT_PINNED,
        Some(pinned) if counted > pinned * TOLERANCE + 0.5 => MORE,
        Some(pinned) if counted < pinned / TOLERANCE - 0.5 => "fewer: pin it",
        Some(_) => "",
    }
}

/// Returns the total of a profile that callgrind wrote.
fn total(profile: &str) -> Option<u64> {
    profile
        .lines()
        .find_map(|line| {
            line.strip_prefix("summary:")
                .or_else(|| line.strip_prefix("totals:"))
        })
        .and_then(|total| total.trim().parse().ok())
}

/// The instructions of each operation in each build.
type Pins = BTreeMap<(String, String), f64>;

fn pins(text: &str) -> Result<Pins> {
    let mut pins = Pins::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut fields = line.split('\t');
        let (Some(build), Some(operation), Some(count), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            bail!("'{line}' does not have three fields");
        };
        let count = count
            .parse()
            .with_context(|| format!("'{count}' is not a number"))?;
        pins.insert((build.to_owned(), operation.to_owned()), count);
    }
    Ok(pins)
}

fn pins_text(pins: &Pins) -> String {
    let mut text = String::from(
        "# Instructions of one operation, counted by `cargo xtask bench --instructions --pin` (rustc 1.95, x86_64).\n",
    );
    for ((build, operation), count) in pins {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{build}\t{operation}\t{count:.1}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{pins, pins_text, total, verdict, MORE, NOT_PINNED};

    #[test]
    fn pins_are_read_as_written() {
        let text = "# head\nfat\tread, n=1\t41.0\nsize\tread, n=1\t44.5\n";
        let read = pins(text).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(pins(&pins_text(&read)).unwrap(), read);
        assert!(pins("fat\tread\n").is_err());
        assert!(pins("fat\tread\tmany\n").is_err());
    }

    #[test]
    fn verdict_above_tolerance_is_more() {
        assert_eq!(verdict(41.0, Some(41.0)), "");
        assert_eq!(verdict(43.0, Some(41.0)), MORE);
        assert_eq!(verdict(30.0, Some(41.0)), "fewer: pin it");
        assert_eq!(verdict(30.0, None), NOT_PINNED);
    }

    #[test]
    fn total_of_profile_returns_the_sum() {
        assert_eq!(total("version: 1\nsummary: 1234\n"), Some(1234));
        assert_eq!(total("fn=x\ntotals: 99\n"), Some(99));
        assert_eq!(total("fn=x\n"), None);
    }
}
