//! [`ReservedArena`]: reserved addresses in which files are mapped and unmapped later.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr::{null, null_mut};

use windows_sys::Win32::System::Memory::{
    CreateFileMappingW, VirtualFree, MEM_PRESERVE_PLACEHOLDER, MEM_RELEASE,
    MEM_REPLACE_PLACEHOLDER, PAGE_READONLY, PAGE_READWRITE,
};
use windows_sys::Win32::System::SystemServices::MEM_COALESCE_PLACEHOLDERS;

use super::memory::{count_still_mapped, Placement};
use super::placeholders::{pointer, Placeholders};
use super::{check, invalid, page_size, this_process};
use crate::sys::{end_of_pages, page_size_u64, to_u64};

/// Whether a mapping in an arena stays until all of it is unmapped.
///
/// A view fills a placeholder, and becomes one again as a whole. To replace it, the system would
/// unmap it first, and a guest would find a hole meanwhile.
pub(crate) const MAPPINGS_ARE_WHOLE: bool = true;

/// Reserved addresses between two guards. They are inaccessible, except where a file is mapped.
///
/// ```text
///   base      base + start
///   ├ a guard ┤ placeholders and views of files ├ a guard ┤
/// ```
///
/// A guard is at least a page of a placeholder.
///
/// Invariants:
///
/// - The addresses belong to this object alone while it exists. None of them is ever free: a view
///   replaces a placeholder in one system call, and becomes a placeholder in one.
/// - `parts` are the placeholders and views that the system has there. They are disjoint, and
///   together all addresses. A method changes them only after the system call for it has succeeded.
#[derive(Debug)]
pub(crate) struct ReservedArena {
    functions: Placeholders,
    base: usize,
    start: usize,
    len: usize,
    /// By their offset from `base`.
    parts: BTreeMap<usize, Part>,
}

/// A placeholder, or a view of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// The offset of its end from the base.
    end: usize,
    is_view: bool,
}

impl ReservedArena {
    /// Reserves `len` bytes, aligned to `align`, a power of two. Fails unless both are whole pages.
    pub(crate) fn new(len: usize, align: usize) -> Result<Self> {
        let (rest, node) = (0, None);
        let place = Placement { align, rest, node };
        let all = place.len_with_guards(len)?;
        let functions = Placeholders::find()?;
        let base = functions.reserve(all)?;
        let reserved = Part {
            end: all,
            is_view: false,
        };
        Ok(Self {
            functions,
            base,
            start: place.offset_from(base),
            len,
            parts: BTreeMap::from([(0, reserved)]),
        })
    }

