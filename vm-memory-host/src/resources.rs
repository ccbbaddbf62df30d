//! What the machine has: huge pages, NUMA nodes, and how it is set, by /sys.

use std::fs;
use std::path::{Path, PathBuf};

use crate::sys;

/// Where the kernel tells of the host. Tests put trees of their own there.
#[derive(Clone, Debug)]
pub(crate) struct HostResources {
    sys: PathBuf,
    proc: PathBuf,
}

/// A pool of huge pages of one size, counted in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePagePool {
    /// The size of a page in bytes.
    pub page_size: u64,
    /// How many there are.
    pub total: u64,
    /// How many of those nobody has, and nobody was promised.
    pub free: u64,
    /// How many more the kernel may make when they are asked for.
    pub overcommit: u64,
}

/// Returns the pools of huge pages that the machine has, by the size of their pages (Linux, "HugeTLB Pages").
///
/// ```
/// for pool in vm_memory_host::huge_page_pools() {
///     println!("{} KiB: {} of {} free", pool.page_size >> 10, pool.free, pool.total);
/// }
/// ```
pub fn huge_page_pools() -> Vec<HugePagePool> {
    HostResources::current().pools()
}

impl HostResources {
    /// This one.
    pub(crate) fn current() -> Self {
        Self {
            sys: PathBuf::from("/sys"),
            proc: PathBuf::from("/proc"),
        }
    }

    /// A machine as a tree of files tells it.
    #[cfg(test)]
    pub(crate) fn at(sys: &Path) -> Self {
        Self {
            sys: sys.to_owned(),
            proc: sys.join("proc"),
        }
    }

    pub(crate) fn pools(&self) -> Vec<HugePagePool> {
        let directory = self.sys.join("kernel/mm/hugepages");
        let Ok(entries) = fs::read_dir(directory) else {
            return Vec::new();
        };
        let mut pools: Vec<_> = entries
            .filter_map(|entry| pool(&entry.ok()?.path()))
            .collect();
        pools.sort_by_key(|pool| pool.page_size);
        pools
    }

    /// The pool of huge pages of this size on one node.
    pub(crate) fn pool_of_node(&self, node: u32, page_size: u64) -> Option<HugePagePool> {
        let kib = page_size.checked_div(1024)?;
        let path = format!("devices/system/node/node{node}/hugepages/hugepages-{kib}kB");
        pool(&self.sys.join(path))
    }

    /// The nodes that have memory. A kernel without NUMA has node 0.
    pub(crate) fn nodes(&self) -> Vec<u32> {
        let path = self.sys.join("devices/system/node/has_memory");
        fs::read_to_string(path).map_or_else(|_| vec![0], |text| numbers(&text))
    }

    /// The file that says whether there are transparent huge pages for this kind of memory, and the word in it that holds, if that is a refusal.
    pub(crate) fn transparent_huge_pages_refused(&self, shared: bool) -> Option<(String, String)> {
        let directory = self.sys.join("kernel/mm/transparent_hugepage");
        let name = if shared { "shmem_enabled" } else { "enabled" };
        let kib = number(&directory.join("hpage_pmd_size"))
            .unwrap_or(0)
            .checked_div(1024)?;
        // The setting of this size comes first, where the kernel has one (6.8), unless it leaves it to the one of all sizes.
        let of_size = directory.join(format!("hugepages-{kib}kB")).join(name);
        let refusal = |path: PathBuf| match chosen(&path) {
            None => Some((path.display().to_string(), "missing".to_owned())),
            Some(word) if matches!(word.as_str(), "never" | "deny") => {
                Some((path.display().to_string(), word))
            }
            Some(_) => None,
        };
        match chosen(&of_size).as_deref() {
            None | Some("inherit") => refusal(directory.join(name)),
            Some(_) => refusal(of_size),
        }
    }

    /// How many bytes of memory the system can give, as far as it says: what is not used or can be had from caches, and what can be swapped out; and no
    /// more than the control groups of the process may have in all (Linux, "Control Group v2", `memory.max`).
    pub(crate) fn available_memory(&self) -> Option<u64> {
        let available = self.memory("MemAvailable", "SwapFree")?;
        let groups = fs::read_to_string(self.proc.join("self/cgroup")).unwrap_or_default();
        let group = groups
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or("");
        let root = self.sys.join("fs/cgroup");
        let directory = root.join(group);
        let limits = directory
            .ancestors()
            .take_while(|directory| directory.starts_with(&root))
            .filter_map(|directory| number(&directory.join("memory.max")));
        Some(limits.fold(available, u64::min))
    }

    /// How many bytes of memory and swap there are in all.
    pub(crate) fn all_memory(&self) -> Option<u64> {
        self.memory("MemTotal", "SwapTotal")
    }

    /// What proc_meminfo(5) says of memory and of swap, together, in bytes.
    fn memory(&self, of_memory: &str, of_swap: &str) -> Option<u64> {
        let text = fs::read_to_string(self.proc.join("meminfo")).ok()?;
        let of = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(of(of_memory)?.saturating_add(of(of_swap).unwrap_or(0)))
    }

