//! What came of an operation, in a form that does not depend on the crate or on where the host put its memory.

use std::fmt;
use std::io::ErrorKind;

/// The text of a panic: shown, never compared.
#[derive(Clone, Debug)]
pub struct PanicText(pub String);

impl PartialEq for PanicText {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A host address, and how far it is from where each region starts.
///
/// The two machines have their regions at other addresses, and each other's neighbours: two places are the same if they
/// are equally far from the same region.
#[derive(Clone)]
pub struct Place {
    pub raw: usize,
    pub from_region: Vec<usize>,
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
            || self
                .from_region
                .iter()
                .zip(&other.from_region)
                .any(|(a, b)| a == b)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self
            .from_region
            .iter()
            .enumerate()
            .min_by_key(|(_, offset)| **offset)
        {
            Some((region, offset)) if *offset < 1 << 32 => {
                write!(f, "region {region} + {offset:#x}")
            }
            _ => write!(f, "{:#x}", self.raw),
        }
    }
}

/// The outcome of an operation.
#[derive(Clone, Debug, PartialEq)]
pub enum Out {
    Nothing,
    Absent,
    Bool(bool),
    Num(u64),
    /// A host address, or a number that was made from one.
    Host(Place),
    Bytes(Vec<u8>),
    Words(Vec<u64>),
    All(Vec<Out>),
    Failed(Fault),
    Panicked(PanicText),
    /// The operation has no meaning here (no such region, an operand that the harness will not pass on).
    NotApplicable,
}

/// An error. Texts that a variant carries for people are left out.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    InvalidGuestAddress(u64),
    InvalidBackendAddress,
    PartialBuffer {
        expected: usize,
        completed: usize,
    },
    HostAddressNotAvailable,
    CallbackOutOfRange,
    GuestAddressOverflow,
    Io(ErrorKind, Option<i32>),
    Iommu(Box<Fault>),
    CannotResolve {
        base: u64,
        len: usize,
    },
    Fragmented {
        base: u64,
        len: usize,
        continuous: usize,
    },
    IommuMisconfigured,
    Unmapped {
        misses: Vec<(u64, usize)>,
        access_fails: Vec<(u64, usize)>,
    },
    OutOfBounds(Box<Out>),
    Overflow {
        base: Box<Out>,
        offset: usize,
    },
    TooBig {
        nelements: usize,
        size: usize,
    },
    Misaligned {
        addr: Box<Out>,
        alignment: usize,
    },
    /// A variant without fields of one of the other errors.
    Named(&'static str),
    Mmap(Box<Fault>),
    Collection(&'static str),
}

impl Out {
    /// The outcome of something that may fail.
    pub fn of<T: Into<Out>>(result: Result<T, Fault>) -> Out {
        match result {
            Ok(value) => value.into(),
            Err(fault) => Out::Failed(fault),
        }
    }

    /// The number in it, if it is one.
    pub fn num(&self) -> Option<u64> {
        match self {
            Out::Num(n) => Some(*n),
            _ => None,
        }
    }

    /// Whether it is a panic.
    pub fn panicked(&self) -> bool {
        matches!(self, Out::Panicked(_))
    }
}

impl From<()> for Out {
    fn from((): ()) -> Out {
        Out::Nothing
    }
}

impl From<bool> for Out {
    fn from(value: bool) -> Out {
        Out::Bool(value)
    }
}

impl From<u64> for Out {
    fn from(value: u64) -> Out {
        Out::Num(value)
    }
}

impl From<usize> for Out {
    fn from(value: usize) -> Out {
        Out::Num(value as u64)
    }
}

impl From<Vec<u8>> for Out {
    fn from(value: Vec<u8>) -> Out {
        Out::Bytes(value)
    }
}

impl From<Vec<Out>> for Out {
    fn from(value: Vec<Out>) -> Out {
        Out::All(value)
    }
}

impl<T: Into<Out>> From<Option<T>> for Out {
    fn from(value: Option<T>) -> Out {
        value.map_or(Out::Absent, Into::into)
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Fault {
        Fault::Io(error.kind(), error.raw_os_error())
    }
}
