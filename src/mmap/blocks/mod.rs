//! [`PluggedBlocks`]: the blocks of a mapping that are plugged.

#[cfg(test)]
mod tests;

use core::num::NonZeroUsize;
use core::ops::{Deref, Range};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bits::{bit_number, bit_runs, words_of, WORD_BITS};
use crate::zeroed::try_zeroed;

/// The plugged blocks of a mapping: one bit per block, changed while devices run.
///
/// A guest plugs and unplugs the memory of a virtio-mem device block by block (virtio 1.2, section
/// 5.15). The VMM maps the whole region once, and passes the blocks to
/// [`MmapRegionBuilder::with_plugged_blocks`](super::MmapRegionBuilder::with_plugged_blocks).
/// Accesses to other blocks then fail. A change of a block changes one bit. A new memory map would
/// need a copy of the map at each request of the guest. Regions without blocks have no such cost.
///
/// ```text
///   offset       0        1 × block  2 × block  3 × block  4 × block
///   mapping      ├──────────┼──────────┼──────────┼──────────┤
///   bits              1          1          0          1
///   accessible   ├──── one range ──────┤          ├──────────┤
/// ```
///
/// Offsets and sizes are in bytes, from the start of the mapping. Initially no block is plugged.
///
/// [`BlockStates`] has the queries. Only the owner of this object changes blocks: a region hands
/// out only its [`BlockStates`].
///
/// # Costs
///
/// The cost of an access depends on its range, not on the size of the region: one load for every 64
/// blocks.
///
/// # Guarantees of unplugging
///
/// An access that begins after [`unplug`](Self::unplug) has returned does not reach the block. This
/// holds for every thread that synchronises with that return, by any means.
///
/// An access that began earlier keeps its slice until it ends. It may populate pages that were
/// discarded in the meantime. Wait for the devices, or discard the block again. If the block is
/// made inaccessible in the meantime (`mprotect(2)`), the access raises SIGSEGV: it returns an
/// error only if the [fault handler](crate::fault::is_installed) is installed.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::sync::Arc;
/// use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
/// use vm_memory::{
///     Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionMmap, Permissions,
/// };
///
/// let blocks = Arc::new(PluggedBlocks::new(0x8000, NonZeroUsize::new(0x2000).unwrap())?);
/// let mapping = MmapRegionBuilder::<()>::new(0x8000)
///     .with_plugged_blocks(Arc::clone(&blocks))
///     .build()?;
/// let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(vec![region])?;
///
/// assert!(memory.write_obj(1u8, GuestAddress(0x2000)).is_err());
/// blocks.plug(0x2000, 0x4000)?;
/// memory.write_obj(1u8, GuestAddress(0x2000))?;
/// assert!(!GuestMemory::check_range(&memory, GuestAddress(0x5fff), 2, Permissions::Read));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "hotplug")]
#[doc(alias = "hot-unplug")]
#[doc(alias = "virtio-mem")]
#[doc(alias = "memory resize")]
#[derive(Debug)]
pub struct PluggedBlocks {
    states: BlockStates,
    /// Held by the thread that changes blocks.
    changes: Mutex<()>,
}

/// The states of the blocks of a mapping, which its [`PluggedBlocks`] change.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::sync::Arc;
/// use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
///
/// let blocks = Arc::new(PluggedBlocks::new(0x8000, NonZeroUsize::new(0x2000).unwrap())?);
/// let mapping = MmapRegionBuilder::<()>::new(0x8000)
///     .with_plugged_blocks(Arc::clone(&blocks))
///     .build()?;
/// blocks.plug(0x2000, 0x2000)?;
/// let states = mapping.plugged_blocks().unwrap();
/// assert!(states.is_plugged(0x2000, 0x2000) && !states.is_plugged(0, 1));
/// assert_eq!(states.plugged_bytes(), 0x2000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct BlockStates {
    /// One bit per block.
    words: Box<[AtomicU64]>,
    /// A lower bound of the number of plugged blocks, exact while no thread changes blocks.
    ///
    /// `plug` sets bits first, `unplug` reduces the number first, and one thread at a time does
    /// either. So while this is the number of all blocks, all bits are set.
    plugged: AtomicUsize,
    size: usize,
    /// The size of a block is `1 << shift`.
    shift: u32,
}

impl Deref for PluggedBlocks {
    type Target = BlockStates;

    fn deref(&self) -> &BlockStates {
        &self.states
    }
}

