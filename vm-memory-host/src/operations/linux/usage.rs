//! Reads the memory that regions use, by mincore(2) and /proc/thread-self/smaps.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::mapping::{to_u64, HostMapping};
use crate::operations::{Residency, ResidencyError};
use crate::region::{BackingKind, Span};
use crate::sys;

/// Returns the memory that each mapping uses, beside the guest addresses of its region.
pub(in crate::operations) fn usages(
    mappings: &[(Span, &HostMapping)],
) -> Result<Vec<(Span, Residency)>, ResidencyError> {
    let fail = |region: Span| move |source: io::Error| ResidencyError::System { region, source };
    let mut usages = Vec::with_capacity(mappings.len());
    for (span, mapping) in mappings {
        let resident = resident(mapping).map_err(fail(*span))?;
        let usage = Residency {
            resident,
            file: resident_of_file(mapping, resident).map_err(fail(*span))?,
            ..Residency::default()
        };
        usages.push((*span, usage));
    }
    let Some((first, _)) = usages.first() else {
        return Ok(usages);
    };
    // Names of files in smaps need not be UTF-8. /proc/self/smaps is empty after the main thread
    // has ended.
    let smaps = match fs::read("/proc/thread-self/smaps") {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::PermissionDenied
            ) =>
        {
            // A jail without /proc, or a process that is not dumpable (prctl(2), PR_SET_DUMPABLE).
            for (_, usage) in &mut usages {
                usage.is_partial = true;
            }
            return Ok(usages);
        }
        smaps => smaps.map_err(fail(*first))?,
    };
    let smaps = String::from_utf8_lossy(&smaps);
    let ranges = mappings.iter().map(|(_, mapping)| host_range(mapping));
    let ranges = SortedRanges::of(ranges);
    for vma in parse_smaps(&smaps) {
        for (range, region) in ranges.overlapping(&vma) {
            let (Some((_, usage)), Some((_, mapping))) =
                (usages.get_mut(*region), mappings.get(*region))
            else {
                continue;
            };
            let share = |bytes: u64| vma.share_of(bytes, range);
            // The kernel does not report which huge pages are private.
            let private = match mapping.kind() {
                BackingKind::Hugetlb if mapping.backing.is_shared() => 0,
                BackingKind::Hugetlb => vma.mapped,
                _ => vma.anonymous,
            };
            usage.private = usage.private.saturating_add(share(private));
            usage.mapped = usage.mapped.saturating_add(share(vma.mapped));
            usage.huge = usage.huge.saturating_add(share(vma.huge));
            usage.swapped = usage.swapped.saturating_add(share(vma.swapped));
            usage.locked = usage.locked.saturating_add(share(vma.locked));
        }
    }
    Ok(usages)
}

/// Returns a remedy if the usage of memory cannot be read.
pub(in crate::operations) fn unknown_usage(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EMFILE) => "raise the limit of open files (ulimit -n)",
        Some(libc::ENOMEM) => "raise the limit of the address space (ulimit -v), or free memory",
        _ => "check that /proc/thread-self/smaps and the region's file can be read",
    }
}

fn host_range(mapping: &HostMapping) -> Range<usize> {
    let start = mapping.host_address();
    start..start.saturating_add(mapping.mapped().len())
}

/// Returns the number of resident bytes of a mapping.
pub(crate) fn resident(mapping: &HostMapping) -> io::Result<u64> {
    let is_shared_hugetlb = mapping.kind() == BackingKind::Hugetlb && mapping.backing.is_shared();
    if let (true, Some((file, 0))) = (is_shared_hugetlb, mapping.file()) {
        // mincore(2) reports only the huge pages that this process maps; the file has all.
        let file = file.metadata()?;
        if file.len() == to_u64(mapping.mapped().len()) {
            return Ok(file.blocks().saturating_mul(512));
        }
    }
    mincore_bytes(mapping, 0, mapping.mapped().len())
}

/// Returns the number of bytes of a mapping's file that are in memory.
///
/// `resident` is the number of bytes of the mapping that are in memory.
fn resident_of_file(mapping: &HostMapping, resident: u64) -> io::Result<u64> {
    let Some((file, start)) = mapping.file() else {
        return Ok(0);
    };
    let len = mapping.mapped().len();
    match mapping.kind() {
        _ if mapping.backing.is_shared() => Ok(resident),
        BackingKind::Hugetlb => {
            let allocated = file.metadata()?.blocks().saturating_mul(512);
            Ok(allocated.min(to_u64(len)))
        }
        _ => count_resident(len, |offset, len, pages| {
            sys::resident_of_file(file, start.saturating_add(to_u64(offset)), len, pages)
        }),
    }
}

