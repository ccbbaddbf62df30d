//! Transfers of a buffer itself: the bytes that are marked, and the bytes that stay.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;
use crate::bitmap::Bitmap;
use crate::mmap::MmapRegionBuilder;
use crate::GuestRegionMmap;

/// Three regions, with a hole before the last one.
const REGIONS: [(u64, usize); 3] = [(0, 0x100), (0x100, 0x100), (0x240, 0x80)];

/// Creates the regions, each with one bit for each byte.
fn marked_by_byte() -> Arc<Memory> {
    let region = |(start, size): (u64, usize)| {
        let bitmap = AtomicBitmap::new(size, 1.try_into().unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap);
        GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(start)).unwrap()
    };
    Arc::new(Memory::from_regions(REGIONS.map(region).into()).unwrap())
}

/// Returns the addresses of the dirty bytes, and makes them clean.
fn dirty_bytes(memory: &Memory) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for region in memory.iter() {
        let (bitmap, start) = (region.get_mmap(), region.start_addr().0);
        let offsets = 0..region.len();
        found.extend(
            offsets
                .filter(|offset| bitmap.bitmap().dirty_at(*offset as usize))
                .map(|offset| start + offset),
        );
        bitmap.bitmap().reset();
    }
    found
}

#[derive(Clone, Debug)]
enum Step {
    Extend(Vec<(u64, usize)>),
    CompleteFront(usize),
    CancelFront(usize),
    Truncate(usize),
    Clear,
    SetMemory,
    Lend,
    /// Receives a datagram of this length, as a stream or as a packet.
    Receive(usize, bool),
    /// Reads at an offset of a file of 0x200 bytes.
    ReadAt(u64),
    Send,
    WriteAt(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let near = || prop_oneof![4 => 0usize..600, 1 => any::<usize>()];
    prop_oneof![
        6 => prop::collection::vec((0u64..0x2c0, 0usize..150), 0..4).prop_map(Step::Extend),
        2 => near().prop_map(Step::CompleteFront),
        1 => near().prop_map(Step::CancelFront),
        1 => near().prop_map(Step::Truncate),
        1 => Just(Step::Clear),
        1 => Just(Step::SetMemory),
        1 => Just(Step::Lend),
        3 => (1usize..700, any::<bool>()).prop_map(|(size, packet)| Step::Receive(size, packet)),
        2 => (0u64..0x280).prop_map(Step::ReadAt),
        2 => Just(Step::Send),
        1 => (0u64..0x280).prop_map(Step::WriteAt),
    ]
}

/// A list of addresses, with the state that a buffer keeps about them.
#[derive(Default)]
struct Model {
    bytes: Vec<u8>,
    addresses: Vec<u64>,
    is_lent: bool,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn mark_front(&mut self, count: usize) {
        self.dirty.extend(self.addresses.iter().take(count));
    }

    fn remove(&mut self, range: std::ops::Range<usize>) {
        let end = range.end.min(self.addresses.len());
        self.addresses.drain(range.start.min(end)..end);
        self.is_lent &= !self.addresses.is_empty();
    }

    /// Marks the addresses after the first `kept`, if they were lent, and removes them.
    fn drop_rest(&mut self, kept: usize) {
        if self.is_lent {
            self.dirty.extend(self.addresses.iter().skip(kept));
        }
        self.remove(kept..usize::MAX);
    }

    /// Stores `put` in the first bytes. The list may contain an address twice.
    fn fill(&mut self, put: &[u8]) {
        for (address, byte) in self.addresses.iter().zip(put) {
            self.bytes[*address as usize] = *byte;
        }
    }

