//! [`residency`]: how much memory guest memory really takes.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestRegionMmap};

use crate::error::NotProvisioned;
use crate::mapping::{provisioned, span_of, HostMapping};
use crate::region::{BackingKind, Span};
use crate::sys;

/// What a region takes, in bytes.
///
/// `resident` is exact. The others are what the kernel tells of its areas of addresses; where it keeps adjacent regions as one, each is given a part of
/// that by its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// In memory: pages that this process has, or that are in the file or memfd behind it, whoever brought them there (`mincore(2)`; of a file that the
    /// process neither owns nor may write the kernel says that all is, and of a part of a file of huge pages what this process has). Anonymous
    /// pages that were only read count here, though all of them are one page of zeroes that costs nothing; `mapped` leaves them out.
    pub resident: u64,
    /// Mapped in this process for now (`Rss` of /proc/self/smaps; pages of hugetlb are counted, too).
    pub mapped: u64,
    /// Of those, in huge pages: transparent ones that are mapped whole, and hugetlb.
    pub huge: u64,
    /// Swapped out.
    pub swapped: u64,
    /// Locked in memory.
    pub locked: u64,
}

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResidencyError {
    /// The region was not built by this crate.
    #[error(transparent)]
    NotProvisioned(#[from] NotProvisioned),
    /// The system does not say.
    #[error("region {region}: cannot read its residency: {source}")]
    System {
        /// The region.
        region: Span,
        /// What the system answered.
        source: io::Error,
    },
}

/// Returns what each region of guest memory takes, in the order of their addresses.
///
/// System calls: `mincore`, and those that read /proc/self/smaps. It looks at every page, so that it takes time for a large guest.
///
/// # Errors
///
/// [`ResidencyError`].
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{residency, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 64 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// memory.write_obj(1u8, GuestAddress(0x1000))?;
/// let (span, takes) = residency(&memory)?[0];
/// assert!(takes.resident >= 4096 && takes.resident < span.size);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn residency<B, M>(memory: &M) -> Result<Vec<(Span, Residency)>, ResidencyError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    let known = |region| Ok((span_of(region), provisioned(region)?));
    let mappings = memory
        .iter()
        .map(known)
        .collect::<Result<Vec<_>, NotProvisioned>>()?;
    let fail = |region: Span| move |source: io::Error| ResidencyError::System { region, source };
    let mut answers = Vec::with_capacity(mappings.len());
    for (span, mapping) in &mappings {
        let resident = resident(mapping).map_err(fail(*span))?;
        answers.push((
            *span,
            Residency {
                resident,
                ..Residency::default()
            },
        ));
    }
    let (Some(first), false) = (answers.first().map(|(span, _)| *span), answers.is_empty()) else {
        return Ok(answers);
    };
    // Names of files in there need not be text.
    let smaps = fs::read("/proc/self/smaps").map_err(fail(first))?;
    let smaps = String::from_utf8_lossy(&smaps);
    let ranges: Vec<Range<usize>> = mappings
        .iter()
        .map(|(_, mapping)| host_range(mapping))
        .collect();
    for area in areas(&smaps) {
        for (range, (_, answer)) in ranges.iter().zip(&mut answers) {
            let share = |bytes: u64| area.share_of(bytes, range);
            answer.mapped = answer.mapped.saturating_add(share(area.mapped));
            answer.huge = answer.huge.saturating_add(share(area.huge));
            answer.swapped = answer.swapped.saturating_add(share(area.swapped));
            answer.locked = answer.locked.saturating_add(share(area.locked));
        }
    }
    Ok(answers)
}

fn host_range(mapping: &HostMapping) -> Range<usize> {
    let start = mapping.host_address();
    start..start.saturating_add(mapping.mapped().len())
}

/// How many bytes of a mapping are in memory.
pub(crate) fn resident(mapping: &HostMapping) -> io::Result<u64> {
    let len = u64::try_from(mapping.mapped().len()).unwrap_or(u64::MAX);
    if let (BackingKind::Hugetlb, true, Some((file, 0))) =
        (mapping.kind(), mapping.backing.is_shared(), mapping.file())
    {
        // Of huge pages mincore(2) knows those that this mapping has; the file knows all.
        let file = file.metadata()?;
        if file.len() == len {
            return Ok(file.blocks().saturating_mul(512));
        }
    }
    known_to_mincore(mapping, 0, mapping.mapped().len())
}

/// How many bytes of a part of a mapping `mincore(2)` says are in memory: of huge pages of hugetlb, those that this mapping has.
pub(crate) fn known_to_mincore(
    mapping: &HostMapping,
    offset: usize,
    len: usize,
) -> io::Result<u64> {
    let page = sys::page_size();
    // A byte for each page, and 1 GiB at a time.
    let step = 1usize << 30;
    let mut pages = vec![0u8; len.min(step).div_ceil(page)];
    let mut count = 0u64;
    for done in (0..len).step_by(step) {
        let here = len.saturating_sub(done).min(step);
        mapping
            .mapped()
            .resident(offset.saturating_add(done), here, &mut pages)?;
        let there = pages.iter().take(here.div_ceil(page));
        let there = there.filter(|page| *page & 1 != 0).count();
        count = count.saturating_add(u64::try_from(there).unwrap_or(0));
    }
    Ok(count.saturating_mul(sys::page_size_u64()))
}

/// What smaps says of one area of this process's addresses, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Area {
    start: usize,
    end: usize,
    mapped: u64,
    huge: u64,
    swapped: u64,
    locked: u64,
}

