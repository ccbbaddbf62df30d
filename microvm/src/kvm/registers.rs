//! The registers with which a vCPU enters a guest, and the tables that they refer to.

use kvm_bindings::{kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress};

use super::{failed, Vm};
use crate::memory::{GuestRam, PAGE};
use crate::Error;

/// The guest address of the global descriptor table.
const GDT: u64 = 0x500;
/// Segment descriptors: base 0, present, and already accessed.
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TASK: u64 = 0x0000_8b00_0000_0067;
/// The guest addresses of the page tables. There is one page directory for each GiB.
const PML4: u64 = 0xa000;
const PDPT: u64 = 0xb000;
const PAGE_DIRECTORIES: u64 = 0xc000;
/// The size of the identity mapping: the largest RAM, the hole, and space for hot-plugged memory.
const MAPPED_GIB: u64 = 80;
const LARGE_PAGE: u64 = 2 << 20;
/// The bits present, writable and accessed. The processor does not need to set them, so the tables
/// stay out of the dirty log.
const TABLE: u64 = 0x23;
/// A page of 2 MiB: the bits of [`TABLE`], dirty, and page size.
const LARGE_LEAF: u64 = 0xe3;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// The state in which the vCPU enters a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode with an identity mapping: the built-in guest, or a bzImage.
    Long {
        /// The first instruction.
        rip: u64,
        /// The stack.
        rsp: u64,
        /// The arguments in RDI and RSI. A bzImage expects its zero page in RSI.
        arguments: [u64; 2],
    },
    /// 32-bit protected mode without paging: an ELF kernel with a PVH note.
    Pvh {
        /// The entry point of the note.
        rip: u64,
        /// The address of `hvm_start_info`, for EBX.
        start_info: u64,
    },
}

impl Vm {
    /// Sets the registers for an entry, and writes the descriptor and page tables to `ram`.
    ///
    /// # Errors
    ///
    /// Returns an error if KVM refuses a call, or if `ram` is too small.
    pub fn set_entry(&self, ram: &GuestRam, entry: Entry) -> Result<(), Error> {
        let is_long = matches!(entry, Entry::Long { .. });
        let mut sregs = self.vcpu.get_sregs().map_err(failed("read registers"))?;
        let code = if is_long { CODE_64 } else { CODE_32 };
        let data = segment(0x18, DATA);
        (sregs.cs, sregs.tr) = (segment(0x10, code), segment(0x20, TASK));
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        let gdt = [0, 0, code, DATA, TASK];
        write_words(ram, GDT, &gdt)?;
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 8 * gdt.len() as u16 - 1);
        // Without an IDT, an exception of the built-in guest is a triple fault and ends the run.
        sregs.idt.limit = 0;
        (sregs.cr0, sregs.cr4) = (CR0_PE | CR0_ET, 0);
        if is_long {
            identity_map(ram)?;
            sregs.cr0 |= CR0_PG;
            (sregs.cr3, sregs.cr4, sregs.efer) = (PML4, CR4_PAE, EFER_LME_LMA);
        }
        self.vcpu
            .set_sregs(&sregs)
            .map_err(failed("set system registers"))?;
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match entry {
            Entry::Long {
                rip,
                rsp,
                arguments: [rdi, rsi],
            } => {
                (regs.rip, regs.rsp, regs.rdi, regs.rsi) = (rip, rsp, rdi, rsi);
            }
            Entry::Pvh { rip, start_info } => (regs.rip, regs.rbx) = (rip, start_info),
        }
        self.vcpu.set_regs(&regs).map_err(failed("set registers"))
    }
}

/// Writes page tables that map every guest physical address below 80 GiB to itself.
fn identity_map(ram: &GuestRam) -> Result<(), Error> {
    let directory = |gib: u64| PAGE_DIRECTORIES + gib * PAGE;
    let directories: Vec<u64> = (0..MAPPED_GIB).map(|gib| directory(gib) | TABLE).collect();
    write_words(ram, PML4, &[PDPT | TABLE])?;
    write_words(ram, PDPT, &directories)?;
    for gib in 0..MAPPED_GIB {
        let pages = (0..512).map(|n| (gib << 30) | (n * LARGE_PAGE) | LARGE_LEAF);
        write_words(ram, directory(gib), &pages.collect::<Vec<u64>>())?;
    }
    Ok(())
}

fn write_words(ram: &GuestRam, at: u64, words: &[u64]) -> Result<(), Error> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok(ram.write_slice(&bytes, GuestAddress(at))?)
}

/// Returns the segment that `descriptor` describes. Its base is 0.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let field = |shift: u32, mask: u64| (descriptor >> shift & mask) as u8;
    kvm_segment {
        selector,
        limit: if field(55, 1) == 1 {
            u32::MAX
        } else {
            descriptor as u32 & 0xffff
        },
        type_: field(40, 0xf),
        s: field(44, 1),
        present: field(47, 1),
        l: field(53, 1),
        db: field(54, 1),
        g: field(55, 1),
        ..Default::default()
    }
}
