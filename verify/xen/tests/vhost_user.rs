//! A vhost-user back end whose rings and buffers are grants of the double completes all requests.

use verify_xen::double::Double;
use verify_xen::environment::{Environment, Host};
use verify_xen::vhost_user::{requests_complete, Rings};

verify_xen::interpose!();

fn run(rings: Rings) {
    for host in [Host::Pv, Host::AutoTranslated] {
        let mut env = Double::new(host);
        let outcome = requests_complete(&mut env, rings);
        assert!(outcome.is_ok(), "on {host:?}: {outcome:?}");
        assert_eq!(env.audit(), [""; 0], "on {host:?}");
    }
}

#[test]
fn requests_with_rings_mapped_in_advance_complete() {
    run(Rings::InAdvance);
}

#[test]
fn requests_with_rings_mapped_on_demand_complete() {
    run(Rings::OnDemand);
}
