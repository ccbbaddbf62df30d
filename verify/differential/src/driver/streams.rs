//! Sources and sinks for volatile reads and writes.

use std::fs::File;
use std::io::{Cursor, Error, ErrorKind, Read, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::MemfdFlags;
use rustix::pipe::PipeFlags;

use super::vm::bitmap::BitmapSlice;
use super::vm::{Bytes, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};
use crate::host::stream;
use crate::op::{Handle, Sink, Source, Step, Trouble};

/// The capacity of the pipes: the smallest possible one.
pub const PIPE_BYTES: usize = 4096;

/// Creates an anonymous file with these bytes.
pub fn file_of(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("differential", MemfdFlags::CLOEXEC).expect("memfd_create");
    let mut file = File::from(fd);
    file.write_all(bytes).expect("writing to a memfd");
    file
}

/// Creates an anonymous file of `len` zeros.
pub fn file_of_len(len: u64) -> File {
    let file = file_of(&[]);
    file.set_len(len).expect("resizing a memfd");
    file
}

fn trouble(what: Trouble) -> VolatileMemoryError {
    VolatileMemoryError::IOError(match what {
        Trouble::Eintr => Error::from_raw_os_error(libc::EINTR),
        Trouble::Eagain => Error::from_raw_os_error(libc::EAGAIN),
        Trouble::Eio => Error::from_raw_os_error(libc::EIO),
        Trouble::InterruptedKind => ErrorKind::Interrupted.into(),
        Trouble::WouldBlockKind => ErrorKind::WouldBlock.into(),
        Trouble::OtherKind => ErrorKind::Other.into(),
        Trouble::UnexpectedEofKind => ErrorKind::UnexpectedEof.into(),
        Trouble::OutOfBoundsFault => return VolatileMemoryError::OutOfBounds { addr: 77 },
        Trouble::PartialFault => {
            return VolatileMemoryError::PartialBuffer {
                expected: 9,
                completed: 4,
            }
        }
    })
}

/// Calls the method of the trait on the descriptor, in the form of the handle.
macro_rules! through {
    ($handle:expr, $owner:ty, $fd:expr, $trait:ident :: $method:ident ($buf:expr)) => {
        match $handle {
            Handle::Owned => <$owner as $trait>::$method($fd, $buf),
            Handle::Borrowed => $trait::$method(&mut $fd.as_fd(), $buf),
            Handle::ByRef => <&$owner as $trait>::$method(&mut &*$fd, $buf),
            Handle::ByMutRef => <&mut $owner as $trait>::$method(&mut &mut *$fd, $buf),
        }
    };
}

/// A source, and the number of bytes it returned.
pub enum Feed {
    Script {
        steps: std::vec::IntoIter<Step>,
        seed: u8,
        given: usize,
    },
    Slice {
        data: Vec<u8>,
        given: usize,
    },
    Cursor(Cursor<Vec<u8>>),
    File {
        file: File,
        handle: Handle,
    },
    Pipe {
        reader: OwnedFd,
        writer: Option<OwnedFd>,
        handle: Handle,
    },
    Socket {
        reader: UnixStream,
        writer: UnixStream,
    },
}

impl Feed {
    /// Creates the source that the operand describes.
    pub fn new(source: &Source) -> Feed {
        match *source {
            Source::ScriptSource { ref steps, seed } => Feed::Script {
                steps: steps.0.clone().into_iter(),
                seed,
                given: 0,
            },
            Source::SliceSource { len, seed } => Feed::Slice {
                data: stream(seed, 0, len),
                given: 0,
            },
            Source::CursorSource { len, pos, seed } => {
                let mut cursor = Cursor::new(stream(seed, 0, len));
                cursor.set_position(pos);
                Feed::Cursor(cursor)
            }
            Source::FileSource {
                len,
                pos,
                seed,
                handle,
            } => {
                let mut file = file_of(&stream(seed, 0, len));
                file.seek(SeekFrom::Start(pos)).expect("seeking in a memfd");
                Feed::File { file, handle }
            }
            Source::PipeSource {
                len,
                open,
                seed,
                handle,
            } => {
                let (reader, writer) = pipe();
                let data = stream(seed, 0, len.min(PIPE_BYTES));
                assert_eq!(rustix::io::write(&writer, &data), Ok(data.len()));
                Feed::Pipe {
                    reader,
                    writer: open.then_some(writer),
                    handle,
                }
            }
            Source::SocketSource { len, open, seed } => {
                let (reader, mut writer) = UnixStream::pair().expect("socketpair");
                reader.set_nonblocking(true).expect("set_nonblocking");
                writer
                    .write_all(&stream(seed, 0, len.min(PIPE_BYTES)))
                    .expect("writing to a socket");
                if !open {
                    writer.shutdown(Shutdown::Both).expect("shutdown");
                }
                Feed::Socket { reader, writer }
            }
            Source::DeafSource => {
                let file = File::options()
                    .write(true)
                    .open("/dev/null")
                    .expect("/dev/null");
                Feed::File {
                    file,
                    handle: Handle::Owned,
                }
            }
        }
    }

    /// Returns the position in the source; for pipes and sockets, the remaining bytes.
    pub fn position(self) -> u64 {
        match self {
            Feed::Script { given, .. } | Feed::Slice { given, .. } => given as u64,
            Feed::Cursor(cursor) => cursor.position(),
            Feed::File { mut file, .. } => file.stream_position().unwrap_or(u64::MAX),
            Feed::Pipe { reader, writer, .. } => {
                drop(writer);
                rest(File::from(reader)).len() as u64
            }
            Feed::Socket { reader, writer } => {
                drop(writer);
                rest(reader).len() as u64
            }
        }
    }
}

impl ReadVolatile for Feed {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        match self {
            Feed::Script { steps, seed, given } => match steps.next() {
                None | Some(Step::End) => Ok(0),
                Some(Step::Fail(what)) => Err(trouble(what)),
                Some(Step::Give(most)) => {
                    let count = most.min(buf.len());
                    let written = buf.write(&stream(*seed, *given, count), 0)?;
                    *given += written;
                    Ok(written)
                }
            },
            Feed::Slice { data, given } => {
                let mut left = &data[*given..];
                let result = left.read_volatile(buf);
                *given = data.len() - left.len();
                result
            }
            Feed::Cursor(cursor) => cursor.read_volatile(buf),
            Feed::File { file, handle } => {
                through!(handle, File, file, ReadVolatile::read_volatile(buf))
            }
            Feed::Pipe { reader, handle, .. } => {
                through!(handle, OwnedFd, reader, ReadVolatile::read_volatile(buf))
            }
            Feed::Socket { reader, .. } => reader.read_volatile(buf),
        }
    }

    fn read_exact_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<(), VolatileMemoryError> {
        match self {
            Feed::Script { .. } => Default(self).read_exact_volatile(buf),
            Feed::Slice { data, given } => {
                let mut left = &data[*given..];
                let result = left.read_exact_volatile(buf);
                *given = data.len() - left.len();
                result
            }
            Feed::Cursor(cursor) => cursor.read_exact_volatile(buf),
            Feed::File { file, handle } => {
                through!(handle, File, file, ReadVolatile::read_exact_volatile(buf))
            }
            Feed::Pipe { reader, handle, .. } => {
                through!(
                    handle,
                    OwnedFd,
                    reader,
                    ReadVolatile::read_exact_volatile(buf)
                )
            }
            Feed::Socket { reader, .. } => reader.read_exact_volatile(buf),
        }
    }
}

