//! The options of a region, applied to its memory.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;

use crate::mapping::HostMapping;
use crate::region::{BackingKind, Lock, NumaPolicy, TransparentHugePages};
use crate::sys::{Advice, Mapped, NodePolicy, READ_WRITE};

impl HostMapping {
    /// Applies all options except locking and the name to a range. An error names the operation.
    pub(crate) fn apply_options(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<(), (&'static str, io::Error)> {
        self.apply_advice_to(&self.mapped, offset, len)?;
        let bound = self.apply_numa_to(&self.mapped, offset, len);
        bound.map_err(|error| ("set its NUMA policy", error))
    }

    /// Applies the same advice to a range of `memory`, which will become a part of this mapping.
    pub(crate) fn apply_advice_to(
        &self,
        memory: &Mapped,
        offset: usize,
        len: usize,
    ) -> Result<(), (&'static str, io::Error)> {
        let options = &self.options;
        let all_advice = [
            (
                options.transparent_huge_pages == TransparentHugePages::On,
                Advice::HugePages,
                "enable transparent huge pages",
            ),
            (
                options.transparent_huge_pages == TransparentHugePages::Off,
                Advice::NoHugePages,
                "disable transparent huge pages",
            ),
            (
                options.mergeable,
                Advice::Mergeable,
                "enable merging of its pages",
            ),
            (
                !options.core_dump,
                Advice::NoDump,
                "exclude it from core dumps",
            ),
            (
                !options.forked,
                Advice::NoFork,
                "exclude it from child processes",
            ),
        ];
        for (_, advice, what) in all_advice.into_iter().filter(|(wanted, ..)| *wanted) {
            match memory.advise(offset, len, advice) {
                // The kernel has no transparent huge pages. A jail without /sys cannot find out.
                Err(error)
                    if advice == Advice::NoHugePages
                        && error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result.map_err(|error| (what, error))?,
            }
        }
        Ok(())
    }

    /// Applies the NUMA policy of this mapping to a range of `memory`.
    pub(crate) fn apply_numa_to(
        &self,
        memory: &Mapped,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        match node_mask(&self.options.numa)? {
            Some((policy, mask)) => memory.bind(offset, len, policy, &mask),
            None => Ok(()),
        }
    }

    /// Locks a range in memory.
    ///
    /// The kernel does not swap huge pages. `MLOCK_ONFAULT` would populate them instead, also in
    /// unplugged blocks.
    pub(crate) fn apply_lock(&self, offset: usize, len: usize, lock: Lock) -> io::Result<()> {
        match lock {
            Lock::No => Ok(()),
            Lock::OnFault if self.kind() == BackingKind::Hugetlb => Ok(()),
            Lock::Now => self.mapped.lock(offset, len, false),
            Lock::OnFault => self.mapped.lock(offset, len, true),
        }
    }

    /// Names a range in /proc/self/maps, unless the kernel shows its file there.
    pub(crate) fn apply_name(&self, offset: usize, len: usize) -> io::Result<()> {
        match &self.options.name {
            Some(name) if self.backing.file.is_none() => {
                let name = std::ffi::CString::new(name.as_str())?;
                self.mapped.set_name(offset, len, &name)
            }
            _ => Ok(()),
        }
    }

    /// States the protection and the flags of the mapping to vm-memory.
    pub(crate) fn describe_to<B: Bitmap>(
        &self,
        builder: MmapRegionBuilder<B>,
    ) -> MmapRegionBuilder<B> {
        let sharing = if self.backing.is_shared() {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let anonymous = match self.backing.file {
            Some(_) => 0,
            None => libc::MAP_ANONYMOUS,
        };
        let reserve = if self.options.reserve {
            0
        } else {
            libc::MAP_NORESERVE
        };
        let protection = if self.options.read_only {
            libc::PROT_READ
        } else {
            READ_WRITE
        };
        builder
            .with_mmap_prot(protection)
            .with_mmap_flags(sharing | anonymous | reserve)
            .with_hugetlbfs(self.backing.kind == BackingKind::Hugetlb)
    }
}

/// The number of nodes that a mask can have. mbind(2) refuses a mask of more than a page.
const MAX_NODES: u32 = 8 * 4096;

/// Returns the kernel's policy and a mask of nodes, or `None` for [`NumaPolicy::Inherit`].
///
/// Fails with `EINVAL` for a node that no kernel has. Without /sys and /proc, the builder does not
/// know the nodes, and an untrusted description may name any.
fn node_mask(policy: &NumaPolicy) -> io::Result<Option<(NodePolicy, Vec<u64>)>> {
    let (policy, nodes) = match policy {
        NumaPolicy::Inherit => return Ok(None),
        NumaPolicy::Bind(nodes) => (NodePolicy::Bind, nodes.as_slice()),
        NumaPolicy::Preferred(node) => (NodePolicy::Preferred, std::slice::from_ref(node)),
        NumaPolicy::Interleave(nodes) => (NodePolicy::Interleave, nodes.as_slice()),
    };
    let mut mask: Vec<u64> = Vec::new();
    for node in nodes {
        if *node >= MAX_NODES {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let word = usize::try_from(node / 64).unwrap_or(0);
        if mask.len() <= word {
            mask.resize(word.saturating_add(1), 0);
        }
        if let Some(bits) = mask.get_mut(word) {
            *bits |= 1u64 << (node % 64);
        }
    }
    Ok(Some((policy, mask)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_mask_has_a_bit_for_each_node() {
        let mask = |policy| node_mask(&policy).unwrap();
        assert_eq!(mask(NumaPolicy::Inherit), None);
        let bind = mask(NumaPolicy::Bind(vec![0, 65]));
        assert_eq!(bind, Some((NodePolicy::Bind, vec![1, 2])));
        let preferred = mask(NumaPolicy::Preferred(3));
        assert_eq!(preferred, Some((NodePolicy::Preferred, vec![8])));
    }

    #[test]
    fn node_mask_of_node_above_all_kernels_returns_error() {
        for node in [MAX_NODES, u32::MAX] {
            let error = node_mask(&NumaPolicy::Interleave(vec![0, node])).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
        let last = node_mask(&NumaPolicy::Preferred(MAX_NODES - 1)).unwrap();
        assert_eq!(last.unwrap().1.len(), 512);
    }
}
