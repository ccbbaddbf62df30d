//! Boots a kernel: an ELF file with a PVH note, or a bzImage, which linux-loader loads.
//!
//! ```text
//!   0x500 GDT   0x6000 start info   0x6100 module list   0x7000 memory map, or the zero page
//!   0x8000 command line   0xa000 page tables   1 MiB kernel …   … initrd, end of the low region
//! ```

use std::fs::File;
use std::iter;
use std::path::Path;

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info, XEN_HVM_MEMMAP_TYPE_RAM,
    XEN_HVM_START_MAGIC_VALUE,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{load_cmdline, BzImage, KernelLoader};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap,
};

use crate::args::Args;
use crate::kvm::Entry;
use crate::memory::{GuestRam, PAGE};
use crate::virtio_mmio::{VIRTIO_IRQ, VIRTIO_MMIO, VIRTIO_MMIO_LEN};
use crate::Error;

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x7000;
const ZERO_PAGE: u64 = 0x7000;
const CMDLINE: u64 = 0x8000;
const CMDLINE_MAX: usize = 4096;
/// The lowest address of a kernel. The tables of the vCPU and of this module are below it.
const KERNEL_MIN: u64 = 0x10_0000;
/// The end of the RAM that a BIOS leaves below 1 MiB.
const LOW_RAM_END: u64 = 0x9_fc00;
/// The offset of the 64-bit entry point in the protected-mode code of a bzImage.
const ENTRY_64: u64 = 0x200;

/// An address and a length in bytes.
type Range = (u64, u64);

/// Loads the kernel, its initrd and its command line. Returns the state in which the vCPU enters
/// it.
///
/// # Errors
///
/// Returns an error if a file cannot be read, is not a kernel, or does not fit into RAM.
pub fn load(ram: &GuestRam, kernel: &Path, args: &Args) -> Result<Entry, Error> {
    let mut file = File::open(kernel).map_err(Error::file("--kernel", kernel))?;
    let mut line = Cmdline::new(CMDLINE_MAX).map_err(kernel_error)?;
    line.insert_str(&args.cmdline).map_err(kernel_error)?;
    let registers = GuestAddress(VIRTIO_MMIO);
    line.add_virtio_mmio_device(VIRTIO_MMIO_LEN, registers, VIRTIO_IRQ, None)
        .map_err(kernel_error)?;
    load_cmdline(ram, GuestAddress(CMDLINE), &line).map_err(kernel_error)?;

    let min = Some(GuestAddress(KERNEL_MIN));
    if let Ok(image) = BzImage::load(ram, None, &mut file, min) {
        let header = image.setup_header.ok_or_else(|| {
            kernel_error("the bzImage has no setup header; use an uncorrupted kernel image")
        })?;
        return bzimage(ram, args, header, image.kernel_load.0, image.kernel_end);
    }
    let image = Elf::load(ram, None, &mut file, min).map_err(|e| {
        kernel_error(format!(
            "the file is neither an ELF file nor a bzImage that fits into low RAM ({e}); \
             try a larger --mem"
        ))
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = image.pvh_boot_cap else {
        return Err(kernel_error(
            "the ELF file has no PVH note; build the kernel with CONFIG_PVH=y",
        ));
    };
    pvh(ram, args, entry.0, image.kernel_end)
}

fn pvh(ram: &GuestRam, args: &Args, rip: u64, kernel_end: u64) -> Result<Entry, Error> {
    let entry = |(addr, size)| hvm_memmap_table_entry {
        addr,
        size,
        type_: XEN_HVM_MEMMAP_TYPE_RAM,
        reserved: 0,
    };
    let map: Vec<_> = memory_map(ram).into_iter().map(entry).collect();
    let initrd = load_initrd(ram, args, kernel_end, u32::MAX.into())?;
    let module = |(paddr, size)| hvm_modlist_entry {
        paddr,
        size,
        ..Default::default()
    };
    let modules: Vec<_> = initrd.map(module).into_iter().collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: MODULES,
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(MODULES));
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(kernel_error)?;
    Ok(Entry::Pvh {
        rip,
        start_info: START_INFO,
    })
}

fn bzimage(
    ram: &GuestRam,
    args: &Args,
    mut header: setup_header,
    kernel: u64,
    kernel_end: u64,
) -> Result<Entry, Error> {
    // The field exists since version 2.12 of the boot protocol. Bit 0: a 64-bit entry point exists.
    if header.version < 0x20c || header.xloadflags & 1 == 0 {
        return Err(kernel_error(
            "the bzImage has no 64-bit entry point; build a 64-bit kernel of Linux 3.8 or later",
        ));
    }
    // A compressed kernel unpacks itself in place and needs more memory than its file.
    let end = kernel_end.max(kernel.saturating_add(header.init_size.into()));
    if !GuestMemoryBackend::check_range(ram, GuestAddress(kernel), (end - kernel) as usize) {
        return Err(kernel_error(
            "the kernel does not fit into low RAM; try a larger --mem",
        ));
    }
    (header.type_of_loader, header.cmd_line_ptr) = (0xff, CMDLINE as u32);
    header.cmdline_size = CMDLINE_MAX as u32;
    if let Some((at, size)) = load_initrd(ram, args, end, header.initrd_addr_max.into())? {
        // Not above `initrd_addr_max`, which has 32 bits.
        (header.ramdisk_image, header.ramdisk_size) = (at as u32, size as u32);
    }
    let map = memory_map(ram);
    let mut params = boot_params {
        hdr: header,
        e820_entries: map.len() as u8,
        ..Default::default()
    };
    let mut table = params.e820_table;
    for (entry, (addr, size)) in table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: 1,
        };
    }
    params.e820_table = table;
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, ram).map_err(kernel_error)?;
    Ok(Entry::Long {
        rip: kernel + ENTRY_64,
        rsp: 0,
        arguments: [0, ZERO_PAGE],
    })
}

/// Returns the RAM that a BIOS would report: without the range below 1 MiB that firmware uses.
fn memory_map(ram: &GuestRam) -> Vec<Range> {
    let above = ram.iter().map(|region| {
        let start = region.start_addr().0.max(KERNEL_MIN);
        (start, region.last_addr().0 + 1 - start)
    });
    iter::once((0, LOW_RAM_END)).chain(above).collect()
}

/// Loads the initrd at the end of the low region, but not above `max`.
fn load_initrd(
    ram: &GuestRam,
    args: &Args,
    kernel_end: u64,
    max: u64,
) -> Result<Option<Range>, Error> {
    let Some(path) = &args.initrd else {
        return Ok(None);
    };
    let fail = Error::file("--initrd", path);
    let mut file = File::open(path).map_err(&fail)?;
    let size = file.metadata().map_err(&fail)?.len();
    let low_end = ram.iter().next().map_or(0, GuestRegionMmap::len);
    let at = low_end
        .min(max + 1)
        .checked_sub(size)
        .map(|at| at & !(PAGE - 1));
    let at = at.filter(|at| *at >= kernel_end.max(KERNEL_MIN));
    let at =
        at.ok_or_else(|| kernel_error("the initrd does not fit into low RAM; try a larger --mem"))?;
    let read = ram.read_exact_volatile_from(GuestAddress(at), &mut file, size as usize);
    read.map_err(|e: GuestMemoryError| fail(std::io::Error::other(e)))?;
    Ok(Some((at, size)))
}

fn kernel_error(why: impl ToString) -> Error {
    Error::Kernel(why.to_string())
}
