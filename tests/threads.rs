//! Threads that access the same guest bytes see no torn or reordered values, and lose no marks.
//!
//! The tests are short enough for ThreadSanitizer, which checks the accesses themselves.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use test_support::{SetOnDrop, PAGE_U64 as PAGE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, VolatileMemory,
    VolatileSlice,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;
/// A write in a round, of bytes with a value.
type Write = fn(&Memory, u64, u8);
/// A read in a round.
type Read = fn(&Memory, u64);

const ROUNDS: u64 = 3_000;
const PAGES: u64 = 16;

/// Creates two adjacent regions, with one bit per page.
fn memory() -> Memory {
    let region = |start: u64| {
        let len = (PAGES / 2 * PAGE) as usize;
        let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(PAGE as usize).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    };
    Memory::from_regions(vec![region(0), region(PAGES / 2 * PAGE)]).unwrap()
}

/// Checks that the bytes of a value are all the same: a torn value has different ones.
fn uniform(bytes: &[u8]) {
    assert!(bytes.iter().all(|b| *b == bytes[0]), "torn: {bytes:x?}");
}

/// Returns an address in the first 256 bytes, aligned to `size`, which depends on the round.
fn slot(round: u64, size: u64) -> GuestAddress {
    GuestAddress(round * 7 % (256 / size) * size)
}

/// Writes of several sizes to the first 256 bytes, each with bytes that are all the same.
const WRITERS: [(&str, Write); 4] = [
    ("write_obj of 4 bytes", |memory, round, byte| {
        let value = u32::from_ne_bytes([byte; 4]);
        memory.write_obj(value, slot(round, 4)).unwrap();
    }),
    ("store of 8 bytes", |memory, round, byte| {
        let value = u64::from_ne_bytes([byte; 8]);
        let (addr, order) = (slot(round, 8), Ordering::Release);
        memory.store(value, addr, order).unwrap();
    }),
    ("write_slice of 8 bytes", |memory, round, byte| {
        memory.write_slice(&[byte; 8], slot(round, 8)).unwrap()
    }),
    (
        "copy_from and VolatileRef of 4 bytes",
        |memory, round, byte| {
            let value = u32::from_ne_bytes([byte; 4]);
            let slice = memory.get_slice(GuestAddress(0), 256).unwrap();
            slice.copy_from(&[value; 64]);
            let offset = slot(round, 4).0 as usize;
            slice.get_ref::<u32>(offset).unwrap().store(value);
        },
    ),
];

/// Reads of several sizes from the first 256 bytes, which check for torn values.
const READERS: [(&str, Read); 3] = [
    ("read_obj and load", |memory, round| {
        let value: u32 = memory.read_obj(slot(round, 4)).unwrap();
        uniform(&value.to_ne_bytes());
        let value: u16 = memory.load(slot(round, 2), Ordering::Acquire).unwrap();
        uniform(&value.to_ne_bytes());
    }),
    ("copy_to and load", |memory, round| {
        let mut copied = [0u32; 64];
        let slice = memory.get_slice(GuestAddress(0), 256).unwrap();
        assert_eq!(slice.copy_to(&mut copied), 64);
        let values = copied.iter();
        values.for_each(|value| uniform(&value.to_ne_bytes()));
        let value: u64 = memory.load(slot(round, 8), Ordering::SeqCst).unwrap();
        value.to_ne_bytes().chunks(4).for_each(uniform);
    }),
    ("read_slice", |memory, round| {
        let mut bytes = [0; 8];
        memory.read_slice(&mut bytes, slot(round, 8)).unwrap();
        bytes.chunks(4).for_each(uniform);
        let mut unaligned = [0; 100];
        memory.read_slice(&mut unaligned, GuestAddress(3)).unwrap();
        let mut host = [0u8; 64];
        let source = memory.get_slice(GuestAddress(5), 64).unwrap();
        source.copy_to_volatile_slice(VolatileSlice::from(host.as_mut_slice()));
    }),
];

