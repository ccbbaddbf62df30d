//! The state of a mapping on Linux.

#[cfg(test)]
mod child_tests;
mod file_ranges;
mod opened_backing;
mod options;
mod zeroed_ranges;

pub(crate) use file_ranges::FileRanges;
pub(crate) use opened_backing::{FileIdentity, OpenedBacking};
pub(crate) use zeroed_ranges::ZeroedRanges as PageState;
