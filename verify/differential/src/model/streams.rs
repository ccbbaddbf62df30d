//! A model of sources and sinks.

use std::io::ErrorKind;

use super::Segment;
use crate::host::stream;
use crate::op::{Sink, Source, Step, Trouble};
use crate::out::Fault;

/// Returns an error of the operating system.
pub(super) fn system_error(number: i32) -> Fault {
    std::io::Error::from_raw_os_error(number).into()
}

/// Returns the bytes that a sink accepts and its result, or `None` if the model does not know it.
pub(super) fn room_for(
    sink: &Sink,
    bytes: &[u8],
    segments: &[Segment],
) -> Option<(usize, Option<Fault>)> {
    let zero = Fault::Io(ErrorKind::WriteZero, None);
    let room = match *sink {
        _ if bytes.is_empty() => return Some((0, None)),
        Sink::ScriptSink { ref steps } => {
            let (mut steps, mut taken) = (steps.iter(), 0);
            for segment in segments {
                let mut here = 0;
                while here < segment.len {
                    match steps.next() {
                        Some(Step::Fail(Trouble::Eintr | Trouble::InterruptedKind)) => {}
                        Some(Step::Fail(what)) => return Some((taken, Some(fault_of(*what)))),
                        Some(Step::Give(most)) if *most > 0 => {
                            let count = (segment.len - here).min(*most);
                            here += count;
                            taken += count;
                        }
                        _ => return Some((taken, Some(zero))),
                    }
                }
            }
            return Some((taken, None));
        }
        Sink::VecSink { .. } | Sink::FileSink { .. } => usize::MAX,
        Sink::SliceSink { room } => room,
        Sink::CursorSink { room, pos } => (room as u64).saturating_sub(pos) as usize,
        // Sockets hold more than any memory of the harness.
        Sink::SocketSink { open: true } => usize::MAX,
        Sink::SocketSink { open: false } => return Some((0, Some(system_error(libc::EPIPE)))),
        Sink::FullSink => return Some((0, Some(system_error(libc::ENOSPC)))),
        Sink::MuteSink => return Some((0, Some(system_error(libc::EBADF)))),
        // The kernel decides how many bytes fit into a nearly full pipe.
        Sink::PipeSink { .. } => return None,
    };
    Some(if room < bytes.len() {
        (room, Some(zero))
    } else {
        (bytes.len(), None)
    })
}

/// A source that counts its bytes and does not store them.
pub(super) enum Simulated {
    Script {
        steps: std::vec::IntoIter<Step>,
        seed: u8,
        given: usize,
    },
    /// Returns the available bytes, then the end or EAGAIN.
    Stock {
        seed: u8,
        start: u64,
        len: usize,
        given: usize,
        blocks: bool,
        tells_rest: bool,
    },
}

impl Simulated {
    pub(super) fn new(source: &Source) -> Option<Self> {
        let stock = |seed, len, start: u64, blocks, tells_rest| Simulated::Stock {
            seed,
            start,
            len,
            given: 0,
            blocks,
            tells_rest,
        };
        Some(match *source {
            Source::ScriptSource { ref steps, seed } => Simulated::Script {
                steps: steps.0.clone().into_iter(),
                seed,
                given: 0,
            },
            Source::SliceSource { len, seed } => stock(seed, len, 0, false, false),
            Source::CursorSource { len, pos, seed } | Source::FileSource { len, pos, seed, .. } => {
                stock(seed, len, pos, false, false)
            }
            Source::PipeSource {
                len, open, seed, ..
            } => stock(seed, len.min(4096), 0, open, true),
            Source::SocketSource { len, open, seed } => stock(seed, len.min(4096), 0, open, true),
            Source::DeafSource => return None,
        })
    }

    pub(super) fn next(&mut self, wanted: usize) -> Result<usize, Fault> {
        match self {
            Simulated::Script { steps, given, .. } => loop {
                match steps.next() {
                    None | Some(Step::End) => return Ok(0),
                    Some(Step::Fail(Trouble::Eintr | Trouble::InterruptedKind)) => {}
                    Some(Step::Fail(what)) => return Err(fault_of(what)),
                    Some(Step::Give(most)) => {
                        let count = most.min(wanted);
                        *given += count;
                        return Ok(count);
                    }
                }
            },
            Simulated::Stock {
                start,
                len,
                given,
                blocks,
                ..
            } => {
                let left = (*len as u64).saturating_sub(*start) as usize - *given;
                if left == 0 && *blocks {
                    return Err(Fault::Io(ErrorKind::WouldBlock, Some(libc::EAGAIN)));
                }
                let count = left.min(wanted);
                *given += count;
                Ok(count)
            }
        }
    }

    /// Returns the first `count` bytes that the source returned.
    pub(super) fn given(&self, count: usize) -> Vec<u8> {
        match *self {
            Simulated::Script { seed, .. } => stream(seed, 0, count),
            Simulated::Stock { seed, start, .. } => {
                stream(seed, start.min(1 << 30) as usize, count)
            }
        }
    }

    pub(super) fn position(&self) -> u64 {
        match *self {
            Simulated::Script { given, .. } => given as u64,
            Simulated::Stock {
                len,
                given,
                tells_rest: true,
                ..
            } => (len - given) as u64,
            Simulated::Stock { start, given, .. } => start + given as u64,
        }
    }
}

/// Returns the error of a guest access for a stream's error.
fn fault_of(what: Trouble) -> Fault {
    match what {
        Trouble::Eintr => Fault::Io(ErrorKind::Interrupted, Some(libc::EINTR)),
        Trouble::Eagain => Fault::Io(ErrorKind::WouldBlock, Some(libc::EAGAIN)),
        Trouble::Eio => system_error(libc::EIO),
        Trouble::InterruptedKind => Fault::Io(ErrorKind::Interrupted, None),
        Trouble::WouldBlockKind => Fault::Io(ErrorKind::WouldBlock, None),
        Trouble::OtherKind => Fault::Io(ErrorKind::Other, None),
        Trouble::UnexpectedEofKind => Fault::Io(ErrorKind::UnexpectedEof, None),
        Trouble::OutOfBoundsFault => Fault::InvalidBackendAddress,
        Trouble::PartialFault => Fault::PartialBuffer {
            expected: 9,
            completed: 4,
        },
    }
}
