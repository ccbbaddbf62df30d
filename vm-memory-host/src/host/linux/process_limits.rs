//! Finds the limit that a refused system call has reached.
//!
//! The kernel returns `ENOMEM` for many limits. A remedy names a limit only if the usage of the
//! process shows that the call exceeds it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use super::files::number;
use super::HostResources;
use crate::sys;

/// The resource that a refused call needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Host addresses.
    Addresses,
    /// Private writable memory at reserved addresses.
    Private {
        /// Whether the kernel must set memory aside for it.
        reserve: bool,
    },
    /// Locked memory.
    Locked,
}

/// Returns the remedy for a refused call that needs `len` bytes, or `otherwise` if no limit of the
/// process explains it.
pub(crate) fn remedy(
    host: &HostResources,
    need: Need,
    len: u64,
    error: &io::Error,
    otherwise: &str,
) -> String {
    let is_limit = matches!(
        error.raw_os_error(),
        Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM)
    );
    let met = is_limit.then(|| ProcessLimits::current(&host.again()).limit(need, len));
    met.flatten().unwrap_or_else(|| otherwise.to_owned())
}

/// The usage of a process and its limits, in bytes unless a field says otherwise.
///
/// `None` is unlimited or unknown.
#[derive(Clone, Copy, Debug, Default)]
struct ProcessLimits {
    address_space: (u64, Option<u64>),
    data: (u64, Option<u64>),
    locked: (u64, Option<u64>),
    /// The number of VMAs.
    vmas: (u64, Option<u64>),
    /// The value of `vm.overcommit_memory`.
    overcommit: u64,
    committed: (u64, Option<u64>),
    /// The size of memory and swap.
    total: Option<u64>,
}

impl ProcessLimits {
    fn current(host: &HostResources) -> Self {
        let read = |name: &str| fs::read(host.proc().join(name)).unwrap_or_default();
        // Capabilities belong to a thread.
        let status = read("thread-self/status");
        let status = String::from_utf8_lossy(&status);
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next())
        };
        let size = |name| {
            let kib = field(name).and_then(|kib| kib.parse::<u64>().ok());
            kib.map_or(0, |kib| kib.saturating_mul(1024))
        };
        let capabilities = field("CapEff:").and_then(|mask| u64::from_str_radix(mask, 16).ok());
        let may_lock = capabilities.is_some_and(|mask| mask & CAP_IPC_LOCK != 0)
            // A capability of another user namespace does not lift the limit.
            && fs::read_link(host.proc().join("thread-self/ns/user"))
                .is_ok_and(|name| name.as_os_str() == FIRST_USER_NAMESPACE);
        let setting = |name: &str| number(&host.proc().join("sys/vm").join(name));
        Self {
            address_space: (size("VmSize:"), sys::address_space_limit()),
            data: (size("VmData:"), sys::data_limit()),
            locked: (size("VmLck:"), sys::lock_limit().filter(|_| !may_lock)),
            vmas: (
                lines(&host.proc().join("thread-self/maps")).unwrap_or(0),
                setting("max_map_count"),
            ),
            overcommit: setting("overcommit_memory").unwrap_or(0),
            committed: (
                host.meminfo("Committed_AS", "").unwrap_or(0),
                host.meminfo("CommitLimit", ""),
            ),
            total: host.total_memory(),
        }
    }

    /// Names the limit that `len` more bytes exceed, and the remedy.
    fn limit(&self, need: Need, len: u64) -> Option<String> {
        let exceeds = |(used, limit): (u64, Option<u64>), len: u64| {
            let limit = limit?;
            (used.saturating_add(len) > limit).then_some((used, limit))
        };
        let of_process = |name: &str, used_and_limit, remedy: &str| {
            let (used, limit) = exceeds(used_and_limit, len)?;
            Some(format!(
                "it needs {len:#x} bytes, and {used:#x} are in use of the {name} limit of \
                {limit:#x}; {remedy}"
            ))
        };
        let raise_lock = "raise the limit (ulimit -l) or grant CAP_IPC_LOCK";
        let found = match need {
            Need::Locked => of_process("locked memory", self.locked, raise_lock),
            Need::Addresses => of_process(
                "address space",
                self.address_space,
                "use less memory, or raise the limit (ulimit -v)",
            ),
            Need::Private { reserve } => of_process(
                "data size",
                self.data,
                "use less memory, or raise the limit (ulimit -d)",
            )
            .or_else(|| self.overcommit(reserve, len)),
        };
        // One call adds up to two VMAs.
        found.or_else(|| {
            let (used, limit) = exceeds(self.vmas, 2)?;
            Some(format!(
                "{used} of {limit} VMAs are in use; use fewer mappings, or raise vm.max_map_count"
            ))
        })
    }

    /// Names the policy of overcommitment that refuses `len` more bytes.
    fn overcommit(&self, reserve: bool, len: u64) -> Option<String> {
        let (used, limit) = self.committed;
        let limit = limit?;
        if self.overcommit == 2 && used.saturating_add(len) > limit {
            return Some(format!(
                "it needs {len:#x} bytes, and {used:#x} of {limit:#x} are committed \
                (vm.overcommit_memory is 2); use less memory, or raise vm.overcommit_ratio"
            ));
        }
        let total = self.total?;
        (self.overcommit == 0 && reserve && len > total).then(|| {
            format!(
                "it reserves {len:#x} bytes, but memory and swap have {total:#x} \
                (vm.overcommit_memory is 0); use less memory, or do not reserve it"
            )
        })
    }
}

