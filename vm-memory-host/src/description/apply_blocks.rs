//! [`Description::apply_blocks`]: plugs and unplugs blocks as a description says.

use vm_memory::mmap::BlockStates;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{BlocksDescription, Description, DescriptionError};
use crate::mapping::{provisioned, span_of, to_u64, HostMapped};
use crate::operations::{plug, unplug};
use crate::region::Span;

impl Description {
    /// Plugs and unplugs the blocks of `memory`, so that they are as described.
    ///
    /// Use it at the destination of a migration, which built `memory` by [`fresh`](Self::fresh).
    /// The guest may plug and unplug blocks (virtio-mem) while the migration runs. So each round
    /// has these steps:
    ///
    /// 1. The source harvests the dirty pages (`vm_memory::dirty`). It then
    ///    [describes](crate::describe()) its memory, and sends the description. This order matters:
    ///    a block that is plugged after the harvest has no pages in this round.
    /// 2. The destination removes the regions that are not described, adds those that it lacks
    ///    ([`missing_from`](Self::missing_from) shows both), and applies the description. The
    ///    source sends a new region as a whole (`vm_memory::dirty`).
    /// 3. The source sends the dirty pages that cannot be read
    ///    (`DirtyMemory::unreadable_runs`), and the destination [zeroes](crate::zero_range()) them.
    ///    A block that was plugged between the harvest and the description then reads as zeroes.
    /// 4. The source sends the other dirty pages (`DirtyMemory::runs`), and the destination
    ///    writes them. The read of a run fails if one of its blocks is unplugged by then. The write
    ///    fails if one was unplugged at the description and is plugged now. The run may have pages
    ///    of other blocks, which [`unplug`] does not mark. So the source keeps the whole run for
    ///    the next round (`DirtyMemory::insert_range`), as `send` does below. To be able to skip
    ///    it, it copies the bytes of a chunk to a buffer before it sends the header.
    ///
    /// In the last round, while the guest is paused, each run can be read. Both sides then have the
    /// same blocks.
    ///
    /// Blocks that are plugged already keep their bytes. Regions without blocks, and regions that
    /// are not described, stay as they are. The description may come from an untrusted process: it
    /// is [checked](Self::check), and decides only which blocks are plugged.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::{NonZeroU64, NonZeroUsize};
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{describe, plug, unplug, zero_range, MemoryBuilder, Region, Unplugged};
    ///
    /// type Memory = GuestMemoryMmap<AtomicBitmap>;
    /// type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
    ///
    /// /// Sends the dirty pages. Those that were not sent stay in the set.
    /// fn send(source: &Memory, dirty: &mut DirtyMemory, destination: &Memory) -> Result<()> {
    ///     for (addr, len) in dirty.unreadable_runs() {
    ///         zero_range(destination, addr, u64::try_from(len)?)?;
    ///     }
    ///     let mut buffer = [0; 1 << 16];
    ///     let mut unsent = Vec::new();
    ///     for (addr, len) in dirty.chunks(NonZeroUsize::new(buffer.len()).unwrap()) {
    ///         let read = source.read_slice(&mut buffer[..len], addr);
    ///         let sent = read.and_then(|()| destination.write_slice(&buffer[..len], addr));
    ///         if sent.is_err() {
    ///             unsent.push((addr, len));
    ///         }
    ///     }
    ///     dirty.clear();
    ///     for (addr, len) in unsent {
    ///         dirty.insert_range(addr, u64::try_from(len)?);
    ///     }
    ///     Ok(())
    /// }
    ///
    /// let block = NonZeroU64::new(2 << 20).unwrap();
    /// let region = Region::new(GuestAddress(0), 8 << 20).blocks(block, Unplugged::Mapped);
    /// let source: Memory = MemoryBuilder::new().region(region).build()?;
    /// let destination: Memory = describe(&source)?.0.fresh()?.build()?;
    ///
    /// // During the migration, the guest plugs two blocks, and writes to the pages between them.
    /// plug(&source, GuestAddress(2 << 20), 4 << 20)?;
    /// let last_page = GuestAddress((4 << 20) - 0x1000);
    /// source.write_slice(&[7; 0x2000], last_page)?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&source);
    /// describe(&source)?.0.apply_blocks(&destination)?;
    ///
    /// // It unplugs the second block before the source sends the pages.
    /// unplug(&source, GuestAddress(4 << 20), 2 << 20)?;
    /// send(&source, &mut dirty, &destination)?;
    /// assert_eq!(dirty.total_bytes(), 0x2000);
    ///
    /// // The next round sends the page of the first block.
    /// dirty.harvest(&source);
    /// describe(&source)?.0.apply_blocks(&destination)?;
    /// send(&source, &mut dirty, &destination)?;
    /// assert_eq!(destination.read_obj::<u8>(last_page)?, 7);
    /// assert_eq!(dirty.total_bytes(), 0);
    ///
    /// // The first block is unplugged while it is described, and its page stays in the set.
    /// source.write_obj(8u8, last_page)?;
    /// dirty.harvest(&source);
    /// unplug(&source, GuestAddress(2 << 20), 2 << 20)?;
    /// describe(&source)?.0.apply_blocks(&destination)?;
    /// plug(&source, GuestAddress(2 << 20), 2 << 20)?;
    /// send(&source, &mut dirty, &destination)?;
    /// assert_eq!(dirty.total_bytes(), 0x1000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Changes nothing, and returns
    ///
    /// - the errors of [`check`](Self::check), or
    /// - [`DescriptionError::OtherBlocks`] if `memory` does not have a described region of blocks,
    ///   with the same addresses and the same size of blocks.
    ///
    /// Returns [`DescriptionError::Change`] if a block cannot be plugged or unplugged
    /// ([`is_shortage`](DescriptionError::is_shortage) tells whether pages are short). Some blocks
    /// may then be as described. The call can be repeated.
    #[doc(alias = "virtio-mem")]
    #[doc(alias = "migration")]
    pub fn apply_blocks<M>(&self, memory: &M) -> Result<(), DescriptionError>
    where
        M: GuestMemoryBackend,
        M::R: HostMapped,
    {
        self.check()?;
        let all = self.regions.iter();
        let with_blocks = all.filter_map(|one| Some((one.span, one.blocks.as_ref()?)));
        let found = with_blocks.map(|(region, described)| {
            let states = states(memory, region, described)
                .ok_or(DescriptionError::OtherBlocks { region })?;
            Ok((region, &described.plugged, states))
        });
        let regions: Vec<_> = found.collect::<Result<_, DescriptionError>>()?;
        // Unplugging returns huge pages, which other blocks may need.
        for (region, plugged, states) in &regions {
            for (offset, len) in superfluous(states, plugged) {
                unplug(memory, at(*region, offset), len)?;
            }
        }
        for (region, plugged, _) in &regions {
            for (offset, len) in plugged.iter() {
                plug(memory, at(*region, *offset), *len)?;
            }
        }
        Ok(())
    }
}

