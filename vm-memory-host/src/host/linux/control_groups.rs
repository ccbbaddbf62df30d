//! The limits that control groups set on the memory of this process.
//!
//! Each group of a process and each group above it can have a limit (Linux, "Control Group v2" and
//! "Memory Resource Controller"). Both versions can be in use at the same time.

use std::path::{Component, Path, PathBuf};

use super::{GroupLimit, HostResources};

/// The files of a limit and of its usage.
struct LimitFiles {
    limit: &'static str,
    usage: &'static str,
    /// Whether swap is available in addition.
    is_without_swap: bool,
}

/// Files of version 2, whose `memory.swap.max` limits swap.
const MEMORY_V2: [LimitFiles; 2] = [
    LimitFiles {
        limit: "memory.max",
        usage: "memory.current",
        is_without_swap: true,
    },
    LimitFiles {
        limit: "memory.high",
        usage: "memory.current",
        is_without_swap: true,
    },
];
/// Files of version 1.
const MEMORY_V1: [LimitFiles; 2] = [
    LimitFiles {
        limit: "memory.limit_in_bytes",
        usage: "memory.usage_in_bytes",
        is_without_swap: true,
    },
    LimitFiles {
        limit: "memory.memsw.limit_in_bytes",
        usage: "memory.memsw.usage_in_bytes",
        is_without_swap: false,
    },
];

impl HostResources {
    /// Returns the limit on memory with the fewest available bytes.
    pub(crate) fn memory_limit(&self) -> Option<GroupLimit> {
        let free_swap = self.free_swap();
        let mut least: Option<GroupLimit> = None;
        for directory in self.groups("memory") {
            for files in MEMORY_V2.iter().chain(&MEMORY_V1) {
                let limit = self.files().number(&directory.join(files.limit));
                let usage = self.files().number(&directory.join(files.usage));
                let (Some(limit), Some(usage)) = (limit, usage) else {
                    continue;
                };
                let used = usage.saturating_sub(self.reclaimable(&directory));
                let swap = if files.is_without_swap {
                    free_swap.min(self.swap_limit(&directory))
                } else {
                    0
                };
                keep_least(
                    &mut least,
                    GroupLimit {
                        file: directory.join(files.limit),
                        limit,
                        used,
                        available: limit.saturating_sub(used).saturating_add(swap),
                    },
                );
            }
        }
        least
    }

    /// Returns the limit on huge pages of a size with the fewest available pages.
    ///
    /// If `reserved` is set, pages that are reserved and not used count as used.
    pub(crate) fn huge_page_limit(&self, page_size: u64, reserved: bool) -> Option<GroupLimit> {
        let size = size_name(page_size)?;
        let mut least: Option<GroupLimit> = None;
        for directory in self.groups("hugetlb") {
            for (max, current) in [("max", "current"), ("limit_in_bytes", "usage_in_bytes")] {
                let path = |name: &str| directory.join(format!("hugetlb.{size}.{name}"));
                let number = |path: &Path| self.files().number(path);
                let in_use = number(&path(current)).unwrap_or(0);
                let rsvd = number(&path(&format!("rsvd.{current}"))).unwrap_or(0);
                let usable = if reserved { in_use.max(rsvd) } else { in_use };
                let reservable = if reserved { rsvd } else { 0 };
                for (file, used) in [(max, usable), (&format!("rsvd.{max}"), reservable)] {
                    let file = path(file);
                    if let Some(limit) = number(&file) {
                        let available = limit.saturating_sub(used);
                        let limit = GroupLimit {
                            file,
                            limit,
                            used,
                            available,
                        };
                        keep_least(&mut least, limit);
                    }
                }
            }
        }
        least
    }

    /// Returns the directories of this process's groups of a controller, and of all groups above
    /// them.
    fn groups(&self, controller: &str) -> Vec<PathBuf> {
        let read = |name: &str| {
            let text = self.files().text(&self.proc().join(name));
            text.unwrap_or_default()
        };
        let (groups, mounts) = (read("thread-self/cgroup"), read("thread-self/mountinfo"));
        let mut mounts: Vec<Mount> = mounts.lines().filter_map(mount).collect();
        if mounts.is_empty() {
            // A jail may show /sys, but not its mounts.
            mounts.extend(mount("0 0 0:0 / /sys/fs/cgroup rw - cgroup2 none rw"));
        }
        let mut directories = Vec::new();
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
                continue;
            };
            let of_group = |mount: &&Mount| match controllers {
                "" => mount.version == 2,
                names => {
                    let mut names = names.split(',');
                    mount.version == 1
                        && names.any(|name| name == controller)
                        && mount.options.split(',').any(|name| name == controller)
                }
            };
            if let Some(mount) = mounts.iter().find(of_group) {
                directories.extend(mount.groups_of(group, self.sys()));
            }
        }
        directories
    }

    /// Returns the number of bytes of a group that the kernel can reclaim without swap.
    fn reclaimable(&self, directory: &Path) -> u64 {
        let stat = self
            .files()
            .text(&directory.join("memory.stat"))
            .unwrap_or_default();
        let field = |name: &str| {
            let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
            let value = lines.find_map(|(found, value)| (found == name).then_some(value));
            value.and_then(|value| value.trim().parse::<u64>().ok())
        };
        // In version 1, only these include the groups below.
        let of = |total: &str, name: &str| field(total).or_else(|| field(name)).unwrap_or(0);
        of("total_inactive_file", "inactive_file")
            .saturating_add(of("total_active_file", "active_file"))
            .saturating_add(field("slab_reclaimable").unwrap_or(0))
    }

    /// Returns the number of bytes of swap that a group of version 2 may still use.
    fn swap_limit(&self, directory: &Path) -> u64 {
        self.files()
            .number(&directory.join("memory.swap.max"))
            .map_or(u64::MAX, |limit| {
                let used = self.files().number(&directory.join("memory.swap.current"));
                limit.saturating_sub(used.unwrap_or(0))
            })
    }
}

