//! The only program of domain 0 in `cargo xtask xen --reference`: runs the scenarios on 0.18.0.

#[path = "../../../xen/src/double/mod.rs"]
#[expect(
    dead_code,
    reason = "a scenario asks whether the environment is the double"
)]
mod double;
#[path = "../../../xen/src/environment.rs"]
#[expect(
    dead_code,
    reason = "the kind of host is for scenarios that 0.18.0 does not have"
)]
mod environment;
#[path = "../../../xen/src/outcome.rs"]
#[expect(dead_code, reason = "the report prints the text by `Debug`")]
mod outcome;
#[path = "../../../xen/src/real/mod.rs"]
mod real;
#[path = "../../../xen/src/scenarios/mod.rs"]
#[expect(dead_code, reason = "the rows are for the table of the double")]
mod scenarios;

use real::program::{self, Step};

fn main() {
    let mut steps = vec![Step::new("self_test", real::self_test)];
    for scenario in scenarios::all() {
        steps.push(Step::new(scenario.name, |env| scenario.run(env)));
    }
    program::main(&steps);
}
