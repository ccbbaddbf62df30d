//! Kernels: an ELF file with a PVH entry, or a bzImage, loaded by linux-loader.
//!
//! ```text
//!  0x500 GDT   0x6000 start info  0x7000 memory map, or   0x8000 command line   0xa000 page tables
//!              0x6040 modules     zero page               (4 KiB)
//!  1 MiB kernel ...                       ... initrd at the end of the low region
//! ```

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, XLF_KERNEL_64};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info, XEN_HVM_MEMMAP_TYPE_RAM,
    XEN_HVM_START_MAGIC_VALUE,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{load_cmdline, BzImage, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::bus::{VIRTIO_MMIO, VIRTIO_MMIO_LEN};
use crate::error::Error;
use crate::memory::{GuestRam, PAGE};
use crate::vm::{Entry, BLOCK_IRQ};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x7000;
const ZERO_PAGE: u64 = 0x7000;
const CMDLINE: u64 = 0x8000;
const CMDLINE_MAX: usize = 4096;
/// Kernels are loaded from here on; below are the tables of this module.
const KERNEL_MIN: u64 = 0x10_0000;
/// RAM that a BIOS would have left below 1 MiB.
const LOW_RAM_END: u64 = 0x9_fc00;
/// Where the 64-bit entry point of a bzImage lies in its protected-mode code.
const ENTRY_64: u64 = 0x200;

/// What is to be booted.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// Its initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// Its command line.
    pub cmdline: &'a str,
    /// Whether there is a virtio device to tell it of.
    pub disk: bool,
}

/// Kernel, initrd, command line and boot parameters in guest memory: how to enter, and a line for
/// the report.
///
/// # Errors
///
/// [`Error::OpenFile`], [`Error::Kernel`] and [`Error::GuestMemory`].
pub fn load(ram: &GuestRam, boot: &Boot) -> Result<(Entry, String), Error> {
    let mut file = open(boot.kernel, "--kernel")?;
    let bad = |why: &str| bad_file("--kernel", boot.kernel, why.to_owned());
    let (mut magic, mut header) = ([0; 4], [0; 4]);
    // A file too short for either is no kernel.
    let _ = file.read_exact(&mut magic);
    let _ = file
        .seek(SeekFrom::Start(0x202))
        .and_then(|_| file.read_exact(&mut header));
    let entry = if magic == *b"\x7fELF" {
        let kernel = Elf::load(ram, None, &mut file, Some(GuestAddress(KERNEL_MIN)))
            .map_err(|e| bad(&format!("cannot be loaded into guest memory: {e}; {TRY}")))?;
        let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else {
            return Err(bad(
                "the ELF file has no PVH note; build the kernel with CONFIG_PVH=y",
            ));
        };
        start_pvh(ram, boot, entry, kernel.kernel_end)?
    } else if header == *b"HdrS" {
        let kernel = BzImage::load(ram, None, &mut file, Some(GuestAddress(KERNEL_MIN)))
            .map_err(|e| bad(&format!("cannot be loaded into guest memory: {e}; {TRY}")))?;
        start_linux(ram, boot, &kernel)?
    } else {
        return Err(bad(
            "neither an ELF file nor a bzImage; give vmlinux or arch/x86/boot/bzImage",
        ));
    };
    store_cmdline(ram, boot)?;
    let how = match entry {
        Entry::Pvh { rip, .. } => format!("ELF, PVH entry at {rip:#x}"),
        Entry::Linux64 { rip, .. } | Entry::Program { rip, .. } => {
            format!("bzImage, 64-bit entry at {rip:#x}")
        }
    };
    Ok((entry, how))
}

const TRY: &str = "check the file, or try a larger --mem";

fn start_pvh(
    ram: &GuestRam,
    boot: &Boot,
    entry: GuestAddress,
    kernel_end: u64,
) -> Result<Entry, Error> {
    let bad = |why: String| bad_file("--kernel", boot.kernel, why);
    if !ram.address_in_range(entry) {
        return Err(bad(format!(
            "its PVH entry {:#x} is not in guest memory; {TRY}",
            entry.0
        )));
    }
    let entries: Vec<_> = memory_map(ram)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: XEN_HVM_MEMMAP_TYPE_RAM,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = load_initrd(ram, boot, kernel_end, u64::from(u32::MAX))?
        .map(|(paddr, size)| hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        })
        .into_iter()
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: entries.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&entries, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(|e| bad(format!("{e}; {TRY}")))?;
    Ok(Entry::Pvh {
        rip: entry.0,
        start_info: START_INFO,
    })
}

