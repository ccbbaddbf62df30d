//! [`locate`]: the place in guest memory of a vCPU's failed access.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// The place of a failed access in guest memory, from [`locate`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FaultLocation<'a, R> {
    /// The region that contains the first byte.
    pub region: &'a R,
    /// The offset of the first byte in the region.
    pub offset: MemoryRegionAddress,
    /// The number of bytes of the access in the region. It is 0 for an access of 0 bytes.
    pub len: u64,
    /// Whether the first byte is accessible: not in an unplugged block.
    pub is_accessible: bool,
}

/// Finds the region of a guest physical address at which KVM could not access memory.
///
/// `KVM_RUN` fails with `EFAULT` or `EHWPOISON` if a page of a slot cannot be accessed. The file of
/// the page was truncated, or its memory has an error. Or the guest uses a page as private that is
/// shared, or the reverse. kvm-ioctls returns the address and the size as
/// `VcpuExit::MemoryFault`, if KVM tells them (`KVM_CAP_MEMORY_FAULT_INFO`). If KVM emulates the
/// instruction, it exits as for memory without a slot: with `VcpuExit::MmioRead` or
/// `VcpuExit::MmioWrite`.
///
/// Returns `None` if no region contains the first byte.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap, MemoryRegionAddress};
/// use vm_memory_kvm::locate;
///
/// let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x10_0000), 0x4000)];
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
/// // VcpuExit::MemoryFault { gpa: 0x10_3000, size: 0x2000, .. }
/// let place = locate(&memory, GuestAddress(0x10_3000), 0x2000).ok_or("a hole")?;
/// assert_eq!((place.offset, place.len), (MemoryRegionAddress(0x3000), 0x1000));
/// assert!(locate(&memory, GuestAddress(0x4000), 0x1000).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "KVM_EXIT_MEMORY_FAULT")]
#[doc(alias = "EFAULT")]
pub fn locate<M>(memory: &M, addr: GuestAddress, size: u64) -> Option<FaultLocation<'_, M::R>>
where
    M: GuestMemoryBackend + ?Sized,
{
    let (region, offset) = memory.to_region_addr(addr)?;
    Some(FaultLocation {
        region,
        offset,
        len: region.len().saturating_sub(offset.0).min(size),
        is_accessible: region.reachable_bytes(offset, 1) != 0,
    })
}
