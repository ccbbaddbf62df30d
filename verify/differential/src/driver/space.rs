//! Guest memory with one type of region, and the objects created from it.

use std::sync::Arc;

use super::asks::{ask, ask_any, ask_region};
use super::fault::{Hosts, IntoFault};
use super::kinds::{self, set_words, words_of, Bits, Kind, LARGEST_REGION};
use super::slices::{walk, ActJob, Paths, SliceJob, TouchJob};
use super::tlb::{self, Remapper};
use super::touch::touch;
use super::vm;
use crate::context::{Mapping, DEFAULT_IOMMU_BITMAP};
use crate::host::{stream, HostRange};
use crate::machine::{Extent, Placed, RegionState, State};
use crate::op::{
    Access, How, Kind as KindName, Layout, Op, Path, Question, RegionSpec, Root, Target, Walk,
};
use crate::out::{Fault, Out};
use vm::bitmap::AtomicBitmap;
use vm::iommu::Iotlb;
use vm::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryRegion, GuestRegionCollection, IommuMemory, MemoryRegionAddress, MmapRegion,
    VolatileMemory, VolatileSlice,
};

/// The length of the buffer that has no bitmap.
const BUFFER_BYTES: usize = 8192;
/// The maximum number of removed regions that the machine keeps.
const MOST_REMOVED: usize = 2;

/// A [`SpaceOf`] with any type of region.
pub(super) trait Space {
    fn apply(&mut self, op: &Op) -> Out;
    fn extents(&self) -> Vec<Extent>;
    fn reach(&self, on: &Target) -> Vec<Placed>;
    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64>;
    fn mappings(&self) -> Vec<Mapping>;
    fn state(&self) -> State;
    fn set_bits(&mut self, region: usize, words: &[u64]);
    fn set_iommu_bits(&mut self, words: &[u64]);
    fn forget_mappings(&mut self);
}

type Collection<K> = GuestRegionCollection<<K as Kind>::R>;

/// Guest memory with one type of region, and the objects created from it.
pub(super) struct SpaceOf<K: Kind> {
    memory: Collection<K>,
    published: GuestMemoryAtomic<Collection<K>>,
    /// The collection in `published`, for access to its regions.
    seen: Collection<K>,
    kept: Option<Arc<Collection<K>>>,
    removed: Vec<Arc<K::R>>,
    iommu: IommuMemory<Collection<K>, Remapper>,
    buffer: MmapRegion<()>,
}

pub(super) fn build(layout: &Layout) -> Result<Box<dyn Space>, Fault> {
    Ok(match layout.kind {
        KindName::MmapPlain => Box::new(SpaceOf::<kinds::Mapped<()>>::build(layout)?),
        KindName::MmapTracked => Box::new(SpaceOf::<kinds::Mapped<AtomicBitmap>>::build(layout)?),
        KindName::MmapMaybe => Box::new(SpaceOf::<kinds::Mapped<Option<AtomicBitmap>>>::build(
            layout,
        )?),
        KindName::Own => Box::new(SpaceOf::<kinds::Own>::build(layout)?),
        KindName::Device => Box::new(SpaceOf::<kinds::Device>::build(layout)?),
    })
}

fn range_of(host: (usize, usize)) -> HostRange {
    #[expect(
        unsafe_code,
        reason = "the harness accesses guest memory by host address"
    )]
    // SAFETY: kinds return the whole mapping of a region that the machine owns; one thread uses it.
    unsafe {
        HostRange::new(host.0, host.1)
    }
}

fn region_of<K: Kind>(spec: &RegionSpec) -> Result<K::R, Fault> {
    let region = K::region(spec)?;
    range_of(K::host(&region)).fill(spec.seed);
    Ok(region)
}

impl<K: Kind> SpaceOf<K> {
    pub(super) fn new(memory: Collection<K>) -> Self {
        let (bytes, page) = DEFAULT_IOMMU_BITMAP;
        let mut space = SpaceOf {
            published: GuestMemoryAtomic::new(memory.clone()),
            seen: memory.clone(),
            kept: None,
            removed: Vec::new(),
            iommu: IommuMemory::new(
                memory.clone(),
                Remapper::new(),
                true,
                K::B::new(bytes, page),
            ),
            memory,
            buffer: MmapRegion::new(BUFFER_BYTES).expect("mapping a buffer"),
        };
        space.buffer_range().fill(0xB0);
        space
    }

