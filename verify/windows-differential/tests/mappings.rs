//! Random regions and accesses have the same outcomes on 0.18.0 and on this crate, except those
//! that docs/differences.md lists under "Windows".
#![cfg(windows)]

use std::io::Read;

use tempfile::NamedTempFile;
use vm_memory_windows_differential::{on_ours, on_reference, Op, Region, PAGE};

const GRANULARITY: u64 = 0x1_0000;

/// A region to create: its guest address, its size, and the length and the offset of its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    addr: u64,
    size: usize,
    file: Option<(u64, u64)>,
}

impl Place {
    /// Returns the region that the library creates. A region without an offset has no file.
    fn region(self, file: Option<&NamedTempFile>) -> Region<'_> {
        let file = file.map(NamedTempFile::as_file);
        let at = self.file.map(|(_, offset)| offset);
        (self.addr, self.size, file.zip(at))
    }
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
        let [theirs, ours] = files.each_ref().map(|file| place.region(file.as_ref()));
        let expected = on_reference::Side::with_files(&[theirs]).map(|side| side.layout());
        let found = on_ours::Side::with_files(&[ours]).map(|side| side.layout());
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

fn random_access(random: &mut fastrand::Rng, end: u64) -> Op {
    let addr = random.u64(0..end + 0x100);
    let len = random.usize(0..0x3000);
    match random.u8(0..8) {
        0 => Op::Write(addr, len, random.u8(..)),
        1 => Op::Read(addr, len),
        2 => Op::WriteSlice(addr, len, random.u8(..)),
        3 => Op::ReadSlice(addr, len),
        4 => Op::WriteObj(addr, random.u64(..)),
        5 => Op::ReadObj(addr),
        6 => Op::HostAddress(addr),
        _ => Op::Marks,
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
        let [theirs, ours] = files
            .each_ref()
            .map(|file| places.map(|place| place.region(Some(file))));
        let mut expected = on_reference::Side::with_files(&theirs).unwrap();
        let mut found = on_ours::Side::with_files(&ours).unwrap();
        for _ in 0..400 {
            let access = random_access(&mut random, 0xc000);
            let (left, right) = (expected.run(access), found.run(access));
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
