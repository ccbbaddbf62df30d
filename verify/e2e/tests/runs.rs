//! Whole runs of the driver match their plan in every mode, on a thread and on a vCPU.

use std::path::Path;

use e2e::run::{run, Outcome, Setup};
use e2e::storm;
use e2e::uring::Ring;
use e2e::verify::verify;
use microvm::memory::Backing;
use tempfile::TempDir;
use test_support::{skipped, HugePages};

/// Runs a setup. The outcome must match the plan.
fn run_well(setup: &Setup) -> Outcome {
    let mut outcome = run(setup).unwrap_or_else(|e| panic!("{setup:?}: {e}"));
    let wrong = verify(&mut outcome);
    assert!(wrong.is_empty(), "{setup:?}: {wrong:#?}");
    outcome
}

/// Runs a setup on a thread, and on a vCPU if this machine has KVM.
fn run_well_everywhere(test: &str, setup: &Setup) {
    run_well(setup);
    if has_kvm(test) {
        run_well(&Setup {
            kvm: true,
            ..setup.clone()
        });
    }
}

fn has_kvm(test: &str) -> bool {
    let options = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match options {
        Ok(_) if cfg!(target_arch = "x86_64") => true,
        Ok(_) => {
            skipped(test, "a vCPU needs x86_64");
            false
        }
        Err(e) => {
            skipped(test, format!("on a vCPU: /dev/kvm: {e}"));
            false
        }
    }
}

fn has_io_uring(test: &str) -> bool {
    let error = Ring::new().err();
    if let Some(e) = &error {
        skipped(test, format!("io_uring: {e}"));
    }
    error.is_none()
}

fn image(dir: &Path, sectors: usize) -> (std::path::PathBuf, Vec<u8>) {
    let path = dir.join("disk");
    let bytes: Vec<u8> = (0..sectors * 512).map(|n| (n / 7) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

#[test]
fn run_with_default_setup_matches_plan() {
    run_well_everywhere("run_with_default_setup_matches_plan", &Setup::default());
}

#[test]
fn run_with_any_ram_size_matches_plan() {
    for size in [16 << 20, 16388 << 10, 100 << 20, 3 << 30, 8 << 30, 64 << 30] {
        run_well(&Setup {
            size,
            ..Setup::default()
        });
    }
}

#[test]
fn run_with_file_backing_matches_plan_and_fills_the_file() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("ram");
    let setup = Setup {
        size: 32 << 20,
        backing: Backing::File(path.clone()),
        ..Setup::default()
    };
    // The second run finds the rings and the results of the first.
    for _ in 0..2 {
        run_well_everywhere(
            "run_with_file_backing_matches_plan_and_fills_the_file",
            &setup,
        );
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 32 << 20);
        let at = 4 << 20;
        assert_eq!(bytes[at..at + 8], e2e::plan::mix(at as u64).to_le_bytes());
    }
}

#[test]
fn run_with_huge_pages_matches_plan() {
    let test = "run_with_huge_pages_matches_plan";
    // 16 MiB of RAM and 8 MiB of plugged blocks, once more for the run on a vCPU.
    let Some(_pages) = HugePages::reserve(12, test) else {
        return;
    };
    let setup = Setup {
        size: 16 << 20,
        backing: Backing::Hugetlb,
        plug: true,
        ..Setup::default()
    };
    run_well_everywhere(test, &setup);
}

#[test]
fn run_with_prefault_has_all_ram_resident() {
    let test = "run_with_prefault_has_all_ram_resident";
    let dir = TempDir::new().unwrap();
    for backing in [Backing::Memfd, Backing::File(dir.path().join("ram"))] {
        run_well_everywhere(
            test,
            &Setup {
                prefault: true,
                backing,
                ..Setup::default()
            },
        );
    }
}

