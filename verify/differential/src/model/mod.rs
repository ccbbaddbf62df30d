//! A model of accesses by guest address: slow, simple, and independent of both crates. The rules
//! check ours against it where 0.18.0 is wrong. Codes such as B1 are rows of docs/differences.md.

mod operands;
mod streams;

pub use self::operands::{allows, atom_size, found, size_of};
use self::streams::{room_for, system_error, Simulated};
use crate::context::{closed, Context, TOP};
use crate::host::stream;
use crate::machine::Placed;
use crate::op::{Access, Answer, Order, Perm, Question, Sink, Source, Target};
use crate::out::{Fault, Out, Place};

/// Memory and dirty bits before the operation.
#[derive(Clone, Debug)]
pub struct Prior {
    pub memory: Vec<Vec<u8>>,
    pub bits: Vec<Vec<u64>>,
    pub iommu: Vec<u64>,
}

/// The expected result of an operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    pub out: Out,
    /// The writes: region, offset and bytes.
    pub writes: Vec<(usize, usize, Vec<u8>)>,
    /// The marks: region (`None` for the bitmap of the `IommuMemory`), offset and length.
    pub marks: Vec<(Option<usize>, usize, usize)>,
}

impl Expected {
    fn just(out: Out) -> Self {
        Expected {
            out,
            writes: Vec::new(),
            marks: Vec::new(),
        }
    }
}

/// A segment of a range, in one region.
#[derive(Clone, Copy, Debug)]
struct Segment {
    place: usize,
    offset: usize,
    len: usize,
    /// The offset of the marks in the bitmap of the `IommuMemory`.
    iova: Option<u64>,
}

impl Segment {
    /// Returns the mark of `len` bytes that start at `at`.
    fn mark(&self, at: usize, len: usize) -> (Option<usize>, usize, usize) {
        match self.iova {
            Some(iova) => (None, iova as usize + at, len),
            None => (Some(self.place), self.offset + at, len),
        }
    }
}

/// The model of one target.
pub struct Model<'a> {
    context: &'a Context,
    regions: &'a [Placed],
    translated: bool,
    prior: &'a Prior,
}

impl<'a> Model<'a> {
    /// Creates the model of `on` with these regions; `None` if `on` is not guest memory.
    pub fn new(
        context: &'a Context,
        on: &Target,
        regions: &'a [Placed],
        prior: &'a Prior,
    ) -> Option<Self> {
        match on {
            Target::OneRegion(_) | Target::OneSlice(_) => return None,
            Target::Kept if context.kept.is_none() => return None,
            _ => {}
        }
        let translated = *on == Target::Iommu && context.iommu_enabled;
        Some(Model {
            context,
            regions,
            translated,
            prior,
        })
    }

    /// Returns the region that contains the address, and the distance to the end of the region or
    /// to 2^64.
    fn find(&self, at: u64) -> Option<(&Placed, u64, usize)> {
        let region = self
            .regions
            .iter()
            .find(|r| at >= r.base && at - r.base < r.len)?;
        let offset = at - region.base;
        let rest = u128::from(region.len - offset).min(TOP - u128::from(at));
        Some((region, offset, rest as usize))
    }

    /// Returns the segments of a guest physical range, and the fault that ends them early.
    fn physical(&self, at: u64, count: usize, iova: Option<u64>) -> (Vec<Segment>, Option<Fault>) {
        let mut segments = Vec::new();
        let mut done = 0;
        while done < count {
            let address = u128::from(at) + done as u128;
            if address >= TOP {
                return (segments, Some(Fault::GuestAddressOverflow));
            }
            let Some((region, offset, rest)) = self.find(address as u64) else {
                return (segments, Some(Fault::InvalidGuestAddress(address as u64)));
            };
            if !region.ram {
                return (segments, Some(Fault::HostAddressNotAvailable));
            }
            let len = rest.min(count - done);
            let iova = iova.map(|iova| iova + done as u64);
            segments.push(Segment {
                place: region.place,
                offset: offset as usize,
                len,
                iova,
            });
            done += len;
        }
        (segments, None)
    }