    /// The size of a transparent huge page in bytes, if there are some.
    pub(crate) fn transparent_huge_page(&self) -> Option<u64> {
        number(
            &self
                .sys
                .join("kernel/mm/transparent_hugepage/hpage_pmd_size"),
        )
        .filter(|size| size.is_power_of_two() && *size >= sys::page_size_u64())
    }
}

/// A pool, by its directory, whose name tells the size of its pages.
fn pool(directory: &Path) -> Option<HugePagePool> {
    let name = directory.file_name()?.to_str()?;
    let kib: u64 = name
        .strip_prefix("hugepages-")?
        .strip_suffix("kB")?
        .parse()
        .ok()?;
    let count = |name: &str| number(&directory.join(name)).unwrap_or(0);
    let total = number(&directory.join("nr_hugepages"))?;
    let surplus = count("surplus_hugepages");
    Some(HugePagePool {
        page_size: kib.checked_mul(1024)?,
        total,
        free: count("free_hugepages").saturating_sub(count("resv_hugepages")),
        overcommit: count("nr_overcommit_hugepages").saturating_sub(surplus),
    })
}

pub(crate) fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The word in brackets: `always [madvise] never`.
fn chosen(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

/// Numbers and ranges of them: `0-1,4`. A file that is none of the kernel's does not make a list without end.
fn numbers(text: &str) -> Vec<u32> {
    let mut all = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            all.extend((first..=last).take(4096));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, HostResources) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = HostResources::at(directory.path());
        (directory, host)
    }

    #[test]
    fn pools_are_read_by_size() {
        let (_keep, host) = tree(&[
            (
                "kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
                "1\n",
            ),
            ("kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "20\n"),
            (
                "kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
                "12\n",
            ),
            ("kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "5\n"),
            (
                "kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages",
                "3\n",
            ),
            (
                "kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages",
                "1\n",
            ),
            ("kernel/mm/hugepages/nonsense/nr_hugepages", "1\n"),
        ]);
        let pools = host.pools();
        assert_eq!(
            pools.iter().map(|pool| pool.page_size).collect::<Vec<_>>(),
            [2 << 20, 1 << 30]
        );
        let of_2_mib = HugePagePool {
            page_size: 2 << 20,
            total: 20,
            free: 7,
            overcommit: 2,
        };
        assert_eq!(pools[0], of_2_mib);
        assert!(host.pool_of_node(0, 2 << 20).is_none());
    }

    #[test]
    fn memory_is_what_can_be_had_within_the_limits() {
        let meminfo = (
            "proc/meminfo",
            "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:    300 kB\nSwapFree: 100 kB\n",
        );
        let group = ("proc/self/cgroup", "1:cpu:/other\n0::/vms/one\n");
        let max = |path: &'static str, max: &'static str| (path, max);
        let available = |files: &[(&str, &str)]| tree(files).1.available_memory();
        assert_eq!(available(&[]), None);
        assert_eq!(available(&[meminfo]), Some(400 << 10));
        let (above, own) = ("sys/unused", "fs/cgroup/vms/one/memory.max");
        assert_eq!(
            available(&[meminfo, group, max(above, "1"), max(own, "max\n")]),
            Some(400 << 10)
        );
        let limit = max("fs/cgroup/vms/memory.max", "4096\n");
        assert_eq!(
            available(&[meminfo, group, limit, max(own, "8192")]),
            Some(4096)
        );
        assert!(HostResources::current()
            .available_memory()
            .is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn nodes_are_a_list_with_ranges() {
        let (_keep, host) = tree(&[("devices/system/node/has_memory", "0-2,5\n")]);
        assert_eq!(host.nodes(), [0, 1, 2, 5]);
        let (_keep, without) = tree(&[]);
        assert_eq!(without.nodes(), [0]);
        assert_eq!(numbers("0-4294967295").len(), 4096);
        assert!(numbers("\n").is_empty());
    }

    #[test]
    fn a_setting_of_one_size_comes_before_the_one_of_all() {
        let all = "kernel/mm/transparent_hugepage/enabled";
        let size = ("kernel/mm/transparent_hugepage/hpage_pmd_size", "2097152\n");
        let of_size = "kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";
        let refused = |files: &[(&str, &str)]| {
            let (_keep, host) = tree(files);
            host.transparent_huge_pages_refused(false)
                .map(|(_, word)| word)
        };
        assert_eq!(refused(&[size, (all, "always [madvise] never")]), None);
        assert_eq!(
            refused(&[size, (all, "always madvise [never]")]),
            Some("never".into())
        );
        let inherit = (of_size, "always [inherit] madvise never");
        assert_eq!(
            refused(&[size, (all, "always madvise [never]"), inherit]),
            Some("never".into())
        );
        let on = (of_size, "[always] inherit madvise never");
        assert_eq!(refused(&[size, (all, "always madvise [never]"), on]), None);
        assert_eq!(refused(&[size]), Some("missing".into()));
    }
}
