//! Every file of the corpora through its target, without libFuzzer: what a fuzzer found once is a test from then on.

use std::fs;
use std::path::Path;

use vm_memory_fuzz::TARGETS;

#[test]
fn the_corpora_run_clean() {
    for (name, run) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(name);
        let mut count = 0;
        for entry in fs::read_dir(&folder).expect("the corpus is checked in") {
            let path = entry.expect("the folder can be read").path();
            let data = fs::read(&path).expect("the file can be read");
            // On failure, the last name printed is the input's.
            println!("{}", path.display());
            run(&data);
            count += 1;
        }
        assert!((1..50).contains(&count), "{name}: {count} files");
    }
}

/// Bytes that are in no corpus: nothing, all the same, and a sequence that is the same each time.
#[test]
fn other_bytes_run_clean() {
    for (_, run) in TARGETS {
        run(&[]);
        for byte in [0, 1, 0x7f, 0x80, 0xff] {
            run(&[byte; 300]);
        }
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for round in 0..300 {
            let bytes: Vec<u8> = (0..round * 2)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state as u8
                })
                .collect();
            run(&bytes);
        }
    }
}
