//! The report, in 80 columns.

use std::fmt::Write as _;
use std::time::Duration;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::args::human;
use crate::bus::{Bus, VIRTIO_MMIO, VIRTIO_MMIO_LEN};
use crate::iommu::{DeviceRam, Mapper};
use crate::memory::{self, GuestRam, PAGE};
use crate::pages::PageMap;
use crate::plug::{PLUG_MMIO, PLUG_MMIO_LEN};
use crate::prefault::Prefaulted;
use crate::verify::{Check, Dirty};

/// Cells of a strip.
const CELLS: u64 = 64;

/// What there is to report of a run.
#[derive(Debug)]
pub struct Report<'a> {
    /// Guest memory.
    pub ram: &'a GuestRam,
    /// What was brought in before the start, if that was asked for.
    pub prefaulted: Option<Prefaulted>,
    /// What lies where in it: guest address, length, name.
    pub places: &'a [(u64, u64, &'static str)],
    /// The devices, and what they counted.
    pub bus: &'a Bus<DeviceRam>,
    /// Dirty pages.
    pub dirty: &'a Dirty,
    /// Whether a vCPU ran, or a thread.
    pub on_kvm: bool,
    /// The driver's side of the IOMMU, if there was one.
    pub mapper: Option<&'a Mapper>,
    /// Pages that microvm wrote before the start.
    pub loaded: u64,
    /// How long the guest ran.
    pub took: Duration,
    /// What was compared.
    pub checks: &'a [Check],
}

