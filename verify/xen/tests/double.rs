//! Each scenario passes on the double, with both kinds of host.

use verify_xen::double::Double;
use verify_xen::environment::Host;
use verify_xen::outcome::Stop;
use verify_xen::scenarios;

verify_xen::interpose!();

fn run_all(host: Host) {
    let mut failed = Vec::new();
    for scenario in scenarios::all() {
        let mut env = Double::new(host);
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scenario.run(&mut env)));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(Stop::Skipped(reason))) => test_support::skipped(scenario.name, reason),
            Ok(Err(stop)) => failed.push(format!("{}: {stop:?}", scenario.name)),
            Err(_) => failed.push(format!("{}: panic", scenario.name)),
        }
    }
    assert!(failed.is_empty(), "on {host:?}: {failed:#?}");
}

#[test]
fn scenarios_on_paravirtualized_host_pass() {
    run_all(Host::Pv);
}

#[test]
fn scenarios_on_auto_translated_host_pass() {
    run_all(Host::AutoTranslated);
}
