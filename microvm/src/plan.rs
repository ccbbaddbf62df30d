//! What the guest is to do, worked out before it starts: where its areas lie, which requests it
//! sends, and so which pages must be dirty when it has finished.
//!
//! The plan is written to guest memory as a table of 64-bit words at [`PARAMS`]. Both guests, the
//! one in assembly ([`crate::guest_program`]) and the one in Rust ([`crate::driver`]), read it there
//! and nowhere else, and leave their results at [`RESULTS`].
//!
//! Each region is cut into quarters:
//!
//! ```text
//!       | 1st quarter          | 2nd        | 3rd                  | 4th                   |
//!  low  | program, rings, stack| pattern    | read buffers, 1st ½  | write buffers, 1st ½  |
//!  high | used ring            | pattern    | read buffers, 2nd ½  | write buffers, 2nd ½  |
//! ```
//!
//! A request moves a chunk of 4 KiB, half of it to or from each region. The halves in the high
//! region straddle a page boundary.
//!
//! Memory that is plugged ([`crate::plug`]) has a pattern word at the end of each page, and at the start of some the halves of the chunks that
//! were written before, read into it.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::bus::{VIRTIO_MMIO, VIRTIO_MMIO_LEN};
use crate::error::Error;
use crate::memory::{GuestRam, HIGH_START, HOLE_START, PAGE};
use crate::pages::PageMap;
use crate::plug::{Place, PLUG_MMIO, PLUG_MMIO_LEN};

/// Where the table of parameters lies.
pub const PARAMS: u64 = 0x8000;
/// Where the guest leaves its results.
pub const RESULTS: u64 = 0x9000;
/// Where the guest program is loaded.
pub const PROGRAM: u64 = 0x10_0000;
/// The top of the guest's stack; it uses less than a page.
pub const STACK_TOP: u64 = 0x11_0000;
const QUEUE_DESC: u64 = 0x12_0000;
const QUEUE_AVAIL: u64 = 0x12_1000;
/// Request headers and status bytes: 32 bytes for each slot.
const REQUESTS: u64 = 0x12_2000;
const QUEUE_USED: u64 = HIGH_START;

/// Descriptors of the virtqueue that the guest sets up.
pub const QUEUE_SIZE: u64 = 32;
/// Requests in flight at a time, each of four descriptors.
pub const SLOTS: u64 = 8;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Sectors of a chunk, half of them in each region.
pub const CHUNK_SECTORS: u64 = 8;
/// Bytes of half a chunk.
pub const HALF: u64 = CHUNK_SECTORS * SECTOR / 2;
/// Chunks that are read at most: 1 MiB.
const READ_CHUNKS: u64 = 256;
/// Chunks that are written at most: 64 KiB.
const WRITE_CHUNKS: u64 = 16;
/// Pages of the pattern in each region, at most.
const PATTERN_PAGES: u64 = 512;
/// A pattern word every so many bytes.
pub const PATTERN_STEP: u64 = 512;
/// Requests that the device must refuse: past the end, of no known type, with a buffer in the hole.
pub const BAD_REQUESTS: u64 = 3;
/// Requests more that it must refuse where memory is plugged: with a buffer in a block that has not come, in one that has gone, and in the region that
/// has gone.
pub const BAD_PLUG_REQUESTS: u64 = 3;
/// Accesses to the registers of the device that memory comes by, where there is one.
pub const PLUG_ACCESSES: u64 = 15;
/// Where in each page of plugged memory its pattern word lies.
pub const PLUG_WORD: u64 = PAGE - 8;
/// The request type that no device knows.
pub const BAD_TYPE: u32 = 0x77;

/// Passes of a [`Storm`]: reads and writes in turn.
pub const STORM_PASSES: usize = 4;

/// The multiplier of [`mix`]: odd, so that no two addresses get the same word.
pub const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
/// The seed of [`mix`].
const SEED: u64 = 0x6d69_6372_6f76_6d21;

