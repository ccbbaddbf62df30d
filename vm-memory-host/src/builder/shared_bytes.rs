//! Finds regions that map the same bytes of a file.

use std::collections::BTreeMap;

use crate::error::BuildError;
use crate::mapping::{FileIdentity, OpenedBacking};
use crate::region::{Region, Sharing, Span};

/// The part of a file that a region maps.
struct FilePart {
    start: u64,
    end: u64,
    /// Whether writes to the region reach the file.
    is_shared: bool,
    region: Span,
}

/// Checks that no bytes of a file are in two regions, unless both map them privately.
///
/// Bytes that a private mapping has not copied yet change with a shared mapping of them, so one
/// shared mapping is enough.
pub(super) fn check(regions: &[(Region, OpenedBacking)]) -> Result<(), BuildError> {
    let mut files: BTreeMap<FileIdentity, Vec<FilePart>> = BTreeMap::new();
    for (region, backing) in regions {
        if let (Some(identity), Some((_, offset))) = (backing.identity, &backing.file) {
            files.entry(identity).or_default().push(FilePart {
                start: *offset,
                end: offset.saturating_add(region.size),
                is_shared: backing.sharing == Sharing::Shared && !region.options.read_only,
                region: region.span(),
            });
        }
    }
    files.into_values().try_for_each(check_file)
}

/// Checks the parts of one file.
fn check_file(mut parts: Vec<FilePart>) -> Result<(), BuildError> {
    parts.sort_by_key(|part| part.start);
    // The part that ends last: of all parts so far, and of the shared ones among them.
    let (mut last, mut last_shared): (Option<&FilePart>, Option<&FilePart>) = (None, None);
    for part in &parts {
        let before = if part.is_shared { last } else { last_shared };
        if let Some(before) = before.filter(|before| before.end > part.start) {
            return Err(BuildError::SharedBytes {
                region: part.region,
                other: before.region,
                offset: part.start,
            });
        }
        let ends_last = |known: &Option<&FilePart>| known.is_none_or(|known| known.end < part.end);
        if ends_last(&last) {
            last = Some(part);
        }
        if part.is_shared && ends_last(&last_shared) {
            last_shared = Some(part);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks parts, each as start, end and whether it is shared.
    fn conflict(parts: &[(u64, u64, bool)]) -> Option<(u64, u64)> {
        let parts = parts.iter().zip(0..);
        let parts = parts.map(|(&(start, end, is_shared), n)| FilePart {
            start,
            end,
            is_shared,
            region: Span { start: n, size: 1 },
        });
        match check_file(parts.collect()) {
            Err(BuildError::SharedBytes { region, other, .. }) => Some((other.start, region.start)),
            other => {
                other.unwrap();
                None
            }
        }
    }

    #[test]
    fn check_file_finds_common_bytes_unless_all_are_private() {
        assert_eq!(conflict(&[(0, 4, true), (4, 8, true)]), None);
        assert_eq!(conflict(&[(4, 8, true), (0, 5, true)]), Some((1, 0)));
        assert_eq!(conflict(&[(0, 8, false), (2, 4, false)]), None);
        assert_eq!(conflict(&[(0, 8, false), (2, 4, true)]), Some((0, 1)));
        assert_eq!(conflict(&[(0, 8, true), (2, 4, false)]), Some((0, 1)));
        // A long part before shorter ones.
        let long = [(0, 100, true), (100, 101, true), (50, 51, false)];
        assert_eq!(conflict(&long), Some((0, 2)));
        let private = [(0, 100, false), (1, 2, false), (50, 60, true)];
        assert_eq!(conflict(&private), Some((0, 2)));
    }
}