#[test]
fn reads_during_writes_of_mixed_sizes_are_not_torn() {
    let (memory, done) = (&memory(), &AtomicBool::new(false));
    // The message of a panic contains the name of its thread.
    let named = |name: &str| thread::Builder::new().name(name.into());
    thread::scope(|scope| {
        let _done = SetOnDrop(done);
        let mut writers = Vec::new();
        for (number, (name, write)) in WRITERS.into_iter().enumerate() {
            let writer = named(name).spawn_scoped(scope, move || {
                for round in 0..ROUNDS {
                    let byte = (round % 50 * 4) as u8 + number as u8;
                    write(memory, round, byte);
                }
            });
            writers.push(writer.unwrap());
        }
        for (name, read) in READERS {
            let reader = named(name).spawn_scoped(scope, move || {
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    round += 1;
                    read(memory, round);
                }
            });
            reader.unwrap();
        }
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

/// The number of reads of a value. If a value is written in two parts, about one read in a few
/// thousand sees only the first part.
const TORN_ROUNDS: u64 = if cfg!(vm_memory_portable) {
    1_000
} else {
    200_000
};

/// Tests one writer and one reader of a value, for each pair of atomic kinds of access.
macro_rules! values_are_not_torn {
    ($($name:ident, $type:ty;)*) => {
        $(
            #[test]
            fn $name() {
                const SIZE: usize = size_of::<$type>();
                // Before the first whole block of a typed copy.
                const AT: GuestAddress = GuestAddress(32 - SIZE as u64);
                let memory = memory();
                let elements = || memory.get_slice(AT, SIZE * 20).unwrap();
                let write = |kind, value: $type| match kind {
                    "write_obj" => memory.write_obj(value, AT).unwrap(),
                    "store" => memory.store(value, AT, Ordering::Release).unwrap(),
                    "write_slice" => memory.write_slice(&value.to_ne_bytes(), AT).unwrap(),
                    _ => elements().copy_from(&[value; 20]),
                };
                let read = |kind| -> $type {
                    match kind {
                        "read_obj" => memory.read_obj(AT).unwrap(),
                        "load" => memory.load(AT, Ordering::Acquire).unwrap(),
                        "read_slice" => {
                            let mut bytes = [0; SIZE];
                            memory.read_slice(&mut bytes, AT).unwrap();
                            <$type>::from_ne_bytes(bytes)
                        }
                        _ => {
                            let mut copied = [0; 20];
                            elements().copy_to(&mut copied);
                            copied[0]
                        }
                    }
                };
                let writers = ["write_obj", "store", "write_slice", "copy_from"];
                let readers = ["read_obj", "load", "read_slice", "copy_to"];
                let pairs = writers.map(|writer| readers.map(|reader| (writer, reader)));
                for (writer, reader) in pairs.into_iter().flatten() {
                    let done = AtomicBool::new(false);
                    write(writer, 0);
                    let torn = thread::scope(|scope| {
                        scope.spawn(|| {
                            while !done.load(Ordering::Relaxed) {
                                write(writer, <$type>::MAX);
                                write(writer, 0);
                            }
                        });
                        let _done = SetOnDrop(&done);
                        let mut values = (0..TORN_ROUNDS).map(|_| read(reader));
                        values.find(|value| *value != 0 && *value != <$type>::MAX)
                    });
                    assert_eq!(torn, None, "written as {writer}, read as {reader}");
                }
            }
        )*
    };
}

values_are_not_torn! {
    value_of_2_bytes_is_not_torn, u16;
    value_of_4_bytes_is_not_torn, u32;
    value_of_8_bytes_is_not_torn, u64;
}

#[test]
fn load_acquire_of_released_flag_sees_earlier_writes() {
    let memory = memory();
    // Across the boundary of the regions, so that the copy has two segments.
    let (data, flag, reply) = (
        GuestAddress(PAGES / 2 * PAGE - 24),
        GuestAddress(0x40),
        GuestAddress(0x80),
    );
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                memory.write_slice(&[round as u8; 48], data).unwrap();
                memory.store(round, flag, Ordering::Release).unwrap();
                while memory.load::<u64>(reply, Ordering::Acquire).unwrap() != round {
                    thread::yield_now();
                }
            }
        });
        for round in 1..=ROUNDS {
            while memory.load::<u64>(flag, Ordering::Acquire).unwrap() != round {
                thread::yield_now();
            }
            assert_eq!(
                memory.read_obj::<[u8; 48]>(data).unwrap(),
                [round as u8; 48]
            );
            memory.store(round, reply, Ordering::Release).unwrap();
        }
    });
}