/// Indices of the parameter table.
pub mod param {
    /// Seed of the pattern.
    pub const SEED: usize = 0;
    /// Multiplier of the pattern.
    pub const MIX: usize = 1;
    /// Guest address of the virtio-mmio registers.
    pub const MMIO: usize = 2;
    /// Two pattern areas, each of start, pages, and bytes from page to page.
    pub const AREAS: usize = 3;
    /// Descriptor table.
    pub const DESC: usize = 9;
    /// Available ring.
    pub const AVAIL: usize = 10;
    /// Used ring.
    pub const USED: usize = 11;
    /// Request headers and status bytes.
    pub const REQUESTS: usize = 12;
    /// Capacity of the disk, in sectors.
    pub const CAPACITY: usize = 13;
    /// Checksum of what is read.
    pub const SUM: usize = 14;
    /// From this chunk on, the guest stamps what it has read.
    pub const STAMP_FROM: usize = 15;
    /// An address that no memory has.
    pub const HOLE: usize = 16;
    /// Number of passes.
    pub const PASS_COUNT: usize = 17;
    /// Guest address of the registers of the device that memory comes by; 0 if there is none.
    pub const PLUG: usize = 18;
    /// The passes, of [`super::pass::WORDS`] words each.
    pub const PASSES: usize = 19;
    /// Passes that there is room for.
    pub const MAX_PASSES: usize = 3 + super::STORM_PASSES;
    /// A pass whose buffers lie in plugged memory; their addresses count from where it begins.
    pub const PLUG_PASS: usize = PASSES + MAX_PASSES * super::pass::WORDS;
    /// Words of the whole table.
    pub const WORDS: usize = PLUG_PASS + super::pass::WORDS;
}

/// Indices of a pass: a run of equal requests over consecutive chunks.
pub mod pass {
    /// virtio-blk request type.
    pub const TYPE: usize = 0;
    /// First sector.
    pub const SECTOR: usize = 1;
    /// Number of chunks.
    pub const CHUNKS: usize = 2;
    /// First half's buffer of the first chunk.
    pub const LOW: usize = 3;
    /// Bytes from one such buffer to the next.
    pub const LOW_STRIDE: usize = 4;
    /// Second half's buffer of the first chunk.
    pub const HIGH: usize = 5;
    /// Bytes from one such buffer to the next.
    pub const HIGH_STRIDE: usize = 6;
    /// What is done to the buffers before the request, of [`super::op`].
    pub const BEFORE: usize = 7;
    /// What is done with them after it.
    pub const AFTER: usize = 8;
    /// Not 0 if a request may come back with an I/O error.
    pub const MAY_FAIL: usize = 9;
    /// Words of a pass.
    pub const WORDS: usize = 10;
}

/// What a guest does with a buffer.
pub mod op {
    /// Nothing.
    pub const NONE: u64 = 0;
    /// Fills it with pattern words, by their place on the disk.
    pub const FILL: u64 = 1;
    /// Fills it with zeroes, which no pattern has.
    pub const WIPE: u64 = 2;
    /// Compares it with the pattern.
    pub const COMPARE: u64 = 3;
    /// Adds its words to the checksum, and stamps it.
    pub const SUM: u64 = 4;
}

/// Indices of the results.
pub mod result {
    /// [`super::step`] at which the guest stopped.
    pub const STEP: usize = 0;
    /// Where it found something wrong: an address, a word of the disk, or a slot.
    pub const WHERE: usize = 1;
    /// What should have been there.
    pub const WANT: usize = 2;
    /// What was.
    pub const GOT: usize = 3;
    /// Pages of pattern that were checked, both times together.
    pub const PAGES: usize = 4;
    /// Requests that the device completed as they should be, refused ones included.
    pub const REQUESTS: usize = 5;
    /// Of those, requests of a pass that may fail which did.
    pub const FAILED: usize = 6;
    /// Pages of plugged memory that were checked, both times together.
    pub const PLUGGED: usize = 7;
    /// Words of the results.
    pub const WORDS: usize = 8;
}

/// The steps of a guest, as it reports the one that failed.
pub mod step {
    /// Everything agreed.
    pub const DONE: u64 = 0;
    /// A pattern word was not what had been written.
    pub const MEMORY: u64 = 1;
    /// The device is no block device, or refuses to be set up.
    pub const VIRTIO: u64 = 2;
    /// The device did not answer, or not as the used ring should look.
    pub const QUEUE: u64 = 3;
    /// A request ended with another status than it should.
    pub const STATUS: u64 = 4;
    /// The checksum of what was read is wrong.
    pub const READ: u64 = 5;
    /// What was written does not read back.
    pub const WRITE: u64 = 6;
    /// The device that memory comes by is none, or refuses.
    pub const PLUG: u64 = 7;
    /// The host puts this there before the start.
    pub const NEVER: u64 = u64::MAX;
}

