//! A third-party memory whose `get_slices` returns slices of any length, empty ones without end.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::*;

/// A third-party memory that returns slices of these lengths, and then `then` without end.
struct Odd {
    memory: Memory,
    lens: Vec<usize>,
    then: Option<usize>,
    /// The number of slices before the iterator panics.
    limit: AtomicUsize,
}

/// More slices than any range of these tests has bytes.
const ENDLESS: usize = 10_000;

impl Odd {
    fn new(lens: &[usize], then: Option<usize>) -> Self {
        Odd {
            memory: memory(&[(0, 0x1000)]),
            lens: lens.to_vec(),
            then,
            limit: AtomicUsize::new(ENDLESS),
        }
    }
}

impl GuestMemory for Odd {
    type PhysicalMemory = Memory;
    type Bitmap = AtomicBitmap;
    fn check_range(&self, _: GuestAddress, _: usize, _: Permissions) -> bool {
        true
    }
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        _: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>>> {
        Ok(OddSlices {
            odd: self,
            at: addr.0,
            number: 0,
        })
    }
    fn hold_translation(&self) -> Option<TranslationHold> {
        Some(TranslationHold::nothing())
    }
}

struct OddSlices<'a> {
    odd: &'a Odd,
    at: u64,
    number: usize,
}

impl<'a> Iterator for OddSlices<'a> {
    type Item = Result<VolatileSlice<'a, BS<'a, AtomicBitmap>>>;
    fn next(&mut self) -> Option<Self::Item> {
        assert!(
            self.number < self.odd.limit.load(Ordering::Relaxed),
            "too many slices"
        );
        let len = self.odd.lens.get(self.number).copied().or(self.odd.then)?;
        self.number += 1;
        let slice = self.odd.memory.get_slice(GuestAddress(self.at), len);
        self.at = (self.at + len as u64) % 0x800;
        Some(slice)
    }
}
impl core::iter::FusedIterator for OddSlices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>> for OddSlices<'a> {}

const AT: GuestAddress = GuestAddress(0x100);

/// Runs each access of 16 bytes, and returns how many bytes each moved or found.
fn accesses(odd: &Odd) -> Vec<(&'static str, usize)> {
    let (mut buf, source) = ([0; 16], [7; 64]);
    let full = |result: Result<()>| match result {
        Ok(()) => 16,
        Err(Error::PartialBuffer { completed, .. }) => completed,
        Err(error) => {
            assert_eq!(shown(error), shown(Error::InvalidBackendAddress));
            0
        }
    };
    let some = |result: Result<usize>| result.unwrap_or_else(|error| full(Err(error)));
    let runs = odd.host_runs(AT, 16, Permissions::Read).unwrap();
    let runs = runs.map_while(Result::ok).map(|run| run.len).sum();
    let all = odd.all_or_nothing();
    let mut sink = [0u8; 64];
    vec![
        ("write", some(odd.write(&[1; 16], AT))),
        ("read", some(odd.read(&mut buf, AT))),
        ("write_slice", full(odd.write_slice(&[1; 16], AT))),
        ("read_slice", full(odd.read_slice(&mut buf, AT))),
        ("read_obj", full(odd.read_obj::<u128>(AT).map(drop))),
        (
            "read_volatile_from",
            some(odd.read_volatile_from(AT, &mut &source[..], 16)),
        ),
        (
            "read_exact_volatile_from",
            full(odd.read_exact_volatile_from(AT, &mut &source[..], 16)),
        ),
        (
            "write_volatile_to",
            some(odd.write_volatile_to(AT, &mut &mut sink[..], 16)),
        ),
        (
            "write_all_volatile_to",
            full(odd.write_all_volatile_to(AT, &mut &mut sink[..], 16)),
        ),
        ("host_runs", runs),
        ("all_or_nothing", full(all.write_slice(&[1; 16], AT))),
        (
            "window",
            full(odd.window(AT, 16, Permissions::Read).map(drop)),
        ),
    ]
}

/// Asserts the result of each access. Some need all of their range.
fn assert_moves(odd: &Odd, expected: usize) {
    for (access, moved) in accesses(odd) {
        let needs_all = matches!(access, "all_or_nothing" | "window");
        let expected = if needs_all && expected < 16 {
            0
        } else {
            expected
        };
        assert_eq!(moved, expected, "{access} over {:?}", odd.lens);
    }
}

#[test]
fn accesses_over_empty_slices_without_end_return_error() {
    for (lens, expected) in [(&[][..], 0), (&[8], 8), (&[4, 4], 8), (&[16], 16)] {
        assert_moves(&Odd::new(lens, Some(0)), expected);
    }
    // A finite number of empty slices is also an error, as in the buffer accesses of 0.18.0.
    assert_moves(&Odd::new(&[0, 16], None), 0);
    assert_moves(&Odd::new(&[8, 0, 8], None), 8);
}

#[test]
fn accesses_over_slices_longer_than_range_move_its_bytes_only() {
    for lens in [&[16][..], &[32], &[8, 16], &[8, 8]] {
        let odd = Odd::new(lens, Some(8));
        assert_moves(&odd, 16);
        let after = odd.memory.read_obj::<u64>(GuestAddress(0x110)).unwrap();
        assert_eq!(after, 0, "{lens:?}");
    }
    assert_moves(&Odd::new(&[4], None), 4);
}

#[test]
#[cfg(all(unix, feature = "rawfd"))]
fn vectored_transfers_over_odd_slices_move_range_only() {
    use crate::vectored::{io_vectors, read_exact_from_at, read_from_at, IoBuffer};
    use std::io::Write as _;

    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 64]).unwrap();
    for (lens, then, expected) in [
        (&[][..], Some(0), 0),
        (&[8], Some(0), 8),
        (&[8, 0, 8], None, 8),
        (&[4], None, 4),
        (&[16], Some(0), 16),
        (&[32], None, 16),
        (&[8, 8], Some(8), 16),
    ] {
        let odd = std::sync::Arc::new(Odd::new(lens, then));
        let moved = read_from_at(&*odd, AT, 16, &file, 0).unwrap_or(0);
        assert_eq!(moved, expected, "{lens:?}");
        let is_whole = expected == 16;
        let exact = read_exact_from_at(&*odd, AT, 16, &file, 0);
        assert_eq!(exact.is_ok(), is_whole, "{lens:?}");
        let vectors = io_vectors(&*odd, AT, 16, Permissions::Write);
        assert_eq!(
            vectors.map_or(0, |vectors| vectors.len()),
            expected / 16 * 16
        );
        let mut buffer = IoBuffer::new(std::sync::Arc::clone(&odd), Permissions::Write);
        assert_eq!(buffer.push(AT, 16).is_ok(), is_whole, "{lens:?}");
        assert_eq!(buffer.len(), expected / 16 * 16, "{lens:?}");
    }
}

#[test]
fn refresh_of_window_with_panicking_memory_releases_it() {
    let odd = Odd::new(&[8, 8], None);
    let mut window = odd.window(AT, 16, Permissions::ReadWrite).unwrap();
    odd.limit.store(1, Ordering::Relaxed);
    assert!(catch_unwind(AssertUnwindSafe(|| window.refresh())).is_err());
    assert!(!window.is_current());
    assert!(window.slices().next().is_none());
    assert!(window.write(&[1], 0).is_err());
    odd.limit.store(ENDLESS, Ordering::Relaxed);
    window.refresh().unwrap();
    assert!(window.is_current());
}
