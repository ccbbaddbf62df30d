//! A virtio-mem device: the guest plugs and unplugs blocks of a region while it runs.
//!
//! `cargo run -p examples --example virtio_mem`

use std::num::NonZeroU64;

use examples::{Memory, Result};
use vm_memory::{Bytes, GuestAddress};
use vm_memory_host::{plug, plug_state, unplug, unplug_all};
use vm_memory_host::{MemoryBuilder, PlugState, Region, Unplugged};

const BLOCK: NonZeroU64 = NonZeroU64::new(2 << 20).unwrap();

/// RAM that is present at boot.
const BOOT: GuestAddress = GuestAddress(0);
/// RAM that the guest plugs in blocks.
const DEVICE: GuestAddress = GuestAddress(4 << 30);
/// The number of bytes that the host requests the guest to plug.
const REQUESTED: u64 = 16 << 20;

#[derive(Clone, Copy)]
enum Kind {
    Plug,
    Unplug,
    UnplugAll,
    State,
}

#[derive(Debug, PartialEq)]
enum Response {
    Ack,
    Nack,
    Busy,
    Error,
    State(PlugState),
}

struct Device<'a> {
    memory: &'a Memory,
    plugged_size: u64,
}

impl Device<'_> {
    /// Handles a request for blocks at `addr`. The driver may pass any values.
    ///
    /// The responses are those of virtio 1.2, sections 5.15.6.3 to 5.15.6.6.
    fn handle(&mut self, kind: Kind, addr: u64, blocks: u16) -> Response {
        let (addr, len) = (GuestAddress(addr), u64::from(blocks) * BLOCK.get());
        let free = REQUESTED.saturating_sub(self.plugged_size);
        // Even if the host cannot free pages, their blocks are unplugged after an error.
        match (kind, plug_state(self.memory, addr, len)) {
            (Kind::State, Ok(state)) => return Response::State(state),
            (Kind::Plug, Ok(PlugState::Unplugged)) if len > free => return Response::Nack,
            (Kind::Plug, Ok(PlugState::Unplugged)) => match plug(self.memory, addr, len) {
                Ok(changed) => self.plugged_size += changed,
                Err(_) => return Response::Busy,
            },
            (Kind::Unplug, Ok(PlugState::Plugged)) => {
                self.plugged_size -= unplug(self.memory, addr, len).unwrap_or(len);
            }
            (Kind::UnplugAll, _) => {
                self.plugged_size -= unplug_all(self.memory, DEVICE).unwrap_or(self.plugged_size);
            }
            _ => return Response::Error,
        }
        Response::Ack
    }
}

fn main() -> Result<()> {
    let boot = Region::new(BOOT, 16 << 20);
    let region = Region::new(DEVICE, 64 << 20).blocks(BLOCK, Unplugged::Mapped);
    let memory: Memory = MemoryBuilder::new().region(boot).region(region).build()?;
    let mut device = Device {
        memory: &memory,
        plugged_size: 0,
    };
    let block = |number: u64| GuestAddress(DEVICE.0 + number * BLOCK.get());
    let mut handle = |kind, addr: GuestAddress, blocks| device.handle(kind, addr.0, blocks);
    // No block is plugged at first. Accesses fail, as in a hole.
    assert!(memory.write_obj(1u64, DEVICE).is_err());
    // The driver plugs three blocks, and unplugs the second one.
    assert_eq!(handle(Kind::Plug, block(0), 3), Response::Ack);
    memory.write_obj(2u64, block(1))?;
    assert_eq!(handle(Kind::Unplug, block(1), 1), Response::Ack);
    let mixed = Response::State(PlugState::Mixed);
    assert_eq!(handle(Kind::State, block(0), 3), mixed);
    assert!(memory.read_obj::<u64>(block(1)).is_err());
    // A block that is plugged again contains zeroes.
    assert_eq!(handle(Kind::Plug, block(1), 1), Response::Ack);
    assert_eq!(memory.read_obj::<u64>(block(1))?, 0);
    // The device rejects requests that cover blocks in the wrong state, or other memory.
    assert_eq!(handle(Kind::Plug, block(2), 2), Response::Error);
    assert_eq!(handle(Kind::Unplug, BOOT, 1), Response::Error);
    assert_eq!(handle(Kind::State, block(0), 0), Response::Error);
    assert_eq!(handle(Kind::Plug, block(3), 20), Response::Nack);
    assert_eq!(handle(Kind::UnplugAll, BOOT, 0), Response::Ack);
    assert_eq!(device.plugged_size, 0);
    Ok(())
}
