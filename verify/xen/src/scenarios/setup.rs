//! Regions and memories that the scenarios use.

use std::fs::File;

use vm_memory::bitmap::NewBitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRange, MmapRegion, MmapXenFlags,
};

use crate::double::Call;
use crate::environment::{mapped, Access, Environment, PAGE};
use crate::outcome::{Outcome, Stop};

/// The bit that marks the address of a granted page.
pub const GRANTED: u64 = 1 << 63;

/// The first reference of most scenarios.
pub const FIRST: u32 = 32;

/// Returns a length or an offset as a part of a guest address.
pub fn long(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("a usize fits into 64 bits")
}

/// Returns the guest address of a byte that is `offset` bytes after the start of a granted page.
pub fn grant_address(reference: u32, offset: usize) -> GuestAddress {
    GuestAddress((GRANTED | u64::from(reference) << 12) + long(offset))
}

/// Returns the flags of a region that is mapped in advance.
pub fn advance() -> u32 {
    MmapXenFlags::GRANT.bits()
}

/// Returns the flags of a region that is mapped at each access.
pub fn lazy_flags() -> u32 {
    (MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP).bits()
}

/// Returns a range of a device.
pub fn range(
    device: &File,
    at: GuestAddress,
    size: usize,
    flags: u32,
    domain: u32,
) -> Outcome<MmapRange> {
    let file = FileOffset::new(device.try_clone()?, 0);
    Ok(MmapRange::new(size, Some(file), at, flags, domain))
}

/// Returns a memory of one region.
pub fn memory<B: NewBitmap>(range: MmapRange, at: GuestAddress) -> Outcome<GuestMemoryMmap<B>> {
    let region = MmapRegion::from_range(range)?;
    Ok(GuestMemoryMmap::from_regions(vec![at_address(region, at)])?)
}

/// Returns a region at a guest address.
pub fn at_address<B: NewBitmap>(region: MmapRegion<B>, at: GuestAddress) -> GuestRegionMmap<B> {
    GuestRegionMmap::new(region, at).expect("the region does not pass the last address")
}

/// Grants the first `pages` pages of the domain, by consecutive references.
pub fn grant_run(env: &mut dyn Environment, first: u32, pages: usize, access: Access) {
    for (reference, page) in (first..).zip(0..pages) {
        env.grant(reference, page, access);
    }
}

/// Returns memory of `pages` pages that is mapped at each access, and begins with a reference.
pub fn lazy<B: NewBitmap>(
    env: &dyn Environment,
    device: &File,
    reference: u32,
    pages: usize,
) -> Outcome<GuestMemoryMmap<B>> {
    let at = grant_address(reference, 0);
    let range = range(device, at, pages * PAGE, lazy_flags(), env.domain())?;
    memory(range, at)
}

/// Grants pages for reading and writing, and returns memory that is mapped at each access.
pub fn granted_lazy(env: &mut dyn Environment, pages: usize) -> Outcome<(File, GuestMemoryMmap)> {
    grant_run(env, FIRST, pages, Access::ReadWrite);
    let device = env.gntdev()?;
    let memory = lazy(env, &device, FIRST, pages)?;
    Ok((device, memory))
}

/// Returns bytes that differ from their neighbours.
pub fn pattern(len: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from(at % 251).expect("the remainder fits");
    (0..len).map(byte).collect()
}

/// Returns bytes of the domain's memory, at an offset in a page.
pub fn seen(env: &dyn Environment, page: usize, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    env.read(page, offset, &mut bytes);
    bytes
}

/// Requires that no grant is mapped.
pub fn assert_released(env: &dyn Environment, when: &str) {
    let mapped = mapped(env);
    assert!(mapped.is_empty(), "{when}, {mapped:?} are mapped");
}

/// Forgets the calls so far, if the environment counts them.
pub fn forget_calls(env: &mut dyn Environment) {
    if let Some(double) = env.as_double() {
        double.forget_calls();
    }
}

/// Requires that the devices got these calls, if the environment counts them. After an injected
/// fault, there may be others.
pub fn assert_calls(env: &mut dyn Environment, expected: &[Call], what: &str) {
    if let Some(double) = env.as_double().filter(|double| !double.is_injected()) {
        assert_eq!(double.calls(), expected, "calls of {what}");
    }
}

/// Returns the calls of an access to the pages of consecutive references.
pub fn calls_of_access(first: u32, pages: u32, writing: bool) -> Vec<Call> {
    let len = usize::try_from(pages).expect("the number fits") * PAGE;
    vec![
        Call::MapGrants((first..first + pages).collect()),
        Call::Mmap { len, writing },
        Call::Munmap(len),
        Call::UnmapGrants(pages),
    ]
}

/// Makes an access that cannot return an error.
///
/// # Errors
///
/// Ends the scenario if the environment has injected a fault into the access.
pub fn silent<T>(env: &mut dyn Environment, access: impl FnOnce() -> T) -> Outcome<T> {
    let result = access();
    match env.as_double() {
        Some(double) if double.is_injected() => Err(Stop::Error {
            errno: double.injected_errno(),
            text: "the environment injected a fault".to_owned(),
        }),
        _ => Ok(result),
    }
}

/// Ends a scenario that does not apply to an environment.
pub fn skip(reason: &str) -> Stop {
    Stop::Skipped(reason.to_owned())
}
