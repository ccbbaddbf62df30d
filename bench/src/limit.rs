//! The limit: a bounds check on a flat array and one access, or `memcpy`. With many regions, also a
//! binary search.

use std::hint::black_box;
use std::ops::Range;

use anyhow::{Context, Result};
use memmap2::{MmapMut, MmapOptions};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::comparison::{timed, Batch};
use crate::layout::Layout;
use crate::shared_pages::{SharedPages, GUEST_LEN};
use crate::throughput::Shift;
use crate::values::{HostArray, Words, S16};
use crate::workload_shapes::{blk, pages_in, ring, Mappings, BITMAP_LEN, PAGE, SECOND_SLICE};

/// The shared pages as one array, and the start of each region in it.
struct Flat {
    bytes: MmapMut,
    starts: Vec<u64>,
    region_len: u64,
}

impl Flat {
    fn new(shared: &SharedPages, layout: Layout) -> Result<Self> {
        let mut options = MmapOptions::new();
        options.len(GUEST_LEN);
        #[expect(
            unsafe_code,
            reason = "all sides map the same pages, so that caches treat them alike"
        )]
        // SAFETY: 1. The file is an anonymous memfd of this process, which never truncates it.
        // 2. No other mapping of the file is accessed while a reference into this one is in use.
        //    One thread uses the shared pages, and each batch ends before the next one begins.
        let bytes = unsafe { options.map_mut(&shared.file) };
        let bytes = bytes.context("cannot map the guest's memory")?;
        Ok(Self {
            bytes,
            starts: layout.starts().map(|(start, _)| start).collect(),
            region_len: layout.region_len as u64,
        })
    }

    /// Returns the range of offsets of `size` bytes at `address`, if one region contains all of
    /// them.
    #[inline(always)]
    fn find(&self, address: u64, size: usize) -> Option<Range<usize>> {
        let region = self
            .starts
            .partition_point(|start| *start <= address)
            .checked_sub(1)?;
        let offset = address - *self.starts.get(region)?;
        if offset.checked_add(size as u64)? > self.region_len {
            return None;
        }
        let start = region * self.region_len as usize + offset as usize;
        Some(start..start + size)
    }

    /// Returns the range of offsets of `size` bytes at `address`, in a single region at address 0.
    #[inline(always)]
    fn find_in_one(&self, address: u64, size: usize) -> Option<Range<usize>> {
        let start = address as usize;
        Some(start..start.checked_add(size)?)
    }

    #[inline(always)]
    fn read<T: FromBytes>(&self, address: u64) -> Option<T> {
        let bytes = self.bytes.get(self.find_in_one(address, size_of::<T>())?)?;
        T::read_from_bytes(bytes).ok()
    }

    #[inline(always)]
    fn write<T: IntoBytes + Immutable>(&mut self, value: T, address: u64) -> Option<()> {
        let bytes = self.find_in_one(address, size_of::<T>())?;
        value.write_to(self.bytes.get_mut(bytes)?).ok()
    }
}

/// Creates a batch: without a search for one region, with a binary search for more.
macro_rules! search {
    ($shared:ident, $regions:ident, $size:expr, $align:expr, |$flat:ident, $range:ident| $body:expr) => {{
        let layout = Layout::apart($regions);
        let $flat = Flat::new($shared, layout)?;
        let addresses = layout.addresses($size, $align);
        Ok(if $regions == 1 {
            Batch::of(move |number| {
                let $range = $flat.find_in_one(black_box(addresses.at(number)), $size)?;
                $body
            })
        } else {
            Batch::of(move |number| {
                let $range = $flat.find(black_box(addresses.at(number)), $size)?;
                $body
            })
        })
    }};
}

pub fn find_region(shared: &SharedPages, regions: usize) -> Result<Batch> {
    search!(shared, regions, 1, 1, |flat, range| flat
        .bytes
        .get(range)
        .map(<[u8]>::as_ptr))
}

pub fn get_slice64(shared: &SharedPages, regions: usize) -> Result<Batch> {
    search!(shared, regions, 64, 8, |flat, range| flat
        .bytes
        .get(range)
        .map(<[u8]>::as_ptr))
}

pub fn check_range4k(shared: &SharedPages, regions: usize) -> Result<Batch> {
    search!(shared, regions, 4096, 64, |flat, range| flat
        .bytes
        .get(range)
        .map(<[u8]>::len))
}

pub fn read_obj<T: FromBytes + 'static>(shared: &SharedPages, regions: usize) -> Result<Batch> {
    search!(
        shared,
        regions,
        size_of::<T>(),
        size_of::<T>(),
        |flat, range| T::read_from_bytes(flat.bytes.get(range)?).ok()
    )
}