impl Report<'_> {
    /// Whether everything agrees.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.wrong.is_none())
    }

    /// The whole report.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = self.memory_map(&mut out);
        let _ = self.host_memory(&mut out);
        let _ = self.plugged(&mut out);
        let _ = self.exits(&mut out);
        let _ = self.requests(&mut out);
        let _ = self.iommu(&mut out);
        let _ = self.dirty_pages(&mut out);
        let _ = self.verdict(&mut out);
        out
    }

    fn memory_map(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "\nGuest memory")?;
        let mut top: Vec<(u64, u64, &str)> = self
            .ram
            .iter()
            .map(|r| (r.start_addr().0, r.len(), "System RAM"))
            .collect();
        if self.bus.block.is_some() {
            top.push((VIRTIO_MMIO, VIRTIO_MMIO_LEN, "virtio-mmio block device"));
        }
        if let Some(plug) = &self.bus.plug {
            let place = plug.place();
            top.push((PLUG_MMIO, PLUG_MMIO_LEN, "memory device"));
            top.push((place.start, place.size, "came and went"));
        }
        top.sort_unstable();
        for (start, len, name) in top {
            let end = start + (len - 1);
            writeln!(out, "  {start:08x}-{end:08x} : {name}")?;
            for &(at, len, name) in self.places {
                // A place is within one of these, or is one of these.
                if at >= start && at <= end && ![VIRTIO_MMIO, PLUG_MMIO].contains(&at) {
                    writeln!(out, "    {at:08x}-{:08x} : {name}", at + (len - 1))?;
                }
            }
        }
        Ok(())
    }

    /// What is behind guest memory on this machine, and how much of it is there.
    fn host_memory(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "\nHost memory")?;
        let (regions, takes) = (memory::described(self.ram), memory::residency(self.ram));
        let takes = match takes {
            Ok(takes) => takes,
            Err(why) => return writeln!(out, "  {why}"),
        };
        for (region, takes) in regions.iter().zip(takes) {
            out.push_str(&wrapped(&region.to_string()));
            let (resident, mapped) = (human(takes.resident), human(takes.mapped));
            write!(out, "    {resident} in memory, {mapped} mapped here")?;
            if takes.huge > 0 {
                write!(out, ", {} in huge pages", human(takes.huge))?;
            }
            writeln!(out)?;
        }
        match &self.prefaulted {
            Some(prefaulted) => writeln!(out, "  {}", prefaulted.describe()),
            None => Ok(()),
        }
    }

    /// Memory that came while the guest ran, and went.
    fn plugged(&self, out: &mut String) -> std::fmt::Result {
        let Some(plug) = &self.bus.plug else {
            return Ok(());
        };
        let story = &plug.story;
        writeln!(out, "\nPlugged memory")?;
        out.push_str(&wrapped(&story.described));
        let [most, fewer] = story.resident.map(human);
        let [before, during, after] = story.process.map(human);
        let none = |bytes: u64| match bytes {
            0 => "none".to_owned(),
            bytes => human(bytes),
        };
        let rows = [
            ("before", none(0), before),
            ("with half of its blocks", most, during),
            ("with a quarter", fewer, String::new()),
            ("after", none(0), after),
        ];
        writeln!(
            out,
            "  {:<24}{:>11}{:>11}",
            "in memory", "region", "process"
        )?;
        for (when, region, process) in rows {
            writeln!(
                out,
                "{}",
                format!("  {when:<24}{region:>11}{process:>11}").trim_end()
            )?;
        }
        let us = story.waited.as_micros();
        writeln!(out, "  nobody read the old map after {us} us")
    }

    fn exits(&self, out: &mut String) -> std::fmt::Result {
        let exits = &self.bus.exits;
        let what = if self.on_kvm {
            "Exits"
        } else {
            "Device accesses"
        };
        let ms = self.took.as_secs_f64() * 1e3;
        writeln!(out, "\n{what}: {} in {ms:.1} ms", exits.total())?;
        let kicks = self.bus.block.as_ref().map_or(0, |b| b.kicks);
        for (name, count) in exits.rows().into_iter().filter(|row| row.1 > 0) {
            let note = if name == "virtio-mmio, write" && kicks > 0 {
                format!("  ({kicks} of them notify the queue)")
            } else {
                String::new()
            };
            writeln!(out, "  {name:<24}{count:>8}{note}")?;
        }
        Ok(())
    }

    fn requests(&self, out: &mut String) -> std::fmt::Result {
        let Some(block) = &self.bus.block else {
            return Ok(());
        };
        let counts = &block.block.counts;
        writeln!(out, "\nBlock device: {} requests", counts.total())?;
        match block.block.ring().map(|ring| ring.counts) {
            Some(ring) => writeln!(
                out,
                "  by io_uring: {} operations, {} at a time at most, {} went on",
                ring.operations, ring.most, ring.short
            )?,
            None => writeln!(out, "  {}, one after the other", block.block.way())?,
        }
        for (name, count, bytes, way) in [
            (
                "read",
                counts.reads,
                Some(counts.bytes_read),
                "file to guest memory",
            ),
            (
                "write",
                counts.writes,
                Some(counts.bytes_written),
                "guest memory to file",
            ),
            ("flush", counts.flushes, None, ""),
            ("identify", counts.ids, None, ""),
            ("refused", counts.refused, None, ""),
            ("malformed", counts.malformed, None, ""),
        ] {
            match bytes {
                _ if count == 0 => {}
                Some(bytes) => {
                    let bytes = human(bytes);
                    writeln!(out, "  {name:<24}{count:>8}  {bytes:>9}, {way}")?;
                }
                None => writeln!(out, "  {name:<24}{count:>8}")?,
            }
        }
        for why in counts.reasons.iter().chain(&block.broken) {
            writeln!(out, "    - {why}")?;
        }
        Ok(())
    }

    fn iommu(&self, out: &mut String) -> std::fmt::Result {
        let (Some(mapper), Some(block)) = (self.mapper, &self.bus.block) else {
            return Ok(());
        };
        let counters = block.mem().iommu().counters();
        let counts = mapper.counts;
        writeln!(out, "\nIOMMU: {} mappings left", counters.entries)?;
        for (name, count) in [
            ("pages mapped", counts.mapped + mapper.kept),
            ("mapped in flight", counts.in_flight),
            ("pages unmapped", counts.unmapped),
            ("lookups, found", counters.hits),
            ("lookups, not found", counters.misses),
        ] {
            writeln!(out, "  {name:<24}{count:>8}")?;
        }
        Ok(())
    }

    fn dirty_pages(&self, out: &mut String) -> std::fmt::Result {
        let Dirty { device, driver } = self.dirty;
        let merged = device.union(driver);
        let all = merged.all();
        let (who, log, letter) = if self.on_kvm {
            ("vCPU", "KVM's dirty log", 'v')
        } else {
            ("driver thread", "the bitmap of its own mapping", 't')
        };
        writeln!(
            out,
            "\nDirty pages: {} of {all}, {} before the start",
            merged.count(),
            self.loaded
        )?;
        writeln!(
            out,
            "  {:<24}{:>8}  from the bitmap of guest memory",
            "device",
            device.count()
        )?;
        writeln!(out, "  {who:<24}{:>8}  from {log}", driver.count())?;
        writeln!(out, "  {:<24}{:>8}", "both", device.both(driver).count())?;
        let bytes = human(merged.count() * PAGE);
        writeln!(
            out,
            "  {:<24}{:>8}  {bytes} for a migration to send",
            "merged",
            merged.count()
        )?;
        let mut cells: Vec<String> = self
            .ram
            .iter()
            .map(|r| human(r.len() / CELLS.min(r.len() / PAGE).max(1)))
            .collect();
        cells.dedup();
        let cells = cells.join(" and ");
        writeln!(
            out,
            "\n  . clean   d device   {letter} {who}   # both   (a cell is {cells})"
        )?;
        out.push_str(&strips(device, driver, letter));
        Ok(())
    }

    fn verdict(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "\nChecks")?;
        for check in self.checks {
            match &check.wrong {
                None => writeln!(out, "  ok     {}", check.what)?,
                Some(wrong) => {
                    writeln!(out, "  WRONG  {}", check.what)?;
                    writeln!(out, "         {wrong}")?;
                }
            }
        }
        let bad = self
            .checks
            .iter()
            .filter(|check| check.wrong.is_some())
            .count();
        match bad {
            0 => writeln!(out, "\nEverything agrees."),
            bad => writeln!(out, "\n{bad} of {} checks FAILED.", self.checks.len()),
        }
    }
}

