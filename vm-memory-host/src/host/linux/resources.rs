//! [`HostResources`]: the resources of the host, read from /sys and /proc.
//!
//! Jailed processes may lack /sys and /proc. A missing file is not an error: the resource then
//! counts as absent or unlimited, and the kernel decides.

use std::fmt;
use std::path::{Path, PathBuf};

use super::files::SystemFiles;
use crate::host::read_vma_limit;

/// The resources of the host: pools of huge pages, NUMA nodes, memory, control groups.
///
/// A build compares the request with the resources, and its errors name the limit. It reads them
/// from /sys and /proc. A process that enters a chroot may lose access to these files. It can
/// [`read`](Self::read) the resources before, and pass them to the builder
/// ([`MemoryBuilder::host_resources`]).
///
/// A build does not require them. If a limit is not known, the kernel enforces it:
///
/// - For huge pages, NUMA nodes and addresses, the build returns an error of the kernel, whose
///   remedy is less precise.
/// - For a limit that a control group sets on huge pages, an access above it raises SIGBUS.
///   [`MemoryBuilder::prefault`] populates all pages during the build, and returns an error
///   instead.
/// - If memory runs out, the OOM killer of the kernel ends a process, even during a prefault.
///
/// The memory that is built is the same in all cases.
///
/// Clones share what they have read, under a lock. If another thread uses a clone during a fork(2),
/// the lock stays taken in the child. So a child reads its own resources.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{HostResources, MemoryBuilder, Region};
///
/// let host = HostResources::read();
/// // Here the process enters its jail.
/// let region = Region::new(GuestAddress(0), 16 << 20);
/// let builder = MemoryBuilder::new().host_resources(host).region(region);
/// let memory: GuestMemoryMmap = builder.build()?;
/// # Ok::<(), vm_memory_host::BuildError>(())
/// ```
///
/// [`MemoryBuilder::host_resources`]: crate::MemoryBuilder::host_resources
/// [`MemoryBuilder::prefault`]: crate::MemoryBuilder::prefault
#[derive(Clone)]
#[doc(alias = "jail")]
#[doc(alias = "chroot")]
#[doc(alias = "landlock")]
pub struct HostResources {
    files: SystemFiles,
}

impl fmt::Debug for HostResources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostResources").finish_non_exhaustive()
    }
}

/// A pool of huge pages of one size. Counts are in pages.
///
/// # Examples
///
/// ```
/// use vm_memory_host::HugePagePool;
///
/// let has_room = |pool: &HugePagePool, pages| pool.free + pool.overcommit >= pages;
/// let mut pool = HugePagePool::default();
/// (pool.page_size, pool.total, pool.free) = (2 << 20, 8, 3);
/// assert!(has_room(&pool, 3) && !has_room(&pool, 4));
/// ```
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
#[doc(alias = "hugetlb")]
pub struct HugePagePool {
    /// The size of a page in bytes.
    pub page_size: u64,
    /// The number of pages in the pool.
    pub total: u64,
    /// The number of pages that are neither used nor reserved.
    pub free: u64,
    /// The number of pages by which the kernel may extend the pool on demand.
    pub overcommit: u64,
}

/// Returns the host's pools of huge pages, ordered by page size (Linux, "HugeTLB Pages").
///
/// The list is empty if the kernel has no huge pages or /sys is not mounted.
///
/// # Examples
///
/// ```
/// for pool in vm_memory_host::huge_page_pools() {
///     println!("{} KiB: {} of {} free", pool.page_size >> 10, pool.free, pool.total);
/// }
/// ```
#[doc(alias = "nr_hugepages")]
#[doc(alias = "hugetlb")]
pub fn huge_page_pools() -> Vec<HugePagePool> {
    HostResources::current().huge_page_pools()
}

impl HostResources {
    /// Reads all resources of this host now. No file is read later.
    ///
    /// Some numbers change, such as the number of free huge pages. Call this function again for the
    /// current numbers.
    pub fn read() -> Self {
        let host = Self::current();
        host.read_all();
        host
    }

    /// Returns the resources of this host. Each file is read when it is first needed.
    pub(crate) fn current() -> Self {
        let files = SystemFiles::new("/sys", "/proc");
        Self { files }
    }

