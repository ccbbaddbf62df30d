//! Faults in the kernels of copies and fills, by whichever kernels the module calls `kernel`. What is made of them is tested in `tests/`.

macro_rules! fault_tests {
    () => {
        /// Wherever a copy or a fill meets a page that is not there, and in whichever part of a kernel, it ends, and says where.
        #[test]
        #[cfg(all(
            target_os = "linux",
            any(target_arch = "x86_64", target_arch = "aarch64"),
            not(miri),
            not(vm_memory_portable),
            any(feature = "rawfd", feature = "backend-mmap")
        ))]
        fn a_page_that_is_gone_ends_a_copy() {
            crate::fault::install().unwrap();
            let memory = FencedPages::new(16);
            let mut host = vec![0x3cu8; 40_000];
            let host = host.as_mut_ptr();
            for len in (1..=MAX_LEN).chain([1000, 5000, 17_000, 40_000]) {
                for there in (0..len).step_by(len / 4 + 1) {
                    // The last bytes that are there, or the first.
                    for guest in [
                        memory.end().wrapping_sub(there),
                        memory.start().wrapping_sub(len - there),
                    ] {
                        let met = |answer: Result<(), _>| {
                            let at: usize = core::num::NonZeroUsize::get(answer.unwrap_err());
                            assert!((guest.addr()..guest.addr() + len).contains(&at));
                            assert!(!(memory.start().addr()..memory.end().addr()).contains(&at));
                        };
                        // SAFETY: some bytes of the guest operand are not there, which the handler answers for; `host` has as many, and is none of it.
                        unsafe {
                            met(kernel::copy_from_guest(host, guest, len));
                            met(kernel::copy_to_guest(guest, host, len));
                            met(kernel::copy_within_guest(host, guest, len));
                            met(kernel::copy_within_guest(guest, host, len));
                            met(kernel::copy_from_guest_ascending(host, guest, len));
                            met(kernel::copy_to_guest_ascending(guest, host, len));
                            met(kernel::fill_guest(guest, 1, len));
                            met(kernel::fill_guest_ascending(guest, 1, len));
                        }
                        for size in [2, 4, 8] {
                            if guest.addr() % size == 0 && len % size == 0 {
                                // SAFETY: as above, and the guest operand is aligned to `size`.
                                unsafe {
                                    met(kernel::copy_elements_from_guest(
                                        host,
                                        guest,
                                        len / size,
                                        size,
                                    ));
                                    met(kernel::copy_elements_to_guest(
                                        guest,
                                        host,
                                        len / size,
                                        size,
                                    ));
                                }
                            }
                        }
                    }
                }
            }
        }
    };
}
