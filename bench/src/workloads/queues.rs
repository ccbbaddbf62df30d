//! virtio-queue 0.18 from the registry, on either crate.

use std::hint::black_box;

use anyhow::{ensure, Result};

use super::kinds::memory;
use super::virtio_queue::{Queue, QueueOwnedT, QueueT};
use super::vm_memory::bitmap::NewBitmap;
use super::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use crate::comparison::{timed, Batch};
use crate::layout::Layout;
use crate::shared_pages::SharedPages;
use crate::values::S16;
use crate::workload_shapes::{blk, ring};

/// Returns a queue with `chains` available chains of `per_chain` descriptors each.
fn queue<B: NewBitmap>(
    memory: &GuestMemoryMmap<B>,
    descriptors: &[S16],
    per_chain: u16,
) -> Result<Queue> {
    for (number, descriptor) in descriptors.iter().enumerate() {
        memory.write_obj(
            *descriptor,
            GuestAddress(ring::DESCRIPTORS + 16 * number as u64),
        )?;
    }
    let chains = descriptors.len() as u16 / per_chain;
    for chain in 0..chains {
        let entry = GuestAddress(ring::AVAILABLE + 4 + 2 * u64::from(chain));
        memory.write_obj(chain * per_chain, entry)?;
    }
    memory.write_obj(0u16, GuestAddress(ring::AVAILABLE))?;
    memory.write_obj(chains, GuestAddress(ring::AVAILABLE + 2))?;

    let mut queue: Queue = QueueT::new(ring::SIZE)?;
    queue.set_desc_table_address(Some(ring::DESCRIPTORS as u32), Some(0));
    queue.set_avail_ring_address(Some(ring::AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(ring::USED as u32), Some(0));
    queue.set_ready(true);
    ensure!(queue.is_valid(memory), "the queue is not valid");
    Ok(queue)
}

pub fn add_used<B: NewBitmap + 'static>(shared: &SharedPages) -> Result<Batch> {
    let memory = memory::<B>(shared, Layout::apart(1))?;
    let mut queue = queue(&memory, &[], 1)?;
    Ok(Batch::of(move |number| {
        queue.add_used(
            &memory,
            black_box(number as u16 % ring::SIZE),
            black_box(4096),
        )
    }))
}

/// Takes 128 chains of one descriptor each from the ring.
pub fn iter128x1<B: NewBitmap + 'static>(shared: &SharedPages) -> Result<Batch> {
    let memory = memory::<B>(shared, Layout::apart(1))?;
    let mut queue = queue(&memory, &ring::singles(), 1)?;
    let batch = Batch::around(move |iterations| {
        Ok(timed(iterations, |_| {
            queue.set_next_avail(0);
            let mut chains = 0;
            for chain in queue.iter(&memory).ok()? {
                for descriptor in chain {
                    black_box(descriptor);
                }
                chains += 1;
            }
            (chains == ring::SINGLES).then_some(())
        }))
    });
    Ok(batch.per(ring::SINGLES))
}

/// Serves virtio-blk requests: reads the header, writes 4 KiB of data and the status, and returns
/// the chain.
pub fn blk4k<B: NewBitmap + 'static>(shared: &SharedPages) -> Result<Batch> {
    let memory = memory::<B>(shared, Layout::apart(1))?;
    let mut queue = queue(&memory, &blk::descriptors(), 3)?;
    let host = shared.host.clone();
    let batch = Batch::around(move |iterations| {
        host.with(blk::DATA_LEN, |sectors| {
            timed(iterations, |_| {
                queue.set_next_avail(0);
                for _ in 0..blk::REQUESTS {
                    let mut chain = queue.pop_descriptor_chain(&memory)?;
                    let (header, data, status) = (chain.next()?, chain.next()?, chain.next()?);
                    let header: S16 = memory.read_obj(header.addr()).ok()?;
                    black_box(header);
                    memory.write_slice(black_box(&*sectors), data.addr()).ok()?;
                    memory.write_obj(0u8, status.addr()).ok()?;
                    let written = blk::DATA_LEN as u32 + 1;
                    queue.add_used(&memory, chain.head_index(), written).ok()?;
                }
                Some(())
            })
        })
    });
    Ok(batch.per(blk::REQUESTS))
}