    /// Returns the segments of a range and the fault that ends them early, or the fault of the
    /// whole range.
    fn segments(
        &self,
        at: u64,
        count: usize,
        perm: Perm,
    ) -> Result<(Vec<Segment>, Option<Fault>), Fault> {
        if !self.translated || count == 0 {
            return Ok(self.physical(at, count, None));
        }
        let unresolved = Fault::Iommu(Box::new(Fault::CannotResolve {
            base: at,
            len: count,
        }));
        let Some((first, last)) = closed(at, count) else {
            return Err(unresolved);
        };
        if matches!(perm, Perm::Write | Perm::ReadWrite) && !self.context.iommu_tracks(at, count) {
            return Err(Fault::Iommu(Box::new(Fault::IommuMisconfigured)));
        }
        let Some(ranges) = found(&self.context.tlb.mappings, first, last, perm) else {
            return Err(unresolved);
        };
        let mut segments = Vec::new();
        for range in ranges {
            let len = (range.last - range.first + 1) as usize;
            let (more, fault) = self.physical(range.gpa, len, Some(range.first));
            segments.extend(more);
            if fault.is_some() {
                return Ok((segments, fault));
            }
        }
        Ok((segments, None))
    }

    /// Returns the segments before the first fault, or the fault if there are none.
    fn before_fault(&self, at: u64, count: usize, perm: Perm) -> Result<Vec<Segment>, Fault> {
        match self.segments(at, count, perm)? {
            (segments, Some(fault)) if segments.is_empty() => Err(fault),
            (segments, _) => Ok(segments),
        }
    }

    fn read(&self, segments: &[Segment]) -> Vec<u8> {
        segments
            .iter()
            .flat_map(|p| self.prior.memory[p.place][p.offset..p.offset + p.len].to_vec())
            .collect()
    }

    /// Returns the outcome of writing `bytes` to the segments.
    fn written(&self, out: Out, segments: &[Segment], bytes: &[u8]) -> Expected {
        let mut expected = Expected::just(out);
        let mut done = 0;
        for segment in segments {
            let len = segment.len.min(bytes.len() - done);
            if len == 0 {
                break;
            }
            expected.writes.push((
                segment.place,
                segment.offset,
                bytes[done..done + len].to_vec(),
            ));
            expected.marks.push(segment.mark(0, len));
            done += len;
        }
        expected
    }

    /// Returns the expected result of the access, or `None` if the model does not know it.
    pub fn touch(&self, at: u64, access: &Access) -> Option<Expected> {
        Some(match *access {
            Access::WriteBytes { len, seed } => {
                self.write(at, &stream(seed, 0, len), |done, _| Out::from(done))
            }
            Access::WriteSlice { len, seed } => self.write(at, &stream(seed, 0, len), whole),
            Access::WriteObj { ty, seed } => self.write(at, &stream(seed, 0, size_of(ty)), whole),
            Access::ReadBytes { len } => self.read_to(
                at,
                len,
                |out, bytes| Out::All(vec![out, bytes]),
                |done, _| done.into(),
            ),
            Access::ReadSlice { len } => {
                self.read_to(at, len, |out, bytes| Out::All(vec![out, bytes]), whole)
            }
            Access::ReadObj { ty } => self.read_to(
                at,
                size_of(ty),
                |out, bytes| if out == Out::Nothing { bytes } else { out },
                whole,
            ),
            Access::Store { ty, value, order } => {
                let bytes = &value.to_ne_bytes()[..atom_size(ty)];
                match self.atom(at, bytes.len(), Perm::Write) {
                    // A panic of the standard library, which a guest cannot cause.
                    Ok(_) if matches!(order, Order::Acquire | Order::AcqRel) => return None,
                    Ok(segment) => self.written(Out::Nothing, &[segment], bytes),
                    Err(fault) => Expected::just(Out::Failed(fault)),
                }
            }
            Access::Load { ty, order } => {
                Expected::just(match self.atom(at, atom_size(ty), Perm::Read) {
                    Ok(_) if matches!(order, Order::Release | Order::AcqRel) => return None,
                    Ok(segment) => Out::Bytes(self.read(&[segment])),
                    Err(fault) => Out::Failed(fault),
                })
            }
            Access::ReadFrom {
                ref source,
                count,
                exact,
            } => self.read_from(at, source, count, exact)?,
            Access::WriteTo {
                ref sink,
                count,
                all,
            } => self.write_to(at, sink, count, all)?,
        })
    }

