//! [`Unchecked`]: a description as it is received, before it is checked.

use std::error::Error;
use std::iter::successors;

use serde::Deserialize;

use super::{Description, RegionDescription};

/// A [`Description`] whose regions have not been checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Unchecked {
    version: u32,
    regions: Vec<RegionDescription>,
}

impl TryFrom<Unchecked> for Description {
    /// The messages of an error and its causes: the errors of serde keep only a message.
    type Error = String;

    fn try_from(unchecked: Unchecked) -> Result<Self, Self::Error> {
        let Unchecked { version, regions } = unchecked;
        let mut description = Self { version, regions };
        description.check().map_err(|error| {
            let error: &dyn Error = &error;
            let causes = successors(Some(error), |&error| error.source());
            let messages: Vec<_> = causes.map(ToString::to_string).collect();
            messages.join(": ")
        })?;
        description.regions.sort_by_key(|region| region.span);
        Ok(description)
    }
}