    /// Returns the resources that a tree of files describes, with `proc` inside `sys`.
    #[cfg(test)]
    pub(crate) fn at(sys: &Path) -> Self {
        let files = SystemFiles::new(sys, sys.join("proc"));
        Self { files }
    }

    /// Returns the current resources, to explain an error.
    pub(crate) fn again(&self) -> Self {
        let files = self.files.again();
        Self { files }
    }

    /// Reads all files that the other methods read. The other methods then read no file.
    fn read_all(&self) {
        // The process keeps this limit.
        read_vma_limit(self);
        let sizes = self.huge_page_sizes().unwrap_or_default();
        let _ = (self.huge_page_pools(), self.allowed_nodes());
        for node in self.nodes().unwrap_or_default() {
            let _ = self.cpus_of_nodes(&[node]);
            for size in &sizes {
                let _ = self.pool_of_node(node, *size);
            }
        }
        for shared in [false, true] {
            let _ = self.transparent_huge_pages_refused(shared);
        }
        let _ = (self.total_memory(), self.memory_limit());
        for size in sizes {
            let _ = self.huge_page_limit(size, true);
        }
        self.files.close();
    }

    pub(super) fn files(&self) -> &SystemFiles {
        &self.files
    }

    /// Returns the pools of huge pages, ordered by page size, as they were when they were read.
    ///
    /// The list is empty if the kernel has no huge pages or /sys was not mounted.
    ///
    /// # Examples
    ///
    /// Choose the backing before the process enters its jail, and reserve the pages later:
    ///
    /// ```no_run
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, HostResources, HugePagePool, MemoryBuilder, Region};
    ///
    /// let host = HostResources::read();
    /// let size = 16 << 20;
    /// let mut region = Region::new(GuestAddress(0), size);
    /// let has_room = |pool: &&HugePagePool| {
    ///     pool.page_size <= 2 << 20 && pool.free * pool.page_size >= size
    /// };
    /// if let Some(pool) = host.huge_page_pools().iter().rev().find(has_room) {
    ///     region = region.backing(Backing::Hugetlb { page_size: pool.page_size });
    /// }
    /// let builder = MemoryBuilder::new().host_resources(host).region(region);
    /// let memory: GuestMemoryMmap = builder.build()?;
    /// # Ok::<(), vm_memory_host::BuildError>(())
    /// ```
    #[doc(alias = "nr_hugepages")]
    #[doc(alias = "hugetlb")]
    #[must_use]
    pub fn huge_page_pools(&self) -> Vec<HugePagePool> {
        let directory = self.sys().join("kernel/mm/hugepages");
        let directories = self.files.list(&directory).unwrap_or_default();
        let pools = directories.iter().filter_map(|path| self.pool(path));
        let mut pools: Vec<_> = pools.collect();
        pools.sort_by_key(|pool| pool.page_size);
        pools
    }

    /// Reads a pool from its directory. Returns `None` if its pages cannot be counted.
    fn pool(&self, directory: &Path) -> Option<HugePagePool> {
        let page_size = page_size_of(directory)?;
        let number = |name: &str| self.files.number(&directory.join(name));
        let count = |name: &str| number(name).unwrap_or(0);
        let total = number("nr_hugepages")?;
        let free = number("free_hugepages")?;
        let surplus = count("surplus_hugepages");
        Some(HugePagePool {
            page_size,
            total,
            free: free.saturating_sub(count("resv_hugepages")),
            overcommit: count("nr_overcommit_hugepages").saturating_sub(surplus),
        })
    }

    /// Returns the pool of one NUMA node.
    pub(crate) fn pool_of_node(&self, node: u32, page_size: u64) -> Option<HugePagePool> {
        let kib = page_size.checked_div(1024)?;
        let path = format!("devices/system/node/node{node}/hugepages/hugepages-{kib}kB");
        self.pool(&self.sys().join(path))
    }

    /// Returns the number of VMAs that a process may have, or `None` if it is not known.
    pub(in crate::host) fn max_map_count(&self) -> Option<u64> {
        self.files.number(&self.proc().join("sys/vm/max_map_count"))
    }

    /// Returns the sizes of the huge pages that the kernel supports, or `None` if they are not
    /// known.
    pub(crate) fn huge_page_sizes(&self) -> Option<Vec<u64>> {
        let directories = self.files.list(&self.sys().join("kernel/mm/hugepages"))?;
        let sizes = directories.iter().filter_map(|path| page_size_of(path));
        let mut sizes: Vec<_> = sizes.collect();
        sizes.sort_unstable();
        Some(sizes)
    }

    /// Returns the NUMA nodes that have memory, or `None` if they are not known.
    pub(crate) fn nodes(&self) -> Option<Vec<u32>> {
        let path = self.sys().join("devices/system/node/has_memory");
        let text = self.files.text(&path)?;
        Some(numbers(&text))
    }

    /// Returns the nodes whose memory this process may use, or `None` if that is not known.
    ///
    /// The cpuset of the process limits them (proc_pid_status(5), `Mems_allowed_list`).
    pub(crate) fn allowed_nodes(&self) -> Option<Vec<u32>> {
        let status = self.files.text(&self.proc().join("thread-self/status"))?;
        let mut lines = status.lines();
        let list = lines.find_map(|line| line.strip_prefix("Mems_allowed_list:"))?;
        Some(numbers(list))
    }

    /// Returns the number of free huge pages on nodes, at most as many as all pools have.
    ///
    /// An empty list stands for all nodes whose memory this process may use. Returns `None` if the
    /// number is not known.
    pub(crate) fn free_huge_pages(&self, page_size: u64, nodes: &[u32]) -> Option<u64> {
        let pools = self.huge_page_pools();
        let pool = pools.iter().find(|pool| pool.page_size == page_size);
        let free = pool?.free;
        let Some(all) = self.nodes() else {
            return Some(free);
        };
        let allowed = self.allowed_nodes().unwrap_or_else(|| all.clone());
        let is_usable =
            |node: &&u32| allowed.contains(node) && (nodes.is_empty() || nodes.contains(node));
        let usable: Vec<u32> = all.iter().filter(is_usable).copied().collect();
        if usable.len() == all.len() {
            return Some(free);
        }
        // The kernel reserves pages without a node, so some of these may be reserved.
        let mut on_nodes = 0u64;
        for node in usable {
            on_nodes = on_nodes.saturating_add(self.pool_of_node(node, page_size)?.free);
        }
        Some(on_nodes.min(free))
    }

    /// Returns the CPUs of NUMA nodes, or `None` if one of the nodes is unknown.
    pub(crate) fn cpus_of_nodes(&self, nodes: &[u32]) -> Option<Vec<u32>> {
        let mut all = Vec::new();
        for node in nodes {
            let path = format!("devices/system/node/node{node}/cpulist");
            let list = self.files.text(&self.sys().join(path))?;
            all.append(&mut numbers(&list));
        }
        Some(all)
    }

    /// Returns the file and the setting that disable transparent huge pages, if one does.
    ///
    /// `shared` selects the setting for shared memory or the one for private memory.
    pub(crate) fn transparent_huge_pages_refused(&self, shared: bool) -> Option<(String, String)> {
        let directory = self.sys().join("kernel/mm/transparent_hugepage");
        let name = if shared { "shmem_enabled" } else { "enabled" };
        let size = self.files.number(&directory.join("hpage_pmd_size"));
        let kib = size.unwrap_or(0).checked_div(1024)?;
        // The setting of the page size (Linux 6.8) wins, unless it is `inherit`.
        let of_size = directory.join(format!("hugepages-{kib}kB")).join(name);
        let selected = |path: &Path| selected(&self.files.text(path)?);
        let refusal = |path: PathBuf| match selected(&path) {
            // A kernel without them has no such file, and a jail may hide it. madvise(2) reports
            // such a kernel.
            None => None,
            Some(word) if matches!(word.as_str(), "never" | "deny") => {
                Some((path.display().to_string(), word))
            }
            Some(_) => None,
        };
        match selected(&of_size).as_deref() {
            None | Some("inherit") => refusal(directory.join(name)),
            Some(_) => refusal(of_size),
        }
    }

    /// Returns the number of available bytes, or `None` if the kernel does not report it.
    ///
    /// This is the memory that is free or reclaimable, plus the free swap.
    pub(crate) fn available_memory(&self) -> Option<u64> {
        self.meminfo("MemAvailable", "SwapFree")
    }

    /// Returns the number of bytes of free swap.
    pub(crate) fn free_swap(&self) -> u64 {
        self.meminfo("SwapFree", "").unwrap_or(0)
    }

    pub(crate) fn sys(&self) -> &Path {
        self.files.sys()
    }

    pub(crate) fn proc(&self) -> &Path {
        self.files.proc()
    }

    /// Returns the size of memory and swap in bytes, or `None` if the kernel does not report it.
    pub(crate) fn total_memory(&self) -> Option<u64> {
        self.meminfo("MemTotal", "SwapTotal")
    }

    /// Returns the sum of two fields of proc_meminfo(5) in bytes. `swap` may be missing.
    pub(crate) fn meminfo(&self, memory: &str, swap: &str) -> Option<u64> {
        let text = self.files.text(&self.proc().join("meminfo"))?;
        let field = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(field(memory)?.saturating_add(field(swap).unwrap_or(0)))
    }
}

