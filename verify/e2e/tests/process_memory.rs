//! The memory of the process grows and shrinks with the plugged blocks. This is the only test of
//! its program, because other tests would change the numbers.

use e2e::run::{run, Setup};
use microvm::memory::Backing;
use test_support::skipped;

/// Memory of the process that may change for other reasons.
const OWN_MEMORY: u64 = 2 << 20;

#[test]
fn process_memory_grows_and_shrinks_with_plugged_blocks() {
    let kvm = cfg!(target_arch = "x86_64") && std::path::Path::new("/dev/kvm").exists();
    if !kvm {
        skipped(
            "process_memory_grows_and_shrinks_with_plugged_blocks on a vCPU",
            "no /dev/kvm",
        );
    }
    for kvm in [false, true].into_iter().take(1 + usize::from(kvm)) {
        let setup = Setup {
            size: 32 << 20,
            backing: Backing::Memfd,
            plug: true,
            kvm,
            ..Setup::default()
        };
        let outcome = run(&setup).unwrap();
        let (history, place) = (outcome.plug.unwrap(), outcome.plan.plug.unwrap());
        assert_eq!(history.error, None);
        let [before, during, after] = history.process;
        let least = place.first() - OWN_MEMORY;
        assert!(during >= before + least, "{history:?}");
        assert!(during >= after + least, "{history:?}");
    }
}
