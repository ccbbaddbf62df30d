//! One set of tests for every set of kernels: the ones in use, the ones that other processors would use, and the portable ones beside them.

use super::*;
use core::sync::atomic::Ordering;

#[macro_use]
mod bulk;
#[macro_use]
mod single;
#[macro_use]
mod faults;
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[macro_use]
mod order;
/// Where there is no order to be seen.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
macro_rules! order_tests {
    () => {};
}

/// Longest copy that is tried at every alignment.
const MAX_LEN: usize = if cfg!(miri) { 40 } else { 300 };

/// Fills a buffer so that a byte tells where it came from.
fn numbered(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ 0x5a).collect()
}

/// Every alignment to 64.
fn alignments() -> impl Iterator<Item = usize> {
    (0..64).step_by(if cfg!(miri) { 21 } else { 1 })
}

/// Bytes whose alignment is known.
#[repr(C, align(64))]
struct Aligned<const LEN: usize>([u8; LEN]);

/// Sets of tests, each of one set of kernels.
macro_rules! kernel_tests {
    ($($name:ident: $kernel:path, $($tests:ident),*;)*) => {
        $(
            mod $name {
                use super::*;
                use $kernel as kernel;

                $($tests!();)*
            }
        )*
    };
}

kernel_tests! {
    chosen: super::super::kernel, bulk_tests, order_tests, single_tests, fault_tests;
}
#[cfg(all(not(miri), not(vm_memory_portable)))]
kernel_tests! {
    portable_beside: super::super::portable, bulk_tests, order_tests, single_tests;
}
// Single accesses are the same on every x86_64 processor.
#[cfg(all(
    target_arch = "x86_64",
    target_pointer_width = "64",
    unix,
    not(target_vendor = "apple"),
    not(miri),
    not(vm_memory_portable)
))]
kernel_tests! {
    sse: super::super::kernel::choice::sse, bulk_tests, order_tests, fault_tests;
    avx: super::super::kernel::choice::avx, bulk_tests, order_tests, fault_tests;
    avx512: super::super::kernel::choice::avx512, bulk_tests, order_tests, fault_tests;
    rep: super::super::kernel::choice::rep, bulk_tests, order_tests, fault_tests;
    streaming: super::super::kernel::choice::streaming, bulk_tests, order_tests, fault_tests;
}

/// Pages of memory between some that nothing may touch.
#[cfg(all(
    target_os = "linux",
    not(miri),
    any(feature = "rawfd", feature = "backend-mmap")
))]
struct FencedPages {
    base: *mut u8,
    /// Of the memory, and of either fence, in bytes.
    len: usize,
}

#[cfg(all(
    target_os = "linux",
    not(miri),
    any(feature = "rawfd", feature = "backend-mmap")
))]
impl FencedPages {
    fn one() -> Self {
        Self::new(1)
    }

    fn new(pages: usize) -> Self {
        let len = test_support::page_size() * pages;
        // SAFETY: a new mapping, wherever the kernel puts it.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                3 * len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        let base = base.cast::<u8>();
        // SAFETY: the middle of the mapping just made.
        let answer = unsafe {
            libc::mprotect(
                base.add(len).cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        assert_eq!(answer, 0);
        Self { base, len }
    }

    fn start(&self) -> *mut u8 {
        self.base.wrapping_add(self.len)
    }

    fn end(&self) -> *mut u8 {
        self.start().wrapping_add(self.len)
    }
}

#[cfg(all(
    target_os = "linux",
    not(miri),
    any(feature = "rawfd", feature = "backend-mmap")
))]
impl Drop for FencedPages {
    fn drop(&mut self) {
        // SAFETY: the whole of the mapping that `new` made, which nothing refers to any more.
        unsafe { libc::munmap(self.base.cast(), 3 * self.len) };
    }
}

#[test]
fn values_of_every_size_survive_a_round_trip() {
    fn check<T: ByteValued + PartialEq + core::fmt::Debug>(value: T) {
        let mut memory = [0u8; 64];
        for at in 0..16 {
            let ptr = memory[at..].as_mut_ptr();
            // SAFETY: at least 48 bytes lie behind `ptr`, and no value here is larger.
            unsafe {
                write_value(ptr, &value).unwrap();
                assert_eq!(
                    *read_value(&mut MaybeUninit::<T>::uninit(), ptr).unwrap(),
                    value
                );
            }
        }
    }
    check([(); 0].map(|()| 0u8));
    check(0xa1u8);
    check(0xa1a2u16);
    check([1u8, 2, 3]);
    check(0xa1a2_a3a4u32);
    check(0xa1a2_a3a4_a5a6_a7a8u64);
    check(u128::MAX / 7);
    check([0x1234_5678u32; 12]);
}

#[test]
#[should_panic(expected = "a load cannot have the ordering Release")]
fn a_load_with_release_panics() {
    let value = 0u32;
    // SAFETY: a local variable of that type.
    let _ = unsafe { load_ordered::<u32>(core::ptr::from_ref(&value).cast(), Ordering::Release) };
}

#[test]
#[should_panic(expected = "a store cannot have the ordering Acquire")]
fn a_store_with_acquire_panics() {
    let mut value = 0u32;
    // SAFETY: a local variable of that type.
    let _ = unsafe {
        store_ordered::<u32>(core::ptr::from_mut(&mut value).cast(), 1, Ordering::Acquire)
    };
}

/// A user's own atomic, larger than any register: moved through its own methods.
#[test]
fn an_atomic_of_an_unusual_size_goes_through_its_own_methods() {
    use crate::atomic_integer::AtomicInteger;
    use core::sync::atomic::AtomicU32;

    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(C)]
    struct Pair(u32, u32, u32);
    // SAFETY: three integers of four bytes, without padding.
    unsafe impl ByteValued for Pair {}
    #[repr(C)]
    struct AtomicPair(AtomicU32, AtomicU32, AtomicU32);
    // SAFETY: consists of atomic integers only.
    unsafe impl AtomicInteger for AtomicPair {
        type V = Pair;
        fn new(v: Pair) -> Self {
            Self(v.0.into(), v.1.into(), v.2.into())
        }
        fn load(&self, order: Ordering) -> Pair {
            Pair(self.0.load(order), self.1.load(order), self.2.load(order))
        }
        fn store(&self, v: Pair, order: Ordering) {
            self.0.store(v.0, order);
            self.1.store(v.1, order);
            self.2.store(v.2, order);
        }
    }
    impl AtomicAccess for Pair {
        type A = AtomicPair;
    }
    let mut memory = [0u32; 3];
    let ptr = memory.as_mut_ptr().cast::<u8>();
    // SAFETY: 12 bytes, aligned to 4, that only these calls access.
    unsafe {
        store_ordered(ptr, Pair(1, 2, 3), Ordering::SeqCst).unwrap();
        assert_eq!(
            load_ordered::<Pair>(ptr, Ordering::Acquire).unwrap(),
            Pair(1, 2, 3)
        );
    }
}
