//! Boot: create guest RAM, load an ELF kernel with `linux-loader`, and write the command line.
//!
//! `cargo run -p examples --example boot`

use std::io::Cursor;

use examples::{kernel, Result};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{load_cmdline, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const KERNEL: GuestAddress = GuestAddress(0x10_0000);
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// A PC has no RAM between 3 GiB and 4 GiB. Devices use these addresses.
const HOLE: u64 = 3 << 30;
const ABOVE_HOLE: u64 = 4 << 30;

/// Returns the ranges of guest physical addresses for `size` bytes of RAM.
fn layout(size: u64) -> Vec<(GuestAddress, usize)> {
    let below = size.min(HOLE);
    let mut ranges = vec![(GuestAddress(0), below as usize)];
    if size > below {
        ranges.push((GuestAddress(ABOVE_HOLE), (size - below) as usize));
    }
    ranges
}

fn main() -> Result<()> {
    // Pages are not populated until they are accessed, so 4 GiB of RAM are cheap.
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&layout(4 << 30))?;
    for region in memory.iter() {
        let (first, last) = (region.start_addr().0, region.last_addr().0);
        println!("RAM {first:#011x}-{last:#011x}");
    }

    // Load a kernel. A kernel in a file is loaded in the same way, directly into guest memory.
    let code = [
        0xb0, b'!', // mov al, '!'
        0xe6, 0xe9, // out 0xe9, al
        0xf4, //       hlt
    ];
    let mut image = Cursor::new(kernel::elf(&code, KERNEL.0));
    let kernel = Elf::load(&memory, None, &mut image, Some(KERNEL))?;
    let (start, end) = (kernel.kernel_load.0, kernel.kernel_end);
    println!("kernel {start:#x}-{end:#x}");

    let mut cmdline = Cmdline::new(4096)?;
    cmdline.insert("console", "ttyS0")?;
    load_cmdline(&memory, CMDLINE, &cmdline)?;

    // The kernel and the command line are in guest memory.
    assert_eq!(memory.read_obj::<[u8; 5]>(KERNEL)?, code);
    let line = memory.read_obj::<[u8; 14]>(CMDLINE)?;
    assert_eq!(&line, b"console=ttyS0\0");

    // A kernel that does not fit is an error.
    let small: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
    let error = Elf::load(&small, None, &mut image, Some(KERNEL)).unwrap_err();
    println!("in 1 MiB of RAM: {error}");
    Ok(())
}