    fn content(&self) -> Vec<u8> {
        let addresses = self.addresses.iter();
        addresses.map(|at| self.bytes[*at as usize]).collect()
    }
}

/// Receives a packet, and then nothing.
fn receive(
    buffer: &IoBuffer<Memory>,
    model: &mut Model,
    packet: &[u8],
    as_packet: bool,
    (wire, tap): &(UnixDatagram, UnixDatagram),
) -> TestCaseResult {
    let read = if as_packet {
        IoBuffer::read_packet_from
    } else {
        IoBuffer::read_from
    };
    wire.send(packet).unwrap();
    let received = read(buffer, tap).unwrap();
    prop_assert_eq!(received, packet.len().min(model.addresses.len()));
    model.fill(packet);
    model.mark_front(if as_packet { received } else { usize::MAX });
    if model.addresses.is_empty() {
        // There was no system call.
        tap.recv(&mut []).unwrap();
        return Ok(());
    }
    let error = read(buffer, tap).unwrap_err();
    prop_assert!(matches!(error, Error::IOError(e) if e.kind() == ErrorKind::WouldBlock));
    Ok(())
}

/// Sends the bytes.
fn send(
    buffer: &IoBuffer<Memory>,
    model: &Model,
    (wire, tap): &(UnixDatagram, UnixDatagram),
) -> TestCaseResult {
    let content = model.content();
    prop_assert_eq!(buffer.write_to(tap).unwrap(), content.len());
    if !content.is_empty() {
        let mut seen = vec![0; content.len() + 1];
        let received = wire.recv(&mut seen).unwrap();
        prop_assert_eq!(&seen[..received], &content);
    }
    Ok(())
}

/// Writes the bytes to a file.
fn write_at(buffer: &IoBuffer<Memory>, model: &Model, offset: u64) -> TestCaseResult {
    let (content, mut target) = (model.content(), temp_file(&[]));
    prop_assert_eq!(buffer.write_to_at(&target, offset).unwrap(), content.len());
    let mut written = Vec::new();
    target.seek(SeekFrom::Start(offset)).unwrap();
    target.read_to_end(&mut written).unwrap();
    prop_assert_eq!(written, content);
    Ok(())
}

fn check_device(steps: Vec<Step>) -> TestCaseResult {
    let mut memory = marked_by_byte();
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::ReadWrite);
    let sockets = UnixDatagram::pair().unwrap();
    sockets.1.set_nonblocking(true).unwrap();
    let in_file = pattern(0x200);
    let file = temp_file(&in_file);
    let mut model = Model {
        bytes: vec![0; 0x300],
        ..Model::default()
    };
    for (number, step) in steps.into_iter().enumerate() {
        let len = model.addresses.len();
        match step {
            Step::Extend(ranges) => {
                let mut added = ranges
                    .iter()
                    .flat_map(|(at, count)| *at..at + *count as u64);
                let is_mapped = added
                    .clone()
                    .all(|at| at < 0x200 || (0x240..0x2c0).contains(&at));
                let ranges = ranges.iter().map(|(at, count)| (GuestAddress(*at), *count));
                prop_assert_eq!(buffer.try_extend(ranges).is_ok(), is_mapped);
                if is_mapped {
                    model.addresses.extend(&mut added);
                }
            }
            Step::CompleteFront(count) => {
                prop_assert_eq!(buffer.complete_front(count), count.min(len));
                model.mark_front(count);
                model.remove(0..count);
            }
            Step::CancelFront(count) => {
                prop_assert_eq!(buffer.cancel_front(count), count.min(len));
                model.remove(0..count);
            }
            Step::Truncate(kept) => {
                buffer.truncate(kept);
                // A buffer that is long enough is not split.
                if kept <= len {
                    model.drop_rest(kept);
                }
            }
            Step::Clear => {
                buffer.clear();
                model.drop_rest(0);
            }
            Step::SetMemory => {
                let next = marked_by_byte();
                buffer.set_memory(Arc::clone(&next));
                model.drop_rest(0);
                prop_assert_eq!(dirty_bytes(&memory), std::mem::take(&mut model.dirty));
                // Only the buffer kept the map.
                let previous = Arc::downgrade(&std::mem::replace(&mut memory, next));
                prop_assert!(previous.upgrade().is_none());
                model.bytes.fill(0);
            }
            Step::Lend => {
                prop_assert_eq!(named(&buffer), len);
                model.is_lent = true;
            }
            Step::Receive(size, as_packet) => {
                let packet: Vec<u8> = (0..size).map(|i| (number + 7 * i) as u8).collect();
                receive(&buffer, &mut model, &packet, as_packet, &sockets)?;
            }
            Step::ReadAt(offset) => {
                let left = in_file.get(offset as usize..).unwrap_or_default();
                let read = buffer.read_from_at(&file, offset).unwrap();
                prop_assert_eq!(read, left.len().min(len));
                model.fill(left);
                model.mark_front(len);
            }
            Step::Send => send(&buffer, &model, &sockets)?,
            Step::WriteAt(offset) => write_at(&buffer, &model, offset)?,
        }
        prop_assert_eq!(buffer.len(), model.addresses.len());
        prop_assert_eq!(dirty_bytes(&memory), std::mem::take(&mut model.dirty));
        let mut seen = vec![0; buffer.len()];
        prop_assert_eq!(buffer.copy_to(0, &mut seen).unwrap(), seen.len());
        prop_assert_eq!(seen, model.content());
    }
    drop(buffer);
    model.drop_rest(0);
    prop_assert_eq!(dirty_bytes(&memory), model.dirty);
    Ok(())
}

