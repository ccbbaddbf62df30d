//! The end of a run: is every page, sector and count what it must be?

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vm_memory_host::{BackingDescription, BackingKind};

use crate::args::human;
use crate::bus::Bus;
use crate::iommu::{DeviceRam, Mapper};
use crate::memory::{self, Backing, GuestRam, Source, PAGE};
use crate::pages::PageMap;
use crate::plan::{
    mix, result, step, step_name, Plan, CHUNK_SECTORS, HALF, PLUG_ACCESSES, RESULTS, SECTOR, SLOTS,
};
use crate::plug::Plug;
use crate::prefault::Prefaulted;

/// One comparison.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was compared.
    pub what: String,
    /// What is wrong; nothing if it agrees.
    pub wrong: Option<String>,
}

impl Check {
    fn new(what: impl Into<String>, wrong: Option<String>) -> Self {
        Self {
            what: what.into(),
            wrong,
        }
    }
}

/// The pages that were dirtied in a run, each side from its own log.
#[derive(Clone, Debug)]
pub struct Dirty {
    /// By the device: the bitmap of guest memory.
    pub device: PageMap,
    /// By the vCPU (KVM's log) or the driver thread (the bitmap of its own mapping).
    pub driver: PageMap,
}

impl Dirty {
    /// Takes the device's side from `ram`.
    pub fn new(ram: &GuestRam, driver: PageMap) -> Self {
        Self {
            device: memory::harvest(ram),
            driver,
        }
    }

    /// Adds the pages of memory that came and went.
    pub fn with_plug(self, plug: Option<&Plug>) -> Self {
        match plug {
            Some(plug) => Self {
                device: plug.story.device.union(&self.device),
                driver: plug.story.guest.union(&self.driver),
            },
            None => self,
        }
    }
}

/// A guest that ran to its end.
pub fn ended(bus: &Bus<DeviceRam>, failed: Option<String>) -> Check {
    let wrong = match (failed, bus.ended) {
        (Some(why), _) => Some(why),
        (None, Some(0)) => None,
        (None, Some(code)) => Some(format!("the guest's exit code is {code}")),
        (None, None) => Some("the guest never ended the run".to_owned()),
    };
    Check::new("the guest ended the run itself, with code 0", wrong)
}

/// The pages of the device: those that the requests it saw make it write, and no others.
pub fn device_pages(bus: &Bus<DeviceRam>, dirty: &Dirty) -> Option<Check> {
    let block = &bus.block.as_ref()?.block;
    let allowed = block.dirtied.union(&block.maybe_dirtied);
    let missing = block.dirtied.minus(&dirty.device);
    let extra = dirty.device.minus(&allowed);
    let what = format!(
        "the device dirtied the {} pages of its requests, no others",
        block.dirtied.count()
    );
    Some(Check::new(what, pages_wrong(&missing, &extra)))
}

fn pages_wrong(missing: &PageMap, extra: &PageMap) -> Option<String> {
    let list = |pages: &PageMap, how: &str| {
        pages
            .first()
            .map(|at| format!("{} pages {how}, the first at {at:#x}", pages.count()))
    };
    let parts: Vec<_> = [list(missing, "missing"), list(extra, "too many")]
        .into_iter()
        .flatten()
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// What the built-in guest is held against.
#[derive(Debug)]
pub struct Expected<'a> {
    /// The plan it had.
    pub plan: &'a Plan,
    /// The sectors that it was to read, as they were before the run.
    pub before: &'a [u8],
    /// Whether it ran on a vCPU.
    pub on_kvm: bool,
    /// The driver's side of the IOMMU, if there was one.
    pub mapper: Option<&'a Mapper>,
    /// Where its memory came from.
    pub source: &'a Source,
    /// What was brought in before it began, if that was asked for.
    pub prefaulted: Option<Prefaulted>,
}

/// Every comparison of a run of the built-in guest.
pub fn all(
    ram: &GuestRam,
    bus: &mut Bus<DeviceRam>,
    dirty: &Dirty,
    expected: &Expected,
    failed: Option<String>,
) -> Vec<Check> {
    let mut checks = vec![
        ended(bus, failed),
        reported(ram, bus, expected.plan),
        pattern(ram, expected.plan),
    ];
    checks.push(read_buffers(ram, expected));
    checks.extend(sectors(bus, expected));
    checks.extend(counts(bus, expected.plan));
    checks.extend(storm(bus, expected.plan));
    checks.extend(iommu(bus, expected.mapper));
    checks.extend(device_pages(bus, dirty));
    checks.push(driver_pages(ram, dirty, expected));
    checks.push(host_memory(ram, expected.source, dirty));
    checks.extend(prefaulted(ram, expected.prefaulted));
    checks.extend(plugged(bus));
    checks
}

