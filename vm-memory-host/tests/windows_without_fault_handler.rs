//! Discards and blocks on Windows in a process without the fault handler.
#![cfg(windows)]

use std::num::NonZeroU64;

use vm_memory::{fault, Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{discard, BuildError, MemoryBuilder, Region, Unplugged};

#[test]
fn discard_without_fault_handler_overwrites_pages_and_blocks_are_refused() {
    assert!(!fault::is_installed());
    let region = || Region::new(GuestAddress(0), 1 << 20);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(region()).build().unwrap();
    memory
        .write_slice(&[7; 0x3000], GuestAddress(0x1000))
        .unwrap();
    assert_eq!(discard(&memory, GuestAddress(0x2000), 0x1000).unwrap(), 0);
    let bytes: [u8; 0x3000] = memory.read_obj(GuestAddress(0x1000)).unwrap();
    let is_zeroed = |page: usize| {
        bytes[page * 0x1000..][..0x1000]
            .iter()
            .all(|byte| *byte == 0)
    };
    assert_eq!([0, 1, 2].map(is_zeroed), [false, true, false]);

    let blocks = region().blocks(NonZeroU64::new(1 << 16).unwrap(), Unplugged::Protected);
    match blocks.build::<()>() {
        Err(BuildError::Conflict { what, .. }) => {
            assert!(what.contains("fault::install"), "{what}")
        }
        other => panic!("{other:?}"),
    }
}
