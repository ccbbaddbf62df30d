//! A program that installs the fault handler links, even if it contains no access to guest memory.
//!
//! The reason is that the handler itself adds an entry to the fault table.
#![cfg(any(
    feature = "rawfd",
    feature = "backend-mmap",
    feature = "backend-bitmap"
))]

#[test]
fn install_without_any_access_links() {
    match vm_memory::fault::install() {
        Ok(()) => assert!(vm_memory::fault::last().is_none()),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Unsupported),
    }
}
