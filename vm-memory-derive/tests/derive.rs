//! Structs that derive `ByteValued`. The examples of the macro test structs that it refuses.

// The macro works in a program that forbids unsafe code.
#![forbid(unsafe_code)]

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// Named fields, one of them a plain value of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, ByteValued)]
struct Request {
    kind: Le32,
    priority: [Le16; 2],
    header: Header,
}

#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, ByteValued)]
struct Header(Le64);

/// A layout without padding by `packed`, and one whose alignment adds none.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Default, ByteValued)]
struct Packed {
    status: u16,
    sector: u64,
}

#[repr(C, align(8))]
#[derive(Clone, Copy, Default, ByteValued)]
struct Aligned(u32, u32);

#[repr(C)]
#[derive(Clone, Copy, ByteValued)]
struct Empty;

/// Names of the user beside the struct, which the derived code must not mean.
mod beside_other_names {
    #![expect(
        dead_code,
        non_camel_case_types,
        non_upper_case_globals,
        reason = "names that the derived code may use"
    )]

    const value: u32 = 1;
    static field0: u32 = 1;
    type usize = u8;

    #[repr(C)]
    #[derive(Clone, Copy, vm_memory::ByteValued)]
    pub(super) struct Named {
        pub(super) field: u32,
    }
}

#[test]
fn derived_struct_beside_other_names_is_a_plain_value() {
    let named = beside_other_names::Named { field: 7 };
    assert_eq!(named.as_slice(), 7u32.to_ne_bytes());
}

#[test]
fn derived_struct_of_values_has_their_bytes() {
    let request = Request {
        kind: 1.into(),
        priority: [2.into(), 3.into()],
        header: Header(4.into()),
    };
    assert_eq!(
        request.as_slice(),
        [1, 0, 0, 0, 2, 0, 3, 0, 4, 0, 0, 0, 0, 0, 0, 0]
    );
    // Its bytes are aligned for it.
    let again = Request::from_slice(request.as_slice()).copied();
    assert_eq!(again, Some(request));
}

#[test]
fn derived_struct_with_packed_or_aligned_fields_has_their_sizes() {
    assert_eq!(Packed::zeroed().as_slice().len(), 10);
    assert_eq!(Aligned::zeroed().as_slice().len(), 8);
    assert!(Empty.as_slice().is_empty());
}
