//! The state before an operation, as the harness tracks it independently of both crates.

use crate::machine::Extent;
use crate::model::allows;
use crate::op::{Kind, Op, Perm, TlbAct};
use crate::out::{Fault, Out};

/// The first number that is not an address.
pub const TOP: u128 = 1 << 64;

/// A mapping with its last address, because its end may be 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub first: u64,
    pub last: u64,
    pub gpa: u64,
    pub perm: Perm,
}

/// The expected mappings of an IOTLB: a slow and simple model.
#[derive(Clone, Debug, Default)]
pub struct TlbModel {
    /// Ascending, without overlap.
    pub mappings: Vec<Mapping>,
}

/// Returns the first and last address of a range, if it is not empty and does not pass 2^64.
pub fn closed(base: u64, len: usize) -> Option<(u64, u64)> {
    let last = base.checked_add((len as u64).checked_sub(1)?)?;
    Some((base, last))
}

impl TlbModel {
    /// Returns the mapped ranges.
    pub fn extents(&self) -> Vec<Extent> {
        self.mappings
            .iter()
            .map(|m| Extent {
                base: m.first,
                len: (m.last - m.first).saturating_add(1),
            })
            .collect()
    }

    /// Unmaps `first..=last`.
    pub fn cut(&mut self, first: u64, last: u64) {
        let mut left = Vec::new();
        for m in self.mappings.drain(..) {
            if m.last < first || m.first > last {
                left.push(m);
                continue;
            }
            if m.first < first {
                left.push(Mapping {
                    last: first - 1,
                    ..m
                });
            }
            if m.last > last {
                let skipped = last + 1 - m.first;
                left.push(Mapping {
                    first: last + 1,
                    gpa: m.gpa.wrapping_add(skipped),
                    ..m
                });
            }
        }
        self.mappings = left;
    }

    /// Maps `first..=last`, and replaces older mappings.
    pub fn set(&mut self, first: u64, last: u64, gpa: u64, perm: Perm) {
        self.cut(first, last);
        let at = self.mappings.partition_point(|m| m.first < first);
        self.mappings.insert(
            at,
            Mapping {
                first,
                last,
                gpa,
                perm,
            },
        );
    }

    /// Returns the misses and refusals of an access to `first..=last`.
    pub fn fails(&self, first: u64, last: u64, perm: Perm) -> Fault {
        let length = |from: u64, to: u64| ((to - from) as usize).saturating_add(1);
        let (mut misses, mut access_fails) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        for m in self
            .mappings
            .iter()
            .filter(|m| m.last >= first && m.first <= last)
        {
            let (from, to) = (m.first.max(first), m.last.min(last));
            if let Some(gap) = next.filter(|next| *next < from) {
                misses.push((gap, length(gap, from - 1)));
            }
            if !allows(m.perm, perm) {
                access_fails.push((from, length(from, to)));
            }
            next = to.checked_add(1);
        }
        if let Some(gap) = next.filter(|next| *next <= last) {
            misses.push((gap, length(gap, last)));
        }
        Fault::Unmapped {
            misses,
            access_fails,
        }
    }

    /// Returns whether these mappings are equal, regardless of their division into ranges.
    pub fn same_as(&self, others: &[Mapping]) -> bool {
        fn joined(mappings: &[Mapping]) -> Vec<Mapping> {
            let mut all: Vec<Mapping> = Vec::new();
            for m in mappings {
                match all.last_mut() {
                    Some(before)
                        if before.last.checked_add(1) == Some(m.first)
                            && before.perm == m.perm
                            && before.gpa.wrapping_add(m.first - before.first) == m.gpa =>
                    {
                        before.last = m.last;
                    }
                    _ => all.push(*m),
                }
            }
            all
        }
        joined(&self.mappings) == joined(others)
    }

