//! [`Environment`]: the other domain, its grants, and the devices that map them.

use std::fs::File;
use std::io;
use std::ops::Range;

use crate::double::Double;

/// The size of a page of Xen, which is that of a grant and of a frame.
pub const PAGE: usize = 4096;

/// The number of pages of the domain. Their frames are consecutive.
pub const PAGES: usize = 32;

/// The grant references that a scenario may use. None is granted when it begins.
pub const REFERENCES: Range<u32> = 16..480;

/// A domain that does not exist.
pub const NOBODY: u32 = 0x6fff;

/// The way in which this domain, which runs the back end, maps memory of others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Host {
    /// A paravirtualized domain on x86. The hypervisor undoes a mapping that fails in part.
    Pv,
    /// A domain on Arm, or a PVH domain on x86. After a mapping that fails in part, the grants that
    /// worked are mapped until `UNMAP_GRANT_REF`.
    AutoTranslated,
}

/// The accesses that a grant permits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Mapping for reading only.
    ReadOnly,
    /// Mapping for reading and writing.
    ReadWrite,
}

/// Whether a grant is mapped now, according to the hypervisor.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct InUse {
    /// Whether it is mapped.
    pub reading: bool,
    /// Whether it is mapped for writing.
    pub writing: bool,
}

/// A domain whose [`PAGES`] pages a scenario grants, and the devices of this domain.
pub trait Environment {
    /// Returns how this domain maps memory.
    fn host(&self) -> Host;

    /// Returns the number of the other domain.
    fn domain(&self) -> u32;

    /// Opens `/dev/xen/gntdev`. Each open file has a table of its own.
    ///
    /// # Errors
    ///
    /// Returns an error if the device cannot be opened.
    fn gntdev(&mut self) -> io::Result<File>;

    /// Opens `/dev/xen/privcmd`.
    ///
    /// # Errors
    ///
    /// Returns an error if the device cannot be opened.
    fn privcmd(&mut self) -> io::Result<File>;

    /// Returns the frames of the domain's pages. Mapping the frame `end` fails.
    fn frames(&self) -> Range<u64>;

    /// Grants a page to this domain, by a reference in [`REFERENCES`].
    fn grant(&mut self, reference: u32, page: usize, access: Access);

    /// Revokes a grant. Its mappings stay.
    fn revoke(&mut self, reference: u32);

    /// Returns whether a grant is mapped now.
    fn in_use(&self, reference: u32) -> InUse;

    /// Reads bytes of a page as the domain sees them.
    fn read(&self, page: usize, offset: usize, bytes: &mut [u8]);

    /// Writes bytes of a page as the domain does.
    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]);

    /// Returns the faults of a scenario: grants that are still mapped, and requests that a correct
    /// driver does not make. Returns an empty list if there are none.
    fn audit(&mut self) -> Vec<String>;

    /// Returns the double, for scenarios that run only on a double.
    fn as_double(&mut self) -> Option<&mut Double> {
        None
    }
}

/// Returns the references that are mapped now.
pub fn mapped(env: &dyn Environment) -> Vec<u32> {
    REFERENCES
        .filter(|reference| env.in_use(*reference) != InUse::default())
        .collect()
}
