//! Operations on bitmaps, IOTLBs and mappings, and operations without memory.

use super::{Gen, GRANULARITIES};
use crate::machine::Extent;
use crate::op::*;

impl Gen<'_> {
    pub(super) fn bits(&mut self) -> Op {
        let bytes = self.pick(&[0, 1, 63, 64, 65, 100, 4095, 4096, 4097, 0x3000, 0x10000]);
        let at = self.offset(bytes) as usize;
        let len = self.any_length(
            at as u64,
            &[Extent {
                base: 0,
                len: bytes,
            }],
        );
        let view = self.pick(View::ALL);
        let skips: List<usize> = (0..self.rng.usize(0..4))
            .map(|_| self.rng.usize(0..5000))
            .collect();
        let bit = self.near(bytes) as usize;
        let act = match self.rng.u32(0..22) {
            0 | 1 => BitAct::NewBitmap {
                bytes: bytes as usize,
                page: self.pick(GRANULARITIES),
            },
            2 => BitAct::BitmapWithLen(self.rng.usize(0..100_000)),
            3 if self.one_in(4) => BitAct::DefaultBitmap,
            3 | 4 => BitAct::Enlarge(self.rng.usize(0..9000)),
            5..8 => BitAct::SetRange { at, len },
            8 => BitAct::ResetRange { at, len },
            9 => BitAct::SetBit(bit),
            10 => BitAct::ResetBit(bit),
            11 => BitAct::ReadBit(bit),
            12 | 13 => BitAct::ReadAddr(at),
            14 => BitAct::Harvest,
            15 => BitAct::ResetAll,
            16 => BitAct::CloneOver,
            17..20 => BitAct::MarkDirty {
                view,
                skips,
                at,
                len,
            },
            _ => BitAct::ReadDirty { view, skips, at },
        };
        Op::Bits {
            bitmap: self.rng.usize(0..3),
            act,
        }
    }

    pub(super) fn tlb(&mut self) -> Op {
        let alone = self.rng.u32(0..3) == 0;
        let model = if alone {
            &self.context.alone
        } else {
            &self.context.tlb
        };
        let known = model.extents();
        let backend = self.context.backend.clone();
        let iova = if known.is_empty() || self.one_in(4) {
            match self.rng.u32(0..4) {
                0 => self.edge(),
                _ => 0x1000 * self.rng.u64(0..16),
            }
        } else {
            self.address_in(&known)
        };
        let len = match self.rng.u32(0..8) {
            0 => self.any_length(iova, &known),
            1 => self.length(iova, &known),
            _ => 0x1000 * self.rng.usize(1..4),
        };
        let perm = self.perm();
        let act = match self.rng.u32(0..16) {
            0..6 => TlbAct::SetMapping {
                iova,
                gpa: self.address_in(&backend),
                len,
                perm,
            },
            6..9 => TlbAct::Invalidate { iova, len },
            9 if self.one_in(3) => TlbAct::InvalidateAll,
            _ => TlbAct::Lookup { iova, len, perm },
        };
        Op::Tlb { alone, act }
    }

    pub(super) fn map(&mut self) -> Op {
        let size = self.pick(&[
            0,
            1,
            4095,
            4096,
            4097,
            8192,
            0x10000,
            usize::MAX,
            usize::MAX - 4095,
            1 << 63,
        ]);
        match self.rng.u32(0..6) {
            0..3 => {
                let how = self.pick(MapHow::ALL);
                let file = (how == MapHow::MapFromFile || self.one_in(2)).then(|| {
                    // Usually long enough for the size.
                    let offset = self.pick(&[
                        0,
                        0,
                        0,
                        4096,
                        8192,
                        1,
                        100,
                        u64::MAX - 4095,
                        u64::MAX,
                        1 << 63,
                    ]);
                    let end = (size as u64).saturating_add(offset).min(1 << 24);
                    let len = if self.one_in(3) { self.near(end) } else { end };
                    FileSpec {
                        len: len.min(1 << 24),
                        offset,
                    }
                });
                let huge = match self.rng.u32(0..4) {
                    0 => Some(false),
                    1 => Some(true),
                    _ => None,
                };
                let flags = match file {
                    Some(_) if !self.one_in(4) => {
                        self.pick(&[MapFlags::SharedOnly, MapFlags::PrivateOnly])
                    }
                    _ => self.pick(MapFlags::ALL),
                };
                let prot = if self.one_in(2) { 3 } else { self.rng.u8(0..8) };
                Op::Map(MapSpec {
                    how,
                    size,
                    prot,
                    flags,
                    file,
                    huge,
                })
            }
            3 => {
                let mut part = || (0x1000 * self.rng.u64(0..6), self.rng.usize(1..0x3000));
                let ((first, first_len), (second, second_len)) = (part(), part());
                Op::FdsOverlap {
                    same_file: !self.one_in(5),
                    first,
                    first_len,
                    second,
                    second_len,
                }
            }
            4 => {
                let size = self.pick(&[1, 4096, 4097, 0x3000]);
                let writes = (0..self.rng.usize(0..4))
                    .map(|_| Span {
                        at: self.offset(size as u64) as usize,
                        len: self.rng.usize(0..0x1800),
                    })
                    .collect();
                Op::BuilderMarks { size, writes }
            }
            _ => Op::GuestRegion {
                base: self.edge(),
                size: size.min(0x10000),
                arc: self.rng.bool(),
            },
        }
    }

    pub(super) fn pure(&mut self) -> Op {
        match self.rng.u32(0..5) {
            0 | 1 => {
                let what = self.pick(Arith::ALL);
                let (mut a, mut b) = (self.edge(), self.edge());
                if self.one_in(3) {
                    a = self.rng.u64(..);
                }
                if matches!(what, Arith::CheckedAlignUp | Arith::UncheckedAlignUp)
                    && !self.one_in(10)
                {
                    b = 1 << self.rng.u32(0..64);
                }
                Op::Calculate { what, a, b }
            }
            2 | 3 => {
                let ty = self.pick(Ty::ALL);
                let skip = if self.one_in(2) {
                    0
                } else {
                    self.rng.usize(0..64)
                };
                let len = if self.one_in(3) {
                    self.rng.usize(0..70)
                } else {
                    self.pick(&[1, 2, 3, 4, 8, 16, 40])
                };
                Op::Value {
                    ty,
                    what: self.pick(ValueAct::ALL),
                    len,
                    skip,
                    seed: self.seed(),
                }
            }
            _ if self.one_in(2) => Op::Perms {
                a: self.perm(),
                b: self.perm(),
            },
            _ => {
                let all: Vec<Ty> = Ty::ALL[12..20].to_vec();
                Op::Endian {
                    ty: self.pick(&all),
                    value: self.edge(),
                }
            }
        }
    }
}
