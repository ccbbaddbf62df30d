//! A build in a jail without /sys and /proc.
//!
//! The test changes the root directory of its process, so it is a separate program.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Read;

use rustix::process::chroot;
use test_support::{skipped, MIB};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{provisioned, MemoryBuilder, Region, TransparentHugePages};

#[test]
fn build_in_jail_without_sys_applies_transparent_huge_page_policies() {
    let test = "build_in_jail_without_sys_applies_transparent_huge_page_policies";
    let enabled = "/sys/kernel/mm/transparent_hugepage/enabled";
    if !fs::exists(enabled).unwrap() {
        return skipped(test, "no transparent huge pages");
    }
    let mut smaps = fs::File::open("/proc/self/smaps").unwrap();
    let jail = tempfile::tempdir().unwrap();
    if let Err(error) = chroot(jail.path()) {
        return skipped(test, format!("chroot: {error}"));
    }
    let start = GuestAddress(0);
    let policies = [
        (TransparentHugePages::Off, "nh"),
        (TransparentHugePages::On, "hg"),
    ];
    // Mapped at the same time, so that each begins a VMA.
    let memories = policies.map(|(policy, flag)| {
        let region = Region::new(start, 8 * MIB).transparent_huge_pages(policy);
        let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
        (memory, flag)
    });
    let mut text = String::new();
    smaps.read_to_string(&mut text).unwrap();
    for (memory, flag) in &memories {
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        let head = format!("{:x}-", mapping.host_address());
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
        let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.split(' ').any(|word| word == *flag), "{flags}");
    }
}