#[test]
fn run_with_read_only_image_leaves_the_file_unchanged() {
    let dir = TempDir::new().unwrap();
    for sectors in [9, 100] {
        let (path, bytes) = image(dir.path(), sectors);
        let setup = Setup {
            disk: Some((path.clone(), false)),
            ..Setup::default()
        };
        run_well(&setup);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn run_with_writable_image_changes_only_planned_sectors() {
    let dir = TempDir::new().unwrap();
    let (path, bytes) = image(dir.path(), 100);
    run_well(&Setup {
        disk: Some((path.clone(), true)),
        ..Setup::default()
    });
    let after = std::fs::read(&path).unwrap();
    // 12 chunks of 8 sectors at the end of the 100.
    assert_eq!(after.len(), bytes.len());
    assert_eq!(after[..4 * 512], bytes[..4 * 512]);
    let changed = after
        .chunks(512)
        .zip(bytes.chunks(512))
        .skip(4)
        .filter(|(a, b)| a != b);
    assert_eq!(changed.count(), 96);
}

#[test]
fn run_behind_iommu_matches_plan() {
    for size in [64 << 20, 6 << 30] {
        run_well(&Setup {
            size,
            iommu: true,
            ..Setup::default()
        });
    }
}

#[test]
fn run_with_plugged_memory_matches_plan() {
    let test = "run_with_plugged_memory_matches_plan";
    let dir = TempDir::new().unwrap();
    for backing in [Backing::Memfd, Backing::File(dir.path().join("ram"))] {
        let setup = Setup {
            size: 32 << 20,
            plug: true,
            backing,
            ..Setup::default()
        };
        run_well_everywhere(test, &setup);
    }
    // A small disk: the driver sends its requests one by one.
    let (path, _) = image(dir.path(), 9);
    run_well(&Setup {
        plug: true,
        disk: Some((path, false)),
        ..Setup::default()
    });
}

#[test]
fn run_with_plugged_memory_behind_iommu_matches_plan() {
    let setup = Setup {
        size: 64 << 30,
        plug: true,
        iommu: true,
        ..Setup::default()
    };
    let outcome = run_well(&setup);
    assert_eq!(outcome.plan.plug.map(|place| place.start), Some(72 << 30));
}

#[test]
fn run_while_files_are_truncated_matches_plan() {
    let test = "run_while_files_are_truncated_matches_plan";
    if let Err(e) = vm_memory::fault::install() {
        return skipped(test, e);
    }
    for seed in [0, 1, u64::MAX] {
        let mut outcome = run_well(&Setup {
            storm: Some(seed),
            ..Setup::default()
        });
        let counts = outcome.storm().unwrap();
        assert_eq!(counts.moved + counts.failed, 4 * storm::CHUNKS);
    }
    run_well_everywhere(
        test,
        &Setup {
            storm: Some(3),
            plug: true,
            ..Setup::default()
        },
    );
}

#[test]
fn run_on_io_uring_matches_plan() {
    let test = "run_on_io_uring_matches_plan";
    if !has_io_uring(test) {
        return;
    }
    let setup = Setup {
        size: 32 << 20,
        uring: true,
        ..Setup::default()
    };
    let uring = run_well(&setup).uring().unwrap();
    assert_eq!((uring.submitted, uring.short, uring.most), (288, 0, 8));
    run_well_everywhere(
        test,
        &Setup {
            plug: true,
            ..setup.clone()
        },
    );

    let dir = TempDir::new().unwrap();
    let (path, bytes) = image(dir.path(), 100);
    run_well(&Setup {
        disk: Some((path.clone(), false)),
        ..setup.clone()
    });
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    run_well(&Setup {
        disk: Some((path.clone(), true)),
        ..setup
    });
    assert_ne!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn run_on_io_uring_behind_iommu_matches_plan() {
    if !has_io_uring("run_on_io_uring_behind_iommu_matches_plan") {
        return;
    }
    let setup = Setup {
        uring: true,
        iommu: true,
        ..Setup::default()
    };
    run_well(&setup);
    run_well(&Setup {
        plug: true,
        prefault: true,
        ..setup
    });
}
