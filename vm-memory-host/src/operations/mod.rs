//! Operations on memory that is built.
//!
//! | file | function |
//! |---|---|
//! | `prefault` | [`prefault()`]: populates pages |
//! | `discard` | [`discard()`]: returns pages to the system |
//! | `discard_pages` | [`discard_pages()`]: returns pages that a guest lists by number |
//! | `balloon` | [`Balloon`]: collects the pages of larger pages |
//! | `plug` | [`plug()`], [`unplug`], [`unplug_all`]: make blocks accessible or inaccessible; [`plug_state`] |
//! | `zero_range` | [`zero_range()`]: makes any range read as zeroes |
//! | `residency` | [`residency()`]: reports the memory that each region uses |
//! | `content` | [`content()`]: finds the ranges that have content |

mod balloon;
mod discard;
mod discard_pages;
#[cfg(target_os = "linux")]
mod linux;
mod plug;
mod prefault;
mod residency;
#[cfg(windows)]
mod windows;
mod zero_range;

pub use balloon::Balloon;
pub use discard::discard;
pub use discard_pages::{discard_pages, DiscardReport};
pub(crate) use plug::plug_initial;
pub use plug::{plug, plug_state, unplug, unplug_all, PlugState};
pub(crate) use prefault::run as prefault_mappings;
pub use prefault::{prefault, Progress};
pub use residency::{residency, Residency, ResidencyError};
pub use zero_range::zero_range;

#[cfg(target_os = "linux")]
pub(crate) use linux::resident_in_file;
#[cfg(target_os = "linux")]
pub use linux::{content, Content};

/// The parts of the operations that differ between systems.
#[cfg(target_os = "linux")]
use linux as system;
#[cfg(windows)]
use windows as system;