    fn build(layout: &Layout) -> Result<Self, Fault> {
        let specs = &layout.regions.0;
        let collection = |made: Result<Collection<K>, vm::GuestRegionCollectionError>| {
            made.map_err(|error| error.fault(&Hosts::default()))
        };
        let regions = || specs.iter().map(region_of::<K>);
        let memory = match layout.how {
            How::FromRegions => collection(GuestRegionCollection::from_regions(
                regions().collect::<Result<_, _>>()?,
            ))?,
            How::FromArcRegions => {
                let regions = regions()
                    .map(|region| region.map(Arc::new))
                    .collect::<Result<_, _>>()?;
                collection(GuestRegionCollection::from_arc_regions(regions))?
            }
            How::OneByOne => {
                let mut memory = GuestRegionCollection::new();
                for region in regions() {
                    memory = collection(memory.insert_region(Arc::new(region?)))?;
                }
                memory
            }
            How::FromRanges | How::FromRangesWithFiles => {
                let made = K::from_ranges(specs, layout.how == How::FromRangesWithFiles);
                let memory = made.ok_or(Fault::Named("not a kind with ranges"))??;
                for (region, spec) in memory.iter().zip(specs) {
                    range_of(K::host(region)).fill(spec.seed);
                }
                memory
            }
        };
        Ok(Self::new(memory))
    }

    fn buffer_range(&mut self) -> HostRange {
        range_of((self.buffer.as_ptr() as usize, BUFFER_BYTES))
    }

    /// Returns the regions to compare, each once. Those of the current collection come first, in
    /// the order of operands.
    fn regions(&self) -> Vec<&K::R> {
        let mut regions: Vec<&K::R> = self.memory.iter().collect();
        let others = self
            .seen
            .iter()
            .chain(self.kept.iter().flat_map(|kept| kept.iter()));
        let others = others
            .chain(self.iommu.get_backend().iter())
            .chain(self.removed.iter().map(|region| &**region));
        for region in others {
            if !regions.iter().any(|known| std::ptr::eq(*known, region)) {
                regions.push(region);
            }
        }
        regions
    }

    fn hosts(&self) -> Hosts {
        let mut hosts: Vec<_> = self
            .regions()
            .iter()
            .map(|region| K::host(region).0)
            .collect();
        hosts.push(self.buffer.as_ptr() as usize);
        Hosts(hosts)
    }

    fn insert(&mut self, spec: &RegionSpec) -> Out {
        let inserted = region_of::<K>(spec).and_then(|region| {
            self.memory
                .insert_region(Arc::new(region))
                .map_err(|error| error.fault(&Hosts::default()))
        });
        Out::of(inserted.map(|memory| self.memory = memory))
    }

    fn remove(&mut self, base: GuestAddress, len: u64) -> Out {
        let (memory, region) = match self.memory.remove_region(base, len) {
            Ok(removed) => removed,
            Err(error) => return Out::Failed(error.fault(&Hosts::default())),
        };
        self.memory = memory;
        let place = Out::All(vec![region.start_addr().0.into(), region.len().into()]);
        self.removed.push(region);
        if self.removed.len() > MOST_REMOVED {
            self.removed.remove(0);
        }
        place
    }

    /// Publishes the current collection through a second handle, as another thread does. Both
    /// handles must see it.
    fn publish(&mut self) -> Out {
        let handle = self.published.clone();
        let before = handle.memory();
        match handle.lock() {
            Ok(guard) => guard.replace(self.memory.clone()),
            Err(_) => return Out::Failed(Fault::Named("poisoned")),
        }
        self.seen = self.memory.clone();
        Out::All(vec![
            before.num_regions().into(),
            self.published.memory().num_regions().into(),
        ])
    }

    fn keep(&mut self, into_inner: bool) -> Out {
        let guard = self.published.memory();
        let other = guard.clone();
        self.kept = Some(if into_inner {
            guard.into_inner()
        } else {
            Arc::new((*guard).clone())
        });
        other.num_regions().into()
    }

    fn new_iommu(&mut self, enabled: bool, bytes: usize, page: usize) -> Out {
        if bytes as u64 > 4 * LARGEST_REGION {
            return Out::NotApplicable;
        }
        let (memory, bitmap) = (self.memory.clone(), K::B::new(bytes, page));
        self.iommu = IommuMemory::new(memory, Remapper::new(), enabled, bitmap);
        Out::Nothing
    }

