use super::*;
use proptest::prelude::*;

fn blocks(size: usize, block: usize) -> PluggedBlocks {
    PluggedBlocks::new(size, NonZeroUsize::new(block).unwrap()).unwrap()
}

#[test]
fn plug_of_partial_blocks_returns_error_and_changes_nothing() {
    let error = PluggedBlocks::new(0x1000, NonZeroUsize::new(0x300).unwrap()).unwrap_err();
    assert_eq!(error, PluggedBlocksError::BlockSize { block_size: 0x300 });
    let error = PluggedBlocks::new(usize::MAX, NonZeroUsize::MIN).unwrap_err();
    assert!(matches!(error, PluggedBlocksError::NoMemory { .. }));
    let blocks = blocks(0x1800, 0x1000);
    for (offset, count) in [(1, 0x1000), (0, 1), (0x1000, 0x7ff)] {
        assert!(matches!(
            blocks.plug(offset, count),
            Err(PluggedBlocksError::NotBlocks { .. })
        ));
    }
    for (offset, count) in [
        (0x1000, 0x801),
        (usize::MAX, 2),
        (0, usize::MAX),
        (0x1801, 0),
    ] {
        assert!(matches!(
            blocks.unplug(offset, count),
            Err(PluggedBlocksError::Outside { .. })
        ));
        assert!(!blocks.is_plugged(offset, count));
    }
    assert_eq!(blocks.plugged_bytes(), 0);
    // The last block is shorter.
    blocks.plug(0x1000, 0x800).unwrap();
    assert_eq!(blocks.runs().collect::<Vec<_>>(), [(0x1000, 0x800)]);
    assert_eq!(blocks.plugged_from(0x1001, usize::MAX), 0x7ff);
}

/// Returns the number of words that `access` visits.
fn visits(access: impl FnOnce()) -> usize {
    let before = VISITS.get();
    access();
    VISITS.get() - before
}

#[test]
fn access_visits_only_words_of_its_own_range() {
    use crate::bytes::Bytes;
    use crate::guest_memory::MemoryRegionAddress;
    use crate::mmap::{GuestRegionMmap, MmapRegionBuilder};
    use crate::region::GuestMemoryRegion;
    use crate::volatile_memory::VolatileMemory;
    use crate::GuestAddress;

    let (size, block) = (1 << 30, 0x1000);
    let states = std::sync::Arc::new(blocks(size, block));
    let builder = MmapRegionBuilder::<()>::new(size);
    #[cfg(unix)]
    let builder =
        builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    let mapping = builder.with_plugged_blocks(states.clone()).build().unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let at = MemoryRegionAddress(size as u64 / 2);
    // All blocks are plugged, then one is missing at either end.
    for missing in [None, Some(size - block), Some(0)] {
        states.plug(0, size).unwrap();
        if let Some(offset) = missing {
            states.unplug(offset, block).unwrap();
        }
        let count = visits(|| {
            region.write_obj(7u64, at).unwrap();
            assert_eq!(region.read_obj::<u64>(at).unwrap(), 7);
            region.write(&[1; 64], at).unwrap();
            assert_eq!(region.get_slice(at, 8).unwrap().len(), 8);
            assert_eq!(region.reachable_bytes(at, 0x2000), 0x2000);
            assert_eq!(region.as_volatile_slice().is_ok(), missing.is_none());
            assert_eq!(region.is_fully_reachable(), missing.is_none());
            let mapping = region.get_mmap();
            assert_eq!(mapping.as_volatile_slice().len() == size, missing.is_none());
            assert!(mapping.get_ref::<u64>(size / 2).is_ok());
        });
        assert!(count < 20, "{count} words for missing {missing:?}");
        let count = visits(|| {
            assert!(states.plugged_bytes() >= size - block);
            assert!(states.is_plugged(size / 2, 0x2000));
            assert!(!states.is_unplugged(size / 2, 1));
            assert_eq!(states.runs_in(size / 2, 8).next(), Some((size / 2, 8)));
        });
        assert!(count < 8, "{count} words");
    }
}

/// The number of plugged blocks stays exact, whatever the order of changes.
#[test]
fn plug_and_unplug_from_two_threads_keep_the_count() {
    let shared = blocks(0x40_0800, 0x1000);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let shared = &shared;
            scope.spawn(move || {
                for round in 0..500 {
                    let offset = (round * 7 + thread * 13) % 0x100 * 0x1000;
                    shared.plug(offset, 0x10_0000).unwrap();
                    shared.unplug(offset + 0x2000, 0x8000).unwrap();
                    shared.plug(0x40_0000, 0x800).unwrap();
                }
            });
        }
    });
    let sum: usize = shared.runs().map(|(_, length)| length).sum();
    assert_eq!(shared.plugged_bytes(), sum);
    assert!(!shared.is_whole());
    shared.plug(0, 0x40_0800).unwrap();
    assert!(shared.is_whole() && shared.is_plugged(0, 0x40_0800));
    assert_eq!(shared.plugged_bytes(), 0x40_0800);
}

fn check_blocks(
    block: u32,
    extra: usize,
    steps: Vec<(bool, usize, usize)>,
    queries: Vec<(usize, usize)>,
) -> Result<(), TestCaseError> {
    let size = 1 << block;
    let total = (200 << block) - extra % size;
    let blocks = blocks(total, size);
    let mut model = vec![false; total];
    for (plug, from, count) in steps {
        let (offset, end) = (
            (from << block).min(total),
            ((from + count) << block).min(total),
        );
        let changed = if plug {
            blocks.plug(offset, end - offset)
        } else {
            blocks.unplug(offset, end - offset)
        };
        prop_assert_eq!(changed.is_ok(), offset % size == 0);
        if changed.is_ok() {
            model[offset..end].fill(plug);
        }
    }
    prop_assert_eq!(
        blocks.plugged_bytes(),
        model.iter().filter(|on| **on).count()
    );
    let mut runs = vec![false; total];
    for (offset, count) in blocks.runs() {
        prop_assert!(count > 0 && (offset == 0 || !runs[offset - 1]));
        runs[offset..offset + count].fill(true);
    }
    prop_assert_eq!(&runs, &model);
    for (offset, count) in queries {
        let range = model.get(offset..offset + count);
        prop_assert_eq!(
            blocks.is_plugged(offset, count),
            range.is_some_and(|range| range.iter().all(|on| *on))
        );
        let ahead = model.get(offset..).unwrap_or(&[]);
        let ahead = &ahead[..count.min(ahead.len())];
        prop_assert_eq!(
            blocks.plugged_from(offset, count),
            ahead.iter().take_while(|on| **on).count()
        );
        prop_assert_eq!(
            blocks.is_unplugged(offset, count),
            ahead.iter().all(|on| !*on)
        );
    }
    Ok(())
}

proptest! {
    #[test]
    fn plugged_blocks_agree_with_one_flag_per_byte(
        block in 0u32..4,
        extra in 0usize..8,
        steps in prop::collection::vec((any::<bool>(), 0usize..200, 0usize..200), 1..20),
        queries in prop::collection::vec((0usize..1700, 0usize..1700), 1..20),
    ) {
        check_blocks(block, extra, steps, queries)?;
    }
}
