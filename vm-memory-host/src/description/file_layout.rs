//! [`FileLayout`]: the offsets of guest memory in a file that holds all regions.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::region::Span;

/// The offsets of guest memory in a file that holds all regions one after another.
///
/// Such a file is the usual format of a guest snapshot. The regions are in the order of their
/// addresses, and holes between them take no space:
///
/// ```text
///   guest   0x0            0x4000_0000      0x1_0000_0000
///           ├── region 1 ──┤                ├── region 2 ──┤
///   file    ├── region 1 ──┼── region 2 ──┤
/// ```
///
/// # Examples
///
/// Save guest memory to a file, and start a guest from it:
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
/// use vm_memory_host::{Backing, FileLayout, MemoryBuilder, Region};
///
/// let region = |start| Region::new(GuestAddress(start), 1 << 20);
/// let builder = MemoryBuilder::new().region(region(0)).region(region(1 << 32));
/// let memory: GuestMemoryMmap = builder.build()?;
/// memory.write_obj(7u8, GuestAddress((1 << 32) + 0x1000))?;
///
/// let layout = FileLayout::of(&memory)?;
/// let mut file = tempfile::tempfile()?;
/// for region in memory.iter() {
///     let len = usize::try_from(region.len())?;
///     memory.write_all_volatile_to(region.start_addr(), &mut file, len)?;
/// }
/// assert_eq!(file.metadata()?.len(), layout.len());
/// assert_eq!(layout.offset_of(GuestAddress((1 << 32) + 0x1000)), Some((1 << 20) + 0x1000));
///
/// let mut builder = MemoryBuilder::new();
/// for (span, offset) in layout.regions() {
///     let backing = Backing::private_file(file.try_clone()?, offset);
///     builder = builder.region(Region::new(GuestAddress(span.start), span.size).backing(backing));
/// }
/// let restored: GuestMemoryMmap = builder.build()?;
/// assert_eq!(restored.read_obj::<u8>(GuestAddress((1 << 32) + 0x1000))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Vec<Span>", into = "Vec<Span>"))]
#[doc(alias = "snapshot")]
#[doc(alias = "ram_addr_t")]
pub struct FileLayout {
    /// The regions by address, each with its offset. Both ascend.
    regions: Vec<(Span, u64)>,
    len: u64,
}

/// An error of [`FileLayout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileLayoutError {
    /// A region is empty or does not end below 2^64.
    #[error("region {region} is empty or passes 2^64; leave it out or make it smaller")]
    Region {
        /// The region.
        region: Span,
    },
    /// A region begins before the end of the previous one.
    #[error("region {region} begins before the end of region {other}; sort the regions")]
    Order {
        /// The region.
        region: Span,
        /// The previous region.
        other: Span,
    },
    /// The file would be longer than 2^63 - 1 bytes.
    #[error(
        "region {region} would end past the largest length of a file, 0x7fffffffffffffff bytes; \
        use fewer or smaller regions"
    )]
    TooLong {
        /// The region.
        region: Span,
    },
}

/// Lays out ranges as [`FileLayout::from_spans`] does.
impl TryFrom<Vec<Span>> for FileLayout {
    type Error = FileLayoutError;

    fn try_from(spans: Vec<Span>) -> Result<Self, FileLayoutError> {
        Self::from_spans(spans)
    }
}

/// Returns the ranges of the layout, in ascending order.
impl From<FileLayout> for Vec<Span> {
    fn from(layout: FileLayout) -> Self {
        let regions = layout.regions.into_iter();
        regions.map(|(span, _)| span).collect()
    }
}

impl FileLayout {
    /// Lays out the regions of guest memory, which need not come from this crate.
    ///
    /// # Errors
    ///
    /// Returns a [`FileLayoutError`] under the conditions that [`from_spans`](Self::from_spans)
    /// lists.
    pub fn of<M: GuestMemoryBackend>(memory: &M) -> Result<Self, FileLayoutError>
    where
        M::R: GuestMemoryRegion,
    {
        Self::from_spans(memory.iter().map(|region| Span {
            start: region.start_addr().0,
            size: region.len(),
        }))
    }

    /// Lays out ranges of guest addresses, which must be in ascending order.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::GuestAddress;
    /// use vm_memory_host::{FileLayout, Span};
    ///
    /// let spans = [Span { start: 0, size: 0x8000 }, Span { start: 0x10000, size: 0x8000 }];
    /// let layout = FileLayout::from_spans(spans)?;
    /// assert_eq!(layout.offset_of(GuestAddress(0x10010)), Some(0x8010));
    /// assert_eq!(layout.address_at(0x8010), Some(GuestAddress(0x10010)));
    /// // A hole.
    /// assert_eq!(layout.offset_of(GuestAddress(0x8000)), None);
    /// # Ok::<(), vm_memory_host::FileLayoutError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns a [`FileLayoutError`] if a range is empty or passes 2^64, or if the ranges overlap
    /// or are not in ascending order. Also returns one if the file would be longer than 2^63 - 1
    /// bytes.
    pub fn from_spans(spans: impl IntoIterator<Item = Span>) -> Result<Self, FileLayoutError> {
        let (mut regions, mut len) = (Vec::new(), 0u64);
        let mut before: Option<Span> = None;
        for region in spans {
            if region.size == 0 || region.start.checked_add(region.size).is_none() {
                return Err(FileLayoutError::Region { region });
            }
            let overlaps = |other: &Span| other.start.saturating_add(other.size) > region.start;
            if let Some(other) = before.filter(overlaps) {
                return Err(FileLayoutError::Order { region, other });
            }
            let end = len.checked_add(region.size);
            let end = end.filter(|end| *end <= u64::MAX >> 1);
            regions.push((region, len));
            len = end.ok_or(FileLayoutError::TooLong { region })?;
            before = Some(region);
        }
        Ok(Self { regions, len })
    }