    pub(crate) fn host_address(&self) -> usize {
        self.base.wrapping_add(self.start)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns a range as offsets from the base, after checking that it is inside the arena.
    ///
    /// It consists of whole pages, and is not empty.
    fn range(&self, offset: usize, len: usize) -> Result<(usize, usize)> {
        let end = end_of_pages(offset, len, self.len).ok_or_else(invalid)?;
        // Does not overflow: `start + self.len` is inside the addresses.
        Ok((
            self.start.saturating_add(offset),
            self.start.saturating_add(end),
        ))
    }

    /// Maps a part of a file over a range where nothing is mapped, shared.
    ///
    /// `page` is the [page size](page_size_of) of the file. Fails, and maps nothing, if a part of
    /// the range is mapped.
    pub(crate) fn map(
        &mut self,
        offset: usize,
        len: usize,
        file: &File,
        page: usize,
        file_offset: u64,
        writable: bool,
    ) -> Result<()> {
        let (start, end) = self.range(offset, len)?;
        if !file_offset.is_multiple_of(to_u64(page).max(page_size_u64())) {
            return Err(invalid());
        }
        // Before the section: a file that grows meanwhile has all bytes of the view.
        let view_len = view_len(file, file_offset, len)?;
        let protection = if writable {
            PAGE_READWRITE
        } else {
            PAGE_READONLY
        };
        let section = section_of(file, protection)?;
        let (gap_start, gap_end) = self.isolate(start, end)?;
        let addr = pointer(self.base.wrapping_add(start));
        let (handle, process, how) = (
            section.as_raw_handle(),
            this_process(),
            MEM_REPLACE_PLACEHOLDER,
        );
        // SAFETY: the handle is that of a section, which `section` owns. `isolate` has made the
        // range a placeholder of this object, and `&mut self` excludes a change since. The call
        // replaces it, or fails: it replaces no other memory, and a placeholder has no bytes. There
        // are no parameters, and their count is 0.
        let view = unsafe {
            (self.functions.map_view)(
                handle,
                process,
                addr,
                file_offset,
                view_len,
                how,
                protection,
                null_mut(),
                0,
            )
        };
        if view.is_null() {
            let refused = Error::last_os_error();
            // If the system refuses this as well, the next change of the gap does it.
            let _ = self.join(gap_start, gap_end);
            return Err(refused);
        }
        let is_view = true;
        self.parts.insert(start, Part { end, is_view });
        Ok(())
    }

    /// Makes a range inaccessible again, and unmaps the files there.
    ///
    /// Fails, and unmaps nothing, if the range has a part of a mapping but not all of it. If the
    /// system refuses to unmap a file, those before it in the range are unmapped.
    pub(crate) fn unmap(&mut self, offset: usize, len: usize) -> Result<()> {
        let (start, end) = self.range(offset, len)?;
        let views: Vec<_> = self
            .overlapping(start, end)
            .filter(|(_, part)| part.is_view)
            .collect();
        if views.iter().any(|(at, part)| *at < start || part.end > end) {
            return Err(invalid());
        }
        for (at, part) in views.into_iter().rev() {
            self.unmap_view(at, MEM_PRESERVE_PLACEHOLDER)?;
            let is_view = false;
            self.parts.insert(at, Part { is_view, ..part });
        }
        self.join(start, end).map(|_| ())
    }

    /// Unmaps the view at an offset. `how` is the state of its addresses afterwards: a placeholder,
    /// or 0 for free, which only `drop` may pass.
    fn unmap_view(&self, at: usize, how: u32) -> Result<()> {
        let addr = pointer(self.base.wrapping_add(at));
        // SAFETY: the address belongs to this object (its first invariant). The callers pass the
        // start of a part that is a view, so `map` has mapped it and nothing has unmapped it (the
        // second invariant). No code of this crate accesses the range. With a placeholder, another
        // access raises an access violation. Free addresses are no longer those of an arena.
        check(unsafe { (self.functions.unmap_view)(this_process(), addr, how) })
    }

    /// Returns the parts that are partly or wholly in a range, in descending order.
    fn overlapping(&self, start: usize, end: usize) -> impl Iterator<Item = (usize, Part)> + '_ {
        let before_end = self.parts.range(..end).rev();
        before_end
            .map(|(at, part)| (*at, *part))
            .take_while(move |(_, part)| part.end > start)
    }

    /// Makes all placeholders that are partly or wholly in a range one, and returns its range.
    ///
    /// Fails if a view is there.
    fn join(&mut self, start: usize, end: usize) -> Result<(usize, usize)> {
        let parts: Vec<_> = self.overlapping(start, end).collect();
        let (Some((first, _)), Some((_, last))) = (parts.last(), parts.first()) else {
            return Err(invalid());
        };
        let (first, last_end) = (*first, last.end);
        if parts.iter().any(|(_, part)| part.is_view) {
            return Err(invalid());
        }
        if parts.len() > 1 {
            self.free(first, last_end, MEM_COALESCE_PLACEHOLDERS)?;
            for (at, _) in parts {
                self.parts.remove(&at);
            }
            self.put_placeholder(first, last_end);
        }
        Ok((first, last_end))
    }

    /// Makes a range a placeholder of its own, and returns the range of the one that had it.
    ///
    /// Fails if a view is there.
    fn isolate(&mut self, start: usize, end: usize) -> Result<(usize, usize)> {
        let (first, last) = self.join(start, end)?;
        if (first, last) != (start, end) {
            self.free(start, end, MEM_PRESERVE_PLACEHOLDER)?;
            self.put_placeholder(first, start);
            self.put_placeholder(start, end);
            self.put_placeholder(end, last);
        }
        Ok((first, last))
    }

