//! A fault in any call of a scenario causes no panic, and leaves nothing mapped.

use std::panic::{catch_unwind, AssertUnwindSafe};

use verify_xen::double::{Double, Injection};
use verify_xen::environment::Host;
use verify_xen::outcome::{Outcome, Stop};
use verify_xen::scenarios::{self, Scenario};

verify_xen::interpose!();

/// Scenarios that wait for a second, or make thousands of calls. Other scenarios make the same
/// calls.
const SLOW: [&str; 2] = [
    "foreign_region_with_frame_always_paged_out_is_refused",
    "held_memory_keeps_a_limited_number_of_slices",
];

/// Runs a scenario with a fault in one call. Returns how it ended, and whether the fault happened.
fn run(scenario: &Scenario, host: Host, injection: Injection) -> (Result<Outcome, ()>, bool) {
    let mut env = Double::new(host);
    let _scope = env.on_this_thread();
    env.inject(Some(injection));
    let result = catch_unwind(AssertUnwindSafe(|| scenario.run(&mut env)));
    (result.map_err(|_| ()), env.is_injected())
}

/// Returns the reason why an outcome is wrong.
fn fault_of(outcome: Result<Outcome, ()>, errno: i32) -> Option<String> {
    match outcome {
        Err(()) => Some("panic".to_owned()),
        // The library has tried again, or the data is right without the call.
        Ok(Ok(())) => None,
        Ok(Err(stop)) if stop.errno() == Some(errno) => None,
        Ok(Err(Stop::Error { errno: None, text })) if text.starts_with("PartialBuffer") => None,
        Ok(Err(stop)) => Some(format!("{stop:?}")),
    }
}

/// Injects an error into each call of each scenario. Returns the number of faults.
fn inject_everywhere(host: Host, errno: i32) -> usize {
    let mut wrong = Vec::new();
    let mut faults = 0;
    for scenario in scenarios::all().filter(|scenario| !SLOW.contains(&scenario.name)) {
        for after in 0.. {
            let (outcome, injected) = run(scenario, host, Injection { after, errno });
            if !injected {
                // The scenario makes no more calls.
                break;
            }
            faults += 1;
            if let Some(fault) = fault_of(outcome, errno) {
                wrong.push(format!("{}, call {after}: {fault}", scenario.name));
            }
        }
    }
    assert!(wrong.is_empty(), "errno {errno} on {host:?}: {wrong:#?}");
    faults
}

#[test]
fn faults_in_each_call_on_paravirtualized_host_are_errors() {
    for errno in [libc::ENOMEM, libc::EINVAL] {
        let faults = inject_everywhere(Host::Pv, errno);
        assert!(faults > 200, "{faults} faults");
    }
}

#[test]
fn faults_in_each_call_on_auto_translated_host_are_errors() {
    for errno in [libc::ENOMEM, libc::EINVAL] {
        let faults = inject_everywhere(Host::AutoTranslated, errno);
        assert!(faults > 200, "{faults} faults");
    }
}
