//! [`Needed`]: the memory that several regions need together.

use std::collections::BTreeMap;

use super::check::initial_size;
use crate::mapping::{FileIdentity, FileRanges, OpenedBacking};
use crate::operations::resident_in_file;
use crate::region::{BackingKind, Region};

/// A sum of the bytes that regions need, without those that their files already have.
///
/// Several regions may map parts of one file. The pages that the file has are subtracted once, not
/// from each region. Bytes that several regions map count once.
///
/// For a memfd, mincore(2) shows which pages are missing. The size of the file does not show where
/// its pages are: its sender could allocate pages outside of the regions. Pages in swap also count
/// as missing, and so do pages that were allocated but never written.
///
/// For huge pages and for a mounted tmpfs, the sum is a lower bound. All pages of a file count as
/// pages of the regions.
#[derive(Default)]
pub(super) struct Needed {
    total: u64,
    /// The ranges that the regions of each file map.
    files: BTreeMap<FileIdentity, FileRanges>,
}

impl Needed {
    /// Adds the initial bytes of a region, and returns by how much the sum grew.
    ///
    /// `copies` is whether the build copies the pages of a private memfd, which are then in memory
    /// twice.
    pub(super) fn add(&mut self, region: &Region, backing: &OpenedBacking, copies: bool) -> u64 {
        let size = initial_size(region);
        let is_private_memfd = backing.kind == BackingKind::Memfd && !backing.is_shared();
        let copied = if copies && is_private_memfd { size } else { 0 };
        let more = match (backing.identity, &backing.file) {
            (Some(identity), Some((file, start))) if backing.uses_pages_of_file() => {
                let needs = self.files.entry(identity).or_default();
                let before = backing.missing(needs.total());
                let mut added = Vec::new();
                if region.blocks.is_none() {
                    added.append(&mut needs.insert(*start, size));
                }
                for (offset, len) in &region.plugged {
                    let start = start.saturating_add(*offset);
                    added.append(&mut needs.insert(start, *len));
                }
                if backing.kind == BackingKind::Memfd && !backing.own_tmpfs {
                    added.iter().fold(0u64, |sum, range| {
                        let len = range.end.saturating_sub(range.start);
                        let resident = resident_in_file(file, range).unwrap_or(0);
                        sum.saturating_add(len.saturating_sub(resident))
                    })
                } else {
                    backing.missing(needs.total()).saturating_sub(before)
                }
            }
            _ => size,
        };
        let more = more.saturating_add(copied);
        self.total = self.total.saturating_add(more);
        more
    }

    /// Returns the sum.
    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::linux::files::open;
    use crate::host::HostResources;
    use crate::region::{Backing, Unplugged};
    use std::fs::File;
    use std::num::NonZeroU64;
    use std::os::unix::fs::FileExt;
    use test_support::PAGE_U64 as PAGE;
    use vm_memory::GuestAddress;

    /// Returns the sum for `regions`.
    fn needed(regions: Vec<Region>) -> u64 {
        needed_with(regions, false)
    }

    fn needed_with(regions: Vec<Region>, copies: bool) -> u64 {
        let host = HostResources::current();
        let mut needed = Needed::default();
        for region in regions {
            let backing = open(&region, &host).unwrap();
            needed.add(&region, &backing, copies);
        }
        needed.total()
    }

    #[test]
    fn needed_of_several_regions_subtracts_pages_of_their_file_once() {
        let file = crate::sys::memfd(c"needed", 8 * PAGE, None).unwrap();
        file.write_all_at(&[1; 4 * PAGE as usize], 0).unwrap();
        let region = |page: u64, pages, from: fn(File, u64) -> Backing| {
            let backing = from(file.try_clone().unwrap(), page * PAGE);
            Region::new(GuestAddress(page * PAGE), pages * PAGE).backing(backing)
        };
        let shared = |page, pages| region(page, pages, Backing::shared_file);
        let private = |page, pages| region(page, pages, Backing::private_file);
        assert_eq!(needed(vec![shared(0, 8)]), 4 * PAGE);
        assert_eq!(needed(vec![shared(0, 4), shared(4, 4)]), 4 * PAGE);
        assert_eq!(needed(vec![shared(0, 4)]), 0);
        // Bytes that two regions map need their pages once, also if one of them is private. Copies
        // need their own.
        assert_eq!(needed(vec![shared(0, 6), shared(2, 6)]), 4 * PAGE);
        let both = vec![shared(0, 8), private(0, 8)];
        assert_eq!(needed(both.clone()), 4 * PAGE);
        assert_eq!(needed_with(both, true), 12 * PAGE);
        assert_eq!(needed(vec![private(0, 4)]), 0);
        let other = Region::new(GuestAddress(0), 8 * PAGE).backing(Backing::Memfd);
        assert_eq!(needed(vec![shared(0, 8), other]), 12 * PAGE);
        let block = NonZeroU64::new(PAGE).unwrap();
        let mut blocks = shared(0, 8).blocks(block, Unplugged::Mapped);
        blocks.plugged = vec![(0, PAGE), (2 * PAGE, 4 * PAGE)];
        assert_eq!(needed(vec![blocks]), 2 * PAGE);
        // Allocated pages outside of a region, also past the end of the file, do not help it.
        assert_eq!(needed(vec![shared(4, 4)]), 4 * PAGE);
        crate::sys::allocate_range(&file, 8 * PAGE, 8 * PAGE).unwrap();
        assert_eq!(needed(vec![shared(0, 8)]), 4 * PAGE);
    }
}
