//! Integers with a fixed byte order, for structures that a guest and its devices share.
//!
//! The structures of virtio 1.2 (section 1.4) are little endian on every machine. A field of type
//! [`Le32`] holds the bytes that the guest sees. To get the integer, convert it explicitly.
//!
//! # Examples
//!
//! ```
//! use vm_memory::{Be16, ByteValued, Le32};
//!
//! let length = Le32::from(0x0102_0304u32);
//! assert_eq!(length.as_slice(), &[4, 3, 2, 1]);
//! assert_eq!(length.to_native(), 0x0102_0304);
//! assert_eq!(length, 0x0102_0304u32);
//! assert_eq!(Be16::from(0x0102).as_slice(), &[1, 2]);
//! ```

use crate::value::ByteValued;

macro_rules! endian_type {
    ($name:ident, $native:ident, $to:ident, $from:ident, $order:literal) => {
        #[doc = concat!("A `", stringify!($native), "` that is stored in ", $order, "-endian order.")]
        ///
        /// See the [module](self) for an example.
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        #[repr(transparent)]
        pub struct $name($native);

        impl $name {
            /// Returns the value as an integer of the host.
            pub fn to_native(self) -> $native {
                $native::$from(self.0)
            }
        }

        // SAFETY: `repr(transparent)` around an integer: no padding, and every bit pattern is
        // valid.
        unsafe impl ByteValued for $name {}

        impl PartialEq<$native> for $name {
            fn eq(&self, other: &$native) -> bool {
                self.to_native() == *other
            }
        }

        impl PartialEq<$name> for $native {
            fn eq(&self, other: &$name) -> bool {
                *self == other.to_native()
            }
        }

        impl From<$native> for $name {
            fn from(value: $native) -> Self {
                Self(value.$to())
            }
        }

        impl From<$name> for $native {
            fn from(value: $name) -> Self {
                value.to_native()
            }
        }
    };
}

endian_type!(Le16, u16, to_le, from_le, "little");
endian_type!(Le32, u32, to_le, from_le, "little");
endian_type!(Le64, u64, to_le, from_le, "little");
endian_type!(LeSize, usize, to_le, from_le, "little");
endian_type!(Be16, u16, to_be, from_be, "big");
endian_type!(Be32, u32, to_be, from_be, "big");
endian_type!(Be64, u64, to_be, from_be, "big");
endian_type!(BeSize, usize, to_be, from_be, "big");

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! layout_test {
        ($test:ident, $name:ident, $native:ident, $bytes:ident) => {
            #[test]
            fn $test() {
                for value in [0, 1, $native::MAX / 3, $native::MAX - 1, $native::MAX] {
                    let stored = $name::from(value);
                    assert_eq!(stored.as_slice(), value.$bytes());
                    assert_eq!(stored.to_native(), value);
                    assert_eq!($native::from(stored), value);
                    assert!(stored == value && value == stored);
                    assert!(stored != value.wrapping_add(1) && value.wrapping_add(1) != stored);
                }
                assert_eq!(size_of::<$name>(), size_of::<$native>());
                assert_eq!(align_of::<$name>(), align_of::<$native>());
            }
        };
    }

    layout_test!(
        le16_is_stored_in_little_endian_order,
        Le16,
        u16,
        to_le_bytes
    );
    layout_test!(
        le32_is_stored_in_little_endian_order,
        Le32,
        u32,
        to_le_bytes
    );
    layout_test!(
        le64_is_stored_in_little_endian_order,
        Le64,
        u64,
        to_le_bytes
    );
    layout_test!(
        le_size_is_stored_in_little_endian_order,
        LeSize,
        usize,
        to_le_bytes
    );
    layout_test!(be16_is_stored_in_big_endian_order, Be16, u16, to_be_bytes);
    layout_test!(be32_is_stored_in_big_endian_order, Be32, u32, to_be_bytes);
    layout_test!(be64_is_stored_in_big_endian_order, Be64, u64, to_be_bytes);
    layout_test!(
        be_size_is_stored_in_big_endian_order,
        BeSize,
        usize,
        to_be_bytes
    );
}
