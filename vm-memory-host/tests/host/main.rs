//! Real memory of this machine, built, filled, given back, plugged and described.
#![cfg(target_os = "linux")]

mod backings;
mod common;
mod giving_back;
mod plugging;
mod refusals;