/// The name of a step.
pub fn step_name(step: u64) -> &'static str {
    match step {
        step::DONE => "done",
        step::MEMORY => "memory pattern (where: guest address)",
        step::VIRTIO => "setting up the device (where: register)",
        step::QUEUE => "waiting for the used ring (where: its index)",
        step::STATUS => "request status (where: slot)",
        step::READ => "checksum of the disk",
        step::WRITE => "reading back what was written (where: word of the disk)",
        step::PLUG => "plugging memory (where: register)",
        step::NEVER => "the guest never reported",
        _ => "a step that does not exist",
    }
}

/// The word that belongs at `place`: an address in memory, or a word of the disk.
pub fn mix(place: u64) -> u64 {
    (place ^ SEED).wrapping_mul(MIX)
}

/// One more word of the checksum.
pub fn sum(sum: u64, word: u64) -> u64 {
    (sum.rotate_left(5) ^ word).wrapping_mul(MIX)
}

/// A run of pages that carries the pattern.
#[derive(Clone, Copy, Debug)]
struct Area {
    start: u64,
    pages: u64,
    stride: u64,
}

/// Buffers for the halves of consecutive chunks, evenly spaced.
#[derive(Clone, Copy, Debug)]
struct Buffers {
    start: u64,
    stride: u64,
}

impl Buffers {
    fn of(&self, chunk: u64) -> u64 {
        self.start + chunk * self.stride
    }
}

/// Requests between sectors and guest memory that may be gone when the device gets there ([`crate::chaos`]).
///
/// They come after all others, some of them reads and some writes, and each may fail. The guest only names the buffers: a vCPU
/// that touched memory which is gone would be stopped by KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storm {
    /// The first of the sectors; they are the last ones of the disk.
    pub sector: u64,
    /// Chunks of each pass.
    pub chunks: u64,
    /// Guest address of the buffers, a chunk each, one behind the other.
    pub buffers: u64,
}

impl Storm {
    /// Requests of all passes.
    pub fn requests(&self) -> u64 {
        STORM_PASSES as u64 * self.chunks
    }
}

/// The plan of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    areas: [Area; 2],
    read: [Buffers; 2],
    write: [Buffers; 2],
    /// Sectors of the disk.
    pub capacity: u64,
    /// Sectors that stay where they are: all, unless there is a storm.
    steady: u64,
    storm: Option<Storm>,
    /// Where memory comes while the guest runs, if it does.
    pub plug: Option<Place>,
    /// Chunks that are read, from sector 0 on.
    pub read_chunks: u64,
    /// Chunks that are written, at the end of the disk.
    pub write_chunks: u64,
    stamp_from: u64,
}

impl Plan {
    /// Plans a run in `ram` with a disk of `capacity` sectors, at least [`CHUNK_SECTORS`].
    pub fn new(ram: &GuestRam, capacity: u64) -> Self {
        let chunks = capacity / CHUNK_SECTORS;
        let (read_chunks, write_chunks) = (chunks.min(READ_CHUNKS), chunks.min(WRITE_CHUNKS));
        let mut regions = ram
            .iter()
            .map(|r| (r.start_addr().0, (r.len() / 4) & !(PAGE - 1)));
        // memory::layout made two regions; with fewer the pattern alone would show it.
        let mut next = || regions.next().unwrap_or((0, 0));
        let (low, high) = (next(), next());
        let area = |(start, quarter): (u64, u64)| {
            let pages = PATTERN_PAGES.min(quarter / PAGE);
            Area {
                start: start + quarter,
                pages,
                stride: stride(quarter, PATTERN_PAGES),
            }
        };
        let buffers = |(start, quarter): (u64, u64), nth: u64, count: u64, offset: u64| Buffers {
            start: start + nth * quarter + offset,
            stride: stride(quarter, count),
        };
        // The offset in the high region makes each half touch two pages.
        let pair = |nth, count| {
            [
                buffers(low, nth, count, 0),
                buffers(high, nth, count, PAGE - HALF / 2),
            ]
        };
        Self {
            areas: [area(low), area(high)],
            read: pair(2, READ_CHUNKS),
            write: pair(3, WRITE_CHUNKS),
            capacity,
            steady: capacity,
            storm: None,
            plug: None,
            read_chunks,
            write_chunks,
            stamp_from: read_chunks / 2,
        }
    }

    /// Adds a storm on sectors behind those of the plan.
    pub fn with_storm(self, storm: Storm) -> Self {
        Self {
            capacity: storm.sector + storm.chunks * CHUNK_SECTORS,
            storm: Some(storm),
            ..self
        }
    }

