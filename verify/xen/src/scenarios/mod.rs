//! The scenarios: accesses of a device to memory of another domain, and their expected results.
//!
//! A scenario ends with an error of the library by `?`, and panics if data is wrong. Fault
//! injection relies on that: see [`outcome`](crate::outcome).

#[cfg(feature = "additions")]
mod copies;
mod foreign;
mod grants;
mod guards;
#[cfg(feature = "additions")]
mod held;
mod large;
mod lazy;
mod lazy_faults;
#[cfg(feature = "additions")]
mod marks;
mod pages;
mod refused;
mod setup;
mod streams;
mod unix;
#[cfg(feature = "additions")]
mod windows;

use crate::environment::Environment;
use crate::outcome::Outcome;

/// A named sequence of accesses.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// The name, which is unique.
    pub name: &'static str,
    /// `ordinary_use`, or the fault of vm-memory 0.18.0 that it looks for: `X1` to `X25` of
    /// `docs/xen-scenarios.md`.
    pub group: &'static str,
    run: fn(&mut dyn Environment) -> Outcome,
}

impl Scenario {
    /// Runs the scenario once.
    ///
    /// # Errors
    ///
    /// Returns the error that ended it, or that it does not apply to this environment.
    ///
    /// # Panics
    ///
    /// Panics if data or an error is wrong, or if something is still mapped at the end.
    pub fn run(&self, env: &mut dyn Environment) -> Outcome {
        let outcome = (self.run)(env);
        let wrong = env.audit();
        assert!(wrong.is_empty(), "{}: {wrong:#?}", self.name);
        outcome
    }
}

/// Lists functions as scenarios, by their group.
macro_rules! scenarios {
    ($($group:ident: [$($run:ident),+ $(,)?]),+ $(,)?) => {
        &[$($(crate::scenarios::Scenario {
            name: stringify!($run),
            group: stringify!($group),
            run: $run,
        }),+),+]
    };
}
use scenarios;

/// Returns all scenarios.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    let parts = [
        unix::SCENARIOS,
        foreign::SCENARIOS,
        grants::SCENARIOS,
        refused::SCENARIOS,
        lazy::SCENARIOS,
        lazy_faults::SCENARIOS,
        guards::SCENARIOS,
        large::SCENARIOS,
        pages::SCENARIOS,
        streams::SCENARIOS,
        // 0.18.0 has no windows, no held memory, no copies by the hypervisor, and no
        // `fill_with_byte`.
        #[cfg(feature = "additions")]
        windows::SCENARIOS,
        #[cfg(feature = "additions")]
        held::SCENARIOS,
        #[cfg(feature = "additions")]
        copies::SCENARIOS,
        #[cfg(feature = "additions")]
        marks::SCENARIOS,
    ];
    parts.into_iter().flatten()
}