/// Returns the number of bytes that the vectors name.
fn named(buffer: &IoBuffer<Memory>) -> usize {
    buffer.vectors().iter().map(|vector| vector.iov_len).sum()
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "Miri has no readv(2)")]
    fn io_buffer_of_device_agrees_with_list_of_addresses(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        check_device(steps)?;
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_transfers_need_their_permission() {
    let memory = Arc::new(regions(2));
    let zero = File::open("/dev/zero").unwrap();
    let target = temp_file(&[]);
    let refused = |result| is_refused_by_buffer(&result);
    for (access, reads, writes) in [
        (Permissions::Read, false, true),
        (Permissions::Write, true, false),
        (Permissions::ReadWrite, true, true),
        (Permissions::No, false, false),
    ] {
        let mut buffer = IoBuffer::new(Arc::clone(&memory), access);
        for _ in 0..2 {
            assert_eq!(refused(buffer.read_from(&zero)), !reads, "{access:?}");
            assert_eq!(
                refused(buffer.read_packet_from(&zero)),
                !reads,
                "{access:?}"
            );
            assert_eq!(refused(buffer.read_from_at(&zero, 0)), !reads, "{access:?}");
            assert_eq!(refused(buffer.write_to(&target)), !writes, "{access:?}");
            assert_eq!(
                refused(buffer.write_to_at(&target, 0)),
                !writes,
                "{access:?}"
            );
            // The second round is not empty.
            let _ = buffer.push(GuestAddress(0xff8), 0x10);
        }
        let expected: &[u64] = if reads { &[0, 0x1000] } else { &[] };
        assert_eq!(dirty(&memory), expected);
        // A buffer for reading is never marked.
        buffer.complete_front(usize::MAX);
        let expected: &[u64] = if reads { &[0, 0x1000] } else { &[] };
        assert_eq!(dirty(&memory), expected);
    }
    // An empty buffer makes no call: this descriptor is not for reading.
    let buffer = IoBuffer::new(memory, Permissions::Write);
    let write_only = File::options().write(true).open("/dev/null").unwrap();
    assert_eq!(buffer.read_from(&write_only).unwrap(), 0);
    assert_eq!(buffer.read_packet_from(&write_only).unwrap(), 0);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_of_more_than_1024_segments_moves_the_first_1024() {
    let memory = Arc::new(regions(1100));
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::ReadWrite);
    buffer.set_segment_limit(1100);
    buffer.push(GuestAddress(8), 1100 * PAGE - 8).unwrap();
    let zero = File::open("/dev/zero").unwrap();
    let first = 1024 * PAGE - 8;
    assert_eq!(buffer.read_from(&zero).unwrap(), first);
    assert_eq!(dirty(&memory).len(), 1024);
    assert_eq!(buffer.read_from_at(&zero, 0).unwrap(), first);
    assert_eq!(dirty(&memory).len(), 1024);
    assert_eq!(buffer.read_packet_from(&zero).unwrap(), first);
    assert_eq!(dirty(&memory).len(), 1024);
    // A call that fails could have reached these segments only.
    buffer.read_from(&File::open("/").unwrap()).unwrap_err();
    assert_eq!(dirty(&memory).len(), 1024);
    // Nor could one with a short count.
    let (near, far) = UnixStream::pair().unwrap();
    (&far).write_all(b"short").unwrap();
    assert_eq!(buffer.read_from(&near).unwrap(), 5);
    assert_eq!(dirty(&memory).len(), 1024);
    let null = File::options().write(true).open("/dev/null").unwrap();
    assert_eq!(buffer.write_to(&null).unwrap(), first);
    assert_eq!(buffer.complete_front(first), first);
    assert_eq!(dirty(&memory).len(), 1024);
    assert_eq!(buffer.write_to(&null).unwrap(), 76 * PAGE);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_read_that_fails_marks_all_pages_of_the_call() {
    let memory = Arc::new(regions(3));
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    buffer.push(GuestAddress(0x800), PAGE).unwrap();
    let directory = File::open("/").unwrap();
    type Read = fn(&IoBuffer<Memory>, &File) -> Result<usize>;
    let reads: [Read; 3] = [
        |buffer, file| buffer.read_from(file),
        |buffer, file| buffer.read_packet_from(file),
        |buffer, file| buffer.read_from_at(file, 0),
    ];
    for read in reads {
        let error = read(&buffer, &directory).unwrap_err();
        assert!(matches!(error, Error::IOError(e) if e.raw_os_error() == Some(libc::EISDIR)));
        assert_eq!(dirty(&memory), [0, 0x1000]);
    }
    // Offsets that are larger than any file.
    for offset in [u64::MAX, i64::MAX as u64 + 1] {
        let error = buffer.read_from_at(&directory, offset).unwrap_err();
        assert!(matches!(error, Error::IOError(e) if e.raw_os_error() == Some(libc::EINVAL)));
    }
}

/// A peer that sends single bytes into a huge buffer must not make each of them cost its length.
#[test]
#[cfg_attr(miri, ignore = "Miri has no readv(2)")]
fn io_buffer_read_of_long_buffer_marks_64_mib_at_most() {
    let len = 256 << 20;
    let ranges = [(GuestAddress(0), len)];
    let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
    let buffer = IoBuffer::from_ranges(&memory, ranges, Permissions::Write).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    for exact in [false, true] {
        (&far).write_all(b"x").unwrap();
        let read = if exact {
            buffer.read_exact_from(&near).unwrap_err().to_string()
        } else {
            buffer.read_from(&near).unwrap().to_string()
        };
        let region = memory.find_region(GuestAddress(0)).unwrap().get_mmap();
        let words = region.bitmap().get_and_reset();
        let dirty: u32 = words.iter().map(|word| word.count_ones()).sum();
        assert_eq!(dirty as usize, (64 << 20) / PAGE, "exact: {exact}, {read}");
    }
}
