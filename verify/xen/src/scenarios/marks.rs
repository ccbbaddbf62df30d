//! The order of a write and its dirty mark: a page is marked after its bytes were written.
//!
//! A harvest between a mark and its bytes would clear the mark, and the bytes would be lost.

use std::fmt::{self, Debug, Formatter};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{
    Bytes, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, Permissions,
    VolatileMemory, VolatileSlice,
};

use super::setup::{
    advance, grant_address, grant_run, lazy_flags, memory, range, seen, silent, FIRST,
};
use super::Scenario;
use crate::double::memory::memfd;
use crate::environment::{Access, Environment, PAGE};
use crate::outcome::Outcome;

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        marks_of_mapped_accesses_come_after_the_bytes,
        marks_of_copies_come_after_the_bytes,
        marks_of_windows_come_after_the_bytes,
    ],
];

/// The number of pages of the region.
const SIZE: usize = 2;

/// A bitmap that, at each mark, reads the marked bytes through a second mapping.
#[derive(Default)]
struct Witness {
    mapping: Mutex<Option<GuestMemoryMmap>>,
    /// The offset of each mark, and the bytes that were there.
    marks: Mutex<Vec<(usize, Vec<u8>)>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Debug for Witness {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Witness").finish_non_exhaustive()
    }
}

impl<'a> WithBitmapSlice<'a> for Witness {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Witness {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let mut bytes = vec![0; len];
        if let Some(mapping) = &*locked(&self.mapping) {
            let read = mapping.read_slice(&mut bytes, grant_address(FIRST, offset));
            read.expect("a mark is in the region");
        }
        locked(&self.marks).push((offset, bytes));
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        !locked(&self.marks).is_empty()
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for Witness {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

/// Returns zeroed memory whose marks are observed.
fn observed(env: &mut dyn Environment, grant_copy: bool) -> Outcome<GuestMemoryMmap<Witness>> {
    grant_run(env, FIRST, SIZE, Access::ReadWrite);
    env.write(0, 0, &[0; SIZE * PAGE]);
    let device = env.gntdev()?;
    let at = grant_address(FIRST, 0);
    let mut lazy = range(&device, at, SIZE * PAGE, lazy_flags(), env.domain())?;
    lazy.set_grant_copy(grant_copy);
    let observed: GuestMemoryMmap<Witness> = memory(lazy, at)?;
    let mapped = range(&device, at, SIZE * PAGE, advance(), env.domain())?;
    let region = observed.find_region(at).expect("the region is there");
    *locked(&region.bitmap().bitmap().mapping) = Some(memory(mapped, at)?);
    Ok(observed)
}

/// Checks that an access has marked pages, and that it wrote the bytes before each mark.
fn check(env: &dyn Environment, memory: &GuestMemoryMmap<Witness>, what: &str) {
    let region = memory.find_region(grant_address(FIRST, 0));
    let region = region.expect("the region is there");
    let marks = std::mem::take(&mut *locked(&region.bitmap().bitmap().marks));
    assert!(!marks.is_empty(), "{what} marks nothing");
    for (offset, bytes) in marks {
        let now = seen(env, 0, offset, bytes.len());
        assert!(now == bytes, "{what} marks {offset:#x} before the bytes");
    }
}

fn marks_of_mapped_accesses_come_after_the_bytes(env: &mut dyn Environment) -> Outcome {
    let memory = observed(env, false)?;
    let at = |offset| grant_address(FIRST, offset);
    memory.write_slice(&[1; 100], at(PAGE - 50))?;
    check(env, &memory, "write_slice");
    memory.write_obj(0x0202_0202u32, at(8))?;
    check(env, &memory, "write_obj");
    memory.store(0x0303_0303u32, at(8), Ordering::SeqCst)?;
    check(env, &memory, "store");
    let source = memfd("source")?;
    source.write_all_at(&[4; 100], 0)?;
    memory.read_exact_volatile_from(at(PAGE - 20), &mut &source, 100)?;
    check(env, &memory, "read_exact_volatile_from");
    let slice = GuestMemoryBackend::get_slice(&memory, at(PAGE - 64), 128)?;
    silent(env, || slice.copy_from(&[0x0505_0505u32; 32]))?;
    check(env, &memory, "copy_from");
    let mut local = [6; 128];
    let plain = VolatileSlice::from(local.as_mut_slice());
    silent(env, || plain.copy_to_volatile_slice(slice))?;
    check(env, &memory, "copy_to_volatile_slice");
    slice.fill_with_byte(7)?;
    check(env, &memory, "fill_with_byte");
    let value = slice.get_ref::<u64>(8)?;
    silent(env, || value.store(0x0808_0808_0808_0808))?;
    check(env, &memory, "store of a reference");
    Ok(())
}

fn marks_of_copies_come_after_the_bytes(env: &mut dyn Environment) -> Outcome {
    let memory = observed(env, true)?;
    memory.write_slice(&[1; 100], grant_address(FIRST, PAGE - 50))?;
    check(env, &memory, "write_slice");
    memory.write_obj(0x0202_0202u32, grant_address(FIRST, 7))?;
    check(env, &memory, "write_obj");
    Ok(())
}

fn marks_of_windows_come_after_the_bytes(env: &mut dyn Environment) -> Outcome {
    let memory = observed(env, false)?;
    let window = memory.window(grant_address(FIRST, 0), SIZE * PAGE, Permissions::Write)?;
    window.write_slice(&[1; 100], PAGE - 50)?;
    check(env, &memory, "write_slice");
    window.write_obj(0x0202_0202u32, 8)?;
    check(env, &memory, "write_obj");
    window.store(0x0303_0303u32, 8, Ordering::SeqCst)?;
    check(env, &memory, "store");
    Ok(())
}
