//! Random operations of the rest of the interface have the same outcomes on 0.18.0 and on this
//! crate.
//!
//! They are atomic accesses, streams in host memory, slices, references, arrays, and questions
//! about regions. Regions come and go, and there is memory behind an IOMMU.
//!
//! The operations stay where docs/differences.md lists no difference. Ranges have bytes and do not
//! end near 2^64. No source ends before its range. No write through the IOMMU passes the end of its
//! bitmap.
#![cfg(windows)]

const PAGE: u64 = 0x1000;
/// The end of the addresses that operations use. The regions leave holes below it.
const END: u64 = 0xe000;

#[derive(Clone, Copy, Debug)]
enum Op {
    Load(u64, u8),
    Store(u64, u8, u64),
    ReadFrom {
        addr: u64,
        len: usize,
        exact: bool,
        seed: u8,
    },
    WriteTo {
        addr: u64,
        len: usize,
        all: bool,
    },
    Ask(u64, usize),
    Copy {
        from: u64,
        to: u64,
        len: usize,
    },
    Slice {
        addr: u64,
        len: usize,
        at: usize,
        sub: usize,
    },
    Insert(u64, usize),
    Remove(u64, u64),
    Map {
        iova: u64,
        addr: u64,
        len: usize,
        permission: u8,
    },
    Invalidate(u64, usize),
    IommuWrite(u64, usize, u8),
    IommuRead(u64, usize),
    IommuCheck(u64, usize),
    Content,
    Marks,
}

/// Returns the outcome of an operation as text: the value, or the name of the error's variant.
fn text<T: std::fmt::Debug, E: std::fmt::Debug>(result: Result<T, E>) -> String {
    match result {
        Ok(value) => format!("{value:x?}"),
        Err(error) => {
            let text = format!("{error:?}");
            let end = text.find(|c: char| !c.is_alphanumeric());
            text[..end.unwrap_or(text.len())].to_owned()
        }
    }
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ seed)
        .collect()
}

