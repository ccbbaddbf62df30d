//! The errors of this crate.
//!
//! Each message names the region, what failed, the value and the limit, and what to do.

mod build;
mod change;
#[cfg(all(test, target_os = "linux"))]
mod tests;

pub use build::BuildError;
pub(crate) use change::PLUG;
pub use change::{ChangeError, NotProvisioned, OtherProcess, PrefaultError, RefusedPage};

/// Returns a message that states how many huge pages are missing, and where to add them.
pub(super) fn too_few_huge_pages(wanted: u64, free: u64, page_size: u64, nodes: &[u32]) -> String {
    let on_nodes = match nodes {
        [] => String::new(),
        nodes => format!(" on NUMA nodes {nodes:?}"),
    };
    format!(
        "{wanted} huge pages of {page_size:#x} bytes are required, but only {free} are free\
        {on_nodes}; add {} to {}/hugepages-{}kB/nr_hugepages",
        wanted.saturating_sub(free).max(1),
        pool_directory(nodes),
        page_size / 1024
    )
}

fn pool_directory(nodes: &[u32]) -> String {
    match nodes.first() {
        None => "/sys/kernel/mm/hugepages".to_owned(),
        Some(node) => format!("/sys/devices/system/node/node{node}/hugepages"),
    }
}