    fn write(&self, at: u64, bytes: &[u8], out: fn(usize, usize) -> Out) -> Expected {
        match self.before_fault(at, bytes.len(), Perm::Write) {
            Ok(segments) => {
                let done: usize = segments.iter().map(|p| p.len).sum();
                self.written(out(done, bytes.len()), &segments, &bytes[..done])
            }
            Err(fault) => Expected::just(Out::Failed(fault)),
        }
    }

    fn read_to(
        &self,
        at: u64,
        len: usize,
        join: fn(Out, Out) -> Out,
        out: fn(usize, usize) -> Out,
    ) -> Expected {
        let mut buffer = vec![0xEE; len];
        let out = match self.before_fault(at, len, Perm::Read) {
            Ok(segments) => {
                let bytes = self.read(&segments);
                buffer[..bytes.len()].copy_from_slice(&bytes);
                out(bytes.len(), len)
            }
            Err(fault) => Out::Failed(fault),
        };
        Expected::just(join(out, Out::Bytes(buffer)))
    }

    /// Returns the one aligned segment of an atomic access.
    fn atom(&self, at: u64, size: usize, perm: Perm) -> Result<Segment, Fault> {
        let segments = self.before_fault(at, size, perm)?;
        match segments[..] {
            // Regions start on host pages.
            [segment] if segment.len == size && segment.offset % size == 0 => Ok(segment),
            _ => Err(Fault::InvalidBackendAddress),
        }
    }

