//! A build in a jail without /sys and /proc.
//!
//! The test changes the root directory of its process, so it is a program of its own.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Read;

use rustix::process::chroot;
use test_support::skipped;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{provisioned, MemoryBuilder, Region, TransparentHugePages};

const MIB: u64 = 1 << 20;

#[test]
fn build_in_jail_without_sys_disables_transparent_huge_pages() {
    let test = "build_in_jail_without_sys_disables_transparent_huge_pages";
    let enabled = "/sys/kernel/mm/transparent_hugepage/enabled";
    if !fs::exists(enabled).unwrap() {
        return skipped(test, "no transparent huge pages");
    }
    let mut smaps = fs::File::open("/proc/self/smaps").unwrap();
    let jail = tempfile::tempdir().unwrap();
    if let Err(error) = chroot(jail.path()) {
        return skipped(test, format!("chroot: {error}"));
    }
    let region = Region::new(GuestAddress(0), 8 * MIB);
    let region = region.transparent_huge_pages(TransparentHugePages::Off);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
    let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
    let mut text = String::new();
    smaps.read_to_string(&mut text).unwrap();
    let head = format!("{:x}-", mapping.host_address());
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
    let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
    assert!(flags.split(' ').any(|flag| flag == "nh"), "{flags}");
}
