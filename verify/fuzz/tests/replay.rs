//! Replays each file of the corpora without libFuzzer. An input that found a bug remains a test.

use std::fs;
use std::path::Path;

use vm_memory_fuzz::TARGETS;

#[test]
fn corpora_match_the_models() {
    for (name, run) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(name);
        let mut count = 0;
        for entry in fs::read_dir(&folder).expect("the corpus is checked in") {
            let path = entry.expect("the folder can be read").path();
            let data = fs::read(&path).expect("the file can be read");
            // On failure, the last printed name is that of the input.
            println!("{}", path.display());
            run(&data);
            count += 1;
        }
        assert!((1..50).contains(&count), "{name}: {count} files");
    }
}

/// Inputs outside the corpora: empty, constant, and a pseudo-random sequence.
#[test]
fn constant_and_random_inputs_match_the_models() {
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
