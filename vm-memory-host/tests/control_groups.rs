//! Errors of builds, prefaults and plugs that a control group does not allow.
//!
//! Each test puts a copy of this program into a group with a limit. The kernel ends a copy that
//! exceeds the limit, with SIGKILL or SIGBUS.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{mlockall, MlockAllFlags};
use test_support::{run_again, skipped, HugePages, MIB};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{
    describe, plug, prefault, Backing, BuildError, ChangeError, Lock, MemoryBuilder, NumaPolicy,
    PrefaultError, Region, Unplugged,
};

const HUGE: u64 = 2 * MIB;
/// The environment variable that is set for a copy of this program in a group.
const GROUP: &str = "VM_MEMORY_HOST_TEST_GROUP";

/// A control group. Dropping it removes it.
struct Group(PathBuf);

impl Group {
    /// Creates a group with limits below `parent`. Reports `test` as skipped if that fails.
    fn new(parent: &Path, limits: &[(&str, u64)], test: &str) -> Option<Self> {
        let group = Self(parent.join(format!("vm-memory-{}-{test}", std::process::id())));
        let created = fs::create_dir(&group.0).and_then(|()| {
            limits
                .iter()
                .try_for_each(|(file, limit)| fs::write(group.0.join(file), limit.to_string()))
        });
        match created {
            Ok(()) => Some(group),
            Err(error) => {
                skipped(test, format!("no such group: {error}"));
                None
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Runs `test` in a separate process, in a group with a limit of `bytes`.
///
/// Returns whether this process is the separate one.
fn is_in_group(find: impl FnOnce() -> Option<Controller>, bytes: u64, test: &str) -> bool {
    if std::env::var_os(GROUP).is_some() {
        return true;
    }
    let Some(controller) = find() else {
        skipped(test, "no such controller");
        return false;
    };
    let limits = [(controller.limit, bytes)];
    let Some(group) = Group::new(&controller.root, &limits, test) else {
        return false;
    };
    // A group below the one with the limit.
    let inner = Group(group.0.join("inner"));
    fs::create_dir(&inner.0).unwrap();
    let mut program = Command::new("sh");
    program
        .args(["-c", "echo $$ > \"$1\" && shift && exec \"$@\"", "sh"])
        .arg(inner.0.join("cgroup.procs"))
        .arg(std::env::current_exe().unwrap())
        .env(GROUP, &group.0);
    run_again(&mut program, test);
    false
}

/// A controller of control groups. Dropping it restores its setting.
struct Controller {
    /// The directory in which groups can be created.
    root: PathBuf,
    /// The name of the file with a limit.
    limit: &'static str,
    /// The name of the controller, if it was enabled for this test.
    enabled: Option<&'static str>,
    _turn: MutexGuard<'static, ()>,
}

impl Controller {
    /// Finds a controller in version 1 or 2, for one test at a time.
    fn find(name: &'static str, v1: &'static str, v2: &'static str) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let root = Path::new("/sys/fs/cgroup");
        let (root, limit, enabled) = if root.join(name).join(v1).exists() {
            (root.join(name), v1, None)
        } else {
            let has = |root: &Path, file: &str| {
                let names = fs::read_to_string(root.join(file)).unwrap_or_default();
                names.split_whitespace().any(|one| one == name)
            };
            let mut roots = [root.to_owned(), root.join("unified")].into_iter();
            let root = roots.find(|root| has(root, "cgroup.controllers"))?;
            let was_enabled = has(&root, "cgroup.subtree_control");
            fs::write(root.join("cgroup.subtree_control"), format!("+{name}")).ok()?;
            (root, v2, (!was_enabled).then_some(name))
        };
        Some(Self {
            root,
            limit,
            enabled,
            _turn: turn,
        })
    }

    fn of_memory() -> Option<Self> {
        Self::find("memory", "memory.limit_in_bytes", "memory.max")
    }

    fn of_huge_pages() -> Option<Self> {
        Self::find("hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max")
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Some(name) = self.enabled {
            let file = self.root.join("cgroup.subtree_control");
            let _ = fs::write(file, format!("-{name}"));
        }
    }
}

fn region(start: u64, size: u64, backing: Backing) -> Region {
    Region::new(GuestAddress(start), size).backing(backing)
}

fn build(region: Region) -> Result<GuestMemoryMmap, BuildError> {
    MemoryBuilder::new().region(region).build()
}

fn huge_pages() -> Backing {
    Backing::Hugetlb { page_size: HUGE }
}

/// Creates a file on a tmpfs with a size limit.
fn file_on_tmpfs(len: u64, test: &str) -> Option<fs::File> {
    let Ok(file) = tempfile::tempfile_in("/dev/shm") else {
        skipped(test, "no /dev/shm");
        return None;
    };
    file.set_len(len).unwrap();
    Some(file)
}

#[test]
fn prefault_above_memory_limit_names_the_limit() {
    let test = "prefault_above_memory_limit_names_the_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let go_on = |_| ControlFlow::Continue(());
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let whole = || region(0, 512 * MIB, backing.clone());
        let builder = MemoryBuilder::new().region(whole());
        let builder = builder.prefault(NonZeroUsize::MIN, go_on);
        let error = builder.build::<()>().map(drop).unwrap_err();
        assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
        let error = error.to_string();
        assert!(
            error.contains("/memory.") && error.contains("allows 0x8000000 bytes, of which"),
            "{error}"
        );
        let memory = build(whole()).unwrap();
        let error = prefault(&memory, NonZeroUsize::MIN, go_on).unwrap_err();
        assert!(
            matches!(error, PrefaultError::ControlGroup { .. }),
            "{error}"
        );
        // Memory in use counts against the limit.
        let held = build(region(0, 96 * MIB, Backing::Anonymous)).unwrap();
        prefault(&held, NonZeroUsize::MIN, go_on).unwrap();
        prefault(&held, NonZeroUsize::MIN, go_on).unwrap();
        let small = region(0, 64 * MIB, backing.clone());
        let builder = MemoryBuilder::new().region(small);
        let builder = builder.prefault(NonZeroUsize::MIN, go_on);
        let error = builder.build::<()>().map(drop).unwrap_err();
        assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
    }
}

#[test]
fn prefault_of_locked_file_above_memory_limit_names_the_limit() {
    let test = "prefault_of_locked_file_above_memory_limit_names_the_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let go_on = |_| ControlFlow::Continue(());
    // Locked pages of a file cannot be reclaimed.
    for make in [Backing::shared_file, Backing::private_file] {
        let whole = || {
            let file = test_support::temp_file_of_len(512 * MIB);
            region(0, 512 * MIB, make(file, 0)).lock(Lock::OnFault)
        };
        let builder = MemoryBuilder::new().region(whole());
        let builder = builder.prefault(NonZeroUsize::MIN, go_on);
        let error = builder.build::<()>().map(drop).unwrap_err();
        assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
        let memory = build(whole()).unwrap();
        let error = prefault(&memory, NonZeroUsize::MIN, go_on).unwrap_err();
        assert!(
            matches!(error, PrefaultError::ControlGroup { .. }),
            "{error}"
        );
    }
}

#[test]
fn build_after_mlockall_above_memory_limit_names_the_limit() {
    let test = "build_after_mlockall_above_memory_limit_names_the_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let size = 512 * MIB;
    let block = NonZeroU64::new(2 * MIB).unwrap();
    let (_, sent) = describe(&build(region(0, size, Backing::Memfd)).unwrap()).unwrap();
    let received = || Backing::shared_file(sent.get(0).unwrap().try_clone().unwrap(), 0);
    let file = || Backing::private_file(test_support::temp_file_of_len(size), 0);
    let regions = || {
        let blocks = region(0, size, Backing::Anonymous).blocks(block, Unplugged::Mapped);
        let others = [Backing::Anonymous, Backing::Memfd, received(), file()];
        let others = others.map(|backing| region(0, size, backing));
        let on_fault = region(0, size, Backing::Anonymous).lock(Lock::OnFault);
        [blocks, on_fault].into_iter().chain(others)
    };
    // The kernel populates nothing.
    let all = MlockAllFlags::FUTURE;
    if let Err(error) = mlockall(all | MlockAllFlags::ONFAULT) {
        return skipped(test, error);
    }
    for region in regions() {
        build(region).unwrap();
    }
    mlockall(all).unwrap();
    for region in regions() {
        let error = build(region).map(drop).unwrap_err();
        assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
    }
    build(region(0, 8 * MIB, Backing::Anonymous)).unwrap();
}

#[test]
fn build_on_tmpfs_above_memory_limit_names_the_limit() {
    let test = "build_on_tmpfs_above_memory_limit_names_the_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let Some(file) = file_on_tmpfs(512 * MIB, test) else {
        return;
    };
    let backing = || Backing::shared_file(file.try_clone().unwrap(), 0);
    // The build allocates space for a file on a tmpfs with a size limit.
    let error = build(region(0, 512 * MIB, backing())).unwrap_err();
    assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
    // A device may access a block while the guest unplugs it.
    if let Err(error) = vm_memory::fault::install() {
        return skipped(test, error);
    }
    let block = NonZeroU64::new(256 * MIB).unwrap();
    let blocks = region(0, 512 * MIB, backing()).blocks(block, Unplugged::Mapped);
    let memory = build(blocks).unwrap();
    let error = plug(&memory, GuestAddress(0), 256 * MIB).unwrap_err();
    assert!(matches!(error, ChangeError::ControlGroup { .. }), "{error}");
}

/// Pages that are allocated take no more memory. mincore(2) does not report those that were never
/// written.
#[test]
fn prefault_of_allocated_pages_of_tmpfs_succeeds_near_memory_limit() {
    let test = "prefault_of_allocated_pages_of_tmpfs_succeeds_near_memory_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let Some(file) = file_on_tmpfs(100 * MIB, test) else {
        return;
    };
    let go_on = |_| ControlFlow::Continue(());
    let whole = || {
        let backing = Backing::shared_file(file.try_clone().unwrap(), 0);
        MemoryBuilder::new().region(region(0, 100 * MIB, backing))
    };
    let memory: GuestMemoryMmap = whole().build().unwrap();
    prefault(&memory, NonZeroUsize::MIN, go_on).unwrap();
    drop(memory);
    // The build allocates the pages first.
    file.set_len(0).unwrap();
    file.set_len(100 * MIB).unwrap();
    let builder = whole().prefault(NonZeroUsize::MIN, go_on);
    builder.build::<()>().unwrap();
}

/// A private mapping reads the pages of its file, and does not copy them before it is written to.
#[test]
fn build_of_private_file_in_memory_succeeds_near_memory_limit() {
    let test = "build_of_private_file_in_memory_succeeds_near_memory_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let memfd = rustix::fs::memfd_create("saved", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let memfd = fs::File::from(memfd);
    let tmpfs = file_on_tmpfs(100 * MIB, test);
    for file in [memfd].into_iter().chain(tmpfs) {
        let mut writer = &file;
        for _ in 0..100 {
            writer.write_all(&[1; MIB as usize]).unwrap();
        }
        let whole = || {
            let backing = Backing::private_file(file.try_clone().unwrap(), 0);
            region(0, 100 * MIB, backing)
        };
        let builder = MemoryBuilder::new().region(whole());
        let go_on = |_| ControlFlow::Continue(());
        let builder = builder.prefault(NonZeroUsize::MIN, go_on);
        builder.build::<()>().unwrap();
        // A lock copies all pages.
        let error = build(whole().lock(Lock::Now)).map(drop).unwrap_err();
        assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
        file.set_len(0).unwrap();
    }
}

#[test]
fn plug_frees_old_pages_of_tmpfs_before_it_checks_the_memory_limit() {
    let test = "plug_frees_old_pages_of_tmpfs_before_it_checks_the_memory_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let Some(file) = file_on_tmpfs(128 * MIB, test) else {
        return;
    };
    // A device may access a block while the guest unplugs it.
    if let Err(error) = vm_memory::fault::install() {
        return skipped(test, error);
    }
    // Allocated and never written: mincore(2) does not report these pages.
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 64 * MIB).unwrap();
    let block = NonZeroU64::new(64 * MIB).unwrap();
    let backing = Backing::shared_file(file, 0);
    let blocks = region(0, 128 * MIB, backing).blocks(block, Unplugged::Mapped);
    let memory = build(blocks).unwrap();
    let plugged = plug(&memory, GuestAddress(0), 64 * MIB).unwrap();
    assert_eq!(plugged, 64 * MIB);
    let error = plug(&memory, GuestAddress(64 * MIB), 64 * MIB).unwrap_err();
    assert!(matches!(error, ChangeError::ControlGroup { .. }), "{error}");
}

