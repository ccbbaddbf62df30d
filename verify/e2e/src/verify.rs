//! The oracle: compares an [`Outcome`] with its plan.

use std::collections::BTreeSet;

use microvm::block::SECTOR;
use microvm::memory::{Backing, PAGE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vm_memory_host::{describe, residency, BackingDescription, BackingKind, Sharing};

use crate::plan::{mix, Plan, CHUNK_SECTORS, HALF, SLOTS};
use crate::run::Outcome;

/// The aspect of an outcome that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aspect {
    /// The values that the driver found.
    Driver,
    /// The pattern in guest memory, as the host reads it.
    Pattern,
    /// The buffers of the first pass, against the disk before the run.
    Buffers,
    /// The sectors of the disk after the run.
    Sectors,
    /// The numbers of requests, bytes and notifications.
    Counts,
    /// The storm.
    Storm,
    /// The mappings of the IOMMU.
    Iommu,
    /// The pages that the device dirtied.
    DevicePages,
    /// The pages that the driver dirtied.
    DriverPages,
    /// The host memory of guest memory: backing and populated pages.
    HostMemory,
    /// The history of plugged memory.
    Plug,
}

/// Compares an outcome with its plan. Returns each aspect that is wrong, with the reason.
pub fn verify(outcome: &mut Outcome) -> Vec<(Aspect, String)> {
    let checks: [(Aspect, Check); 11] = [
        (Aspect::Driver, driver),
        (Aspect::Pattern, pattern),
        (Aspect::Buffers, buffers),
        (Aspect::Sectors, sectors),
        (Aspect::Counts, counts),
        (Aspect::Storm, storm),
        (Aspect::Iommu, iommu),
        (Aspect::DevicePages, device_pages),
        (Aspect::DriverPages, driver_pages),
        (Aspect::HostMemory, host_memory),
        (Aspect::Plug, plugged),
    ];
    let mut wrong = Vec::new();
    for (aspect, check) in checks {
        wrong.extend(check(outcome).err().map(|why| (aspect, why)));
    }
    wrong
}

type Check = fn(&mut Outcome) -> Result<(), String>;

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), String> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what}: found {found:?}, expected {expected:?}"))
    }
}

fn driver(outcome: &mut Outcome) -> Result<(), String> {
    let failed = outcome.storm().map_or(0, |storm| storm.failed);
    let plan = &outcome.plan;
    let counts = outcome.driver.as_ref().map_err(ToString::to_string)?;
    expect(
        "pages",
        counts.pages,
        2 * plan.pattern_pages().count() as u64,
    )?;
    expect("requests", counts.requests, plan.requests())?;
    expect("failed requests", counts.failed, failed)?;
    let plugged = plan
        .plug
        .map_or(0, |place| (place.first() + place.kept()) / PAGE);
    expect("plugged pages", counts.plugged_pages, plugged)
}

fn pattern(outcome: &mut Outcome) -> Result<(), String> {
    let word = |addr: u64| outcome.ram.read_obj::<u64>(GuestAddress(addr)).unwrap_or(0);
    let mut words = outcome.plan.pattern_pages().flat_map(Plan::words_of);
    words.try_for_each(|addr| expect(&format!("word at {addr:#x}"), word(addr), mix(addr)))
}

fn buffers(outcome: &mut Outcome) -> Result<(), String> {
    for (sector, addr, stamped) in outcome.plan.read_halves() {
        let mut expected = outcome.before[(sector * SECTOR) as usize..][..HALF as usize].to_vec();
        if stamped {
            expected[..8].copy_from_slice(&mix(addr).to_le_bytes());
        }
        let mut found = vec![0; HALF as usize];
        let read = outcome.ram.read_slice(&mut found, GuestAddress(addr));
        read.map_err(|e| e.to_string())?;
        if found != expected {
            return Err(format!(
                "sector {sector} at {addr:#x} differs from the disk"
            ));
        }
    }
    Ok(())
}

