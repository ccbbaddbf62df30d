//! A used ring of a virtqueue, and single values, in a window; and the ring through raw pointers.

use std::hint::black_box;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::Arc;

use anyhow::{Context, Result};
use memmap2::MmapMut;
use ours::bitmap::NewBitmap;
use ours::guest_memory::Window;
use ours::{
    ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap, Permissions,
};

use crate::comparison::Batch;
use crate::layout::Layout;
use crate::ours_side::kinds::memory;
use crate::shared_pages::SharedPages;
use crate::workload_shapes::ring;

/// The size of the used ring in bytes.
const RING_LEN: usize = 6 + 8 * ring::SIZE as usize;

/// A used ring in a window.
struct UsedRing<M: GuestMemory + 'static> {
    window: Window<'static, M>,
    next: u32,
}

impl<M: GuestMemory> UsedRing<M> {
    #[inline(always)]
    fn add(&mut self, head: u16, len: u32) -> ours::GuestMemoryResult<()> {
        let element = 4 + 8 * (self.next as usize % usize::from(ring::SIZE));
        self.window.write_obj([u32::from(head), len], element)?;
        self.next = self.next.wrapping_add(1);
        self.window.store(self.next as u16, 2, Ordering::Release)
    }
}

fn used<B: NewBitmap + 'static>(shared: &SharedPages) -> Result<UsedRing<GuestMemoryMmap<B>>> {
    let memory = Arc::new(memory::<B>(shared, Layout::apart(1))?);
    let addr = GuestAddress(ring::USED);
    let window = Window::from_arc(memory, addr, RING_LEN, Permissions::ReadWrite)?;
    Ok(UsedRing { window, next: 0 })
}

pub fn add_used<B: NewBitmap + 'static>(shared: &SharedPages) -> Result<Batch> {
    let mut used = used::<B>(shared)?;
    Ok(Batch::of(move |number| {
        used.add(black_box(number as u16 % ring::SIZE), black_box(4096))
    }))
}

/// Adds used elements in a closure that the loop cannot inline.
pub fn add_used_boxed<B: NewBitmap + 'static>(shared: &SharedPages) -> Result<Batch> {
    let mut used = used::<B>(shared)?;
    let add: Box<dyn FnMut(u64) -> bool> = black_box(Box::new(move |number| {
        used.add(number as u16 % ring::SIZE, 4096).is_ok()
    }));
    Ok(Batch::of(add))
}

/// The size in bytes of the windows for single values. They contain the addresses of the workloads.
const VALUES_LEN: usize = 16 << 10;

fn values(shared: &SharedPages) -> Result<Window<'static, GuestMemoryMmap>> {
    let memory = Arc::new(memory::<()>(shared, Layout::apart(1))?);
    let window = Window::from_arc(memory, GuestAddress(0), VALUES_LEN, Permissions::ReadWrite);
    Ok(window?)
}

pub fn read_obj<T: ByteValued>(shared: &SharedPages) -> Result<Batch> {
    let window = values(shared)?;
    let offsets = Layout::apart(1).addresses(size_of::<T>(), size_of::<T>());
    Ok(Batch::of(move |number| {
        window.read_obj::<T>(black_box(offsets.at(number) as usize))
    }))
}

pub fn write_obj<T: ByteValued + Default>(shared: &SharedPages) -> Result<Batch> {
    let window = values(shared)?;
    let offsets = Layout::apart(1).addresses(size_of::<T>(), size_of::<T>());
    Ok(Batch::of(move |number| {
        window.write_obj(
            black_box(T::default()),
            black_box(offsets.at(number) as usize),
        )
    }))
}

/// A used ring of a device that the loop cannot inline.
trait Queue {
    fn add(&mut self, head: u16, len: u32) -> bool;
}

impl<M: GuestMemory> Queue for UsedRing<M> {
    fn add(&mut self, head: u16, len: u32) -> bool {
        UsedRing::add(self, head, len).is_ok()
    }
}

pub fn add_used_device<B: NewBitmap + 'static>(shared: &SharedPages) -> Result<Batch> {
    let mut queue: Box<dyn Queue> = black_box(Box::new(used::<B>(shared)?));
    Ok(Batch::of(move |number| {
        queue.add(number as u16 % ring::SIZE, 4096)
    }))
}

/// A used ring behind a raw pointer.
struct RawRing {
    used: *mut u8,
    next: u32,
    /// Keeps the ring mapped.
    _memory: MmapMut,
}

impl RawRing {
    fn new() -> Result<Self> {
        let mut memory = MmapMut::map_anon(RING_LEN).context("cannot map the ring")?;
        Ok(Self {
            used: memory.as_mut_ptr(),
            next: 0,
            _memory: memory,
        })
    }

    #[inline(always)]
    #[expect(
        unsafe_code,
        clippy::disallowed_methods,
        reason = "the limit is an access through a raw pointer"
    )]
    fn add(&mut self, head: u16, len: u32) -> bool {
        let element = 4 + 8 * (self.next as usize % usize::from(ring::SIZE));
        let element = self.used.wrapping_add(element).cast::<[u32; 2]>();
        // SAFETY: the element ends at most at `RING_LEN`, in memory that `_memory` keeps mapped. It
        // is aligned: the ring begins at a page. No reference to the memory exists.
        unsafe { element.write_volatile([u32::from(head), len]) };
        self.next = self.next.wrapping_add(1);
        // SAFETY: bytes 2 and 3 are in memory that `_memory` keeps mapped, and aligned. The
        // reference ends in this statement, and nothing else accesses these bytes meanwhile.
        let index = unsafe { AtomicU16::from_ptr(self.used.wrapping_add(2).cast()) };
        index.store(self.next as u16, Ordering::Release);
        true
    }
}

impl Queue for RawRing {
    fn add(&mut self, head: u16, len: u32) -> bool {
        RawRing::add(self, head, len)
    }
}

pub fn add_used_raw() -> Result<Batch> {
    let mut ring = RawRing::new()?;
    Ok(Batch::of(move |number| {
        ring.add(black_box(number as u16 % ring::SIZE), black_box(4096))
    }))
}

pub fn add_used_raw_boxed() -> Result<Batch> {
    let mut raw = RawRing::new()?;
    let add: Box<dyn FnMut(u64) -> bool> = black_box(Box::new(move |number| {
        raw.add(number as u16 % ring::SIZE, 4096)
    }));
    Ok(Batch::of(add))
}

pub fn add_used_raw_device() -> Result<Batch> {
    let mut queue: Box<dyn Queue> = black_box(Box::new(RawRing::new()?));
    Ok(Batch::of(move |number| {
        queue.add(number as u16 % ring::SIZE, 4096)
    }))
}

/// Asks a window of a map that can be replaced whether it is current.
pub fn is_current(shared: &SharedPages) -> Result<Batch> {
    let memory = GuestMemoryAtomic::new(memory::<()>(shared, Layout::apart(4))?);
    let window = memory.window(GuestAddress(0), 64, Permissions::Read)?;
    Ok(Batch::of(move |_| black_box(&window).is_current()))
}
