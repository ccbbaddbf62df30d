//! A domain that is created and never runs. The test controls its memory and its grant table.
//!
//! The hypercalls are those of Xen 4.17, the version in Debian 12. Another version refuses them,
//! because each contains the version of its interface.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU8, Ordering};

use super::privcmd::{address, Mapping, Privcmd};
use crate::environment::{Access, InUse};

const MEMORY_OP: u64 = 12;
const POPULATE_PHYSMAP: u64 = 6;
const DOMCTL: u64 = 36;
const DOMCTL_VERSION: u32 = 0x15;
const CREATE: u32 = 1;
const DESTROY: u32 = 2;
const MAX_MEMORY: u32 = 11;

/// Hardware virtualization, with nested paging.
const FLAGS_HVM: u32 = 3;
const EMULATE_LAPIC: u32 = 1;

/// The frames of the grant table, with 512 references each.
const TABLE_FRAMES: usize = 1;
/// The size of an entry of the grant table.
const ENTRY: usize = 8;

/// The flags of an entry in the grant table.
const PERMIT_ACCESS: u16 = 1;
const READ_ONLY: u16 = 1 << 2;
const READING: u16 = 1 << 3;
const WRITING: u16 = 1 << 4;

/// The maximum number of attempts to destroy a domain. Each attempt does a part.
const MAX_ATTEMPTS: usize = 1000;

/// The kind of frames that address the domain's memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Frames of the machine: x86 paravirtualization.
    Paravirtual,
    /// Frames of the domain's own physical memory.
    Translated,
}

/// The argument of a domain control hypercall.
#[repr(C)]
struct Control {
    command: u32,
    version: u32,
    domain: u16,
    reserved: [u16; 3],
    /// The largest of the commands' own structures has 128 bytes.
    body: [u64; 16],
}

/// The argument of `XENMEM_populate_physmap`.
#[repr(C)]
struct Reservation {
    extents: *mut u64,
    count: u64,
    order: u32,
    flags: u32,
    domain: u16,
}

/// A domain, which is destroyed on drop.
#[derive(Debug)]
pub struct Domain {
    privcmd: Privcmd,
    id: u16,
    frames: Range<u64>,
    memory: Option<Mapping>,
    table: Option<Mapping>,
}

impl Domain {
    /// Creates a domain with `1 << order` contiguous pages.
    ///
    /// # Errors
    ///
    /// Returns the error of the hypercall or request that fails, with its name.
    pub fn new(kind: Kind, order: u32) -> io::Result<Self> {
        let privcmd = Privcmd::open()?;
        let id = create(&privcmd, kind).map_err(|error| named("create", &error))?;
        let mut domain = Self {
            privcmd,
            id,
            frames: 0..0,
            memory: None,
            table: None,
        };
        let control = |command, body: &[u64]| domain_control(&domain.privcmd, id, command, body);
        control(MAX_MEMORY, &[64 << 10]).map_err(|error| named("set the memory of", &error))?;
        let first = populate(&domain.privcmd, id, kind, order)
            .map_err(|error| named("populate", &error))?;
        domain.frames = first..first + (1 << order);
        let memory = domain.privcmd.map_frames(id, first, 1 << order);
        domain.memory = Some(memory.map_err(|error| named("map the memory of", &error))?);
        let table = domain.privcmd.map_grant_table(id, TABLE_FRAMES);
        domain.table = Some(table.map_err(|error| named("map the grant table of", &error))?);
        Ok(domain)
    }

    /// Returns the number of the domain.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Returns the frames of the domain's pages.
    pub fn frames(&self) -> Range<u64> {
        self.frames.clone()
    }

    /// Writes an entry of the grant table, as the domain would: domain 0 may map `page`.
    pub fn grant(&self, reference: u32, page: usize, access: Access) {
        let frame = self.frames.clone().nth(page).expect("the page exists");
        let flags = match access {
            Access::ReadOnly => PERMIT_ACCESS | READ_ONLY,
            Access::ReadWrite => PERMIT_ACCESS,
        };
        let entry = self.entry(reference);
        let frame = u32::try_from(frame).expect("an entry has 32 bits for the frame");
        entry.frame.store(frame, Ordering::Relaxed);
        entry.domain.store(0, Ordering::Relaxed);
        // Release: the hypervisor must not see the permission before the frame.
        entry.flags.store(flags, Ordering::Release);
    }

    /// Clears the permission of an entry. The bits that the hypervisor wrote stay.
    pub fn revoke(&self, reference: u32) {
        let flags = self.entry(reference).flags;
        flags.fetch_and(READING | WRITING, Ordering::SeqCst);
    }

    /// Returns the use of a grant that the hypervisor recorded.
    pub fn in_use(&self, reference: u32) -> InUse {
        let flags = self.entry(reference).flags.load(Ordering::SeqCst);
        InUse {
            reading: flags & READING != 0,
            writing: flags & WRITING != 0,
        }
    }

