//! [`PluggedBlocks`]: which parts of a mapping a guest has for now.

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::bits::{bit_runs, words_of, WORD_BITS};

/// Which blocks of a mapping can be reached: a bit for each, changed while devices run.
///
/// A region that a guest fills and empties block by block (virtio-mem, virtio 1.2 section 5.15) is mapped whole, once. A map of guest memory that
/// is exchanged for each block would be copied for each block, at the guest's wish; a bit costs nothing, and regions without blocks pay nothing
/// for it. [`MmapRegionBuilder::with_plugged_blocks`](super::MmapRegionBuilder::with_plugged_blocks) puts it in front of a mapping.
///
/// ```text
///   offset    0        1 × block  2 × block  3 × block  4 × block
///   mapping   ├──────────┼──────────┼──────────┼──────────┤
///   bits           1          1          0          1
///   reached   ├──── one range ──────┤          ├──────────┤
/// ```
///
/// Offsets and sizes are in bytes, and count from the start of the mapping. In the beginning nothing is plugged.
///
/// ```
/// # #[cfg(unix)] {
/// use std::num::NonZeroUsize;
/// use std::sync::Arc;
/// use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
/// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionMmap, Permissions};
///
/// let blocks = Arc::new(PluggedBlocks::new(0x8000, NonZeroUsize::new(0x2000).unwrap())?);
/// let mapping = MmapRegionBuilder::<()>::new(0x8000).with_plugged_blocks(Arc::clone(&blocks)).build()?;
/// let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(vec![region])?;
///
/// assert!(memory.write_obj(1u8, GuestAddress(0x2000)).is_err());
/// blocks.plug(0x2000, 0x4000)?;
/// memory.write_obj(1u8, GuestAddress(0x2000))?;
/// assert!(!GuestMemory::check_range(&memory, GuestAddress(0x5fff), 2, Permissions::Read));
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What unplugging promises
///
/// An access that begins after [`unplug`](Self::unplug) has returned does not reach the block: who knows that it has returned also sees the
/// bits (whatever tells of it orders them; one bit's own value goes forwards only). An access that began before keeps the slice that it has until it is
/// over, and may bring back pages that were given back under it: wait for one's own devices, or give the block back again.
#[derive(Debug)]
pub struct PluggedBlocks {
    /// A bit for each block.
    words: Box<[AtomicU64]>,
    size: usize,
    /// The size of a block, as a power of two.
    shift: u32,
}

/// Why blocks cannot be as they are asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PluggedBlocksError {
    /// The size of a block is no power of two.
    #[error("{block_size:#x} bytes are no size of a block: it is not a power of two")]
    BlockSize {
        /// That size, in bytes.
        block_size: usize,
    },
    /// The range does not begin and end where blocks do.
    #[error(
        "{count:#x} bytes at offset {offset:#x} are not whole blocks of {block_size:#x} bytes"
    )]
    NotBlocks {
        /// Where the range begins, in bytes from the start of the mapping.
        offset: usize,
        /// Its length in bytes.
        count: usize,
        /// The size of a block in bytes.
        block_size: usize,
    },
    /// The range passes the end.
    #[error("{count:#x} bytes at offset {offset:#x} are not all in a mapping of {size:#x} bytes")]
    Outside {
        /// Where the range begins, in bytes from the start of the mapping.
        offset: usize,
        /// Its length in bytes.
        count: usize,
        /// The size of the mapping in bytes.
        size: usize,
    },
}

impl PluggedBlocks {
    /// Makes blocks of `block_size` bytes for a mapping of `size` bytes, none of them plugged. The last one may be shorter.
    ///
    /// # Errors
    ///
    /// [`PluggedBlocksError::BlockSize`] if that is no power of two.
    pub fn new(
        size: usize,
        block_size: core::num::NonZeroUsize,
    ) -> Result<Self, PluggedBlocksError> {
        if !block_size.is_power_of_two() {
            let block_size = block_size.get();
            return Err(PluggedBlocksError::BlockSize { block_size });
        }
        let count = size.div_ceil(block_size.get()).div_ceil(WORD_BITS);
        Ok(Self {
            words: core::iter::repeat_with(AtomicU64::default)
                .take(count)
                .collect(),
            size,
            shift: block_size.trailing_zeros(),
        })
    }

