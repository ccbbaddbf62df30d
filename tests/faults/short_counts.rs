//! Each page that a system call writes is marked, even if the call counts fewer bytes.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::vectored::IoBuffer;
use vm_memory::{fault, vectored, Bytes, GuestMemory, MemoryRegionAddress};
use vm_memory::{Permissions, ReadVolatile};

/// The pages of the memory, and those that its file still has.
const PAGES: usize = 8;
const LEFT: usize = 6;
const LEN: usize = PAGES * PAGE;

/// A short message, and one that is longer than the memory.
const MESSAGES: [usize; 2] = [100, 2 * LEN];

/// Returns memory whose last pages are gone, without marks.
fn truncated() -> (Memory, Arc<File>) {
    fault::install().unwrap();
    let (memory, file) = shared(PAGES);
    file.set_len((LEFT * PAGE) as u64).unwrap();
    memory.find_region(BASE).unwrap().bitmap().reset();
    (memory, file)
}

/// Returns which pages have bytes other than 0, and which are marked.
fn written_and_marked(memory: &Memory, file: &File) -> ([bool; PAGES], [bool; PAGES]) {
    file.set_len(LEN as u64).unwrap();
    let mut all = vec![0; LEN];
    memory.read_slice(&mut all, BASE).unwrap();
    let written = std::array::from_fn(|page| all[page * PAGE..][..PAGE].iter().any(|b| *b != 0));
    let region = memory.find_region(BASE).unwrap();
    let marked = std::array::from_fn(|page| region.bitmap().dirty_at(page * PAGE));
    (written, marked)
}

/// Reads from a new stream by each method, and checks the marks.
fn check<S: ReadVolatile + AsFd>(name: &str, stream: impl Fn() -> S) {
    type Method<S> = fn(&Memory, &mut S) -> Result<usize, GuestMemoryError>;
    let methods: [(&str, Method<S>); 9] = [
        ("read", |m, s| m.read_volatile_from(BASE, s, LEN)),
        ("exact", |m, s| {
            m.read_exact_volatile_from(BASE, s, LEN).map(|()| LEN)
        }),
        ("slice", |m, s| {
            Ok(m.get_slice(BASE, LEN)?.read_volatile_from(0, s, LEN)?)
        }),
        ("region", |m, s| {
            let region = m.find_region(BASE).unwrap();
            region.read_volatile_from(MemoryRegionAddress(0), s, LEN)
        }),
        ("held", |m, s| m.held().read_volatile_from(BASE, s, LEN)),
        ("buffer", |m, s| {
            buffer(&Arc::new(m.clone()), &[(BASE, LEN)]).read_from(s)
        }),
        ("exact buffer", |m, s| {
            let buffer = buffer(&Arc::new(m.clone()), &[(BASE, LEN)]);
            buffer.read_exact_from(s).map(|()| LEN)
        }),
        ("readv", |m, s| vectored::read_from(m, BASE, LEN, s)),
        ("exact readv", |m, s| {
            vectored::read_exact_from(m, BASE, LEN, s).map(|()| LEN)
        }),
    ];
    for (method, read) in methods {
        let (memory, file) = truncated();
        let result = read(&memory, &mut stream());
        assert_marked(&format!("{name}, {method}: {result:?}"), &memory, &file);
    }
}

/// Checks that each page that was written is marked.
fn assert_marked(name: &str, memory: &Memory, file: &File) {
    let (written, marked) = written_and_marked(memory, file);
    for page in 0..PAGES {
        assert!(
            marked[page] || !written[page],
            "{name}, but wrote {written:?} and marked {marked:?}"
        );
    }
}

/// Creates a buffer for the device to write.
fn buffer<M: GuestMemory + 'static>(
    memory: &Arc<M>,
    ranges: &[(GuestAddress, usize)],
) -> IoBuffer<M> {
    IoBuffer::from_ranges(memory, ranges.iter().copied(), Permissions::Write).unwrap()
}

/// Returns a pair of connected Unix sockets of a type.
fn sockets(kind: i32) -> [OwnedFd; 2] {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors.
    let status = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            kind | libc::SOCK_CLOEXEC,
            0,
            ends.as_mut_ptr(),
        )
    };
    assert_eq!(status, 0);
    // SAFETY: the descriptors are new and have no other owner.
    ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Writes two messages, and returns `reader`. A stream may take only a part of the second one.
