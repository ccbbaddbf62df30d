//! [`DescriptionError`].

use super::Description;
use crate::error::{BuildError, ChangeError};
use crate::region::Span;

/// An error of a method of [`Description`].
///
/// # Examples
///
/// ```
/// use vm_memory_host::{Description, DescriptionError, Descriptors};
///
/// let mut newer = Description::new(Vec::new());
/// newer.version += 1;
/// assert!(matches!(newer.builder(Descriptors::default()), Err(DescriptionError::Version { .. })));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptionError {
    /// The description has a version that this crate does not read.
    #[error(
        "description has version {version}, but this crate reads version {}; \
        use the release that wrote it",
        Description::VERSION
    )]
    Version {
        /// Its version.
        version: u32,
    },
    /// A region refers to a descriptor that was not passed.
    #[error(
        "region {region}: descriptor {index} is missing, only {count} were passed; \
        pass all that describe() returned"
    )]
    NoDescriptor {
        /// The region.
        region: Span,
        /// The index of the descriptor.
        index: u32,
        /// The number of descriptors that were passed.
        count: usize,
    },
    /// A region is not valid, whatever the host and the files are.
    #[error(transparent)]
    Layout(#[from] BuildError),
    /// A region has blocks, but the memory does not have this region with such blocks.
    #[error(
        "region {region}: the memory has no such region with blocks of this size; \
        build it from a description of the source"
    )]
    OtherBlocks {
        /// The region.
        region: Span,
    },
    /// A block was not plugged or unplugged.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

impl DescriptionError {
    /// Returns whether it failed because pages, or memory for them, were short.
    ///
    /// The same call may succeed later. See [`BuildError::is_shortage`] and
    /// [`ChangeError::is_shortage`].
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::GuestMemoryMmap;
    /// use vm_memory_host::{Description, DescriptionError};
    ///
    /// /// Returns whether the blocks are as described. If pages are short, they may be so later.
    /// fn follow(memory: &GuestMemoryMmap, from: &Description) -> Result<bool, DescriptionError> {
    ///     match from.apply_blocks(memory) {
    ///         Err(error) if error.is_shortage() => Ok(false),
    ///         result => result.map(|()| true),
    ///     }
    /// }
    /// assert!(follow(&GuestMemoryMmap::new(), &Description::new(Vec::new()))?);
    /// # Ok::<(), DescriptionError>(())
    /// ```
    #[must_use]
    pub fn is_shortage(&self) -> bool {
        match self {
            DescriptionError::Layout(error) => error.is_shortage(),
            DescriptionError::Change(error) => error.is_shortage(),
            _ => false,
        }
    }
}