    /// Lets memory come while the guest runs.
    pub fn with_plug(self, plug: Option<Place>) -> Self {
        Self { plug, ..self }
    }

    /// No page of `ram`, nor of the memory that comes.
    pub fn no_pages(&self, ram: &GuestRam) -> PageMap {
        let layout = ram.iter().map(|r| (r.start_addr().0, r.len()));
        let plug = self.plug.map(|plug| (plug.start, plug.size));
        PageMap::with_layout(&layout.chain(plug).collect::<Vec<_>>())
    }

    /// Chunks that are read into plugged memory: the ones that were written before.
    fn plug_chunks(&self) -> u64 {
        self.plug.map_or(0, |_| self.write_chunks)
    }

    /// Requests that the device must refuse.
    pub fn bad_requests(&self) -> u64 {
        BAD_REQUESTS + self.plug.map_or(0, |_| BAD_PLUG_REQUESTS)
    }

    /// Requests that read.
    pub fn reads(&self) -> u64 {
        self.read_chunks + self.write_chunks + self.plug_chunks()
    }

    /// Pages of plugged memory that the guest checks, both times together.
    pub fn plugged_pages(&self) -> u64 {
        self.plug
            .map_or(0, |plug| (plug.first() + plug.kept()) / PAGE)
    }

    /// Requests of the storm.
    pub fn storm_requests(&self) -> u64 {
        self.storm.map_or(0, |storm| storm.requests())
    }

    /// The first sector that is written.
    pub fn write_sector(&self) -> u64 {
        self.steady - self.write_chunks * CHUNK_SECTORS
    }

    /// Pages of the pattern, in both regions.
    pub fn pattern_pages(&self) -> u64 {
        self.areas.iter().map(|a| a.pages).sum()
    }

    /// Good and bad requests that the guest sends.
    pub fn requests(&self) -> u64 {
        self.reads() + self.write_chunks + self.storm_requests() + 1 + self.bad_requests()
    }

    /// Notifications of the queue: one for each batch of requests.
    pub fn kicks(&self) -> u64 {
        let storm = self.storm.map_or(0, |storm| {
            STORM_PASSES as u64 * storm.chunks.div_ceil(SLOTS)
        });
        let written = 2 * self.write_chunks.div_ceil(SLOTS) + self.plug_chunks().div_ceil(SLOTS);
        self.read_chunks.div_ceil(SLOTS) + written + storm + 1 + self.bad_requests()
    }

    /// Writes parameters and empty results to guest memory.
    ///
    /// # Errors
    ///
    /// [`Error::GuestMemory`] when memory is not there.
    pub fn store(&self, ram: &GuestRam, checksum: u64) -> Result<(), Error> {
        let mut table = vec![SEED, MIX, VIRTIO_MMIO];
        table.extend(self.areas.iter().flat_map(|a| [a.start, a.pages, a.stride]));
        table.extend([
            QUEUE_DESC,
            QUEUE_AVAIL,
            QUEUE_USED,
            REQUESTS,
            self.capacity,
            checksum,
        ]);
        let passes = 3 + if self.storm.is_some() {
            STORM_PASSES as u64
        } else {
            0
        };
        table.extend([
            self.stamp_from,
            HOLE_START + (VIRTIO_MMIO - HOLE_START) / 2,
            passes,
            self.plug.map_or(0, |_| PLUG_MMIO),
        ]);
        let mut pass = |kind: u64, sector: u64, chunks: u64, on: &[Buffers; 2], before, after| {
            let [low, high] = on;
            table.extend([
                kind,
                sector,
                chunks,
                low.start,
                low.stride,
                high.start,
                high.stride,
            ]);
            table.extend([before, after, 0]);
        };
        pass(0, 0, self.read_chunks, &self.read, op::NONE, op::SUM);
        pass(
            1,
            self.write_sector(),
            self.write_chunks,
            &self.write,
            op::FILL,
            op::NONE,
        );
        pass(
            0,
            self.write_sector(),
            self.write_chunks,
            &self.write,
            op::WIPE,
            op::COMPARE,
        );
        if let Some(Storm {
            sector,
            chunks,
            buffers,
        }) = self.storm
        {
            for nth in 0..STORM_PASSES as u64 {
                table.extend([
                    nth % 2,
                    sector,
                    chunks,
                    buffers,
                    2 * HALF,
                    buffers + HALF,
                    2 * HALF,
                ]);
                table.extend([op::NONE, op::NONE, 1]);
            }
        }
        if self.plug.is_some() {
            // Halves in pages of their own, clear of the pattern words.
            table.resize(param::PLUG_PASS, 0);
            table.extend([0, self.write_sector(), self.write_chunks, 0, 2 * PAGE]);
            table.extend([PAGE, 2 * PAGE, op::WIPE, op::COMPARE, 0]);
        }
        let mut results = [0; result::WORDS];
        results[result::STEP] = step::NEVER;
        // Memory that is a file's may have rings of another run.
        let words = [
            (PARAMS, table.as_slice()),
            (RESULTS, results.as_slice()),
            (QUEUE_AVAIL, &[0]),
            (QUEUE_USED, &[0]),
        ];
        for (at, words) in words {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            ram.write_slice(&bytes, GuestAddress(at))
                .map_err(|why| Error::GuestMemory {
                    what: "write the guest's parameters",
                    why,
                })?;
        }
        Ok(())
    }