/// Defines one side of the comparison.
macro_rules! side {
    ($side:ident, $crate_name:ident) => {
        mod $side {
            use super::*;
            use std::io::Cursor;
            use std::sync::atomic::Ordering::{Acquire, Release};
            use std::sync::{Arc, RwLock, RwLockReadGuard};
            use $crate_name::bitmap::AtomicBitmap;
            use $crate_name::iommu::{Error, Iommu, IommuMemory, Iotlb, IotlbIterator, IovaRange};
            use $crate_name::{
                Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic,
                GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
                Permissions, VolatileMemory,
            };

            type Memory = GuestMemoryMmap<AtomicBitmap>;

            /// An IOMMU that maps nothing by itself.
            #[derive(Clone, Debug, Default)]
            struct Table(Arc<RwLock<Iotlb>>);

            impl Iommu for Table {
                type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

                fn translate(
                    &self,
                    iova: GuestAddress,
                    length: usize,
                    access: Permissions,
                ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
                    let iotlb = self.0.read().unwrap();
                    Iotlb::lookup(iotlb, iova, length, access).map_err(|fails| {
                        Error::CannotResolve {
                            iova_range: IovaRange { base: iova, length },
                            reason: format!("{:?}", fails.misses.len()),
                        }
                    })
                }
            }

            pub struct Side {
                space: GuestMemoryAtomic<Memory>,
                table: Table,
                iommu: IommuMemory<Memory, Table>,
            }

            fn permissions(permission: u8) -> Permissions {
                match permission % 4 {
                    0 => Permissions::No,
                    1 => Permissions::Read,
                    2 => Permissions::Write,
                    _ => Permissions::ReadWrite,
                }
            }

            impl Side {
                pub fn new(ranges: &[(u64, usize)]) -> Self {
                    let ranges: Vec<_> = ranges
                        .iter()
                        .map(|&(addr, len)| (GuestAddress(addr), len))
                        .collect();
                    let memory = Memory::from_ranges(&ranges).unwrap();
                    let table = Table::default();
                    let bitmap = AtomicBitmap::new(2 * END as usize, PAGE_SIZE);
                    Side {
                        iommu: IommuMemory::new(memory.clone(), table.clone(), true, bitmap),
                        space: GuestMemoryAtomic::new(memory),
                        table,
                    }
                }

                pub fn run(&mut self, op: Op) -> String {
                    let memory = self.space.memory();
                    let memory: &Memory = &memory;
                    let at = GuestAddress;
                    match op {
                        Op::Load(addr, 0) => text(memory.load::<u8>(at(addr), Acquire)),
                        Op::Load(addr, 1) => text(memory.load::<u16>(at(addr), Acquire)),
                        Op::Load(addr, 2) => text(memory.load::<u32>(at(addr), Acquire)),
                        Op::Load(addr, _) => text(memory.load::<u64>(at(addr), Acquire)),
                        Op::Store(addr, 0, v) => text(memory.store(v as u8, at(addr), Release)),
                        Op::Store(addr, 1, v) => text(memory.store(v as u16, at(addr), Release)),
                        Op::Store(addr, 2, v) => text(memory.store(v as u32, at(addr), Release)),
                        Op::Store(addr, _, v) => text(memory.store(v, at(addr), Release)),
                        Op::ReadFrom {
                            addr,
                            len,
                            exact: false,
                            seed,
                        } => {
                            let source = bytes(seed, len);
                            text(memory.read_volatile_from(at(addr), &mut &source[..], len))
                        }
                        Op::ReadFrom {
                            addr,
                            len,
                            exact: true,
                            seed,
                        } => {
                            let mut source = Cursor::new(bytes(seed, len));
                            text(memory.read_exact_volatile_from(at(addr), &mut source, len))
                        }
                        Op::WriteTo { addr, len, all } => {
                            let mut sink = vec![];
                            let outcome = if all {
                                text(memory.write_all_volatile_to(at(addr), &mut sink, len))
                            } else {
                                text(memory.write_volatile_to(at(addr), &mut sink, len))
                            };
                            format!("{outcome} {sink:x?}")
                        }
                        Op::Ask(..) | Op::Copy { .. } | Op::Slice { .. } => ask(memory, op),
                        Op::Insert(addr, len) => {
                            let region = GuestRegionMmap::from_range(at(addr), len, None).unwrap();
                            let changed = memory.insert_region(Arc::new(region));
                            let outcome = text(changed.as_ref().map(|m| m.num_regions()));
                            if let Ok(changed) = changed {
                                self.space.lock().unwrap().replace(changed);
                            }
                            outcome
                        }
                        Op::Remove(addr, len) => match memory.remove_region(at(addr), len) {
                            Ok((changed, removed)) => {
                                self.space.lock().unwrap().replace(changed);
                                format!("{:x?}", (removed.start_addr(), removed.len()))
                            }
                            Err(error) => text::<(), _>(Err(error)),
                        },
                        Op::Content => {
                            let mut all = vec![];
                            for region in memory.iter() {
                                let mut bytes = vec![0; region.len() as usize];
                                memory.read_slice(&mut bytes, region.start_addr()).unwrap();
                                all.push(bytes);
                            }
                            format!("{all:x?}")
                        }
                        Op::Marks => {
                            let marks = memory.iter().map(|r| (**r).bitmap().get_and_reset());
                            let iommu = (0..2 * END / PAGE)
                                .map(|page| self.iommu.bitmap().is_bit_set(page as usize));
                            format!(
                                "{:?} {:?}",
                                marks.collect::<Vec<_>>(),
                                iommu.collect::<Vec<_>>()
                            )
                        }
                        _ => self.behind_iommu(op),
                    }
                }

                /// Changes the mappings of the IOMMU, or accesses memory through it.
                fn behind_iommu(&self, op: Op) -> String {
                    let at = GuestAddress;
                    match op {
                        Op::Map {
                            iova,
                            addr,
                            len,
                            permission,
                        } => {
                            let mut iotlb = self.table.0.write().unwrap();
                            text(iotlb.set_mapping(
                                at(iova),
                                at(addr),
                                len,
                                permissions(permission),
                            ))
                        }
                        Op::Invalidate(iova, len) => {
                            self.table
                                .0
                                .write()
                                .unwrap()
                                .invalidate_mapping(at(iova), len);
                            String::new()
                        }
                        Op::IommuWrite(iova, len, seed) => {
                            text(self.iommu.write(&bytes(seed, len), at(iova)))
                        }
                        Op::IommuRead(iova, len) => {
                            let mut buffer = vec![0; len];
                            let outcome = text(self.iommu.read(&mut buffer, at(iova)));
                            format!("{outcome} {buffer:x?}")
                        }
                        Op::IommuCheck(iova, len) => {
                            let checked = [1, 2, 3]
                                .map(|p| self.iommu.check_range(at(iova), len, permissions(p)));
                            format!("{checked:?}")
                        }
                        _ => unreachable!("{op:?}"),
                    }
                }
            }

            /// Asks about addresses, and uses slices.
            fn ask(memory: &Memory, op: Op) -> String {
                let at = GuestAddress;
                match op {
                    Op::Ask(addr, len) => format!(
                        "{:x?} {:x?} {:x?} {:x?} {:x?} {:x?} {:x?} {:x?} {} {:?}",
                        memory.num_regions(),
                        memory.last_addr(),
                        memory
                            .find_region(at(addr))
                            .map(|r| (r.start_addr(), r.len())),
                        memory
                            .to_region_addr(at(addr))
                            .map(|(r, at)| (r.last_addr(), at)),
                        memory.address_in_range(at(addr)),
                        memory.check_address(at(addr)),
                        memory.checked_offset(at(addr), len),
                        GuestMemoryBackend::check_range(memory, at(addr), len),
                        text(memory.get_slice(at(addr), len).map(|slice| slice.len())),
                        GuestMemoryBackend::get_slices(memory, at(addr), len)
                            .map(|slice| text(slice.map(|slice| slice.len())))
                            .collect::<Vec<_>>(),
                    ),
                    Op::Copy { from, to, len } => {
                        let slices = (
                            memory.get_slice(at(from), len),
                            memory.get_slice(at(to), len),
                        );
                        let (Ok(from), Ok(to)) = slices else {
                            return "no slice".to_owned();
                        };
                        from.copy_to_volatile_slice(to);
                        "copied".to_owned()
                    }
                    Op::Slice {
                        addr,
                        len,
                        at: start,
                        sub,
                    } => {
                        let Ok(slice) = memory.get_slice(at(addr), len) else {
                            return "no slice".to_owned();
                        };
                        let mut elements = [0u16; 5];
                        let read = slice.offset(start).map(|rest| rest.copy_to(&mut elements));
                        let array = slice.get_array_ref::<u16>(start, sub);
                        format!(
                            "{} {} {} {} {elements:x?} {} {}",
                            text(slice.subslice(start, sub).map(|part| part.len())),
                            text(slice.split_at(start).map(|(a, b)| (a.len(), b.len()))),
                            text(slice.compute_end_offset(start, sub)),
                            text(read),
                            text(slice.get_ref::<u32>(start).map(|word| {
                                word.store(word.load().wrapping_add(1));
                                word.load()
                            })),
                            text(array.map(|array| {
                                array.copy_from(&[7u16, 8, 9]);
                                (array.len(), array.element_size())
                            })),
                        )
                    }
                    _ => unreachable!("{op:?}"),
                }
            }
        }
    };
}
const PAGE_SIZE: std::num::NonZeroUsize = std::num::NonZeroUsize::new(PAGE as usize).unwrap();
side!(on_ours, ours);
side!(on_reference, reference);

