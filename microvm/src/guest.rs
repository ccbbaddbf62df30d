//! The built-in guest: a position-independent 64-bit program in assembly, `guest.s`.
//!
//! It writes a pattern to both RAM regions and copies one half of its disk to the other. It ends
//! the run with exit code 0 if its checks pass. It uses integer instructions only, so that a nested
//! KVM can emulate it.
//!
//! ```text
//!              low region                     high region
//!   0x00_0000  tables of the vCPU             used ring
//!   0x10_0000  program, stack
//!   0x12_0000  descriptors, available ring,
//!              request
//!   0x20_0000  first half of each buffer      second half of each buffer
//!   0x40_0000  pattern, up to the end         pattern, up to the end
//! ```

use std::collections::BTreeSet;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use crate::block::SECTOR;
use crate::bus::DEBUG_EXIT;
use crate::dirty::DirtyBySource;
use crate::disk::Image;
use crate::kvm::Entry;
use crate::memory::{layout, pages_of, GuestRam, HIGH_START, PAGE};
use crate::report::Check;
use crate::serial::COM1;
use crate::virtio_mmio::VIRTIO_MMIO;
use crate::Error;

const PROGRAM: u64 = 0x10_0000;
const STACK_TOP: u64 = 0x11_0000;
const DESCRIPTORS: u64 = 0x12_0000;
const AVAILABLE_RING: u64 = 0x12_1000;
/// The header of the request, and after it the status byte.
const REQUEST: u64 = 0x12_2000;
const USED_RING: u64 = HIGH_START;

/// The feature bit VERSION_1, in the upper word.
const VERSION_1: u64 = 1 << (VIRTIO_F_VERSION_1 - 32);
/// The guest address of [`SETUP_VALUES`].
const SETUP: u64 = 0x12_3000;
/// The registers that the guest writes to set up the device (virtio 1.2, section 3.1.1). The bits
/// of the status are 1 ACKNOWLEDGE, 2 DRIVER, 4 DRIVER_OK, 8 FEATURES_OK.
const SETUP_VALUES: [(u32, u64); 16] = [
    (reg::VIRTIO_MMIO_STATUS, 0),
    (reg::VIRTIO_MMIO_STATUS, 1),
    (reg::VIRTIO_MMIO_STATUS, 1 | 2),
    (reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
    (reg::VIRTIO_MMIO_DRIVER_FEATURES, VERSION_1),
    (reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0),
    (reg::VIRTIO_MMIO_DRIVER_FEATURES, 1 << VIRTIO_BLK_F_FLUSH),
    (reg::VIRTIO_MMIO_STATUS, 1 | 2 | 8),
    (reg::VIRTIO_MMIO_QUEUE_SEL, 0),
    (reg::VIRTIO_MMIO_QUEUE_NUM, 16),
    (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS),
    (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE_RING),
    (reg::VIRTIO_MMIO_QUEUE_USED_LOW, USED_RING & 0xffff_ffff),
    (reg::VIRTIO_MMIO_QUEUE_USED_HIGH, USED_RING >> 32),
    (reg::VIRTIO_MMIO_QUEUE_READY, 1),
    (reg::VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8),
];

/// The number of requests that read the disk, and of those that write it.
const CHUNKS: u64 = 64;
/// The bytes of a request in each region.
const HALF: u64 = PAGE;
const CHUNK_SECTORS: u64 = 2 * HALF / SECTOR;
/// The capacity that the guest needs: it copies the first half of these sectors to the second.
pub const DISK_SECTORS: u64 = 2 * CHUNKS * CHUNK_SECTORS;
const LOW_BUFFERS: u64 = 0x20_0000;
/// Each of these buffers straddles a page boundary.
const HIGH_BUFFERS: u64 = HIGH_START + 0x20_0000 + PAGE / 2;

/// The number of words in the pattern of each region.
const PATTERN_WORDS: u64 = 256;
/// The offset of the pattern in each region.
const PATTERN: u64 = 0x40_0000;

/// Assembles a program for a guest, and defines `program()`, which returns its bytes.
///
/// The first two arguments are names of symbols, which must be unique in a binary. The others are
/// those of `global_asm!`: a list of lines, and the operands.
#[macro_export]
macro_rules! guest_program {
    ($start:literal, $end:literal, [$($line:expr),* $(,)?], $($operands:tt)*) => {
        std::arch::global_asm!(
            ".pushsection .rodata.guest, \"a\", @progbits",
            concat!(".globl ", $start),
            concat!($start, ":"),
            $($line,)*
            concat!(".globl ", $end),
            concat!($end, ":"),
            ".popsection",
            $($operands)*
        );

        extern "C" {
            #[link_name = $start]
            static START: u8;
            #[link_name = $end]
            static END: u8;
        }

        /// Returns the bytes of the program.
        fn program() -> &'static [u8] {
            let (start, end) = (&raw const START, &raw const END);
            let len = end.addr() - start.addr();
            #[expect(clippy::disallowed_methods, reason = "constant data of this binary")]
            // SAFETY: 1. `start` and `end` are labels in one section of this binary. Between them
            //    are only the `len` initialised bytes that `global_asm!` puts there.
            // 2. The section is read-only and exists as long as the process.
            unsafe {
                std::slice::from_raw_parts(start, len)
            }
        }
    };
}

