//! The limits of a process are errors, and no signals; and what it has locked can be given back. A program of its own: limits are those of the whole process.
#![cfg(target_os = "linux")]

use std::io::Write;
use std::num::NonZeroU64;

use rustix::process::{getrlimit, setrlimit, Resource};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{discard, plug, unplug, Backing, MemoryBuilder, Region, Unplugged};

const MIB: u64 = 1 << 20;

fn build(region: Region) -> Result<GuestMemoryMmap, String> {
    MemoryBuilder::new()
        .region(region)
        .build()
        .map_err(|error| error.to_string())
}

#[test]
fn limits_are_told_and_locked_pages_given_back() {
    // (ulimit -f): the kernel would send SIGXFSZ.
    let before = getrlimit(Resource::Fsize);
    setrlimit(
        Resource::Fsize,
        rustix::process::Rlimit {
            current: Some(MIB),
            ..before
        },
    )
    .unwrap();
    let error = build(Region::new(GuestAddress(0), 16 * MIB).backing(Backing::Memfd)).unwrap_err();
    assert!(
        error.contains("let the process have longer files (ulimit -f)"),
        "{error}"
    );
    assert!(build(Region::new(GuestAddress(0), MIB).backing(Backing::Memfd)).is_ok());
    setrlimit(Resource::Fsize, before).unwrap();

    // A monitor that locks all that it has, and asks nothing of its regions.
    let flags = rustix::mm::MlockAllFlags::CURRENT
        | rustix::mm::MlockAllFlags::FUTURE
        | rustix::mm::MlockAllFlags::ONFAULT;
    if let Err(error) = rustix::mm::mlockall(flags) {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: a process that locks its memory: {error}"
        );
        return;
    }
    let memory = build(Region::new(GuestAddress(0), 4 * MIB)).unwrap();
    memory.write_obj(7u8, GuestAddress(0)).unwrap();
    assert_eq!(discard(&memory, GuestAddress(0), MIB).unwrap(), MIB);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    let block = NonZeroU64::new(MIB).unwrap();
    let memory = build(Region::new(GuestAddress(0), 4 * MIB).blocks(block, Unplugged::Protected)).unwrap();
    plug(&memory, GuestAddress(MIB), MIB).unwrap();
    memory.write_obj(7u8, GuestAddress(MIB)).unwrap();
    unplug(&memory, GuestAddress(MIB), MIB).unwrap();
}