/// Guest memory is kept in what it was to be kept in, and takes as much memory as it must.
pub fn host_memory(ram: &GuestRam, source: &Source, dirty: &Dirty) -> Check {
    let dirty = dirty.device.union(&dirty.driver).counts();
    let compare = || -> Result<Option<String>, String> {
        let (regions, takes) = (memory::described(ram), memory::residency(ram)?);
        if regions.len() != ram.num_regions() || takes.len() != regions.len() {
            return Ok(Some(format!("{} regions are described", regions.len())));
        }
        let mut next = 0;
        for (nth, (region, takes)) in regions.iter().zip(takes).enumerate() {
            let (start, size) = (region.span.start, region.span.size);
            // A third one is that of --chaos: a file of its own, whose pages come and go.
            let steady = nth < 2;
            let place = match &region.backing {
                BackingDescription::Descriptor { offset, kind, .. } => Some((*offset, *kind)),
                _ => None,
            };
            let right = match (steady, &source.backing) {
                (true, Backing::File(_)) => place.is_some_and(|(offset, _)| offset == next),
                (true, backing) => {
                    backing.is(&region.backing) && place.is_none_or(|place| place.0 == 0)
                }
                (false, _) => place == Some((0, BackingKind::Memfd)),
            };
            next += size;
            if !right {
                return Ok(Some(format!("it is {region}")));
            }
            let pages = dirty
                .iter()
                .find(|(at, _)| *at == start)
                .map_or(0, |at| at.1);
            let there = takes.resident + takes.swapped;
            let mapped = takes.mapped <= size && takes.huge <= takes.mapped;
            // A file's pages may have been written back and dropped.
            let stays = steady && !matches!(source.backing, Backing::File(_));
            if there > size || !mapped || (stays && there < pages * PAGE) {
                let span = region.span;
                return Ok(Some(format!(
                    "of {span}: {takes:?}, and {pages} pages are dirty"
                )));
            }
        }
        Ok(None)
    };
    let what = match &source.backing {
        Backing::Anonymous => "guest memory is anonymous, and every dirty page is there",
        Backing::Memfd => "guest memory is in memfds, and every dirty page is there",
        Backing::Hugetlb => "guest memory is in huge pages, and every dirty page is there",
        Backing::File(_) => "guest memory is in one file, a region behind the other",
    };
    Check::new(what, compare().unwrap_or_else(Some))
}

/// All of guest memory was there before the guest began.
pub fn prefaulted(ram: &GuestRam, prefaulted: Option<Prefaulted>) -> Option<Check> {
    let Prefaulted {
        bytes, resident, ..
    } = prefaulted?;
    let size: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    let what = format!("{} were brought in before the guest began", human(size));
    let wrong = (bytes != size || resident != size)
        .then(|| format!("{bytes} bytes were, {resident} of them stayed"));
    Some(Check::new(what, wrong))
}

/// What `/proc/self/smaps_rollup` may differ by for reasons of the process's own.
const OWN_MEMORY: u64 = 2 << 20;

/// Memory came while the guest ran, was used, and went again.
fn plugged(bus: &Bus<DeviceRam>) -> Option<Check> {
    let plug = bus.plug.as_ref()?;
    let (place, story) = (plug.place(), &plug.story);
    let (first, kept) = (place.first(), place.kept());
    let [most, fewer] = story.resident;
    let [before, during, after] = story.process;
    let mut wrong: Vec<String> = story.refused.iter().cloned().collect();
    if story.granted != [1, 2, 1] {
        wrong.push(format!(
            "wishes granted: {:?} instead of [1, 2, 1]",
            story.granted
        ));
    }
    if !story.as_asked {
        wrong.push(format!("it was {:?}", story.described));
    }
    for (what, got, wanted) in [
        ("with half of its blocks", most, first),
        ("with a quarter", fewer, kept),
    ] {
        if got != wanted {
            wrong.push(format!("{got} bytes are in memory {what}, not {wanted}"));
        }
    }
    let least = first - OWN_MEMORY;
    for (what, grown) in [
        ("came", during.saturating_sub(before)),
        ("went", during.saturating_sub(after)),
    ] {
        if grown < least {
            wrong.push(format!(
                "{grown} bytes of the process {what}, at least {least} must"
            ));
        }
    }
    let what = format!("{} came, were used and went", human(first));
    Some(Check::new(
        what,
        (!wrong.is_empty()).then(|| wrong.join("; ")),
    ))
}

