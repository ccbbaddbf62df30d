//! The device that plugs memory performs correct sequences of commands. Others change nothing.

use std::time::Duration;

use e2e::memory::{for_devices, second_mapping, DeviceRam};
use e2e::plug::{command, reg, status, Place, Plug, ThreadProcessor, SIZE};
use microvm::bus::MmioDevice;
use microvm::memory::{build, Backing, GuestRam, PAGE};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};

struct Rig {
    plug: Plug,
    /// The devices' map.
    devices: GuestMemoryAtomic<DeviceRam>,
    /// The driver's map.
    view: GuestMemoryAtomic<GuestRam>,
}

impl Rig {
    fn new(backing: Backing) -> Self {
        let ram = build(16 << 20, &Backing::Memfd).unwrap();
        let devices = for_devices(&ram, None);
        let view = GuestMemoryAtomic::new(second_mapping(&ram).unwrap());
        let processor = Box::new(ThreadProcessor::new(view.clone()));
        let place = Place::above(&ram);
        let plug = Plug::new(place, backing, devices.clone(), vec![processor]);
        Self {
            plug,
            devices,
            view,
        }
    }

    fn read(&mut self, reg: u32) -> u32 {
        let mut data = [0xff; 4];
        self.plug.read(reg.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register. Returns the status.
    fn write(&mut self, reg: u32, value: u32) -> u32 {
        self.plug.write(reg.into(), &value.to_le_bytes());
        self.read(reg::STATUS)
    }

    /// Returns whether devices and driver can write a word. Both must agree.
    fn can_write(&self, at: u64) -> bool {
        let device = self
            .devices
            .memory()
            .write_obj(1_u64, GuestAddress(at))
            .is_ok();
        let driver = self
            .view
            .memory()
            .write_obj(1_u64, GuestAddress(at))
            .is_ok();
        assert_eq!(device, driver);
        device
    }

    fn regions(&self) -> usize {
        self.devices.memory().get_backend().num_regions()
    }
}

#[test]
fn memory_is_accessible_while_its_block_is_plugged() {
    let mut rig = Rig::new(Backing::Memfd);
    let start = rig.plug.place().start;
    assert_eq!(start, 8 << 30);
    assert_eq!(rig.read(reg::MAGIC), u32::from_le_bytes(*b"plug"));
    assert_eq!([rig.read(reg::ADDRESS), rig.read(reg::ADDRESS + 4)], [0, 2]);
    assert_eq!(
        [rig.read(reg::SIZE), rig.read(reg::SIZE + 4)],
        [16 << 20, 0]
    );
    assert_eq!(rig.read(reg::BLOCK_SIZE), 2 << 20);

    let last = start + (4 << 20) - 8;
    assert!(!rig.can_write(last));
    assert_eq!(rig.write(reg::COMMAND, command::ADD), status::PRESENT);
    assert!(!rig.can_write(last));
    assert_eq!(rig.write(reg::BLOCKS, 2), status::PRESENT);
    assert_eq!(rig.read(reg::BLOCKS), 2);
    assert!(rig.can_write(last) && !rig.can_write(last + 8));

    // Both see the same bytes, and each marks its own pages.
    let at = GuestAddress(start + 5 * PAGE);
    rig.devices.memory().write_obj(7_u8, at).unwrap();
    assert_eq!(rig.view.memory().read_obj::<u8>(at).unwrap(), 7);
    assert_eq!(rig.write(reg::BLOCKS, 1), status::PRESENT);
    assert!(!rig.can_write(last) && rig.can_write(start));
    assert_eq!(rig.write(reg::BLOCKS, 8), status::PRESENT);
    assert!(rig.can_write(start + SIZE - 8));
    // A block that was unplugged is zeroed.
    assert_eq!(
        rig.view
            .memory()
            .read_obj::<u64>(GuestAddress(last))
            .unwrap(),
        0
    );

    assert_eq!(rig.write(reg::COMMAND, command::REMOVE), status::NONE);
    assert!(!rig.can_write(start));
    assert_eq!(rig.read(reg::BLOCKS), 0);
    assert_eq!((rig.regions(), rig.view.memory().num_regions()), (2, 2));
    let history = &rig.plug.history;
    assert_eq!((history.succeeded, &history.error), ([1, 3, 1], &None));
    // The first page, page 5, the end of the second block, and the end of the region.
    assert_eq!((history.device.len(), history.driver.len()), (4, 3));

    assert_eq!(rig.write(reg::COMMAND, command::ADD), status::PRESENT);
    assert_eq!(rig.write(reg::COMMAND, command::REMOVE), status::NONE);
}

#[test]
fn command_out_of_order_fails_and_changes_nothing() {
    let mut rig = Rig::new(Backing::Memfd);
    assert_eq!(rig.write(reg::COMMAND, command::REMOVE), status::FAILED);
    assert_eq!(rig.write(reg::BLOCKS, 1), status::FAILED);
    assert_eq!(rig.regions(), 2);
    assert_eq!(rig.write(reg::COMMAND, command::ADD), status::PRESENT);
    assert_eq!(rig.write(reg::COMMAND, command::ADD), status::FAILED);
    for blocks in [9, u32::MAX] {
        assert_eq!(rig.write(reg::BLOCKS, blocks), status::FAILED);
    }
    assert_eq!((rig.read(reg::BLOCKS), rig.regions()), (0, 3));
    assert_eq!(rig.plug.history.error.as_deref(), Some("no region"));
    // Registers that do not exist or cannot be written, other widths, and unknown commands.
    for reg in [reg::MAGIC, reg::STATUS, reg::SIZE, 0x24, u32::MAX] {
        assert_eq!(rig.write(reg, 1), status::FAILED);
        assert!(reg <= reg::SIZE || rig.read(reg) == 0);
    }
    rig.plug.write(reg::COMMAND.into(), &[2]);
    rig.plug.write(u64::MAX, &[2; 4]);
    rig.write(reg::COMMAND, 3);
    assert_eq!((rig.plug.history.succeeded, rig.regions()), ([1, 0, 0], 3));
    let mut wide = [1; 8];
    rig.plug.read(0, &mut wide);
    assert_eq!(wide, [0; 8]);
    assert_eq!(rig.write(reg::COMMAND, command::REMOVE), status::NONE);
}

#[test]
fn remove_with_a_reader_fails_and_leaves_the_reader_its_memory() {
    let mut rig = Rig::new(Backing::Memfd);
    rig.plug.reader_timeout = Duration::from_millis(20);
    rig.write(reg::COMMAND, command::ADD);
    rig.write(reg::BLOCKS, 1);
    let at = GuestAddress(rig.plug.place().start);
    let reader = rig.devices.memory();
    assert_eq!(rig.write(reg::COMMAND, command::REMOVE), status::FAILED);
    assert!(rig.plug.history.error.is_some());
    reader.write_obj(1_u8, at).unwrap();
    assert!(rig.devices.memory().write_obj(1_u8, at).is_err());
}

#[test]
fn add_that_a_processor_refuses_leaves_no_region() {
    // Anonymous memory cannot be mapped a second time, for the driver.
    let mut rig = Rig::new(Backing::Anonymous);
    assert_eq!(rig.write(reg::COMMAND, command::ADD), status::FAILED);
    assert_eq!(rig.regions(), 2);
    let error = rig.plug.history.error.unwrap();
    assert!(error.contains("cannot be mapped twice"), "{error}");
}