/// Counts the lines of a file, which may be too long for the memory that is left.
fn lines(path: &Path) -> io::Result<u64> {
    let (mut file, mut part) = (File::open(path)?, [0; 4096]);
    let mut count = 0u64;
    loop {
        let bytes = match file.read(&mut part)? {
            0 => return Ok(count),
            len => part.iter().take(len),
        };
        let here = bytes.filter(|byte| **byte == b'\n').count();
        count = count.saturating_add(u64::try_from(here).unwrap_or(u64::MAX));
    }
}

/// `CAP_IPC_LOCK` (capabilities(7)).
const CAP_IPC_LOCK: u64 = 1 << 14;
/// The user namespace in which the system starts (`PROC_USER_INIT_INO`).
const FIRST_USER_NAMESPACE: &str = "user:[4026531837]";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_names_only_a_limit_that_is_exceeded() {
        let free = ProcessLimits {
            address_space: (100, Some(200)),
            data: (50, Some(150)),
            locked: (10, Some(40)),
            vmas: (10, Some(20)),
            committed: (500, Some(600)),
            total: Some(1000),
            ..ProcessLimits::default()
        };
        let (private, reserved) = (
            Need::Private { reserve: false },
            Need::Private { reserve: true },
        );
        for (process, need, len, part) in [
            (free, Need::Addresses, 100, None),
            (free, Need::Addresses, 101, Some("ulimit -v")),
            (free, private, 100, None),
            (free, private, 101, Some("ulimit -d")),
            (free, Need::Locked, 30, None),
            (free, Need::Locked, 31, Some("ulimit -l")),
        ] {
            let found = process.limit(need, len);
            assert_eq!(found.is_some(), part.is_some(), "{need:?}: {found:?}");
            assert!(found.unwrap_or_default().contains(part.unwrap_or("")));
        }
        let many = ProcessLimits {
            vmas: (19, Some(20)),
            ..free
        };
        let found = many.limit(Need::Addresses, 1).unwrap();
        assert!(found.starts_with("19 of 20 VMAs are in use"), "{found}");
        let unlimited = ProcessLimits {
            data: (0, None),
            ..free
        };
        assert_eq!(unlimited.limit(private, 5000), None);
        let found = unlimited.limit(reserved, 5000).unwrap();
        assert!(found.contains("vm.overcommit_memory is 0"), "{found}");
        let strict = ProcessLimits {
            overcommit: 2,
            ..unlimited
        };
        assert_eq!(strict.limit(private, 100), None);
        let found = strict.limit(private, 101).unwrap();
        assert!(found.contains("vm.overcommit_memory is 2"), "{found}");
    }
}