#[test]
fn build_of_regions_of_one_file_above_memory_limit_names_the_limit() {
    let test = "build_of_regions_of_one_file_above_memory_limit_names_the_limit";
    if !is_in_group(Controller::of_memory, 128 * MIB, test) {
        return;
    }
    let file = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 160 * MIB).unwrap();
    let part = |offset, size| {
        region(
            offset,
            size,
            Backing::shared_file(file.try_clone().unwrap(), offset),
        )
    };
    let go_on = |_| ControlFlow::Continue(());
    let present = build(part(0, 64 * MIB)).unwrap();
    prefault(&present, NonZeroUsize::MIN, go_on).unwrap();
    // 96 MiB are missing, and 64 MiB are available.
    let halves = [part(0, 80 * MIB), part(80 * MIB, 80 * MIB)];
    for regions in [&halves[..], &[part(0, 160 * MIB)]] {
        let builder = regions
            .iter()
            .cloned()
            .fold(MemoryBuilder::new(), MemoryBuilder::region);
        let builder = builder.prefault(NonZeroUsize::MIN, go_on);
        let error = builder.build::<()>().map(drop).unwrap_err();
        assert!(
            matches!(error, BuildError::ControlGroup { wanted, .. } if wanted == 96 * MIB),
            "{error}"
        );
    }
}

