//! Tests of [`SharedMarks`].

use super::super::shared::SharedMarks;
use super::*;

/// Offsets and lengths are multiples of this, so that many regions touch without an overlap.
const STEP: usize = 25;

/// Returns the groups of regions that share marks, each as the indices of its regions.
///
/// Regions are in one group if their ranges of a bitmap have a page in common, or if others connect
/// them.
fn groups(devices: &[Device]) -> BTreeSet<Vec<usize>> {
    let marks = |device: &Device| {
        let (bitmap, offset) = device.marks.filter(|_| !device.readable.is_empty())?;
        let (end, page) = (offset + device.readable.len(), device.page_size.get());
        Some((bitmap, offset / page..end.div_ceil(page)))
    };
    let overlap = |one: &Device, other: &Device| match (marks(one), marks(other)) {
        (Some((bitmap, one)), Some((other_bitmap, other))) => {
            bitmap == other_bitmap && one.start.max(other.start) < one.end.min(other.end)
        }
        _ => false,
    };
    let mut group_of: Vec<usize> = (0..devices.len()).collect();
    for (one, device) in devices.iter().enumerate() {
        for (other, more) in devices.iter().enumerate() {
            if overlap(device, more) {
                let (from, to) = (group_of[other], group_of[one]);
                for group in &mut group_of {
                    *group = if *group == from { to } else { *group };
                }
            }
        }
    }
    let all = (0..devices.len()).map(|group| {
        let members = (0..devices.len()).filter(|index| group_of[*index] == group);
        members.collect::<Vec<_>>()
    });
    all.filter(|members| members.len() > 1).collect()
}

proptest! {
    #[test]
    fn shared_marks_are_found_and_distributed_as_in_model(
        page in 1usize..20,
        places in prop::collection::vec(
            (prop::option::weighted(0.9, (0usize..2, 0usize..30)), 0usize..8),
            0..8,
        ),
        marked in prop::collection::vec((0usize..900, 1usize..40), 0..6),
    ) {
        let devices: Vec<_> = places
            .into_iter()
            .zip(0u64..)
            .map(|((marks, len), number)| Device {
                start: number * 0x1000,
                page_size: page_size(page),
                marks: marks.map(|(bitmap, offset)| (bitmap, offset * STEP)),
                readable: vec![true; len * STEP],
            })
            .collect();
        let mut regions: Vec<_> = devices.iter().map(Device::dirty_region).collect();
        let mut found = SharedMarks::try_find(&mut regions).unwrap();

        let groups = groups(&devices);
        prop_assert_eq!(found.len(), groups.len());
        for members in groups {
            let shared = regions[members[0]].shared.unwrap();
            let all: Vec<_> = (0..regions.len())
                .filter(|index| regions[*index].shared == Some(shared))
                .collect();
            prop_assert_eq!(&all, &members);
            let shared = &mut found[shared];

            let offset = |index: usize| devices[index].marks.unwrap().1;
            let end = |index: usize| offset(index) + devices[index].readable.len();
            let start = members.iter().map(|index| offset(*index)).min().unwrap();
            let end = members.iter().map(|index| end(*index)).max().unwrap();
            prop_assert_eq!(shared.pages.byte_size(), end - start);
            for index in &members {
                prop_assert_eq!(shared.offset_of(&regions[*index]), offset(*index) - start);
            }

            for (at, len) in &marked {
                shared.pages.insert_range(*at, *len);
            }
            let marks: Vec<_> = shared.pages.runs().flatten().collect();
            shared.distribute(&mut regions);
            prop_assert!(shared.pages.is_empty());
            for index in members {
                let device = &devices[index];
                let before = offset(index) - start;
                let inside = marks.iter().filter(|mark| **mark >= before);
                let bytes = inside.map(|mark| device.start + (mark - before) as u64);
                let expected = device.whole_pages(bytes);
                prop_assert_eq!(bytes_of(regions[index].runs()), expected);
            }
        }
    }
}