/// Forwards the provided methods of the traits to a stream.
struct Default<'a, T>(&'a mut T);

impl<T: ReadVolatile> ReadVolatile for Default<'_, T> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.0.read_volatile(buf)
    }
}

impl<T: WriteVolatile> WriteVolatile for Default<'_, T> {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.0.write_volatile(buf)
    }
}

/// A sink, and the bytes it accepted.
pub enum Drain {
    Script {
        steps: std::vec::IntoIter<Step>,
        taken: Vec<u8>,
    },
    Vector(Vec<u8>),
    Slice {
        data: Vec<u8>,
        taken: usize,
    },
    Cursor {
        data: Vec<u8>,
        position: u64,
    },
    File {
        file: File,
        handle: Handle,
        readable: bool,
    },
    Pipe {
        reader: Option<OwnedFd>,
        writer: OwnedFd,
        handle: Handle,
    },
    Socket {
        reader: Option<UnixStream>,
        writer: UnixStream,
    },
}

impl Drain {
    /// Creates the sink that the operand describes.
    pub fn new(sink: &Sink) -> Drain {
        match *sink {
            Sink::ScriptSink { ref steps } => Drain::Script {
                steps: steps.0.clone().into_iter(),
                taken: Vec::new(),
            },
            Sink::VecSink { filled } => Drain::Vector(vec![0xA5; filled]),
            Sink::SliceSink { room } => Drain::Slice {
                data: vec![0xA5; room],
                taken: 0,
            },
            Sink::CursorSink { room, pos } => Drain::Cursor {
                data: vec![0xA5; room],
                position: pos,
            },
            Sink::FileSink {
                filled,
                pos,
                handle,
            } => {
                let mut file = file_of(&vec![0xA5; filled]);
                file.seek(SeekFrom::Start(pos)).expect("seeking in a memfd");
                Drain::File {
                    file,
                    handle,
                    readable: true,
                }
            }
            Sink::PipeSink { room, open, handle } => {
                let (reader, writer) = pipe();
                let filled = vec![0xA5; PIPE_BYTES - room.min(PIPE_BYTES)];
                assert_eq!(rustix::io::write(&writer, &filled), Ok(filled.len()));
                Drain::Pipe {
                    reader: open.then_some(reader),
                    writer,
                    handle,
                }
            }
            Sink::SocketSink { open } => {
                let (reader, writer) = UnixStream::pair().expect("socketpair");
                reader.set_nonblocking(true).expect("set_nonblocking");
                writer.set_nonblocking(true).expect("set_nonblocking");
                Drain::Socket {
                    reader: open.then_some(reader),
                    writer,
                }
            }
            Sink::FullSink => {
                let file = File::options()
                    .write(true)
                    .open("/dev/full")
                    .expect("/dev/full");
                Drain::File {
                    file,
                    handle: Handle::Owned,
                    readable: false,
                }
            }
            Sink::MuteSink => {
                let file = File::open("/dev/null").expect("/dev/null");
                Drain::File {
                    file,
                    handle: Handle::Owned,
                    readable: false,
                }
            }
        }
    }

