//! No access uses a mapping after its invalidation was acknowledged, while several devices access
//! memory and the front end maps and invalidates pages.
//!
//! Each mapped page is stamped with the number of its mapping. After the invalidation, the page is
//! filled with [`POISON`], and used for another mapping later. A dead mapping was used if
//!
//! - a device reads poison, or the stamp of a mapping that was invalidated before the read began;
//! - a page no longer contains only poison when it is used again.
//!
//! `IOMMU_INVALIDATIONS` sets the number of invalidations; the default is 800.

mod common;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use common::{end, setup, user, Memory, Physical, Setup, HIGH, LOW, PAGE, REGION};
use verify_iommu::FrontEnd;
use vm_memory::bitmap::Bitmap;
use vm_memory::iommu::Error as IommuError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryResult, Permissions,
};
use vm_memory_vhost::IotlbMessage;

/// The address of the first page that the front end maps.
const IOVA: u64 = 0x10_0000;
const PAGES: u64 = 8;
const DEVICES: usize = 3;

/// Neither a stamp nor a value that devices write.
const POISON: u64 = 0xdead_dead_dead_dead;
/// The highest byte of the values that devices write.
const MARK: u64 = 0x77 << 56;
/// The offset of the half of a page that devices write. The stamps are before it.
const DEVICE_HALF: u64 = PAGE / 2;

/// A mapping in the front end's table.
#[derive(Clone, Copy)]
struct Mapped {
    guest: u64,
    number: u64,
    writable: bool,
}

struct Guest<'a> {
    physical: &'a Physical,
    front_end: &'a FrontEnd,
    /// Locked while a message is sent: an update must not overtake the invalidation of its mapping.
    table: Mutex<Vec<Option<Mapped>>>,
    /// For each page, the number of the last mapping that was invalidated.
    dead: Vec<AtomicU64>,
    misses: AtomicU64,
    /// The number of accesses that the IOMMU has reported as not permitted.
    breaches: AtomicU64,
    /// The accesses of each device.
    devices: [Count; DEVICES],
    stop: AtomicBool,
}

/// The counts of accesses of a device.
#[derive(Debug, Default)]
struct Count {
    reads: AtomicU64,
    writes: AtomicU64,
    refused: AtomicU64,
}

impl Count {
    fn load(&self) -> [u64; 3] {
        [&self.reads, &self.writes, &self.refused].map(|count| count.load(Ordering::Relaxed))
    }
}

fn add_one(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// Stops all threads when one ends or panics.
struct StopAll<'a>(&'a AtomicBool);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn iova_of(page: u64) -> u64 {
    IOVA + page * PAGE
}

fn stamp(page: u64, number: u64) -> u64 {
    number * PAGES + page
}

