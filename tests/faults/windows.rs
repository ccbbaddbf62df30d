//! An access to a window returns an error if its page disappeared after the window was created.

use super::*;
use vm_memory::{fault, Bytes, GuestMemory, Permissions};

#[test]
fn window_over_truncated_page_returns_fault_at_guest_address() {
    fault::install().unwrap();
    let (memory, file) = shared(2);
    let start = GuestAddress(BASE.0 + PAGE as u64 - 8);
    let window = memory.window(start, 16, Permissions::ReadWrite).unwrap();
    file.set_len(PAGE as u64).unwrap();

    window.write_obj(7u64, 0).unwrap();
    assert!(is_efault(&window.read_obj::<u32>(12).unwrap_err()));
    let last = fault::last().unwrap();
    assert_eq!(last.guest_address, Some(GuestAddress(start.0 + 12)));
    assert_eq!(window.write(&[1; 16], 0).unwrap(), 8, "the bytes before");
    assert_eq!(
        fault::last().unwrap().guest_address,
        Some(GuestAddress(BASE.0 + PAGE as u64))
    );
}