    fn replace_backend(&mut self) -> Out {
        let before = self.iommu.get_backend().num_regions();
        self.iommu = self.iommu.with_replaced_backend(self.memory.clone());
        let physical = self.iommu.physical_memory();
        Out::All(vec![
            before.into(),
            self.iommu.get_backend().num_regions().into(),
            physical.map(|memory| memory.num_regions()).into(),
        ])
    }

    fn touch(&self, on: &Target, at: u64, access: &Access) -> Out {
        let hosts = self.hosts();
        match on {
            Target::Memory => touch(&self.memory, GuestAddress(at), access, &hosts),
            Target::Published => touch(&*self.published.memory(), GuestAddress(at), access, &hosts),
            Target::Kept => match &self.kept {
                Some(kept) => touch(&**kept, GuestAddress(at), access, &hosts),
                None => Out::NotApplicable,
            },
            Target::Iommu => touch(&self.iommu, GuestAddress(at), access, &hosts),
            Target::OneRegion(index) => match self.memory.iter().nth(*index) {
                Some(region) => touch(region, MemoryRegionAddress(at), access, &hosts),
                None => Out::NotApplicable,
            },
            Target::OneSlice(path) => self.with_slice(path, &mut TouchJob { at, access }),
        }
    }

    fn ask(&self, on: &Target, question: &Question) -> Out {
        let hosts = self.hosts();
        let of_any = matches!(
            question,
            Question::CheckRangeFor { .. } | Question::GetSlicesFor { .. } | Question::HasPhysical
        );
        let both = |memory: &Collection<K>| {
            if of_any {
                ask_any(memory, question, &hosts)
            } else {
                ask(memory, question, &hosts)
            }
        };
        match on {
            Target::Memory => both(&self.memory),
            Target::Published => both(&self.published.memory()),
            Target::Kept => self
                .kept
                .as_ref()
                .map_or(Out::NotApplicable, |kept| both(kept)),
            Target::Iommu => ask_any(&self.iommu, question, &hosts),
            Target::OneRegion(_) | Target::OneSlice(_) => Out::NotApplicable,
        }
    }
}

impl<K: Kind> Paths for SpaceOf<K> {
    fn with_slice(&self, path: &Path, job: &mut impl SliceJob) -> Out {
        let hosts = self.hosts();
        fn go<B: vm::bitmap::BitmapSlice, E: IntoFault>(
            slice: Result<VolatileSlice<'_, B>, E>,
            steps: &[Walk],
            hosts: &Hosts,
            job: &mut impl SliceJob,
        ) -> Out {
            match slice {
                Ok(slice) => walk(&slice, steps, hosts, job),
                Err(error) => Out::Failed(error.fault(hosts)),
            }
        }
        match path.root {
            Root::OfRegion(index) => match self.memory.iter().nth(index) {
                Some(region) => go(region.as_volatile_slice(), &path.steps, &hosts, job),
                None => Out::NotApplicable,
            },
            Root::OfMapping { region, at, len } => {
                match self.memory.iter().nth(region).and_then(K::mapping) {
                    Some(mapping) => go(
                        VolatileMemory::get_slice(mapping, at, len),
                        &path.steps,
                        &hosts,
                        job,
                    ),
                    None => Out::NotApplicable,
                }
            }
            Root::OfMemory { at, len } => go(
                self.memory.get_slice(GuestAddress(at), len),
                &path.steps,
                &hosts,
                job,
            ),
            Root::OfBuffer { len } => go(
                VolatileMemory::get_slice(&self.buffer, 0, len),
                &path.steps,
                &hosts,
                job,
            ),
            Root::OfLocal { len } => {
                let mut local = stream(0xC0, 0, len.min(BUFFER_BYTES));
                let mut hosts = hosts;
                hosts.0.push(local.as_ptr() as usize);
                let out = walk(
                    &VolatileSlice::from(&mut local[..]),
                    &path.steps,
                    &hosts,
                    job,
                );
                Out::All(vec![out, Out::Bytes(local)])
            }
        }
    }
}

