//! Outcomes of operations, in a form that is independent of the crate and of host addresses.

use std::fmt;
use std::io::ErrorKind;

/// The message of a panic. It is printed, and not compared.
#[derive(Clone, Debug)]
pub struct PanicText(pub String);

impl PartialEq for PanicText {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A host address, as its distance from the start of each region.
///
/// The two machines have their regions at different addresses. Two places are equal if they have
/// the same distance from the same region.
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
    /// A host address, or a number derived from one.
    Host(Place),
    Bytes(Vec<u8>),
    Words(Vec<u64>),
    All(Vec<Out>),
    Failed(Fault),
    Panicked(PanicText),
    /// The operation does not apply: the region does not exist, or the harness does not support an
    /// operand.
    NotApplicable,
}

/// An error, without the message texts of its variants.
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
    /// Another error variant without fields.
    Named(&'static str),
    Mmap(Box<Fault>),
    Collection(&'static str),
}

impl Out {
    /// Converts a result.
    pub fn of<T: Into<Out>>(result: Result<T, Fault>) -> Out {
        match result {
            Ok(value) => value.into(),
            Err(fault) => Out::Failed(fault),
        }
    }

    /// Returns the number, if the outcome is one.
    pub fn num(&self) -> Option<u64> {
        match self {
            Out::Num(n) => Some(*n),
            _ => None,
        }
    }

    /// Returns whether it is a panic.
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