    /// The pages that the driver writes: a thread, or a vCPU, which has its `stack` there too.
    pub fn driver_pages(&self, ram: &GuestRam, stack: bool) -> PageMap {
        let mut pages = self.no_pages(ram);
        if let Some(plug) = self.plug {
            pages.add(plug.start, plug.first());
        }
        if stack {
            pages.add(STACK_TOP - 8, 8);
        }
        for area in self.areas {
            for n in 0..area.pages {
                pages.add(area.start + n * area.stride, PAGE);
            }
        }
        for chunk in self.stamp_from..self.read_chunks {
            pages.add(self.read[0].of(chunk), 8);
        }
        for chunk in 0..self.write_chunks {
            for half in self.write {
                pages.add(half.of(chunk), HALF);
            }
        }
        pages.add(QUEUE_DESC, QUEUE_SIZE * 16);
        pages.add(QUEUE_AVAIL, 4 + QUEUE_SIZE * 2);
        pages.add(REQUESTS, SLOTS * 32);
        pages.add(RESULTS, result::WORDS as u64 * 8);
        pages
    }

    /// Every address that must hold a pattern word when the guest has finished.
    pub fn pattern_words(&self) -> impl Iterator<Item = u64> + '_ {
        self.areas.iter().flat_map(|area| {
            let page = move |n| area.start + n * area.stride;
            (0..area.pages)
                .flat_map(move |n| (page(n)..page(n) + PAGE).step_by(PATTERN_STEP as usize))
        })
    }

    /// The halves of every chunk that was read: sector, guest address, and whether the guest
    /// stamped its first word.
    pub fn read_halves(&self) -> impl Iterator<Item = (u64, u64, bool)> + '_ {
        (0..self.read_chunks).flat_map(|chunk| {
            let sector = chunk * CHUNK_SECTORS;
            let [low, high] = [self.read[0].of(chunk), self.read[1].of(chunk)];
            [
                (sector, low, chunk >= self.stamp_from),
                (sector + CHUNK_SECTORS / 2, high, false),
            ]
        })
    }

    /// What the plan puts where, for the memory map: guest address, length, name.
    pub fn places(&self) -> Vec<(u64, u64, &'static str)> {
        let mut places = vec![
            (PARAMS, PAGE, "parameters"),
            (RESULTS, PAGE, "results"),
            (PROGRAM, STACK_TOP - PROGRAM, "guest program and stack"),
            (
                QUEUE_DESC,
                REQUESTS + PAGE - QUEUE_DESC,
                "descriptors, available ring, requests",
            ),
            (QUEUE_USED, PAGE, "used ring"),
            (VIRTIO_MMIO, VIRTIO_MMIO_LEN, "virtio-mmio block device"),
        ];
        if self.plug.is_some() {
            places.push((PLUG_MMIO, PLUG_MMIO_LEN, "memory device"));
        }
        let span = |start: u64, stride: u64, count: u64| (start & !(PAGE - 1), stride * count);
        for area in self.areas {
            let (start, len) = span(area.start, area.stride, area.pages);
            places.push((start, len, "pattern"));
        }
        for half in self.read {
            let (start, len) = span(half.start, half.stride, READ_CHUNKS);
            places.push((start, len, "read buffers"));
        }
        for half in self.write {
            let (start, len) = span(half.start, half.stride, WRITE_CHUNKS);
            places.push((start, len, "write buffers"));
        }
        places.sort_unstable();
        places
    }
}

