//! One line for each region of a description, as in /proc/iomem.

use std::fmt::{self, Display};

use super::{BackingDescription, Description, RegionDescription};
use crate::region::{BackingKind, Sharing};

impl Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for region in &self.regions {
            writeln!(f, "{region}")?;
        }
        Ok(())
    }
}

impl Display for RegionDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} : ", self.span)?;
        match &self.backing {
            BackingDescription::Anonymous => write!(f, "{}", BackingKind::Anonymous)?,
            BackingDescription::Descriptor {
                kind, page_size, ..
            } => match kind {
                BackingKind::Hugetlb => write!(f, "{kind} {} KiB", page_size / 1024)?,
                _ => write!(f, "{kind}")?,
            },
        }
        if let Some(name) = &self.options.name {
            write!(f, " {name:?}")?;
        }
        if let BackingDescription::Descriptor {
            index,
            offset,
            sharing,
            ..
        } = &self.backing
        {
            write!(f, ", descriptor {index} at {offset:#x}")?;
            if *sharing == Sharing::Private {
                write!(f, ", private copy")?;
            }
        }
        if let Some(described) = &self.blocks {
            let plugged = described
                .plugged
                .iter()
                .fold(0u64, |sum, (_, len)| sum.saturating_add(*len));
            let size = described.blocks.size;
            write!(f, ", blocks of {size:#x}, {plugged:#x} bytes plugged")?;
        }
        Ok(())
    }
}