guest_program!(
    "microvm_guest_start",
    "microvm_guest_end",
    [include_str!("guest.s")],
    low_pattern = const PATTERN,
    high_pattern = const HIGH_START + PATTERN,
    pattern_words = const PATTERN_WORDS,
    desc = const DESCRIPTORS,
    avail = const AVAILABLE_RING,
    used = const USED_RING,
    request = const REQUEST,
    setup = const SETUP,
    setup_len = const SETUP_VALUES.len(),
    chunks = const CHUNKS,
    chunk_sectors = const CHUNK_SECTORS,
    half = const HALF,
    low_buffers = const LOW_BUFFERS,
    high_buffers = const HIGH_BUFFERS,
    com1 = const COM1,
    debug_exit = const DEBUG_EXIT,
    mmio = const VIRTIO_MMIO,
    status = const reg::VIRTIO_MMIO_STATUS,
    queue_notify = const reg::VIRTIO_MMIO_QUEUE_NOTIFY,
    interrupt_status = const reg::VIRTIO_MMIO_INTERRUPT_STATUS,
    interrupt_ack = const reg::VIRTIO_MMIO_INTERRUPT_ACK,
);

/// Loads the guest, and returns the state in which the vCPU enters it. `size` is the size of RAM.
///
/// # Errors
///
/// Returns an error if the memory is too small.
pub fn load(ram: &GuestRam, size: u64) -> Result<Entry, Error> {
    // Memory in a file may contain the rings of an earlier run.
    for ring in [AVAILABLE_RING, USED_RING] {
        ram.write_slice(&[0; PAGE as usize], GuestAddress(ring))?;
    }
    ram.write_slice(program(), GuestAddress(PROGRAM))?;
    let setup = SETUP_VALUES
        .iter()
        .flat_map(|(reg, value)| [*reg, *value as u32]);
    let setup: Vec<u8> = setup.flat_map(u32::to_le_bytes).collect();
    ram.write_slice(&setup, GuestAddress(SETUP))?;
    let arguments = layout(size).map(|(_, len)| stride(len));
    Ok(Entry::Long {
        rip: PROGRAM,
        rsp: STACK_TOP,
        arguments,
    })
}

/// Returns the distance between two words of the pattern in a region of `len` bytes.
fn stride(len: u64) -> u64 {
    ((len - PATTERN) / PATTERN_WORDS) & !(PAGE - 1)
}

/// Returns the addresses of the pattern.
fn pattern(size: u64) -> impl Iterator<Item = u64> {
    let words = |(start, len)| (0..PATTERN_WORDS).map(move |n| start + PATTERN + n * stride(len));
    layout(size).into_iter().flat_map(words)
}

/// Returns the pages that the device writes: data, status byte, used ring.
fn device_pages() -> BTreeSet<u64> {
    let buffers = [(LOW_BUFFERS, CHUNKS * HALF), (HIGH_BUFFERS, CHUNKS * HALF)];
    let ranges = buffers.into_iter().chain([(REQUEST, 1), (USED_RING, 1)]);
    ranges
        .flat_map(|(start, len)| pages_of(start, len))
        .collect()
}

/// Returns the pages that the guest writes: pattern, stack, descriptors, available ring, request.
fn vcpu_pages(size: u64) -> BTreeSet<u64> {
    let others = [STACK_TOP - PAGE, DESCRIPTORS, AVAILABLE_RING, REQUEST];
    pattern(size).chain(others).collect()
}

/// Checks memory, disk and dirty pages after the run. `before` is the first half of the disk before
/// the run.
pub fn checks(
    ram: &GuestRam,
    size: u64,
    (image, before): (&Image, &[u8]),
    dirty: &DirtyBySource,
) -> Vec<Check> {
    let intact = |at: &u64| {
        ram.read_obj(GuestAddress(*at))
            .is_ok_and(|word: u64| word == *at)
    };
    let half = |first| image.read_sectors(first, DISK_SECTORS / 2);
    let copied = [0, DISK_SECTORS / 2].map(|first| half(first).is_ok_and(|now| now == before));
    vec![
        Check::new(
            "the pattern is in both RAM regions",
            pattern(size).all(|at| intact(&at)),
        ),
        Check::new(
            "the second half of the disk is a copy of the first",
            copied == [true; 2],
        ),
        Check::new(
            "the device dirtied the pages of its requests, and no others",
            dirty.device == device_pages(),
        ),
        // KVM may log more pages: it marks a page when it maps it as writable, even for a read.
        Check::new(
            "the vCPU dirtied every page that the guest wrote",
            dirty.vcpu.is_superset(&vcpu_pages(size)),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_fits_below_its_stack_and_is_complete() {
        let program = program();
        assert!(PROGRAM + (program.len() as u64) < STACK_TOP - PAGE);
        // mov r14, rdi
        assert_eq!(program[..3], [0x49, 0x89, 0xfe]);
        assert!(program.ends_with(b"as expected\n\0"));
    }

    #[test]
    fn load_into_any_ram_writes_only_outside_the_pattern() {
        use crate::memory::{build, harvest, pages, Backing};
        for size in [16 << 20, 256 << 20, 64 << 30] {
            let ram = build(size, &Backing::Anonymous).unwrap();
            load(&ram, size).unwrap();
            let written = pages(&harvest(&ram));
            assert!(pattern(size).all(|at| !written.contains(&at)));
            assert!(pattern(size).all(|at| ram.write_obj(at, GuestAddress(at)).is_ok()));
            assert_eq!(pattern(size).count() as u64, 2 * PATTERN_WORDS);
        }
    }
}
