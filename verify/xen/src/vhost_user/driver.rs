//! The guest's driver: it grants pages, and writes rings and buffers in them.
//!
//! The rings begin inside pages, as those of Linux do.

use std::fs::File;
use std::ops::Range;

use crate::environment::{mapped, Access, Environment, PAGE};
use crate::outcome::Outcome;

/// The number of descriptors.
pub const SIZE: u16 = 16;

/// The descriptor table, the available ring and the used ring: offsets in the pages of rings, and
/// sizes in bytes.
pub const RINGS: [(usize, u64); 3] = [(0x400, 16 * 16), (0x500, 6 + 2 * 16), (0x1208, 6 + 8 * 16)];

/// The first reference, which is that of the first page of the rings.
const FIRST: u32 = 100;
const RING_PAGES: usize = 2;
/// The first pages of the readable and of the writable buffer, of [`BUFFER_PAGES`] each.
const READABLE: usize = 4;
const WRITABLE: usize = 8;
const BUFFER_PAGES: usize = 3;
/// The sizes of buffers, which end inside a page.
const LENGTHS: [usize; 4] = [8, 4096, 512, 5000];

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;

/// The buffer of a request that the driver does not grant.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Missing {
    Nothing,
    /// The buffer that the device must read.
    Readable,
    /// The last page of the buffer that the device must write.
    EndOfWritable,
}

/// The driver.
pub struct Driver<'a> {
    env: &'a mut dyn Environment,
}

impl<'a> Driver<'a> {
    /// Grants the pages of the rings, which are empty.
    pub fn new(env: &'a mut dyn Environment) -> Self {
        for page in 0..RING_PAGES {
            env.write(page, 0, &[0; PAGE]);
        }
        let driver = Self { env };
        for (reference, page) in driver.ring_references().into_iter().zip(0..) {
            driver.env.grant(reference, page, Access::ReadWrite);
        }
        driver
    }

    /// Returns the domain.
    pub fn env(&self) -> &dyn Environment {
        self.env
    }

    /// Returns a descriptor of gntdev.
    pub fn device(&mut self) -> Outcome<File> {
        Ok(self.env.gntdev()?)
    }

    /// Returns the references of the rings.
    pub fn ring_references(&self) -> Vec<u32> {
        (FIRST..).take(RING_PAGES).collect()
    }

    /// Returns the guest address of a byte of the rings.
    pub fn ring_address(&self, offset: usize) -> u64 {
        address(FIRST, offset)
    }

    /// Returns the guest address of the region of buffers.
    pub fn buffer_address(&self) -> u64 {
        self.ring_address(RING_PAGES * PAGE)
    }

    /// Offers a request.
    pub fn offer(&mut self, number: u32, missing: Missing) {
        let (offset, len) = shape(number);
        let bytes = content(number, len);
        self.write(READABLE, offset, &bytes);
        self.write(WRITABLE, offset, &vec![0xee; len]);
        if missing != Missing::Readable {
            self.grant(READABLE, Access::ReadOnly);
        }
        self.grant(WRITABLE, Access::ReadWrite);
        if missing == Missing::EndOfWritable {
            let end = u32::try_from((offset + len - 1) / PAGE).expect("pages are few");
            self.env.revoke(references(WRITABLE).start + end);
        }

        let pair = (number * 2) % u32::from(SIZE);
        let pair = u16::try_from(pair).expect("descriptors have 16 bits");
        let next = DESCRIPTOR_NEXT;
        self.descriptor(pair, buffer(READABLE, offset), len, next, pair + 1);
        self.descriptor(pair + 1, buffer(WRITABLE, offset), len, DESCRIPTOR_WRITE, 0);
        let slot = usize::try_from(number).expect("numbers are small") % usize::from(SIZE);
        let (available, _) = RINGS[1];
        self.write(0, available + 4 + 2 * slot, &pair.to_le_bytes());
        self.write(0, available + 2, &low(number + 1).to_le_bytes());
    }

