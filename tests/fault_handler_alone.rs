//! A program that installs the fault handler and has no access to guest memory in it: it links, which took an entry in the table next to the
//! code that looks at it.
#![cfg(any(
    feature = "rawfd",
    feature = "backend-mmap",
    feature = "backend-bitmap"
))]

#[test]
fn the_handler_links_by_itself() {
    match vm_memory::fault::install() {
        Ok(()) => assert!(vm_memory::fault::last().is_none()),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Unsupported),
    }
}
