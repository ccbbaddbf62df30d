//! [`ReadVolatile`] and [`WriteVolatile`] on the library's and on user-defined types, with the
//! traits of `std::io` in scope.

#[cfg(unix)]
use std::fs::File;
use std::io::Cursor;
#[cfg(unix)]
use std::io::SeekFrom;
#[cfg(unix)]
use std::net::{TcpListener, TcpStream};
#[cfg(unix)]
use std::os::fd::OwnedFd;
#[cfg(unix)]
use std::os::unix::net::UnixStream;

use crate::everything::*;
use crate::Outcome;

/// Writes eight bytes to `stream`, half of them by each method.
fn send<W: WriteVolatile>(stream: &mut W) -> Outcome {
    let mut bytes = *b"abcdefgh";
    let slice = VolatileSlice::from(&mut bytes[..]);
    assert_eq!(stream.write_volatile(&slice.subslice(0, 4)?)?, 4);
    stream.write_all_volatile(&slice.offset(4)?)?;
    Ok(())
}

/// Reads the bytes of [`send`] from `stream`, half of them by each method.
fn receive<R: ReadVolatile>(stream: &mut R) -> Outcome {
    let mut bytes = [0; 8];
    let slice = VolatileSlice::from(&mut bytes[..]);
    assert_eq!(stream.read_volatile(&mut slice.subslice(0, 4)?)?, 4);
    stream.read_exact_volatile(&mut slice.offset(4)?)?;
    let answer: Mine = stream.fill_volatile();
    assert_eq!(answer, Mine("fill_volatile"));
    assert_eq!(bytes, *b"abcdefgh");
    Ok(())
}

/// Uses the streams in host memory.
pub fn host_memory() -> Outcome {
    let mut vector = Vec::new();
    send(&mut vector)?;
    receive(&mut &vector[..])?;
    receive(&mut Cursor::new(vector))?;
    let mut array = [0; 8];
    send(&mut &mut array[..])?;
    receive(&mut &array[..])?;
    send(&mut Cursor::new(&mut array[..]))?;
    Ok(())
}

/// Calls the methods on files, by value and by reference.
#[cfg(unix)]
pub fn files() -> Outcome {
    let mut file = tempfile::tempfile()?;
    send(&mut file)?;
    file.rewind()?;
    receive(&mut file)?;
    file.seek(SeekFrom::Start(0))?;
    send(&mut &file)?;
    file.rewind()?;
    receive(&mut &file)?;

    let mut bytes = [0u8; 4];
    let mut slice = VolatileSlice::from(&mut bytes[..]);
    file.rewind()?;
    assert_eq!(file.read_volatile(&mut slice)?, 4);
    file.read_exact_volatile(&mut slice)?;
    assert_eq!(file.write_volatile(&slice)?, 4);
    file.write_all_volatile(&slice)?;
    let reference: &mut File = &mut file;
    reference.rewind()?;
    assert_eq!(reference.read_volatile(&mut slice)?, 4);
    assert_eq!(
        Read::by_ref(&mut file)
            .take(2)
            .read_to_end(&mut Vec::new())?,
        2
    );
    let mut descriptor = OwnedFd::from(file);
    send(&mut descriptor)?;
    send(&mut &descriptor)?;
    Ok(())
}

/// Uses sockets.
#[cfg(unix)]
pub fn sockets() -> Outcome {
    let (mut one, mut other) = UnixStream::pair()?;
    send(&mut one)?;
    receive(&mut other)?;
    send(&mut &one)?;
    receive(&mut &other)?;
    send(&mut &mut one)?;
    receive(&mut &mut other)?;

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let mut server = listener.accept()?.0;
    send(&mut client)?;
    receive(&mut server)?;
    send(&mut &server)?;
    receive(&mut &client)?;
    // The output is not checked; the call must compile.
    assert_eq!(
        std::io::stdout().write_volatile(&VolatileSlice::from(&mut [][..]))?,
        0
    );
    Ok(())
}

/// A source that returns three bytes at a time.
#[derive(Debug)]
pub struct Threes(pub u8);

impl ReadVolatile for Threes {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        let length = buffer.len().min(3);
        buffer.write_slice(&[self.0; 3][..length], 0)?;
        self.0 += 1;
        Ok(length)
    }
}

/// A sink that counts, and accepts one byte at a time.
#[derive(Debug, Default)]
pub struct Counter(pub usize);

impl WriteVolatile for Counter {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &VolatileSlice<'_, B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        let length = buffer.len().min(1);
        self.0 += length;
        Ok(length)
    }
}

/// Calls the provided methods of the traits on user-defined streams.
pub fn own_streams() -> Outcome {
    let mut bytes = [0; 8];
    let mut slice = VolatileSlice::from(&mut bytes[..]);
    let mut source = Threes(1);
    source.read_exact_volatile(&mut slice)?;
    let mut sink = Counter::default();
    sink.write_all_volatile(&slice)?;
    assert_eq!(sink.0, 8);
    assert_eq!(slice.read_volatile_from(0, &mut source, 8)?, 3);
    assert_eq!(slice.write_volatile_to(0, &mut sink, 8)?, 1);
    assert_eq!(bytes, [4, 4, 4, 2, 2, 2, 3, 3]);
    Ok(())
}
