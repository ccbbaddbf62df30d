//! Runs operations on `vm-memory` 0.18.0 and on this crate on Windows, where `verify/differential`
//! does not build. `tests/mappings.rs` compares mappings and accesses, and `tests/interface.rs` the
//! rest of the interface.
#![cfg(windows)]

use std::fs::File;

/// The size of a page.
pub const PAGE: u64 = 0x1000;
/// The end of the addresses that `tests/interface.rs` uses. The regions leave holes below it.
pub const END: u64 = 0xe000;

/// A region: its guest address, its size, and its file with an offset there.
pub type Region<'a> = (u64, usize, Option<(&'a File, u64)>);

/// An operation.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Write(u64, usize, u8),
    Read(u64, usize),
    WriteSlice(u64, usize, u8),
    ReadSlice(u64, usize),
    WriteObj(u64, u64),
    ReadObj(u64),
    HostAddress(u64),
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
        pub mod $side {
            use super::*;
            use std::io::Cursor;
            use std::sync::atomic::Ordering::{Acquire, Release};
            use std::sync::{Arc, RwLock, RwLockReadGuard};
            use $crate_name::bitmap::AtomicBitmap;
            use $crate_name::iommu::{Error, Iommu, IommuMemory, Iotlb, IotlbIterator, IovaRange};
            use $crate_name::mmap::FromRangesError;
            use $crate_name::{
                Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic,
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

            /// The memory of one side.
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
                /// Creates a memory without files.
                pub fn new(ranges: &[(u64, usize)]) -> Self {
                    let ranges: Vec<_> = ranges
                        .iter()
                        .map(|&(addr, len)| (GuestAddress(addr), len))
                        .collect();
                    Self::of(Memory::from_ranges(&ranges).unwrap())
                }

                /// Creates a memory, or returns the error with the number of the system's.
                pub fn with_files(places: &[Region<'_>]) -> Result<Self, String> {
                    let ranges = places.iter().map(|&(addr, size, file)| {
                        let file = file.map(|(file, offset)| {
                            FileOffset::new(file.try_clone().unwrap(), offset)
                        });
                        (GuestAddress(addr), size, file)
                    });
                    let ranges: Vec<_> = ranges.collect();
                    let memory =
                        Memory::from_ranges_with_files(&ranges).map_err(|error| match error {
                            FromRangesError::MmapRegion(error) => {
                                format!("{:?}", error.raw_os_error())
                            }
                            other => text::<(), _>(Err(other)),
                        })?;
                    Ok(Self::of(memory))
                }

                fn of(memory: Memory) -> Self {
                    let table = Table::default();
                    let bitmap = AtomicBitmap::new(2 * END as usize, PAGE_SIZE);
                    Side {
                        iommu: IommuMemory::new(memory.clone(), table.clone(), true, bitmap),
                        space: GuestMemoryAtomic::new(memory),
                        table,
                    }
                }

                /// Returns the guest addresses and the lengths of the regions.
                pub fn layout(&self) -> Vec<(u64, u64)> {
                    let memory = self.space.memory();
                    memory.iter().map(|r| (r.start_addr().0, r.len())).collect()
                }

                /// Runs an operation, and returns its outcome with the bytes that it read.
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
                            exact,
                            seed,
                        } => {
                            let source = bytes(seed, len);
                            if exact {
                                let mut source = Cursor::new(source);
                                text(memory.read_exact_volatile_from(at(addr), &mut source, len))
                            } else {
                                text(memory.read_volatile_from(at(addr), &mut &source[..], len))
                            }
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
                        Op::Map { .. }
                        | Op::Invalidate(..)
                        | Op::IommuWrite(..)
                        | Op::IommuRead(..)
                        | Op::IommuCheck(..) => self.behind_iommu(op),
                        _ => access(memory, op),
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

            /// Makes an access that is not atomic, or asks for a host address.
            fn access(memory: &Memory, op: Op) -> String {
                let at = GuestAddress;
                match op {
                    Op::Write(addr, len, byte) => text(memory.write(&vec![byte; len], at(addr))),
                    Op::Read(addr, len) => {
                        let mut bytes = vec![0; len];
                        text(memory.read(&mut bytes, at(addr)).map(|n| (n, bytes)))
                    }
                    Op::WriteSlice(addr, len, byte) => {
                        text(memory.write_slice(&vec![byte; len], at(addr)))
                    }
                    Op::ReadSlice(addr, len) => {
                        let mut bytes = vec![0; len];
                        text(memory.read_slice(&mut bytes, at(addr)).map(|()| bytes))
                    }
                    Op::WriteObj(addr, value) => text(memory.write_obj(value, at(addr))),
                    Op::ReadObj(addr) => text(memory.read_obj::<u64>(at(addr))),
                    Op::HostAddress(addr) => text(memory.get_host_address(at(addr)).map(|_| ())),
                    _ => unreachable!("{op:?}"),
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
