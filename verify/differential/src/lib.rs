//! Runs the same operations on `vm-memory` 0.18.0 and on this crate. See README.md.

pub mod context;
pub mod gen;
pub mod host;
pub mod machine;
pub mod model;
pub mod on_ours;
pub mod on_reference;
pub mod op;
pub mod out;
pub mod rules;
pub mod run;
pub mod shrink;

/// The names that a printed sequence uses.
pub mod prelude {
    pub use crate::list;
    pub use crate::op::{
        Access::*, Act::*, Answer::*, Arith::*, AtomTy::*, BitAct::*, Flavour::*, Handle::*,
        How::*, Kind::*, MapFlags::*, MapHow::*, Op::*, Order::*, Perm::*, Question::*,
        RegionQuestion::*, Root::*, Sink::*, Source::*, Step::*, Target::*, TlbAct::*, Trouble::*,
        Ty::*, ValueAct::*, View::*, Walk::*, *,
    };
    pub use crate::replay;
}

/// Runs the operations on both crates, with all rules.
///
/// # Panics
///
/// Panics at a difference that no rule allows.
pub fn replay(ops: &[op::Op]) {
    if let Err(difference) =
        run::replay_on::<on_reference::driver::TestedCrate, on_ours::driver::TestedCrate>(ops, &[])
    {
        panic!("{}", shrink::report(ops, &difference));
    }
}
