//! The device against guests that ask for the wrong thing.

use super::*;
use crate::iommu::for_devices;
use crate::memory::Backing;
use crate::memory::{map, MIN_MEM, PAGE};
use vm_memory::{Bytes, GuestAddressSpace};

/// A device, the devices' map, and the map of the driver's side.
fn rig(
    backing: Backing,
) -> (
    Plug,
    GuestMemoryAtomic<DeviceRam>,
    GuestMemoryAtomic<GuestRam>,
) {
    let source = Source::open(backing.clone(), MIN_MEM).unwrap();
    let ram = source.map().unwrap();
    let place = Place::above(&ram);
    let devices = for_devices(&ram, None);
    let view = match backing {
        // Stands for a driver that sees nothing of it.
        Backing::Anonymous => map(MIN_MEM, Backing::Memfd).unwrap(),
        _ => memory::second_view(&ram).unwrap(),
    };
    let view = GuestMemoryAtomic::new(view);
    let side = Box::new(ThreadSide::new(view.clone()));
    let pages = PageMap::with_layout(&[(0, 1), (1, 1), (place.start, SIZE)]);
    (
        Plug::new(place, source, devices.clone(), side, pages),
        devices,
        view,
    )
}

fn read(plug: &Plug, reg: u32) -> u32 {
    let mut data = [0xff; 4];
    plug.read(u64::from(reg), &mut data);
    u32::from_le_bytes(data)
}

/// Writes a register; the status after it.
fn write(plug: &mut Plug, reg: u32, value: u32) -> u32 {
    plug.write(u64::from(reg), &value.to_le_bytes());
    read(plug, reg::STATUS)
}

#[test]
fn memory_is_there_from_the_wish_to_the_next() {
    let (mut plug, devices, view) = rig(Backing::Memfd);
    let start = plug.place().start;
    assert_eq!(start, 8 << 30);
    assert_eq!(read(&plug, reg::MAGIC), u32::from_le_bytes(*b"plug"));
    assert_eq!(
        [read(&plug, reg::ADDRESS), read(&plug, reg::ADDRESS + 4)],
        [0, 2]
    );
    assert_eq!(
        [read(&plug, reg::SIZE), read(&plug, reg::SIZE + 4)],
        [16 << 20, 0]
    );
    assert_eq!(read(&plug, reg::BLOCK_SIZE), 2 << 20);
    let last = GuestAddress(start + (4 << 20) - 8);
    let can = |at: GuestAddress| {
        let device = devices.memory().write_obj(1_u64, at).is_ok();
        assert_eq!(view.memory().write_obj(1_u64, at).is_ok(), device);
        device
    };
    assert!(!can(last));
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::PLUG),
        status::PLUGGED
    );
    assert!(!can(last));
    assert_eq!(write(&mut plug, reg::BLOCKS, 2), status::PLUGGED);
    assert_eq!(read(&plug, reg::BLOCKS), 2);
    assert!(can(last) && !can(GuestAddress(last.0 + 8)));

    // Both see the same bytes, and each marks its own.
    devices
        .memory()
        .write_obj(7_u8, GuestAddress(start + 5 * PAGE))
        .unwrap();
    assert_eq!(
        view.memory()
            .read_obj::<u8>(GuestAddress(start + 5 * PAGE))
            .unwrap(),
        7
    );
    assert_eq!(write(&mut plug, reg::BLOCKS, 1), status::PLUGGED);
    assert!(!can(last) && can(GuestAddress(start)));
    assert_eq!(write(&mut plug, reg::BLOCKS, 8), status::PLUGGED);
    assert!(can(GuestAddress(start + SIZE - 8)));
    // What was given back comes as zeroes.
    assert_eq!(view.memory().read_obj::<u64>(last).unwrap(), 0);
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::UNPLUG),
        status::NONE
    );
    assert!(!can(GuestAddress(start)));
    assert_eq!(read(&plug, reg::BLOCKS), 0);
    assert_eq!(
        (
            devices.memory().get_backend().num_regions(),
            view.memory().num_regions()
        ),
        (2, 2)
    );
    assert_eq!(plug.story.granted, [1, 3, 1]);
    assert_eq!(plug.story.refused, None);
    // The first page, page 5, the end of the second block, and the end of it all.
    assert_eq!(plug.story.device.count(), 4);
    assert_eq!(plug.story.guest.count(), 3);
    // And once more.
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::PLUG),
        status::PLUGGED
    );
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::UNPLUG),
        status::NONE
    );
}

