//! A kernel image.

const HEADER_SIZE: u16 = 64;
const SEGMENT_HEADER_SIZE: u16 = 56;

/// Returns an ELF image for x86_64 with one segment, `code`, to load at the address `start`.
pub fn elf(code: &[u8], start: u64) -> Vec<u8> {
    let mut image = Vec::new();

    // The header of the file: 64-bit, little-endian.
    image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend(2u16.to_le_bytes()); // ET_EXEC
    image.extend(62u16.to_le_bytes()); // EM_X86_64
    image.extend(1u32.to_le_bytes()); // version
    image.extend(start.to_le_bytes()); // entry point
    image.extend(u64::from(HEADER_SIZE).to_le_bytes()); // offset of the segment headers
    image.extend(0u64.to_le_bytes()); // offset of the section headers: none
    image.extend(0u32.to_le_bytes()); // flags
    image.extend(HEADER_SIZE.to_le_bytes());
    image.extend(SEGMENT_HEADER_SIZE.to_le_bytes());
    image.extend(1u16.to_le_bytes()); // number of segments
    image.extend([0; 6]); // size, number and names of sections

    // The header of the segment.
    let size = code.len() as u64;
    image.extend(1u32.to_le_bytes()); // PT_LOAD
    image.extend(5u32.to_le_bytes()); // readable and executable
    image.extend(u64::from(HEADER_SIZE + SEGMENT_HEADER_SIZE).to_le_bytes()); // offset
    image.extend(start.to_le_bytes()); // virtual address
    image.extend(start.to_le_bytes()); // physical address
    image.extend(size.to_le_bytes()); // size in the file
    image.extend(size.to_le_bytes()); // size in memory
    image.extend(0x1000u64.to_le_bytes()); // alignment

    image.extend(code);
    image
}