/// Returns the page size of a pool, which the name of its directory contains.
fn page_size_of(directory: &Path) -> Option<u64> {
    let name = directory.file_name()?.to_str()?;
    let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
    kib.parse::<u64>().ok()?.checked_mul(1024)
}

/// Returns the word in brackets of a text such as `always [madvise] never`.
fn selected(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

/// Parses a list such as `0-1,4`. Each range is limited to 4096 numbers.
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
pub(crate) mod tests {
    use std::fs;

    use super::*;

    /// Creates files with these paths and texts, and returns the resources of a host with them.
    pub(crate) fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, HostResources) {
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
    fn pools_are_ordered_by_page_size() {
        let (_keep, host) = tree(&[
            (
                "kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
                "1\n",
            ),
            (
                "kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
                "1\n",
            ),
            ("kernel/mm/hugepages/hugepages-64kB/nr_hugepages", "1\n"),
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
        let pools = host.huge_page_pools();
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
        // The free pages of one pool cannot be read.
        assert_eq!(
            host.huge_page_sizes(),
            Some(vec![64 << 10, 2 << 20, 1 << 30])
        );
        assert_eq!(host.free_huge_pages(64 << 10, &[]), None);
        assert!(host.pool_of_node(0, 2 << 20).is_none());
    }

    #[test]
    fn available_memory_includes_free_swap() {
        let meminfo = (
            "proc/meminfo",
            "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:    300 kB\nSwapFree: 100 kB\n",
        );
        let available = |files: &[(&str, &str)]| tree(files).1.available_memory();
        assert_eq!(available(&[]), None);
        assert_eq!(available(&[meminfo]), Some(400 << 10));
        assert!(HostResources::current()
            .available_memory()
            .is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn free_huge_pages_counts_nodes_that_the_process_may_use() {
        let count = |node: u32, name: &str| {
            let directory = format!("devices/system/node/node{node}/hugepages/hugepages-2048kB");
            format!("{directory}/{name}")
        };
        let pool = "kernel/mm/hugepages/hugepages-2048kB";
        let files = [
            (format!("{pool}/nr_hugepages"), "20"),
            (format!("{pool}/free_hugepages"), "12"),
            (format!("{pool}/resv_hugepages"), "4"),
            ("devices/system/node/has_memory".into(), "0-2"),
            (
                "proc/thread-self/status".into(),
                "Name: a\nMems_allowed_list:\t0-1\n",
            ),
            (count(0, "nr_hugepages"), "5"),
            (count(0, "free_hugepages"), "1"),
            (count(1, "nr_hugepages"), "5"),
            (count(1, "free_hugepages"), "2"),
            (count(2, "nr_hugepages"), "10"),
            (count(2, "free_hugepages"), "9"),
        ];
        let files: Vec<(&str, &str)> = files.iter().map(|(p, text)| (p.as_str(), *text)).collect();
        let (_keep, host) = tree(&files);
        assert_eq!(host.free_huge_pages(2 << 20, &[]), Some(3));
        assert_eq!(host.free_huge_pages(2 << 20, &[1]), Some(2));
        assert_eq!(host.free_huge_pages(2 << 20, &[2]), Some(0));
        let (_keep, all) = tree(&files[..4]);
        assert_eq!(all.free_huge_pages(2 << 20, &[]), Some(8));
        // The pool of a node cannot be read.
        let (_keep, some) = tree(&files[..files.len() - 4]);
        assert_eq!(some.free_huge_pages(2 << 20, &[]), None);
        assert_eq!(some.free_huge_pages(2 << 20, &[0]), Some(1));
    }

    #[test]
    fn nodes_of_list_with_ranges_are_expanded() {
        let (_keep, host) = tree(&[("devices/system/node/has_memory", "0-2,5\n")]);
        assert_eq!(host.nodes(), Some(vec![0, 1, 2, 5]));
        let (_keep, without) = tree(&[]);
        assert_eq!(without.nodes(), None);
        assert_eq!(numbers("0-4294967295").len(), 4096);
        assert!(numbers("\n").is_empty());
    }

    #[test]
    fn cpus_of_nodes_are_joined_and_missing_nodes_are_unknown() {
        let (_keep, host) = tree(&[
            ("devices/system/node/node0/cpulist", "0-1,8\n"),
            ("devices/system/node/node2/cpulist", "\n"),
            ("devices/system/node/node3/cpulist", "2\n"),
        ]);
        assert_eq!(host.cpus_of_nodes(&[0, 3]), Some(vec![0, 1, 8, 2]));
        assert_eq!(host.cpus_of_nodes(&[2]), Some(vec![]));
        assert_eq!(host.cpus_of_nodes(&[0, 1]), None);
    }

    #[test]
    fn transparent_huge_pages_setting_of_page_size_wins() {
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
        assert_eq!(refused(&[size]), None);
        assert_eq!(refused(&[]), None);
    }

    #[test]
    fn read_all_keeps_the_result_of_each_method() {
        let pool = |directory: &str, count: &'static str| {
            let file = |name| (format!("{directory}/hugepages-2048kB/{name}"), count);
            [file("nr_hugepages"), file("free_hugepages")]
        };
        let mut files = vec![
            ("devices/system/node/has_memory".to_owned(), "0-1"),
            ("devices/system/node/node1/cpulist".into(), "2-3"),
            ("proc/thread-self/status".into(), "Mems_allowed_list:\t1\n"),
            (
                "kernel/mm/transparent_hugepage/shmem_enabled".into(),
                "[never]",
            ),
            (
                "proc/meminfo".into(),
                "MemTotal: 9 kB\nMemAvailable: 8 kB\n",
            ),
            ("proc/thread-self/cgroup".into(), "0::/vm\n"),
            (
                "proc/thread-self/mountinfo".into(),
                "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            ),
            ("fs/cgroup/vm/memory.max".into(), "4096"),
            ("fs/cgroup/vm/memory.current".into(), "96"),
            ("fs/cgroup/vm/hugetlb.2MB.max".into(), "4194304"),
        ];
        files.extend(pool("kernel/mm/hugepages", "7"));
        files.extend(pool("devices/system/node/node1/hugepages", "5"));
        let files: Vec<(&str, &str)> = files.iter().map(|(p, text)| (p.as_str(), *text)).collect();
        let (keep, host) = tree(&files);
        let all = |host: &HostResources| {
            (
                (host.huge_page_pools(), host.huge_page_sizes(), host.nodes()),
                (host.allowed_nodes(), host.cpus_of_nodes(&[1])),
                host.free_huge_pages(2 << 20, &[]),
                host.transparent_huge_pages_refused(true),
                (host.available_memory(), host.total_memory()),
                (host.memory_limit(), host.huge_page_limit(2 << 20, true)),
            )
        };
        let before = all(&host.again());
        host.read_all();
        drop(keep);
        assert_eq!(all(&host), before);
        assert_eq!(
            (before.2, before.4),
            (Some(5), (Some(8 << 10), Some(9 << 10)))
        );
        assert!(before.3.is_some() && before.5 .0.is_some() && before.5 .1.is_some());
        assert_eq!(all(&host.again()).2, None);
    }
}
