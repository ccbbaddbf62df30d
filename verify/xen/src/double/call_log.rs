//! [`CallLog`]: the calls that reached the devices, injected faults, and mistakes.

/// A call that reached a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Call {
    /// `MAP_GRANT_REF` of these references.
    MapGrants(Vec<u32>),
    /// `UNMAP_GRANT_REF` of this number of references.
    UnmapGrants(u32),
    /// `GRANT_COPY` of this number of segments.
    CopyGrants(u32),
    /// `MMAPBATCH_V2` of this number of frames.
    MapFrames(usize),
    /// `mmap` of a device, of a length, for writing or not.
    Mmap {
        /// The length in bytes.
        len: usize,
        /// Whether the protection permits writes.
        writing: bool,
    },
    /// `munmap` of memory of a device, of this number of bytes.
    Munmap(usize),
}

/// A fault that one call returns, without any effect.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Injection {
    /// The number of calls before it.
    pub after: usize,
    /// The error.
    pub errno: i32,
}

/// The calls that reached the devices, injected faults, and mistakes.
#[derive(Debug, Default)]
pub(super) struct CallLog {
    calls: Vec<Call>,
    /// The number of calls since `inject`, including those that map other memory.
    number: usize,
    injection: Option<Injection>,
    injected: bool,
    mistakes: Vec<String>,
}

impl CallLog {
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    pub fn clear(&mut self) {
        self.calls.clear();
    }

    pub fn inject(&mut self, injection: Option<Injection>) {
        self.injection = injection;
        self.injected = false;
        self.number = 0;
        self.calls.clear();
    }

    pub fn is_injected(&self) -> bool {
        self.injected
    }

    pub fn injected_errno(&self) -> Option<i32> {
        self.injection.map(|injection| injection.errno)
    }

    /// Records a call. Returns the error that it must return instead of its effect, if any.
    pub fn enter(&mut self, call: Call) -> Result<(), i32> {
        self.calls.push(call);
        self.enter_other()
    }

    /// Records a call that is not for a device.
    pub fn enter_other(&mut self) -> Result<(), i32> {
        let number = self.number;
        self.number += 1;
        match self.injection {
            Some(injection) if injection.after == number => {
                self.injected = true;
                Err(injection.errno)
            }
            _ => Ok(()),
        }
    }

    pub fn mistake(&mut self, what: String) {
        self.mistakes.push(what);
    }

    pub fn take_mistakes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.mistakes)
    }
}
