//! Random regions and accesses have the same outcomes on 0.18.0 and on this crate, except those
//! that docs/differences.md lists under "Windows".
#![cfg(windows)]

use std::io::Read;

use tempfile::NamedTempFile;

const PAGE: u64 = 0x1000;
const GRANULARITY: u64 = 0x1_0000;

/// A region to create: its guest address, its size, and the length and the offset of its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    addr: u64,
    size: usize,
    file: Option<(u64, u64)>,
}

/// An access at a guest address.
#[derive(Clone, Copy, Debug)]
enum Access {
    Write(u64, usize, u8),
    Read(u64, usize),
    WriteSlice(u64, usize, u8),
    ReadSlice(u64, usize),
    WriteObj(u64, u64),
    ReadObj(u64),
    HostAddress(u64),
    Marks,
}

/// Returns the name of the variant of an error.
fn variant(error: &impl std::fmt::Debug) -> String {
    let text = format!("{error:?}");
    let end = text.find(|c: char| !c.is_alphanumeric());
    text[..end.unwrap_or(text.len())].to_owned()
}

/// Creates a file of this length, whose bytes are numbered.
fn file_of(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        (0..len).map(|at| at as u8 ^ 0x5a).collect::<Vec<_>>(),
    )
    .unwrap();
    file
}

/// Defines one side of the comparison.
macro_rules! side {
    ($side:ident, $crate_name:ident) => {
        mod $side {
            use super::*;
            use $crate_name::bitmap::AtomicBitmap;
            use $crate_name::mmap::FromRangesError;
            use $crate_name::{
                Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
                GuestMemoryRegion,
            };

            pub type Memory = GuestMemoryMmap<AtomicBitmap>;

            /// Creates a memory, or returns the error with the number of the system's.
            pub fn create(places: &[(Place, Option<&NamedTempFile>)]) -> Result<Memory, String> {
                let ranges = places.iter().map(|(place, file)| {
                    let file = file.map(|file| {
                        let offset = place.file.unwrap().1;
                        FileOffset::new(file.as_file().try_clone().unwrap(), offset)
                    });
                    (GuestAddress(place.addr), place.size, file)
                });
                let ranges: Vec<_> = ranges.collect();
                Memory::from_ranges_with_files(&ranges).map_err(|error| match error {
                    FromRangesError::MmapRegion(error) => format!("{:?}", error.raw_os_error()),
                    other => variant(&other),
                })
            }

            /// Makes an access, and returns what it returned and the bytes that it read.
            pub fn access(memory: &Memory, access: Access) -> String {
                let at = GuestAddress;
                let mut bytes = vec![];
                let result = match access {
                    Access::Write(addr, len, byte) => {
                        memory.write(&vec![byte; len], at(addr)).map(|n| n as u64)
                    }
                    Access::Read(addr, len) => {
                        bytes = vec![0; len];
                        memory.read(&mut bytes, at(addr)).map(|n| n as u64)
                    }
                    Access::WriteSlice(addr, len, byte) => {
                        memory.write_slice(&vec![byte; len], at(addr)).map(|()| 0)
                    }
                    Access::ReadSlice(addr, len) => {
                        bytes = vec![0; len];
                        memory.read_slice(&mut bytes, at(addr)).map(|()| 0)
                    }
                    Access::WriteObj(addr, value) => memory.write_obj(value, at(addr)).map(|()| 0),
                    Access::ReadObj(addr) => memory.read_obj::<u64>(at(addr)),
                    Access::HostAddress(addr) => memory.get_host_address(at(addr)).map(|_| 0),
                    Access::Marks => {
                        let marks = memory.iter().flat_map(|r| (**r).bitmap().get_and_reset());
                        return format!("{:?}", marks.collect::<Vec<_>>());
                    }
                };
                match result {
                    Ok(value) => format!("{value:#x} {bytes:?}"),
                    Err(error) => variant(&error),
                }
            }

            /// Returns the guest addresses and the lengths of the regions.
            pub fn layout(memory: &Memory) -> Vec<(u64, u64)> {
                memory.iter().map(|r| (r.start_addr().0, r.len())).collect()
            }
        }
    };
}
side!(on_ours, ours);
side!(on_reference, reference);

