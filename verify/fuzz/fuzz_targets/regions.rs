//! The target `regions`: see `vm_memory_fuzz::regions`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_memory_fuzz::regions::run(data));

#[cfg(not(fuzzing))]
fn main() {
    eprintln!("This is a target for libFuzzer: cargo fuzz run regions");
}
