//! Many faults, and faults in several threads, each return `EFAULT` or a count.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use vm_memory::{fault, Bytes};

#[test]
fn copy_during_truncation_of_file_returns_count_or_efault() {
    fault::install().unwrap();
    let (memory, file) = shared(64);
    let done = AtomicBool::new(false);
    let mut faults = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                file.set_len(PAGE as u64).unwrap();
                std::thread::yield_now();
                file.set_len(64 * PAGE as u64).unwrap();
                std::thread::yield_now();
            }
        });
        let _done = test_support::SetOnDrop(&done);
        let mut buf = vec![0u8; 64 * PAGE];
        // At least 4000 rounds, and more until one has faulted: the other thread may start late.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let mut round = 0u64;
        while round < 4000 || (faults == 0 && std::time::Instant::now() < deadline) {
            let result = match round % 3 {
                0 => memory.read(&mut buf, BASE),
                1 => memory.write(&buf, BASE),
                _ => memory
                    .read_obj::<u64>(GuestAddress(BASE.0 + 63 * PAGE as u64))
                    .map(|_| buf.len()),
            };
            match result {
                Ok(moved) if moved == buf.len() => {}
                Ok(moved) => {
                    assert!((PAGE..buf.len()).contains(&moved), "{moved}");
                    faults += 1;
                }
                Err(error) => {
                    assert!(is_efault(&error), "{error}");
                    faults += 1;
                }
            }
            round += 1;
        }
    });
    assert!(faults > 0, "no access faulted");
}

#[test]
fn faults_in_two_threads_each_return_efault() {
    fault::install().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (memory, file) = shared(2);
                file.set_len(0).unwrap();
                let mut buf = [0u8; 40];
                for round in 0..25_000u64 {
                    let addr = GuestAddress(BASE.0 + round % 4000);
                    assert!(is_efault(&memory.read_obj::<u32>(BASE).unwrap_err()));
                    assert!(is_efault(&memory.write(&buf, addr).unwrap_err()));
                    assert_eq!(fault::last().unwrap().guest_address, Some(addr));
                    assert!(is_efault(&memory.read(&mut buf, BASE).unwrap_err()));
                    assert!(is_efault(
                        &memory.store(1u8, BASE, Ordering::SeqCst).unwrap_err()
                    ));
                }
            });
        }
    });
}