#[test]
fn a_wish_out_of_its_turn_is_refused_and_changes_nothing() {
    let (mut plug, devices, _) = rig(Backing::Memfd);
    let regions = || devices.memory().get_backend().num_regions();
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::UNPLUG),
        status::REFUSED
    );
    assert_eq!(write(&mut plug, reg::BLOCKS, 1), status::REFUSED);
    assert_eq!(regions(), 2);
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::PLUG),
        status::PLUGGED
    );
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::PLUG),
        status::REFUSED
    );
    for blocks in [9, u32::MAX] {
        assert_eq!(write(&mut plug, reg::BLOCKS, blocks), status::REFUSED);
    }
    assert_eq!((read(&plug, reg::BLOCKS), regions()), (0, 3));
    assert_eq!(plug.story.refused.as_deref(), Some("there is no region"));
    // What is no wish is none: no register, one that cannot be written, another width, another command.
    for reg in [reg::MAGIC, reg::STATUS, reg::SIZE, 0x24, u32::MAX] {
        assert_eq!(write(&mut plug, reg, 1), status::REFUSED);
        assert!(reg <= reg::SIZE || read(&plug, reg) == 0);
    }
    plug.write(u64::from(reg::COMMAND), &[2]);
    plug.write(u64::MAX, &[2; 4]);
    write(&mut plug, reg::COMMAND, 3);
    assert_eq!((plug.story.granted, regions()), ([1, 0, 0], 3));
    let mut wide = [1; 8];
    plug.read(0, &mut wide);
    assert_eq!(wide, [0; 8]);
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::UNPLUG),
        status::NONE
    );
}

#[test]
fn memory_that_somebody_reads_is_not_taken_from_him() {
    let (plug, devices, _) = rig(Backing::Memfd);
    let mut plug = Plug {
        patience: Duration::from_millis(20),
        ..plug
    };
    write(&mut plug, reg::COMMAND, command::PLUG);
    write(&mut plug, reg::BLOCKS, 1);
    let at = GuestAddress(plug.place().start);
    let reader = devices.memory();
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::UNPLUG),
        status::REFUSED
    );
    let why = plug.story.refused.clone().unwrap();
    assert!(why.contains("1 readers"), "{why}");
    reader.write_obj(1_u8, at).unwrap();
    assert!(devices.memory().write_obj(1_u8, at).is_err());
}

#[test]
fn a_guest_that_cannot_have_it_leaves_no_region_behind() {
    // The side of a thread cannot map anonymous memory once more.
    let (mut plug, devices, _) = rig(Backing::Anonymous);
    assert_eq!(
        write(&mut plug, reg::COMMAND, command::PLUG),
        status::REFUSED
    );
    assert_eq!(devices.memory().get_backend().num_regions(), 2);
    let why = plug.story.refused.clone().unwrap();
    assert!(why.contains("needs a second mapping"), "{why}");
}

#[test]
fn the_rollup_counts_huge_pages_too() {
    let text = "7f00-7fff ---p 00000000 00:00 0  [rollup]\nRss:  1000 kB\nPss: 5 kB\n\
        AnonHugePages:  2048 kB\nShared_Hugetlb:  4096 kB\nPrivate_Hugetlb:     4 kB\nnonsense\n";
    assert_eq!(rollup(text), 5100 * 1024);
    assert_eq!(rollup(""), 0);
    assert!(process_memory().unwrap() > 1 << 20);
}
