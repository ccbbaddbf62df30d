//! Each kind of access at an inaccessible page returns an error, or moves nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use vm_memory::{fault, AtomicAccess, ByteValued, Bytes, VolatileMemory, VolatileMemoryError};

#[test]
fn access_of_each_kind_at_inaccessible_page_returns_efault() {
    fault::install().unwrap();
    let (memory, file) = shared(4);
    file.set_len(2 * PAGE as u64).unwrap();
    let gone = GuestAddress(BASE.0 + 2 * PAGE as u64);
    let mut buf = [0u8; 64];
    let io = |result: Result<(), GuestMemoryError>| assert!(is_efault(&result.unwrap_err()));

    io(memory.read_obj::<u8>(gone).map(drop));
    io(memory.read_obj::<u16>(gone).map(drop));
    io(memory.read_obj::<u32>(gone).map(drop));
    io(memory.read_obj::<u64>(gone).map(drop));
    io(memory.read_obj::<[u8; 13]>(gone).map(drop));
    io(memory.write_obj(1u8, gone));
    io(memory.write_obj(1u64, gone));
    io(memory.write_obj([1u8; 100], gone));
    io(memory.load::<u32>(gone, Ordering::Acquire).map(drop));
    io(memory.store(1u32, gone, Ordering::SeqCst));
    io(memory.store(1u16, gone, Ordering::Relaxed));
    io(memory.read_slice(&mut buf, gone));
    io(memory.write_slice(&buf, gone));
    io(memory.read(&mut buf, gone).map(drop));
    io(memory.write(&buf, gone).map(drop));
    io(memory
        .write_volatile_to(gone, &mut Vec::new(), 64)
        .map(drop));
    io(memory
        .write_volatile_to(gone, &mut &mut [0u8; 64][..], 64)
        .map(drop));
    io(memory
        .read_volatile_from(gone, &mut &[0u8; 64][..], 64)
        .map(drop));
    let zero = File::open("/dev/zero").unwrap();
    io(memory.read_volatile_from(gone, &mut &zero, 64).map(drop));

    let slice = memory.get_slice(gone, 64).unwrap();
    let fails = |result: Result<(), VolatileMemoryError>| {
        let Err(VolatileMemoryError::IOError(error)) = result else {
            panic!("{result:?}");
        };
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    };
    let order = Ordering::SeqCst;
    fails(slice.fill_with_byte(1));
    fails(slice.atomic_swap(1u8, 0, order).map(drop));
    fails(slice.atomic_fetch_add(1u16, 0, order).map(drop));
    fails(slice.atomic_fetch_and(1u32, 0, order).map(drop));
    fails(slice.atomic_fetch_or(1u64, 0, order).map(drop));
    fails(
        slice
            .atomic_compare_exchange(0u8, 1, 0, order, order)
            .map(drop),
    );
    fails(
        slice
            .atomic_compare_exchange(0u64, 1, 0, order, order)
            .map(drop),
    );
    assert_eq!(slice.get_ref::<u32>(0).unwrap().load(), 0);
    slice.get_ref::<u32>(0).unwrap().store(1);
    assert_eq!(slice.copy_to(&mut [0u32; 4]), 0);
    slice.copy_from(&[1u16; 8]);
    let mut host = [7u8; 64];
    slice.copy_to_volatile_slice(host.as_mut_slice().into());
    assert_eq!(host, [7; 64]);
    assert!(matches!(
        slice.read_obj::<u64>(0),
        Err(VolatileMemoryError::IOError(_))
    ));

    // Other pages are intact, and the page is accessible again after the file grows.
    memory.write_obj(5u64, BASE).unwrap();
    file.set_len(4 * PAGE as u64).unwrap();
    assert_eq!(memory.read_obj::<u64>(gone).unwrap(), 0);
    assert_eq!(memory.read_obj::<u64>(BASE).unwrap(), 5);
}

/// A value of a user, whose atomic integer is larger than the value.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Narrow(u16);
// SAFETY: the field is a plain value.
unsafe impl ByteValued for Narrow {}

impl From<u64> for Narrow {
    fn from(value: u64) -> Self {
        Narrow(value as u16)
    }
}

impl From<Narrow> for u64 {
    fn from(value: Narrow) -> Self {
        value.0.into()
    }
}

impl AtomicAccess for Narrow {
    type A = AtomicU64;
}

#[test]
fn load_of_type_with_larger_atomic_at_inaccessible_page_returns_error() {
    fault::install().unwrap();
    let (memory, file) = shared(2);
    file.set_len(0).unwrap();
    let order = Ordering::SeqCst;
    for page in [0, 1] {
        let at = GuestAddress(BASE.0 + page * PAGE as u64);
        let refused = |result: Result<(), GuestMemoryError>| {
            assert!(matches!(
                result,
                Err(GuestMemoryError::InvalidBackendAddress)
            ));
        };
        refused(memory.load::<Narrow>(at, order).map(drop));
        refused(memory.store(Narrow(1), at, order));
        let slice = memory.get_slice(at, 64).unwrap();
        let too_big = |result: Result<(), VolatileMemoryError>| {
            assert!(matches!(
                result,
                Err(VolatileMemoryError::TooBig {
                    nelements: 1,
                    size: 8
                })
            ));
        };
        too_big(slice.load::<Narrow>(0, order).map(drop));
        too_big(slice.store(Narrow(1), 0, order));
        too_big(slice.atomic_swap(Narrow(1), 0, order).map(drop));
    }
}
