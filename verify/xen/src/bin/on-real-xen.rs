//! The only program of domain 0 in `cargo xtask xen`: runs each scenario on real Xen.

use verify_xen::real::{figures, program, self_test};
use verify_xen::scenarios;
use verify_xen::vhost_user::{requests_complete, Rings};

fn main() {
    let mut steps = vec![program::Step::new("self_test", self_test)];
    steps.extend(
        scenarios::all().map(|scenario| program::Step::new(scenario.name, |env| scenario.run(env))),
    );
    steps.extend([
        program::Step::new("vhost_user_with_rings_mapped_in_advance", |env| {
            requests_complete(env, Rings::InAdvance)
        }),
        program::Step::new("vhost_user_with_rings_mapped_on_demand", |env| {
            requests_complete(env, Rings::OnDemand)
        }),
        program::Step::new("figures", |env| {
            for line in figures(env)? {
                println!("xen: NOTE {line}");
            }
            Ok(())
        }),
    ]);
    program::main(&steps);
}