#[test]
fn build_above_huge_page_limit_names_the_limit() {
    let test = "build_above_huge_page_limit_names_the_limit";
    let in_group = std::env::var_os(GROUP).is_some();
    let _pages = if in_group {
        None
    } else {
        match HugePages::reserve(10, test) {
            Some(pages) => Some(pages),
            None => return,
        }
    };
    if !is_in_group(Controller::of_huge_pages, 2 * HUGE, test) {
        return;
    }
    let file_of = |pages: u64| {
        let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
        let file = rustix::fs::memfd_create("huge", flags).unwrap();
        rustix::fs::ftruncate(&file, pages * HUGE).unwrap();
        file
    };
    for region in [
        region(0, 8 * HUGE, huge_pages()),
        region(0, 8 * HUGE, huge_pages()).numa(NumaPolicy::Bind(vec![0])),
        region(0, 8 * HUGE, Backing::shared_file(file_of(8), 0)),
        region(0, 8 * HUGE, Backing::private_file(file_of(8), 0)),
    ] {
        let shown = format!("{region:?}");
        let Err(error) = build(region) else {
            panic!("{shown}: no error");
        };
        assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
        let error = error.to_string();
        let expected = "hugetlb.2MB.";
        assert!(
            error.contains(expected) && error.contains("allows 0x400000 bytes"),
            "{error}"
        );
    }
    // This region has reserved all the pages that the limit allows.
    let two = build(region(0, 2 * HUGE, huge_pages())).unwrap();
    assert!(build(region(0, HUGE, huge_pages())).is_err());
    two.write_obj(1u8, GuestAddress(HUGE)).unwrap();
    drop(two);
    // Blocks take pages when they are plugged.
    if let Err(error) = vm_memory::fault::install() {
        return skipped(test, error);
    }
    let block = NonZeroU64::new(HUGE).unwrap();
    let blocks = region(0, 8 * HUGE, huge_pages()).blocks(block, Unplugged::Mapped);
    let memory = build(blocks).unwrap();
    plug(&memory, GuestAddress(0), HUGE).unwrap();
    let error = plug(&memory, GuestAddress(HUGE), 2 * HUGE).unwrap_err();
    assert!(matches!(error, ChangeError::ControlGroup { .. }), "{error}");
    plug(&memory, GuestAddress(HUGE), HUGE).unwrap();
    // A description lists more plugged blocks than the limit allows.
    let (mut description, files) = describe(&memory).unwrap();
    drop(memory);
    if let Some(blocks) = &mut description.regions[0].blocks {
        blocks.plugged = vec![(0, 8 * HUGE)];
    }
    let error = description.builder(files).unwrap().build::<()>();
    let error = error.map(drop).unwrap_err();
    assert!(matches!(error, BuildError::ControlGroup { .. }), "{error}");
}