    /// Reads bytes of the domain's memory at `offset`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        for (cell, byte) in self.cells(offset, bytes.len()).zip(bytes) {
            *byte = cell.load(Ordering::Relaxed);
        }
    }

    /// Writes bytes to the domain's memory at `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        for (cell, byte) in self.cells(offset, bytes.len()).zip(bytes) {
            cell.store(*byte, Ordering::Relaxed);
        }
    }

    fn cells(&self, offset: usize, len: usize) -> impl Iterator<Item = &AtomicU8> {
        let memory = self.memory.as_ref().expect("the domain has memory");
        assert!(len <= memory.len() && offset <= memory.len() - len);
        (offset..offset + len).map(|at| {
            // SAFETY: the assertion leaves `at` in the mapping, which lives as long as `self`.
            let byte = unsafe { memory.as_ptr().add(at) };
            // SAFETY: the byte is in a live mapping. Everything else that writes it does so
            // through another mapping, or in the hypervisor.
            unsafe { AtomicU8::from_ptr(byte) }
        })
    }

    fn entry(&self, reference: u32) -> Entry<'_> {
        let table = self.table.as_ref().expect("the domain has a grant table");
        let offset = usize::try_from(reference).map_or(usize::MAX, |index| index * ENTRY);
        assert!(offset < table.len(), "the table has no entry {reference}");
        // SAFETY: the entry begins before the end of the table, whose length is a multiple of an
        // entry's.
        let start = unsafe { table.as_ptr().add(offset) };
        // SAFETY: the entry begins at a multiple of 8 bytes of a page, and the table lives as long
        // as `self`. The hypervisor writes the flags with atomic instructions.
        let flags = unsafe { AtomicU16::from_ptr(start.cast()) };
        // SAFETY: bytes 2 and 3 of the entry, in the table.
        let domain = unsafe { start.add(2) };
        // SAFETY: the address is a multiple of 2, and the table lives as long as `self`.
        let domain = unsafe { AtomicU16::from_ptr(domain.cast()) };
        // SAFETY: bytes 4 to 7 of the entry, in the table.
        let frame = unsafe { start.add(4) };
        // SAFETY: the address is a multiple of 4, and the table lives as long as `self`.
        let frame = unsafe { AtomicU32::from_ptr(frame.cast()) };
        Entry {
            flags,
            domain,
            frame,
        }
    }
}

/// An entry of the grant table, version 1.
struct Entry<'a> {
    flags: &'a AtomicU16,
    domain: &'a AtomicU16,
    frame: &'a AtomicU32,
}

impl Drop for Domain {
    fn drop(&mut self) {
        // The hypervisor keeps a domain while a page of it is mapped.
        (self.memory, self.table) = (None, None);
        for _ in 0..MAX_ATTEMPTS {
            match domain_control(&self.privcmd, self.id, DESTROY, &[]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => break,
            }
        }
    }
}

fn named(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {what} a domain: {error}"))
}

/// Makes a domain control hypercall, and returns the number of its domain.
fn domain_control(privcmd: &Privcmd, id: u16, command: u32, body: &[u64]) -> io::Result<u16> {
    let mut control = Control {
        command,
        version: DOMCTL_VERSION,
        domain: id,
        reserved: [0; 3],
        body: [0; 16],
    };
    control.body[..body.len()].copy_from_slice(body);
    privcmd.hypercall(DOMCTL, [address(&mut control), 0])?;
    // The hypervisor wrote through the address, not through the variable.
    Ok(std::hint::black_box(control).domain)
}

fn create(privcmd: &Privcmd, kind: Kind) -> io::Result<u16> {
    let flags = match kind {
        Kind::Paravirtual => 0,
        Kind::Translated => FLAGS_HVM,
    };
    let emulation = match kind {
        Kind::Translated if cfg!(target_arch = "x86_64") => EMULATE_LAPIC,
        // On Arm: the interrupt controller of the machine, and no trusted environment.
        _ => 0,
    };
    // `struct xen_domctl_createdomain` in words:
    // - security label, handle, flags, options of the IOMMU, virtual CPUs, event channels,
    // - frames of the grant table, frames of the table of mapped grants, version of grants,
    // - trace, CPU pool, architecture.
    let words = [
        0, 0, 0, 0, 0, flags, 0, 1, 1023, 1, 4, 1, 0, 0, emulation, 0,
    ];
    let mut body = [0u64; 8];
    for (pair, word) in body.iter_mut().zip(words.chunks_exact(2)) {
        *pair = u64::from(word[0]) | u64::from(word[1]) << 32;
    }
    domain_control(privcmd, 0, CREATE, &body)
}

/// Gives `1 << order` contiguous pages to the domain, and returns the first one's frame.
fn populate(privcmd: &Privcmd, id: u16, kind: Kind, order: u32) -> io::Result<u64> {
    let mut extent = [match kind {
        Kind::Paravirtual => 0u64,
        Kind::Translated if cfg!(target_arch = "x86_64") => 0x100,
        // 0x100 pages after the start of guest memory on Arm.
        Kind::Translated => 0x40100,
    }];
    let mut reservation = Reservation {
        extents: extent.as_mut_ptr(),
        count: 1,
        order,
        flags: 0,
        domain: id,
    };
    let arguments = [POPULATE_PHYSMAP, address(&mut reservation)];
    let populated = privcmd.hypercall(MEMORY_OP, arguments)?;
    if populated != 1 {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    Ok(std::hint::black_box(extent)[0])
}