/// The differences of docs/differences.md, as the outcome of this crate. `None` if there is none.
fn difference(place: Place) -> Option<Result<(), String>> {
    let (len, offset) = place.file?;
    let end = offset + place.size as u64;
    if place.size == 0 {
        return Some(Err("Some(22)".to_owned()));
    }
    if offset % PAGE != 0 {
        return None;
    }
    if len.div_ceil(PAGE) < end.div_ceil(PAGE) {
        return Some(Err("None".to_owned()));
    }
    (offset != 0).then_some(Ok(()))
}

fn random_place(random: &mut fastrand::Rng) -> Place {
    const SIZES: &[usize] = &[
        0,
        1,
        0xfff,
        0x1000,
        0x1001,
        0x4000,
        0x1_0000,
        0x1_8000,
        usize::MAX,
    ];
    const OFFSETS: &[u64] = &[
        0,
        0,
        0,
        1,
        0x800,
        PAGE,
        0x3000,
        GRANULARITY,
        GRANULARITY + PAGE,
    ];
    const LENGTHS: &[u64] = &[0, 1, 0x1000, 0x1001, 0x4000, 0x1_0000, 0x1_8000, 0x3_0000];
    let size = *random.choice(SIZES).unwrap();
    Place {
        addr: random.u64(0..4) * PAGE,
        size,
        // The end of a file of the largest size overflows in the test.
        file: (random.bool() && size != usize::MAX).then(|| {
            (
                *random.choice(LENGTHS).unwrap(),
                *random.choice(OFFSETS).unwrap(),
            )
        }),
    }
}

#[test]
fn regions_of_random_sizes_files_and_offsets_have_equal_outcomes() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut equal, mut different) = (0, 0);
    for _ in 0..1500 {
        let place = random_place(&mut random);
        let files = [0, 1].map(|_| place.file.map(|(len, _)| file_of(len)));
        let expected = on_reference::create(&[(place, files[0].as_ref())]);
        let found = on_ours::create(&[(place, files[1].as_ref())]);
        let (expected, found) = (
            expected.map(|m| on_reference::layout(&m)),
            found.map(|m| on_ours::layout(&m)),
        );
        match difference(place) {
            None => {
                assert_eq!(found, expected, "{place:x?}");
                equal += 1;
            }
            Some(documented) => {
                assert_eq!(found.map(|_| ()), documented, "{place:x?}");
                different += 1;
            }
        }
        // Regions of this crate do not extend their file, and leave it unmapped.
        if let (Some(file), Some((len, _))) = (&files[1], place.file) {
            assert_eq!(file.as_file().metadata().unwrap().len(), len, "{place:x?}");
            file.as_file().set_len(0).unwrap();
        }
    }
    assert!(equal > 300 && different > 100, "{equal} {different}");
}

fn random_access(random: &mut fastrand::Rng, end: u64) -> Access {
    let addr = random.u64(0..end + 0x100);
    let len = random.usize(0..0x3000);
    match random.u8(0..8) {
        0 => Access::Write(addr, len, random.u8(..)),
        1 => Access::Read(addr, len),
        2 => Access::WriteSlice(addr, len, random.u8(..)),
        3 => Access::ReadSlice(addr, len),
        4 => Access::WriteObj(addr, random.u64(..)),
        5 => Access::ReadObj(addr),
        6 => Access::HostAddress(addr),
        _ => Access::Marks,
    }
}

#[test]
fn random_accesses_to_memory_and_files_have_equal_outcomes() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..40 {
        // Two adjacent regions, a hole, and a third one. The middle one is that of a file.
        let place = |addr, size, file| Place { addr, size, file };
        let places = [
            place(0, 0x3000, None),
            place(0x3000, 0x5000, Some((0x5000, 0))),
            place(0xa000, 0x2000, None),
        ];
        let files = [file_of(0x5000), file_of(0x5000)];
        let with = |file| places.map(|place| (place, place.file.map(|_| file)));
        let expected = on_reference::create(&with(&files[0])).unwrap();
        let found = on_ours::create(&with(&files[1])).unwrap();
        for _ in 0..400 {
            let access = random_access(&mut random, 0xc000);
            let (left, right) = (
                on_reference::access(&expected, access),
                on_ours::access(&found, access),
            );
            assert_eq!(right, left, "{access:x?}");
        }
        drop((expected, found));
        let [left, right] = files.map(|file| {
            let mut bytes = vec![];
            file.reopen().unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        });
        assert!(left == right);
    }
}