/// Copies dirty pages while devices write, as a migration does.
#[test]
fn harvest_during_writes_loses_no_page() {
    let (memory, copy) = (memory(), memory());
    let finished = AtomicU64::new(0);
    let harvest = || {
        let mut first = 0;
        for region in memory.iter() {
            for (number, word) in region.bitmap().get_and_reset().into_iter().enumerate() {
                for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                    let mut page = vec![0; PAGE as usize];
                    let at = GuestAddress(first + (number as u64 * 64 + bit) * PAGE);
                    memory.read_slice(&mut page, at).unwrap();
                    copy.write_slice(&page, at).unwrap();
                }
            }
            first += region.size() as u64;
        }
    };
    thread::scope(|scope| {
        for writer in 0..3u64 {
            let (memory, finished) = (&memory, &finished);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    // Each writer has bytes of its own in each page, and may cross into the next
                    // page.
                    let at = GuestAddress(
                        (round * 5 + writer) % (PAGES - 1) * PAGE + PAGE - 12 + writer * 8,
                    );
                    match round % 4 {
                        0 => memory.write_obj(round as u32, at).unwrap(),
                        1 => memory.store(round as u32, at, Ordering::Relaxed).unwrap(),
                        2 => memory.write_slice(&round.to_ne_bytes(), at).unwrap(),
                        _ => {
                            let bytes = round.to_ne_bytes();
                            memory
                                .read_exact_volatile_from(at, &mut bytes.as_slice(), 8)
                                .unwrap();
                        }
                    }
                }
                finished.fetch_add(1, Ordering::Release);
            });
        }
        while finished.load(Ordering::Acquire) != 3 {
            harvest();
        }
    });
    harvest();
    let all = |memory: &Memory| {
        let mut bytes = vec![0; (PAGES * PAGE) as usize];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    let (written, copied) = (all(&memory), all(&copy));
    for page in 0..PAGES as usize {
        let range = page * PAGE as usize..(page + 1) * PAGE as usize;
        assert!(
            written[range.clone()] == copied[range],
            "page {page} was written and not copied"
        );
    }
    assert!(written.iter().any(|b| *b != 0));
}

/// The two writers mark alternating bits of the same words.
#[test]
fn marks_of_two_writers_in_one_word_are_all_kept() {
    const SMALL: u64 = 16;
    let len = 4096 * SMALL;
    let bitmap = AtomicBitmap::new(len as usize, NonZeroUsize::new(SMALL as usize).unwrap());
    let mapping = MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let memory = Memory::from_regions(vec![region]).unwrap();
    let (begun, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut lost = 0;
    let rounds = ROUNDS / 10;
    let wait_for = |counter: &AtomicU64, count| {
        while counter.load(Ordering::Acquire) < count {
            thread::yield_now();
        }
    };
    let mark = |writer| {
        for page in (0..4096).filter(|page| page % 2 == writer) {
            memory.write_obj(1u8, GuestAddress(page * SMALL)).unwrap();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                wait_for(&begun, round);
                mark(1);
                done.store(round, Ordering::Release);
            }
        });
        for round in 1..=rounds {
            begun.store(round, Ordering::Release);
            mark(0);
            wait_for(&done, round);
            let words = memory.iter().next().unwrap().bitmap().get_and_reset();
            // Asserted below: a panic here would leave the other writer waiting.
            lost += words.iter().map(|word| word.count_zeros()).sum::<u32>();
        }
    });
    assert_eq!(lost, 0, "marks were lost");
}

#[test]
#[cfg(feature = "iommu")]
fn read_obj_during_remapping_returns_bytes_of_one_page() {
    use std::sync::RwLock;
    use vm_memory::iommu::{Error, Iotlb};
    use vm_memory::{GuestMemoryError, IommuMemory, Permissions};

    let physical = memory();
    physical.write_slice(&[1; 0x1000], GuestAddress(0)).unwrap();
    physical
        .write_slice(&[2; 0x1000], GuestAddress((PAGES - 1) * PAGE))
        .unwrap();
    let bitmap = AtomicBitmap::new(0x1000, NonZeroUsize::new(0x1000).unwrap());
    let memory = IommuMemory::new(physical, RwLock::<Iotlb>::default(), true, bitmap);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    match memory.read_obj::<[u8; 32]>(GuestAddress(0xf0)) {
                        Ok(bytes) => uniform(&bytes),
                        Err(GuestMemoryError::IommuError(Error::CannotResolve { .. })) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            });
        }
        let _done = SetOnDrop(&done);
        for round in 0..ROUNDS {
            let mut iotlb = memory.iommu().write().unwrap();
            match round % 3 {
                0 => iotlb
                    .set_mapping(GuestAddress(0), GuestAddress(0), 0x1000, Permissions::Read)
                    .unwrap(),
                1 => iotlb.invalidate_mapping(GuestAddress(0x100), 0x10),
                _ => {
                    let other = GuestAddress((PAGES - 1) * PAGE);
                    iotlb
                        .set_mapping(GuestAddress(0), other, 0x1000, Permissions::Read)
                        .unwrap();
                }
            }
        }
    });
}
