//! Operations without memory: addresses, permissions, values and their bytes, endian types.

use std::ops::Range;

use super::fault::{Hosts, IntoFault};
use super::types::{bytes_of, perm, perm_number, value_of, with_any_ty};
use super::vm;
use super::vm::{Address, ByteValued, GuestAddress, MemoryRegionAddress};
use crate::host::stream;
use crate::op::{Arith, Perm, Ty, ValueAct};
use crate::out::Out;

fn on<A: Address<V = u64>>(what: Arith, a: u64, b: u64) -> Out {
    let left = A::new(a);
    let pair =
        |(address, carry): (A, bool)| Out::All(vec![address.raw_value().into(), carry.into()]);
    match what {
        Arith::CheckedAdd => left.checked_add(b).map(|r| r.raw_value()).into(),
        Arith::CheckedSub => left.checked_sub(b).map(|r| r.raw_value()).into(),
        Arith::OverflowingAdd => pair(left.overflowing_add(b)),
        Arith::OverflowingSub => pair(left.overflowing_sub(b)),
        Arith::UncheckedAdd => left.unchecked_add(b).raw_value().into(),
        Arith::UncheckedSub => left.unchecked_sub(b).raw_value().into(),
        Arith::CheckedOffsetFrom => left.checked_offset_from(A::new(b)).into(),
        Arith::UncheckedOffsetFrom => left.unchecked_offset_from(A::new(b)).into(),
        Arith::CheckedAlignUp => left.checked_align_up(b).map(|r| r.raw_value()).into(),
        Arith::UncheckedAlignUp => left.unchecked_align_up(b).raw_value().into(),
        Arith::Mask => left.mask(b).into(),
        Arith::BitAndOr => Out::All(vec![
            (left & b).raw_value().into(),
            (left | b).raw_value().into(),
            (left < A::new(b)).into(),
        ]),
        Arith::ComputeOffset | Arith::IovaRangeOf => Out::NotApplicable,
    }
}

/// Calculates with both address types, or with plain numbers.
pub fn arith(what: Arith, a: u64, b: u64) -> Out {
    match what {
        Arith::ComputeOffset => {
            let result = vm::volatile_memory::compute_offset(a as usize, b as usize);
            Out::of(result.map_err(|error| error.fault(&Hosts::default())))
        }
        Arith::IovaRangeOf => match vm::iommu::IovaRange::try_from(Range { start: a, end: b }) {
            Ok(range) => Out::All(vec![range.base.0.into(), range.length.into()]),
            Err(_) => Out::Absent,
        },
        _ => Out::All(vec![
            on::<GuestAddress>(what, a, b),
            on::<MemoryRegionAddress>(what, a, b),
        ]),
    }
}

/// Calls the operators of permissions.
pub fn perms(a: Perm, b: Perm) -> Out {
    let (a, b) = (perm(a), perm(b));
    Out::All(vec![
        a.allow(b).into(),
        a.has_write().into(),
        perm_number(a & b).into(),
        perm_number(a | b).into(),
    ])
}

/// Memory that is aligned for every type, for slices of any alignment.
#[repr(align(64))]
struct Aligned([u8; 256]);

/// Calls a method of `ByteValued`.
pub fn value(ty: Ty, what: ValueAct, len: usize, skip: usize, seed: u8) -> Out {
    if skip.checked_add(len).is_none_or(|end| end > 256) {
        return Out::NotApplicable;
    }
    let mut buffer = Aligned([0; 256]);
    buffer.0.copy_from_slice(&stream(seed, 0, 256));
    let result = with_any_ty!(ty, T => match what {
        ValueAct::FromSlice => T::from_slice(&buffer.0[skip..skip + len]).map(|v| bytes_of(&[*v])).into(),
        ValueAct::FromMutSlice => T::from_mut_slice(&mut buffer.0[skip..skip + len])
            .map(|v| *v = value_of::<T>(seed.wrapping_add(1)))
            .into(),
        ValueAct::AsSlice => {
            let mut value = value_of::<T>(seed);
            let before = value.as_slice().to_vec();
            value.as_mut_slice().reverse();
            Out::All(vec![before.into(), bytes_of(&[value]).into()])
        }
        ValueAct::AsBytes => {
            let mut value = value_of::<T>(seed);
            let room = value.as_bytes();
            let given = stream(seed.wrapping_add(3), 0, len);
            let written = vm::Bytes::write(&room, &given, skip % 8);
            let written = Out::of(written.map_err(|error| error.fault(&Hosts::default())));
            Out::All(vec![written, bytes_of(&[value]).into()])
        }
        ValueAct::ReadExactFrom => match T::read_exact_from(&buffer.0[skip..skip + len]) {
            Ok(value) => bytes_of(&[value]).into(),
            Err(error) => Out::Failed(error.into()),
        },
        ValueAct::WriteAllTo => {
            let mut room = &mut buffer.0[skip..skip + len];
            match value_of::<T>(seed.wrapping_add(1)).write_all_to(&mut room) {
                Ok(()) => Out::from(room.len()),
                Err(error) => Out::Failed(error.into()),
            }
        }
        ValueAct::Zeroed => bytes_of(&[T::zeroed()]).into(),
    });
    Out::All(vec![result, buffer.0.to_vec().into()])
}

/// Calls the conversions of an endian type.
pub fn endian(ty: Ty, number: u64) -> Out {
    macro_rules! on {
        ($endian:ty, $native:ty) => {{
            let native = number as $native;
            let value = <$endian>::from(native);
            Out::All(vec![
                value.as_slice().to_vec().into(),
                (value.to_native() as u64).into(),
                (<$native>::from(value) as u64).into(),
                (value == native).into(),
                (native == value).into(),
                (value == native.wrapping_add(1)).into(),
                (value == <$endian>::from(native.swap_bytes())).into(),
            ])
        }};
    }
    match ty {
        Ty::Be16 => on!(vm::Be16, u16),
        Ty::Be32 => on!(vm::Be32, u32),
        Ty::Be64 => on!(vm::Be64, u64),
        Ty::BeSize => on!(vm::BeSize, usize),
        Ty::Le16 => on!(vm::Le16, u16),
        Ty::Le32 => on!(vm::Le32, u32),
        Ty::Le64 => on!(vm::Le64, u64),
        Ty::LeSize => on!(vm::LeSize, usize),
        _ => Out::NotApplicable,
    }
}
