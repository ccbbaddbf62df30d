//! Helpers for these tests.

use std::fs::{self, File};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use test_support::{skipped, temp_file, wait_until};
pub(crate) use test_support::{MIB, PAGE_U64 as PAGE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, Permissions,
};
use vm_memory_host::{
    describe, huge_page_pools, provisioned, residency, Backing, BuildError, MemoryBuilder, Region,
};

pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

/// The size of the huge pages that these tests use.
pub(crate) const HUGE: u64 = 2 * MIB;
/// The maximum number of bytes that a test locks, within the limit of an ordinary user.
pub(crate) const LOCKED: u64 = 16 * PAGE;

pub(crate) fn build(region: Region) -> Result<Memory, BuildError> {
    // Blocks may require it.
    vm_memory::fault::install().unwrap();
    MemoryBuilder::new().region(region).build()
}

/// Returns the host address of the first region.
pub(crate) fn host_address(memory: &Memory) -> usize {
    provisioned(memory.iter().next().unwrap())
        .unwrap()
        .host_address()
}

/// Returns whether vm-memory accesses reach all of a range.
pub(crate) fn is_accessible(memory: &Memory, addr: u64, len: u64) -> bool {
    let (addr, len) = (GuestAddress(addr), len as usize);
    GuestMemory::check_range(memory, addr, len, Permissions::ReadWrite)
}

/// Returns the number of resident bytes of the first region.
pub(crate) fn resident(memory: &Memory) -> u64 {
    residency(memory).unwrap()[0].1.resident
}

/// Builds memory once more from its description, as another process would.
pub(crate) fn build_again(memory: &Memory) -> Memory {
    let (description, files) = describe(memory).unwrap();
    let received = files
        .iter()
        .map(|file| file.try_clone().unwrap().into())
        .collect();
    description.builder(received).unwrap().build().unwrap()
}

/// Opens a file for reading and writing, and creates it if it does not exist.
pub(crate) fn open(path: impl AsRef<Path>) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

/// Creates a file whose pages are filled with [`pattern_of_page`].
pub(crate) fn patterned_file(pages: u64) -> File {
    let bytes: Vec<u8> = (0..pages)
        .flat_map(|page| [pattern_of_page(page); PAGE as usize])
        .collect();
    temp_file(&bytes)
}

pub(crate) fn pattern_of_page(page: u64) -> u8 {
    (page % 255) as u8 + 1
}

/// Returns the byte that fills a page of guest memory, or `None` if its bytes differ.
pub(crate) fn byte_of_page(memory: &Memory, addr: u64) -> Option<u8> {
    let mut bytes = [0; PAGE as usize];
    memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
        .iter()
        .all(|byte| *byte == bytes[0])
        .then_some(bytes[0])
}

/// Fills a range of guest memory, in whole pages.
pub(crate) fn fill(memory: &Memory, addr: u64, len: u64, byte: u8) {
    for page in (addr..addr + len).step_by(PAGE as usize) {
        memory
            .write_slice(&[byte; PAGE as usize], GuestAddress(page))
            .unwrap();
    }
}

/// Returns the part of /proc/self/smaps about the VMA that begins at `start`.
pub(crate) fn smaps(start: usize) -> String {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let head = format!("{start:x}-");
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
    let first = lines.next().expect("a VMA begins there").to_owned();
    let more = lines.take_while(|line| {
        line.split(' ')
            .next()
            .is_some_and(|word| word.ends_with(':'))
    });
    more.fold(first, |all, line| all + "\n" + line)
}

/// Returns whether the VMA that begins at `start` has a flag of proc_pid_smaps(5), "VmFlags".
pub(crate) fn has_flag(start: usize, flag: &str) -> bool {
    let vma = smaps(start);
    let flags = vma.lines().find_map(|line| line.strip_prefix("VmFlags:"));
    flags
        .expect("smaps has VmFlags")
        .split(' ')
        .any(|word| word == flag)
}

/// Returns the range and the permissions of the VMA in /proc/self/maps that contains `address`.
pub(crate) fn vma(address: usize) -> Option<(usize, usize, String)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
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

/// A pool with an exact number of free huge pages of 2 MiB, for one test.
///
/// Tests of all programs take turns. The pages of other users are not touched, and the size of the
/// pool is restored at the end.
pub(crate) struct HugePages {
    before: u64,
    /// Occupies the free pages in excess of the requested ones.
    rest: Option<Memory>,
    _turn: test_support::HugePages,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Makes exactly `count` pages free. Reports `test` as skipped if that is not possible.
    pub(crate) fn reserve(count: u64, test: &str) -> Option<Self> {
        let turn = test_support::HugePages::lock(test)?;
        let resized = Self::resize(count, turn);
        resized.map_err(|why| skipped(test, why)).ok()
    }

