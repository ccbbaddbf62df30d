//! Memory is given back, and built, in a process that is at its limits. Each test starts this program again for itself: it changes limits, and counts what is
//! mapped.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::process::Command;
use std::sync::Arc;

use rustix::mm::{mlockall, munlockall, MlockAllFlags};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
use rustix::thread::{capabilities, set_capabilities, CapabilitySet};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};
use vm_memory_host::{
    discard, plug, provisioned, unplug, Backing, MemoryBuilder, Region, Unplugged,
};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Whether this is the process that a test has to itself; if not, the test is run in one.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "VM_MEMORY_HOST_TEST_IS_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    // With one thread, the test is run by the first one, and others map nothing meanwhile.
    again.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    // A panic at a limit has no memory for more than its message.
    let answer = again
        .env(ALONE, "")
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&answer.stderr);
    for line in said.lines().filter(|line| line.starts_with("SKIPPED")) {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    assert!(answer.status.success(), "{}: {said}", answer.status);
    // Of a name that is none, none is run.
    assert!(String::from_utf8_lossy(&answer.stdout).contains("1 passed"));
    false
}

/// A limit that is as it was when this is dropped.
struct Limited(Resource, Rlimit);

impl Limited {
    fn to(resource: Resource, most: u64) -> Self {
        let before = getrlimit(resource);
        let now = Rlimit {
            current: Some(most),
            maximum: before.maximum,
        };
        setrlimit(resource, now).unwrap();
        Self(resource, before)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        setrlimit(self.0, self.1).unwrap();
    }
}

/// Bytes, by the name of a line of /proc/self/status.
fn status(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}

fn areas() -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().map(str::to_owned).collect()
}

/// How many areas a process may have.
fn most_areas() -> u64 {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    most.trim().parse().unwrap()
}

/// A mapping of a file of its own, without bytes yet, of which what is written is copied.
fn private_file(size: u64) -> GuestMemoryMmap {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let region = Region::new(GuestAddress(0), size).backing(Backing::private_file(file, 0));
    MemoryBuilder::new().region(region).build().unwrap()
}

fn filled(regions: &[Region]) -> GuestMemoryMmap {
    let builder = regions
        .iter()
        .fold(MemoryBuilder::new(), |builder, region| {
            builder.region(region.clone())
        });
    let prefault = builder.prefault(NonZeroUsize::MIN, |_| ControlFlow::Continue(()));
    prefault.build().unwrap()
}

/// The bytes that are resident fall by what is dropped, whether or not it was all of a reservation and whatever it is kept in.
#[test]
fn memory_goes_when_there_are_no_addresses_left() {
    if !is_alone("memory_goes_when_there_are_no_addresses_left") {
        return;
    }
    let backings = [("anonymous", Backing::Anonymous), ("memfd", Backing::Memfd)];
    for (what, backing) in backings {
        let of = |start: u64| Region::new(GuestAddress(start), 32 * MIB).backing(backing.clone());
        // All of it.
        let before = status("VmRSS");
        let memory = filled(&[of(0)]);
        assert!(status("VmRSS") > before + 30 * MIB, "{what}");
        let limit = Limited::to(Resource::As, 16 * MIB);
        drop(memory);
        drop(limit);
        let after = status("VmRSS");
        assert!(
            after < before + 8 * MIB,
            "{what}: {before} bytes before, {after} after"
        );

        // One of three that share a reservation, in the middle; then the others.
        let all = filled(&[of(0), of(32 * MIB), of(64 * MIB)]);
        let (memory, region) = all.remove_region(GuestAddress(32 * MIB), 32 * MIB).unwrap();
        drop(all);
        let three = status("VmRSS");
        let limit = Limited::to(Resource::As, 16 * MIB);
        drop(region);
        drop(limit);
        let two = status("VmRSS");
        assert!(
            two + 30 * MIB < three,
            "{what}: {three} bytes with three, {two} with two"
        );
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        memory.write_obj(7u8, GuestAddress(64 * MIB)).unwrap();
        drop(memory);
        let after = status("VmRSS");
        assert!(
            after < before + 8 * MIB,
            "{what}: {before} bytes before, {after} after"
        );
        assert!(!areas().iter().any(|area| area.contains("memfd")), "{what}");
    }
}