    /// Records a placeholder, unless it is empty.
    fn put_placeholder(&mut self, start: usize, end: usize) {
        let is_view = false;
        if start < end {
            self.parts.insert(start, Part { end, is_view });
        }
    }

    /// Splits the placeholder that has a range, or joins those that a range consists of.
    fn free(&self, start: usize, end: usize, how: u32) -> Result<()> {
        let addr = pointer(self.base.wrapping_add(start)).cast_mut();
        let len = end.saturating_sub(start);
        // SAFETY: the range is inside the addresses of this object, and its parts are placeholders:
        // `join` and `isolate` have checked both. A placeholder has no bytes. Its addresses stay
        // reserved with either flag.
        check(unsafe { VirtualFree(addr, len, MEM_RELEASE | how) })
    }
}

impl Drop for ReservedArena {
    fn drop(&mut self) {
        for (at, part) in &self.parts {
            let released = if part.is_view {
                self.unmap_view(*at, 0)
            } else {
                let addr = pointer(self.base.wrapping_add(*at)).cast_mut();
                // SAFETY: a placeholder of this object begins here (invariant of `ReservedArena`).
                // Nothing else releases it, and this loop does it once: the parts are disjoint.
                check(unsafe { VirtualFree(addr, 0, MEM_RELEASE) })
            };
            if released.is_err() {
                count_still_mapped(part.end.saturating_sub(*at));
            }
        }
    }
}

/// Returns the page size of a file, which is that of ordinary pages. A view has no large pages.
pub(crate) fn page_size_of(_file: &File) -> Result<usize> {
    Ok(page_size())
}

/// Returns the number of bytes of a file that `len` bytes from `offset` can show.
///
/// It is less than `len` only if the file ends inside the last page. The system rounds it up to
/// whole pages, as `ZwMapViewOfSection` documents. Fails if the file ends before this page, so it
/// is never 0.
fn view_len(file: &File, offset: u64, len: usize) -> Result<usize> {
    let end = offset.checked_add(to_u64(len)).ok_or_else(invalid)?;
    // Fails for a handle that is not that of a file, which would create a section without one.
    let (file_len, page) = (file.metadata()?.len(), page_size_u64());
    if file_len.div_ceil(page) < end.div_ceil(page) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the file ends at {file_len:#x}, before the end of the mapping at {end:#x}; \
                extend the file or map fewer bytes"
            ),
        ));
    }
    usize::try_from(end.min(file_len).saturating_sub(offset)).map_err(|_| invalid())
}

