//! The methods of `GuestMemoryBackend`, `GuestMemory` and `GuestMemoryRegion`.

use super::fault::{Hosts, IntoFault};
use super::types::perm;
use super::vm;
use super::vm::bitmap::{Bitmap, BitmapSlice};
use super::vm::guest_memory::GuestMemorySliceIterator;
use super::vm::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    MemoryRegionAddress, VolatileSlice,
};
use crate::op::{Answer, Question, RegionQuestion};
use crate::out::{Fault, Out};

/// The maximum number of slices that are compared. An iterator with more counts as endless.
const MOST_SLICES: usize = 1 << 12;

pub fn place<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, hosts: &Hosts) -> Out {
    let guard = slice.ptr_guard();
    Out::All(vec![
        hosts.place(guard.as_ptr() as usize),
        Out::from(guard.len()),
        Out::from(slice.len()),
    ])
}

fn extent<R: GuestMemoryRegion>(region: &R) -> Out {
    Out::All(vec![
        Out::Num(region.start_addr().0),
        Out::Num(region.len()),
    ])
}

fn each<'a, B: BitmapSlice>(
    slices: impl Iterator<Item = Result<VolatileSlice<'a, B>, GuestMemoryError>>,
    hosts: &Hosts,
) -> Out {
    slices
        .take(MOST_SLICES)
        .map(|slice| match slice {
            Ok(slice) => place(&slice, hosts),
            Err(error) => Out::Failed(error.fault(hosts)),
        })
        .collect::<Vec<_>>()
        .into()
}

fn until_error<'a, B: BitmapSlice>(
    slices: Result<impl Iterator<Item = VolatileSlice<'a, B>>, GuestMemoryError>,
    hosts: &Hosts,
) -> Out {
    match slices {
        Ok(slices) => slices
            .take(MOST_SLICES)
            .map(|slice| place(&slice, hosts))
            .collect::<Vec<_>>()
            .into(),
        Err(error) => Out::Failed(error.fault(hosts)),
    }
}

/// Runs a question that every `GuestMemory` supports.
pub fn ask_any<M: GuestMemory>(memory: &M, question: &Question, hosts: &Hosts) -> Out {
    match *question {
        Question::CheckRangeFor {
            at,
            len,
            perm: wanted,
        } => GuestMemory::check_range(memory, GuestAddress(at), len, perm(wanted)).into(),
        Question::GetSlicesFor {
            at,
            len,
            perm: wanted,
            stop,
        } => match GuestMemory::get_slices(memory, GuestAddress(at), len, perm(wanted)) {
            Err(error) => Out::Failed(error.fault(hosts)),
            Ok(slices) if stop => until_error(slices.stop_on_error(), hosts),
            Ok(slices) => each(slices, hosts),
        },
        Question::HasPhysical => memory.physical_memory().is_some().into(),
        _ => Out::NotApplicable,
    }
}

