//! Looking at the memory of both crates from outside, at host addresses that they gave.
#![expect(
    unsafe_code,
    reason = "guest memory is compared without using either crate"
)]

/// The smallest unit that the host maps.
pub const PAGE: usize = 4096;

/// `len` in whole pages: the harness owns, fills and compares the rest of a region's last page too.
pub fn whole_pages(len: usize) -> usize {
    len.div_ceil(PAGE) * PAGE
}

/// A range of live host memory that belongs to one of the two machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    base: usize,
    len: usize,
}

impl HostRange {
    /// The range at `base`.
    ///
    /// # Safety
    ///
    /// While the value is used, `len` bytes at `base` are mapped, readable and writable, and nothing else uses them
    /// during the calls of its methods.
    pub unsafe fn new(base: usize, len: usize) -> Self {
        HostRange { base, len }
    }

    /// Its first address.
    pub fn base(&self) -> usize {
        self.base
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: by the contract of `new` the bytes are readable and nobody writes them during this call.
        unsafe { std::slice::from_raw_parts(self.base as *const u8, self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: by the contract of `new` the bytes are writable and nobody else uses them during this call.
        unsafe { std::slice::from_raw_parts_mut(self.base as *mut u8, self.len) }
    }

    /// Writes the pattern of `seed` over it.
    pub fn fill(&mut self, seed: u8) {
        for (i, byte) in self.bytes_mut().iter_mut().enumerate() {
            *byte = pattern(seed, i);
        }
    }

    /// The offsets where the two differ, up to the shorter of both.
    pub fn differences(&self, other: &HostRange) -> Vec<usize> {
        let (a, b) = (self.bytes(), other.bytes());
        if a == b {
            return Vec::new();
        }
        (0..a.len().min(b.len()))
            .filter(|&i| a[i] != b[i])
            .collect()
    }

    /// Makes it equal to `other`, up to the shorter of both.
    pub fn copy_from(&mut self, other: &HostRange) {
        let len = self.len.min(other.len);
        self.bytes_mut()[..len].copy_from_slice(&other.bytes()[..len]);
    }

    /// A copy of its bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes().to_vec()
    }

    /// Whether it has these bytes.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        self.bytes() == bytes
    }

    /// The byte at `offset`.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes()[offset]
    }
}

/// The byte at `index` of the stream called `seed`.
pub fn pattern(seed: u8, index: usize) -> u8 {
    (index as u8)
        .wrapping_mul(37)
        .wrapping_add((index >> 8) as u8)
        .wrapping_add(seed)
        .wrapping_add(1)
}

/// `len` bytes of the stream called `seed`, from `start` on.
pub fn stream(seed: u8, start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(|i| pattern(seed, i)).collect()
}