    /// Applies an act that succeeded.
    pub fn note(&mut self, act: &TlbAct, out: &Out) {
        match *act {
            TlbAct::SetMapping {
                iova,
                gpa,
                len,
                perm,
            } if *out == Out::Nothing => {
                if let Some((first, last)) = closed(iova, len) {
                    self.set(first, last, gpa, perm);
                }
            }
            TlbAct::Invalidate { iova, len } if len > 0 => {
                self.cut(iova, iova.saturating_add(len as u64 - 1));
            }
            TlbAct::InvalidateAll => self.mappings.clear(),
            _ => {}
        }
    }
}

/// The bytes and the granularity of the first bitmap of an `IommuMemory`.
pub const DEFAULT_IOMMU_BITMAP: (usize, usize) = (1 << 16, 4096);

/// The state that the harness tracks.
#[derive(Clone, Debug)]
pub struct Context {
    pub kind: Kind,
    /// The regions of the current collection.
    pub extents: Vec<Extent>,
    /// Whether any region so far was empty, or passed 2^64.
    pub has_odd_regions: bool,
    /// The regions of the collection in the `GuestMemoryAtomic`.
    pub published: Vec<Extent>,
    /// The regions of the collection that was kept.
    pub kept: Option<Vec<Extent>>,
    /// The regions of the backend of the `IommuMemory`.
    pub backend: Vec<Extent>,
    pub iommu_enabled: bool,
    /// The bytes and the granularity of the bitmap of the `IommuMemory`.
    pub iommu_bitmap: (usize, usize),
    /// The IOTLB of the `IommuMemory`.
    pub tlb: TlbModel,
    /// The separate IOTLB.
    pub alone: TlbModel,
}

impl Default for Context {
    fn default() -> Self {
        Context {
            kind: Kind::MmapPlain,
            extents: Vec::new(),
            has_odd_regions: false,
            published: Vec::new(),
            kept: None,
            backend: Vec::new(),
            iommu_enabled: true,
            iommu_bitmap: DEFAULT_IOMMU_BITMAP,
            tlb: TlbModel::default(),
            alone: TlbModel::default(),
        }
    }
}

impl Context {
    /// Applies an operation.
    pub fn note(&mut self, op: &Op, out: &Out, extents: Vec<Extent>) {
        self.extents = extents;
        let odd = |e: &Extent| e.len == 0 || u128::from(e.base) + u128::from(e.len) > TOP;
        self.has_odd_regions |= self.extents.iter().any(odd);
        match *op {
            Op::Build(ref layout) if *out == Out::Nothing => {
                self.kind = layout.kind;
                self.published = self.extents.clone();
                self.backend = self.extents.clone();
                self.kept = None;
                self.iommu_enabled = true;
                self.iommu_bitmap = DEFAULT_IOMMU_BITMAP;
                self.tlb.mappings.clear();
            }
            Op::Publish => self.published = self.extents.clone(),
            Op::Keep { .. } => self.kept = Some(self.published.clone()),
            Op::Forget => self.kept = None,
            Op::NewIommu {
                enabled,
                bytes,
                page,
            } if *out == Out::Nothing => {
                self.backend = self.extents.clone();
                self.iommu_enabled = enabled;
                self.iommu_bitmap = (bytes, page);
                self.tlb.mappings.clear();
            }
            Op::EnableIommu { on } => self.iommu_enabled = on,
            Op::ReplaceBackend => self.backend = self.extents.clone(),
            Op::Tlb {
                alone: true,
                ref act,
            } => self.alone.note(act, out),
            Op::Tlb {
                alone: false,
                ref act,
            } => self.tlb.note(act, out),
            _ => {}
        }
    }

    /// Returns whether the bitmap of the `IommuMemory`, if it has one, covers all of the bytes.
    pub fn iommu_tracks(&self, iova: u64, len: usize) -> bool {
        let (bytes, page) = self.iommu_bitmap;
        let has_bitmap = match self.kind {
            Kind::MmapPlain | Kind::Device => false,
            Kind::MmapMaybe => page > 0,
            Kind::MmapTracked | Kind::Own => true,
        };
        let page = page.max(1) as u128;
        let end = u128::from(iova) + len as u128;
        !has_bitmap || len == 0 || (end - 1) / page < (bytes as u128).div_ceil(page)
    }
}
