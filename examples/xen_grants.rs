//! A back end for a Xen guest: access buffers that the guest grants for one request, and leave
//! nothing mapped.
//!
//! `cargo run -p examples --features xen --example xen_grants`
//!
//! A guest grants pages to its back end, in another domain. This program is both, on a double of
//! the device `/dev/xen/gntdev`. So it also runs where there is no Xen.

use std::fs::File;

use examples::Result;
use verify_xen::double::Double;
use verify_xen::environment::{mapped, Access, Environment, Host};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{fault, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryError};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap, MmapRange, MmapRegion, MmapXenFlags};
use vm_memory::{Permissions, ReadVolatile};

verify_xen::interpose!();

type Memory = GuestMemoryMmap<AtomicBitmap>;

const PAGE: usize = 4096;

/// The guest address of a byte in the page that the guest grants by `reference`.
fn granted(reference: u32, offset: u64) -> GuestAddress {
    GuestAddress((1 << 63 | u64::from(reference) << 12) + offset)
}

/// Returns the memory of all pages that `domain` grants, now or later. Nothing is mapped yet.
fn memory_of(gntdev: File, domain: u32) -> Result<Memory> {
    let flags = MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP;
    let (start, size) = (granted(0, 0), 1 << 40);
    let device = FileOffset::new(gntdev, 0);
    let range = MmapRange::new(size, Some(device), start, flags.bits(), domain);
    let region = GuestRegionMmap::new(MmapRegion::from_range(range)?, start);
    Ok(Memory::from_regions(vec![region.ok_or("no region")?])?)
}

/// Reads a sector of a disk into the buffer of a request, and sets its status byte.
fn serve(memory: &Memory, header: GuestAddress, data: GuestAddress) -> Result<()> {
    // Mapped once, then accessed without system calls. The drop unmaps it.
    let request = memory.window(header, 16, Permissions::ReadWrite)?;
    let len: u32 = request.read_obj(0)?;

    // Each access maps the pages that it touches, and unmaps them.
    let mut disk: &[u8] = &[0x5a; 3 * PAGE];
    memory.read_exact_volatile_from(data, &mut disk, usize::try_from(len)?)?;

    // Slices for code that uses their pointers, such as `Reader` and `Writer` of virtio-queue.
    let held = memory.held();
    for slice in held.get_slices(data, 8, Permissions::Write)? {
        (&b"header: "[..]).read_exact_volatile(&mut slice?)?;
    }
    request.write_obj(1u8, 15)?;
    Ok(())
}

fn main() -> Result<()> {
    let mut guest = Double::new(Host::AutoTranslated);
    let memory = memory_of(guest.gntdev()?, guest.domain())?;

    // The guest grants the page of a header, and three pages that only the back end may write.
    let (header, data) = (granted(32, 0x40), granted(33, 0x800));
    for (reference, page) in (32..36).zip(0..) {
        guest.grant(reference, page, Access::ReadWrite);
    }
    guest.write(0, 0x40, &(2 * PAGE as u32).to_ne_bytes());
    serve(&memory, header, data)?;
    let mut seen = [0; 16];
    guest.read(1, 0x800, &mut seen);
    assert_eq!(&seen, b"header: ZZZZZZZZ");

    // The guest takes its pages back, which it cannot do while one is mapped.
    assert!(mapped(&guest).is_empty());
    guest.revoke(34);

    // A request names a page that is not granted. The access returns the error of the system, and
    // `fault::last` the address. The pages before it were written, and are unmapped again.
    let error = memory.write_slice(&[1; 2 * PAGE], data).unwrap_err();
    println!("write_slice: {error}");
    let GuestMemoryError::IOError(source) = error else {
        return Err("another error than the operating system's".into());
    };
    assert_eq!(source.raw_os_error(), Some(libc::EINVAL));
    let met = fault::last().ok_or("no fault was recorded")?;
    println!("last fault: {met:x?}");
    assert_eq!(met.guest_address, Some(granted(34, 0)));
    assert_eq!(met.completed, 0x800);
    assert!(memory.window(data, PAGE, Permissions::Read).is_err());
    assert!(serve(&memory, header, data).is_err());
    assert!(mapped(&guest).is_empty());
    Ok(())
}