/// A mounted hierarchy of control groups (proc_pid_mountinfo(5)).
struct Mount {
    version: u8,
    /// The group that is the root of the mount.
    root: String,
    point: String,
    options: String,
}

impl Mount {
    /// Returns the directories of `group` and of the groups above it. `sys` stands for /sys.
    fn groups_of(&self, group: &str, sys: &Path) -> Vec<PathBuf> {
        let point = Path::new(&self.point);
        let point = point.strip_prefix("/sys").map_or_else(
            |_| point.to_owned(),
            |inside| sys.join(inside.strip_prefix("/").unwrap_or(inside)),
        );
        let below = Path::new(group).strip_prefix(&self.root);
        // A group outside of the mount is shown with `..`; the limits of the mount apply to it.
        let is_plain = |path: &&Path| path.components().all(|c| matches!(c, Component::Normal(_)));
        let below = below.ok().filter(is_plain).unwrap_or(Path::new(""));
        let directory = point.join(below);
        let inside = |path: &&Path| path.starts_with(&point);
        directory
            .ancestors()
            .take_while(inside)
            .map(Path::to_owned)
            .collect()
    }
}

/// Parses a line of mountinfo, if it describes control groups.
fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    let version = match after.next()? {
        "cgroup" => 1,
        "cgroup2" => 2,
        _ => return None,
    };
    let mut before = before.split(' ').skip(3);
    let plain = |text: &str| text.replace("\\040", " ");
    Some(Mount {
        version,
        root: plain(before.next()?),
        point: plain(before.next()?),
        options: after.nth(1).unwrap_or("").to_owned(),
    })
}

fn keep_least(least: &mut Option<GroupLimit>, limit: GroupLimit) {
    let is_less = |least: &GroupLimit| limit.available < least.available;
    if least.as_ref().is_none_or(is_less) {
        *least = Some(limit);
    }
}

