//! A copy of elements counts the bytes before an inaccessible page, also inside an element.

use super::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::fault::{self, Direction};
use vm_memory::{ByteValued, Bytes, VolatileMemory};

/// The number of elements of each copy. Some of them are on the inaccessible page.
const ELEMENTS: usize = 100;

/// Returns elements whose bytes are numbered.
fn elements<T: ByteValued>() -> Vec<T> {
    let bytes: Vec<u8> = (0..ELEMENTS * size_of::<T>())
        .map(|i| (i % 251) as u8 + 1)
        .collect();
    let parts = bytes.chunks_exact(size_of::<T>());
    parts
        .map(|part| T::read_exact_from(part).unwrap())
        .collect()
}

fn bytes_of<T: ByteValued>(elements: &[T]) -> Vec<u8> {
    elements
        .iter()
        .flat_map(|e| e.as_slice().to_vec())
        .collect()
}

/// Copies arrays that begin `inside` bytes before an inaccessible page, in both directions.
fn check_array<T: ByteValued + PartialEq + core::fmt::Debug>(inside: usize) {
    let (memory, file) = shared(2);
    file.set_len(PAGE as u64).unwrap();
    let region = memory.find_region(BASE).unwrap();
    let all = memory.get_slice(BASE, 2 * PAGE).unwrap();
    let at = PAGE - inside;
    let array = all.get_array_ref::<T>(at, ELEMENTS).unwrap();
    let slice = all.subslice(at, ELEMENTS * size_of::<T>()).unwrap();
    let source = elements::<T>();
    let whole = inside / size_of::<T>();
    let case = (size_of::<T>(), inside);
    let expect = |direction| {
        let fault = fault::last().unwrap();
        assert_eq!(
            (fault.direction, fault.completed),
            (direction, inside),
            "{case:?}"
        );
        let edge = all.ptr_guard().as_ptr().addr() + PAGE;
        assert_eq!(fault.host_address, edge, "{case:?}");
    };

    for by_array in [true, false] {
        all.subslice(0, PAGE).unwrap().fill_with_byte(0).unwrap();
        region.bitmap().reset();
        if by_array {
            array.copy_from(&source)
        } else {
            slice.copy_from(&source)
        }
        expect(Direction::Write);
        let mut page = vec![0; PAGE];
        memory.read_slice(&mut page, BASE).unwrap();
        assert_eq!(page[at..], bytes_of(&source)[..inside], "{case:?}");
        assert!(page[..at].iter().all(|byte| *byte == 0), "{case:?}");
        assert!(region.bitmap().dirty_at(at), "{case:?}");

        let mut buf = vec![T::zeroed(); ELEMENTS];
        let copied = if by_array {
            array.copy_to(&mut buf)
        } else {
            slice.copy_to(&mut buf)
        };
        expect(Direction::Read);
        assert_eq!(copied, whole, "{case:?}");
        assert_eq!(buf[..whole], source[..whole], "{case:?}");
        assert_eq!(bytes_of(&buf)[..inside], page[at..], "{case:?}");
    }
}

#[test]
fn array_copy_at_inaccessible_page_counts_bytes_in_both_directions() {
    fault::install().unwrap();
    for inside in (0..70).chain([95, 96, 97, 99]) {
        check_array::<u8>(inside);
        check_array::<u16>(inside);
        check_array::<u32>(inside);
        check_array::<u64>(inside);
        check_array::<u128>(inside);
        check_array::<[u8; 3]>(inside);
        check_array::<[u32; 3]>(inside);
    }
}

/// Copies an array to another slice. The copy faults at the destination, then at the source.
#[test]
fn array_copy_to_volatile_slice_at_inaccessible_page_counts_bytes() {
    fault::install().unwrap();
    let ((memory, _file), (other, file)) = (shared(2), shared(2));
    file.set_len(PAGE as u64).unwrap();
    for inside in [1, 7, 63, 100] {
        let good = memory.get_slice(BASE, 2 * PAGE).unwrap();
        let bad = other.get_slice(BASE, 2 * PAGE).unwrap();
        let bad = bad.subslice(PAGE - inside, 60 * 8).unwrap();
        let (from, to) = (
            good.get_array_ref::<u64>(8, 60).unwrap(),
            bad.get_array_ref::<u64>(0, 60).unwrap(),
        );
        from.copy_from(&elements::<u64>()[..60]);
        from.copy_to_volatile_slice(to.to_slice());
        let fault = fault::last().unwrap();
        assert_eq!(
            (fault.direction, fault.completed),
            (Direction::Write, inside)
        );
        let mut moved = vec![0; inside];
        bad.read_slice(&mut moved, 0).unwrap();
        assert_eq!(moved, bytes_of(&elements::<u64>())[..inside]);
        to.copy_to_volatile_slice(good.subslice(PAGE, 60 * 8).unwrap());
        let fault = fault::last().unwrap();
        assert_eq!(
            (fault.direction, fault.completed),
            (Direction::Read, inside)
        );
        good.read_slice(&mut moved, PAGE).unwrap();
        assert_eq!(moved, bytes_of(&elements::<u64>())[..inside]);
    }
}
