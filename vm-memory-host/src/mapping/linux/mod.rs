//! The state of a mapping on Linux.

#[cfg(test)]
mod child_tests;
mod opened_backing;
mod options;
mod zeroed_ranges;

pub(crate) use opened_backing::{FileIdentity, OpenedBacking};
pub(crate) use zeroed_ranges::ZeroedRanges as PageState;
