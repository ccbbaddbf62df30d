//! Boot: create guest RAM, load an ELF kernel with `linux-loader`, and write the command line.
//!
//! `cargo run -p examples --example boot`

use std::error::Error;
use std::io::Cursor;

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{load_cmdline, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const KERNEL: GuestAddress = GuestAddress(0x10_0000);
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// A PC has no RAM between 3 GiB and 4 GiB: devices are there.
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

/// Returns a minimal ELF kernel, with one loadable segment.
fn tiny_kernel(code: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    let header_size = 64u64;
    let segment_header_size = 56u64;
    // ELF header: 64-bit, little-endian, an executable for x86_64.
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend_from_slice(&2u16.to_le_bytes()); // ET_EXEC
    image.extend_from_slice(&62u16.to_le_bytes()); // EM_X86_64
    image.extend_from_slice(&1u32.to_le_bytes()); // version
    image.extend_from_slice(&KERNEL.0.to_le_bytes()); // entry point
    image.extend_from_slice(&header_size.to_le_bytes()); // offset of the program headers
    image.extend_from_slice(&[0; 12]); // no sections, no flags
    for value in [64u16, 56, 1, 0, 0, 0] {
        image.extend_from_slice(&value.to_le_bytes()); // sizes and counts of headers
    }
    // Program header: PT_LOAD, readable and executable.
    image.extend_from_slice(&1u32.to_le_bytes());
    image.extend_from_slice(&5u32.to_le_bytes());
    let offset = header_size + segment_header_size;
    let size = code.len() as u64;
    // Offset in the file, virtual and physical address, size in the file and in memory, alignment.
    for value in [offset, KERNEL.0, KERNEL.0, size, size, 0x1000] {
        image.extend_from_slice(&value.to_le_bytes());
    }
    image.extend_from_slice(code);
    image
}

fn main() -> Result<(), Box<dyn Error>> {
    // Pages are not populated until they are accessed, so 4 GiB of RAM are cheap.
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&layout(4 << 30))?;
    for region in memory.iter() {
        let (first, last) = (region.start_addr().0, region.last_addr().0);
        println!("RAM {first:#011x}-{last:#011x}");
    }

    // `mov al, '!'; out 0xe9, al; hlt`
    let code = [0xb0, b'!', 0xe6, 0xe9, 0xf4];
    // A kernel in a file is loaded in the same way: the loader reads into guest memory directly.
    let mut image = Cursor::new(tiny_kernel(&code));
    let kernel = Elf::load(&memory, None, &mut image, Some(KERNEL))?;
    println!(
        "kernel at {:#x}, ends at {:#x}",
        kernel.kernel_load.0, kernel.kernel_end
    );

    let mut cmdline = Cmdline::new(4096)?;
    cmdline.insert("console", "ttyS0")?;
    load_cmdline(&memory, CMDLINE, &cmdline)?;

    let mut loaded = [0; 5];
    memory.read_slice(&mut loaded, kernel.kernel_load)?;
    assert_eq!(loaded, code);
    let mut line = [0; 14];
    memory.read_slice(&mut line, CMDLINE)?;
    assert_eq!(&line, b"console=ttyS0\0");

    // Loading a kernel that does not fit fails.
    let small: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
    let error = Elf::load(&small, None, &mut image, Some(KERNEL)).unwrap_err();
    println!("in 1 MiB of RAM: {error}");
    Ok(())
}
