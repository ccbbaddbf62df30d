//! The rows: their names, their targets in each build, and their sides.

use anyhow::Result;

use crate::contest::Contest;
use crate::limit;
use crate::new_abilities;
use crate::reference_side;
use crate::report::Build;
use crate::shapes::Mappings;
use crate::stage::Stage;
use crate::values::{S16, S64};

/// One operation.
pub struct Row {
    pub name: &'static str,
    /// The minimum ratio of the reference's time to ours in each build: fat, release, size.
    targets: [f64; 3],
    pub contest: fn(&Stage) -> Result<Contest>,
}

impl Row {
    pub fn target(&self, build: Build) -> f64 {
        let [fat, release, size] = self.targets;
        match build {
            Build::Fat => fat,
            Build::Release => release,
            Build::Size => size,
        }
    }
}

/// A row with the same workload on both crates, and a limit where one is known.
macro_rules! row {
    ($name:literal, $targets:expr, |$stage:pat_param| $side:expr $(, $limit:expr)?) => {
        Row {
            name: $name,
            targets: $targets,
            contest: |$stage: &Stage| {
                let reference = {
                    #[expect(unused_imports, reason = "a row uses one of them")]
                    use crate::reference_side::{access, bitmaps, copies, iommu, kinds::*, maps, queues};
                    $side?
                };
                let ours = {
                    #[expect(unused_imports, reason = "a row uses one of them")]
                    use crate::ours_side::{access, bitmaps, copies, iommu, kinds::*, maps, queues};
                    $side?
                };
                let limit = [$($limit?)?].into_iter().next();
                Ok(Contest { reference, ours, limit })
            },
        }
    };
}

/// A row whose operation 0.18.0 does not have: its replacement there, then ours.
macro_rules! new_row {
    ($name:literal, $targets:expr, |$stage:pat_param| $beside:expr, $ours:expr) => {
        Row {
            name: $name,
            targets: $targets,
            contest: |$stage: &Stage| {
                Ok(Contest {
                    reference: $beside?,
                    ours: $ours?,
                    limit: None,
                })
            },
        }
    };
}