    /// Returns the contents of the sink, and its position.
    pub fn contents(self) -> (Vec<u8>, u64) {
        match self {
            Drain::Script { taken, .. } | Drain::Vector(taken) => (taken, 0),
            Drain::Slice { data, taken } => (data, taken as u64),
            Drain::Cursor { data, position } => (data, position),
            Drain::File {
                readable: false, ..
            } => (Vec::new(), 0),
            Drain::File { mut file, .. } => {
                let position = file.stream_position().expect("the position of a memfd");
                file.rewind().expect("rewinding a memfd");
                (rest(file), position)
            }
            Drain::Pipe { reader, writer, .. } => {
                drop(writer);
                (reader.map(|r| rest(File::from(r))).unwrap_or_default(), 0)
            }
            Drain::Socket { reader, writer } => {
                drop(writer);
                (reader.map(rest).unwrap_or_default(), 0)
            }
        }
    }
}

impl WriteVolatile for Drain {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        match self {
            Drain::Script { steps, taken } => match steps.next() {
                None | Some(Step::End) => Ok(0),
                Some(Step::Fail(what)) => Err(trouble(what)),
                Some(Step::Give(most)) => {
                    let mut part = vec![0; most.min(buf.len())];
                    let count = buf.read(&mut part, 0)?;
                    taken.extend_from_slice(&part[..count]);
                    Ok(count)
                }
            },
            Drain::Vector(vector) => vector.write_volatile(buf),
            Drain::Slice { data, taken } => {
                let room = data.len();
                let mut left = &mut data[*taken..];
                let result = left.write_volatile(buf);
                *taken = room - left.len();
                result
            }
            Drain::Cursor { data, position } => {
                let mut cursor = Cursor::new(&mut data[..]);
                cursor.set_position(*position);
                let result = cursor.write_volatile(buf);
                *position = cursor.position();
                result
            }
            Drain::File { file, handle, .. } => {
                through!(handle, File, file, WriteVolatile::write_volatile(buf))
            }
            Drain::Pipe { writer, handle, .. } => {
                through!(handle, OwnedFd, writer, WriteVolatile::write_volatile(buf))
            }
            Drain::Socket { writer, .. } => writer.write_volatile(buf),
        }
    }

    fn write_all_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<'_, B>,
    ) -> Result<(), VolatileMemoryError> {
        match self {
            Drain::Script { .. } => Default(self).write_all_volatile(buf),
            Drain::Vector(vector) => vector.write_all_volatile(buf),
            Drain::Slice { data, taken } => {
                let room = data.len();
                let mut left = &mut data[*taken..];
                let result = left.write_all_volatile(buf);
                *taken = room - left.len();
                result
            }
            Drain::Cursor { data, position } => {
                let mut cursor = Cursor::new(&mut data[..]);
                cursor.set_position(*position);
                let result = cursor.write_all_volatile(buf);
                *position = cursor.position();
                result
            }
            Drain::File { file, handle, .. } => {
                through!(handle, File, file, WriteVolatile::write_all_volatile(buf))
            }
            Drain::Pipe { writer, handle, .. } => {
                through!(
                    handle,
                    OwnedFd,
                    writer,
                    WriteVolatile::write_all_volatile(buf)
                )
            }
            Drain::Socket { writer, .. } => writer.write_all_volatile(buf),
        }
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("pipe");
    rustix::pipe::fcntl_setpipe_size(&writer, PIPE_BYTES).expect("F_SETPIPE_SZ");
    (reader, writer)
}

fn rest(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    match from.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert!(
            matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::InvalidInput | ErrorKind::ConnectionReset
            ) || error.raw_os_error() == Some(libc::EBADF),
            "cannot read the remaining bytes: {error}"
        ),
    }
    bytes
}