#[cfg(test)]
thread_local! {
    /// The number of words that this thread has visited.
    static VISITS: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// The error of making or changing [`PluggedBlocks`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PluggedBlocksError {
    /// The size of a block is not a power of two.
    #[error("block size {block_size:#x} is not a power of two")]
    BlockSize {
        /// The block size in bytes.
        block_size: usize,
    },
    /// There is not enough memory for one bit per block.
    #[error(
        "cannot allocate one bit for each block of {block_size:#x} bytes in {size:#x} bytes; \
        use larger blocks"
    )]
    NoMemory {
        /// The size of the mapping in bytes.
        size: usize,
        /// The block size in bytes.
        block_size: usize,
    },
    /// The range does not begin and end at block boundaries.
    #[error(
        "range of {count:#x} bytes at offset {offset:#x} does not consist of whole blocks: \
         offset and size must be multiples of {block_size:#x}"
    )]
    NotBlocks {
        /// The offset of the range from the start of the mapping, in bytes.
        offset: usize,
        /// The length of the range in bytes.
        count: usize,
        /// The size of a block in bytes.
        block_size: usize,
    },
    /// The range ends past the mapping.
    #[error(
        "range of {count:#x} bytes at offset {offset:#x} ends past the mapping of {size:#x} bytes"
    )]
    Outside {
        /// The offset of the range from the start of the mapping, in bytes.
        offset: usize,
        /// The length of the range in bytes.
        count: usize,
        /// The size of the mapping in bytes.
        size: usize,
    },
}

