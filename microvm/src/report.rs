//! The report of a run: one screen of text, or JSON.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use serde::Serialize;
use vm_memory::GuestMemoryBackend;
use vm_memory_host::{provisioned, residency};

use crate::block::Counts;
use crate::bus::Exits;
use crate::dirty::DirtyBySource;
use crate::memory::{GuestRam, PAGE};
use crate::virtio_mmio::{VIRTIO_MMIO, VIRTIO_MMIO_LEN};

/// The number of cells in the map of a region's dirty pages.
const CELLS: u64 = 64;

/// One check of the outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The expectation.
    pub name: String,
    /// Whether the outcome meets it.
    pub passed: bool,
}

impl Check {
    /// Creates a check.
    pub fn new(name: impl Into<String>, passed: bool) -> Self {
        Self {
            name: name.into(),
            passed,
        }
    }
}

/// A RAM region.
#[derive(Clone, Debug, Serialize)]
pub struct RamRegion {
    /// The first guest address.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
    /// The host memory that backs it.
    pub host: String,
    /// The number of bytes that are populated after the run.
    pub resident: u64,
}

/// The report of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The RAM regions.
    pub memory: Vec<RamRegion>,
    /// The guest's output.
    pub console: String,
    /// The duration of the run.
    pub duration: Duration,
    /// The accesses that left the guest.
    pub exits: Exits,
    /// The notifications of the virtqueue.
    pub notifications: u64,
    /// The requests to the block device.
    pub requests: Counts,
    /// The dirty pages.
    pub dirty: DirtyBySource,
    /// The checks.
    pub checks: Vec<Check>,
}

impl Report {
    /// Returns whether every check passed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed)
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (exits, requests, dirty) = (&self.exits, &self.requests, &self.dirty);
        writeln!(f, "\nGuest physical address space")?;
        for ram in &self.memory {
            let resident = human(ram.resident);
            let name = format!("RAM, {}, {resident} populated", ram.host);
            range(f, ram.start, ram.len, &name)?;
        }
        range(f, VIRTIO_MMIO, VIRTIO_MMIO_LEN, "virtio-mmio block device")?;

        let ms = self.duration.as_secs_f64() * 1e3;
        writeln!(f, "\nExits in {ms:.1} ms")?;
        row(f, "serial port", exits.serial, "")?;
        row(f, "device registers, read", exits.mmio_read, "")?;
        let note = format!("{} notify the queue", self.notifications);
        row(f, "device registers, write", exits.mmio_write, &note)?;
        row(f, "no device", exits.unassigned, "")?;

        writeln!(f, "\nBlock device: {} requests", requests.total())?;
        let [read, written] = [requests.bytes_read, requests.bytes_written].map(human);
        row(f, "read", requests.reads, &format!("{read} to RAM"))?;
        row(f, "write", requests.writes, &format!("{written} from RAM"))?;
        row(f, "flush", requests.flushes, "")?;
        row(f, "refused", requests.refused, &requests.reasons.join("; "))?;
        row(f, "malformed", requests.malformed, "")?;

        let sets = [&dirty.device, &dirty.vcpu, &dirty.merged];
        let [device, vcpu, merged] = sets.map(|pages| pages.len() as u64);
        let total: u64 = self.memory.iter().map(|ram| ram.len / PAGE).sum();
        let bytes = format!("{} for a migration to send", human(merged * PAGE));
        writeln!(f, "\nDirty pages: {merged} of {total}")?;
        row(f, "device (d)", device, "from the bitmaps of vm-memory")?;
        row(f, "vCPU (v)", vcpu, "from KVM's log")?;
        row(f, "both (#)", device + vcpu - merged, "")?;
        row(f, "merged", merged, &bytes)?;
        for ram in &self.memory {
            let map = map(dirty, ram.start, ram.len);
            writeln!(f, "  {:9x} |{map}|", ram.start)?;
        }

        writeln!(f, "\nChecks")?;
        for Check { name, passed } in &self.checks {
            writeln!(f, "  {:<6}  {name}", if *passed { "ok" } else { "FAILED" })?;
        }
        Ok(())
    }
}

/// Writes a range of guest addresses.
fn range(f: &mut Formatter<'_>, start: u64, len: u64, name: &str) -> fmt::Result {
    writeln!(f, "  {start:09x}-{:09x} : {name}", start + len - 1)
}

/// Writes a row, unless its count is 0.
fn row(f: &mut Formatter<'_>, name: &str, count: u64, note: &str) -> fmt::Result {
    match (count, note) {
        (0, _) => Ok(()),
        (_, "") => writeln!(f, "  {name:<24}{count:>8}"),
        _ => writeln!(f, "  {name:<24}{count:>8}  {note}"),
    }
}

/// Describes the RAM regions.
pub fn memory(ram: &GuestRam) -> Vec<RamRegion> {
    let usage = residency(ram).unwrap_or_default();
    let described = ram
        .iter()
        .zip(usage)
        .map(|(region, (span, now))| RamRegion {
            start: span.start,
            len: span.size,
            host: provisioned(region)
                .map_or_else(|e| e.to_string(), |host| host.kind().to_string()),
            resident: now.resident,
        });
    described.collect()
}

/// Draws the dirty pages of a region: one cell for each 64th part of it.
fn map(dirty: &DirtyBySource, start: u64, len: u64) -> String {
    let cell = |n: u64| {
        let part = start + n * len / CELLS..start + (n + 1) * len / CELLS;
        match [&dirty.device, &dirty.vcpu].map(|pages| pages.range(part.clone()).next().is_some()) {
            [false, false] => '.',
            [true, false] => 'd',
            [false, true] => 'v',
            [true, true] => '#',
        }
    };
    (0..CELLS).map(cell).collect()
}

/// Formats a number of bytes: `256 MiB`, `2.5 KiB`, `17 bytes`.
pub fn human(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >> shift != 0 {
            let number = format!("{:.1}", bytes as f64 / (1u64 << shift) as f64);
            return format!("{} {unit}", number.trim_end_matches(".0"));
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn human_formats_whole_and_fractional_units() {
        assert_eq!(human(0), "0 bytes");
        assert_eq!(human(2560), "2.5 KiB");
        assert_eq!(human(256 << 20), "256 MiB");
        assert_eq!(human(u64::MAX), "17179869184 GiB");
    }

    #[test]
    fn map_shows_writer_of_each_part() {
        let (device, vcpu) = ([0, 8 * PAGE].into(), [5 * PAGE, 11 * PAGE].into());
        let merged = Default::default();
        let dirty = DirtyBySource {
            device,
            vcpu,
            merged,
        };
        let drawn = map(&dirty, 0, 64 * 4 * PAGE);
        assert_eq!(drawn, format!("dv#{}", ".".repeat(61)));
    }
}
