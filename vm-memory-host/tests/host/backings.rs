//! What is built is what was asked for.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::common::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryRegion,
};
use vm_memory_host::{
    describe, provisioned, Backing, BackingKind, Lock, MemoryBuilder, NumaPolicy, Region, Sharing,
    TransparentHugePages,
};

const START: u64 = 64 * MIB;
const SIZE: u64 = 4 * MIB;

#[test]
fn each_backing_holds_bytes_and_marks_pages() {
    let pages = HugePages::reserve(SIZE / HUGE, "hugetlb among the backings");
    for (kind, region) in of_each_kind(START, SIZE, pages.is_some()) {
        let memory = build(region).unwrap();
        let at = GuestAddress(START + SIZE - 8);
        let before = if kind.contains("file") {
            page_byte(SIZE / PAGE)
        } else {
            0
        };
        assert_eq!(page_of(&memory, at.0 - 4088), Some(before), "{kind}");
        memory.write_obj(0x1122_3344_5566_7788u64, at).unwrap();
        assert_eq!(
            memory.read_obj::<u64>(at).unwrap(),
            0x1122_3344_5566_7788,
            "{kind}"
        );
        assert!(
            memory.write_obj(1u8, GuestAddress(START + SIZE)).is_err() && memory.check_range(at, 8)
        );
        let region = memory.iter().next().unwrap();
        assert!(
            region.bitmap().dirty_at(SIZE as usize - 1) && !region.bitmap().dirty_at(0),
            "{kind}"
        );
        assert_eq!(region.is_hugetlbfs(), Some(kind.ends_with("hugetlb")));
        assert!(has_flag(host(&memory), "wr"), "{kind}");
    }
}

#[test]
fn shared_backings_are_the_files_and_private_ones_are_not() {
    let file = patterned_file(4);
    let again = || file.try_clone().unwrap();
    let shared =
        build(Region::new(GuestAddress(0), 2 * PAGE).backing(Backing::shared_file(again(), PAGE)))
            .unwrap();
    let private =
        build(Region::new(GuestAddress(0), 2 * PAGE).backing(Backing::private_file(again(), PAGE)))
            .unwrap();
    fill(&private, 0, PAGE, 0xaa);
    assert_eq!(page_of(&shared, 0), Some(page_byte(1)));
    fill(&shared, PAGE, PAGE, 0xbb);
    assert_eq!(page_of(&private, PAGE), Some(0xbb));
    let mut bytes = Vec::new();
    let mut from_start = again();
    std::io::Seek::rewind(&mut from_start).unwrap();
    from_start.read_to_end(&mut bytes).unwrap();
    assert_eq!(
        (bytes[PAGE as usize], bytes[2 * PAGE as usize]),
        (page_byte(1), 0xbb)
    );
    let mapping = provisioned(shared.iter().next().unwrap()).unwrap();
    assert_eq!(mapping.file().unwrap().1, PAGE);
    // Whether temporary files are on a disk is the machine's business.
    assert!(matches!(
        mapping.kind(),
        BackingKind::File | BackingKind::Memfd
    ));
}

#[test]
fn a_memfd_is_sealed_and_huge_ones_are_too() {
    let pages = HugePages::reserve(1, "seals of hugetlb");
    let mut backings = vec![Backing::Memfd];
    if pages.is_some() {
        backings.push(Backing::Hugetlb { page_size: HUGE });
    }
    for backing in backings {
        let memory = build(Region::new(GuestAddress(0), HUGE).backing(backing)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = GuestMemoryRegion::file_offset(region).unwrap().file();
        for len in [0, 2 * HUGE] {
            let error = file.set_len(len).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "length {len:#x}");
        }
        assert_eq!(file.metadata().unwrap().len(), HUGE);
        // And is described so.
        assert!(describe(&memory).unwrap().0.regions[0].options.sealed);
    }
}

