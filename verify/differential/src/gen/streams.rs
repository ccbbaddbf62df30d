//! Sources and sinks.

use super::Gen;
use crate::op::*;

impl Gen<'_> {
    pub(super) fn handle(&mut self) -> Handle {
        self.pick(Handle::ALL)
    }

    pub(super) fn steps(&mut self, total: usize) -> List<Step> {
        let mut steps = Vec::new();
        let chunk = self.pick(&[1, 3, 10, 100, 4096, usize::MAX]);
        // Enough steps for small reads, and few enough that large reads end soon.
        let enough = (total / chunk.max(1)).min(40) + 1;
        while steps.len() < enough + 3 {
            steps.push(match self.rng.u32(0..24) {
                0 => Step::Fail(Trouble::Eintr),
                1 => Step::Fail(self.pick(Trouble::ALL)),
                2 => Step::Give(self.rng.usize(0..50)),
                3 if self.one_in(3) => Step::End,
                4 => break,
                _ => Step::Give(chunk),
            });
        }
        List(steps)
    }

    pub(super) fn source(&mut self, count: usize) -> Source {
        let seed = self.seed();
        let wanted = count.min(0x4000);
        let len = match self.rng.u32(0..4) {
            0 => self.rng.usize(0..=wanted),
            1 => (self.near(wanted as u64) as usize).min(0x8000),
            2 => wanted,
            _ => wanted + self.rng.usize(0..300),
        };
        match self.rng.u32(0..16) {
            0..8 => Source::ScriptSource {
                steps: self.steps(wanted),
                seed,
            },
            8 | 9 => Source::SliceSource { len, seed },
            10 => Source::CursorSource {
                len,
                pos: self.offset(len as u64),
                seed,
            },
            11 | 12 => {
                // Far enough below the largest file offset that no read passes it, which is a
                // separate error.
                let pos = self.offset(len as u64).min(i64::MAX as u64 >> 1);
                Source::FileSource {
                    len,
                    pos,
                    seed,
                    handle: self.handle(),
                }
            }
            13 | 14 => {
                let len = if self.one_in(2) { 0 } else { len };
                let (open, handle) = (self.rng.bool(), self.handle());
                if self.one_in(3) {
                    Source::SocketSource { len, open, seed }
                } else {
                    Source::PipeSource {
                        len,
                        open,
                        seed,
                        handle,
                    }
                }
            }
            _ => Source::DeafSource,
        }
    }

    pub(super) fn sink(&mut self, count: usize) -> Sink {
        let wanted = count.min(0x4000);
        let room = self.near(wanted as u64).min(0x8000) as usize;
        match self.rng.u32(0..16) {
            0..7 => Sink::ScriptSink {
                steps: self.steps(wanted),
            },
            7 | 8 => Sink::VecSink {
                filled: self.rng.usize(0..20),
            },
            9 => Sink::SliceSink { room },
            10 => Sink::CursorSink {
                room,
                pos: self.offset(room as u64),
            },
            11 | 12 => {
                let filled = self.rng.usize(0..100);
                Sink::FileSink {
                    filled,
                    pos: self.rng.u64(0..200),
                    handle: self.handle(),
                }
            }
            13 => {
                // Full or empty, because the kernel decides how writes share the rest of a page.
                let room = self.pick(&[0, 4096]);
                Sink::PipeSink {
                    room,
                    open: !self.one_in(4),
                    handle: self.handle(),
                }
            }
            14 => Sink::SocketSink {
                open: !self.one_in(4),
            },
            _ => self.pick(&[Sink::FullSink, Sink::MuteSink]),
        }
    }
}