fn random_op(random: &mut fastrand::Rng) -> Op {
    let (addr, other) = (random.u64(0..END), random.u64(0..END));
    let longest = if random.bool() { 64 } else { 0x2800 };
    let len = random.usize(1..longest);
    let (byte, page) = (random.u8(..), |addr: u64| addr & !(PAGE - 1));
    match random.u8(0..20) {
        0 => Op::Load(addr, byte % 4),
        1 => Op::Load(addr & !7, byte % 4),
        2 => Op::Store(addr, byte % 4, random.u64(..)),
        3 => Op::Store(addr & !7, byte % 4, random.u64(..)),
        4 => Op::ReadFrom {
            addr,
            len,
            exact: false,
            seed: byte,
        },
        5 => Op::ReadFrom {
            addr,
            len,
            exact: true,
            seed: byte,
        },
        6 => Op::WriteTo {
            addr,
            len,
            all: byte % 2 == 0,
        },
        7 | 8 => Op::Ask(addr, len),
        9 => Op::Copy {
            from: addr,
            to: other,
            len,
        },
        10 => Op::Slice {
            addr,
            len,
            at: random.usize(0..len + 4),
            sub: random.usize(1..64),
        },
        11 => Op::Insert(page(addr), random.usize(1..4) * PAGE as usize),
        12 => Op::Remove(page(addr), random.u64(1..4) * PAGE),
        13 | 14 => Op::Map {
            iova: page(addr),
            addr: page(other),
            len: random.usize(1..4) * PAGE as usize,
            permission: byte,
        },
        15 => Op::Invalidate(page(addr), random.usize(1..3) * PAGE as usize),
        16 => Op::IommuWrite(addr, len, byte),
        17 => Op::IommuRead(addr, len),
        18 => Op::IommuCheck(addr, len),
        _ => Op::Marks,
    }
}

#[test]
fn random_operations_of_the_whole_interface_have_equal_outcomes() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut outcomes = std::collections::BTreeSet::new();
    for _ in 0..30 {
        let ranges = [(0, 0x2000), (0x2000, 0x3000), (0x8000, 0x1000)];
        let mut expected = on_reference::Side::new(&ranges);
        let mut found = on_ours::Side::new(&ranges);
        for at in 0..300 {
            let op = if at % 50 == 49 {
                Op::Content
            } else {
                random_op(&mut random)
            };
            let (left, right) = (expected.run(op), found.run(op));
            assert_eq!(right, left, "seed {seed}: {op:x?}");
            let kind = format!("{op:?}");
            let kind = kind
                .split(|c: char| !c.is_alphanumeric())
                .next()
                .unwrap()
                .to_owned();
            outcomes.insert((
                kind,
                left.chars().next().is_some_and(|c| c.is_ascii_uppercase()),
            ));
        }
    }
    // Each kind of operation succeeds, and those that can fail do.
    let succeeded = outcomes.iter().filter(|(_, failed)| !failed).count();
    let failed = outcomes.iter().filter(|(_, failed)| *failed).count();
    assert!(succeeded == 16 && failed >= 8, "{outcomes:?}");
}