#[test]
fn addresses_let_huge_pages_be_huge_for_the_guest() {
    // One MiB above a huge page: the host's address must be so, too.
    for start in [0, MIB, 0x1_0000_0000, 0x1_0010_0000] {
        for size in [2 * HUGE, 2 * HUGE + 3 * PAGE] {
            let memory = build(Region::new(GuestAddress(start), size)).unwrap();
            assert_eq!(
                host(&memory) as u64 % HUGE,
                start % HUGE,
                "{size:#x} bytes at {start:#x}"
            );
        }
    }
    let pages = HugePages::reserve(2, "the address of hugetlb");
    if pages.is_some() {
        let region =
            Region::new(GuestAddress(HUGE), 2 * HUGE).backing(Backing::Hugetlb { page_size: HUGE });
        assert_eq!(host(&build(region).unwrap()) as u64 % HUGE, 0);
    }
}

#[test]
fn adjacent_regions_share_a_reservation_with_guards_outside() {
    let memory: Memory = MemoryBuilder::new()
        .region(Region::new(GuestAddress(8 * MIB), 4 * MIB).backing(Backing::Memfd))
        .region(Region::new(GuestAddress(0), 8 * MIB))
        .region(Region::new(GuestAddress(12 * MIB), MIB))
        .region(Region::new(GuestAddress(64 * MIB), MIB).backing(Backing::Memfd))
        .build()
        .unwrap();
    let at = |addr: u64| memory.get_host_address(GuestAddress(addr)).unwrap() as usize;
    assert_eq!(
        (at(8 * MIB), at(12 * MIB)),
        (at(0) + 8 * MIB as usize, at(0) + 12 * MIB as usize)
    );
    for (first, len) in [(0, 13 * MIB), (64 * MIB, MIB)] {
        for guard in [at(first) - 1, at(first) + len as usize] {
            let (_, _, permissions) = area(guard).expect("there is a guard");
            assert_eq!(permissions, "---p");
        }
    }
    assert!(has_flag(at(64 * MIB), "sh") && area(at(12 * MIB)).unwrap().2 == "rw-p");
    // Each is unmapped when it goes, and its neighbours stay.
    let (without, removed) = memory
        .remove_region(GuestAddress(8 * MIB), 4 * MIB)
        .unwrap();
    let middle = at(8 * MIB);
    drop((memory, removed));
    assert_eq!(area(middle).unwrap().2, "---p");
    without.write_obj(1u8, GuestAddress(8 * MIB - 1)).unwrap();
    without.write_obj(1u8, GuestAddress(12 * MIB)).unwrap();
}

/// Whether this kernel has names for anonymous memory: they came with 5.17, and are an option of its build.
fn names_are_shown() -> bool {
    build(Region::new(GuestAddress(0), PAGE).name("n")).is_ok()
}

fn without_name(region: Region) -> Region {
    let mut options = region.options().clone();
    options.name = None;
    region.with_options(options)
}

#[test]
fn options_are_what_the_kernel_was_told() {
    let region = |name: &str| Region::new(GuestAddress(0), 4 * MIB).name(name);
    let plain = build(Region::new(GuestAddress(0), 4 * MIB)).unwrap();
    for flag in ["dd", "dc", "mg", "hg", "nh", "lo"] {
        assert!(!has_flag(host(&plain), flag), "{flag}");
    }
    let all = region("all of it")
        .core_dump(false)
        .forked(false)
        .mergeable(true)
        .transparent_huge_pages(TransparentHugePages::Off);
    if !names_are_shown() {
        skipped::<()>(
            "a name of anonymous memory",
            "the kernel has none (CONFIG_ANON_VMA_NAME)".to_owned(),
        );
        let error = build(all.clone()).unwrap_err().to_string();
        assert!(error.contains("cannot set its name"), "{error}");
    }
    let all = build(if names_are_shown() {
        all
    } else {
        without_name(all)
    })
    .unwrap();
    for flag in ["dd", "dc", "mg", "nh"] {
        assert!(has_flag(host(&all), flag), "{flag}");
    }
    let shown = smaps(host(&all));
    assert!(
        !names_are_shown() || shown.contains("[anon:all of it]"),
        "{shown}"
    );
    let named = build(region("a-memfd").backing(Backing::Memfd).core_dump(false)).unwrap();
    assert!(smaps(host(&named)).contains("memfd:a-memfd") && has_flag(host(&named), "dd"));

    let huge =
        Region::new(GuestAddress(0), 4 * MIB).transparent_huge_pages(TransparentHugePages::On);
    let huge = build(huge);
    match huge {
        Ok(huge) => assert!(has_flag(host(&huge), "hg")),
        Err(error) => drop(skipped::<()>("transparent huge pages", error.to_string())),
    }
    if !can_lock("locked memory among the options") {
        return;
    }
    for (lock, there) in [(Lock::Now, LOCKED), (Lock::OnFault, 0)] {
        let locked = build(Region::new(GuestAddress(0), LOCKED).lock(lock)).unwrap();
        assert!(has_flag(host(&locked), "lo"), "{lock:?}");
        assert_eq!(resident(&locked), there);
    }
}