    /// Returns the size of the mapping in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the size of a block in bytes.
    pub fn block_size(&self) -> usize {
        1 << self.shift
    }

    /// Lets accesses reach the `count` bytes at `offset`, which are whole blocks. What was plugged stays so.
    ///
    /// # Errors
    ///
    /// If the range is not in the mapping, or does not consist of whole blocks. Nothing is changed then.
    pub fn plug(&self, offset: usize, count: usize) -> Result<(), PluggedBlocksError> {
        self.check_blocks(offset, count)?;
        for (word, mask) in self.words_in(offset, count) {
            // Release: a thread that loads the bit with Acquire (`is_plugged`) also sees the writes
            // that made the block ready.
            word.fetch_or(mask, Ordering::Release);
        }
        Ok(())
    }

    /// Keeps accesses that begin from now on from the `count` bytes at `offset`, which are whole blocks. What was not plugged stays so.
    ///
    /// # Errors
    ///
    /// If the range is not in the mapping, or does not consist of whole blocks. Nothing is changed then.
    pub fn unplug(&self, offset: usize, count: usize) -> Result<(), PluggedBlocksError> {
        self.check_blocks(offset, count)?;
        for (word, mask) in self.words_in(offset, count) {
            word.fetch_and(!mask, Ordering::Release);
        }
        Ok(())
    }

    /// Returns whether all blocks that have any of the `count` bytes at `offset` are plugged. No bytes are in no block.
    ///
    /// What is not in the mapping is not plugged.
    pub fn is_plugged(&self, offset: usize, count: usize) -> bool {
        self.is_inside(offset, count) && self.plugged_from(offset, count) == count
    }

    /// Returns whether no block that has any of the `count` bytes at `offset` is plugged.
    pub fn is_unplugged(&self, offset: usize, count: usize) -> bool {
        let mut words = self.words_in(offset, count);
        words.all(|(word, mask)| word.load(Ordering::Acquire) & mask == 0)
    }

    /// Returns how many of the `count` bytes at `offset` come before the first that is in no plugged block.
    pub fn plugged_from(&self, offset: usize, count: usize) -> usize {
        let end = offset.saturating_add(count).min(self.size);
        let gap = words_of(self.blocks_of(offset, count)).find_map(|(number, mask)| {
            let missing = mask & !self.words.get(number)?.load(Ordering::Acquire);
            let bit = usize::try_from(missing.trailing_zeros()).ok()?;
            (missing != 0).then(|| number.saturating_mul(WORD_BITS).saturating_add(bit))
        });
        let end = match gap {
            // Blocks end within the mapping but for the last one: no overflow.
            Some(block) => block.saturating_mul(self.block_size()).max(offset),
            None => end,
        };
        end.saturating_sub(offset)
    }

    /// Returns how many bytes are plugged.
    pub fn plugged_bytes(&self) -> usize {
        self.runs()
            .fold(0, |sum, (_, length)| sum.saturating_add(length))
    }

