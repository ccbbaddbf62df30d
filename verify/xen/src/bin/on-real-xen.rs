//! The only program of domain 0 in `cargo xtask xen`: runs each scenario on real Xen.

use verify_xen::real::{figures, program, self_test};
use verify_xen::scenarios;
use verify_xen::vhost_user::{requests_complete, Rings};

fn main() {
    let mut steps = vec![program::Step::new("self_test", self_test)];
    steps.extend(
        scenarios::all()
            .map(|scenario| program::Step::new(scenario.name, |world| scenario.run(world))),
    );
    steps.extend([
        program::Step::new("vhost_user_with_rings_mapped_in_advance", |world| {
            requests_complete(world, Rings::InAdvance)
        }),
        program::Step::new("vhost_user_with_rings_mapped_on_demand", |world| {
            requests_complete(world, Rings::OnDemand)
        }),
        program::Step::new("figures", |world| {
            for line in figures(world)? {
                println!("xen: NOTE {line}");
            }
            Ok(())
        }),
    ]);
    program::main(&steps);
}