/// The page-aligned distance at which `count` things fill `len` bytes.
fn stride(len: u64, count: u64) -> u64 {
    ((len / count) & !(PAGE - 1)).max(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{map, Backing, MAX_MEM, MIN_MEM};

    #[test]
    fn areas_lie_in_memory_and_apart() {
        for mem in [MIN_MEM, MIN_MEM + PAGE, 100 << 20, 256 << 20, MAX_MEM] {
            let ram = map(mem, Backing::Anonymous).unwrap();
            for capacity in [8, 9, 100, 2048, 1 << 40] {
                let plan = Plan::new(&ram, capacity);
                let places = plan.places();
                for pair in places.windows(2) {
                    assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{mem:#x}: {pair:x?}");
                }
                for (start, len, name) in places.into_iter().filter(|p| p.0 != VIRTIO_MMIO) {
                    let len = usize::try_from(len).unwrap();
                    assert!(
                        GuestMemoryBackend::check_range(&ram, GuestAddress(start), len),
                        "{name}"
                    );
                }
                assert!(plan
                    .read_halves()
                    .all(|(_, at, _)| ram.address_in_range(GuestAddress(at + HALF))));
            }
        }
    }

    #[test]
    fn pages_are_counted_as_they_are_laid_out() {
        let ram = map(256 << 20, Backing::Anonymous).unwrap();
        let plan = Plan::new(&ram, 2048);
        // 2 x 512 pages of pattern, 128 stamps, 16 x (1 + 2) pages written, 4 of rings and results.
        assert_eq!(plan.driver_pages(&ram, false).count(), 1024 + 128 + 48 + 4);
        assert_eq!(plan.pattern_words().count(), 1024 * 8);
        assert_eq!((plan.requests(), plan.kicks()), (292, 40));
    }

    #[test]
    fn the_table_has_the_length_its_indices_say() {
        let ram = map(MIN_MEM, Backing::Anonymous).unwrap();
        let plan = Plan::new(&ram, 64);
        // Rings of another run, in memory that is a file's.
        for ring in [QUEUE_AVAIL, QUEUE_USED] {
            ram.write_obj(u64::MAX, GuestAddress(ring)).unwrap();
        }
        plan.store(&ram, 7).unwrap();
        for ring in [QUEUE_AVAIL, QUEUE_USED] {
            assert_eq!(ram.read_obj::<u32>(GuestAddress(ring)).unwrap(), 0);
        }
        let word = |index: usize| {
            ram.read_obj::<u64>(GuestAddress(PARAMS + 8 * index as u64))
                .unwrap()
        };
        assert_eq!((word(param::SUM), word(param::PASS_COUNT)), (7, 3));
        assert_eq!(
            word(param::PASSES + 2 * pass::WORDS + pass::AFTER),
            op::COMPARE
        );
        assert_eq!(word(param::PASSES + 3 * pass::WORDS), 0);
        let storm = Storm {
            sector: 64,
            chunks: 3,
            buffers: 0x1234_0000,
        };
        let plan = plan.with_storm(storm);
        plan.store(&ram, 7).unwrap();
        assert_eq!(
            (word(param::CAPACITY), word(param::PASS_COUNT)),
            (64 + 24, 7)
        );
        let last = param::PASSES + (param::MAX_PASSES - 1) * pass::WORDS;
        assert_eq!(word(last + pass::MAY_FAIL), 1);
        assert_eq!(word(param::WORDS), 0);
        assert_eq!(
            (plan.requests(), plan.kicks()),
            (3 * 8 + 4 * 3 + 1 + 3, 3 + 4 + 1 + 3)
        );
        let plug = Place::above(&ram);
        let plan = plan.with_plug(Some(plug));
        plan.store(&ram, 7).unwrap();
        assert_eq!(
            (word(param::PLUG), word(last + pass::MAY_FAIL)),
            (PLUG_MMIO, 1)
        );
        assert_eq!(word(param::PLUG_PASS + pass::AFTER), op::COMPARE);
        assert_eq!(word(param::PLUG_PASS + pass::SECTOR), plan.write_sector());
        // 8 chunks more are read, and 3 requests refused.
        assert_eq!((plan.requests(), plan.kicks()), (40 + 8 + 3, 11 + 1 + 3));
        assert_eq!(plan.no_pages(&ram).all(), (MIN_MEM + plug.size) / PAGE);
    }
}