pub fn write_obj<T: IntoBytes + Immutable + Default + 'static>(
    shared: &SharedPages,
) -> Result<Batch> {
    let layout = Layout::apart(1);
    let mut flat = Flat::new(shared, layout)?;
    let addresses = layout.addresses(size_of::<T>(), size_of::<T>());
    Ok(Batch::of(move |number| {
        flat.write(black_box(T::default()), black_box(addresses.at(number)))
    }))
}

/// A write that also sets the dirty bit.
pub fn write_obj_tracked<T: IntoBytes + Immutable + Default + 'static>(
    shared: &SharedPages,
) -> Result<Batch> {
    let layout = Layout::apart(1);
    let mut flat = Flat::new(shared, layout)?;
    let addresses = layout.addresses(size_of::<T>(), size_of::<T>());
    let mut words = vec![u64::MAX; GUEST_LEN / PAGE / 64];
    Ok(Batch::of(move |number| {
        let address = black_box(addresses.at(number));
        flat.write(black_box(T::default()), address)?;
        mark(&mut words, address as usize, size_of::<T>())
    }))
}

/// Makes accesses in a closure that the loop cannot inline, as `contexts::boxed` does.
fn boxed(
    shared: &SharedPages,
    regions: usize,
    size: usize,
    mut access: impl FnMut(&mut Flat, u64, u64) -> Option<u64> + 'static,
) -> Result<Batch> {
    let layout = Layout::apart(regions);
    let mut flat = Flat::new(shared, layout)?;
    let addresses = layout.addresses(size, size);
    let run: Box<dyn FnMut(u64) -> Option<u64>> = black_box(Box::new(move |number| {
        access(&mut flat, addresses.at(number), number)
    }));
    Ok(Batch::of(run))
}

pub fn boxed_find_region(shared: &SharedPages, regions: usize) -> Result<Batch> {
    boxed(shared, regions, 1, |flat, address, _| {
        let range = flat.find(address, 1)?;
        flat.bytes.get(range).map(|bytes| bytes.len() as u64)
    })
}

pub fn boxed_read<T: Words + FromBytes>(shared: &SharedPages) -> Result<Batch> {
    boxed(shared, 1, size_of::<T>(), |flat, address, _| {
        flat.read(address).map(|value: T| value.sum())
    })
}

pub fn boxed_write<T: Words + IntoBytes + Immutable>(shared: &SharedPages) -> Result<Batch> {
    boxed(shared, 1, size_of::<T>(), |flat, address, number| {
        flat.write(T::from_word(number), address).map(|()| 0)
    })
}

/// A write that also sets the dirty bit.
pub fn boxed_write_tracked(shared: &SharedPages) -> Result<Batch> {
    let mut words = vec![u64::MAX; GUEST_LEN / PAGE / 64];
    boxed(shared, 1, size_of::<u64>(), move |flat, address, number| {
        flat.write(number, address)?;
        mark(&mut words, address as usize, size_of::<u64>()).map(|()| 0)
    })
}

pub fn boxed_read_slice(shared: &SharedPages) -> Result<Batch> {
    boxed(shared, 1, 64, |flat, address, _| {
        let mut bytes = [0; 64];
        let range = flat.find_in_one(address, bytes.len())?;
        black_box(&mut bytes).copy_from_slice(flat.bytes.get(range)?);
        Some(0)
    })
}

/// Returns the alignment of buffers of `len` bytes in the guest.
fn alignment(len: usize) -> usize {
    len.min(64)
}

pub fn read_slice(shared: &SharedPages, len: usize) -> Result<Batch> {
    let layout = Layout::apart(1);
    let flat = Flat::new(shared, layout)?;
    let addresses = layout.addresses(len, alignment(len));
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        host.with(len, |buffer| {
            timed(iterations, |number| {
                let buffer = black_box(&mut *buffer);
                let range = flat.find_in_one(black_box(addresses.at(number)), buffer.len())?;
                buffer.copy_from_slice(flat.bytes.get(range)?);
                Some(())
            })
        })
    }))
}

pub fn write_slice(shared: &SharedPages, len: usize) -> Result<Batch> {
    let layout = Layout::apart(1);
    let mut flat = Flat::new(shared, layout)?;
    let addresses = layout.addresses(len, alignment(len));
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        host.with(len, |buffer| {
            timed(iterations, |number| {
                let buffer = black_box(&*buffer);
                let range = flat.find_in_one(black_box(addresses.at(number)), buffer.len())?;
                flat.bytes.get_mut(range)?.copy_from_slice(buffer);
                Some(())
            })
        })
    }))
}

