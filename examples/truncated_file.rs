//! Continues after a mapped file is truncated: with `fault::install`, an access returns an error
//! instead of killing the process with SIGBUS.
//!
//! `cargo run -p examples --example truncated_file`

use std::error::Error;

use vm_memory::fault;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryMmap};

const PAGE: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    // Call this once for the process, after other handlers of the same signals are installed.
    if let Err(error) = fault::install() {
        println!("SKIPPED: fault recovery is not available: {error}");
        return Ok(());
    }

    let file = tempfile::tempfile()?;
    file.set_len(4 * PAGE as u64)?;
    let offset = FileOffset::new(file.try_clone()?, 0);
    let ranges = [(GuestAddress(0x10_0000), 4 * PAGE, Some(offset))];
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(ranges)?;
    memory.write_slice(&[7; 4 * PAGE], GuestAddress(0x10_0000))?;

    // Another process that has the file open truncates it to half its size.
    file.set_len(2 * PAGE as u64)?;

    // An access past the new end of the file fails with EFAULT.
    let gone = GuestAddress(0x10_0000 + 2 * PAGE as u64);
    let error = memory.read_obj::<u64>(gone).unwrap_err();
    println!("read_obj: {error}");
    let GuestMemoryError::IOError(source) = error else {
        return Err("expected an error of the operating system".into());
    };
    assert_eq!(source.raw_os_error(), Some(libc::EFAULT));

    // The fault record contains the address, the direction, and the number of bytes moved before
    // the fault.
    let record = fault::last().ok_or("no fault was recorded")?;
    println!("last fault: {record:x?}");
    assert_eq!(record.guest_address, Some(gone));
    assert_eq!(record.direction, fault::Direction::Read);

    // A long access returns the number of bytes before the page.
    let mut bytes = [0; PAGE];
    let read = memory.read(&mut bytes, GuestAddress(gone.0 - 100))?;
    println!("read: {read} of {PAGE} bytes");
    assert_eq!((read, bytes[99], bytes[100]), (100, 7, 0));
    let error = memory
        .write_slice(&bytes, GuestAddress(gone.0 - 100))
        .unwrap_err();
    println!("write_slice: {error}");
    assert_eq!(fault::last().map(|record| record.completed), Some(100));

    // The remaining pages work as before.
    memory.write_obj(8u64, GuestAddress(0x10_1000))?;
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x10_1000))?, 8);

    // The crate refuses to map a file that is already too short.
    let too_short = [(GuestAddress(0), 4 * PAGE, Some(FileOffset::new(file, 0)))];
    let error = GuestMemoryMmap::<()>::from_ranges_with_files(too_short).unwrap_err();
    println!("mapping: {error}");
    Ok(())
}
