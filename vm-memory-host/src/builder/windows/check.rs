//! The checks of a request that depend on Windows.

use vm_memory::fault;

use crate::builder::check::distinct_nodes;
use crate::error::BuildError;
use crate::region::{Backing, Lock, NumaPolicy, Region, Sharing, TransparentHugePages, Unplugged};
use crate::sys;

/// Checks the options of a region.
pub(super) fn options(region: &Region) -> Result<(), BuildError> {
    missing(region)?;
    conflicts(region)?;
    nodes(region)
}

/// Checks that Windows has what a region requests.
fn missing(region: &Region) -> Result<(), BuildError> {
    let options = &region.options;
    let is_file = matches!(region.backing, Backing::File { .. });
    let is_private_file = matches!(
        region.backing,
        Backing::File {
            sharing: Sharing::Private,
            ..
        }
    );
    let missing = [
        (
            matches!(region.backing, Backing::Memfd),
            "Windows has no memfd; use Backing::Anonymous, or Backing::shared_file with a file \
            that other processes open",
        ),
        (
            is_private_file,
            "private mappings of files are not supported on Windows; use Backing::shared_file, or \
            read the file into anonymous memory",
        ),
        (
            options.transparent_huge_pages == TransparentHugePages::On,
            "Windows has no transparent huge pages; use Backing::Hugetlb, or \
            TransparentHugePages::Leave",
        ),
        (
            matches!(
                options.numa,
                NumaPolicy::Bind(_) | NumaPolicy::Interleave(_)
            ),
            "Windows can only prefer a NUMA node; use NumaPolicy::Preferred or NumaPolicy::Inherit",
        ),
        (
            is_file && options.numa != NumaPolicy::Inherit,
            "a NUMA policy has no effect on the pages of a file; use NumaPolicy::Inherit",
        ),
        (
            options.lock == Lock::OnFault,
            "Windows cannot lock a page on its first use; use Lock::Now or Lock::No",
        ),
        (
            options.mergeable,
            "Windows does not merge pages on request; do not set mergeable",
        ),
        (
            !options.core_dump,
            "regions cannot be excluded from dumps on Windows; do not set core_dump, and choose \
            the contents where the dump is written",
        ),
        (
            options.require_name,
            "Windows has no names of regions; do not require one",
        ),
        (
            options.sealed,
            "Windows has no seals; do not set sealed: a mapped local file cannot be truncated",
        ),
        (
            options.release_huge_pages,
            "Windows cannot release large pages of a region; do not set release_huge_pages",
        ),
    ];
    find(region, &missing)
}

/// Checks that the options of a region do not contradict its backing or each other.
fn conflicts(region: &Region) -> Result<(), BuildError> {
    let options = &region.options;
    let is_anonymous = matches!(region.backing, Backing::Anonymous);
    let is_file = matches!(region.backing, Backing::File { .. });
    let has_blocks = region.blocks.is_some();
    let is_mapped_unplugged = region
        .blocks
        .is_some_and(|blocks| blocks.unplugged == Unplugged::Mapped);
    let conflicts = [
        (
            options.read_only && !is_file,
            "read-only memory needs a file that has its bytes; use Backing::shared_file",
        ),
        (
            has_blocks && !is_anonymous,
            "blocks need anonymous memory on Windows, which can be committed in parts; use \
            Backing::Anonymous",
        ),
        (
            has_blocks && options.lock != Lock::No,
            "unplugged blocks cannot be locked; use Lock::No",
        ),
        (
            options.reserve && (!is_anonymous || has_blocks),
            "only anonymous memory without blocks can be reserved; do not reserve the region",
        ),
        (
            is_mapped_unplugged,
            "unplugged blocks are not committed on Windows, and cannot be accessed; use \
            Unplugged::Protected",
        ),
        (
            has_blocks && !fault::is_installed(),
            "a device that accesses a block while the guest unplugs it could end the process; \
            call vm_memory::fault::install first",
        ),
    ];
    find(region, &conflicts)
}

/// Returns an error for the first conflict that a region has.
fn find(region: &Region, conflicts: &[(bool, &'static str)]) -> Result<(), BuildError> {
    match conflicts.iter().find(|(is_conflict, _)| *is_conflict) {
        Some((_, what)) => Err(BuildError::Conflict {
            region: region.span(),
            what,
        }),
        None => Ok(()),
    }
}

/// Checks that the preferred NUMA node of a region exists.
fn nodes(region: &Region) -> Result<(), BuildError> {
    distinct_nodes(&region.options.numa, region.span())?;
    let highest = sys::highest_node();
    match preferred_node(region) {
        Some(node) if node > highest => Err(BuildError::NoSuchNode {
            region: region.span(),
            node,
            available: (0..=highest).collect(),
        }),
        _ => Ok(()),
    }
}

/// Returns the NUMA node that a region prefers.
pub(super) fn preferred_node(region: &Region) -> Option<u32> {
    match region.options.numa {
        NumaPolicy::Preferred(node) => Some(node),
        _ => None,
    }
}