/// Text of a description, on lines of 80 columns at most.
fn wrapped(text: &str) -> String {
    let (mut out, mut line) = (String::new(), "  ".to_owned());
    for (nth, part) in text.split(", ").enumerate() {
        if nth > 0 && line.chars().count() + part.chars().count() > 76 {
            let _ = writeln!(out, "{line},");
            line = "      ".to_owned();
        } else if nth > 0 {
            line.push_str(", ");
        }
        line.push_str(part);
    }
    let _ = writeln!(out, "{line}");
    out
}

/// A line for each region: what was dirtied where.
fn strips(device: &PageMap, driver: &PageMap, letter: char) -> String {
    let mut out = String::new();
    for ((start, device), (_, driver)) in device.strips(CELLS).into_iter().zip(driver.strips(CELLS))
    {
        let cells: String = device
            .iter()
            .zip(&driver)
            .map(|cell| match cell {
                (false, false) => '.',
                (true, false) => 'd',
                (false, true) => letter,
                (true, true) => '#',
            })
            .collect();
        let label = format!("  {start:>9x} ");
        let _ = writeln!(out, "{label}|{cells}|");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_goes_on_in_the_next() {
        assert_eq!(wrapped("short, and this"), "  short, and this\n");
        let [a, b] = ["a".repeat(40), "b".repeat(40)];
        assert_eq!(
            wrapped(&format!("{a}, {b}, c")),
            format!("  {a},\n      {b}, c\n")
        );
    }

    #[test]
    fn a_strip_shows_who_wrote_where() {
        let layout = [(0, 64 * 4 * PAGE), (1 << 32, 3 * PAGE)];
        let (mut device, mut driver) =
            (PageMap::with_layout(&layout), PageMap::with_layout(&layout));
        device.add(0, 1);
        driver.add(5 * PAGE, 1);
        device.add(8 * PAGE, PAGE);
        driver.add(11 * PAGE, PAGE);
        device.add((1 << 32) + 2 * PAGE, 1);
        let text = strips(&device, &driver, 'v');
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], format!("          0 |dv#{}|", ".".repeat(61)));
        assert_eq!(lines[1], "  100000000 |..d|");
        assert!(lines.iter().all(|line| line.len() <= 80));
    }
}