/// Behind an IOMMU: whatever was mapped for requests was unmapped again, and no device was using it by then.
fn iommu(bus: &Bus<DeviceRam>, mapper: Option<&Mapper>) -> Option<Check> {
    let (mapper, block) = (mapper?, bus.block.as_ref()?);
    let (counts, left) = (mapper.counts, block.mem().iommu().counters().entries as u64);
    let wrong = if counts.refused + counts.pending != 0 {
        Some(format!(
            "{} mappings refused, {} invalidations not done",
            counts.refused, counts.pending
        ))
    } else if counts.mapped != counts.unmapped || left > mapper.kept {
        Some(format!(
            "{} pages mapped, {} unmapped, {left} mappings left",
            counts.mapped, counts.unmapped
        ))
    } else if counts.in_flight == 0 {
        Some("no mapping was changed while a request was in flight".to_owned())
    } else {
        None
    };
    let what = format!(
        "the IOMMU has forgotten the {} pages of requests",
        counts.mapped
    );
    Some(Check::new(what, wrong))
}

fn reported(ram: &GuestRam, bus: &Bus<DeviceRam>, plan: &Plan) -> Check {
    let mut words = [0; result::WORDS];
    for (index, word) in words.iter_mut().enumerate() {
        let at = GuestAddress(RESULTS + 8 * index as u64);
        *word = ram.read_obj::<u64>(at).map_or(step::NEVER, u64::from_le);
    }
    // Which requests of the storm failed is the device's to say.
    let failed = bus
        .block
        .as_ref()
        .map_or(0, |block| block.block.counts.storm.failed);
    let want = [
        step::DONE,
        0,
        0,
        0,
        2 * plan.pattern_pages(),
        plan.requests(),
        failed,
        plan.plugged_pages(),
    ];
    let wrong = (words != want).then(|| {
        let [at, place, want, got, pages, requests, ..] = words;
        let step = step_name(at);
        format!("{step}, at {place:#x}: wanted {want:#x}, found {got:#x}; {pages} pages, {requests} requests")
    });
    let what = format!(
        "the guest found all it was to find in {} requests",
        plan.requests()
    );
    Check::new(what, wrong)
}

fn pattern(ram: &GuestRam, plan: &Plan) -> Check {
    let bad = |at: &u64| {
        ram.read_obj::<u64>(GuestAddress(*at))
            .map_or(true, |w| w != mix(*at))
    };
    let mut wrong = plan.pattern_words().filter(bad);
    let what = format!(
        "the host reads its pattern in {} pages",
        plan.pattern_pages()
    );
    let first = wrong
        .next()
        .map(|at| format!("{} words wrong, the first at {at:#x}", wrong.count() + 1));
    Check::new(what, first)
}

fn read_buffers(ram: &GuestRam, expected: &Expected) -> Check {
    let mut wrong = None;
    for (sector, at, stamped) in expected.plan.read_halves() {
        let from = (sector * SECTOR) as usize;
        let disk = expected
            .before
            .get(from..)
            .and_then(|b| b.get(..HALF as usize));
        let mut want = disk.unwrap_or_default().to_vec();
        if let (true, Some(stamp)) = (stamped, want.get_mut(..8)) {
            stamp.copy_from_slice(&mix(at).to_le_bytes());
        }
        let mut got = vec![0; HALF as usize];
        if ram.read_slice(&mut got, GuestAddress(at)).is_err() || got != want {
            wrong.get_or_insert(format!(
                "sector {sector} at {at:#x} is not what the file had"
            ));
        }
    }
    let sectors = expected.plan.read_chunks * CHUNK_SECTORS;
    Check::new(
        format!("{sectors} sectors lie in guest memory as in the file"),
        wrong,
    )
}

/// The disk after the run: the pattern where the guest wrote, everything else as it was.
fn sectors(bus: &mut Bus<DeviceRam>, expected: &Expected) -> Option<Check> {
    let disk = bus.block.as_mut()?.block.disk();
    let plan = expected.plan;
    let (first, count) = (plan.write_sector(), plan.write_chunks * CHUNK_SECTORS);
    let what = format!("{count} sectors in the file are as the guest wrote them");
    let mut compare = || -> std::io::Result<Option<String>> {
        let places = first * (SECTOR / 8)..(first + count) * (SECTOR / 8);
        let want: Vec<u8> = places.flat_map(|place| mix(place).to_le_bytes()).collect();
        let written = disk.read_sectors(first, count)?;
        let mut kept = disk.read_sectors(0, plan.read_chunks * CHUNK_SECTORS)?;
        let mut before = expected.before.to_vec();
        // Small disks are read and written in the same place.
        let overlap = (first * SECTOR) as usize;
        kept.truncate(overlap);
        before.truncate(overlap);
        let different = |a: &[u8], b: &[u8], base: u64| {
            let size = SECTOR as usize;
            let bad = a.chunks(size).zip(b.chunks(size)).position(|(a, b)| a != b);
            bad.map(|n| base + n as u64)
        };
        Ok(
            match (
                different(&written, &want, first),
                different(&kept, &before, 0),
            ) {
                (Some(sector), _) => Some(format!("sector {sector} is not what was written")),
                (_, Some(sector)) => {
                    Some(format!("sector {sector} was changed by nobody's request"))
                }
                _ => None,
            },
        )
    };
    Some(Check::new(
        what,
        compare().unwrap_or_else(|e| Some(e.to_string())),
    ))
}