/// Returns the number of bytes of some ranges of a mapping that are in memory.
///
/// Returns 0 if the kernel hides the number, where [`resident`] returns the length of the mapping.
/// For huge pages, only the pages that this process maps count.
pub(crate) fn known_resident(mapping: &HostMapping, ranges: &[(usize, usize)]) -> io::Result<u64> {
    match mapping.file() {
        Some((file, _)) if mapping.kind() == BackingKind::Memfd && hides_residency(file)? => Ok(0),
        _ => ranges.iter().try_fold(0u64, |sum, &(offset, len)| {
            Ok(sum.saturating_add(mincore_bytes(mapping, offset, len)?))
        }),
    }
}

/// Returns whether the kernel hides from this process which pages of a memfd are in memory.
fn hides_residency(memfd: &File) -> io::Result<bool> {
    // The offset of one of the last pages that a file can have. No sealed memfd is that long. The
    // kernel reports this page as resident if this process may not know (mincore(2)).
    const FAR: u64 = (u64::MAX >> 1) - 0xf_ffff;
    let (page, mut far) = (sys::page_size(), [0]);
    sys::resident_of_file(memfd, FAR, page, &mut far)?;
    Ok(far != [0])
}

/// Returns the number of bytes of a range of a file that are in memory.
///
/// Returns 0 if the kernel hides this number from the process (mincore(2)).
///
/// Unlike `SEEK_DATA`, mincore(2) never waits for the kernel's lock on the file, which another
/// process can hold.
pub(crate) fn resident_in_file(file: &File, range: &Range<u64>) -> io::Result<u64> {
    if hides_residency(file)? {
        return Ok(0);
    }
    let len = usize::try_from(range.end.saturating_sub(range.start));
    let len = len.map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    count_resident(len, |offset, len, pages| {
        let start = range.start.saturating_add(to_u64(offset));
        sys::resident_of_file(file, start, len, pages)
    })
}

/// Returns the number of bytes of a range that mincore(2) reports as resident.
///
/// For huge pages, these are the pages that this process maps.
pub(crate) fn mincore_bytes(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    count_resident(len, |done, len, pages| {
        let mapped = mapping.mapped();
        mapped.resident(offset.saturating_add(done), len, pages)
    })
}

/// Counts the bytes in resident pages of `len` bytes.
///
/// `resident` writes whether each page of a part is resident, as mincore(2) does. It receives the
/// offset and the length of the part.
fn count_resident(
    len: usize,
    resident: impl Fn(usize, usize, &mut [u8]) -> io::Result<()>,
) -> io::Result<u64> {
    let page = sys::page_size();
    // One byte for each page, 64 MiB at a time. Files are mapped for this, and a limit of the
    // address space may leave little room (`RLIMIT_AS`).
    let step = 1usize << 26;
    let mut pages = vec![0u8; len.min(step).div_ceil(page)];
    let mut count = 0u64;
    for done in (0..len).step_by(step) {
        let here = len.saturating_sub(done).min(step);
        resident(done, here, &mut pages)?;
        let present = pages.iter().take(here.div_ceil(page));
        let present = present.filter(|page| *page & 1 != 0).count();
        count = count.saturating_add(to_u64(present));
    }
    Ok(count.saturating_mul(sys::page_size_u64()))
}

/// Ranges of host addresses in ascending order, each with its number.
struct SortedRanges(Vec<(Range<usize>, usize)>);

impl SortedRanges {
    /// Sorts ranges that do not overlap.
    fn of(ranges: impl Iterator<Item = Range<usize>>) -> Self {
        let mut all: Vec<_> = ranges.zip(0..).collect();
        all.sort_by_key(|(range, _)| range.start);
        Self(all)
    }

    /// Finds the ranges that have addresses of a VMA. Visits no other ranges.
    fn overlapping(&self, vma: &SmapsVma) -> impl Iterator<Item = &(Range<usize>, usize)> {
        let first = self.0.partition_point(|(range, _)| range.end <= vma.start);
        let end = vma.end;
        let rest = self.0.iter().skip(first);
        rest.take_while(move |(range, _)| range.start < end)
    }
}

/// The statistics of one VMA in /proc/thread-self/smaps, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SmapsVma {
    start: usize,
    end: usize,
    mapped: u64,
    anonymous: u64,
    huge: u64,
    swapped: u64,
    locked: u64,
}