/// Returns the name of a page size in the names of files, such as `2MB`.
fn size_name(page_size: u64) -> Option<String> {
    let units = [(30, "GB"), (20, "MB"), (10, "KB")];
    units.into_iter().find_map(|(shift, unit)| {
        let number = page_size >> shift;
        (number != 0).then(|| format!("{number}{unit}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tree;

    /// Returns the file, relative to the tree, and the available bytes of a limit.
    fn found(keep: &tempfile::TempDir, limit: Option<GroupLimit>) -> Option<(String, u64)> {
        let limit = limit?;
        let file = limit.file.strip_prefix(keep.path()).unwrap();
        Some((file.to_str().unwrap().to_owned(), limit.available))
    }

    const V2: (&str, &str) = (
        "proc/thread-self/mountinfo",
        "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    );
    const MIXED: (&str, &str) = (
        "proc/thread-self/mountinfo",
        "22 1 0:1 / / rw - ext4 /dev/vda rw\n\
        35 31 0:32 /docker/a /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        36 31 0:33 / /sys/fs/cgroup/huge\\040tlb rw - cgroup cgroup rw,hugetlb\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    );

    #[test]
    fn memory_limit_of_v2_subtracts_usage_and_considers_all_groups_above() {
        let group = ("proc/thread-self/cgroup", "0::/vms/one\n");
        let limit = |files: &[(&str, &str)]| {
            let (keep, host) = tree(&[&[V2, group], files].concat());
            found(&keep, host.memory_limit())
        };
        let max = ("fs/cgroup/vms/one/memory.max", "max\n");
        let current = ("fs/cgroup/vms/one/memory.current", "6000\n");
        let above = ("fs/cgroup/vms/memory.max", "10000\n");
        let above_current = ("fs/cgroup/vms/memory.current", "9000\n");
        let stat = (
            "fs/cgroup/vms/memory.stat",
            "anon 5000\nfile 4000\ninactive_file 3000\nactive_file 500\n",
        );
        assert_eq!(limit(&[max, current]), None);
        let of_vms = |available| Some(("fs/cgroup/vms/memory.max".to_owned(), available));
        assert_eq!(limit(&[max, current, above, above_current]), of_vms(1000));
        assert_eq!(limit(&[above, above_current, stat]), of_vms(4500));
        let high = ("fs/cgroup/vms/one/memory.high", "7000\n");
        assert_eq!(
            limit(&[max, current, above, above_current, stat, high]),
            Some(("fs/cgroup/vms/one/memory.high".to_owned(), 1000))
        );
        // Swap is limited by the host, and by the group.
        let swap = ("proc/meminfo", "MemAvailable: 9 kB\nSwapFree: 2 kB\n");
        assert_eq!(limit(&[above, above_current, swap]), of_vms(1000 + 2048));
        let swap_max = ("fs/cgroup/vms/memory.swap.max", "100\n");
        let swapped = ("fs/cgroup/vms/memory.swap.current", "40\n");
        let files = [above, above_current, swap, swap_max, swapped];
        assert_eq!(limit(&files), of_vms(1060));
    }

    #[test]
    fn memory_limit_of_v1_is_found_below_the_root_of_its_mount() {
        let limit = |group: &str, files: &[(&str, &str)]| {
            let group = format!("5:cpu:/x\n4:memory:{group}\n0::/\n");
            let (keep, host) =
                tree(&[&[MIXED, ("proc/thread-self/cgroup", &group)], files].concat());
            found(&keep, host.memory_limit())
        };
        let files = [
            ("fs/cgroup/memory/vm/memory.limit_in_bytes", "8000"),
            ("fs/cgroup/memory/vm/memory.usage_in_bytes", "5000"),
            (
                "fs/cgroup/memory/vm/memory.stat",
                "inactive_file 1\ntotal_inactive_file 600\ntotal_active_file 400\n",
            ),
            (
                "fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712",
            ),
            ("fs/cgroup/memory/memory.usage_in_bytes", "9000"),
        ];
        let own = "fs/cgroup/memory/vm/memory.limit_in_bytes".to_owned();
        assert_eq!(limit("/docker/a/vm", &files), Some((own, 4000)));
        // Outside of the mount, as in another namespace: the limit of the mount's root.
        let outside = limit("/../b", &files).unwrap().0;
        assert_eq!(outside, "fs/cgroup/memory/memory.limit_in_bytes");
        // Memory and swap together.
        let memsw = [
            ("fs/cgroup/memory/vm/memory.memsw.limit_in_bytes", "8000"),
            ("fs/cgroup/memory/vm/memory.memsw.usage_in_bytes", "7500"),
            ("proc/meminfo", "SwapFree: 5000 kB\n"),
        ];
        let all = [&files[..2], &memsw].concat();
        let memsw = "fs/cgroup/memory/vm/memory.memsw.limit_in_bytes".to_owned();
        assert_eq!(limit("/docker/a/vm", &all), Some((memsw, 500)));
    }

    #[test]
    fn huge_page_limit_counts_reservations_and_both_versions() {
        let v2 = [
            V2,
            ("proc/thread-self/cgroup", "0::/vm\n"),
            ("fs/cgroup/vm/hugetlb.2MB.max", "4194304\n"),
            ("fs/cgroup/vm/hugetlb.2MB.current", "2097152\n"),
            ("fs/cgroup/vm/hugetlb.2MB.rsvd.current", "4194304\n"),
            ("fs/cgroup/vm/hugetlb.2MB.rsvd.max", "max\n"),
            ("fs/cgroup/vm/hugetlb.1GB.max", "0\n"),
        ];
        let (keep, host) = tree(&v2);
        let limit = |size, reserved| found(&keep, host.huge_page_limit(size, reserved));
        let of_2_mib = |available| Some(("fs/cgroup/vm/hugetlb.2MB.max".into(), available));
        assert_eq!(limit(2 << 20, true), of_2_mib(0));
        assert_eq!(limit(2 << 20, false), of_2_mib(2 << 20));
        let of_1_gib = "fs/cgroup/vm/hugetlb.1GB.max".to_owned();
        assert_eq!(limit(1 << 30, true), Some((of_1_gib, 0)));
        assert_eq!(limit(64 << 10, true), None);
        let v1 = [
            MIXED,
            ("proc/thread-self/cgroup", "9:hugetlb:/vm\n0::/\n"),
            ("fs/cgroup/huge tlb/vm/hugetlb.2MB.limit_in_bytes", "900"),
            (
                "fs/cgroup/huge tlb/vm/hugetlb.2MB.rsvd.limit_in_bytes",
                "800",
            ),
            (
                "fs/cgroup/huge tlb/vm/hugetlb.2MB.rsvd.usage_in_bytes",
                "500",
            ),
        ];
        let (keep, host) = tree(&v1);
        let file = "fs/cgroup/huge tlb/vm/hugetlb.2MB.rsvd.limit_in_bytes".to_owned();
        let limit = host.huge_page_limit(2 << 20, true);
        assert_eq!(found(&keep, limit), Some((file, 300)));
    }
}
