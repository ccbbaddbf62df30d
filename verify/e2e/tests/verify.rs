//! The oracle detects every wrong aspect of an outcome.

use e2e::plan::{DESCRIPTORS, HALF, USED_RING};
use e2e::plug::{self, Place, PLUG_MMIO};
use e2e::run::{run, run_with, Outcome, Setup};
use e2e::verify::{verify, Aspect};
use microvm::memory::{harvest, Backing, HIGH_START, PAGE};
use vm_memory::{Bytes, GuestAddress};

fn wrong(outcome: &mut Outcome) -> Vec<Aspect> {
    verify(outcome)
        .into_iter()
        .map(|(aspect, _)| aspect)
        .collect()
}

fn small() -> Setup {
    Setup {
        size: 16 << 20,
        ..Setup::default()
    }
}

fn flip(outcome: &Outcome, at: u64) {
    let byte: u8 = outcome.ram.read_obj(GuestAddress(at)).unwrap();
    outcome.ram.write_obj(byte ^ 1, GuestAddress(at)).unwrap();
}

#[test]
fn verify_of_changed_memory_disk_or_counts_names_the_aspect() {
    let mut outcome = run(&small()).unwrap();
    assert_eq!(wrong(&mut outcome), []);

    let pattern = outcome.plan.pattern_pages().last().unwrap();
    let (_, buffer, _) = outcome.plan.read_halves().last().unwrap();
    for (at, aspect) in [
        (pattern, Aspect::Pattern),
        (buffer + HALF - 1, Aspect::Buffers),
    ] {
        flip(&outcome, at);
        assert_eq!(wrong(&mut outcome), [aspect]);
        flip(&outcome, at);
    }

    outcome.block.counts.bytes_read += 1;
    assert_eq!(wrong(&mut outcome), [Aspect::Counts]);
    outcome.block.counts.bytes_read -= 1;
    outcome.driver.as_mut().unwrap().requests += 1;
    assert_eq!(wrong(&mut outcome), [Aspect::Driver]);
    outcome.driver.as_mut().unwrap().requests -= 1;

    // A sector that the driver wrote, and another one.
    for sector in [outcome.plan.write_sector() + 3, 17] {
        use std::os::unix::fs::FileExt;
        let image = outcome.block.disk().image();
        let kept = image.read_sectors(sector, 1).unwrap();
        image.file.write_all_at(&[0x33; 512], sector * 512).unwrap();
        assert_eq!(wrong(&mut outcome), [Aspect::Sectors]);
        outcome
            .block
            .disk()
            .image()
            .file
            .write_all_at(&kept, sector * 512)
            .unwrap();
    }
    assert_eq!(wrong(&mut outcome), []);
}

#[test]
fn verify_of_missing_or_extra_dirty_page_names_the_log() {
    let mut outcome = run(&small()).unwrap();
    let whole = outcome.dirty.clone();
    outcome.dirty.device.pop_first();
    assert_eq!(wrong(&mut outcome), [Aspect::DevicePages]);
    outcome.dirty = whole.clone();
    outcome.dirty.device.insert(DESCRIPTORS);
    assert_eq!(wrong(&mut outcome), [Aspect::DevicePages]);
    outcome.dirty = whole.clone();
    outcome.dirty.driver.pop_last();
    assert_eq!(wrong(&mut outcome), [Aspect::DriverPages]);
    outcome.dirty = whole.clone();
    outcome.dirty.driver.insert(USED_RING);
    assert_eq!(wrong(&mut outcome), [Aspect::DriverPages]);
    // KVM may log more.
    outcome.setup.kvm = true;
    assert_eq!(wrong(&mut outcome), []);
}