impl Guest<'_> {
    fn words(&self, guest: u64) -> Vec<u64> {
        let mut bytes = vec![0; PAGE as usize];
        self.physical
            .read_slice(&mut bytes, GuestAddress(guest))
            .unwrap();
        words(&bytes)
    }

    fn fill(&self, guest: u64, from: u64, to: u64, word: u64) {
        let bytes = word.to_ne_bytes().repeat(((to - from) / 8) as usize);
        self.physical
            .write_slice(&bytes, GuestAddress(guest + from))
            .unwrap();
    }

    fn send_update(&self, page: u64, mapped: Mapped) {
        let access = if mapped.writable {
            Permissions::ReadWrite
        } else {
            Permissions::Read
        };
        let sent = self
            .front_end
            .update(iova_of(page), PAGE, user(mapped.guest), access);
        assert!(sent.unwrap());
    }

    /// Checks and poisons a page whose invalidation was acknowledged.
    fn reclaim(&self, page: u64, mapped: Mapped) {
        self.dead[page as usize].store(mapped.number, Ordering::Release);
        let words = self.words(mapped.guest);
        let (stamps, devices) = words.split_at(words.len() / 2);
        assert!(
            stamps
                .iter()
                .all(|word| *word == stamp(page, mapped.number)),
            "the stamps were overwritten"
        );
        let written = devices.iter().filter(|word| **word != 0);
        for word in written {
            assert_eq!(word >> 56, MARK >> 56, "page {page} has {word:#x}");
            assert!(mapped.writable, "page {page} is read-only and was written");
        }
        self.fill(mapped.guest, 0, PAGE, POISON);
    }

    /// Returns whether each device has read, written and been refused, and the IOMMU has reported
    /// misses and breaches.
    fn has_seen_everything(&self) -> bool {
        let has_accessed = |device: &Count| {
            let [reads, writes, refused] = device.load();
            reads > 10 && writes > 10 && refused > 0
        };
        self.devices.iter().all(has_accessed)
            && self.misses.load(Ordering::Relaxed) > 10
            && self.breaches.load(Ordering::Relaxed) > 0
    }

    /// Waits for `count` accesses of devices.
    fn let_devices_access(&self, count: u64) {
        let accesses = || -> u64 { self.devices.iter().flat_map(Count::load).sum() };
        let before = accesses();
        while accesses() - before < count && !self.stop.load(Ordering::Relaxed) {
            thread::yield_now();
        }
    }

    /// Maps and invalidates random pages until `count` pages were invalidated and
    /// [`has_seen_everything`](Self::has_seen_everything). Returns the number of invalidations.
    fn map_and_invalidate(&self, count: u64) -> u64 {
        let _stop = StopAll(&self.stop);
        let mut random = fastrand::Rng::new();
        let mut free: VecDeque<u64> = (0..REGION / PAGE)
            .flat_map(|page| [LOW + page * PAGE, HIGH + page * PAGE])
            .collect();
        for guest in &free {
            self.fill(*guest, 0, PAGE, POISON);
        }
        let (mut number, mut invalidated) = (0, 0);
        while !self.stop.load(Ordering::Relaxed)
            && (invalidated < count || !self.has_seen_everything())
        {
            assert!(
                invalidated < 100 * (count + 1),
                "{:?}: a device does not access memory",
                self.devices
            );
            let mut table = self.table.lock().unwrap();
            let page = random.u64(0..PAGES);
            if random.u8(..) < 4 {
                // All pages at once, and the addresses after them.
                assert!(self.front_end.invalidate(IOVA, u64::MAX).unwrap());
                for (page, mapped) in (0..).zip(table.iter_mut()) {
                    if let Some(mapped) = mapped.take() {
                        self.reclaim(page, mapped);
                        free.push_back(mapped.guest);
                        invalidated += 1;
                    }
                }
            } else if let Some(mapped) = table[page as usize].take() {
                assert!(self.front_end.invalidate(iova_of(page), PAGE).unwrap());
                self.reclaim(page, mapped);
                free.push_back(mapped.guest);
                invalidated += 1;
            } else {
                let guest = free.pop_front().unwrap();
                assert!(
                    self.words(guest).iter().all(|word| *word == POISON),
                    "guest page {guest:#x} was written after the invalidation of its mapping"
                );
                number += 1;
                self.fill(guest, 0, DEVICE_HALF, stamp(page, number));
                self.fill(guest, DEVICE_HALF, PAGE, 0);
                let mapped = Mapped {
                    guest,
                    number,
                    writable: random.u8(..4) != 0,
                };
                table[page as usize] = Some(mapped);
                if random.bool() {
                    self.send_update(page, mapped);
                }
            }
            drop(table);
            if random.u8(..4) == 0 {
                self.let_devices_access(random.u64(0..16));
            }
        }
        invalidated
    }

    /// Replies to misses of mapped pages.
    fn reply_to_misses(&self) {
        let _stop = StopAll(&self.stop);
        while !self.stop.load(Ordering::Relaxed) {
            let Some(request) = self
                .front_end
                .next_request(Some(Duration::from_millis(20)))
                .unwrap()
            else {
                continue;
            };
            let (iova, size) = match request {
                IotlbMessage::Miss { iova, size, .. } => (iova.0, size),
                IotlbMessage::AccessFail { .. } => {
                    add_one(&self.breaches);
                    continue;
                }
                other => panic!("{other:?}"),
            };
            add_one(&self.misses);
            let table = self.table.lock().unwrap();
            let last = iova + size - 1;
            let pages = (iova - IOVA) / PAGE..=(last - IOVA) / PAGE;
            for page in pages {
                if let Some(mapped) = table[page as usize] {
                    self.send_update(page, mapped);
                }
            }
        }
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect()
}