impl PluggedBlocks {
    /// Creates blocks of `block_size` bytes for a mapping of `size` bytes, none of them plugged.
    ///
    /// The last block may be shorter.
    ///
    /// # Errors
    ///
    /// - [`PluggedBlocksError::BlockSize`] if `block_size` is not a power of two;
    /// - [`PluggedBlocksError::NoMemory`] if memory runs out.
    pub fn new(size: usize, block_size: NonZeroUsize) -> Result<Self, PluggedBlocksError> {
        if !block_size.is_power_of_two() {
            let block_size = block_size.get();
            return Err(PluggedBlocksError::BlockSize { block_size });
        }
        let count = size.div_ceil(block_size.get()).div_ceil(WORD_BITS);
        let no_memory = |_| PluggedBlocksError::NoMemory {
            size,
            block_size: block_size.get(),
        };
        let words = try_zeroed(count).map_err(no_memory)?;
        let states = BlockStates {
            words: words.into_boxed_slice(),
            plugged: AtomicUsize::new(0),
            size,
            shift: block_size.trailing_zeros(),
        };
        Ok(Self {
            states,
            changes: Mutex::new(()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The lock protects no data that a panic could leave inconsistent.
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plugs the blocks of the `count` bytes at `offset`: accesses can reach them.
    ///
    /// Blocks that are plugged already stay plugged.
    ///
    /// # Errors
    ///
    /// - [`PluggedBlocksError::Outside`] if the range ends past the mapping;
    /// - [`PluggedBlocksError::NotBlocks`] if it does not consist of whole blocks.
    ///
    /// After an error, no block has changed.
    pub fn plug(&self, offset: usize, count: usize) -> Result<(), PluggedBlocksError> {
        self.check_blocks(offset, count)?;
        let _changes = self.lock();
        let mut more = 0usize;
        for (word, mask) in self.words_in(offset, count) {
            // Release: a thread that finds the bit by an acquire load (`plugged_from`) also sees
            // the writes that made the block ready.
            let before = word.fetch_or(mask, Ordering::Release);
            more = more.saturating_add(ones(mask & !before));
        }
        // Release: a thread that finds this number by an acquire load (`is_whole`) also sees those
        // writes. Never wraps: each bit is counted once.
        self.states.plugged.fetch_add(more, Ordering::Release);
        Ok(())
    }

    /// Unplugs the blocks of the `count` bytes at `offset`: accesses that begin later fail.
    ///
    /// Blocks that are not plugged stay unplugged.
    ///
    /// # Errors
    ///
    /// - [`PluggedBlocksError::Outside`] if the range ends past the mapping;
    /// - [`PluggedBlocksError::NotBlocks`] if it does not consist of whole blocks.
    ///
    /// After an error, no block has changed.
    pub fn unplug(&self, offset: usize, count: usize) -> Result<(), PluggedBlocksError> {
        self.check_blocks(offset, count)?;
        let _changes = self.lock();
        let plugged = self
            .words_in(offset, count)
            .fold(0usize, |sum, (word, mask)| {
                // Relaxed: only the holder of the lock changes bits.
                sum.saturating_add(ones(word.load(Ordering::Relaxed) & mask))
            });
        // Before the bits: see `BlockStates::plugged`. Relaxed: an access that begins after this
        // function has returned sees the number and the bits, whatever their order.
        self.states.plugged.fetch_sub(plugged, Ordering::Relaxed);
        for (word, mask) in self.words_in(offset, count) {
            // Release: a thread that finds the bit clear by an acquire load (`is_unplugged`) also
            // sees what this thread did before.
            word.fetch_and(!mask, Ordering::Release);
        }
        Ok(())
    }
}

/// Returns the number of bits that are set.
fn ones(bits: u64) -> usize {
    bit_number(bits.count_ones())
}

impl BlockStates {
    /// Returns the size of the mapping in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the size of a block in bytes.
    pub fn block_size(&self) -> usize {
        1 << self.shift
    }

    /// Returns whether all blocks are plugged, at a cost that does not depend on their number.
    ///
    /// It may return `false` while another thread plugs the last block.
    pub fn is_whole(&self) -> bool {
        self.plugged.load(Ordering::Acquire) == self.blocks_of(0, self.size).len()
    }

    /// Returns whether all of the `count` bytes at `offset` are in plugged blocks.
    ///
    /// Returns `false` for bytes past the mapping. A range of 0 bytes inside it is plugged.
    pub fn is_plugged(&self, offset: usize, count: usize) -> bool {
        let plugged = |(word, mask): (&AtomicU64, u64)| word.load(Ordering::Acquire) & mask == mask;
        self.is_inside(offset, count)
            && (self.is_whole() || self.words_in(offset, count).all(plugged))
    }

    /// Returns whether none of the `count` bytes at `offset` is in a plugged block.
    pub fn is_unplugged(&self, offset: usize, count: usize) -> bool {
        let mut words = self.words_in(offset, count);
        words.all(|(word, mask)| word.load(Ordering::Acquire) & mask == 0)
    }

    /// Returns the number of bytes at `offset`, up to `count`, that are in plugged blocks.
    ///
    /// The count ends at the first byte that is not in a plugged block.
    pub fn plugged_from(&self, offset: usize, count: usize) -> usize {
        let gap = self
            .numbered_words_in(offset, count)
            .find_map(|(number, word, mask)| {
                let missing = mask & !word.load(Ordering::Acquire);
                let bit = bit_number(missing.trailing_zeros());
                (missing != 0).then(|| number.saturating_mul(WORD_BITS).saturating_add(bit))
            });
        let end = match gap {
            // The range may begin inside the first block.
            Some(block) => block.saturating_mul(self.block_size()).max(offset),
            None => offset.saturating_add(count).min(self.size),
        };
        end.saturating_sub(offset)
    }

    /// Returns the number of bytes in plugged blocks.
    ///
    /// The cost does not depend on their number. A change by another thread may or may not be
    /// included.
    pub fn plugged_bytes(&self) -> usize {
        let blocks = self.plugged.load(Ordering::Acquire);
        // The last block may be shorter.
        let last = self.size.saturating_sub(1);
        let end = self.blocks_of(0, self.size).end;
        let lacks = end
            .saturating_mul(self.block_size())
            .saturating_sub(self.size);
        let bytes = blocks.saturating_mul(self.block_size());
        if self.size != 0 && self.is_plugged(last, 1) {
            bytes.saturating_sub(lacks)
        } else {
            bytes
        }
    }

    /// Returns the plugged ranges as offsets and lengths in bytes, ascending.
    ///
    /// Adjacent blocks are one range.
    ///
    /// A change during the iteration may or may not be included.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::mmap::PluggedBlocks;
    ///
    /// let blocks = PluggedBlocks::new(0x8000, NonZeroUsize::new(0x2000).unwrap())?;
    /// blocks.plug(0, 0x4000)?;
    /// blocks.plug(0x6000, 0x2000)?;
    /// assert_eq!(blocks.runs().collect::<Vec<_>>(), [(0, 0x4000), (0x6000, 0x2000)]);
    /// # Ok::<(), vm_memory::mmap::PluggedBlocksError>(())
    /// ```
    pub fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.runs_in(0, self.size)
    }

    /// Returns the plugged ranges among the `count` bytes at `offset`, like [`runs`](Self::runs).
    ///
    /// The cost follows `count`, not the size of the mapping.
    pub fn runs_in(
        &self,
        offset: usize,
        count: usize,
    ) -> impl Iterator<Item = (usize, usize)> + '_ {
        let end = offset.saturating_add(count).min(self.size);
        let words = self.numbered_words_in(offset, count);
        let plugged =
            words.map(|(number, word, mask)| (number, word.load(Ordering::Acquire) & mask));
        bit_runs(plugged).map(move |run| {
            // The range may contain only parts of its first and last block.
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

    /// Returns an error unless the range consists of whole blocks of the mapping.
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
        if offset < end {
            let last = end.saturating_sub(1);
            offset >> self.shift..(last >> self.shift).saturating_add(1)
        } else {
            0..0
        }
    }

    /// Returns the words of those blocks, each with a mask of their bits.
    fn words_in(&self, offset: usize, count: usize) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let words = self.numbered_words_in(offset, count);
        words.map(|(_, word, mask)| (word, mask))
    }

    /// Returns the words of those blocks, each with its number and a mask of their bits.
    fn numbered_words_in(
        &self,
        offset: usize,
        count: usize,
    ) -> impl Iterator<Item = (usize, &AtomicU64, u64)> {
        words_of(self.blocks_of(offset, count)).filter_map(|(number, mask)| {
            #[cfg(test)]
            VISITS.set(VISITS.get().wrapping_add(1));
            Some((number, self.words.get(number)?, mask))
        })
    }
}
