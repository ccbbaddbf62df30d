//! What several of these tests need.

use std::fs::{self, File};
use std::io::Write;
use std::num::NonZeroU64;
use std::process::Command;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{
    huge_page_pools, provisioned, residency, Backing, BuildError, MemoryBuilder, Region,
};

pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MIB: u64 = 1 << 20;
/// The huge pages of these tests.
pub(crate) const HUGE: u64 = 2 * MIB;

pub(crate) fn build(region: Region) -> Result<Memory, BuildError> {
    MemoryBuilder::new().region(region).build()
}

/// The only region's memory in this process, as a number.
pub(crate) fn host(memory: &Memory) -> usize {
    provisioned(memory.iter().next().unwrap())
        .unwrap()
        .host_address()
}

/// How many bytes of the only region are in memory.
pub(crate) fn resident(memory: &Memory) -> u64 {
    residency(memory).unwrap()[0].1.resident
}

/// A file with a pattern, by the number of its page in each of its bytes.
pub(crate) fn patterned_file(pages: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..pages)
        .flat_map(|page| [page_byte(page); PAGE as usize])
        .collect();
    (&file).write_all(&bytes).unwrap();
    file
}

pub(crate) fn page_byte(page: u64) -> u8 {
    (page % 255) as u8 + 1
}

/// The bytes of a page of guest memory, if they are all the same.
pub(crate) fn page_of(memory: &Memory, addr: u64) -> Option<u8> {
    let mut bytes = [0; PAGE as usize];
    memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
        .iter()
        .all(|byte| *byte == bytes[0])
        .then_some(bytes[0])
}

/// Writes a byte to every page of a range.
pub(crate) fn fill(memory: &Memory, addr: u64, len: u64, byte: u8) {
    for page in (addr..addr + len).step_by(PAGE as usize) {
        memory
            .write_slice(&[byte; PAGE as usize], GuestAddress(page))
            .unwrap();
    }
}

/// What /proc/self/smaps says of the area that begins at an address.
pub(crate) fn smaps(start: usize) -> String {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let head = format!("{start:x}-");
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
    let first = lines.next().expect("there is such an area").to_owned();
    let more = lines.take_while(|line| {
        line.split(' ')
            .next()
            .is_some_and(|word| word.ends_with(':'))
    });
    more.fold(first, |all, line| all + "\n" + line)
}

/// Whether an area has a flag of proc_pid_smaps(5), "VmFlags".
pub(crate) fn has_flag(start: usize, flag: &str) -> bool {
    let area = smaps(start);
    let flags = area.lines().find_map(|line| line.strip_prefix("VmFlags:"));
    flags
        .expect("the kernel tells flags")
        .split(' ')
        .any(|word| word == flag)
}