    fn read_from(&self, at: u64, source: &Source, count: usize, exact: bool) -> Option<Expected> {
        if *source == Source::DeafSource {
            return self.read_from_deaf(at, count, exact);
        }
        let is_descriptor = source.is_descriptor();
        let mut source = Simulated::new(source)?;
        let reached = match self.before_fault(at, count, Perm::Write) {
            Ok(segments) => segments,
            Err(fault) => {
                return Some(Expected::just(Out::All(vec![
                    Out::Failed(fault),
                    source.position().into(),
                ])))
            }
        };
        let partial = |completed| {
            Out::Failed(Fault::PartialBuffer {
                expected: count,
                completed,
            })
        };
        let (mut moved, mut end) = (0, None);
        // After a short count, a read from a descriptor marks its whole buffer (B14).
        let mut more_marks = Vec::new();
        'segments: for segment in &reached {
            let mut here = 0;
            while here < segment.len {
                match source.next(segment.len - here) {
                    Ok(0) => {
                        end = Some(None);
                        break 'segments;
                    }
                    Ok(n) => {
                        if is_descriptor {
                            more_marks.push(segment.mark(here, segment.len - here));
                        }
                        here += n;
                        moved += n;
                        if here < segment.len && !exact {
                            end = Some(None);
                            break 'segments;
                        }
                    }
                    Err(fault) => {
                        end = Some(Some(fault));
                        break 'segments;
                    }
                }
            }
        }
        let out = match end {
            Some(Some(fault)) if moved == 0 => Out::Failed(fault),
            _ if !exact => moved.into(),
            _ if moved == count => Out::Nothing,
            _ => partial(moved),
        };
        let bytes = source.given(moved);
        let out = Out::All(vec![out, source.position().into()]);
        let mut expected = self.written(out, &reached, &bytes);
        expected.marks.extend(more_marks);
        Some(expected)
    }

    /// Reads from a descriptor that fails. Bytes that the read may have changed count as written.
    fn read_from_deaf(&self, at: u64, count: usize, exact: bool) -> Option<Expected> {
        let (out, marked) = match self.before_fault(at, count, Perm::Write) {
            Err(fault) => (Out::Failed(fault), None),
            Ok(segments) => match segments.first() {
                None if exact => (Out::Nothing, None),
                None => (Out::Num(0), None),
                Some(segment) => (Out::Failed(system_error(libc::EBADF)), Some(*segment)),
            },
        };
        let mut expected = Expected::just(Out::All(vec![out, Out::Num(0)]));
        expected
            .marks
            .extend(marked.map(|segment| segment.mark(0, segment.len)));
        Some(expected)
    }

    /// Returns the expected result of a write to a sink. As in 0.18.0, each segment is written
    /// completely. Unlike in 0.18.0, the count before an error is returned (B1).
    fn write_to(&self, at: u64, sink: &Sink, count: usize, all: bool) -> Option<Expected> {
        let (out, taken) = match self.before_fault(at, count, Perm::Read) {
            Err(fault) => (Out::Failed(fault), Vec::new()),
            Ok(segments) => {
                let bytes = self.read(&segments);
                let (taken, fault) = room_for(sink, &bytes, &segments)?;
                let out = match fault {
                    // As for reads (B1), the count before an error is returned first.
                    Some(_) if taken != 0 && all => whole(taken, count),
                    Some(_) if taken != 0 => taken.into(),
                    Some(fault) => Out::Failed(fault),
                    None if all => whole(bytes.len(), count),
                    None => bytes.len().into(),
                };
                (out, bytes[..taken].to_vec())
            }
        };
        let overwritten = |len: usize, pos: u64, grows: bool| {
            let mut contents = vec![0xA5; len];
            let pos = pos.min(1 << 20) as usize;
            if grows && !taken.is_empty() {
                contents.resize(len.max(pos), 0);
            }
            for (i, byte) in taken.iter().enumerate() {
                match contents.get_mut(pos + i) {
                    Some(place) => *place = *byte,
                    None => contents.push(*byte),
                }
            }
            contents
        };
        let moved = taken.len() as u64;
        let (contents, position) = match *sink {
            Sink::ScriptSink { .. } | Sink::SocketSink { .. } => (taken, 0),
            Sink::VecSink { filled } => (overwritten(filled, filled as u64, true), 0),
            Sink::SliceSink { room } => (overwritten(room, 0, false), moved),
            Sink::CursorSink { room, pos } => {
                (overwritten(room, pos, false), pos.saturating_add(moved))
            }
            Sink::FileSink { filled, pos, .. } => (overwritten(filled, pos, true), pos + moved),
            Sink::PipeSink {
                room, open: true, ..
            } => (vec![0xA5; 4096 - room.min(4096)], 0),
            Sink::PipeSink { .. } | Sink::FullSink | Sink::MuteSink => (Vec::new(), 0),
        };
        Some(Expected::just(Out::All(vec![
            out,
            contents.into(),
            position.into(),
        ])))
    }

    /// Returns the expected result of the question, or `None` if the model does not know it.
    pub fn answer(&self, question: &Question) -> Option<Out> {
        let extent = |r: &Placed| Out::All(vec![r.base.into(), r.len.into()]);
        Some(match *question {
            Question::CheckRangeFor { at, len, perm } => self
                .segments(at, len, perm)
                .is_ok_and(|(_, fault)| fault.is_none())
                .into(),
            Question::GetSlicesFor {
                at,
                len,
                perm,
                stop,
            } => self.slices(self.segments(at, len, perm), stop),
            Question::HasPhysical => (!self.translated).into(),
            _ if self.translated => return None,
            Question::CheckRange { at, len } => self.physical(at, len, None).1.is_none().into(),
            Question::GetSlices { at, len, stop } => {
                self.slices(Ok(self.physical(at, len, None)), stop)
            }
            Question::FindRegion(at) => self.find(at).map(|(r, ..)| extent(r)).into(),
            Question::ToRegionAddr(at) => self
                .find(at)
                .map(|(r, offset, _)| Out::All(vec![extent(r), offset.into()]))
                .into(),
            Question::AddressInRange(at) => self.find(at).is_some().into(),
            Question::CheckAddress(at) => self.find(at).map(|_| at).into(),
            Question::CheckedOffset { at, by } => at
                .checked_add(by as u64)
                .filter(|sum| self.find(*sum).is_some())
                .into(),
            Question::TryAccess {
                at,
                count,
                ref answers,
            } => self.try_access(at, count, answers),
            Question::GetSlice { at, len } => match self.find(at) {
                None => Out::Failed(Fault::InvalidGuestAddress(at)),
                Some((region, ..)) if !region.ram => Out::Failed(Fault::HostAddressNotAvailable),
                Some((_, _, rest)) if rest < len => Out::Failed(Fault::InvalidBackendAddress),
                Some((region, offset, _)) => slice(region.place, offset as usize, len),
            },
            Question::LastAddr => {
                let ends = self
                    .regions
                    .iter()
                    .map(|r| r.base.saturating_add(r.len.saturating_sub(1)));
                ends.max().unwrap_or(0).into()
            }
            Question::HostAddress(at) if self.find(at).is_none() => {
                Out::Failed(Fault::InvalidGuestAddress(at))
            }
            Question::NumRegions | Question::IterRegions | Question::HostAddress(_) => return None,
        })
    }

    fn slices(&self, segments: Result<(Vec<Segment>, Option<Fault>), Fault>, stop: bool) -> Out {
        let (segments, fault) = match segments {
            Ok(found) => found,
            Err(fault) => return Out::Failed(fault),
        };
        match fault {
            Some(fault) if stop && segments.is_empty() => Out::Failed(fault),
            fault => {
                let slices = segments.iter().map(|p| slice(p.place, p.offset, p.len));
                Out::All(
                    slices
                        .chain(fault.filter(|_| !stop).map(Out::Failed))
                        .collect(),
                )
            }
        }
    }

    fn try_access(&self, at: u64, count: usize, answers: &[Answer]) -> Out {
        let (mut total, mut calls, mut answers) = (0usize, Vec::new(), answers.iter());
        let mut next = Some(at);
        let result = loop {
            let Some((region, offset, rest)) = next.and_then(|at| self.find(at)) else {
                break if total == 0 {
                    Out::Failed(Fault::InvalidGuestAddress(at))
                } else {
                    total.into()
                };
            };
            let wanted = rest.min(count - total);
            let extent = Out::All(vec![region.base.into(), region.len.into()]);
            calls.push(Out::All(vec![
                total.into(),
                wanted.into(),
                offset.into(),
                extent,
            ]));
            let handled = match answers.next() {
                None | Some(Answer::Whole) => wanted,
                Some(Answer::Short(by)) => wanted.saturating_sub(*by),
                Some(Answer::Over(by)) => wanted.saturating_add(*by),
                Some(Answer::Refuse) => break Out::Failed(Fault::HostAddressNotAvailable),
            };
            if handled == 0 {
                break total.into();
            }
            total = total.saturating_add(handled);
            if total == count {
                break total.into();
            }
            if total > count {
                break Out::Failed(Fault::CallbackOutOfRange);
            }
            next = next.and_then(|at| at.checked_add(handled as u64));
        };
        Out::All(vec![result, Out::All(calls)])
    }
}

fn whole(done: usize, wanted: usize) -> Out {
    if done == wanted {
        Out::Nothing
    } else {
        Out::Failed(Fault::PartialBuffer {
            expected: wanted,
            completed: done,
        })
    }
}

/// Returns a slice, for comparison with the driver's.
fn slice(place: usize, offset: usize, len: usize) -> Out {
    // Only the distance to its region is known.
    let mut from_region = vec![usize::MAX >> 1; place + 1];
    from_region[place] = offset;
    Out::All(vec![
        Out::Host(Place {
            raw: usize::MAX >> 1,
            from_region,
        }),
        len.into(),
        len.into(),
    ])
}