/// Runs a question that every `GuestMemoryBackend` supports.
pub fn ask<M: GuestMemoryBackend>(memory: &M, question: &Question, hosts: &Hosts) -> Out
where
    M::R: Sized,
{
    match *question {
        Question::NumRegions => memory.num_regions().into(),
        Question::IterRegions => memory.iter().map(extent).collect::<Vec<_>>().into(),
        Question::LastAddr => memory.last_addr().0.into(),
        Question::FindRegion(at) => memory.find_region(GuestAddress(at)).map(extent).into(),
        Question::ToRegionAddr(at) => memory
            .to_region_addr(GuestAddress(at))
            .map(|(region, offset)| Out::All(vec![extent(region), Out::Num(offset.0)]))
            .into(),
        Question::AddressInRange(at) => memory.address_in_range(GuestAddress(at)).into(),
        Question::CheckAddress(at) => memory.check_address(GuestAddress(at)).map(|a| a.0).into(),
        Question::CheckRange { at, len } => {
            GuestMemoryBackend::check_range(memory, GuestAddress(at), len).into()
        }
        Question::CheckedOffset { at, by } => memory
            .checked_offset(GuestAddress(at), by)
            .map(|a| a.0)
            .into(),
        Question::TryAccess {
            at,
            count,
            ref answers,
        } => {
            let mut calls = Vec::new();
            let mut answers = answers.iter();
            #[expect(deprecated, reason = "the deprecated method must keep its behaviour")]
            let result = memory.try_access(count, GuestAddress(at), |offset, len, addr, region| {
                if calls.len() < MOST_SLICES {
                    calls.push(Out::All(vec![
                        offset.into(),
                        len.into(),
                        addr.0.into(),
                        extent(region),
                    ]));
                }
                match answers.next() {
                    None | Some(Answer::Whole) => Ok(len),
                    Some(Answer::Short(by)) => Ok(len.saturating_sub(*by)),
                    Some(Answer::Over(by)) => Ok(len.saturating_add(*by)),
                    Some(Answer::Refuse) => Err(GuestMemoryError::HostAddressNotAvailable),
                }
            });
            let result = Out::of(result.map_err(|error| error.fault(hosts)));
            Out::All(vec![result, Out::All(calls)])
        }
        Question::HostAddress(at) => match memory.get_host_address(GuestAddress(at)) {
            Ok(pointer) => hosts.place(pointer as usize),
            Err(error) => Out::Failed(error.fault(hosts)),
        },
        Question::GetSlice { at, len } => match memory.get_slice(GuestAddress(at), len) {
            Ok(slice) => place(&slice, hosts),
            Err(error) => Out::Failed(error.fault(hosts)),
        },
        Question::GetSlices { at, len, stop } => {
            let slices = GuestMemoryBackend::get_slices(memory, GuestAddress(at), len);
            if stop {
                until_error(slices.stop_on_error(), hosts)
            } else {
                each(slices, hosts)
            }
        }
        Question::CheckRangeFor { .. } | Question::GetSlicesFor { .. } | Question::HasPhysical => {
            Out::NotApplicable
        }
    }
}

/// Runs a question about a region.
pub fn ask_region<R: GuestMemoryRegion>(
    region: &R,
    question: &RegionQuestion,
    hosts: &Hosts,
) -> Out {
    let failed = |error: GuestMemoryError| -> Fault { error.fault(hosts) };
    match *question {
        RegionQuestion::Extent => Out::All(vec![
            region.len().into(),
            region.start_addr().0.into(),
            region.last_addr().0.into(),
        ]),
        RegionQuestion::RegionHuge => region.is_hugetlbfs().into(),
        RegionQuestion::RegionFile => region.file_offset().map(|file| file.start()).into(),
        RegionQuestion::RegionWhole => Out::of(
            region
                .as_volatile_slice()
                .map(|slice| place(&slice, hosts))
                .map_err(failed),
        ),
        RegionQuestion::RegionDirtyAt(at) => region.bitmap().dirty_at(at).into(),
        RegionQuestion::RegionCheckAddress(at) => region
            .check_address(MemoryRegionAddress(at))
            .map(|a| a.0)
            .into(),
        RegionQuestion::RegionInRange(at) => {
            region.address_in_range(MemoryRegionAddress(at)).into()
        }
        RegionQuestion::RegionCheckedOffset { at, by } => region
            .checked_offset(MemoryRegionAddress(at), by)
            .map(|a| a.0)
            .into(),
        RegionQuestion::RegionFromGuest(at) => {
            region.to_region_addr(GuestAddress(at)).map(|a| a.0).into()
        }
        RegionQuestion::RegionHostAddress(at) => Out::of(
            region
                .get_host_address(MemoryRegionAddress(at))
                .map(|pointer| hosts.place(pointer as usize))
                .map_err(failed),
        ),
        RegionQuestion::RegionSlice { at, len } => Out::of(
            vm::GuestMemoryRegion::get_slice(region, MemoryRegionAddress(at), len)
                .map(|slice| place(&slice, hosts))
                .map_err(failed),
        ),
    }
}