/// Two searches and two copies.
pub fn read_slice_cross(shared: &SharedPages, len: usize, regions: usize) -> Result<Batch> {
    let layout = Layout::adjacent(regions);
    let flat = Flat::new(shared, layout)?;
    let addresses = layout.crossings(len);
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        host.with(len, |buffer| {
            timed(iterations, |number| {
                let buffer = black_box(&mut *buffer);
                let address = black_box(addresses.at(number));
                let (first, second) = buffer.split_at_mut_checked(black_box(len / 2))?;
                first.copy_from_slice(flat.bytes.get(flat.find(address, first.len())?)?);
                let range = flat.find(address + first.len() as u64, second.len())?;
                second.copy_from_slice(flat.bytes.get(range)?);
                Some(())
            })
        })
    }))
}

pub fn copy_to<T: FromBytes + IntoBytes + Copy + Default + 'static, const N: usize>(
    shared: &SharedPages,
) -> Result<Batch> {
    let flat = Flat::new(shared, Layout::apart(1))?;
    let mut host = HostArray::<T, N>::boxed();
    Ok(Batch::of(move |_| {
        let from = black_box(flat.bytes.get(..N * size_of::<T>())?);
        black_box(host.values.as_mut_slice())
            .as_mut_bytes()
            .copy_from_slice(from);
        Some(())
    }))
}

pub fn copy_from<T: IntoBytes + Immutable + Copy + Default + 'static, const N: usize>(
    shared: &SharedPages,
) -> Result<Batch> {
    let mut flat = Flat::new(shared, Layout::apart(1))?;
    let host = HostArray::<T, N>::boxed();
    Ok(Batch::of(move |_| {
        let to = black_box(flat.bytes.get_mut(..N * size_of::<T>())?);
        to.copy_from_slice(black_box(host.values.as_slice()).as_bytes());
        Some(())
    }))
}

pub fn copy_to_volatile_slice(shared: &SharedPages, len: usize) -> Result<Batch> {
    let mut flat = Flat::new(shared, Layout::apart(1))?;
    Ok(Batch::of(move |_| {
        let (from, to) = flat.bytes.split_at_mut_checked(SECOND_SLICE)?;
        black_box(to.get_mut(..len)?).copy_from_slice(black_box(from.get(..len)?));
        Some(())
    }))
}

/// Copies with `memcpy`, for `--throughput`.
pub fn copy_bytes(shared: &SharedPages, len: usize, shift: Shift) -> Result<Batch> {
    let flat = Flat::new(shared, Layout::apart(1))?;
    let host = shared.host.clone();
    Ok(Batch::around(move |iterations| {
        host.with(shift.host + len, |buffer| {
            let buffer = buffer.get_mut(shift.host..).unwrap_or_default();
            timed(iterations, |_| {
                let from = black_box(flat.bytes.get(shift.guest..shift.guest + len)?);
                black_box(&mut *buffer).copy_from_slice(from);
                Some(())
            })
        })
    }))
}

/// Sets the clear bits, without synchronisation.
#[inline(always)]
fn mark(words: &mut [u64], offset: usize, len: usize) -> Option<()> {
    let first = offset / PAGE;
    let last = (offset + len - 1) / PAGE;
    let words = words.get_mut(first / 64..=last / 64)?;
    let (head, tail) = (u64::MAX << (first % 64), u64::MAX >> (63 - last % 64));
    let count = words.len();
    for (number, word) in words.iter_mut().enumerate() {
        let mut mask = u64::MAX;
        if number == 0 {
            mask &= head;
        }
        if number + 1 == count {
            mask &= tail;
        }
        // black_box prevents vectorisation, as atomics do.
        if black_box(*word) & mask != mask {
            *word |= mask;
        }
    }
    Some(())
}

pub fn mark_dirty(len: usize) -> Result<Batch> {
    let mut words = vec![u64::MAX; BITMAP_LEN / PAGE / 64];
    let offsets = pages_in(len);
    Ok(Batch::of(move |number| {
        mark(
            &mut words,
            black_box(offsets.at(number) as usize),
            black_box(len),
        )
    }))
}

pub fn dirty_at() -> Result<Batch> {
    let words = vec![u64::MAX; BITMAP_LEN / PAGE / 64];
    let offsets = pages_in(1);
    Ok(Batch::of(move |number| {
        let page = black_box(offsets.at(number) as usize) / PAGE;
        words
            .get(page / 64)
            .is_some_and(|word| word >> (page % 64) & 1 == 1)
    }))
}

/// Reads an existing pointer.
pub fn memory_guard() -> Result<Batch> {
    let memory = Box::new(0u64);
    Ok(Batch::of(move |_| {
        black_box(core::ptr::from_ref(&*memory));
    }))
}

