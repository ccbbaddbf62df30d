//! The target `access`: see `vm_memory_fuzz::access`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_memory_fuzz::access::run(data));

#[cfg(not(fuzzing))]
fn main() {
    eprintln!("This is a target for libFuzzer: cargo fuzz run access");
}