fn fill<R>(mut writer: impl Write + AsFd, reader: R) -> R {
    let fd = writer.as_fd().as_raw_fd();
    // SAFETY: fcntl(2) with these arguments accesses no memory of this program.
    let status = unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) };
    assert_eq!(status, 0);
    for len in MESSAGES {
        assert!(writer.write(&vec![0xa5; len]).unwrap() >= len.min(LEFT * PAGE));
    }
    reader
}

#[test]
fn read_of_two_messages_across_fault_marks_written_pages() {
    for kind in [libc::SOCK_STREAM, libc::SOCK_SEQPACKET, libc::SOCK_DGRAM] {
        check(&format!("socket of type {kind}"), || {
            let [near, far] = sockets(kind);
            fill(File::from(far), near)
        });
    }
    check("UnixStream", || {
        let (near, far) = UnixStream::pair().unwrap();
        fill(far, near)
    });
    check("TcpStream", || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        far.set_nodelay(true).unwrap();
        fill(far, listener.accept().unwrap().0)
    });
    check("pipe", || {
        let (reader, writer) = std::io::pipe().unwrap();
        fill(File::from(OwnedFd::from(writer)), OwnedFd::from(reader))
    });
}

/// The pipe counts the chunks that it copied completely. The guest chooses the segments.
#[test]
fn io_buffer_read_of_pipe_into_segments_before_fault_marks_written_pages() {
    let page = |number: usize| GuestAddress(BASE.0 + (number * PAGE) as u64);
    let segments = [(page(4), PAGE), (page(5), 100), (page(6), 100)];
    for exact in [false, true] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        for _ in 0..2 {
            writer.write_all(&[0xa5; PAGE]).unwrap();
        }
        drop(writer);
        let (memory, file) = truncated();
        let buffer = buffer(&Arc::new(memory.clone()), &segments);
        if exact {
            buffer.read_exact_from(&reader).unwrap_err();
        } else {
            assert_eq!(buffer.read_from(&reader).unwrap(), PAGE);
        }
        let (written, _) = written_and_marked(&memory, &file);
        assert!(written[4] && written[5], "{written:?}");
        assert_marked(&format!("exact: {exact}"), &memory, &file);
    }
}

/// The kernel counts the first message, and writes six pages.
#[test]
fn read_of_short_message_before_fault_marks_all_pages() {
    let (near, far) = UnixStream::pair().unwrap();
    let near = fill(far, near);
    let (memory, file) = truncated();
    let read = memory.read_volatile_from(BASE, &mut &near, LEN).unwrap();
    let (written, marked) = written_and_marked(&memory, &file);
    assert_eq!(read, MESSAGES[0]);
    assert!(
        written[..LEFT].iter().all(|written| *written),
        "{written:?}"
    );
    assert_eq!(marked, [true; PAGES]);
}

#[cfg(feature = "iommu")]
#[test]
fn read_of_short_message_behind_iommu_marks_all_pages() {
    use vm_memory::iommu::SharedIotlb;
    use vm_memory::IommuMemory;
    type Translated = IommuMemory<Memory, SharedIotlb>;
    type Method = fn(&Arc<Translated>, &UnixStream) -> Result<usize, GuestMemoryError>;
    let methods: [(&str, Method); 3] = [
        ("read", |m, mut s| {
            m.read_volatile_from(GuestAddress(0), &mut s, LEN)
        }),
        ("readv", |m, s| {
            vectored::read_from(&**m, GuestAddress(0), LEN, s)
        }),
        ("buffer", |m, s| {
            buffer(m, &[(GuestAddress(0), LEN)]).read_from(s)
        }),
    ];
    for (method, read) in methods {
        let (near, far) = UnixStream::pair().unwrap();
        let near = fill(far, near);
        let (memory, _file) = truncated();
        let iotlb = SharedIotlb::new();
        iotlb
            .set_mapping(GuestAddress(0), BASE, LEN, Permissions::ReadWrite)
            .unwrap();
        let marks = AtomicBitmap::new(LEN, PAGE.try_into().unwrap());
        let translated = Arc::new(IommuMemory::new(memory, iotlb, true, marks));
        assert_eq!(read(&translated, &near).unwrap(), MESSAGES[0], "{method}");
        assert_eq!(translated.bitmap().get_and_reset(), [0xff], "{method}");
    }
}