/// Returns the blocks of a region of `memory`, if it is as described.
fn states<'a, M>(
    memory: &'a M,
    region: Span,
    described: &BlocksDescription,
) -> Option<&'a BlockStates>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let found = memory.find_region(GuestAddress(region.start))?;
    let (blocks, states) = provisioned(found).ok()?.blocks.as_ref()?;
    let is_same = span_of(found) == region && blocks.size == described.blocks.size;
    is_same.then_some(states)
}

/// Returns the plugged ranges outside `plugged`, as offset in the region and length, in bytes.
fn superfluous(states: &BlockStates, plugged: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut described = plugged.iter().copied().peekable();
    let mut found = Vec::new();
    for (offset, len) in states.runs() {
        let (mut at, end) = (to_u64(offset), to_u64(offset).saturating_add(to_u64(len)));
        // Both lists ascend, so ranges that end before `at` are passed for good.
        while at < end {
            let end_of = |range: &(u64, u64)| range.0.saturating_add(range.1);
            while described.next_if(|range| end_of(range) <= at).is_some() {}
            let next = described.peek().copied().unwrap_or((end, 0));
            let gap = next.0.min(end);
            if at < gap {
                found.push((at, gap.saturating_sub(at)));
            }
            at = end_of(&next).max(gap);
        }
    }
    found
}

/// Returns the guest address at an offset in a region.
fn at(region: Span, offset: u64) -> GuestAddress {
    GuestAddress(region.start.saturating_add(offset))
}