/// Huge pages of 2 MiB, for one test; the number in the pool is put back at the end. Tests of all programs take turns. What others have in use stays theirs.
pub(crate) struct HugePages {
    before: u64,
    /// Keeps what is free beyond what was asked for.
    rest: Option<Memory>,
    _turn: File,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// The file that the tests of vm-memory and microvm lock, too.
const TURN: &str = "/tmp/vm-memory-hugepages.lock";

impl HugePages {
    /// Makes sure that exactly so many are free. Says so aloud if that cannot be.
    pub(crate) fn reserve(count: u64, test: &str) -> Option<Self> {
        // Whoever made it, others may read it, which is enough for a lock; to write to it, or to open it as if it had to be made, they may not
        // (proc_sys_fs(5), protected_regular).
        let turn =
            File::open(TURN).or_else(|_| File::options().create(true).append(true).open(TURN));
        let turn = match turn.and_then(|turn| turn.lock().map(|()| turn)) {
            Ok(turn) => turn,
            Err(error) => {
                return skipped(
                    test,
                    format!("no turn at the pool of huge pages: {TURN}: {error}"),
                )
            }
        };
        let number = fs::read_to_string(POOL)
            .ok()
            .map(|text| text.trim().parse());
        let (Some(Ok(before)), Some((_, free))) = (number, pool()) else {
            return skipped(test, "no pool of huge pages".to_owned());
        };
        let mut pages = Self {
            before,
            rest: None,
            _turn: turn,
        };
        let wanted = before + count.saturating_sub(free);
        if let Err(error) = fs::write(POOL, format!("{wanted}")) {
            return skipped(
                test,
                format!("the pool of huge pages cannot be changed: {error}"),
            );
        }
        if let Some((_, free)) = pool().filter(|(_, free)| *free > count) {
            let rest = Region::new(GuestAddress(0), (free - count) * HUGE);
            pages.rest = build(rest.backing(Backing::Hugetlb { page_size: HUGE })).ok();
        }
        match pool() {
            Some((_, free)) if free == count => Some(pages),
            other => skipped(
                test,
                format!("{count} huge pages were asked for, and the pool has {other:?}"),
            ),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        self.rest = None;
        let _ = fs::write(POOL, format!("{}", self.before));
    }
}

/// Says aloud what cannot be tested here: by itself, since what a test prints is shown only when it fails; and in one write, so that nothing that others say
/// at the same time comes between.
pub(crate) fn skipped<T>(test: &str, why: String) -> Option<T> {
    let line = format!("SKIPPED: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    None
}

/// Whether this process may lock what these tests lock at the same time, each of them [`LOCKED`] bytes or less. If not, says aloud that `test` is skipped.
pub(crate) fn can_lock(test: &str) -> bool {
    can_lock_all_of(8 * LOCKED, test)
}

/// Whether this process may lock so many bytes. If not, says aloud that `test` is skipped.
pub(crate) fn can_lock_all_of(bytes: u64, test: &str) -> bool {
    let line = |path: &str, name: &str| {
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.expect("the kernel says so").trim().to_owned()
    };
    // For whom there is no limit (capabilities(7), CAP_IPC_LOCK).
    let capabilities = u64::from_str_radix(&line("/proc/self/status", "CapEff:"), 16).unwrap();
    // "unlimited" is no number.
    let limits = line("/proc/self/limits", "Max locked memory");
    let limit = limits
        .split(' ')
        .next()
        .and_then(|soft| soft.parse::<u64>().ok());
    match limit {
        Some(limit) if capabilities & (1 << 14) == 0 && limit < bytes => {
            skipped::<()>(test, format!("{limit} bytes may be locked (ulimit -l)"));
            false
        }
        _ => true,
    }
}

/// How much memory a test locks at most: so little that an ordinary user may.
pub(crate) const LOCKED: u64 = 16 * PAGE;

/// How many huge pages of 2 MiB there are, and how many are free.
pub(crate) fn pool() -> Option<(u64, u64)> {
    let pool = huge_page_pools()
        .into_iter()
        .find(|pool| pool.page_size == HUGE)?;
    Some((pool.total, pool.free))
}

/// A region of each kind of backing, of `size` bytes at `start`; hugetlb only where `huge` says that there are pages.
pub(crate) fn of_each_kind(start: u64, size: u64, huge: bool) -> Vec<(&'static str, Region)> {
    let region = |backing| Region::new(GuestAddress(start), size).backing(backing);
    let file = || patterned_file(size / PAGE + 1);
    let mut all = vec![
        ("anonymous", region(Backing::Anonymous)),
        ("memfd", region(Backing::Memfd)),
        ("shared file", region(Backing::shared_file(file(), PAGE))),
        ("private file", region(Backing::private_file(file(), PAGE))),
    ];
    if huge {
        let hugetlb = region(Backing::Hugetlb { page_size: HUGE });
        all.push(("hugetlb", hugetlb.clone().release_huge_pages(true)));
        all.push(("kept hugetlb", hugetlb));
    }
    all
}

/// How much of what is given back may stay in memory, as zeroes: the cache of a disk's file has folios of up to 2 MiB, and one that is being written
/// is not cut where a hole begins or ends in it.
pub(crate) fn kept_at_edges(kind: &str) -> u64 {
    if kind == "shared file" {
        2 * HUGE
    } else {
        0
    }
}

pub(crate) fn blocks(size: u64) -> NonZeroU64 {
    NonZeroU64::new(size).unwrap()
}

/// The area of /proc/self/maps that has an address, as its range and its permissions.
pub(crate) fn area(address: usize) -> Option<(usize, usize, String)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        (start..end)
            .contains(&address)
            .then(|| (start, end, rest[..4].to_owned()))
    })
}

/// A file system that is mounted in a directory of its own, for one test.
pub(crate) struct Mounted {
    pub(crate) directory: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn tmpfs(options: &str, test: &str) -> Option<Self> {
        Self::new("tmpfs", options, test)
    }

    /// Mounts one; says so aloud if that cannot be.
    pub(crate) fn new(kind: &str, options: &str, test: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", kind, "-o", options, "vm-memory-test"])
            .arg(directory.path())
            .output();
        match mount {
            Ok(done) if done.status.success() => Some(Self { directory }),
            other => skipped(test, format!("a {kind} cannot be mounted: {other:?}")),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: what a test that has failed still maps must not keep it.
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.directory.path())
            .status();
    }
}

/// A block device that is a file.
pub(crate) struct LoopDevice {
    pub(crate) path: String,
}

impl LoopDevice {
    /// Makes one; says so aloud if that cannot be.
    pub(crate) fn of(file: &std::path::Path, test: &str) -> Option<Self> {
        match Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
        {
            Ok(done) if done.status.success() => {
                let path = String::from_utf8(done.stdout).unwrap().trim().to_owned();
                Some(Self { path })
            }
            other => skipped(test, format!("no loop device: {other:?}")),
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["--detach", &self.path])
            .status();
    }
}