struct Device<'a> {
    memory: &'a Memory,
    guest: &'a Guest<'a>,
    written: &'a [AtomicBool],
    random: fastrand::Rng,
    count: &'a Count,
}

impl Device<'_> {
    /// Counts an access that the IOMMU refused. Other errors fail the test.
    fn refused<T>(&mut self, result: GuestMemoryResult<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(GuestMemoryError::IommuError(IommuError::CannotResolve { reason, .. })) => {
                let known =
                    reason.contains("no mapping arrived") || reason.contains("does not permit");
                assert!(known || self.guest.stop.load(Ordering::Relaxed), "{reason}");
                add_one(&self.count.refused);
                None
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    fn check_stamps(&self, page: u64, dead: u64, words: &[u64]) {
        let first = words[0];
        assert_ne!(first, POISON, "page {page} was read after its invalidation");
        assert_eq!(first % PAGES, page);
        assert!(
            first / PAGES > dead,
            "page {page}: mapping {} was used after the invalidation of {dead}",
            first / PAGES
        );
        assert!(words.iter().all(|word| *word == first), "{words:x?}");
    }

    fn check_device_half(&self, words: &[u64]) {
        for word in words {
            assert!(*word == 0 || word >> 56 == MARK >> 56, "{word:#x}");
        }
    }

    /// Reads bytes in one of several ways.
    fn read(&mut self, iova: u64, len: usize) -> GuestMemoryResult<Vec<u8>> {
        let at = GuestAddress(iova);
        let mut bytes = vec![0; len];
        match self.random.u8(..3) {
            0 => self.memory.read_slice(&mut bytes, at)?,
            1 => {
                bytes.clear();
                self.memory.write_all_volatile_to(at, &mut bytes, len)?;
            }
            _ => {
                let mut done = 0;
                // The loop keeps the iterator while its slices are used.
                for slice in self.memory.get_slices(at, len, Permissions::Read)? {
                    let slice = slice?;
                    slice.copy_to(&mut bytes[done..done + slice.len()]);
                    done += slice.len();
                }
                assert_eq!(done, len);
            }
        }
        Ok(bytes)
    }

    fn write(&mut self, iova: u64, bytes: &[u8]) -> GuestMemoryResult<()> {
        let at = GuestAddress(iova);
        match self.random.u8(..2) {
            0 => self.memory.write_slice(bytes, at),
            _ => self
                .memory
                .read_exact_volatile_from(at, &mut &bytes[..], bytes.len()),
        }
    }

    fn wrote(&mut self, page: u64) {
        add_one(&self.count.writes);
        self.written[page as usize].store(true, Ordering::Relaxed);
    }

    fn step(&mut self) {
        let page = self.random.u64(0..PAGES);
        let dead = |page: u64| self.guest.dead[page as usize].load(Ordering::Acquire);
        let in_device_half = iova_of(page) + DEVICE_HALF + 8 * self.random.u64(0..200);
        match self.random.u8(..7) {
            0 => {
                let before = dead(page);
                let iova = iova_of(page) + 8 * self.random.u64(0..200);
                let result = self.read(iova, 64);
                if let Some(bytes) = self.refused(result) {
                    self.check_stamps(page, before, &words(&bytes));
                    add_one(&self.count.reads);
                }
            }
            1 => {
                let before = dead(page);
                let iova = GuestAddress(iova_of(page) + 8 * self.random.u64(0..256));
                let result = if self.random.bool() {
                    self.memory.read_obj::<u64>(iova)
                } else {
                    self.memory.load::<u64>(iova, Ordering::Acquire)
                };
                if let Some(word) = self.refused(result) {
                    self.check_stamps(page, before, &[word]);
                    add_one(&self.count.reads);
                }
            }
            // The end of a page and the start of the next, which is elsewhere in the guest.
            2 if page + 1 < PAGES => {
                let before = dead(page + 1);
                let result = self.read(iova_of(page + 1) - 256, 512);
                if let Some(bytes) = self.refused(result) {
                    let words = words(&bytes);
                    self.check_device_half(&words[..32]);
                    self.check_stamps(page + 1, before, &words[32..]);
                    add_one(&self.count.reads);
                }
            }
            3 => {
                let value = MARK | self.random.u64(..1 << 56);
                let iova = GuestAddress(in_device_half);
                let result = if self.random.bool() {
                    self.memory.write_obj(value, iova)
                } else {
                    self.memory.store(value, iova, Ordering::Release)
                };
                if self.refused(result).is_some() {
                    self.wrote(page);
                }
            }
            // Copies from page to page.
            4 | 5 => {
                let result = self.read(in_device_half, 256);
                let Some(mut bytes) = self.refused(result) else {
                    return;
                };
                self.check_device_half(&words(&bytes));
                bytes[..8].copy_from_slice(&(MARK | 1).to_ne_bytes());
                let to = self.random.u64(0..PAGES);
                let result = self.write(iova_of(to) + DEVICE_HALF + 0x100, &bytes);
                if self.refused(result).is_some() {
                    self.wrote(to);
                }
            }
            _ => {
                let access =
                    [Permissions::Read, Permissions::Write][usize::from(self.random.bool())];
                let iova = GuestAddress(iova_of(page));
                // Both results are correct, because the front end keeps changing mappings.
                let _ = self.memory.check_range(iova, PAGE as usize, access);
            }
        }
    }

    fn run(mut self) {
        let _stop = StopAll(&self.guest.stop);
        while !self.guest.stop.load(Ordering::Relaxed) {
            self.step();
        }
    }
}

#[test]
fn access_after_acknowledged_invalidation_fails() {
    let invalidations = match std::env::var("IOMMU_INVALIDATIONS") {
        Ok(text) => text.parse().expect("IOMMU_INVALIDATIONS is a number"),
        Err(_) => 800,
    };
    // Short: the front end never maps a page that is not in the table.
    let Setup {
        memory,
        physical,
        front_end,
        back_end,
    } = setup(Duration::from_millis(3));
    let guest = Guest {
        physical: &physical,
        front_end: &front_end,
        table: Mutex::new(vec![None; PAGES as usize]),
        dead: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
        misses: AtomicU64::new(0),
        breaches: AtomicU64::new(0),
        devices: Default::default(),
        stop: AtomicBool::new(false),
    };
    let written: Vec<AtomicBool> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
    thread::scope(|scope| {
        let mapper = scope.spawn(|| guest.map_and_invalidate(invalidations));
        scope.spawn(|| guest.reply_to_misses());
        for count in &guest.devices {
            let device = Device {
                memory: &memory,
                guest: &guest,
                written: &written,
                random: fastrand::Rng::new(),
                count,
            };
            scope.spawn(|| device.run());
        }
        println!("invalidated {}", mapper.join().unwrap());
    });
    println!(
        "misses {:?}, breaches {:?}, devices {:?}",
        guest.misses, guest.breaches, guest.devices
    );
    for (page, written) in (0..).zip(&written) {
        if written.load(Ordering::Relaxed) {
            assert!(
                memory.bitmap().dirty_at(iova_of(page) as usize),
                "the mark of page {page} was lost"
            );
        }
    }
    end(&back_end);
}
