//! The resources and limits of the machine.

mod group_limit;
#[cfg(target_os = "linux")]
mod linux;
mod vma_budget;
#[cfg(windows)]
mod windows;

pub use group_limit::GroupLimit;
#[cfg(target_os = "linux")]
pub(crate) use linux::process_limits;
#[cfg(all(test, target_os = "linux"))]
pub(crate) use linux::tree;
#[cfg(target_os = "linux")]
pub use linux::{huge_page_pools, HostResources, HugePagePool};
#[cfg(target_os = "linux")]
pub(crate) use vma_budget::vma_limit;
pub(crate) use vma_budget::{read_vma_limit, VmaBudget};
#[cfg(windows)]
pub(crate) use windows::HostResources;
