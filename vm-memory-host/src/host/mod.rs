//! The resources and limits of the machine.

mod group_limit;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(windows)]
mod windows;

pub use group_limit::GroupLimit;
#[cfg(all(test, target_os = "linux"))]
pub(crate) use linux::tree;
#[cfg(target_os = "linux")]
pub use linux::{huge_page_pools, HostResources, HugePagePool};
#[cfg(target_os = "linux")]
pub(crate) use linux::{process_limits, read_vma_limit, vma_limit, VmaBudget};
#[cfg(windows)]
pub(crate) use windows::HostResources;
