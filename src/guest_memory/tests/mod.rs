//! Access by guest address: streams, errors, and memories of other crates. `verify/fuzz` and
//! `verify/differential` compare random accesses with models.
#![cfg(feature = "backend-bitmap")]

mod odd_slices;
#[expect(unsafe_code, reason = "makes slices of memory on the heap")]
mod owners;
mod required_methods;

use super::*;
use crate::bitmap::AtomicBitmap;
use crate::bytes::Bytes;
use crate::io::ReadVolatile;
use crate::volatile_memory::Error as VolatileError;
use crate::GuestMemoryMmap;

type Memory = GuestMemoryMmap<AtomicBitmap>;

const EIO: i32 = libc::EIO;

/// Creates regions at these addresses.
fn memory(places: &[(u64, usize)]) -> Memory {
    let ranges = places
        .iter()
        .map(|&(start, len)| (GuestAddress(start), len));
    Memory::from_ranges(&Vec::from_iter(ranges)).unwrap()
}

fn shown(value: impl core::fmt::Debug) -> String {
    format!("{value:?}")
}

fn system_error(number: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(number)
}

#[test]
fn read_volatile_from_with_excessive_count_counts_segment_length() {
    struct Excessive(usize);
    impl ReadVolatile for Excessive {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buf: &mut VolatileSlice<B>,
        ) -> std::result::Result<usize, VolatileError> {
            self.0 += 1;
            buf.copy_from(&[self.0 as u8; 8]);
            Ok(usize::MAX)
        }
    }
    let memory = memory(&[(0, 8), (8, 8)]);
    assert_eq!(
        memory
            .read_volatile_from(GuestAddress(4), &mut Excessive(0), 8)
            .unwrap(),
        8
    );
    memory
        .read_exact_volatile_from(GuestAddress(0), &mut Excessive(4), 16)
        .unwrap();
    assert_eq!(
        memory.read_obj::<[u8; 16]>(GuestAddress(0)).unwrap(),
        [[5; 8], [6; 8]].concat()[..]
    );
}

#[test]
fn stream_reads_from_advancing_source_count_all_bytes() {
    /// Reads up to three bytes, and advances the slice past them. Each read is interrupted once.
    struct Advancing(u8);
    impl ReadVolatile for Advancing {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buf: &mut VolatileSlice<B>,
        ) -> std::result::Result<usize, VolatileError> {
            self.0 += 1;
            if self.0 % 2 == 1 {
                *buf = buf.offset(1)?;
                return Err(VolatileError::IOError(
                    std::io::ErrorKind::Interrupted.into(),
                ));
            }
            let count = buf.len().min(3);
            buf.copy_from(&[self.0 / 2; 3][..count]);
            *buf = buf.offset(count)?;
            Ok(count)
        }
    }
    let memory = memory(&[(0, 8), (8, 8)]);
    let (start, source) = (GuestAddress(2), &mut Advancing(0));
    memory.read_exact_volatile_from(start, source, 9).unwrap();
    let counted = memory.read_volatile_from(GuestAddress(12), source, 4);
    assert_eq!(counted.unwrap(), 3);
    assert_eq!(
        memory.read_obj::<[u8; 16]>(GuestAddress(0)).unwrap(),
        [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 4, 4, 4, 0]
    );
}

#[test]
fn error_from_volatile_memory_error_keeps_details() {
    let of = |error: VolatileError| shown(Error::from(error));
    let (addr, base, offset, size) = (1, 2, 3, 4);
    let (nelements, alignment, expected, completed) = (5, 6, 7, 8);
    assert_eq!(
        of(VolatileError::OutOfBounds { addr }),
        "InvalidBackendAddress"
    );
    assert_eq!(
        of(VolatileError::Overflow { base, offset }),
        "InvalidBackendAddress"
    );
    assert_eq!(
        of(VolatileError::TooBig { nelements, size }),
        "InvalidBackendAddress"
    );
    assert_eq!(
        of(VolatileError::Misaligned { addr, alignment }),
        "InvalidBackendAddress"
    );
    let partial = shown(Error::PartialBuffer {
        expected,
        completed,
    });
    assert_eq!(
        of(VolatileError::PartialBuffer {
            expected,
            completed
        }),
        partial
    );
    let system = Error::from(VolatileError::IOError(system_error(EIO)));
    assert!(matches!(system, Error::IOError(e) if e.raw_os_error() == Some(EIO)));
}
