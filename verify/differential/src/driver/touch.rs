//! The methods of `Bytes` on all types that have them.

use super::fault::{Hosts, IntoFault};
use super::streams::{Drain, Feed};
use super::types::{bytes_of, order, value_of, with_atom, with_ty};
use super::vm::{ByteValued, Bytes};
use crate::host::stream;
use crate::op::Access;
use crate::out::Out;

/// The largest buffer that the harness passes.
pub const LARGEST_BUFFER: usize = 1 << 18;

/// Runs the access at `at`.
pub fn touch<A, M>(memory: &M, at: A, access: &Access, hosts: &Hosts) -> Out
where
    M: Bytes<A> + ?Sized,
    M::E: IntoFault,
{
    macro_rules! out {
        ($result:expr) => {
            Out::of($result.map_err(|error| error.fault(hosts)))
        };
    }
    match *access {
        Access::WriteBytes { len, .. }
        | Access::WriteSlice { len, .. }
        | Access::ReadBytes { len }
        | Access::ReadSlice { len }
            if len > LARGEST_BUFFER =>
        {
            Out::NotApplicable
        }
        Access::WriteBytes { len, seed } => out!(memory.write(&stream(seed, 0, len), at)),
        Access::WriteSlice { len, seed } => out!(memory.write_slice(&stream(seed, 0, len), at)),
        Access::ReadBytes { len } => {
            let mut buffer = vec![0xEE; len];
            let result = out!(memory.read(&mut buffer, at));
            Out::All(vec![result, Out::Bytes(buffer)])
        }
        Access::ReadSlice { len } => {
            let mut buffer = vec![0xEE; len];
            let result = out!(memory.read_slice(&mut buffer, at));
            Out::All(vec![result, Out::Bytes(buffer)])
        }
        Access::WriteObj { ty, seed } => {
            with_ty!(ty, T => out!(memory.write_obj(value_of::<T>(seed), at)), else Out::NotApplicable)
        }
        Access::ReadObj { ty } => {
            with_ty!(
                ty,
                T => out!(memory.read_obj::<T>(at).map(|value| bytes_of(&[value]))),
                else Out::NotApplicable
            )
        }
        Access::Store {
            ty,
            value,
            order: wanted,
        } => {
            with_atom!(ty, T => out!(memory.store(value as T, at, order(wanted))))
        }
        Access::Load { ty, order: wanted } => {
            with_atom!(ty, T => out!(memory.load::<T>(at, order(wanted)).map(|value| value.as_slice().to_vec())))
        }
        Access::ReadFrom {
            ref source,
            count,
            exact,
        } => {
            let mut feed = Feed::new(source);
            let result = if exact {
                out!(memory.read_exact_volatile_from(at, &mut feed, count))
            } else {
                out!(memory.read_volatile_from(at, &mut feed, count))
            };
            Out::All(vec![result, Out::Num(feed.position())])
        }
        Access::WriteTo {
            ref sink,
            count,
            all,
        } => {
            let mut drain = Drain::new(sink);
            let result = if all {
                out!(memory.write_all_volatile_to(at, &mut drain, count))
            } else {
                out!(memory.write_volatile_to(at, &mut drain, count))
            };
            let (bytes, position) = drain.contents();
            Out::All(vec![result, Out::Bytes(bytes), Out::Num(position)])
        }
    }
}