/// Creates a section of a whole file, which views can be mapped of.
///
/// A section with a length of its own would extend a file that is shorter. A view keeps the section
/// alive.
fn section_of(file: &File, protection: u32) -> Result<OwnedHandle> {
    // SAFETY: the handle is that of an open file, as `file` is borrowed. The other pointers are
    // null, which stands for the default security and no name.
    let section =
        unsafe { CreateFileMappingW(file.as_raw_handle(), null(), protection, 0, 0, null()) };
    if section.is_null() {
        return Err(Error::last_os_error());
    }
    // SAFETY: the call has created this handle, and nothing else has it.
    Ok(unsafe { OwnedHandle::from_raw_handle(section) })
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use test_support::{skipped, temp_file_of_len};
    use windows_sys::Win32::Foundation::HANDLE;

    use super::*;

    const PAGES: usize = 16;

    /// Reserves pages, or reports a skip if the system has no placeholders.
    fn arena(test: &str) -> Option<ReservedArena> {
        match ReservedArena::new(PAGES * page_size(), 2 << 20) {
            Ok(arena) => Some(arena),
            Err(error) => {
                skipped(test, error);
                None
            }
        }
    }

    /// Maps pages of a file from its start, or unmaps them.
    fn change(
        arena: &mut ReservedArena,
        at: usize,
        pages: usize,
        file: Option<&File>,
    ) -> Result<()> {
        let page = page_size();
        let (offset, len) = (at * page, pages * page);
        match file {
            Some(file) => arena.map(offset, len, file, page, 0, true),
            None => arena.unmap(offset, len),
        }
    }

    unsafe extern "system" fn map_nothing(
        _: HANDLE,
        _: HANDLE,
        _: *const c_void,
        _: u64,
        _: usize,
        _: u32,
        _: u32,
        _: *mut c_void,
        _: u32,
    ) -> *mut c_void {
        null_mut()
    }

    unsafe extern "system" fn unmap_nothing(_: HANDLE, _: *const c_void, _: u32) -> i32 {
        0
    }

    /// The address whose view `unmap_others` does not unmap.
    static REFUSED: AtomicUsize = AtomicUsize::new(0);

    unsafe extern "system" fn unmap_others(process: HANDLE, at: *const c_void, how: u32) -> i32 {
        if at.addr() == REFUSED.load(Ordering::Relaxed) {
            return 0;
        }
        let functions = Placeholders::find().unwrap();
        // SAFETY: the caller passes the arguments of `UnmapViewOfFile2`.
        unsafe { (functions.unmap_view)(process, at, how) }
    }

    #[test]
    fn map_that_the_system_refuses_leaves_one_placeholder_between_views() {
        let test = "map_that_the_system_refuses_leaves_one_placeholder_between_views";
        let Some(mut arena) = arena(test) else {
            return;
        };
        let file = temp_file_of_len(1 << 20);
        change(&mut arena, 0, 1, Some(&file)).unwrap();
        let before = arena.parts.clone();
        // The guard before the arena, the view, and the other addresses.
        assert_eq!(before.len(), 3);
        let map_view = arena.functions.map_view;
        for at in 1..PAGES {
            arena.functions.map_view = map_nothing;
            assert!(change(&mut arena, at, 1, Some(&file)).is_err());
            assert_eq!(arena.parts, before, "{at}");
        }
        arena.functions.map_view = map_view;
        change(&mut arena, 1, PAGES - 1, Some(&file)).unwrap();
    }

    #[test]
    fn unmap_that_the_system_refuses_keeps_the_view_until_the_next_one() {
        let test = "unmap_that_the_system_refuses_keeps_the_view_until_the_next_one";
        let Some(mut arena) = arena(test) else {
            return;
        };
        let file = temp_file_of_len(1 << 20);
        change(&mut arena, 2, 3, Some(&file)).unwrap();
        change(&mut arena, 5, 1, Some(&file)).unwrap();
        let before = arena.parts.clone();
        let unmap_view = arena.functions.unmap_view;
        arena.functions.unmap_view = unmap_nothing;
        assert!(change(&mut arena, 0, PAGES, None).is_err());
        assert_eq!(arena.parts, before);
        arena.functions.unmap_view = unmap_view;
        // A call that fails changes nothing: one that cuts a view, and one over a view.
        assert!(change(&mut arena, 0, 3, None).is_err());
        assert!(change(&mut arena, 4, 1, Some(&file)).is_err());
        assert_eq!(arena.parts, before);
        change(&mut arena, 0, PAGES, None).unwrap();
        assert_eq!(arena.parts.len(), 1);
    }

    #[test]
    fn unmap_that_the_system_refuses_leaves_the_views_before_it_unmapped() {
        let test = "unmap_that_the_system_refuses_leaves_the_views_before_it_unmapped";
        let Some(mut arena) = arena(test) else {
            return;
        };
        let file = temp_file_of_len(1 << 20);
        for at in [1, 4, 8] {
            change(&mut arena, at, 2, Some(&file)).unwrap();
        }
        REFUSED.store(arena.host_address() + 4 * page_size(), Ordering::Relaxed);
        let unmap_view = std::mem::replace(&mut arena.functions.unmap_view, unmap_others);
        assert!(change(&mut arena, 0, PAGES, None).is_err());
        let views = arena.parts.iter().filter(|(_, part)| part.is_view);
        let views: Vec<_> = views
            .map(|(at, _)| (at - arena.start) / page_size())
            .collect();
        assert_eq!(views, [4, 8]);
        arena.functions.unmap_view = unmap_view;
        change(&mut arena, 0, PAGES, None).unwrap();
        assert_eq!(arena.parts.len(), 1);
    }
}
