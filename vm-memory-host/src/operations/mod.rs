//! Operations on memory that is built.
//!
//! | file | function |
//! |---|---|
//! | `prefault` | [`prefault()`]: populates pages |
//! | `discard` | [`discard()`]: returns pages to the system |
//! | `plug` | [`plug()`] and [`unplug`]: make blocks accessible or inaccessible |
//! | `residency` | [`residency()`]: reports the memory that each region uses |
//! | `content` | [`content()`]: finds the ranges that have content |

mod content;
mod discard;
mod plug;
mod prefault;
mod residency;

pub use content::{content, Content};
pub use discard::discard;
pub(crate) use plug::plug_initial;
pub use plug::{plug, unplug};
pub(crate) use prefault::run as prefault_mappings;
pub use prefault::{prefault, Progress};
pub(crate) use residency::resident_in_file;
pub use residency::{residency, Residency, ResidencyError};
