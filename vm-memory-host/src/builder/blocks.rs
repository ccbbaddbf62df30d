//! The blocks of a region: the checks of a request, and the record of plugged blocks.

use std::num::{NonZeroU64, NonZeroUsize};

use vm_memory::mmap::{PluggedBlocks, PluggedBlocksError};

use crate::error::BuildError;
use crate::mapping::OpenedBacking;
use crate::region::{Blocks, Region};

/// Checks that blocks have a power of two as their size, and that the region is whole blocks.
pub(super) fn block_size(region: &Region) -> Result<(), BuildError> {
    let Some(Blocks { size, .. }) = region.blocks else {
        return Ok(());
    };
    if !size.is_power_of_two() {
        return Err(BuildError::Blocks {
            region: region.span(),
            source: PluggedBlocksError::BlockSize {
                block_size: usize::try_from(size.get()).unwrap_or(usize::MAX),
            },
        });
    }
    if !region.size.is_multiple_of(size.get()) {
        return Err(BuildError::Misaligned {
            region: region.span(),
            what: "size",
            value: region.size,
            unit: "block",
            unit_size: size.get(),
        });
    }
    Ok(())
}

/// Returns the initially plugged ranges as offset and length.
///
/// Checks that they are whole blocks in ascending order, and that no block is in two ranges. A list
/// can therefore not be longer than the region has blocks.
pub(super) fn initial_blocks(region: &Region) -> Result<Vec<(usize, usize)>, BuildError> {
    let block_size = region.blocks.map_or(0, |blocks| blocks.size.get());
    let mut before = 0u64;
    let mut ranges = Vec::with_capacity(region.plugged.len());
    for &(offset, len) in &region.plugged {
        let end = offset.checked_add(len).filter(|end| *end <= region.size);
        let is_whole = block_size != 0 && len != 0 && (offset | len).is_multiple_of(block_size);
        let range = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
        let (Some(end), Some(range), true) = (end, range, is_whole) else {
            return Err(BuildError::Plugged {
                region: region.span(),
                offset,
                len,
                block_size,
            });
        };
        if offset < before {
            return Err(BuildError::PluggedTwice {
                region: region.span(),
                offset,
                len,
                before,
            });
        }
        before = end;
        ranges.push(range);
    }
    Ok(ranges)
}

/// Creates the record of a region's plugged blocks, all of them unplugged.
pub(super) fn new_blocks(
    region: &Region,
    backing: &OpenedBacking,
    size: NonZeroU64,
) -> Result<PluggedBlocks, BuildError> {
    let span = region.span();
    let fail = |source| BuildError::Blocks {
        region: span,
        source,
    };
    let wrong_size = |_| PluggedBlocksError::BlockSize {
        block_size: usize::MAX,
    };
    let block_size = NonZeroUsize::try_from(size).map_err(|e| fail(wrong_size(e)))?;
    self::block_size(region)?;
    if !size.get().is_multiple_of(backing.page_size) {
        return Err(BuildError::Misaligned {
            region: span,
            what: "block size",
            value: size.get(),
            unit: "page",
            unit_size: backing.page_size,
        });
    }
    let len = usize::try_from(region.size).map_err(|e| fail(wrong_size(e)))?;
    PluggedBlocks::new(len, block_size).map_err(fail)
}