fn start_linux(ram: &GuestRam, boot: &Boot, kernel: &KernelLoaderResult) -> Result<Entry, Error> {
    let bad = |why: &str| bad_file("--kernel", boot.kernel, why.to_owned());
    let Some(mut header) = kernel.setup_header else {
        return Err(bad("the bzImage has no setup header; check the file"));
    };
    // The field is there since version 2.12.
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(bad(
            "the bzImage has no 64-bit entry; build a 64-bit kernel of 3.8 or later",
        ));
    }
    // A compressed kernel unpacks itself in place, and needs more room than its file.
    let unpacked = kernel
        .kernel_load
        .0
        .saturating_add(u64::from(header.init_size));
    let end = kernel.kernel_end.max(unpacked);
    if !GuestMemoryBackend::check_range(
        ram,
        kernel.kernel_load,
        (end - kernel.kernel_load.0) as usize,
    ) {
        return Err(bad(
            "the kernel does not fit into low memory; try a larger --mem",
        ));
    }
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = CMDLINE as u32;
    header.cmdline_size = CMDLINE_MAX as u32;
    if let Some((at, size)) = load_initrd(ram, boot, end, u64::from(header.initrd_addr_max))? {
        // Below initrd_addr_max, which is 32 bits wide.
        (header.ramdisk_image, header.ramdisk_size) = (at as u32, size as u32);
    }
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    let map = memory_map(ram);
    params.e820_entries = map.len() as u8;
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
    LinuxBootConfigurator::write_bootparams(&params, ram)
        .map_err(|e| bad(&format!("{e}; {TRY}")))?;
    Ok(Entry::Linux64 {
        rip: kernel.kernel_load.0 + ENTRY_64,
        zero_page: ZERO_PAGE,
    })
}

/// RAM as a BIOS would tell it: without the hole below 1 MiB, where a kernel looks for firmware.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64)> {
    let mut map = Vec::new();
    for region in ram.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        if start == 0 {
            map.extend([
                (0, LOW_RAM_END),
                (KERNEL_MIN, end.saturating_sub(KERNEL_MIN)),
            ]);
        } else {
            map.push((start, end - start));
        }
    }
    map
}

fn store_cmdline(ram: &GuestRam, boot: &Boot) -> Result<(), Error> {
    let bad = |e: linux_loader::cmdline::Error| {
        Error::Usage(format!(
            "--cmdline: {e}; it has at most {} bytes",
            CMDLINE_MAX - 1
        ))
    };
    let mut line = Cmdline::new(CMDLINE_MAX).map_err(bad)?;
    line.insert_str(boot.cmdline).map_err(bad)?;
    if boot.disk {
        let at = GuestAddress(VIRTIO_MMIO);
        line.add_virtio_mmio_device(VIRTIO_MMIO_LEN, at, BLOCK_IRQ, None)
            .map_err(bad)?;
    }
    load_cmdline(ram, GuestAddress(CMDLINE), &line)
        .map_err(|e| Error::Usage(format!("--cmdline: {e}; give plain text")))
}

/// Loads the initrd as high as it may lie in the low region: address and size.
fn load_initrd(
    ram: &GuestRam,
    boot: &Boot,
    kernel_end: u64,
    max: u64,
) -> Result<Option<(u64, u64)>, Error> {
    let Some(path) = boot.initrd else {
        return Ok(None);
    };
    let bad = |why: String| bad_file("--initrd", path, why);
    let mut file = open(path, "--initrd")?;
    let size = file
        .seek(SeekFrom::End(0))
        .map_err(|e| bad(format!("{e}; check the file")))?;
    file.rewind()
        .map_err(|e| bad(format!("{e}; check the file")))?;
    let low_end = ram.iter().next().map_or(0, |r| r.start_addr().0 + r.len());
    let at = low_end
        .min(max.saturating_add(1))
        .checked_sub(size)
        .map(|at| at & !(PAGE - 1));
    let Some(at) = at.filter(|at| *at >= kernel_end.max(KERNEL_MIN)) else {
        return Err(bad(format!(
            "{size} bytes do not fit beside the kernel; try a larger --mem"
        )));
    };
    let len = usize::try_from(size).map_err(|e| bad(format!("{e}; give a smaller file")))?;
    ram.read_exact_volatile_from(GuestAddress(at), &mut file, len)
        .map_err(|e| bad(format!("{e}; check the file")))?;
    Ok(Some((at, size)))
}

fn open(path: &Path, option: &'static str) -> Result<File, Error> {
    let fail = |why| Error::OpenFile {
        option,
        path: path.to_owned(),
        why,
    };
    // Looked at before it is opened: opening a FIFO waits for its other end.
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        return Err(fail(std::io::Error::other("not a regular file")));
    }
    File::open(path).map_err(fail)
}

fn bad_file(option: &'static str, path: &Path, why: String) -> Error {
    Error::Kernel {
        option,
        path: path.to_owned(),
        why,
    }
}