pub fn iotlb_hit(mappings: Mappings) -> Result<Batch> {
    let table = mappings.table();
    let addresses = mappings.addresses(8);
    Ok(Batch::of(move |number| {
        table.lookup(black_box(addresses.at(number)))
    }))
}

pub fn iotlb_miss(mappings: Mappings) -> Result<Batch> {
    let table = mappings.table();
    let addresses = mappings.holes();
    Ok(Batch::of(move |number| {
        table.lookup(black_box(addresses.at(number))).is_none()
    }))
}

pub fn iommu_read_obj(shared: &SharedPages, mappings: Mappings) -> Result<Batch> {
    let table = mappings.table();
    let addresses = mappings.addresses(8);
    let flat = Flat::new(shared, Layout::apart(1))?;
    Ok(Batch::of(move |number| {
        let address = table.lookup(black_box(addresses.at(number)))?;
        flat.read::<u64>(address)
    }))
}

/// Performs the accesses of `add_used` on the flat array.
fn add_used_to(flat: &mut Flat, next: &mut u16, head: u16, len: u32) -> Option<()> {
    let element = ring::USED + 4 + 8 * u64::from(*next % ring::SIZE);
    flat.write([u32::from(head), len], element)?;
    *next = next.wrapping_add(1);
    flat.write(*next, ring::USED + 2)
}

pub fn add_used(shared: &SharedPages) -> Result<Batch> {
    let mut flat = Flat::new(shared, Layout::apart(1))?;
    let mut next = 0;
    Ok(Batch::of(move |number| {
        add_used_to(
            &mut flat,
            &mut next,
            black_box(number as u16 % ring::SIZE),
            black_box(4096),
        )
    }))
}

/// Fills a ring with available chains.
fn fill(flat: &mut Flat, descriptors: &[S16], per_chain: u16) -> Option<()> {
    for (number, descriptor) in descriptors.iter().enumerate() {
        flat.write(*descriptor, ring::DESCRIPTORS + 16 * number as u64)?;
    }
    let chains = descriptors.len() as u16 / per_chain;
    for chain in 0..chains {
        flat.write(
            chain * per_chain,
            ring::AVAILABLE + 4 + 2 * u64::from(chain),
        )?;
    }
    flat.write(chains, ring::AVAILABLE + 2)
}

/// Returns the head index and the first descriptor of a ring entry.
#[inline(always)]
fn take(flat: &Flat, entry: u64) -> Option<(u16, S16)> {
    let head: u16 = flat.read(ring::AVAILABLE + 4 + 2 * (entry % u64::from(ring::SIZE)))?;
    let descriptor = flat.read(ring::DESCRIPTORS + 16 * u64::from(head))?;
    Some((head, descriptor))
}

pub fn iter128x1(shared: &SharedPages) -> Result<Batch> {
    let mut flat = Flat::new(shared, Layout::apart(1))?;
    fill(&mut flat, &ring::singles(), 1).context("the ring does not fit")?;
    let batch = Batch::around(move |iterations| {
        Ok(timed(iterations, |_| {
            let available: u16 = black_box(flat.read(ring::AVAILABLE + 2)?);
            for entry in 0..u64::from(available) {
                black_box(take(&flat, entry)?);
            }
            Some(())
        }))
    });
    Ok(batch.per(ring::SINGLES))
}

pub fn blk4k(shared: &SharedPages) -> Result<Batch> {
    let mut flat = Flat::new(shared, Layout::apart(1))?;
    let host = shared.host.clone();
    let mut next = 0;
    fill(&mut flat, &blk::descriptors(), 3).context("the ring does not fit")?;
    let batch = Batch::around(move |iterations| {
        host.with(blk::DATA_LEN, |sectors| {
            timed(iterations, |_| {
                for request in 0..u64::from(blk::REQUESTS) {
                    let available: u16 = black_box(flat.read(ring::AVAILABLE + 2)?);
                    if request == u64::from(available) {
                        return None;
                    }
                    let (head, header) = take(&flat, request)?;
                    let data: S16 = flat.read(16 * u64::from(header.next))?;
                    let status: S16 = flat.read(16 * u64::from(data.next))?;
                    black_box(flat.read::<S16>(header.address)?);
                    let range = flat.find_in_one(data.address, blk::DATA_LEN)?;
                    flat.bytes
                        .get_mut(range)?
                        .copy_from_slice(black_box(&*sectors));
                    flat.write(0u8, status.address)?;
                    add_used_to(&mut flat, &mut next, head, blk::DATA_LEN as u32 + 1)?;
                }
                Some(())
            })
        })
    });
    Ok(batch.per(blk::REQUESTS))
}