fn counts(bus: &Bus<DeviceRam>, plan: &Plan) -> Option<Check> {
    let block = bus.block.as_ref()?;
    let (counts, chunk) = (&block.block.counts, CHUNK_SECTORS * SECTOR);
    let reads = plan.reads();
    let rows = [
        ("reads", counts.reads, reads),
        ("bytes read", counts.bytes_read, reads * chunk),
        ("writes", counts.writes, plan.write_chunks),
        (
            "bytes written",
            counts.bytes_written,
            plan.write_chunks * chunk,
        ),
        ("flushes", counts.flushes, 1),
        ("refused", counts.refused, plan.bad_requests()),
        ("requests", counts.total(), plan.requests()),
        ("notifications", block.kicks, plan.kicks()),
        ("debug exits", bus.exits.debug_exit, 1),
        (
            "accesses to the memory device",
            bus.exits.plug,
            plan.plug.map_or(0, |_| PLUG_ACCESSES),
        ),
    ];
    let mut wrong: Vec<_> = rows
        .iter()
        .filter(|(_, got, want)| got != want)
        .map(|(name, got, want)| format!("{got} {name} instead of {want}"))
        .collect();
    wrong.extend(block.broken.clone());
    if let Some(ring) = block.block.ring() {
        let (ring, moved) = (ring.counts, counts.bytes_read + counts.bytes_written);
        if ring.completed != ring.operations
            || ring.bytes != moved
            || ring.most < plan.read_chunks.min(SLOTS)
        {
            wrong.push(format!("io_uring: {ring:?}"));
        }
    }
    let what = format!(
        "requests, bytes and {} notifications are counted right",
        plan.kicks()
    );
    Some(Check::new(
        what,
        (!wrong.is_empty()).then(|| wrong.join("; ")),
    ))
}

/// The requests on files that were cut under them, if there were any.
fn storm(bus: &Bus<DeviceRam>, plan: &Plan) -> Option<Check> {
    let block = &bus.block.as_ref()?.block;
    let (chaos, storm) = (block.chaos()?, block.counts.storm);
    let cuts = chaos.cuts();
    let what = format!(
        "{} of {} requests under {cuts} cuts failed, all others moved",
        storm.failed,
        storm.failed + storm.moved
    );
    let certain = plan.storm_requests() / 8;
    let wrong = [
        (
            storm.failed + storm.moved,
            plan.storm_requests(),
            "requests",
        ),
        (storm.certain_whole, certain, "requests between whole files"),
        (
            storm.certain_cut,
            certain,
            "requests on a file that was cut",
        ),
        (storm.wrong, 0, "that ended otherwise than they had to"),
        (
            u64::from(cuts <= certain),
            0,
            "files cut by the thread alone",
        ),
        (u64::from(storm.failed < certain), 0, "failures missing"),
    ];
    let wrong: Vec<_> = wrong
        .iter()
        .filter(|(got, want, _)| got != want)
        .map(|(got, want, name)| format!("{got} {name} instead of {want}"))
        .collect();
    Some(Check::new(
        what,
        (!wrong.is_empty()).then(|| wrong.join("; ")),
    ))
}

fn driver_pages(ram: &GuestRam, dirty: &Dirty, expected: &Expected) -> Check {
    let must = expected.plan.driver_pages(ram, expected.on_kvm);
    let missing = must.minus(&dirty.driver);
    let extra = dirty.driver.minus(&must);
    let count = must.count();
    if expected.on_kvm {
        // KVM may log more: it marks a page when it maps it writable, be it for a read.
        let what = match extra.count() {
            0 => format!("the vCPU dirtied the {count} pages that it wrote, no others"),
            more => {
                format!("the vCPU dirtied the {count} pages that it wrote (KVM logs {more} more)")
            }
        };
        Check::new(what, pages_wrong(&missing, &missing.minus(&missing)))
    } else {
        let what = format!("the driver dirtied the {count} pages that it wrote, no others");
        Check::new(what, pages_wrong(&missing, &extra))
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