    /// Returns the plugged ranges in ascending order, as offsets and lengths in bytes; adjacent blocks are one range. What changes meanwhile is
    /// seen or not.
    pub fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.runs_in(0, self.size)
    }

    /// Returns the plugged ranges among the `count` bytes at `offset`, as [`runs`](Self::runs) does. Looks at nothing else.
    pub fn runs_in(
        &self,
        offset: usize,
        count: usize,
    ) -> impl Iterator<Item = (usize, usize)> + '_ {
        let end = offset.saturating_add(count).min(self.size);
        let words = words_of(self.blocks_of(offset, count));
        let plugged = words.filter_map(|(number, mask)| {
            let bits = self.words.get(number)?.load(Ordering::Acquire);
            Some((number, bits & mask))
        });
        bit_runs(plugged).map(move |run| {
            // The first and the last block may be in the range only in part.
            let byte = |block: usize| block.saturating_mul(self.block_size());
            let (start, end) = (byte(run.start).max(offset), byte(run.end).min(end));
            (start, end.saturating_sub(start))
        })
    }

    fn is_inside(&self, offset: usize, count: usize) -> bool {
        offset
            .checked_add(count)
            .is_some_and(|end| end <= self.size)
    }

    fn check_blocks(&self, offset: usize, count: usize) -> Result<(), PluggedBlocksError> {
        let size = self.size;
        if !self.is_inside(offset, count) {
            return Err(PluggedBlocksError::Outside {
                offset,
                count,
                size,
            });
        }
        let block_size = self.block_size();
        let end = offset.saturating_add(count);
        let whole = |at: usize| at.is_multiple_of(block_size);
        if !whole(offset) || !(whole(end) || end == size) {
            return Err(PluggedBlocksError::NotBlocks {
                offset,
                count,
                block_size,
            });
        }
        Ok(())
    }

    /// Returns the numbers of the blocks that have any of the `count` bytes at `offset`.
    fn blocks_of(&self, offset: usize, count: usize) -> Range<usize> {
        let end = offset.saturating_add(count).min(self.size);
        match end.checked_sub(1) {
            Some(last) if offset < end => {
                offset >> self.shift..(last >> self.shift).saturating_add(1)
            }
            _ => 0..0,
        }
    }

    /// Returns the words of those blocks, each with a mask of their bits.
    fn words_in(&self, offset: usize, count: usize) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let words = words_of(self.blocks_of(offset, count));
        words.filter_map(|(number, mask)| Some((self.words.get(number)?, mask)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::num::NonZeroUsize;
    use proptest::prelude::*;

    fn blocks(size: usize, block: usize) -> PluggedBlocks {
        PluggedBlocks::new(size, NonZeroUsize::new(block).unwrap()).unwrap()
    }

    #[test]
    fn what_is_no_block_is_refused_and_changes_nothing() {
        let error = PluggedBlocks::new(0x1000, NonZeroUsize::new(0x300).unwrap()).unwrap_err();
        assert_eq!(error, PluggedBlocksError::BlockSize { block_size: 0x300 });
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
        // The last block is a short one.
        blocks.plug(0x1000, 0x800).unwrap();
        assert_eq!(blocks.runs().collect::<Vec<_>>(), [(0x1000, 0x800)]);
        assert_eq!(blocks.plugged_from(0x1001, usize::MAX), 0x7ff);
    }

    proptest! {
        /// Against a flag for each byte.
        #[test]
        fn blocks_agree_with_flags(
            block in 0u32..4,
            extra in 0usize..8,
            steps in prop::collection::vec((any::<bool>(), 0usize..200, 0usize..200), 1..20),
            asks in prop::collection::vec((0usize..1700, 0usize..1700), 1..20),
        ) {
            let size = 1 << block;
            let total = (200 << block) - extra % size;
            let blocks = blocks(total, size);
            let mut model = vec![false; total];
            for (plug, from, count) in steps {
                let (offset, end) = ((from << block).min(total), ((from + count) << block).min(total));
                let changed = if plug { blocks.plug(offset, end - offset) } else { blocks.unplug(offset, end - offset) };
                prop_assert_eq!(changed.is_ok(), offset % size == 0);
                if changed.is_ok() {
                    model[offset..end].fill(plug);
                }
            }
            prop_assert_eq!(blocks.plugged_bytes(), model.iter().filter(|on| **on).count());
            let mut runs = vec![false; total];
            for (offset, count) in blocks.runs() {
                prop_assert!(count > 0 && (offset == 0 || !runs[offset - 1]));
                runs[offset..offset + count].fill(true);
            }
            prop_assert_eq!(&runs, &model);
            for (offset, count) in asks {
                let range = model.get(offset..offset + count);
                prop_assert_eq!(blocks.is_plugged(offset, count), range.is_some_and(|range| range.iter().all(|on| *on)));
                let ahead = model.get(offset..).unwrap_or(&[]);
                let ahead = &ahead[..count.min(ahead.len())];
                prop_assert_eq!(blocks.plugged_from(offset, count), ahead.iter().take_while(|on| **on).count());
                prop_assert_eq!(blocks.is_unplugged(offset, count), ahead.iter().all(|on| !*on));
            }
        }
    }
}