impl Area {
    /// What part of so many bytes of the area falls to a range of addresses.
    fn share_of(&self, bytes: u64, range: &Range<usize>) -> u64 {
        let common = self
            .end
            .min(range.end)
            .saturating_sub(self.start.max(range.start));
        let wide = |n: usize| u128::try_from(n).unwrap_or(u128::MAX);
        let len = wide(self.end.saturating_sub(self.start));
        let part = u128::from(bytes)
            .saturating_mul(wide(common))
            .checked_div(len);
        part.and_then(|part| u64::try_from(part).ok()).unwrap_or(0)
    }
}

/// The areas in the text of a smaps file (proc_pid_smaps(5)): a line with the range of addresses, and lines with a name and KiB.
fn areas(smaps: &str) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for line in smaps.lines() {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((start, end)) = first.split_once('-') {
            let number = |text| usize::from_str_radix(text, 16);
            if let (Ok(start), Ok(end)) = (number(start), number(end)) {
                areas.push(Area {
                    start,
                    end,
                    ..Area::default()
                });
            }
            continue;
        }
        let number = rest
            .split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok());
        let (Some(area), Some(bytes)) =
            (areas.last_mut(), number.and_then(|n| n.checked_mul(1024)))
        else {
            continue;
        };
        let add = |to: &mut u64| *to = to.saturating_add(bytes);
        match first {
            "Rss:" => add(&mut area.mapped),
            "AnonHugePages:" | "ShmemPmdMapped:" | "FilePmdMapped:" => add(&mut area.huge),
            "Shared_Hugetlb:" | "Private_Hugetlb:" => {
                add(&mut area.mapped);
                add(&mut area.huge);
            }
            "Swap:" => add(&mut area.swapped),
            "Locked:" => add(&mut area.locked),
            _ => {}
        }
    }
    areas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_is_read_area_by_area() {
        let text = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0    [anon:guest]\n\
            Size:               2048 kB\n\
            Rss:                2048 kB\n\
            AnonHugePages:      2048 kB\n\
            Swap:                  4 kB\n\
            Locked:                8 kB\n\
            VmFlags: rd wr mr mw me ac hg \n\
            7f0000200000-7f0000600000 rw-s 00000000 00:0f 77   /anon_hugepage (deleted)\n\
            Rss:                   0 kB\n\
            Shared_Hugetlb:        0 kB\n\
            Private_Hugetlb:    4096 kB\n";
        let first = Area {
            start: 0x7f00_0000_0000,
            end: 0x7f00_0020_0000,
            mapped: 2 << 20,
            huge: 2 << 20,
            swapped: 4096,
            locked: 8192,
        };
        let second = Area {
            start: 0x7f00_0020_0000,
            end: 0x7f00_0060_0000,
            mapped: 4 << 20,
            huge: 4 << 20,
            ..Area::default()
        };
        assert_eq!(areas(text), [first, second]);
        let shares = [
            0x7f00_0000_0000..0x7f00_0030_0000,
            0x7f00_0050_0000..usize::MAX,
        ];
        let share = |range| second.share_of(second.mapped, range);
        assert_eq!(shares.each_ref().map(share), [1 << 20, 1 << 20]);
        assert_eq!(second.share_of(7, &(0..5)), 0);
        assert!(areas("nonsense\n12 34\nRss: 5 kB\n").is_empty());
    }
}