impl SmapsVma {
    /// Returns the part of `bytes` for `range`, in proportion to its share of this VMA.
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

/// Parses a smaps file (proc_pid_smaps(5)).
///
/// Each VMA has a line with its addresses, followed by lines with a name and a size in KiB.
fn parse_smaps(smaps: &str) -> Vec<SmapsVma> {
    let mut vmas: Vec<SmapsVma> = Vec::new();
    for line in smaps.lines() {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((start, end)) = first.split_once('-') {
            let number = |text| usize::from_str_radix(text, 16);
            if let (Ok(start), Ok(end)) = (number(start), number(end)) {
                vmas.push(SmapsVma {
                    start,
                    end,
                    ..SmapsVma::default()
                });
            }
            continue;
        }
        let number = rest
            .split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok());
        let (Some(vma), Some(bytes)) = (vmas.last_mut(), number.and_then(|n| n.checked_mul(1024)))
        else {
            continue;
        };
        let add = |to: &mut u64| *to = to.saturating_add(bytes);
        match first {
            "Rss:" => add(&mut vma.mapped),
            "Anonymous:" => add(&mut vma.anonymous),
            "AnonHugePages:" | "ShmemPmdMapped:" | "FilePmdMapped:" => add(&mut vma.huge),
            "Shared_Hugetlb:" | "Private_Hugetlb:" => {
                add(&mut vma.mapped);
                add(&mut vma.huge);
            }
            "Swap:" => add(&mut vma.swapped),
            "Locked:" => add(&mut vma.locked),
            _ => {}
        }
    }
    vmas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_smaps_reads_one_vma_after_the_other() {
        let text = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0    [anon:guest]\n\
            Size:               2048 kB\n\
            Rss:                2048 kB\n\
            Anonymous:          2044 kB\n\
            AnonHugePages:      2048 kB\n\
            Swap:                  4 kB\n\
            Locked:                8 kB\n\
            VmFlags: rd wr mr mw me ac hg \n\
            7f0000200000-7f0000600000 rw-s 00000000 00:0f 77   /anon_hugepage (deleted)\n\
            Rss:                   0 kB\n\
            Shared_Hugetlb:        0 kB\n\
            Private_Hugetlb:    4096 kB\n";
        let first = SmapsVma {
            start: 0x7f00_0000_0000,
            end: 0x7f00_0020_0000,
            mapped: 2 << 20,
            anonymous: 2044 << 10,
            huge: 2 << 20,
            swapped: 4096,
            locked: 8192,
        };
        let second = SmapsVma {
            start: 0x7f00_0020_0000,
            end: 0x7f00_0060_0000,
            mapped: 4 << 20,
            huge: 4 << 20,
            ..SmapsVma::default()
        };
        assert_eq!(parse_smaps(text), [first, second]);
        let shares = [
            0x7f00_0000_0000..0x7f00_0030_0000,
            0x7f00_0050_0000..usize::MAX,
        ];
        let share = |range| second.share_of(second.mapped, range);
        assert_eq!(shares.each_ref().map(share), [1 << 20, 1 << 20]);
        assert_eq!(second.share_of(7, &(0..5)), 0);
        assert!(parse_smaps("nonsense\n12 34\nRss: 5 kB\n").is_empty());
    }

    #[test]
    fn resident_in_file_without_permission_to_know_returns_zero() {
        let page = sys::page_size_u64();
        let file = sys::memfd(c"hidden", 4 * page, None).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1], page).unwrap();
        assert_eq!(resident_in_file(&file, &(0..4 * page)).unwrap(), page);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        file.set_permissions(mode).unwrap();
        // Another user, who has received the descriptor.
        let other = rustix::process::Uid::from_raw(65_534);
        let is_other = || rustix::thread::set_thread_res_uid(other, other, other).is_ok();
        if !sys::in_child(is_other) {
            let test = "resident_in_file_without_permission_to_know_returns_zero";
            return test_support::skipped(test, "needs root, to become another user");
        }
        assert!(sys::in_child(
            || is_other() && matches!(resident_in_file(&file, &(0..4 * page)), Ok(0))
        ));
    }

    #[test]
    fn overlapping_of_many_regions_visits_only_the_regions_of_the_vma() {
        const COUNT: usize = 1000;
        // Regions in any order, and a VMA over each pair of them.
        let region = |n: usize| {
            let start = (n * 7 % COUNT) * 0x1000;
            start..start + 0x1000
        };
        let ranges = SortedRanges::of((0..COUNT).map(region));
        let mut visited = vec![0; COUNT];
        for start in (0..COUNT).step_by(2) {
            let vma = SmapsVma {
                start: start * 0x1000,
                end: (start + 2) * 0x1000,
                ..SmapsVma::default()
            };
            for (range, number) in ranges.overlapping(&vma) {
                assert_eq!(*range, region(*number));
                visited[*number] += 1;
            }
        }
        assert_eq!(visited, [1; COUNT]);
        let elsewhere = SmapsVma {
            start: COUNT * 0x1000,
            end: usize::MAX,
            ..SmapsVma::default()
        };
        assert_eq!(ranges.overlapping(&elsewhere).count(), 0);
    }
}