/// The same where there can be no more areas.
#[test]
fn memory_goes_when_there_are_no_areas_left() {
    if !is_alone("memory_goes_when_there_are_no_areas_left") {
        return;
    }
    let of = |start: u64| Region::new(GuestAddress(start), 32 * MIB);
    let one = filled(&[of(0)]);
    let two = filled(&[of(0), of(32 * MIB)]);
    let (other, region) = two.remove_region(GuestAddress(0), 32 * MIB).unwrap();
    drop(two);
    let before = status("VmRSS");
    // Each second page of a file, each mapped by itself.
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(4 * PAGE).unwrap();
    let mut areas: Vec<MmapRegion> = Vec::with_capacity(1 << 20);
    while let Ok(area) = MmapRegion::from_file(
        FileOffset::from_arc(Arc::clone(&file), areas.len() as u64 % 2 * 2 * PAGE),
        4096,
    ) {
        areas.push(area);
        if areas.len() == areas.capacity() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no limit to areas");
            return;
        }
    }
    let full = status("VmRSS");
    drop(one);
    drop(region);
    let after = status("VmRSS");
    drop(areas);
    assert!(
        full >= before && after + 60 * MIB < full,
        "{full} bytes before, {after} after"
    );
    other.write_obj(7u8, GuestAddress(32 * MIB)).unwrap();
}

/// What somebody else maps where a region was is not unmapped with the rest.
#[test]
fn addresses_that_went_back_are_left_alone() {
    if !is_alone("addresses_that_went_back_are_left_alone") {
        return;
    }
    let of = |start: u64| Region::new(GuestAddress(start), 2 * MIB);
    let all = filled(&[of(0), of(2 * MIB), of(4 * MIB)]);
    let (memory, region) = all.remove_region(GuestAddress(2 * MIB), 2 * MIB).unwrap();
    drop(all);
    let start = provisioned(region.as_ref()).unwrap().host_address();
    let hole = start..start + (2 << 20);
    let limit = Limited::to(Resource::As, 2 * MIB);
    drop(region);
    drop(limit);
    // The kernel fills one gap after the other, and comes to this one.
    let mut others: Vec<MmapRegion> = Vec::new();
    while !others
        .iter()
        .any(|other| hole.contains(&other.as_ptr().addr()))
    {
        if others.len() == 4096 {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: nobody is given addresses that went back"
            );
            return;
        }
        others.push(MmapRegion::new(1 << 20).unwrap());
    }
    drop(memory);
    for other in &others {
        let slice = other.get_slice(0, 1 << 20).unwrap();
        slice.write_obj(0x55u8, 0).unwrap();
        assert_eq!(slice.read_obj::<u8>(0).unwrap(), 0x55);
    }
}

/// Pages of a private file are zeroes at any limit; and what was refused again and again has used up nothing.
#[test]
fn replacements_that_are_refused_use_up_no_areas() {
    if !is_alone("replacements_that_are_refused_use_up_no_areas") {
        return;
    }
    let most = most_areas();
    let memory = private_file(4 * MIB);
    memory.write_obj(1u8, GuestAddress(0)).unwrap();
    let limit = Limited::to(Resource::As, MIB);
    for _ in 0..most / 4 + 100 {
        assert_eq!(discard(&memory, GuestAddress(0), PAGE).unwrap(), 0);
    }
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    drop(limit);
    let before = areas();
    memory.write_obj(1u8, GuestAddress(0)).unwrap();
    assert_eq!(discard(&memory, GuestAddress(0), PAGE).unwrap(), PAGE);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    // A replacement is one more area, and leaves nothing elsewhere.
    assert_eq!(areas().len(), before.len() + 1);
}

/// Ranges that were given back one by one and then together cost no more than one.
#[test]
fn ranges_that_join_give_their_areas_back() {
    if !is_alone("ranges_that_join_give_their_areas_back") {
        return;
    }
    let most = most_areas();
    let pages = most / 2 + 1000;
    let memory = private_file(pages * PAGE);
    let give_back =
        |page: u64, count: u64| discard(&memory, GuestAddress(page * PAGE), count * PAGE).unwrap();
    for page in (0..pages).step_by(2) {
        give_back(page, 1);
    }
    assert_eq!(give_back(pages - 1, 1), 0, "there is room yet");
    // All but the last two, which become a range of their own.
    assert_eq!(give_back(0, pages - 3), (pages - 3) * PAGE);
    assert_eq!(give_back(pages - 1, 1), PAGE);
}

/// A build that fails leaves nothing. Memory that can be written counts as data, and a reservation does not.
#[test]
fn a_build_that_fails_leaves_no_addresses() {
    if !is_alone("a_build_that_fails_leaves_no_addresses") {
        return;
    }
    let build = || {
        let region = Region::new(GuestAddress(0), 1024 * MIB);
        MemoryBuilder::new().region(region).build::<()>()
    };
    drop(build().unwrap());
    let before = status("VmSize");
    let limit = Limited::to(Resource::Data, status("VmData") + 32 * MIB);
    let answers: Vec<_> = (0..4).map(|_| build().map(drop)).collect();
    drop(limit);
    for answer in answers {
        let error = answer.unwrap_err();
        assert!(error.to_string().contains("cannot map it"), "{error}");
    }
    let after = status("VmSize");
    assert!(
        after < before + 1024 * MIB,
        "{before} bytes of addresses before, {after} after"
    );
}

