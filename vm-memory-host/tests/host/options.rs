//! The options of a region, as the kernel reports them.

use super::common::*;
use test_support::skipped;
use vm_memory::{Bytes, GuestAddress};
use vm_memory_host::{
    discard, Backing, Lock, MemoryBuilder, NumaPolicy, Region, TransparentHugePages, Unplugged,
};

fn names_are_supported() -> bool {
    build(
        Region::new(GuestAddress(0), PAGE)
            .name("n")
            .require_name(true),
    )
    .is_ok()
}

#[test]
fn build_applies_options_to_the_mapping() {
    let region = |name: &str| Region::new(GuestAddress(0), 4 * MIB).name(name);
    let plain = build(Region::new(GuestAddress(0), 4 * MIB)).unwrap();
    for flag in ["dd", "dc", "mg", "hg", "nh", "lo"] {
        assert!(!has_flag(host_address(&plain), flag), "{flag}");
    }
    let all = region("all of it")
        .core_dump(false)
        .forked(false)
        .mergeable(true)
        .transparent_huge_pages(TransparentHugePages::Off);
    if !names_are_supported() {
        skipped(
            "build_applies_options_to_the_mapping (name)",
            "no CONFIG_ANON_VMA_NAME",
        );
        let error = build(all.clone().require_name(true)).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("cannot set its name"), "{error}");
    }
    let all = build(all).unwrap();
    for flag in ["dd", "dc", "mg", "nh"] {
        assert!(has_flag(host_address(&all), flag), "{flag}");
    }
    let shown = smaps(host_address(&all));
    assert!(
        !names_are_supported() || shown.contains("[anon:all of it]"),
        "{shown}"
    );
    let named = build(region("a-memfd").backing(Backing::Memfd).core_dump(false)).unwrap();
    assert!(
        smaps(host_address(&named)).contains("memfd:a-memfd")
            && has_flag(host_address(&named), "dd")
    );

    let huge =
        Region::new(GuestAddress(0), 4 * MIB).transparent_huge_pages(TransparentHugePages::On);
    let huge = build(huge);
    match huge {
        Ok(huge) => assert!(has_flag(host_address(&huge), "hg")),
        Err(error) => skipped("build_applies_options_to_the_mapping (huge pages)", error),
    }
    if !can_lock("build_applies_options_to_the_mapping (locked)") {
        return;
    }
    for (lock, there) in [(Lock::Now, LOCKED), (Lock::OnFault, 0)] {
        let locked = build(Region::new(GuestAddress(0), LOCKED).lock(lock)).unwrap();
        assert!(has_flag(host_address(&locked), "lo"), "{lock:?}");
        assert_eq!(resident(&locked), there);
    }
}

#[test]
fn numa_policy_places_pages_on_its_nodes() {
    for (policy, word) in [
        (NumaPolicy::Bind(vec![0]), "bind"),
        (NumaPolicy::Preferred(0), "prefer"),
        (NumaPolicy::Interleave(vec![0]), "interleave"),
    ] {
        let memory = match build(Region::new(GuestAddress(0), MIB).numa(policy.clone())) {
            Ok(memory) => memory,
            Err(error) if error.to_string().contains("Function not implemented") => {
                skipped("numa_policy_places_pages_on_its_nodes", error);
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let line = maps
            .lines()
            .find(|line| line.starts_with(&format!("{:x} ", host_address(&memory))));
        let line = line.expect("numa_maps lists the VMA");
        assert!(line.contains(word) && line.contains("N0=1"), "{line}");
    }
}

#[test]
fn reserve_accounts_for_the_region() {
    for reserve in [false, true] {
        let region = |start| Region::new(GuestAddress(start), 4 * MIB);
        let memory: Memory = MemoryBuilder::new()
            .region(region(0).reserve(reserve))
            .region(region(4 * MIB).backing(Backing::Memfd))
            .build()
            .unwrap();
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let address = host_address(&memory);
        assert_eq!(has_flag(address, "ac"), reserve);
        // Discarded pages stay reserved.
        discard(&memory, GuestAddress(0), 4 * MIB).unwrap();
        assert_eq!(has_flag(address, "ac"), reserve);
    }
    let region = || Region::new(GuestAddress(0), 4 * MIB).reserve(true);
    for conflict in [
        region().backing(Backing::Memfd),
        region().blocks(non_zero(MIB), Unplugged::Mapped),
    ] {
        let error = build(conflict).unwrap_err().to_string();
        assert!(error.contains("only anonymous memory"), "{error}");
    }
    let setting = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap();
    if setting.trim() != "0" {
        return skipped("reserve_accounts_for_the_region (size)", setting);
    }
    let all = Region::new(GuestAddress(0), 1 << 44);
    assert!(build(all.clone()).is_ok());
    let error = build(all.reserve(true)).unwrap_err().to_string();
    assert!(error.contains("vm.overcommit_memory is 0"), "{error}");
}

#[test]
fn lock_on_fault_of_huge_pages_populates_nothing() {
    let test = "lock_on_fault_of_huge_pages_populates_nothing";
    let Some(pages) = test_support::HugePages::reserve(4, test) else {
        return;
    };
    let region = || {
        let region = Region::new(GuestAddress(0), 4 * HUGE).lock(Lock::OnFault);
        region.backing(Backing::Hugetlb { page_size: HUGE })
    };
    let free = pages.free();
    for region in [
        region(),
        region().blocks(non_zero(HUGE), Unplugged::Mapped),
        region().blocks(non_zero(HUGE), Unplugged::Protected),
        // The pool has too few pages for all blocks.
        Region::new(GuestAddress(0), 1 << 30)
            .lock(Lock::OnFault)
            .backing(Backing::Hugetlb { page_size: HUGE })
            .blocks(non_zero(HUGE), Unplugged::Mapped),
    ] {
        let memory = build(region).unwrap();
        assert_eq!(resident(&memory), 0);
        assert_eq!(pages.free(), free);
    }
}