#[test]
fn pages_come_from_the_nodes_that_were_named() {
    for (policy, word) in [
        (NumaPolicy::Bind(vec![0]), "bind"),
        (NumaPolicy::Preferred(0), "prefer"),
        (NumaPolicy::Interleave(vec![0]), "interleave"),
    ] {
        let memory = match build(Region::new(GuestAddress(0), MIB).numa(policy.clone())) {
            Ok(memory) => memory,
            Err(error) if error.to_string().contains("Function not implemented") => {
                skipped::<()>("a NUMA policy", error.to_string());
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let line = maps
            .lines()
            .find(|line| line.starts_with(&format!("{:x} ", host(&memory))));
        let line = line.expect("the area has a line");
        assert!(line.contains(word) && line.contains("N0=1"), "{line}");
    }
}

#[test]
fn a_description_builds_the_same_again() {
    let pages = HugePages::reserve(2, "hugetlb in a description");
    let file = patterned_file(64);
    // There are two of it at the same time.
    let mut private =
        Region::new(GuestAddress(8 * MIB), LOCKED / 2).backing(Backing::private_file(file, PAGE));
    if can_lock("locked memory in a description") {
        private = private.lock(Lock::OnFault);
    }
    let mut builder = MemoryBuilder::new()
        .region(
            Region::new(GuestAddress(0), 4 * MIB)
                .backing(Backing::Memfd)
                .name("low")
                .sealed(true),
        )
        .region(private)
        .region(Region::new(GuestAddress(16 * MIB), MIB).core_dump(false));
    if pages.is_some() {
        let huge = Region::new(GuestAddress(32 * MIB), 2 * HUGE)
            .backing(Backing::Hugetlb { page_size: HUGE });
        builder = builder.region(huge);
    }
    let memory: Memory = builder.build().unwrap();
    fill(&memory, MIB, PAGE, 0x5a);
    let (description, files) = describe(&memory).unwrap();
    let text = serde_json::to_string(&description).unwrap();
    let received: vm_memory_host::Description = serde_json::from_str(&text).unwrap();
    assert_eq!(received, description);

    let fds = || {
        files
            .iter()
            .map(|file| file.try_clone().unwrap().into())
            .collect::<Vec<_>>()
    };
    let again: Memory = received.builder(fds()).unwrap().build().unwrap();
    assert_eq!(describe(&again).unwrap().0, description);
    assert_eq!(page_of(&again, MIB), Some(0x5a));
    assert_eq!(page_of(&again, 8 * MIB), Some(page_byte(1)));
    assert_eq!(page_of(&again, 16 * MIB), Some(0));
    if pages.is_some() {
        fill(&again, 32 * MIB, PAGE, 0x77);
        assert_eq!(page_of(&memory, 32 * MIB), Some(0x77));
    }

    // Descriptors in another order are not what was described.
    let mut swapped = fds();
    swapped.swap(0, 1);
    let error = received
        .builder(swapped)
        .unwrap()
        .build::<()>()
        .unwrap_err()
        .to_string();
    let told = error.contains("is not sealed against shrinking")
        || error.contains("the description states");
    assert!(told, "{error}");
    // Nor is a memfd of ordinary pages one of huge ones, whatever the description states.
    let mut larger = received.clone();
    if let vm_memory_host::BackingDescription::Descriptor { page_size, .. } =
        &mut larger.regions[0].backing
    {
        *page_size = HUGE;
    }
    let error = larger
        .builder(fds())
        .unwrap()
        .build::<()>()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the description states memfd with pages of 0x200000 bytes"),
        "{error}"
    );
    let mut later = received.clone();
    later.version += 1;
    assert!(later.builder(fds()).is_err());

    // A descriptor less is told.
    let mut fewer = fds();
    fewer.pop();
    let error = received.builder(fewer).unwrap_err().to_string();
    assert!(error.contains("is missing, only"), "{error}");

    let shown = description.to_string();
    assert!(
        shown.starts_with("00000000-003fffff : memfd \"low\", descriptor 0 at 0x0\n"),
        "{shown}"
    );
    assert!(
        shown.contains("00800000-00807fff : file, descriptor 1 at 0x1000, private copy\n")
            || shown.contains("00800000-00807fff : memfd, descriptor 1 at 0x1000, private copy\n"),
        "{shown}"
    );
    assert!(shown.contains("01000000-010fffff : anonymous\n"), "{shown}");
}

#[test]
fn regions_that_are_parts_of_one_file_name_it_once() {
    let file = Arc::new(patterned_file(16));
    let part = |start: u64, offset: u64| {
        Region::new(GuestAddress(start), 4 * PAGE).backing(Backing::File {
            file: Arc::clone(&file),
            offset,
            sharing: Sharing::Shared,
        })
    };
    let memory: Memory = MemoryBuilder::new()
        .region(part(0, 8 * PAGE))
        .region(part(MIB, 0))
        .build()
        .unwrap();
    let (description, files) = describe(&memory).unwrap();
    assert_eq!(files.len(), 1);
    let received = vec![files[0].try_clone().unwrap().into()];
    let again: Memory = description.builder(received).unwrap().build().unwrap();
    assert_eq!(
        (page_of(&again, 0), page_of(&again, MIB)),
        (Some(page_byte(8)), Some(page_byte(0)))
    );
}

/// A region that is swapped out of the map is unmapped when the last reader is gone, and not before.
#[test]
fn a_region_goes_with_its_last_map() {
    let boot = build(Region::new(GuestAddress(0), MIB)).unwrap();
    let memory = GuestMemoryAtomic::new(boot);
    let module = build(Region::new(GuestAddress(1 << 32), MIB).backing(Backing::Memfd)).unwrap();
    let (_, region) = module.remove_region(GuestAddress(1 << 32), MIB).unwrap();
    drop(module);
    let address = provisioned(&region).unwrap().host_address();
    memory.update(|map| map.insert_region(region)).unwrap();
    let reader = memory.memory();
    reader.write_obj(1u8, GuestAddress(1 << 32)).unwrap();
    let before = GuestAddress(1 << 32);
    let old = memory
        .update(|map| map.remove_region(before, MIB).map(|(map, _)| map))
        .unwrap();
    drop(old);
    assert_eq!(area(address).unwrap().2, "rw-s");
    reader.write_obj(2u8, GuestAddress(1 << 32)).unwrap();
    drop(reader);
    assert!(area(address).is_none_or(|(_, _, permissions)| permissions != "rw-s"));
}

#[test]
fn pages_are_there_after_prefaulting_and_bytes_stay() {
    let pages = HugePages::reserve(8, "prefaulting hugetlb");
    for (kind, region) in of_each_kind(0, 16 * MIB, pages.is_some()) {
        let memory = build(region).unwrap();
        fill(&memory, PAGE, PAGE, 0x42);
        let mut seen = Vec::new();
        let threads = std::num::NonZeroUsize::new(2).unwrap();
        vm_memory_host::prefault(&memory, threads, |progress| {
            seen.push(progress);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(resident(&memory), 16 * MIB, "{kind}");
        assert_eq!(page_of(&memory, PAGE), Some(0x42), "{kind}");
        assert!(seen.windows(2).all(|pair| pair[0].done < pair[1].done));
        assert_eq!(
            seen.last().map(|last| (last.done, last.total)),
            Some((16 * MIB, 16 * MIB))
        );
    }
}

#[test]
fn a_prefault_ends_when_it_is_told_to() {
    let told = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&told);
    let threads = std::num::NonZeroUsize::new(2).unwrap();
    let error = MemoryBuilder::new()
        .region(Region::new(GuestAddress(0), 256 * MIB))
        .prefault(threads, move |progress| {
            noted.store(progress.done < progress.total, Ordering::Relaxed);
            std::ops::ControlFlow::Break(())
        })
        .build::<()>()
        .unwrap_err();
    assert!(told.load(Ordering::Relaxed));
    let message = error.to_string();
    assert!(
        message.starts_with("prefault cancelled after 0x2000000 of 0x10000000"),
        "{message}"
    );
}

#[test]
fn a_shared_file_has_its_blocks_unless_it_may_have_holes() {
    use std::os::unix::fs::MetadataExt;
    for sparse in [false, true] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        let shared = Backing::shared_file(file.try_clone().unwrap(), MIB);
        let memory = build(
            Region::new(GuestAddress(0), 2 * MIB)
                .backing(shared)
                .sparse(sparse),
        )
        .unwrap();
        let taken = file.metadata().unwrap().blocks() * 512;
        let kind = provisioned(memory.iter().next().unwrap()).unwrap().kind();
        let wanted = if sparse { 0 } else { 2 * MIB };
        assert!(
            taken >= wanted && (taken == 0) == sparse,
            "{taken:#x} on {kind:?}"
        );
        assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
    }
}

#[test]
fn pages_are_brought_in_for_writing_by_as_many_threads() {
    let memory = build(Region::new(GuestAddress(0), 512 * MIB)).unwrap();
    let mut threads = std::collections::HashSet::new();
    vm_memory_host::prefault(&memory, std::num::NonZeroUsize::new(2).unwrap(), |_| {
        threads.insert(std::thread::current().id());
        // A turn for the other one.
        std::thread::sleep(std::time::Duration::from_millis(5));
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(threads.len(), 2);
    // Not the one page of zeroes, which would be copied when the guest writes.
    let anonymous = smaps(host(&memory));
    let anonymous = anonymous
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"))
        .unwrap();
    assert_eq!(anonymous.trim(), format!("{} kB", 512 << 10));
}

/// The largest pages that there are, where the machine can find one.
#[test]
fn huge_pages_of_a_gibibyte() {
    const GIB: u64 = 1 << 30;
    let test = "huge pages of 1 GiB";
    // Others that change pools wait for this one.
    let Some(_turn) = HugePages::reserve(0, test) else {
        return;
    };
    let number = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    let free = || {
        let pools = vm_memory_host::huge_page_pools();
        pools
            .iter()
            .find(|pool| pool.page_size == GIB)
            .map_or(0, |pool| pool.free)
    };
    let before = std::fs::read_to_string(number).unwrap_or_default();
    let more = before.trim().parse::<u64>().map(|number| number + 1);
    let more = more.map_or(Err("the machine has none".to_owned()), |more| {
        std::fs::write(number, more.to_string()).map_err(|error| error.to_string())
    });
    if more.is_err() || free() == 0 {
        skipped::<()>(
            test,
            format!("none could be had: {more:?}, {} free", free()),
        );
    } else {
        let region =
            Region::new(GuestAddress(4 * GIB), GIB).backing(Backing::Hugetlb { page_size: GIB });
        // What others left in the pool is theirs.
        let there = free();
        let memory = build(region).unwrap();
        assert_eq!((host(&memory) as u64 % GIB, free()), (0, there - 1));
        memory
            .write_obj(0x1234_5678u32, GuestAddress(5 * GIB - 4))
            .unwrap();
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(5 * GIB - 4)).unwrap(),
            0x1234_5678
        );
        assert_eq!(resident(&memory), GIB);
        let half =
            Region::new(GuestAddress(0), GIB / 2).backing(Backing::Hugetlb { page_size: GIB });
        let error = build(half).map(|_| ()).unwrap_err().to_string();
        assert!(
            error.contains("not a multiple of the page size, 0x40000000"),
            "{error}"
        );
    }
    let _ = std::fs::write(number, before.trim());
}