    /// Returns the length of the file in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "the length of a file, not of a collection"
    )]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the regions by address, each with its offset in the file.
    pub fn regions(&self) -> impl Iterator<Item = (Span, u64)> + '_ {
        self.regions.iter().copied()
    }

    /// Returns the offset of a guest address in the file, or `None` if no region contains it.
    pub fn offset_of(&self, addr: GuestAddress) -> Option<u64> {
        let index = self
            .regions
            .partition_point(|(region, _)| region.start <= addr.0);
        let (region, offset) = self.regions.get(index.checked_sub(1)?)?;
        let inside = addr.0.checked_sub(region.start)?;
        (inside < region.size).then(|| offset.saturating_add(inside))
    }

    /// Returns the offset of a range of guest addresses that is contiguous in the file.
    ///
    /// That is any range without holes, even over several regions. Returns `None` if the range is
    /// empty, has a hole, or passes 2^64.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::GuestAddress;
    /// use vm_memory_host::{FileLayout, Span};
    ///
    /// let span = |start, size| Span { start, size };
    /// let layout = FileLayout::from_spans([span(0, 64), span(64, 64), span(256, 64)])?;
    /// assert_eq!(layout.offset_of_range(GuestAddress(32), 64), Some(32));
    /// assert_eq!(layout.offset_of_range(GuestAddress(96), 192), None);
    /// # Ok::<(), vm_memory_host::FileLayoutError>(())
    /// ```
    pub fn offset_of_range(&self, addr: GuestAddress, len: u64) -> Option<u64> {
        let more = len.checked_sub(1)?;
        let first = self.offset_of(addr)?;
        let last = self.offset_of(GuestAddress(addr.0.checked_add(more)?))?;
        // A hole takes no space, so it makes the distance in the file smaller.
        (last.checked_sub(first) == Some(more)).then_some(first)
    }

    /// Returns the guest address at an offset of the file, or `None` past its end.
    pub fn address_at(&self, offset: u64) -> Option<GuestAddress> {
        let index = self.regions.partition_point(|(_, start)| *start <= offset);
        let (region, start) = self.regions.get(index.checked_sub(1)?)?;
        let inside = offset.checked_sub(*start)?;
        (inside < region.size).then(|| GuestAddress(region.start.saturating_add(inside)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, size: u64) -> Span {
        Span { start, size }
    }

    #[test]
    fn offset_of_and_address_at_agree_with_a_list_of_all_bytes() {
        let spans = [span(3, 4), span(7, 2), span(20, 5), span(u64::MAX - 4, 4)];
        let layout = FileLayout::from_spans(spans).unwrap();
        let bytes = spans
            .iter()
            .flat_map(|span| span.start..span.start + span.size);
        let bytes: Vec<u64> = bytes.collect();
        assert_eq!(layout.len(), bytes.len() as u64);
        for addr in (0..30).chain(u64::MAX - 8..=u64::MAX) {
            let expected = bytes.iter().position(|byte| *byte == addr);
            let expected = expected.map(|at| at as u64);
            assert_eq!(layout.offset_of(GuestAddress(addr)), expected, "{addr}");
            for len in 0..10u64 {
                let range = addr.checked_add(len).map(|end| addr..end);
                let whole = range
                    .filter(|range| len > 0 && range.clone().all(|byte| bytes.contains(&byte)));
                let expected = whole.and(expected);
                let found = layout.offset_of_range(GuestAddress(addr), len);
                assert_eq!(found, expected, "{len} at {addr}");
            }
        }
        for (offset, addr) in bytes.iter().enumerate() {
            let found = layout.address_at(offset as u64);
            assert_eq!(found, Some(GuestAddress(*addr)));
        }
        assert_eq!(layout.address_at(layout.len()), None);
        assert_eq!(layout.address_at(u64::MAX), None);
    }

    #[test]
    fn from_spans_of_invalid_ranges_returns_error() {
        let error = |spans: &[Span]| FileLayout::from_spans(spans.to_vec()).unwrap_err();
        let region = span(0, 0);
        assert_eq!(error(&[region]), FileLayoutError::Region { region });
        let region = span(u64::MAX, 1);
        assert_eq!(error(&[region]), FileLayoutError::Region { region });
        let (other, region) = (span(4, 4), span(7, 4));
        assert_eq!(
            error(&[other, region]),
            FileLayoutError::Order { region, other }
        );
        let (other, region) = (span(4, 4), span(0, 4));
        assert_eq!(
            error(&[other, region]),
            FileLayoutError::Order { region, other }
        );
        let (first, region) = (span(0, 1 << 62), span(1 << 62, 1 << 62));
        assert_eq!(error(&[first, region]), FileLayoutError::TooLong { region });
        assert_eq!(FileLayout::from_spans([]).unwrap().len(), 0);
    }
}