/// In a process that locks all that it maps and may lock so much only, anonymous memory is counted once, and not until the process ends.
#[test]
fn memory_of_a_locked_process_is_counted_once() {
    if !is_alone("memory_of_a_locked_process_is_counted_once") {
        return;
    }
    let few = Rlimit {
        current: Some(7 * MIB),
        ..getrlimit(Resource::Memlock)
    };
    if let Err(error) = setrlimit(Resource::Memlock, few) {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: a process that may lock 7 MiB: {error}"
        );
        return;
    }
    // Who has this capability has no limit.
    let mut mine = capabilities(None).unwrap();
    mine.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, mine).unwrap();
    if let Err(error) = mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT) {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: a process that is locked: {error}"
        );
        return;
    }
    let region = Region::new(GuestAddress(0), 4 * MIB);
    let builds = || MemoryBuilder::new().region(region.clone()).build::<()>();
    let answers: Vec<_> = (0..3).map(|_| builds().map(drop)).collect();
    munlockall().unwrap();
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
}

/// In a process that locks all that it maps, zeroes are no pages before they are in their place either.
#[test]
fn a_process_that_is_locked_makes_no_areas() {
    if !is_alone("a_process_that_is_locked_makes_no_areas") {
        return;
    }
    if let Err(error) = mlockall(MlockAllFlags::FUTURE) {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: a process that is locked: {error}"
        );
        return;
    }
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * MIB).unwrap();
    let region = Region::new(GuestAddress(0), 4 * MIB).backing(Backing::private_file(file, 0));
    let built = MemoryBuilder::new().region(region).build::<()>();
    match built {
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: a process that is locked: {error}"
            );
        }
        Ok(memory) => {
            let before = areas().len();
            let (locked, resident) = (status("VmLck"), status("RssAnon"));
            for page in 0..500 {
                let page = GuestAddress(page * PAGE);
                memory.write_obj(1u8, page).unwrap();
                assert_eq!(discard(&memory, page, PAGE).unwrap(), PAGE);
                if page.0.is_multiple_of(2 * PAGE) {
                    memory.write_obj(1u8, page).unwrap();
                }
            }
            let more = areas().len() - before;
            assert!(more < 20, "{more} areas more");
            // As much is locked as was, and what nobody uses is no page.
            assert!(status("VmLck") + MIB > locked && status("VmLck") < locked + MIB);
            assert!(status("RssAnon") + 200 * PAGE < resident);
        }
    }
    munlockall().unwrap();
}

/// A file that may not be made so long (ulimit -f) is an error: the kernel would send SIGXFSZ.
#[test]
fn a_memfd_that_may_not_be_so_long_is_an_error() {
    if !is_alone("a_memfd_that_may_not_be_so_long_is_an_error") {
        return;
    }
    let _limit = Limited::to(Resource::Fsize, MIB);
    let memfd = |size| {
        let region = Region::new(GuestAddress(0), size).backing(Backing::Memfd);
        MemoryBuilder::new().region(region).build::<()>()
    };
    let error = memfd(16 * MIB).unwrap_err().to_string();
    assert!(
        error.contains("raise the file size limit (ulimit -f)"),
        "{error}"
    );
    assert!(memfd(MIB).is_ok());
}

/// A monitor that locks all that it has, and asks nothing of its regions, can give back, plug and unplug.
#[test]
fn what_a_process_has_locked_can_be_given_back() {
    if !is_alone("what_a_process_has_locked_can_be_given_back") {
        return;
    }
    if let Err(error) =
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
    {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: a process that locks its memory: {error}"
        );
        return;
    }
    let region = || Region::new(GuestAddress(0), 4 * MIB);
    let build =
        |region| -> GuestMemoryMmap { MemoryBuilder::new().region(region).build().unwrap() };
    let memory = build(region());
    memory.write_obj(7u8, GuestAddress(0)).unwrap();
    assert_eq!(discard(&memory, GuestAddress(0), MIB).unwrap(), MIB);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    let block = NonZeroU64::new(MIB).unwrap();
    let memory = build(region().blocks(block, Unplugged::Protected));
    plug(&memory, GuestAddress(MIB), MIB).unwrap();
    memory.write_obj(7u8, GuestAddress(MIB)).unwrap();
    unplug(&memory, GuestAddress(MIB), MIB).unwrap();
}