/// Checks that written sectors contain the pattern, and that all others are unchanged.
fn sectors(outcome: &mut Outcome) -> Result<(), String> {
    let plan = &outcome.plan;
    let (first, count) = (plan.write_sector(), plan.write_chunks * CHUNK_SECTORS);
    let words = first * (SECTOR / 8)..(first + count) * (SECTOR / 8);
    let written: Vec<u8> = words.flat_map(|place| mix(place).to_le_bytes()).collect();
    // A small disk is read and written in the same place.
    let kept_len = plan.read_chunks * CHUNK_SECTORS;
    let kept = kept_len.min(first);
    let image = outcome.block.disk().image();
    let read = |first, count| image.read_sectors(first, count).map_err(|e| e.to_string());
    if read(first, count)? != written {
        return Err(format!(
            "the {count} sectors that start at {first} differ from those that the driver wrote"
        ));
    }
    if read(0, kept)? != outcome.before[..(kept * SECTOR) as usize] {
        return Err(format!("the first {kept} sectors changed"));
    }
    Ok(())
}

fn counts(outcome: &mut Outcome) -> Result<(), String> {
    let (storm, uring) = (outcome.storm(), outcome.uring());
    let (plan, counts, chunk) = (&outcome.plan, outcome.counts(), 2 * HALF);
    // Passes of the storm read and write in turn.
    let moved = storm.as_ref().map_or(0, |storm| storm.moved);
    let failed = storm.as_ref().map_or(0, |storm| storm.failed);
    expect(
        "reads and writes",
        counts.reads + counts.writes,
        plan.reads() + plan.write_chunks + moved,
    )?;
    expect("bytes read", counts.bytes_read, counts.reads * chunk)?;
    expect("bytes written", counts.bytes_written, counts.writes * chunk)?;
    if storm.is_none() {
        expect("reads", counts.reads, plan.reads())?;
    }
    expect("flushes", counts.flushes, 1)?;
    expect(
        "refused requests",
        counts.refused,
        plan.bad_requests() + failed,
    )?;
    expect("requests", counts.total(), plan.requests())?;
    expect("notifications", outcome.notifications, plan.notifications())?;
    expect("broken device", &outcome.broken, &None)?;
    if let Some(uring) = uring {
        expect("completed operations", uring.completed, uring.submitted)?;
        expect(
            "bytes by io_uring",
            uring.bytes,
            counts.bytes_read + counts.bytes_written,
        )?;
        if uring.most < plan.read_chunks.min(SLOTS) {
            return Err(format!("only {} operations in flight", uring.most));
        }
    }
    Ok(())
}

fn storm(outcome: &mut Outcome) -> Result<(), String> {
    let Some(storm) = outcome.storm() else {
        return Ok(());
    };
    let certain = outcome.plan.storm_requests() / 8;
    expect(
        "requests",
        storm.moved + storm.failed,
        outcome.plan.storm_requests(),
    )?;
    expect("requests between whole files", storm.certain_whole, certain)?;
    expect(
        "requests with an empty file",
        storm.certain_truncated,
        certain,
    )?;
    expect("wrong outcomes", storm.wrong, 0)?;
    // The thread has also truncated files, and certain requests have failed.
    expect(
        "truncations by the thread",
        outcome.truncations > certain,
        true,
    )?;
    expect("failures", storm.failed >= certain, true)
}

fn iommu(outcome: &mut Outcome) -> Result<(), String> {
    let Some(counts) = outcome.mapper else {
        return Ok(());
    };
    expect("refused mappings", counts.refused, 0)?;
    expect("pending invalidations", counts.pending, 0)?;
    expect("unmapped pages", counts.unmapped, counts.mapped)?;
    expect(
        "no other mappings",
        outcome.mappings_left <= counts.permanent,
        true,
    )?;
    expect("pages remapped in flight", counts.remapped > 0, true)
}

/// Checks that the device dirtied the pages of its requests, and no others.
fn device_pages(outcome: &mut Outcome) -> Result<(), String> {
    let written = outcome
        .storm()
        .map_or_else(BTreeSet::new, |storm| storm.written);
    let (must, may) = outcome.plan.device_pages();
    let must: BTreeSet<_> = must.union(&written).copied().collect();
    let may = must.union(&may).copied().collect();
    compare_pages(&outcome.dirty.device, &must, Some(&may))
}

