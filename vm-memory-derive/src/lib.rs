//! `#[derive(ByteValued)]` for structs that are copied to and from guest memory.
//!
//! Use it through the feature `derive` of `vm-memory`. `vm_memory::ByteValued` is then the trait
//! and the derive macro.

#![deny(
    missing_docs,
    missing_debug_implementations,
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use proc_macro2::{Span, TokenStream};
use quote::quote;
use syn::{parse_macro_input, Attribute, Data, DeriveInput, Error, Ident};

/// The code in README.md, compiled and run as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Implements `ByteValued` for a struct, if the compiler can prove its contract.
///
/// The struct needs `#[repr(C)]` or `#[repr(transparent)]`, which may be combined with `packed` and
/// `align`. The derived code does not compile if
///
/// - a field is not a `ByteValued`, such as a `bool`, an enum, a pointer or an atomic integer, or
/// - there is padding: the size of the struct is not the sum of the sizes of its fields.
///
/// The struct must also be `Copy`, `Send` and `Sync`, as the trait requires. Enums, unions and
/// structs with generic parameters are refused. So is the type of a field that contains
/// statements, such as `[u8; { let n = 3; n }]`: use a constant.
///
/// # Examples
///
/// ```
/// use vm_memory::{ByteValued, Le16, Le32, Le64};
///
/// /// A descriptor of a split virtqueue (virtio 1.2, section 2.7.5).
/// #[repr(C)]
/// #[derive(Clone, Copy, Default, ByteValued)]
/// struct Descriptor {
///     addr: Le64,
///     len: Le32,
///     flags: Le16,
///     next: Le16,
/// }
///
/// let descriptor = Descriptor { len: 512.into(), ..Default::default() };
/// assert_eq!(descriptor.as_slice()[8..12], [0, 2, 0, 0]);
/// ```
///
/// A struct with padding is an error: a device would copy uninitialised bytes to the guest.
///
/// ```compile_fail,E0080
/// use vm_memory::ByteValued;
///
/// #[repr(C)]
/// #[derive(Clone, Copy, ByteValued)]
/// struct Padded {
///     status: u8,
///     len: u32,
/// }
/// ```
///
/// A field for which some bytes are invalid is also an error, since the guest chooses the bytes:
///
/// ```compile_fail,E0277
/// use vm_memory::ByteValued;
///
/// #[repr(C)]
/// #[derive(Clone, Copy, ByteValued)]
/// struct Flags {
///     enabled: bool,
/// }
/// ```
///
/// Names in the types of the fields mean the same as in the struct:
///
/// ```compile_fail,E0080
/// use vm_memory::ByteValued;
///
/// const fn plain_size_of<T>() -> usize {
///     3
/// }
///
/// #[repr(C)]
/// #[derive(Clone, Copy, ByteValued)]
/// struct Padded {
///     status: [u8; plain_size_of::<u32>()],
///     len: u32,
/// }
/// ```
///
/// Without `repr(C)`, the compiler chooses the order of the fields:
///
/// ```compile_fail
/// use vm_memory::ByteValued;
///
/// #[derive(Clone, Copy, ByteValued)]
/// struct AnyOrder {
///     len: u32,
///     id: u32,
/// }
/// ```
#[proc_macro_derive(ByteValued)]
pub fn derive_byte_valued(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    implement(&input)
        .unwrap_or_else(|error| error.to_compile_error())
        .into()
}

fn implement(input: &DeriveInput) -> Result<TokenStream, Error> {
    let name = &input.ident;
    let refuse = |reason| Err(Error::new_spanned(name, reason));
    let Data::Struct(data) = &input.data else {
        return refuse("`ByteValued` can be derived for structs only");
    };
    if !input.generics.params.is_empty() {
        return refuse("`ByteValued` cannot be derived for a struct with generic parameters");
    }
    if !has_defined_layout(&input.attrs)? {
        return refuse("`ByteValued` needs `#[repr(C)]` or `#[repr(transparent)]`");
    }
    let types: Vec<_> = data.fields.iter().map(|field| &field.ty).collect();
    let members = data.fields.members();
    // A pattern means a constant or a static of its name, if the user has one.
    let local = |name| Ident::new(&format!("__vm_memory_{name}"), Span::mixed_site());
    let value = local("value".to_owned());
    let values: Vec<_> = (0..types.len())
        .map(|number| local(format!("field{number}")))
        .collect();
    // Types of fields may contain expressions, so nothing is defined beside them. The function
    // compiles only if these are the types of all fields, even if an attribute changes the struct.
    Ok(quote! {
        const _: () = ::vm_memory::bytes::assert_no_padding::<#name>(
            &[#(::vm_memory::bytes::plain_size_of::<#types>()),*],
        );
        const _: fn(#name) -> (usize, #(#types,)*) = |#value| {
            let #name { #(#members: #values),* } = #value;
            (0, #(#values,)*)
        };

        // SAFETY: `plain_size_of` requires that each field is a `ByteValued`: it has no invalid bit
        // pattern, no padding, no pointer and no interior mutability. The struct adds only padding,
        // and `assert_no_padding` shows that the sizes of the fields add up.
        #[automatically_derived]
        unsafe impl ::vm_memory::ByteValued for #name {}
    })
}

/// Returns whether a `repr` attribute fixes the order of the fields.
fn has_defined_layout(attributes: &[Attribute]) -> Result<bool, Error> {
    let mut defined = false;
    for attribute in attributes.iter().filter(|it| it.path().is_ident("repr")) {
        attribute.parse_nested_meta(|option| {
            defined |= option.path.is_ident("C") || option.path.is_ident("transparent");
            // `align(8)` and `packed(2)` have an argument.
            if option.input.peek(syn::token::Paren) {
                let argument;
                syn::parenthesized!(argument in option.input);
                argument.parse::<syn::LitInt>()?;
            }
            Ok(())
        })?;
    }
    Ok(defined)
}
