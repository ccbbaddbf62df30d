//! A virtio-mem device: the guest plugs and unplugs blocks of a region while it runs.
//!
//! `cargo run -p examples --example virtio_mem`

use std::num::NonZeroU64;

use examples::{Memory, Result};
use vm_memory::{Bytes, GuestAddress};
use vm_memory_host::{plug, plug_state, unplug, unplug_all};
use vm_memory_host::{MemoryBuilder, PlugState, Region, Span, Unplugged};

const BLOCK: NonZeroU64 = NonZeroU64::new(2 << 20).unwrap();
const BOOT: GuestAddress = GuestAddress(0);
/// RAM that the guest plugs in blocks: that of this device, and that of another one after it.
const DEVICES: [u64; 2] = [4 << 30, (4 << 30) + SIZE];
const SIZE: u64 = 64 << 20;
/// The number of bytes that the host requests the guest to plug.
const REQUESTED: u64 = 16 << 20;

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
    region: Span,
    plugged_size: u64,
}

impl Device<'_> {
    /// Handles a request for blocks at `addr`. The driver may pass any values.
    /// The responses are those of virtio 1.2, sections 5.15.6.3 to 5.15.6.6.
    fn handle(&mut self, kind: Kind, addr: GuestAddress, blocks: u16) -> Response {
        let len = u64::from(blocks) * BLOCK.get();
        let free = REQUESTED.saturating_sub(self.plugged_size);
        // Even if the host cannot free pages, their blocks are unplugged after an error.
        match (kind, plug_state(self.memory, addr, len)) {
            (Kind::UnplugAll, _) => {
                let unplugged = unplug_all(self.memory, self.region.addr());
                self.plugged_size -= unplugged.unwrap_or(self.plugged_size);
            }
            _ if !self.region.contains_range(addr, len) => return Response::Error,
            (Kind::State, Ok(state)) => return Response::State(state),
            (Kind::Plug, Ok(PlugState::Unplugged)) if len > free => return Response::Nack,
            (Kind::Plug, Ok(PlugState::Unplugged)) => match plug(self.memory, addr, len) {
                Ok(changed) => self.plugged_size += changed,
                Err(error) if error.is_shortage() => return Response::Busy,
                Err(_) => return Response::Error,
            },
            (Kind::Unplug, Ok(PlugState::Plugged)) => {
                self.plugged_size -= unplug(self.memory, addr, len).unwrap_or(len);
            }
            _ => return Response::Error,
        }
        Response::Ack
    }
}

fn main() -> Result<()> {
    let region = |start| Region::new(GuestAddress(start), SIZE).blocks(BLOCK, Unplugged::Mapped);
    let [own, other] = DEVICES.map(region);
    let builder = MemoryBuilder::new().region(Region::new(BOOT, SIZE));
    let memory: Memory = builder.region(own).region(other).build()?;
    let mut device = Device {
        memory: &memory,
        region: Span::from(DEVICES[0]..DEVICES[1]),
        plugged_size: 0,
    };
    let block = |number: u64| GuestAddress(DEVICES[0] + number * BLOCK.get());
    // The driver plugs three blocks, and unplugs the second one. Accesses to it then fail.
    assert_eq!(device.handle(Kind::Plug, block(0), 3), Response::Ack);
    memory.write_obj(2u64, block(1))?;
    assert_eq!(device.handle(Kind::Unplug, block(1), 1), Response::Ack);
    assert!(memory.read_obj::<u64>(block(1)).is_err());
    let mixed = Response::State(PlugState::Mixed);
    assert_eq!(device.handle(Kind::State, block(0), 3), mixed);
    // A block that is plugged again contains zeroes.
    assert_eq!(device.handle(Kind::Plug, block(1), 1), Response::Ack);
    assert_eq!(memory.read_obj::<u64>(block(1))?, 0);
    // The device rejects requests that cover blocks in the wrong state, or other memory.
    assert_eq!(device.handle(Kind::Plug, block(2), 2), Response::Error);
    assert_eq!(device.handle(Kind::Plug, block(31), 2), Response::Error);
    assert_eq!(device.handle(Kind::Unplug, BOOT, 1), Response::Error);
    assert_eq!(device.handle(Kind::Plug, block(3), 20), Response::Nack);
    assert_eq!(device.handle(Kind::UnplugAll, BOOT, 0), Response::Ack);
    assert_eq!(device.plugged_size, 0);
    Ok(())
}
