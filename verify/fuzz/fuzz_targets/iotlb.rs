//! The target `iotlb`: see `vm_memory_fuzz::iotlb`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_memory_fuzz::iotlb::run(data));

#[cfg(not(fuzzing))]
fn main() {
    eprintln!("This is a target for libFuzzer: cargo fuzz run iotlb");
}
