//! The resources and limits of the machine, read from /sys and /proc.
//!
//! | file | content |
//! |---|---|
//! | `files` | files of /sys and /proc, each read at most once |
//! | `resources` | [`HostResources`]: pools of huge pages, NUMA nodes, available memory |
//! | `control_groups` | limits of control groups on memory and huge pages |
//! | `process_limits` | the limit of this process that a refused call has reached |

mod control_groups;
mod files;
pub(crate) mod process_limits;
mod resources;

use super::GroupLimit;

#[cfg(test)]
pub(crate) use resources::tests::tree;
pub use resources::{huge_page_pools, HostResources, HugePagePool};
