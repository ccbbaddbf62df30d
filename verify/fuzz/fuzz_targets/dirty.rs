//! The target `dirty`: see `vm_memory_fuzz::dirty`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_memory_fuzz::dirty::run(data));

#[cfg(not(fuzzing))]
fn main() {
    eprintln!("This is a target for libFuzzer: cargo fuzz run dirty");
}