    fn resize(count: u64, turn: test_support::HugePages) -> Result<Self, String> {
        let (_, free) = pool().ok_or("no pool of huge pages of 2 MiB")?;
        let mut pages = Self {
            before: turn.total(),
            rest: None,
            _turn: turn,
        };
        let wanted = pages.before + count.saturating_sub(free);
        fs::write(POOL, wanted.to_string())
            .map_err(|error| format!("cannot resize the pool of huge pages: {error}"))?;
        if let Some((_, free)) = pool().filter(|(_, free)| *free > count) {
            let rest = Region::new(GuestAddress(0), (free - count) * HUGE);
            pages.rest = build(rest.backing(Backing::Hugetlb { page_size: HUGE })).ok();
        }
        match pool() {
            Some((_, free)) if free == count => Ok(pages),
            other => Err(format!(
                "{count} free huge pages needed, but the pool has {other:?}"
            )),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        self.rest = None;
        let _ = fs::write(POOL, self.before.to_string());
    }
}

/// Returns the number of huge pages of 2 MiB, and how many of them are free.
pub(crate) fn pool() -> Option<(u64, u64)> {
    let pool = huge_page_pools()
        .into_iter()
        .find(|pool| pool.page_size == HUGE)?;
    Some((pool.total, pool.free))
}

/// Waits until the pool has this number of free huge pages.
///
/// A process that another test starts has the memfd of a dropped region until it executes its
/// program.
pub(crate) fn wait_for_free_pages(count: u64) {
    wait_until(|| pool().is_some_and(|(_, free)| free == count));
}

/// Returns whether this process may lock all memory that these tests lock at the same time. Reports
/// `test` as skipped if not.
pub(crate) fn can_lock(test: &str) -> bool {
    can_lock_all_of(8 * LOCKED, test)
}

/// Returns whether this process may lock `bytes`. Reports `test` as skipped if not.
pub(crate) fn can_lock_all_of(bytes: u64, test: &str) -> bool {
    let line = |path: &str, name: &str| {
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.expect("/proc has the line").trim().to_owned()
    };
    let capabilities = u64::from_str_radix(&line("/proc/self/status", "CapEff:"), 16).unwrap();
    let has_cap_ipc_lock = capabilities & (1 << 14) != 0;
    // `None` stands for "unlimited".
    let limits = line("/proc/self/limits", "Max locked memory");
    let limit = limits
        .split(' ')
        .next()
        .and_then(|soft| soft.parse::<u64>().ok());
    match limit {
        Some(limit) if !has_cap_ipc_lock && limit < bytes => {
            skipped(
                test,
                format!("only {limit} bytes may be locked (ulimit -l)"),
            );
            false
        }
        _ => true,
    }
}

/// Returns a region of `size` bytes at `start` for each backing; hugetlb only if `huge` is set.
pub(crate) fn region_of_each_backing(
    start: u64,
    size: u64,
    huge: bool,
) -> Vec<(&'static str, Region)> {
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

/// Returns the number of discarded bytes that may stay resident, as zeroes.
///
/// The page cache of a disk has folios of up to 2 MiB. The kernel does not split a folio under
/// writeback where a hole begins or ends.
pub(crate) fn may_stay_resident(kind: &str) -> u64 {
    if kind == "shared file" {
        2 * HUGE
    } else {
        0
    }
}

pub(crate) fn non_zero(size: u64) -> NonZeroU64 {
    NonZeroU64::new(size).unwrap()
}

/// A file system mounted in a new directory, for one test.
pub(crate) struct Mounted {
    pub(crate) directory: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn tmpfs(options: &str, test: &str) -> Option<Self> {
        Self::new("tmpfs", options, test)
    }

    /// Mounts a file system. Reports `test` as skipped if that is not possible.
    pub(crate) fn new(kind: &str, options: &str, test: &str) -> Option<Self> {
        Self::source("vm-memory-test".as_ref(), kind, options, test)
    }

    /// Mounts a new disk file system of `size` bytes. `make` are arguments of mkfs(8).
    ///
    /// Reports `test` as skipped if that is not possible.
    pub(crate) fn disk(kind: &str, make: &[&str], size: u64, test: &str) -> Option<Self> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(size).unwrap();
        let program = format!("mkfs.{kind}");
        let made = Command::new(&program).args(make).arg(image.path()).output();
        match made {
            // The mount keeps the image.
            Ok(done) if done.status.success() => Self::source(image.path(), kind, "loop", test),
            Ok(failed) => {
                skipped(test, format!("{program}: {failed:?}"));
                None
            }
            Err(error) => {
                skipped(test, format!("{program} is not installed: {error}"));
                None
            }
        }
    }

    fn source(source: &Path, kind: &str, options: &str, test: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", kind, "-o", options])
            .arg(source)
            .arg(directory.path())
            .output();
        match mount {
            Ok(done) if done.status.success() => Some(Self { directory }),
            other => {
                skipped(test, format!("cannot mount a {kind}: {other:?}"));
                None
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A lazy unmount, because a failed test may still have a mapping.
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.directory.path())
            .status();
    }
}

/// Takes all space that is left on the file system of `mounted`.
pub(crate) fn take_the_rest(mounted: &Mounted) -> File {
    let other = open(mounted.directory.path().join("other"));
    let mut at = 0;
    while other.write_all_at(&[1; PAGE as usize], at).is_ok() {
        at += PAGE;
    }
    other
}

/// A loop device, for one test.
pub(crate) struct LoopDevice {
    pub(crate) path: String,
}

impl LoopDevice {
    /// Attaches a file to a loop device. Reports `test` as skipped if that is not possible.
    pub(crate) fn of(file: &Path, test: &str) -> Option<Self> {
        match Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
        {
            Ok(done) if done.status.success() => {
                let path = String::from_utf8(done.stdout).unwrap().trim().to_owned();
                Some(Self { path })
            }
            other => {
                skipped(test, format!("no loop device: {other:?}"));
                None
            }
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