impl<K: Kind> Space for SpaceOf<K> {
    fn apply(&mut self, op: &Op) -> Out {
        match *op {
            Op::InsertRegion(ref spec) => self.insert(spec),
            Op::RemoveRegion { base, len } => self.remove(GuestAddress(base), len),
            Op::Publish => self.publish(),
            Op::Keep { into_inner } => self.keep(into_inner),
            Op::Forget => self.kept.take().is_some().into(),
            Op::Touch {
                ref on,
                at,
                ref access,
            } => self.touch(on, at, access),
            Op::Ask {
                ref on,
                ref question,
            } => self.ask(on, question),
            Op::AskRegion {
                region,
                ref question,
            } => match self.memory.iter().nth(region) {
                Some(region) => ask_region(region, question, &self.hosts()),
                None => Out::NotApplicable,
            },
            Op::Volatile { ref path, ref act } => {
                self.with_slice(path, &mut ActJob { paths: self, act })
            }
            Op::Tlb { ref act, .. } => {
                tlb::tlb(&mut self.iommu.iommu().tlb_mut(), act, &self.hosts())
            }
            Op::NewIommu {
                enabled,
                bytes,
                page,
            } => self.new_iommu(enabled, bytes, page),
            Op::EnableIommu { on } => {
                let before = self.iommu.get_iommu_enabled();
                self.iommu.set_iommu_enabled(on);
                Out::All(vec![before.into(), self.iommu.get_iommu_enabled().into()])
            }
            Op::ReplaceBackend => self.replace_backend(),
            Op::CloneIommu => {
                self.iommu = self.iommu.clone();
                self.iommu.get_iommu_enabled().into()
            }
            _ => Out::NotApplicable,
        }
    }

    fn extents(&self) -> Vec<Extent> {
        self.memory
            .iter()
            .map(|region| Extent {
                base: region.start_addr().0,
                len: region.len(),
            })
            .collect()
    }

    fn reach(&self, on: &Target) -> Vec<Placed> {
        let reached: Vec<&K::R> = match on {
            Target::Published => self.seen.iter().collect(),
            Target::Kept => self.kept.iter().flat_map(|kept| kept.iter()).collect(),
            Target::Iommu => self.iommu.get_backend().iter().collect(),
            _ => self.memory.iter().collect(),
        };
        let all = self.regions();
        reached
            .into_iter()
            .map(|region| Placed {
                base: region.start_addr().0,
                len: region.len(),
                place: all
                    .iter()
                    .position(|known| std::ptr::eq(*known, region))
                    .unwrap_or(usize::MAX),
                ram: K::is_ram(region),
            })
            .collect()
    }

    fn words_after(
        &self,
        place: Option<usize>,
        before: &[u64],
        marks: &[(usize, usize)],
    ) -> Vec<u64> {
        let bitmap = match place {
            Some(place) => self
                .regions()
                .get(place)
                .and_then(|region| K::region_bits(region)),
            None => self.iommu.bitmap().atomic(),
        };
        let Some(bitmap) = bitmap.cloned() else {
            return Vec::new();
        };
        set_words(Some(&bitmap), before);
        for (offset, len) in marks {
            vm::bitmap::Bitmap::mark_dirty(&bitmap, *offset, *len);
        }
        words_of(Some(&bitmap))
    }

    fn mappings(&self) -> Vec<Mapping> {
        tlb::mappings(&self.iommu.iommu().tlb_mut())
    }

    fn state(&self) -> State {
        let mut regions: Vec<_> = self
            .regions()
            .into_iter()
            .map(|region| RegionState {
                memory: range_of(K::host(region)),
                bits: words_of(K::region_bits(region)),
                base: region.start_addr().0,
                len: region.len(),
            })
            .collect();
        let buffer = range_of((self.buffer.as_ptr() as usize, BUFFER_BYTES));
        regions.push(RegionState {
            memory: buffer,
            bits: Vec::new(),
            base: 0,
            len: 0,
        });
        State {
            regions,
            iommu: words_of(self.iommu.bitmap().atomic()),
        }
    }

    fn set_bits(&mut self, region: usize, words: &[u64]) {
        if let Some(region) = self.regions().get(region) {
            set_words(K::region_bits(region), words);
        }
    }

    fn set_iommu_bits(&mut self, words: &[u64]) {
        set_words(self.iommu.bitmap().atomic(), words);
    }

    fn forget_mappings(&mut self) {
        *self.iommu.iommu().tlb_mut() = Iotlb::new();
    }
}