#[test]
fn verify_of_wrong_backing_or_missing_pages_names_host_memory() {
    let mut outcome = run(&small()).unwrap();
    for backing in [
        Backing::Anonymous,
        Backing::Hugetlb,
        Backing::File("x".into()),
    ] {
        outcome.setup.backing = backing;
        assert_eq!(wrong(&mut outcome), [Aspect::HostMemory]);
    }
    outcome.setup.backing = Backing::Memfd;
    outcome.setup.prefault = true;
    assert_eq!(wrong(&mut outcome), [Aspect::HostMemory]);
    outcome.setup.prefault = false;
    // Dirty pages that were discarded.
    vm_memory_host::discard(&*outcome.ram, GuestAddress(HIGH_START), 8 << 20).unwrap();
    harvest(&outcome.ram);
    assert!(wrong(&mut outcome).contains(&Aspect::HostMemory));
}

#[test]
fn verify_of_changed_history_names_plugged_memory() {
    let mut outcome = run(&Setup {
        plug: true,
        ..small()
    })
    .unwrap();
    assert_eq!(wrong(&mut outcome), []);
    let place = outcome.plan.plug.unwrap();
    let plugged = |page: &&u64| **page >= place.start;
    assert_eq!(outcome.dirty.driver.iter().filter(plugged).count(), 2048);
    assert_eq!(outcome.dirty.device.iter().filter(plugged).count(), 32);

    let good = outcome.plug.clone();
    let changes: [fn(&mut e2e::plug::History); 5] = [
        |history| history.succeeded[2] = 0,
        |history| history.description = None,
        |history| history.error = Some("no".to_owned()),
        |history| history.resident[0] -= PAGE,
        |history| history.resident[1] += PAGE,
    ];
    for change in changes {
        outcome.plug.as_mut().map(change);
        assert_eq!(wrong(&mut outcome), [Aspect::Plug]);
        outcome.plug = good.clone();
    }
    outcome.dirty.device.insert(place.start + place.first());
    assert_eq!(wrong(&mut outcome), [Aspect::DevicePages]);
    outcome.dirty.driver.insert(place.start + place.first());
    assert_eq!(
        wrong(&mut outcome),
        [Aspect::DevicePages, Aspect::DriverPages]
    );
}

#[test]
fn verify_of_iommu_or_storm_numbers_names_the_aspect() {
    let mut outcome = run(&Setup {
        iommu: true,
        ..small()
    })
    .unwrap();
    assert_eq!(wrong(&mut outcome), []);
    outcome.mapper.as_mut().unwrap().pending = 1;
    assert_eq!(wrong(&mut outcome), [Aspect::Iommu]);
    outcome.mapper.as_mut().unwrap().pending = 0;
    outcome.mappings_left += 100;
    assert_eq!(wrong(&mut outcome), [Aspect::Iommu]);

    if let Err(e) = vm_memory::fault::install() {
        return test_support::skipped("verify_of_iommu_or_storm_numbers_names_the_aspect", e);
    }
    let mut outcome = run(&Setup {
        storm: Some(1),
        ..small()
    })
    .unwrap();
    assert_eq!(wrong(&mut outcome), []);
    outcome.truncations = 0;
    assert_eq!(wrong(&mut outcome), [Aspect::Storm]);
}

#[test]
fn driver_with_unexpected_register_returns_the_mismatch() {
    let mut outcome = run_with(&small(), |plan| plan.capacity += 1).unwrap();
    let error = outcome.driver.as_ref().unwrap_err().to_string();
    assert_eq!(error, "register 0x100: found 0x800, expected 0x801");
    assert!(wrong(&mut outcome).contains(&Aspect::Driver));

    // Memory that no device plugs.
    let place = Some(Place { start: 8 << 30 });
    let outcome = run_with(&small(), |plan| *plan = plan.clone().with_plug(place)).unwrap();
    let error = outcome.driver.unwrap_err().to_string();
    let (magic, ones) = (plug::MAGIC, u32::MAX);
    assert_eq!(
        error,
        format!("plug magic {PLUG_MMIO:#x}: found {ones:#x}, expected {magic:#x}")
    );
}