fn driver_pages(outcome: &mut Outcome) -> Result<(), String> {
    let must = outcome.plan.driver_pages();
    // KVM may log more pages: it marks a page when it maps it as writable, even for a read.
    let may = (!outcome.setup.kvm).then_some(&must);
    compare_pages(&outcome.dirty.driver, &must, may)
}

fn compare_pages(
    found: &BTreeSet<u64>,
    must: &BTreeSet<u64>,
    may: Option<&BTreeSet<u64>>,
) -> Result<(), String> {
    let first = |what, pages: Vec<&u64>| match pages.first() {
        None => Ok(()),
        Some(at) => Err(format!(
            "{} pages {what}, the first at {at:#x}",
            pages.len()
        )),
    };
    first("missing", must.difference(found).collect())?;
    first(
        "too many",
        may.map_or_else(Vec::new, |may| found.difference(may).collect()),
    )
}

/// Checks that guest memory has the requested backing, and that every dirty page is resident.
fn host_memory(outcome: &mut Outcome) -> Result<(), String> {
    let (description, _) = describe(&*outcome.ram).map_err(|e| e.to_string())?;
    expect(
        "described regions",
        description.regions.len(),
        outcome.ram.num_regions(),
    )?;
    let resident = residency(&*outcome.ram).map_err(|e| e.to_string())?;
    let mut offset_in_file = 0;
    for (nth, (region, (span, now))) in description.regions.iter().zip(resident).enumerate() {
        // The third region is that of a storm, which is truncated.
        let steady = nth < 2;
        let backing = if steady {
            &outcome.setup.backing
        } else {
            &Backing::Memfd
        };
        if !has_backing(&region.backing, backing, offset_in_file) {
            return Err(format!("the backing of {region} is wrong"));
        }
        offset_in_file += span.size;
        let pages = outcome.dirty.device.union(&outcome.dirty.driver);
        let in_region = span.start..span.start + span.size;
        let dirty = pages.filter(|page| in_region.contains(page)).count() as u64;
        let present = now.resident + now.swapped;
        let possible = present <= span.size && now.huge <= now.mapped && now.mapped <= span.size;
        // Pages of a file may have been written back and evicted.
        let stays = steady && !matches!(backing, Backing::File(_));
        let prefaulted = !outcome.setup.prefault || present == span.size;
        if !possible || (stays && !(prefaulted && present >= dirty * PAGE)) {
            return Err(format!("{span}: {now:?} with {dirty} dirty pages"));
        }
    }
    Ok(())
}

fn has_backing(found: &BackingDescription, expected: &Backing, offset_in_file: u64) -> bool {
    match found {
        BackingDescription::Anonymous => *expected == Backing::Anonymous,
        BackingDescription::Descriptor {
            offset,
            kind,
            sharing,
            ..
        } => {
            // A file may be on tmpfs or hugetlbfs.
            let right = match expected {
                Backing::Anonymous => false,
                Backing::Memfd => *kind == BackingKind::Memfd && *offset == 0,
                Backing::Hugetlb => *kind == BackingKind::Hugetlb && *offset == 0,
                Backing::File(_) => *offset == offset_in_file,
            };
            right && *sharing == Sharing::Shared
        }
        _ => false,
    }
}

/// Checks that memory was plugged, used, and unplugged.
fn plugged(outcome: &mut Outcome) -> Result<(), String> {
    let (Some(history), Some(place)) = (&outcome.plug, outcome.plan.plug) else {
        return Ok(());
    };
    expect("error", &history.error, &None)?;
    expect("commands", history.succeeded, [1, 2, 1])?;
    expect(
        "resident bytes",
        history.resident,
        [place.first(), place.kept()],
    )?;
    let description = history.description.as_ref().ok_or("no description")?;
    let backing = match &outcome.setup.backing {
        Backing::File(_) => &Backing::Memfd,
        other => other,
    };
    expect(
        "backing",
        has_backing(&description.backing, backing, 0),
        true,
    )?;
    let plugged = description
        .blocks
        .as_ref()
        .map(|blocks| blocks.plugged.clone());
    expect("plugged blocks", plugged, Some(vec![(0, place.first())]))
}
