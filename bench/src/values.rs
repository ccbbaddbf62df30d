//! Structures that are read and written as one value.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A structure of 16 bytes, like a descriptor of a virtqueue.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct S16 {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A structure of 64 bytes.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct S64 {
    pub words: [u64; 8],
}

macro_rules! byte_valued {
    ($($name:ty),*) => {
        $(
            // SAFETY: zerocopy's derives of `FromBytes` and `IntoBytes` prove that every bit
            // pattern is a value, and that there is no padding.
            #[expect(unsafe_code, reason = "`ByteValued` is an unsafe trait")]
            unsafe impl ours::ByteValued for $name {}

            // SAFETY: zerocopy's derives of `FromBytes` and `IntoBytes` prove that every bit
            // pattern is a value, and that there is no padding.
            #[expect(unsafe_code, reason = "`ByteValued` is an unsafe trait")]
            unsafe impl reference::ByteValued for $name {}
        )*
    };
}

byte_valued!(S16, S64);

/// A value whose `sum` uses every field.
pub trait Words: ours::ByteValued + reference::ByteValued + 'static {
    fn from_word(word: u64) -> Self;
    fn sum(&self) -> u64;
}

impl Words for u16 {
    #[inline(always)]
    fn from_word(word: u64) -> Self {
        word as u16
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        u64::from(*self)
    }
}

impl Words for u64 {
    #[inline(always)]
    fn from_word(word: u64) -> Self {
        word
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        *self
    }
}

impl Words for S16 {
    #[inline(always)]
    fn from_word(word: u64) -> Self {
        S16 {
            address: word,
            len: 1,
            flags: 2,
            next: 3,
        }
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        self.address
            .wrapping_add(u64::from(self.len))
            .wrapping_add(u64::from(self.flags))
            .wrapping_add(u64::from(self.next))
    }
}

impl Words for S64 {
    #[inline(always)]
    fn from_word(word: u64) -> Self {
        S64 { words: [word; 8] }
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        self.words
            .iter()
            .fold(0, |sum, word| sum.wrapping_add(*word))
    }
}

/// A host array at the same offset in its page for all sides:
/// [`HOST_OFFSET`](crate::shared_pages::HOST_OFFSET).
#[repr(C, align(4096))]
pub struct HostArray<T, const N: usize> {
    before: [u8; crate::shared_pages::HOST_OFFSET],
    pub values: [T; N],
}

impl<T: Copy + Default, const N: usize> HostArray<T, N> {
    pub fn boxed() -> Box<Self> {
        Box::new(Self {
            before: [0; crate::shared_pages::HOST_OFFSET],
            values: [T::default(); N],
        })
    }
}