/// All rows, grouped by area.
#[rustfmt::skip]
pub const ROWS: &[Row] = &[
    row!("find_region, n=1", [1.15, 1.7, 1.5], |stage| access::find_region(stage, 1), limit::find_region(stage, 1)),
    row!("find_region, n=4", [1.0, 1.0, 1.0], |stage| access::find_region(stage, 4), limit::find_region(stage, 4)),
    row!("find_region, n=64", [2.5, 2.8, 3.6], |stage| access::find_region(stage, 64), limit::find_region(stage, 64)),
    row!("find_region, n=1024", [5.8, 6.3, 7.0], |stage| access::find_region(stage, 1024), limit::find_region(stage, 1024)),
    row!("get_slice64, n=1", [2.1, 1.8, 1.8], |stage| access::get_slice64(stage, 1), limit::get_slice64(stage, 1)),
    row!("get_slice64, n=1024", [5.6, 5.5, 4.6], |stage| access::get_slice64(stage, 1024), limit::get_slice64(stage, 1024)),
    row!("check_range4k, n=1", [2.5, 2.6, 8.3], |stage| access::check_range4k(stage, 1), limit::check_range4k(stage, 1)),
    row!("check_range4k, n=1024", [6.6, 6.5, 6.8], |stage| access::check_range4k(stage, 1024), limit::check_range4k(stage, 1024)),
    row!("get_slices64.next, n=1", [0.95, 0.95, 0.95], |stage| access::get_slices64_next(stage, 1), limit::get_slice64(stage, 1)),
    row!("read_obj.u8, n=1", [19.0, 12.0, 21.0], |stage| access::read_obj::<u8, Plain>(stage, 1), limit::read_obj::<u8>(stage, 1)),
    row!("read_obj.u16, n=1", [11.0, 2.5, 8.3], |stage| access::read_obj::<u16, Plain>(stage, 1), limit::read_obj::<u16>(stage, 1)),
    row!("read_obj.u32, n=1", [13.0, 4.0, 16.0], |stage| access::read_obj::<u32, Plain>(stage, 1), limit::read_obj::<u32>(stage, 1)),
    row!("read_obj.u64, n=1", [11.0, 7.6, 18.0], |stage| access::read_obj::<u64, Plain>(stage, 1), limit::read_obj::<u64>(stage, 1)),
    row!("read_obj.u64, n=1, AtomicBitmap", [24.0, 2.7, 26.0], |stage| access::read_obj::<u64, Tracked>(stage, 1), limit::read_obj::<u64>(stage, 1)),
    row!("read_obj.u64, n=4", [10.0, 2.3, 7.7], |stage| access::read_obj::<u64, Plain>(stage, 4), limit::read_obj::<u64>(stage, 4)),
    row!("read_obj.u64, n=1024", [15.0, 5.7, 17.0], |stage| access::read_obj::<u64, Plain>(stage, 1024), limit::read_obj::<u64>(stage, 1024)),
    row!("read_obj.s16, n=1", [17.0, 6.1, 13.0], |stage| access::read_obj::<S16, Plain>(stage, 1), limit::read_obj::<S16>(stage, 1)),
    row!("read_obj.s64, n=1", [9.3, 2.2, 8.9], |stage| access::read_obj::<S64, Plain>(stage, 1), limit::read_obj::<S64>(stage, 1)),
    row!("write_obj.u64, n=1", [15.0, 2.5, 14.0], |stage| access::write_obj::<u64, Plain>(stage, 1), limit::write_obj::<u64>(stage)),
    row!("write_obj.u64, n=1, AtomicBitmap", [12.0, 3.1, 15.0], |stage| access::write_obj::<u64, Tracked>(stage, 1), limit::write_obj_tracked::<u64>(stage)),
    row!("load.u16, n=1", [2.0, 1.8, 4.0], |stage| access::load::<u16, Plain>(stage, 1), limit::read_obj::<u16>(stage, 1)),
    row!("load.u16, n=1, AtomicBitmap", [3.0, 2.0, 4.0], |stage| access::load::<u16, Tracked>(stage, 1), limit::read_obj::<u16>(stage, 1)),
    row!("store.u64, n=1", [2.0, 1.4, 4.0], |stage| access::store::<u64, Plain>(stage, 1), limit::write_obj::<u64>(stage)),
    row!("store.u64, n=1, AtomicBitmap", [3.0, 2.0, 4.0], |stage| access::store::<u64, Tracked>(stage, 1), limit::write_obj_tracked::<u64>(stage)),
    row!("read_slice, 16, n=1", [5.5, 1.9, 7.0], |stage| access::read_slice::<Plain>(stage, 16), limit::read_slice(stage, 16)),
    row!("read_slice, 64, n=1", [5.9, 1.7, 7.3], |stage| access::read_slice::<Plain>(stage, 64), limit::read_slice(stage, 64)),
    row!("read_slice, 512, n=1", [4.4, 1.4, 6.0], |stage| access::read_slice::<Plain>(stage, 512), limit::read_slice(stage, 512)),
    row!("write_slice, 04K, n=1", [1.3, 0.99, 1.3], |stage| access::write_slice::<Plain>(stage, 4096), limit::write_slice(stage, 4096)),
    row!("write_slice, 04K, n=1, AtomicBitmap", [1.5, 1.1, 1.6], |stage| access::write_slice::<Tracked>(stage, 4096), limit::write_slice(stage, 4096)),
    row!("read_slice, 64K, n=1", [0.97, 0.97, 0.97], |stage| access::read_slice::<Plain>(stage, 64 << 10), limit::read_slice(stage, 64 << 10)),
    row!("write_slice, 64K, n=1", [0.97, 0.97, 0.97], |stage| access::write_slice::<Plain>(stage, 64 << 10), limit::write_slice(stage, 64 << 10)),
    row!("read_slice, 1M, n=1", [0.95, 0.95, 0.95], |stage| access::read_slice::<Plain>(stage, 1 << 20), limit::read_slice(stage, 1 << 20)),
    row!("read_slice, 16M, n=1", [0.95, 0.95, 0.95], |stage| access::read_slice::<Plain>(stage, 16 << 20), limit::read_slice(stage, 16 << 20)),
    row!("read_slice_cross, 16, n=64", [3.8, 1.6, 2.3], |stage| access::read_slice_cross(stage, 16, 64), limit::read_slice_cross(stage, 16, 64)),
    row!("read_slice_cross, 04K, n=64", [1.6, 1.13, 1.6], |stage| access::read_slice_cross(stage, 4096, 64), limit::read_slice_cross(stage, 4096, 64)),
    row!("VolatileSlice::copy_to, u16, 4096B", [16.0, 49.0, 29.0], |stage| copies::copy_to::<u16, 2048>(stage), limit::copy_to::<u16, 2048>(stage)),
    row!("VolatileSlice::copy_to, u32, 4096B", [9.1, 13.0, 13.0], |stage| copies::copy_to::<u32, 1024>(stage), limit::copy_to::<u32, 1024>(stage)),
    row!("VolatileSlice::copy_to, u64, 4096B", [4.9, 7.0, 6.9], |stage| copies::copy_to::<u64, 512>(stage), limit::copy_to::<u64, 512>(stage)),
    row!("VolatileSlice::copy_from, u16, 4096B", [35.0, 50.0, 46.0], |stage| copies::copy_from::<u16, 2048>(stage), limit::copy_from::<u16, 2048>(stage)),
    row!("VolatileSlice::copy_from, u32, 4096B", [17.0, 24.0, 21.0], |stage| copies::copy_from::<u32, 1024>(stage), limit::copy_from::<u32, 1024>(stage)),
    row!("VolatileSlice::copy_from, u64, 4096B", [9.1, 12.0, 10.0], |stage| copies::copy_from::<u64, 512>(stage), limit::copy_from::<u64, 512>(stage)),
    row!("VolatileSlice::copy_to, u8, 64B", [0.95, 0.95, 0.95], |stage| copies::copy_to::<u8, 64>(stage), limit::copy_to::<u8, 64>(stage)),
    row!("VolatileSlice::copy_to_vs, 4096B", [0.95, 0.95, 0.95], |stage| copies::copy_to_volatile_slice(stage, 4096), limit::copy_to_volatile_slice(stage, 4096)),
    row!("mark_dirty, 1B, already", [1.1, 1.1, 1.1], |_| bitmaps::mark_dirty(1), limit::mark_dirty(1)),
    row!("mark_dirty, 64K, already", [10.0, 10.0, 10.0], |_| bitmaps::mark_dirty(64 << 10), limit::mark_dirty(64 << 10)),
    row!("mark_dirty, 1M, already", [50.0, 50.0, 50.0], |_| bitmaps::mark_dirty(1 << 20), limit::mark_dirty(1 << 20)),
    row!("mark_dirty, 1G, already", [55.0, 55.0, 55.0], |_| bitmaps::mark_dirty(1 << 30), limit::mark_dirty(1 << 30)),
    row!("get_and_reset, 1G, 0.01%", [13.0, 19.0, 9.0], |_| bitmaps::get_and_reset()),
    new_row!("mark_dirty, 1B, already, load first", [1.1, 1.1, 1.1], |_| reference_side::bitmaps::mark_dirty(1), new_abilities::test_before_marking(1)),
    new_row!("mark_dirty, 1B, switched off", [2.5, 2.5, 2.5], |_| reference_side::bitmaps::mark_dirty(1), new_abilities::mark_switched_off()),
    new_row!("harvest, 1T, 0.001%", [50.0, 50.0, 50.0], |_| new_abilities::harvest_large_reference(), new_abilities::harvest_large()),
    new_row!("harvest, 64G, all of it", [1.0, 1.0, 1.0], |_| new_abilities::harvest_dirty_reference(), new_abilities::harvest_dirty()),
    row!("dirty_at", [0.95, 0.95, 0.95], |_| bitmaps::dirty_at(), limit::dirty_at()),
    row!("GuestMemoryAtomic: memory()", [1.0, 1.0, 1.0], |stage| maps::memory_guard(stage), limit::memory_guard()),
    row!("GuestMemoryAtomic: memory().clone", [1.0, 1.0, 1.0], |stage| maps::memory_guard_clone(stage)),
    new_row!("GuestMemoryReader: memory()", [5.0, 5.0, 5.0], |stage| reference_side::maps::memory_guard(stage), new_abilities::reader(stage)),
    row!("GuestMemoryAtomic: lock_replace(n=4)", [0.8, 0.8, 0.8], |stage| maps::lock_replace(stage, 4)),
    row!("insert_region, n=1", [1.0, 1.0, 1.0], |stage| maps::insert_region(stage, 1)),
    row!("insert_region, n=4", [1.0, 1.0, 1.0], |stage| maps::insert_region(stage, 4)),
    row!("insert_region, n=64", [1.0, 1.0, 1.0], |stage| maps::insert_region(stage, 64)),
    row!("insert_region, n=1024", [1.0, 1.0, 1.0], |stage| maps::insert_region(stage, 1024)),
    row!("remove_region, n=1", [1.0, 1.0, 1.0], |stage| maps::remove_region(stage, 1)),
    row!("remove_region, n=4", [1.0, 1.0, 1.0], |stage| maps::remove_region(stage, 4)),
    row!("remove_region, n=64", [1.0, 1.0, 1.0], |stage| maps::remove_region(stage, 64)),
    row!("remove_region, n=1024", [1.0, 1.0, 1.0], |stage| maps::remove_region(stage, 1024)),
    row!("Iotlb::lookup of 8 B hit, n=1, fragmented", [4.1, 5.7, 9.4], |_| iommu::hit(Mappings::fragmented(1)), limit::iotlb_hit(Mappings::fragmented(1))),
    row!("Iotlb::lookup of 8 B hit, n=100, fragmented", [14.0, 18.0, 20.0], |_| iommu::hit(Mappings::fragmented(100)), limit::iotlb_hit(Mappings::fragmented(100))),
    row!("Iotlb::lookup of 8 B hit, n=10000, fragmented", [18.0, 21.0, 23.0], |_| iommu::hit(Mappings::fragmented(10_000)), limit::iotlb_hit(Mappings::fragmented(10_000))),
    row!("Iotlb::lookup of 8 B hit, n=1000000, fragmented", [2.9, 15.0, 19.0], |_| iommu::hit(Mappings::fragmented(1_000_000)), limit::iotlb_hit(Mappings::fragmented(1_000_000))),
    row!("Iotlb::lookup of 8 B hit, n=10000, contiguous", [3.7, 5.6, 7.4], |_| iommu::hit(Mappings::contiguous(10_000)), limit::iotlb_hit(Mappings::contiguous(10_000))),
    row!("Iotlb::lookup of 8 B hit, n=1000000, contiguous", [6.1, 8.2, 9.4], |_| iommu::hit(Mappings::contiguous(1_000_000)), limit::iotlb_hit(Mappings::contiguous(1_000_000))),
    row!("Iotlb::lookup of 64 KiB over 16 mappings, n=10000", [17.0, 21.0, 26.0], |_| iommu::hit_64k(Mappings::fragmented(10_000))),
    row!("Iotlb::lookup of 8 B miss, n=1, fragmented", [1.4, 1.7, 2.2], |_| iommu::miss(Mappings::with_holes(1)), limit::iotlb_miss(Mappings::with_holes(1))),
    row!("Iotlb::lookup of 8 B miss, n=10000, fragmented", [2.8, 3.6, 4.2], |_| iommu::miss(Mappings::with_holes(10_000)), limit::iotlb_miss(Mappings::with_holes(10_000))),
    row!("IommuMemory: read_obj.u64 behind an RwLock, n=1, fragmented", [3.0, 3.0, 5.5], |stage| iommu::read_obj(stage, Mappings::fragmented(1)), limit::iommu_read_obj(stage, Mappings::fragmented(1))),
    row!("IommuMemory: read_obj.u64 behind an RwLock, n=10000, fragmented", [11.0, 11.0, 15.0], |stage| iommu::read_obj(stage, Mappings::fragmented(10_000)), limit::iommu_read_obj(stage, Mappings::fragmented(10_000))),
    row!("IommuMemory: read_obj.u64 behind an RwLock, n=1000000, fragmented", [2.1, 2.3, 3.4], |stage| iommu::read_obj(stage, Mappings::fragmented(1_000_000)), limit::iommu_read_obj(stage, Mappings::fragmented(1_000_000))),
    row!("IommuMemory: read_obj.u64 switched off, n=1, fragmented", [6.2, 3.6, 11.0], |stage| iommu::read_obj_switched_off(stage, Mappings::fragmented(1))),
    row!("Iotlb: remap a page behind an RwLock, n=10000", [1.0, 1.0, 1.0], |_| iommu::remap(Mappings::fragmented(10_000))),
    new_row!("SharedIotlb: remap a page, n=10000", [1.0, 1.0, 1.0], |_| reference_side::iommu::remap(Mappings::fragmented(10_000)), new_abilities::remap_shared(Mappings::fragmented(10_000))),
    new_row!("SharedIotlb: remap a page, n=10000, 4 snapshots held", [1.0, 1.0, 1.0], |_| reference_side::iommu::remap(Mappings::fragmented(10_000)), new_abilities::remap_shared_held(Mappings::fragmented(10_000), 4)),
    new_row!("SharedIotlb: remap a page, n=10000, 32 snapshots held", [1.0, 1.0, 1.0], |_| reference_side::iommu::remap(Mappings::fragmented(10_000)), new_abilities::remap_shared_held(Mappings::fragmented(10_000), 32)),
    new_row!("IommuMemory: read_obj.u64 behind a SharedIotlb, n=10000", [11.0, 11.0, 15.0], |stage| reference_side::iommu::read_obj(stage, Mappings::fragmented(10_000)), new_abilities::read_obj_shared(stage, Mappings::fragmented(10_000))),
    row!("virtio-queue 0.18: add_used, n=1", [3.5, 1.5, 2.6], |stage| queues::add_used::<Plain>(stage), limit::add_used(stage)),
    row!("virtio-queue 0.18: add_used, n=1, AtomicBitmap", [5.1, 2.0, 3.2], |stage| queues::add_used::<Tracked>(stage), limit::add_used(stage)),
    row!("virtio-queue 0.18: iter128x1(per chain), n=1", [2.0, 1.0, 1.8], |stage| queues::iter128x1::<Plain>(stage), limit::iter128x1(stage)),
    row!("virtio-queue 0.18: iter128x1(per chain), n=1, AtomicBitmap", [2.6, 1.3, 2.2], |stage| queues::iter128x1::<Tracked>(stage), limit::iter128x1(stage)),
    row!("virtio-queue 0.18: blk4k(per req), n=1", [2.6, 1.2, 2.2], |stage| queues::blk4k::<Plain>(stage), limit::blk4k(stage)),
    row!("virtio-queue 0.18: blk4k(per req), n=1, AtomicBitmap", [3.3, 1.4, 2.8], |stage| queues::blk4k::<Tracked>(stage), limit::blk4k(stage)),
    new_row!("vectored: 64 KiB over eight regions, against preadv(2)", [0.95, 0.95, 0.95], |stage| new_abilities::read_by_hand(stage), new_abilities::read_over_regions(stage)),
];

#[cfg(test)]
mod tests {
    use super::ROWS;
    use crate::contest::Effort;
    use crate::report::Build;
    use crate::stage::Stage;
    use std::collections::HashSet;
    use std::time::Duration;

    #[test]
    fn row_names_are_unique() {
        let names: HashSet<_> = ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), ROWS.len());
    }

    #[test]
    fn row_targets_are_plausible() {
        for row in ROWS {
            for build in [Build::Fat, Build::Release, Build::Size] {
                assert!((0.5..100.0).contains(&row.target(build)), "{}", row.name);
            }
        }
    }

    /// Rows with a million mappings are left out, because their set-up takes too long.
    #[test]
    fn rows_succeed_on_every_side() {
        let stage = Stage::new().expect("a stage");
        let effort = Effort {
            rounds: 1,
            batch: Duration::from_nanos(1),
        };
        let mut ran = 0;
        for row in ROWS.iter().filter(|row| !row.name.contains("1000000")) {
            let outcome = (row.contest)(&stage).and_then(|contest| contest.run(effort));
            assert!(
                outcome.is_ok_and(|outcome| outcome.ratio > 0.0),
                "{}",
                row.name
            );
            ran += 1;
        }
        assert!(ran > 60, "{ran} rows ran");
    }
}
