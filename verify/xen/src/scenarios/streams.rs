//! Streams, and I/O by vectors of segments.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryMmap};

use super::setup::{
    assert_calls, assert_released, calls_of_access, forget_calls, grant_address, granted_lazy,
    lazy, pattern, seen, FIRST,
};
use super::Scenario;
use crate::double::memory::memfd;
use crate::environment::{Environment, PAGE};
use crate::outcome::{expect_errno, Outcome};

pub(super) const SCENARIOS: &[Scenario] = super::scenarios![
    ordinary_use: [
        file_is_read_into_granted_pages,
        granted_pages_are_written_to_file,
        exact_streams_over_pages_move_all_bytes,
        streams_of_slices_and_vectors_reach_domain,
        vectored_io_moves_granted_pages,
        io_buffer_keeps_its_pages_mapped,
    ],
    X2: [
        file_is_not_read_into_bad_reference,
        vectored_io_of_bad_reference_returns_einval,
    ],
];

/// Returns a file with these bytes, at its start.
fn file(bytes: &[u8]) -> Outcome<File> {
    let mut file = memfd("stream")?;
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

fn file_is_read_into_granted_pages(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 3)?;
    let mut source = file(&pattern(300))?;
    forget_calls(env);
    let read = memory.read_volatile_from(grant_address(FIRST + 1, 0x10), &mut source, 100)?;
    assert_eq!(read, 100);
    assert_calls(
        env,
        &calls_of_access(FIRST + 1, 1, true),
        "read_volatile_from",
    );
    assert_eq!(seen(env, 1, 0x10, 100), pattern(100));
    assert_released(env, "after the stream");
    Ok(())
}

fn granted_pages_are_written_to_file(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 3)?;
    env.write(1, PAGE - 50, &pattern(100));
    let mut sink = file(b"")?;
    forget_calls(env);
    let written = memory.write_volatile_to(grant_address(FIRST + 1, PAGE - 50), &mut sink, 100)?;
    assert_eq!(written, 100);
    assert_calls(
        env,
        &calls_of_access(FIRST + 1, 2, false),
        "write_volatile_to",
    );
    let mut bytes = [0; 100];
    sink.read_exact_at(&mut bytes, 0)?;
    assert_eq!(bytes[..], pattern(100));
    assert_released(env, "after the stream");
    Ok(())
}

fn exact_streams_over_pages_move_all_bytes(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 4)?;
    let bytes = pattern(3 * PAGE);
    let mut source = file(&bytes)?;
    memory.read_exact_volatile_from(grant_address(FIRST, 0x123), &mut source, bytes.len())?;
    assert_eq!(seen(env, 0, 0x123, bytes.len()), bytes);
    let mut sink = file(b"")?;
    memory.write_all_volatile_to(grant_address(FIRST, 0x123), &mut sink, bytes.len())?;
    let mut read = vec![0; bytes.len()];
    sink.read_exact_at(&mut read, 0)?;
    assert_eq!(read, bytes);
    assert_released(env, "after the streams");
    Ok(())
}

fn streams_of_slices_and_vectors_reach_domain(env: &mut dyn Environment) -> Outcome {
    let (_device, memory) = granted_lazy(env, 2)?;
    let bytes = pattern(200);
    let mut source = &bytes[..];
    memory.read_exact_volatile_from(grant_address(FIRST, PAGE - 100), &mut source, 200)?;
    assert_eq!(seen(env, 0, PAGE - 100, 200), bytes);
    let mut sink = Vec::new();
    memory.write_all_volatile_to(grant_address(FIRST, PAGE - 100), &mut sink, 200)?;
    assert_eq!(sink, bytes);
    Ok(())
}

