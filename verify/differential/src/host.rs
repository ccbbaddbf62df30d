//! Access to the memory of both crates by host address, without using either crate.
#![expect(unsafe_code, reason = "compares guest memory without either crate")]

/// The smallest unit that the host maps.
pub const PAGE: usize = 4096;

/// Returns `len` rounded up to whole pages. The harness also fills and compares the rest of the
/// last page.
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
    /// Creates the range at `base`.
    ///
    /// # Safety
    ///
    /// While the value is in use, `len` bytes at `base` are mapped, readable and writable. Nothing
    /// else accesses them during the calls of its methods.
    pub unsafe fn new(base: usize, len: usize) -> Self {
        HostRange { base, len }
    }

    /// Returns the first address.
    pub fn base(&self) -> usize {
        self.base
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "no guest runs: the clause of `new` excludes other accesses"
    )]
    fn bytes(&self) -> &[u8] {
        // SAFETY: `new` requires that the bytes are readable, and that nothing writes them during
        // this call.
        unsafe { std::slice::from_raw_parts(self.base as *const u8, self.len) }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "no guest runs: the clause of `new` excludes other accesses"
    )]
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `new` requires that the bytes are writable, and that nothing else uses them
        // during this call.
        unsafe { std::slice::from_raw_parts_mut(self.base as *mut u8, self.len) }
    }

    /// Fills the range with the pattern of `seed`.
    pub fn fill(&mut self, seed: u8) {
        for (i, byte) in self.bytes_mut().iter_mut().enumerate() {
            *byte = pattern(seed, i);
        }
    }

    /// Returns the offsets at which two ranges differ, up to the shorter length.
    pub fn differences(&self, other: &HostRange) -> Vec<usize> {
        let (a, b) = (self.bytes(), other.bytes());
        if a == b {
            return Vec::new();
        }
        (0..a.len().min(b.len()))
            .filter(|&i| a[i] != b[i])
            .collect()
    }

    /// Copies the bytes of `other` to the range, up to the shorter length.
    pub fn copy_from(&mut self, other: &HostRange) {
        let len = self.len.min(other.len);
        self.bytes_mut()[..len].copy_from_slice(&other.bytes()[..len]);
    }

    /// Returns a copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes().to_vec()
    }

    /// Returns whether the range consists of these bytes.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        self.bytes() == bytes
    }

    /// Returns the byte at `offset`.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes()[offset]
    }
}

/// Returns the byte at `index` of the pseudo-random stream `seed`.
pub fn pattern(seed: u8, index: usize) -> u8 {
    (index as u8)
        .wrapping_mul(37)
        .wrapping_add((index >> 8) as u8)
        .wrapping_add(seed)
        .wrapping_add(1)
}

/// Returns `len` bytes of the pseudo-random stream `seed`, starting at `start`.
pub fn stream(seed: u8, start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(|i| pattern(seed, i)).collect()
}