    /// Checks the result of the request, and revokes the grants of its buffers.
    pub fn check(&mut self, number: u32, missing: Missing) {
        let (offset, len) = shape(number);
        let served = missing == Missing::Nothing;
        let (used, _) = RINGS[2];
        let index = u16::from_le_bytes(self.read(0, used + 2));
        assert_eq!(index, low(number + 1), "the used index");
        let slot = usize::try_from(number).expect("numbers are small") % usize::from(SIZE);
        let head = u32::from_le_bytes(self.read(0, used + 4 + 8 * slot));
        assert_eq!(head, (number * 2) % u32::from(SIZE), "request {number}");
        let written = u32::from_le_bytes(self.read(0, used + 8 + 8 * slot));
        let written = usize::try_from(written).expect("32 bits fit");
        assert_eq!(written, if served { len } else { 0 }, "request {number}");

        let mut expected = content(number, len);
        expected.iter_mut().for_each(|byte| *byte = !*byte);
        let data = self.read_vec(WRITABLE, offset, len);
        if served {
            assert!(data == expected, "the data of request {number}");
        } else {
            assert!(data.iter().all(|byte| *byte == 0xee), "request {number}");
        }

        let buffers = references(READABLE).chain(references(WRITABLE));
        let in_use = mapped(self.env);
        for reference in buffers {
            assert!(!in_use.contains(&reference), "{reference} is in use");
            self.env.revoke(reference);
        }
    }

    fn grant(&mut self, first: usize, access: Access) {
        for (reference, page) in references(first).zip(first..) {
            self.env.grant(reference, page, access);
        }
    }

    fn descriptor(&mut self, number: u16, at: u64, len: usize, flags: u16, next: u16) {
        let len = u32::try_from(len).expect("buffers are small");
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(0, RINGS[0].0 + 16 * usize::from(number), &bytes);
    }

    /// Writes bytes that may cross pages.
    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) {
        for (at, byte) in (page * PAGE + offset..).zip(bytes) {
            self.env.write(at / PAGE, at % PAGE, &[*byte]);
        }
    }

    fn read<const N: usize>(&self, page: usize, offset: usize) -> [u8; N] {
        let bytes = self.read_vec(page, offset, N);
        bytes.try_into().expect("N bytes were read")
    }

    fn read_vec(&self, page: usize, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for (at, byte) in (page * PAGE + offset..).zip(&mut bytes) {
            self.env
                .read(at / PAGE, at % PAGE, std::slice::from_mut(byte));
        }
        bytes
    }
}

/// Returns the references of a buffer. Page `n` of the domain has reference `FIRST + n`.
fn references(first: usize) -> Range<u32> {
    let first = FIRST + u32::try_from(first).expect("pages are few");
    first..first + u32::try_from(BUFFER_PAGES).expect("pages are few")
}

/// Returns the address of a byte of a buffer.
fn buffer(first: usize, offset: usize) -> u64 {
    address(references(first).start, offset)
}

/// Returns the address that Linux gives to a byte of a granted page.
fn address(reference: u32, offset: usize) -> u64 {
    let offset = u64::try_from(offset).expect("offsets are small");
    (1 << 63 | u64::from(reference) << 12) + offset
}

/// Returns the offset and the length of the buffers of a request. Most cross a page.
fn shape(number: u32) -> (usize, usize) {
    let number = usize::try_from(number).expect("numbers are small");
    (PAGE - 1 - number % 7 * 100, LENGTHS[number % LENGTHS.len()])
}

/// Returns the bytes of a request.
fn content(number: u32, len: usize) -> Vec<u8> {
    let seed = number.wrapping_mul(0x9e37_79b9);
    (0..len)
        .map(|at| seed.to_le_bytes()[at % 4].wrapping_add(at.to_le_bytes()[0]))
        .collect()
}

/// Returns a ring index, which wraps around.
fn low(number: u32) -> u16 {
    u16::try_from(number % (1 << 16)).expect("16 bits")
}