fn file_is_not_read_into_bad_reference(env: &mut dyn Environment) -> Outcome {
    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 1)?;
    let mut source = file(&pattern(100))?;
    let at = grant_address(FIRST, 0);
    let read = memory.read_volatile_from(at, &mut source, 100);
    expect_errno(
        read,
        libc::EINVAL,
        "a stream into a page that is not granted",
    )?;
    assert_eq!(
        source.stream_position()?,
        0,
        "the file was read although the access failed"
    );
    let written = memory.write_volatile_to(at, &mut source, 100);
    expect_errno(
        written,
        libc::EINVAL,
        "a stream out of a page that is not granted",
    )?;
    assert_released(env, "after the errors");
    Ok(())
}

#[cfg(feature = "additions")]
fn vectored_io_moves_granted_pages(env: &mut dyn Environment) -> Outcome {
    use vm_memory::vectored;

    let (_device, memory) = granted_lazy(env, 3)?;
    let bytes = pattern(2 * PAGE);
    let source = file(&bytes)?;
    let at = grant_address(FIRST, 0x800);
    vectored::read_exact_from_at(&memory, at, bytes.len(), &source, 0)?;
    assert_eq!(seen(env, 0, 0x800, bytes.len()), bytes);
    assert_released(env, "after the read");
    let sink = file(b"")?;
    assert_eq!(vectored::write_to_at(&memory, at, 100, &sink, 0)?, 100);
    let mut read = [0; 100];
    sink.read_exact_at(&mut read, 0)?;
    assert_eq!(read[..], bytes[..100]);
    assert_released(env, "after the write");
    Ok(())
}

#[cfg(feature = "additions")]
fn io_buffer_keeps_its_pages_mapped(env: &mut dyn Environment) -> Outcome {
    use crate::environment::mapped;
    use std::sync::Arc;
    use vm_memory::vectored::IoBuffer;
    use vm_memory::Permissions;

    let (_device, memory) = granted_lazy(env, 4)?;
    let mut buffer = IoBuffer::new(Arc::new(memory), Permissions::Write);
    buffer.push(grant_address(FIRST, 0x10), 32)?;
    buffer.push(grant_address(FIRST + 2, 0x20), 32)?;
    assert_eq!(mapped(env), [FIRST, FIRST + 2], "while the buffer lives");
    let lens: Vec<_> = buffer
        .vectors()
        .iter()
        .map(|vector| vector.iov_len)
        .collect();
    assert_eq!(lens, [32, 32]);
    assert_eq!(buffer.copy_from(16, &pattern(32))?, 32);
    assert_eq!(seen(env, 0, 0x20, 16), pattern(32)[..16]);
    assert_eq!(seen(env, 2, 0x20, 16), pattern(32)[16..]);
    buffer.complete(48);
    assert_released(env, "after the buffer");
    Ok(())
}

#[cfg(feature = "additions")]
fn vectored_io_of_bad_reference_returns_einval(env: &mut dyn Environment) -> Outcome {
    use vm_memory::vectored;

    let device = env.gntdev()?;
    let memory: GuestMemoryMmap = lazy(env, &device, FIRST, 1)?;
    let source = file(&pattern(100))?;
    let at = grant_address(FIRST, 0);
    let read = vectored::read_from_at(&memory, at, 100, &source, 0);
    expect_errno(
        read,
        libc::EINVAL,
        "vectored I/O into a page that is not granted",
    )?;
    assert_released(env, "after the error");
    Ok(())
}

#[cfg(not(feature = "additions"))]
use absent::*;

/// Scenarios of items that 0.18.0 does not have.
#[cfg(not(feature = "additions"))]
mod absent {
    use super::super::setup::skip;
    use super::{Environment, Outcome};

    pub fn vectored_io_moves_granted_pages(_: &mut dyn Environment) -> Outcome {
        Err(skip("0.18.0 has no vectored I/O"))
    }

    pub fn io_buffer_keeps_its_pages_mapped(_: &mut dyn Environment) -> Outcome {
        Err(skip("0.18.0 has no IoBuffer"))
    }

    pub fn vectored_io_of_bad_reference_returns_einval(_: &mut dyn Environment) -> Outcome {
        Err(skip("0.18.0 has no vectored I/O"))
    }
}
