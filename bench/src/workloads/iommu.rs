//! The IOTLB, and translated memory.

use std::hint::black_box;
use std::sync::{RwLock, RwLockReadGuard};

use anyhow::{bail, ensure, Result};

use super::kinds::{memory, Plain};
use super::vm_memory::iommu::{Error, IovaRange};
use super::vm_memory::iommu::{Iommu, IommuMemory, Iotlb, IotlbIterator};
use super::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
use crate::comparison::Batch;
use crate::layout::Layout;
use crate::shared_pages::SharedPages;
use crate::workload_shapes::{Mappings, PAGE};

fn iotlb(mappings: Mappings) -> Result<Iotlb> {
    let mut iotlb = Iotlb::new();
    for (iova, physical) in mappings.pages() {
        iotlb.set_mapping(
            GuestAddress(iova),
            GuestAddress(physical),
            PAGE,
            Permissions::ReadWrite,
        )?;
    }
    Ok(iotlb)
}

/// A lookup of 8 mapped bytes, and the consumption of its iterator.
pub fn hit(mappings: Mappings) -> Result<Batch> {
    let iotlb = iotlb(mappings)?;
    let addresses = mappings.addresses(8);
    Ok(Batch::of(move |number| {
        let iova = black_box(GuestAddress(addresses.at(number)));
        Iotlb::lookup(&iotlb, iova, 8, Permissions::Read).map(|segments| {
            for segment in segments {
                black_box(segment);
            }
        })
    }))
}

/// A lookup of 16 pages that are mapped to 16 separate places.
pub fn hit_64k(mappings: Mappings) -> Result<Batch> {
    let iotlb = iotlb(mappings)?;
    let addresses = mappings.addresses(16 * PAGE);
    let segments = Iotlb::lookup(
        &iotlb,
        GuestAddress(addresses.at(0)),
        16 * PAGE,
        Permissions::Read,
    );
    match segments {
        Ok(segments) => {
            let segments = segments.count();
            ensure!(segments == 16 || segments == 17, "{segments} segments");
        }
        Err(fails) => bail!("not mapped: {fails:?}"),
    }
    Ok(Batch::of(move |number| {
        let iova = black_box(GuestAddress(addresses.at(number)));
        Iotlb::lookup(&iotlb, iova, black_box(16 * PAGE), Permissions::Read).map(|segments| {
            for segment in segments {
                black_box(segment);
            }
        })
    }))
}

/// A lookup of 8 bytes in a hole between mappings.
pub fn miss(mappings: Mappings) -> Result<Batch> {
    let iotlb = iotlb(mappings)?;
    let addresses = mappings.holes();
    Ok(Batch::of(move |number| {
        let iova = black_box(GuestAddress(addresses.at(number)));
        Iotlb::lookup(&iotlb, iova, 8, Permissions::Read).err()
    }))
}

/// Unmaps a page of an IOTLB behind a lock, and maps it again.
pub fn remap(mappings: Mappings) -> Result<Batch> {
    let iotlb = Locked(RwLock::new(iotlb(mappings)?));
    let pages: Vec<_> = mappings.pages().collect();
    let addresses = mappings.addresses(8);
    let first = pages.first().map_or(0, |page| page.0);
    Ok(Batch::of(move |number| {
        let page = (addresses.at(number) - first) as usize / PAGE;
        let (iova, to) = *pages.get(page)?;
        iotlb.remap(GuestAddress(iova), GuestAddress(to))
    }))
}

/// An IOMMU as vhost-user back ends write it: a lock around an IOTLB.
#[derive(Debug)]
pub struct Locked(RwLock<Iotlb>);

impl Locked {
    /// Unmaps a page and maps it again.
    pub fn remap(&self, iova: GuestAddress, to: GuestAddress) -> Option<()> {
        let mut iotlb = self.0.write().ok()?;
        iotlb.invalidate_mapping(iova, PAGE);
        iotlb
            .set_mapping(iova, to, PAGE, Permissions::ReadWrite)
            .ok()
    }
}

impl Iommu for Locked {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let iotlb = match self.0.read() {
            Ok(iotlb) => iotlb,
            Err(poisoned) => poisoned.into_inner(),
        };
        Iotlb::lookup(iotlb, iova, length, access).map_err(|_| Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason: "not mapped".to_owned(),
        })
    }
}

pub fn translated(
    shared: &SharedPages,
    mappings: Mappings,
    enabled: bool,
) -> Result<IommuMemory<GuestMemoryMmap, Locked>> {
    let iommu = Locked(RwLock::new(iotlb(mappings)?));
    let physical = memory::<Plain>(shared, Layout::apart(1))?;
    Ok(IommuMemory::new(physical, iommu, enabled, ()))
}

pub fn read_obj(shared: &SharedPages, mappings: Mappings) -> Result<Batch> {
    let memory = translated(shared, mappings, true)?;
    let addresses = mappings.addresses(8);
    Ok(Batch::of(move |number| {
        memory.read_obj::<u64>(black_box(GuestAddress(addresses.at(number))))
    }))
}

pub fn read_obj_switched_off(shared: &SharedPages, mappings: Mappings) -> Result<Batch> {
    let memory = translated(shared, mappings, false)?;
    let addresses = Layout::apart(1).addresses(8, 8);
    Ok(Batch::of(move |number| {
        memory.read_obj::<u64>(black_box(GuestAddress(addresses.at(number))))
    }))
}
